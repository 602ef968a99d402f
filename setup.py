"""Builds the C++ core with CMake; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake for ``sparse_engine._C``; PyTorch is not needed for it."""

    def build_extension(self, ext: Extension) -> None:
        in_place = bool(getattr(self, "editable_mode", False)) or bool(getattr(self, "_into_checkout", False))
        output = ROOT / "sparse_engine" if in_place else Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / "release" if in_place else Path(self.build_temp).resolve() / "cmake"
        subprocess.run(
            [
                "cmake",
                *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DSE_OUTPUT_DIR={output}",
                f"-DSE_CUDA={os.environ.get('SPARSE_ENGINE_CUDA', 'ON')}",
                *os.environ.get("CMAKE_ARGS", "").split(),
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def run(self) -> None:
        # setuptools clears `inplace` while it builds and then copies; CMake puts the modules where they belong itself.
        self._into_checkout = self.inplace
        super().run()

    def copy_extensions_to_source(self) -> None:
        pass


def extensions() -> list[Extension]:
    # `make setup` builds separately, so that only one thing decides what is up to date.
    if os.environ.get("SPARSE_ENGINE_SKIP_BUILD") == "1" or not any((ROOT / "csrc" / "bind").glob("*.cpp")):
        return []
    return [Extension("sparse_engine._C", sources=[])]


def packages() -> tuple[list[str], dict[str, str]]:
    """The packages to install, and the folders of those that lie elsewhere: kernels/ becomes sparse_engine.kernels."""
    names = find_packages(str(ROOT), include=["sparse_engine", "sparse_engine.*"])
    folders: dict[str, str] = {}
    if (ROOT / "kernels" / "__init__.py").exists():
        below = find_packages(str(ROOT / "kernels"))
        names += ["sparse_engine.kernels", *(f"sparse_engine.kernels.{name}" for name in below)]
        folders["sparse_engine.kernels"] = "kernels"
    return names, folders


NAMES, FOLDERS = packages()
setup(packages=NAMES, package_dir=FOLDERS, ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
