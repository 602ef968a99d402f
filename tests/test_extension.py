"""The compiled module and the Python code beside it: one number says that they belong together."""

from __future__ import annotations

import hashlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_engine import _C
from sparse_engine.errors import ExtensionError
from sparse_engine.ops import native

ROOT = Path(__file__).parents[1]

#: What the interface with this number looks like.
FINGERPRINT = {12: "1847ad8dbbc387e4"}


def interface() -> list[str]:
    """Every function and method of the module with the names of its arguments."""
    members = {name: member for name, member in vars(_C).items() if not name.startswith("_")}
    for name, member in list(members.items()):
        if inspect.isclass(member):
            own = {key: value for key, value in vars(member).items() if key == "__init__" or not key.startswith("_")}
            members |= {f"{name}.{key}": value for key, value in own.items()}
    lines = []
    for name, member in sorted(members.items()):
        signature = rf"(?m)^(?:\d+\. )?{re.escape(name.rpartition('.')[2])}\((.*)\) ->"
        for arguments in re.findall(signature, getattr(member, "__doc__", None) or ""):
            names = re.findall(r"(\w+): ", arguments)
            lines.append(f"{name}({', '.join(names)})")
    return lines


def test_the_number_is_raised_when_the_interface_changes():
    assert _C.interface == native.INTERFACE
    found = hashlib.sha256("\n".join(interface()).encode()).hexdigest()[:16]
    assert {native.INTERFACE: found} == FINGERPRINT, (
        "csrc/bind/module.cpp changed: raise kInterface there and INTERFACE in sparse_engine/ops/native.py, run "
        f"`make build`, and set FINGERPRINT here to {{NUMBER: {found!r}}}"
    )


def test_a_large_output_takes_the_memory_of_the_last_one():
    first = native.empty(2100, 1000)
    where, view = first.data_ptr(), first[1:]
    del first
    second = native.empty(2100, 1000)
    assert second.data_ptr() != where, "a part of it is still in use"
    del view
    assert native.empty(2099, 1000).data_ptr() == where
    assert native.empty(2, 3).shape == (2, 3)


@pytest.mark.parametrize("built", [{}, {"interface": native.INTERFACE - 1}, {"interface": native.INTERFACE + 1}])
def test_a_module_of_another_interface_is_refused(built):
    with pytest.raises(ExtensionError, match=r"_C\.so was built from other sources .*make build"):
        native._checked(SimpleNamespace(__file__="_C.so", **built))


# A module from before there was a number, as an old build folder would hold.
OLD = """
import importlib.machinery, sys, types
old = types.ModuleType("sparse_engine._C")
old.__file__, old.__spec__ = "old/_C.so", importlib.machinery.ModuleSpec("sparse_engine._C", None)
sys.modules["sparse_engine._C"] = old
import sparse_engine
sparse_engine._C = old
"""


@pytest.mark.parametrize(
    "code, status, said",
    [
        ("sparse_engine.convert", 1, "ExtensionError: old/_C.so was built"),
        ("sparse_engine.nn", 1, "ExtensionError: old/_C.so was built"),
        ("sparse_engine.cli.main(['convert', '--model', 'mlp'])", 1, "error: old/_C.so was built"),
        ("sparse_engine.cli.main(['doctor'])", 0, "old/_C.so was built"),
    ],
)
def test_one_message_wherever_it_is_met(code, status, said):
    done = subprocess.run([sys.executable, "-c", OLD + code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    printed = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == status, printed
    assert said in printed
    assert "make build" in printed
