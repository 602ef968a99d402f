"""torchvision's definitions where its compiled operators cannot be loaded; nothing is touched where they can."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sparse_engine.errors import RecipeError
from sparse_engine.train import _torchvision
from sparse_engine.train.models import build

ROOT = Path(__file__).parents[2]

# A package that behaves like torchvision while it is imported. {operators} is what its compiled part would do.
PACKAGE = """
import torch
from . import extension
from torchvision import shapes
from . import models
"""
SHAPES = """
import torch, torchvision.extension
assert torchvision.extension.loaded is not None
@torch.library.register_fake("torchvision::nms")
def shape_of_nms(dets, scores, iou_threshold):
    return dets.new_empty(0)
"""
MODELS = """
from torch import nn
def get_model(name, weights=None, **options):
    return nn.Linear(2, 3)
"""
CALL = """
import torch
from sparse_engine.train import _torchvision
from sparse_engine.train.models import build
print(build("torchvision:anything"))
import torchvision
assert _torchvision.import_torchvision() is torchvision
assert torchvision.extension.loaded in (True, False) and torchvision.models and torchvision.shapes
print("declared", len(_torchvision._kept), "imports of the compiled part", torch.imports)
"""
MISSING = "import torch\ntorch.imports = getattr(torch, 'imports', 0) + 1\nloaded = False\n"
PRESENT = MISSING + textwrap.dedent(
    """
    library = torch.library.Library("torchvision", "DEF")  # refuses a schema that somebody else declared
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    loaded = True
    """
)


def call(folder: Path, extension: str) -> subprocess.CompletedProcess[str]:
    package = folder / "torchvision"
    package.mkdir()
    for name, text in {"__init__": PACKAGE, "shapes": SHAPES, "models": MODELS, "extension": extension}.items():
        (package / f"{name}.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, timeout=240)


def test_missing_operators_are_declared(tmp_path):
    done = call(tmp_path, MISSING)
    assert done.returncode == 0, done.stderr
    assert "declared 1 imports of the compiled part 2" in done.stdout


def test_nothing_changes_where_torchvision_imports(tmp_path):
    done = call(tmp_path, PRESENT)
    assert done.returncode == 0, done.stderr
    assert "declared 0 imports of the compiled part 1" in done.stdout


def test_another_failure_is_reported_as_it_is(tmp_path):
    done = call(tmp_path, "raise RuntimeError('compiled for another planet')")
    assert "RecipeError: model torchvision:anything cannot be built: compiled for another planet" in done.stderr


def test_the_installed_library_builds_by_name():
    assert type(build("torchvision:resnet18", num_classes=3)).__name__ == "ResNet"
    torchvision = _torchvision.import_torchvision()
    if not torchvision.extension._has_ops():
        with pytest.raises(RuntimeError, match="custom C\\+\\+ ops"):
            torchvision.ops.nms(*[None] * 3)
    with pytest.raises(RecipeError, match="cannot be built: Unknown model resnet51"):
        build("torchvision:resnet51")
    with pytest.raises(RecipeError, match=r"cannot be built: .*wings"):
        build("torchvision:resnet18", wings=2)
