"""Checkpoints of a run: one file, replaced atomically after every epoch, read without running code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from sparse_engine.errors import CheckpointError
from sparse_engine.io.atomic import atomic_write

VERSION = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain data, whole or not at all.

    Example::

        save_checkpoint(folder / "checkpoint.pt", {"phase": 1, "epoch": 3, "model": model.state_dict()})
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **content}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain data are accepted.

    Raises:
        CheckpointError: for a file that is damaged, of another kind or of a newer version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or "version" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of a training run")
    if content["version"] > VERSION:
        raise CheckpointError(f"{path} has version {content['version']}; this installation reads up to {VERSION}")
    return content
