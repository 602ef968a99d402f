#!/usr/bin/env bash
# Runs Python tests against the module built with the address and undefined-behaviour sanitizers.
#
#   tests/cpp/python_under_asan.sh BUILD_FOLDER PYTHON [TESTS…]
#
# The sanitized module lies in BUILD_FOLDER/stage; the package's Python files are copied beside it, so that nothing in the checkout changes. PyTorch and
# Python themselves are not instrumented: the sanitizer sees the module's own accesses and everything that it allocates or is handed.
set -euo pipefail
build=$1 python=$2
shift 2
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then tests=(tests/ops tests/nn tests/test_isa.py tests/convert/test_{pairs,row_tiles,winograd,depthwise}.py); fi

stage=$build/stage
find sparse_engine -name '*.py' -o -name '*.yaml' -o -name '*.json' -o -name '*.html' -o -name 'py.typed' | while read -r file; do
  mkdir -p "$stage/$(dirname "$file")"
  cp "$file" "$stage/$file"
done
if [ -d kernels ]; then mkdir -p "$stage/sparse_engine/kernels" && cp kernels/*.py "$stage/sparse_engine/kernels/"; fi

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
runtime=$("$compiler" -print-file-name=libasan.so)
if [ ! -e "$runtime" ]; then
  echo "$compiler has no shared address sanitizer runtime (libasan.so); configure $build with g++" >&2
  exit 1
fi
# The C++ runtime is preloaded too: the sanitizer must find __cxa_throw when it starts.
export LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so.6)"
# Python keeps memory until it exits, and PyTorch's own allocations are not ours to judge.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
# torch.compile starts compilers that must not inherit the preloaded runtime.
exec "$python" -m pytest -q -p no:cacheprovider -o pythonpath="$stage" -k 'not compile and not spawn and not ddp' "${tests[@]}"
