"""Triton kernels for NVIDIA GPUs, one subject per file. Nothing here is imported before it is used, so the package
loads without Triton.

Example:
    >>> from sparse_engine import kernels
    >>> pattern = kernels.block_pattern(kept, (64, 64))                      # doctest: +SKIP
    >>> y = kernels.block_sparse_linear(x, kernels.pack_blocks(w, pattern), pattern)   # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_HOMES: dict[str, tuple[str, ...]] = {
    "block_sparse": (
        "BLOCK_SIZES",
        "BlockPattern",
        "block_pattern",
        "block_sparse_input_gradient",
        "block_sparse_linear",
        "block_sparse_weight_gradient",
        "pack_blocks",
        "pattern_of",
        "unpack_blocks",
    ),
    "distill": ("DistillResult", "distill_rows", "kd_loss", "scale_rows_"),
    "self_distill": ("PredictionTable", "TableRows", "cs_kd_loss", "dlb_loss", "ps_kd_loss", "ps_kd_rows"),
    "linear_kd": ("LinearKDResult", "linear_kd_loss"),
    "masked": ("TileLists", "masked_input_gradient", "masked_linear", "masked_weight_gradient", "tile_lists"),
    "conv": (
        "ChannelList",
        "ConvGeometry",
        "channel_conv",
        "channel_conv_input_gradient",
        "channel_conv_weight_gradient",
        "channel_list",
    ),
    "nm": ("nm_linear", "pack_nm", "unpack_nm"),
    "aot": ("compile_all",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF) + ["available", "why_not"]


def why_not() -> list[str]:
    """Reasons why these kernels cannot run in this process at all; empty where they can. Looks only: never raises,
    never imports Triton."""
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed (pip install triton)"]
    from os import environ

    import torch

    if environ.get("TRITON_INTERPRET", "0") == "1":
        return []
    if not torch.cuda.is_available():
        return ["PyTorch sees no NVIDIA GPU"]
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is not None:
        return ["the kernels are tuned and tested for NVIDIA GPUs only"]
    return [] if major >= 8 else [f"compute capability {major}.{minor} is below 8.0 (Ampere)"]


def available() -> bool:
    """Whether the kernels can run in this process: on a GPU, or interpreted."""
    return not why_not()


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return __all__
