"""What stands behind the package's public names: packages that can be called, and kernels found in a checkout.

``se.prune`` is a package and the function one calls; ``se.convert`` likewise. Python sets the package as an attribute
of ``sparse_engine`` whenever any module below it is imported, so which of the two ``se.prune`` means would depend on
the order of imports. Here it is always the package, and calling the package calls its function of the same name.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

CALLABLE_PACKAGES = frozenset({"prune", "convert"})


class CallablePackage(ModuleType):
    """A package that is called like the function it is named after: ``se.prune(model, sparsity=0.9)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = vars(self)[self.__name__.rpartition(".")[2]]
        return function(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(vars(self)[self.__name__.rpartition(".")[2]])


class Face(ModuleType):
    """The type of the module ``sparse_engine``: makes each of `CALLABLE_PACKAGES` callable as it is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CALLABLE_PACKAGES and isinstance(value, ModuleType):
            value.__class__ = CallablePackage
        super().__setattr__(name, value)


class _CheckoutKernels:
    """Finds ``sparse_engine.kernels`` in the folder ``kernels/`` of a checkout, where it is not inside the package."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )


def find_kernels_in_checkout(package: str, package_folder: Path) -> None:
    """Makes ``<package>.kernels`` importable from a checkout; does nothing in an ordinary installation.

    In front of other finders: an editable installation of another checkout would give that one's kernels.
    """
    folder = package_folder.parent / "kernels"
    if (package_folder / "kernels" / "__init__.py").exists() or not (folder / "__init__.py").exists():
        return
    sys.meta_path.insert(0, _CheckoutKernels(f"{package}.kernels", folder))
