"""The package imports cheaply, and its public names lead where they should."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import sparse_engine as se


def test_import_loads_nothing_heavy() -> None:
    script = (
        "import sys, sparse_engine; "
        "print([m for m in ('torch', 'triton', 'numpy', 'matplotlib', 'sparse_engine._C') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_import_works_without_triton_and_compiled_code() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; sys.modules['sparse_engine._C'] = None\n"
        "import sparse_engine as se\n"
        "print(se.__version__, se.Unstructured())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(se.__version__)


@pytest.mark.parametrize("name", se.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(se, name) is not None
    assert name in dir(se)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="squash_"):
        _ = se.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["prune", "convert"])
def test_package_named_like_its_function_is_both(name: str) -> None:
    # whichever of the two was imported first
    script = (
        f"import sparse_engine.{name}\n"
        "import sparse_engine as se, types, inspect\n"
        f"package = se.{name}\n"
        "assert isinstance(package, types.ModuleType) and callable(package)\n"
        f"assert inspect.signature(package) == inspect.signature(package.{name})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    package = getattr(se, name)
    assert isinstance(package, types.ModuleType)
    assert callable(package)
    with pytest.raises(TypeError):
        package()


def test_errors_are_one_family() -> None:
    from sparse_engine import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.SparseEngineError)
    assert issubclass(errors.SparseEngineError, ValueError)


def test_the_kernels_are_this_packages_own() -> None:
    """Not those of another checkout that is installed in editable mode."""
    script = (
        "import sys, pathlib, importlib.machinery as m, sparse_engine\n"
        "class Elsewhere:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return m.ModuleSpec(name, None) if name == 'sparse_engine.kernels' else None\n"
        "sys.meta_path.append(Elsewhere())\n"
        "import sparse_engine.kernels as kernels\n"
        "here = pathlib.Path(sparse_engine.__file__).parent\n"
        "assert pathlib.Path(kernels.__file__).parent in (here / 'kernels', here.parent / 'kernels')\n"
    )
    elsewhere_first = script.replace(
        "import sys, pathlib, importlib.machinery as m, sparse_engine", "import sys, pathlib, importlib.machinery as m"
    ).replace("import sparse_engine.kernels", "import sparse_engine, sparse_engine.kernels")
    for order in (script, elsewhere_first):
        subprocess.run([sys.executable, "-c", order], check=True)
