"""Files of executables: the graph, the report and the recorded choices in them are checked like everything else."""

from __future__ import annotations

import copy

import pytest
import torch

import sparse_engine as se
from sparse_engine.errors import FileFormatError
from tests.io import fuzz_spx, spx_cases


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("executables")
    return fuzz_spx.corpus(folder, "load")


def _attributes(parts):
    return parts.document["attributes"]


def _node(parts, op):
    return next(node for node in parts.document["graph"]["nodes"] if node["op"] == op)


CHANGES = [
    ("threads", lambda parts: _attributes(parts).update(threads=2**31), "threads must be an int from 1 to 1024"),
    ("threads a word", lambda parts: _attributes(parts).update(threads="all"), "threads must be"),
    ("report a list", lambda parts: _attributes(parts).update(report=[1]), "report must be an object"),
    ("report without layers", lambda parts: _attributes(parts)["report"].pop("layers"), r"missing fields \['layers'\]"),
    ("layer a number", lambda parts: _attributes(parts)["report"]["layers"].append(3), r"report\.layers\[\d+\]"),
    ("time a word", lambda parts: _attributes(parts)["report"]["layers"][0].update(ms="fast"), r"layers\[0\]\.ms"),
    ("choices a list", lambda parts: _attributes(parts).update(choices=[1]), "choice of kernels"),
    ("choice a number", lambda parts: _attributes(parts).update(choices={"stem.0": 3}), "choice of kernels"),
    ("graph of version 9", lambda parts: parts.document["graph"].update(version=9), "version 9"),
    ("graph without nodes", lambda parts: parts.document["graph"].pop("nodes"), "nodes"),
    ("unknown op", lambda parts: _node(parts, "linear").update(op="system"), "system"),
    ("unknown constant", lambda parts: _node(parts, "linear")["params"].update(weight="nope"), "nope"),
    ("bias as weight", lambda parts: _swap(_node(parts, "linear")["params"]), "weight|bias"),
    ("stride 0", lambda parts: _node(parts, "conv2d")["attrs"].update(stride=[0, 0]), "stride"),
    ("groups 3", lambda parts: _node(parts, "conv2d")["attrs"].update(groups=3), "groups|channels|shape"),
    ("padding 2^31", lambda parts: _node(parts, "conv2d")["attrs"].update(padding=[2**31] * 4), "padding|out of range"),
    ("reads itself", lambda parts: _node(parts, "linear").update(inputs=_node(parts, "linear")["outputs"]), "reads"),
]


def _swap(params):
    params["weight"], params["bias"] = params["bias"], params["weight"]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_what_is_wrong_is_named(good, tmp_path, change, message):
    parts = copy.deepcopy(spx_cases.split(good[2]))
    change(parts)
    path = tmp_path / "changed.spx"
    path.write_bytes(parts.join())
    with pytest.raises(FileFormatError, match=message) as caught:
        se.load(path)
    assert "changed.spx" in str(caught.value)


def test_unchanged_parts_load_and_run(good, tmp_path):
    path = tmp_path / "same.spx"
    path.write_bytes(spx_cases.split(good[2]).join())
    executable = se.load(path)
    assert executable(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert executable.report.sparsity > 0.5


def test_damaged_executables_load_or_give_one_error(good, tmp_path):
    path = tmp_path / "case.spx"
    outcomes = set()
    for number in range(400):
        path.write_bytes(fuzz_spx.make_case(number, good))
        outcomes.add(fuzz_spx.attempt(path, "load"))
    assert len(outcomes) > 40
