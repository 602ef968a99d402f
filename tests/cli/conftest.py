"""A small pruned model in a file of its own, its checkpoint, and its executable."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparse_engine.cli import app

MODEL = textwrap.dedent(
    '''
    """A network that only this file knows."""
    import torch
    from torch import nn


    def build(width=8, classes=4):
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, classes),
        )


    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x


    def number():
        return 3


    def needs(something):
        return build(something)
    '''
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Holds net.py, pruned.pt, dense.safetensors and model.spx."""
    import sparse_engine as se

    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(MODEL)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    torch.manual_seed(0)
    model = scope["build"]().eval()
    torch.save(model.state_dict(), path / "dense.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < 0.2)
    torch.save(model.state_dict(), path / "pruned.pt")
    x = torch.randn(2, 3, 12, 12)
    se.convert(model, (x,), tune=False).save(path / "model.spx")
    torch.save({"x": x, "y": model(x).detach()}, path / "pair.pt")
    return path


@pytest.fixture
def cli(folder, tmp_path, monkeypatch) -> Callable[..., Any]:
    """Run a command line in a fresh folder that sees the files of `folder`; paths that start with @ lie there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(line: str | list[str], code: int = 0) -> Any:
        words = line.split() if isinstance(line, str) else line
        words = [word.replace("@", f"{folder}{os.sep}") for word in words]
        result = CliRunner().invoke(app, words, prog_name="sparse-engine")
        detail = f"{words}\nstdout: {result.stdout}\nstderr: {result.stderr}\n{result.exception!r}"
        assert result.exit_code == code, detail
        assert "--debug" in words or "Traceback" not in result.output, detail
        if "--json" in words and code in (0, 1):
            result.data = json.loads(result.stdout)
        return result

    return run
