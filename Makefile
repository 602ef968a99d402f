# One way to run each thing.  `make setup` once (and after pulling); `make build` after changing C++.
#
#   make setup        virtual environment in .venv with pinned versions, and the package in editable mode; does nothing when up to date
#   make build        compiles what changed of csrc/ and replaces sparse_engine/_C*.so in one step (safe while others run it)
#   make build-cuda   the same for csrc/cuda/, where nvcc is found
#   make demo         from pruning to a faster executable, in a few minutes
#   make test         C++ and Python tests (CPU only machines run everything that needs no GPU)
#   make test-slow    the long ones
#   make test-kernels the Triton and CUDA kernels without a GPU: interpreted, compiled ahead of time, and on the host
#   make test-asan    C++ and kernel tests under the address and undefined-behaviour sanitizers
#   make test-tsan    thread pool and runtime tests under the thread sanitizer
#   make lint         formatting, lint, and a C++ build with warnings as errors;  make format repairs what it can
#   make bench        the benchmarks, then the tables and plots in docs/
#   make tables       only the tables and plots, from bench/results/*.json
#
# Variables: PYTHON (the interpreter for the virtual environment), CXX (the compiler), PIP_ARGS (more arguments for pip, e.g. a CPU-only index
# for PyTorch), JOBS (parallel compilations), TESTS (what `make test` runs).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TESTS ?= tests
SETUP_FILES := pyproject.toml constraints.txt setup.py
STAMP := $(VENV)/.setup-of-$(shell cat $(SETUP_FILES) | sha256sum | cut -c1-16)

RELEASE := build/release
CXX_FOR_CMAKE := $(if $(filter default,$(origin CXX)),,-DCMAKE_CXX_COMPILER=$(CXX))
# An existing build folder keeps its generator and compiler; asking for another compiler means another folder.
ifneq ($(CXX_FOR_CMAKE),)
RELEASE := build/release-$(notdir $(CXX))
endif
CMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake
CONFIGURE = $(CMAKE) -S . -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python $(CXX_FOR_CMAKE)
CLANG_FORMAT_FILES = $(shell find csrc tests/cpp tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: help setup build build-cuda build-tests demo test test-cpp test-slow test-kernels test-asan test-tsan lint lint-cpp format bench tables clean

help:
	@sed -n '3,/^# Variables/p' Makefile | sed 's/^# \?//'

setup: $(STAMP)

$(STAMP): $(SETUP_FILES)
	@echo "Setting up $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparse_engine needs Python 3.11 or newer; set PYTHON=python3.11")'
	@$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) "setuptools>=77.0.3" pybind11 cmake ninja
	@SPARSE_ENGINE_SKIP_BUILD=1 $(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) --no-build-isolation \
	    -e '.[triton,report,demo,test,bench,lint,build]'
	@rm -f $(VENV)/.setup-of-*
	@touch $@

$(RELEASE)/build.ninja: CMakeLists.txt | $(STAMP)
	@mkdir -p build
	@$(CONFIGURE) -B $(RELEASE) -DSE_OUTPUT_DIR=$(CURDIR)/sparse_engine -DSE_BUILD_TESTS=ON > $(RELEASE).log 2>&1 || { cat $(RELEASE).log; exit 1; }
	@grep -E 'sparse_engine:' $(RELEASE).log || true
	@touch $@

build: $(RELEASE)/build.ninja
	@$(CMAKE) --build $(RELEASE) -j $(JOBS) $$(grep -q '^build place__C:' $(RELEASE)/build.ninja && echo "--target place__C")

build-cuda: $(RELEASE)/build.ninja
	@$(CMAKE) --build $(RELEASE) -j $(JOBS)

build-tests: $(RELEASE)/build.ninja
	@$(CMAKE) --build $(RELEASE) -j $(JOBS) --target cpp_tests

demo: build
	$(BIN)/python examples/demo.py

test: test-cpp
	$(BIN)/python -m pytest $(TESTS)

test-cpp: build build-tests
	$(BIN)/ctest --test-dir $(RELEASE) --output-on-failure --no-tests=error

test-slow: build
	$(BIN)/python -m pytest tests -m slow

test-kernels: build
	$(BIN)/python -m pytest tests/kernels tests/cuda

test-asan: | $(STAMP)
	$(CONFIGURE) -B build/asan -DSE_SANITIZE=address,undefined -DSE_BUILD_TESTS=ON -DSE_CUDA=OFF -DSE_OUTPUT_DIR=$(CURDIR)/build/asan/stage/sparse_engine
	$(CMAKE) --build build/asan -j $(JOBS)
	$(CMAKE) --build build/asan -j $(JOBS) --target cpp_tests
	$(BIN)/ctest --test-dir build/asan --output-on-failure --no-tests=error
	tests/cpp/python_under_asan.sh build/asan $(BIN)/python $(ASAN_TESTS)

test-tsan: | $(STAMP)
	$(CONFIGURE) -B build/tsan -DSE_SANITIZE=thread -DSE_BUILD_TESTS=ON -DSE_BUILD_PYTHON=OFF -DSE_CUDA=OFF
	$(CMAKE) --build build/tsan -j $(JOBS) --target cpp_tests
	TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $(BIN)/ctest --test-dir build/tsan --output-on-failure --no-tests=error

lint: lint-cpp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-cpp: | $(STAMP)
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMAT_FILES)
	$(CONFIGURE) -B build/lint -DSE_WERROR=ON -DSE_BUILD_TESTS=ON -DSE_CUDA=OFF > /dev/null
	$(CMAKE) --build build/lint -j $(JOBS)
	$(CMAKE) --build build/lint -j $(JOBS) --target cpp_tests

format: | $(STAMP)
	$(BIN)/ruff check --fix . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMAT_FILES)

bench: build
	$(BIN)/python -m bench
	$(BIN)/python -m bench.tables

tables: | $(STAMP)
	$(BIN)/python -m bench.tables

clean:
	rm -rf build dist *.egg-info sparse_engine/_C*.so sparse_engine/_cuda_kernels.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
