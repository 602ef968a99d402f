"""Everything about the GPU kernels in one command: builds them in place, runs their tests on the GPU, and times them
against the best libraries.

    python -m bench.gpu                         all of it, at most 8 minutes
    python -m bench.gpu --only kd_loss decode   some sections
    python -m bench.gpu --list                  the sections
    python -m bench.gpu --dry-run               without a GPU: every section in small, interpreted or on the host

Needs an NVIDIA GPU (Ampere or newer), PyTorch with Triton and, for the CUDA kernels, nvcc; no network. Writes
bench/results/gpu.json and bench/results/gpu.md (with --only, gpu_some.json and gpu_some.md). On a machine without a GPU
it says so and exits with code 2.

How it measures: random data only; between any two timed calls 1 GiB is written, so that the 50 MB L2 cache holds
nothing and the host runs ahead of the GPU; contenders of one row run in turns, and a time is the median over the turns,
between events on the GPU. Every result is compared with a float32 product (or a float64 loss on some rows) before it is
timed, and a wrong one is reported instead of timed. Ceilings are measured first: a large copy and a large product.

A dry run measures nothing and writes nothing into bench/results. It compiles csrc/cuda with nvcc where that is there,
builds the same source for the CPU, collects the tests that a GPU would run, makes the inputs of every section at tiny
sizes, calls every contender, compares the results as a real run does, and writes the tables into a folder that it
deletes. It exits with code 1 when one of our kernels is wrong or cannot run.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DEVICE = "cuda"
DTYPE = torch.bfloat16
TURNS = 15
FLUSH_BYTES = 1 << 30
# what is measured
SIZES: dict[str, Any] = {
    "copy": 1 << 28,
    "product": 8192,
    "linear": 4096,
    "many_tokens": (512, 2048),
    "conv": (64, 256, 56),
    "loss_rows": 4096,
    "loss_classes": (1000, 32000, 128000),
    "last_layer": (4096, 2048, 32000),
    "table": (4096, 1000, 50000),
}

# what a dry run takes instead: every path, on a CPU, in about a minute
DRY_SIZES: dict[str, Any] = {
    "copy": 64,
    "product": 32,
    "linear": 128,
    "many_tokens": (24,),
    "conv": (1, 16, 6),
    "loss_rows": 64,
    "loss_classes": (40,),
    "last_layer": (256, 16, 40),
    "table": (8, 20, 30),
}
OURS = ("triton", "cuda")  # how the names of our own contenders begin

Contenders = dict[str, Callable[[], Any]]
Gradients = tuple[torch.Tensor, torch.Tensor]


class Bench:
    """Clock, ceilings and rows of one run."""

    def __init__(self, minutes: float, folder: Path = RESULTS, name: str = "gpu") -> None:
        self.start = time.monotonic()
        self.limit = minutes * 60
        self.folder = folder
        self.name = name
        self.failed = False
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.copy_bytes = self.flops = float("nan")
        self._flush: torch.Tensor | None = None

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - (time.monotonic() - self.start)

    def fail(self, what: str) -> None:
        """Notes something that makes the whole run a failure."""
        self.failed = True
        self.notes.append(what)
        print(f"  {what}", flush=True)

    def times(self, contenders: Contenders, turns: int = TURNS) -> dict[str, float]:
        """Median milliseconds of each contender, run in turns with cold caches."""
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
        for call in contenders.values():
            for _ in range(2):
                call()
        torch.cuda.synchronize()
        for _ in range(turns):
            for name, call in contenders.items():
                self._flush.zero_()
                pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                pair[0].record()
                call()
                pair[1].record()
                events[name].append(pair)
        torch.cuda.synchronize()
        return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}

    def compare(
        self,
        section: str,
        what: Mapping[str, Any],
        contenders: Contenders,
        reference: Callable[[], torch.Tensor] | None,
        *,
        baseline: str,
        bound: float = 2e-2,
        flops: float = 0.0,
        done: Mapping[str, float] | None = None,
        moved: Mapping[str, float] | None = None,
        check: Callable[[Any], torch.Tensor] | Mapping[str, Callable[[Any], torch.Tensor]] | None = None,
        targets: Mapping[str, str] | None = None,
    ) -> None:
        """Checks, then times, the contenders of one line; one row for each.

        Args:
            section: the section's name. what: shape, sparsity and the like.
            contenders: the first argument of each row; those that raise are reported, not timed.
            reference: what every contender must agree with; None: not checked here.
            baseline: whose time the speed-up is relative to.
            bound: of ‖out − ref‖ / ‖ref‖.
            flops: useful operations; done: what a contender computes where that is more (a dense product computes zeros
                too), for its share of the ceiling; moved: bytes that a contender has to move at least.
            check: turns a contender's result into what is compared; one for all, or by name.
            targets: bar and goal as text.
        """
        expected = None if reference is None else reference().float()
        fit: Contenders = {}
        errors: dict[str, float | None] = {}
        for name, call in contenders.items():
            try:
                result = call()
                _synchronize()
                errors[name] = None
                if expected is not None:
                    shown = check.get(name) if isinstance(check, Mapping) else check
                    found = (shown(result) if shown is not None else result).float()
                    errors[name] = float((found - expected).norm() / expected.norm().clamp(min=1e-20))
                    if not errors[name] <= bound:
                        raise ArithmeticError(f"wrong by {errors[name]:.2e} of the norm, the bound is {bound:.0e}")
                fit[name] = call
                del result
            except Exception as problem:  # a contender that this machine lacks must not end the run
                self.rows.append({"section": section, **what, "contender": name, "problem": _short(problem)})
                self.failed |= name.startswith(OURS) or "wrong by" in str(problem)
                print(f"  {name}: {_short(problem)}", flush=True)
        del expected
        self.record(section, what, fit, errors, baseline, flops, done or {}, moved, targets)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    def record(
        self,
        section: str,
        what: Mapping[str, Any],
        fit: Contenders,
        errors: Mapping[str, float | None],
        baseline: str,
        flops: float,
        done: Mapping[str, float],
        moved: Mapping[str, float] | None,
        targets: Mapping[str, str] | None,
    ) -> None:
        """Times the contenders that are right, and makes their rows."""
        times = self.times(fit)
        for name, milliseconds in times.items():
            row: dict[str, Any] = {"section": section, **what, "contender": name, "ms": round(milliseconds, 5)}
            if baseline in times:
                row["speedup"] = round(times[baseline] / milliseconds, 3)
                row["relative_to"] = baseline
            if flops:
                row["useful_gflops"] = round(flops / milliseconds / 1e6, 1)
                row["share_of_product_ceiling"] = round(done.get(name, flops) / (milliseconds * 1e-3) / self.flops, 4)
            if moved and name in moved:
                row["gb_per_s"] = round(moved[name] / milliseconds / 1e6, 1)
                row["share_of_copy_ceiling"] = round(moved[name] / (milliseconds * 1e-3) / self.copy_bytes, 4)
            if errors[name] is not None:
                row["error"] = float(f"{errors[name]:.3e}")
            if targets and name in targets:
                row["target"] = targets[name]
            self.rows.append(row)
            shape = " ".join(f"{key}={value}" for key, value in what.items())
            print(f"  {shape} {name}: {milliseconds:.4f} ms, {row.get('speedup', '')}× {baseline}", flush=True)


class DryBench(Bench):
    """Calls and checks everything, and times nothing."""

    def times(self, contenders: Contenders, turns: int = 2) -> dict[str, float]:
        """Runs the contenders in turns, as a measurement does; there are no times."""
        for _ in range(turns):
            for call in contenders.values():
                call()
        return dict.fromkeys(contenders, float("nan"))

    def record(self, section, what, fit, errors, baseline, flops, done, moved, targets) -> None:
        """One row per contender, with its error and without a time."""
        self.times(fit)
        shape = " ".join(f"{key}={value}" for key, value in what.items())
        for name in fit:
            row: dict[str, Any] = {"section": section, **what, "contender": name}
            error = errors[name]
            row["error"] = "not compared" if error is None else float(f"{error:.3e}")
            self.rows.append(row)
            print(f"  {shape} {name}: ran, error {row['error']}", flush=True)


# -- sections --------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """Copy bandwidth and the bf16 product, on random data."""
    source = torch.randn(SIZES["copy"], device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    size = SIZES["product"]
    a, b = _random(size, size), _random(size, size)
    times = bench.times({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    if isinstance(bench, DryBench):
        return
    bench.copy_bytes = 2 * source.nbytes / (times["copy"] * 1e-3)
    bench.flops = 2 * size**3 / (times["product"] * 1e-3)
    bench.rows.append(
        {"section": "ceilings", "contender": "copy", "ms": times["copy"], "gb_per_s": bench.copy_bytes / 1e9}
    )
    bench.rows.append(
        {
            "section": "ceilings",
            "contender": f"bf16 {size}³",
            "ms": times["product"],
            "useful_gflops": bench.flops / 1e9,
        }
    )
    print(f"  copy {bench.copy_bytes / 1e12:.2f} TB/s, bf16 product {bench.flops / 1e12:.0f} TFLOP/s", flush=True)


def block_sparse(bench: Bench) -> None:
    """Block-sparse linear, forward, against cuBLAS and PyTorch's BSR paths."""
    from sparse_engine import kernels

    size = SIZES["linear"]
    x = _random(size, size)
    bars = {0.5: "bar 1.2×, goal 1.6×", 0.8: "bar 3×, goal 4×", 0.9: "bar 5×, goal 7.5×"}
    # small blocks: around the sparsity at which they should break even
    points = {64: (0.5, 0.8, 0.9), 128: (0.5, 0.8, 0.9), 32: (0.35, 0.5, 0.8, 0.9), 16: (0.5, 0.7, 0.8, 0.9)}
    break_even = {32: "bar break-even ≤ 50 %, goal ≤ 35 %", 16: "bar break-even ≤ 70 %, goal ≤ 50 %"}
    for side, sparsities in points.items():
        for sparsity in sparsities:
            pattern, values, dense = _blocks(size, size, side, sparsity)
            contenders: Contenders = {
                "cuBLAS dense": lambda dense=dense: F.linear(x, dense),
                "triton": lambda values=values, pattern=pattern: kernels.block_sparse_linear(x, values, pattern),
                **_bsr(dense, side, x),
            }
            library = _library()
            if library is not None and side >= 64:
                contenders["cuda"] = lambda values=values, pattern=pattern, library=library: library.block_linear(
                    x, values, pattern.row_ptr, pattern.cols, pattern.row_order, (size, size)
                )
            bench.compare(
                "block_sparse", {"shape": f"{size}³", "block": side, "sparsity": sparsity}, contenders,
                lambda dense=dense: x.float() @ dense.float().T, baseline="cuBLAS dense",
                flops=2 * size * side * side * pattern.blocks, done={"cuBLAS dense": 2 * size**3},
                targets={
                    "triton": (bars[sparsity] if side >= 64 else break_even[side])
                    + "; against torch BSR bar 1.5×, goal 2×"
                },
            )  # fmt: skip
            if bench.left < 60:
                bench.notes.append(f"block_sparse: stopped after blocks of {side} at {sparsity}, the time was up")
                return


def block_gradients(bench: Bench) -> None:
    """Input gradient and sampled weight gradient at 80 %."""
    from sparse_engine import kernels

    size = SIZES["linear"]
    x, dy = _random(size, size), _random(size, size)
    for side in (64, 128):
        pattern, values, dense = _blocks(size, size, side, 0.8)
        flops, dense_flops = 2 * size * side * side * pattern.blocks, {"cuBLAS dense": 2 * size**3}
        what = {"shape": f"{size}³", "block": side, "sparsity": 0.8}
        target = {"triton": "bar 2.5×, goal 3.5×; against torch BSR bar 1.5×, goal 2×"}
        bench.compare(
            "block_gradients", {"product": "input gradient", **what},
            {
                "cuBLAS dense": lambda dense=dense: dy @ dense,
                "triton": lambda v=values, p=pattern: kernels.block_sparse_input_gradient(dy, v, p),
                **_bsr(dense.T.contiguous(), side, dy),
            },
            lambda dense=dense: dy.float() @ dense.float(), baseline="cuBLAS dense", flops=flops, done=dense_flops,
            targets=target,
        )  # fmt: skip
        bench.compare(
            "block_gradients", {"product": "weight gradient", **what},
            {
                "cuBLAS dense": lambda: dy.T @ x,
                "triton": lambda pattern=pattern: kernels.block_sparse_weight_gradient(dy, x, pattern),
                "torch BSR, sampled_addmm": _sampled(dense, side, dy, x),
            },
            lambda pattern=pattern: kernels.pack_blocks(dy.float().T @ x.float(), pattern),
            baseline="cuBLAS dense", flops=flops, done=dense_flops,
            check={
                "cuBLAS dense": lambda found, pattern=pattern: kernels.pack_blocks(found, pattern),
                "torch BSR, sampled_addmm": lambda found: found.values(),
            },
            targets=target,
        )  # fmt: skip


def masked(bench: Bench) -> None:
    """Masked linear with a mask that changes every step: the time includes finding its empty tiles."""
    from sparse_engine import kernels

    size = SIZES["linear"]
    x, weight = _random(size, size), _random(size, size)
    dy = _random(size, size)
    tile_list = kernels.tile_lists
    for kind, sparsity in (("64×64 tiles", 0.0), ("64×64 tiles", 0.5), ("64×64 tiles", 0.8), ("single weights", 0.8)):
        if kind == "single weights":
            mask = torch.rand(size, size, device=DEVICE) >= sparsity
        else:
            tiles = torch.rand(size // 64, size // 64, device=DEVICE) >= sparsity
            mask = tiles.repeat_interleave(64, 0).repeat_interleave(64, 1)
        zeroed = torch.where(mask, weight, 0)
        lists = tile_list(mask)
        target = "goal 2×" if kind == "64×64 tiles" and sparsity == 0.8 else "never slower by > 3 %"
        what = {"shape": f"{size}³", "zeros in": kind, "sparsity": sparsity}
        flops = 2 * size * float(mask.float().sum())
        dense = {"cuBLAS on zeros": 2 * size**3, "eager: mask, then cuBLAS": 2 * size**3}
        bench.compare(
            "masked", {"product": "forward", **what},
            {
                "cuBLAS on zeros": lambda zeroed=zeroed: F.linear(x, zeroed),
                "eager: mask, then cuBLAS": lambda mask=mask: F.linear(x, weight * mask),
                "triton": lambda mask=mask: kernels.masked_linear(x, weight, mask, tile_list(mask)),
                "triton, 64×64": lambda mask=mask: kernels.masked_linear(x, weight, mask, tile_list(mask, (64, 64))),
                "triton, lists given": lambda mask=mask, lists=lists: kernels.masked_linear(x, weight, mask, lists),
            },
            lambda zeroed=zeroed: x.float() @ zeroed.float().T, baseline="cuBLAS on zeros", flops=flops, done=dense,
            targets={"triton": target},
        )  # fmt: skip
        if kind != "64×64 tiles" or sparsity != 0.8:
            continue
        bench.compare(
            "masked", {"product": "input gradient", **what},
            {
                "cuBLAS on zeros": lambda zeroed=zeroed: dy @ zeroed,
                "triton": lambda mask=mask: kernels.masked_input_gradient(dy, weight, mask, tile_list(mask)),
            },
            lambda zeroed=zeroed: dy.float() @ zeroed.float(), baseline="cuBLAS on zeros", flops=flops, done=dense,
        )  # fmt: skip
        bench.compare(
            "masked", {"product": "weight gradient", **what},
            {
                "cuBLAS on zeros": lambda mask=mask: torch.where(mask, dy.T @ x, 0),
                "triton": lambda mask=mask: kernels.masked_weight_gradient(dy, x, mask, tile_list(mask)),
            },
            lambda mask=mask: torch.where(mask, dy.float().T @ x.float(), 0), baseline="cuBLAS on zeros", flops=flops,
            done=dense,
        )  # fmt: skip


def channel_conv(bench: Bench) -> None:
    """Convolution with half of the input and output channels kept, against cuDNN on the full and on the small layer."""
    from sparse_engine import kernels
    from sparse_engine.ops import cuda_library

    batch, channels, side = SIZES["conv"]
    x = _random(batch, channels, side, side).to(memory_format=torch.channels_last)
    weight = _random(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    geometry = kernels.ConvGeometry((3, 3), padding=(1, 1))
    for run in (8, 2, 1):
        keep = _kept_channels(channels, run), _kept_channels(channels, run)
        inputs, outputs = (kernels.channel_list(k.cpu(), DEVICE) for k in keep)
        zeroed = weight * keep[0][None, :, None, None] * keep[1][:, None, None, None]
        small_x = x[:, keep[0]].contiguous(memory_format=torch.channels_last)
        small_w = weight[keep[1]][:, keep[0]].contiguous(memory_format=torch.channels_last)
        contenders: Contenders = {
            "cuDNN full": lambda zeroed=zeroed: F.conv2d(x, zeroed, padding=1),
            "cuDNN on the small layer": lambda a=small_x, b=small_w: F.conv2d(a, b, padding=1),
            "triton": lambda inputs=inputs, outputs=outputs: kernels.channel_conv(x, weight, inputs, outputs, geometry),
        }
        library = _library()
        if library is not None:
            gathered = cuda_library.gather_weight(weight, inputs.index, outputs.index)
            contenders["cuda"] = lambda g=gathered, i=inputs, o=outputs, library=library: library.gather_conv(
                x, g, i.index, o.index, i.run, channels, (3, 3), padding=(1, 1)
            )
        what = {"shape": f"{batch}×{channels}×{side}² 3×3", "kept": "50 % in, 50 % out", "runs of": run}
        flops = 2 * batch * side * side * 9 * inputs.kept * outputs.kept
        every = 2 * batch * side * side * 9 * channels * channels
        bench.compare(
            "channel_conv", what, contenders,
            lambda zeroed=zeroed, kept=keep[1]: F.conv2d(x.float(), zeroed.float(), padding=1)[:, kept],
            baseline="cuDNN full", flops=flops, done={"cuDNN full": every},
            check={name: lambda y, kept=keep[1]: y[:, kept] for name in contenders if "small" not in name},
            targets=dict.fromkeys(OURS, "bar 3×, goal: equal to cuDNN on the small layer"),
        )  # fmt: skip


def unstructured(bench: Bench) -> None:
    """Unstructured linear with many tokens, against cuBLAS and cuSPARSE."""
    _bitmask(
        bench,
        "unstructured",
        SIZES["many_tokens"],
        (0.8, 0.85, 0.9, 0.95),
        {"cuda": "2× cuSPARSE; goal: break-even with cuBLAS ≤ 85 %"},
    )


def decode(bench: Bench) -> None:
    """Unstructured linear with at most 16 tokens: memory-bound."""
    _bitmask(
        bench, "decode", (1, 8, 16), (0.5, 0.8), {"cuda": "bar 1.4× at 50 %, 2.5× at 80 %; goal ≥ 85 % of bandwidth"}
    )


def _bitmask(
    bench: Bench, section: str, counts: tuple[int, ...], sparsities: tuple[float, ...], targets: Mapping[str, str]
) -> None:
    from sparse_engine.ops import cuda_library

    library = _library()
    size = SIZES["linear"]
    for sparsity in sparsities:
        weight = torch.where(torch.rand(size, size, device=DEVICE) >= sparsity, _random(size, size), 0)
        packed = cuda_library.pack_bitmask(weight)
        for tokens in counts:
            x = _random(tokens, size)
            contenders: Contenders = {"cuBLAS dense": lambda x=x, weight=weight: F.linear(x, weight)}
            if library is not None:
                contenders["cuda"] = lambda x=x, packed=packed: library.bitmask_linear(x, packed)
            if tokens > 16:
                contenders["cuSPARSE (torch CSR)"] = _made(
                    lambda weight=weight, x=x: (weight.to_sparse_csr(), x.T.contiguous()),
                    lambda csr, columns: csr @ columns,
                )
            io = 2 * x.nbytes
            bench.compare(
                section, {"shape": f"{size}×{size}", "tokens": tokens, "sparsity": sparsity}, contenders,
                lambda x=x, weight=weight: x.float() @ weight.float().T, baseline="cuBLAS dense",
                flops=2 * tokens * float((weight != 0).sum()), done={"cuBLAS dense": 2 * tokens * size * size},
                check={"cuSPARSE (torch CSR)": lambda y: y.T},
                moved={"cuda": packed.nbytes + io, "cuBLAS dense": weight.nbytes + io}, targets=targets,
            )  # fmt: skip


def two_of_four(bench: Bench) -> None:
    """2:4 weights: PyTorch's semi-structured path and the compressed Triton kernel."""
    from sparse_engine import kernels

    size = SIZES["linear"]
    weight = _random(size, size)
    rank = torch.rand(size, size // 4, 4, device=DEVICE).argsort(-1).argsort(-1)
    weight = torch.where((rank < 2).reshape(size, size), weight, 0)
    values, bits = kernels.pack_nm(weight, 2, 4)
    for tokens in (16, size):
        x = _random(tokens, size)
        contenders: Contenders = {
            "cuBLAS dense": lambda x=x: F.linear(x, weight),
            "triton compressed": lambda x=x: kernels.nm_linear(x, values, bits, 2, 4),
            "torch 2:4": _made(
                lambda: (torch.sparse.to_sparse_semi_structured(weight),), lambda packed, x=x: F.linear(x, packed)
            ),
        }
        bench.compare(
            "two_of_four", {"shape": f"{size}×{size}", "tokens": tokens}, contenders,
            lambda x=x: x.float() @ weight.float().T, baseline="cuBLAS dense", flops=2 * tokens * size * size / 2,
            done={"cuBLAS dense": 2 * tokens * size * size},
            targets={"torch 2:4": "never slower than dense: `convert` keeps dense where it is"},
        )  # fmt: skip


def kd_loss(bench: Bench) -> None:
    """Fused distillation loss, forward and backward, against eager and compiled PyTorch and Liger-Kernel."""
    from sparse_engine import distill, kernels

    rows, temperature, alpha = SIZES["loss_rows"], 4.0, 0.5

    def eager(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hard = F.cross_entropy(z.float(), y)
        p = F.log_softmax(t.float() / temperature, 1)
        soft = F.kl_div(F.log_softmax(z.float() / temperature, 1), p, reduction="batchmean", log_target=True)
        return (1 - alpha) * hard + alpha * temperature**2 * soft

    for classes in SIZES["loss_classes"]:
        z, t = (_random(rows, classes) * 3 for _ in range(2))
        y = torch.randint(0, classes, (rows,), device=DEVICE)
        z.requires_grad_()

        def with_backward(loss: Callable[..., torch.Tensor], z=z, t=t, y=y) -> Callable[[], torch.Tensor]:
            def call() -> torch.Tensor:
                return torch.autograd.grad(loss(z, t, y), z)[0]

            return call

        def through_the_package(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return distill.kd_loss(z, y, teacher_logits=t, temperature=temperature, alpha=alpha)

        contenders: Contenders = {"eager": with_backward(eager)}
        if isinstance(bench, DryBench):
            pass  # compiling is no business of a dry run
        elif bench.left > 150:
            contenders["torch.compile"] = with_backward(torch.compile(eager))
        else:
            bench.notes.append(f"kd_loss: torch.compile left out at {classes} classes, the time was up")
        raw = z.detach()
        contenders["triton"] = lambda raw=raw, t=t, y=y: (
            kernels.kd_loss(raw, t, y, temperature=temperature, alpha=alpha)[1].gradient
        )
        contenders["triton, through autograd"] = with_backward(through_the_package)
        if importlib.util.find_spec("liger_kernel") is not None:
            from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

            kl, ce = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerCrossEntropyLoss()

            def liger(z, t, y, kl=kl, ce=ce):
                soft = kl(F.log_softmax(z.float() / temperature, 1), F.log_softmax(t.float() / temperature, 1))
                return (1 - alpha) * ce(z, y) + alpha * temperature**2 * soft

            contenders["Liger KL + CE"] = with_backward(liger)
        some = slice(0, 64)

        def reference(z=z, t=t, y=y, some=some) -> torch.Tensor:
            # the mean's denominator is the whole batch's
            z64 = z.detach()[some].double().requires_grad_()
            hard = F.cross_entropy(z64, y[some], reduction="sum")
            p = F.log_softmax(t[some].double() / temperature, 1)
            soft = F.kl_div(F.log_softmax(z64 / temperature, 1), p, reduction="sum", log_target=True)
            ((1 - alpha) * hard + alpha * temperature**2 * soft).div(rows).backward()
            return z64.grad

        least = 3 * rows * classes * z.element_size()
        bench.compare(
            "kd_loss", {"shape": f"{rows}×{classes}", "pass": "forward + backward"}, contenders, reference,
            baseline="eager",
            check=lambda gradient, some=some: gradient[some], moved=dict.fromkeys(contenders, least),
            targets={"triton": "bar 80 % of copy bandwidth and 5× eager, goal 92 %"},
        )  # fmt: skip


def linear_kd(bench: Bench) -> None:
    """The last layer with the loss, in chunks: time and peak memory, against eager and compiled PyTorch and Liger."""
    from sparse_engine import kernels

    rows, width, classes = SIZES["last_layer"]
    h, th = _random(rows, width), _random(rows, width)
    w, tw = (_random(classes, width) * 0.02 for _ in range(2))
    h.requires_grad_()
    w.requires_grad_()

    def eager_loss(h: torch.Tensor, w: torch.Tensor, th: torch.Tensor, tw: torch.Tensor) -> torch.Tensor:
        student, teacher = F.linear(h, w), F.linear(th, tw)
        return F.kl_div(
            F.log_softmax(student.float(), 1), F.log_softmax(teacher.float(), 1), reduction="batchmean", log_target=True
        )

    def with_backward(loss: Callable[..., torch.Tensor]) -> Callable[[], Gradients]:
        return lambda: torch.autograd.grad(loss(h, w, th, tw), (h, w))

    def chunked() -> Gradients:
        found = kernels.linear_kd_loss(h.detach(), w.detach(), th, tw, alpha=1.0, temperature=1.0)[1]
        return found.hidden, found.weight

    some = slice(0, 256)

    def compared(found: Gradients) -> torch.Tensor:
        # the gradient of some rows of the hidden state and of some classes of the weight, on one scale
        hidden, weight = (part[some].float().flatten() for part in found)
        return torch.cat([hidden / expected[0].norm(), weight / expected[1].norm()])

    def exact() -> Gradients:
        """In float32, in pieces."""
        with torch.no_grad():
            d_weight = torch.zeros(min(256, classes), width, device=DEVICE)
            for start in range(0, rows, 256):
                part = slice(start, start + 256)
                student, teacher = h[part].float() @ w.float().T, th[part].float() @ tw.float().T
                d_logits = (F.softmax(student, 1) - F.softmax(teacher, 1)) / rows
                d_weight += d_logits[:, some].T @ h[part].float()
                if start == 0:
                    d_hidden = d_logits @ w.float()
            return d_hidden, d_weight

    expected = exact()
    contenders: Contenders = {"eager": with_backward(eager_loss), "triton, chunks": chunked}
    if isinstance(bench, DryBench):
        pass  # compiling is no business of a dry run
    elif bench.left > 120:
        contenders["torch.compile"] = with_backward(torch.compile(eager_loss))
    else:
        bench.notes.append("linear_kd: torch.compile left out, the time was up")
    if importlib.util.find_spec("liger_kernel") is not None:
        contenders["Liger fused linear JSD, β = 0"] = _made(_liger_linear, lambda loss: with_backward(loss)())
    peaks = {}
    for name, call in contenders.items():
        try:
            call()  # compiles
            peaks[name] = _peak_memory(call)
        except Exception:  # `compare` reports it
            continue
    what = {"shape": f"{rows}×{width}×{classes}"}
    bench.compare(
        "linear_kd", what, contenders, lambda: compared(expected), baseline="eager", bound=5e-2, check=compared,
        flops=2 * rows * width * classes * 4, targets={"triton, chunks": "peak memory −85 %, no slower than eager"},
    )  # fmt: skip
    for row in bench.rows:
        if row["section"] == "linear_kd" and row["contender"] in peaks:
            row["peak_mib"] = round(peaks[row["contender"]] / 2**20, 1)
            row["peak_relative_to_eager"] = round(peaks[row["contender"]] / max(peaks.get("eager", 0), 1), 4)


def ps_kd(bench: Bench) -> None:
    """PS-KD with its table in fp16, full and of the 8 largest, against separate operations."""
    from sparse_engine import kernels

    (rows, classes, samples), alpha = SIZES["table"], 0.5
    z = _random(rows, classes)
    y = torch.randint(0, classes, (rows,), device=DEVICE)
    index = torch.randperm(samples, device=DEVICE)[:rows]
    labels = torch.randint(0, classes, (samples,), device=DEVICE)
    for top_k in (None, 8):
        table = kernels.PredictionTable.one_hot(labels, classes, top_k)
        other = kernels.PredictionTable.one_hot(labels, classes).values

        def eager(other: torch.Tensor = other) -> torch.Tensor:
            target = (1 - alpha) * F.one_hot(y, classes) + alpha * other[index].float()
            logits = z.detach().float().requires_grad_()
            log_p = F.log_softmax(logits, 1)
            loss = -(target * log_p).sum(1).mean()
            other[index] = log_p.detach().exp().half()
            return torch.autograd.grad(loss, logits)[0]

        def fused(table: kernels.PredictionTable = table) -> torch.Tensor:
            return kernels.ps_kd_loss(z, y, index, table, alpha=alpha)[1].gradient

        def reference(past: torch.Tensor = other[index]) -> torch.Tensor:
            # every contender is compared at its first call, when its table is still one-hot
            target = (1 - alpha) * F.one_hot(y, classes) + alpha * past.double()
            return (F.softmax(z.double(), 1) * target.sum(1, keepdim=True) - target) / rows

        bench.compare(
            "ps_kd", {"shape": f"{rows}×{classes}", "table": "full" if top_k is None else f"top-{top_k}"},
            {"eager, full table": eager, "triton": fused}, reference, baseline="eager, full table",
            moved={"triton": rows * (classes * 8 if top_k is None else classes * 4 + top_k * 12)},
        )  # fmt: skip


def tuning(bench: Bench) -> None:
    """Other configurations of the block-sparse product, for whoever tunes: the table's own first."""
    from sparse_engine.kernels import block_sparse as module

    size = SIZES["linear"]
    x = _random(size, size)
    arch = module.generation(x.device)
    for side in (64, 128):
        pattern, values, dense = _blocks(size, size, side, 0.8)
        own = dict(module.DSD_CONFIGS[arch, side])
        tried = [own] + [
            {"BLOCK_T": tokens, "BLOCK_K": step, "num_warps": warps, "num_stages": stages}
            for tokens, step, warps, stages in (
                (128, 64, 4, 4), (128, 64, 8, 4), (128, 64, 4, 6), (256, 64, 8, 4), (256, 32, 8, 6),
                (128, 32, 4, 8), (64, 64, 4, 6),
            )
        ]  # fmt: skip
        for config in tried:
            if bench.left < 30:
                return

            def call(config: dict[str, int] = config, pattern=pattern, values=values, side=side) -> torch.Tensor:
                module.DSD_CONFIGS[arch, side] = config
                return module.block_sparse_linear(x, values, pattern)

            bench.compare(
                "tuning", {"block": side, "sparsity": 0.8, "config": json.dumps(config)},
                {"cuBLAS dense": lambda dense=dense: F.linear(x, dense), "triton": call},
                lambda dense=dense: x.float() @ dense.float().T, baseline="cuBLAS dense",
            )  # fmt: skip
        module.DSD_CONFIGS[arch, side] = own


SECTIONS: dict[str, Callable[[Bench], None]] = {
    function.__name__: function
    for function in (
        block_sparse, block_gradients, kd_loss, linear_kd, decode, unstructured, masked, channel_conv,
        two_of_four, ps_kd, tuning,
    )
}  # fmt: skip

# -- building, testing, writing --------------------------------------------------------------------------------------


def build(bench: Bench) -> None:
    """Compiles csrc/cuda for this GPU into the package, where nvcc is there and the file is out of date."""
    output = ROOT / "sparse_engine" / "_cuda_kernels.so"
    sources = list((ROOT / "csrc" / "cuda").iterdir())
    if output.exists() and output.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        print("  sparse_engine/_cuda_kernels.so is up to date")
        return
    major, minor = torch.cuda.get_device_capability()
    _compile(bench, output, f"{major}{minor}")


def _compile(bench: Bench, output: Path, arch: str) -> None:
    """Runs nvcc for one architecture; notes why not where it cannot."""
    compiler = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)
    if compiler is None:
        bench.notes.append("nvcc was not found: the CUDA kernels were not built and not measured")
        return
    command = [
        compiler,
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Icsrc",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Xcompiler",
        "-fPIC",
    ]
    partial = output.with_suffix(".new")
    run = subprocess.run(
        [*command, "-shared", "csrc/cuda/kernels.cu", "-o", str(partial)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        bench.fail(f"nvcc failed, the CUDA kernels were not measured: {run.stderr[-500:]}")
        return
    partial.replace(output)
    print(f"  {output.name} for sm_{arch}: {output.stat().st_size} bytes", flush=True)


def test_files() -> list[str]:
    """The tests that are run on a GPU, relative to the root."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py")) + [ROOT / "tests" / "cuda" / "test_device.py"]
    return [str(file.relative_to(ROOT)) for file in files if file.exists() and file.name != "test_aot.py"]


def _pytest(*arguments: str) -> list[str]:
    extra = [] if importlib.util.find_spec("hypothesis") else ["--confcutdir", "tests/kernels"]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *extra, *arguments]


def collect_tests() -> tuple[list[str], str]:
    """The tests of `test_files` by their ids, and what pytest said."""
    run = subprocess.run(
        _pytest("--collect-only", *test_files()), cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = run.stdout.strip().splitlines() or [run.stderr[-300:] or "no output"]
    return [line for line in lines if "::" in line] if run.returncode == 0 else [], lines[-1]


def run_tests(bench: Bench, seconds: float, processes: int | None = None) -> None:
    """Runs the kernel tests on the GPU and notes what they say. Most of their time goes into compiling kernels, so they
    are dealt out to as many processes as there are cores, at most 12."""
    if importlib.util.find_spec("pytest") is None:
        bench.notes.append("pytest is not installed: the tests were not run; results were still checked before timing")
        return
    end = time.monotonic() + seconds
    tests, said = collect_tests()
    if not tests:
        bench.fail(f"the tests cannot be collected: {said}")
        return
    count = min(processes or min(12, max(1, (os.cpu_count() or 2) - 2)), len(tests))
    running = [
        subprocess.Popen(
            _pytest(*tests[number::count]), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in range(count)
    ]
    for number, process in enumerate(running):
        name = f"part {number + 1} of {count}"
        try:
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            last = output.strip().splitlines()[-1] if output.strip() else "no output"
            failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
            if process.returncode and not failed:
                failed = [f"exit code {process.returncode}"]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            last, failed = f"stopped after {seconds:.0f} s", []
            bench.notes.append(f"tests, {name}: not finished after {seconds:.0f} s")
        bench.rows.append({"section": "tests", "contender": name, "result": last, "failed": failed[:20]})
        bench.failed |= bool(failed)
        print(f"  {name}: {last}", flush=True)
        for line in failed[:20]:
            print(f"    {line}", flush=True)


def write(bench: Bench) -> None:
    """Writes the JSON file and the Markdown tables."""
    from bench.results_io import device_description
    from bench.results_io import write as write_result

    device = device_description() | _gpu_description()
    write_result(
        bench.name,
        rows=bench.rows,
        claim="GPU kernels against the best libraries on one machine",
        notes="; ".join(bench.notes) or None,
        device=device,
        folder=bench.folder,
    )
    (bench.folder / f"{bench.name}.md").write_text(markdown(bench.rows, device, bench.notes), encoding="utf-8")


def _gpu_description() -> dict[str, Any]:
    if DEVICE != "cuda":
        return {"gpu": "none: a dry run"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def markdown(rows: list[dict[str, Any]], device: Mapping[str, Any], notes: list[str]) -> str:
    """One table per section, with the columns that its rows have."""
    lines = ["# GPU measurements", "", "Written by `python -m bench.gpu`; medians, cold caches, random data.", ""]
    lines += [f"* {key}: {value}" for key, value in device.items()]
    lines += [f"* torch {torch.__version__}, triton {_version('triton')}, Python {sys.version.split()[0]}"]
    lines += [f"* {note}" for note in notes]
    for section in dict.fromkeys(row["section"] for row in rows):
        part = [row for row in rows if row["section"] == section]
        columns = [name for name in dict.fromkeys(key for row in part for key in row) if name != "section"]
        lines += [
            "",
            f"## {section}",
            "",
            "| " + " | ".join(columns) + " |",
            "| " + " | ".join("---" for _ in columns) + " |",
        ]
        lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |" for row in part]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when all went well, 1 when a result was wrong, a test failed or one of our kernels could not run,
    2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Build, test and time the GPU kernels.")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), help="these sections only")
    parser.add_argument("--list", action="store_true", help="list the sections and exit")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after about so long (default 8)")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    parser.add_argument("--dry-run", action="store_true", help="every section in small on the CPU; measures nothing")
    options = parser.parse_args(arguments)
    if options.list:
        for name, function in SECTIONS.items():
            print(f"{name:16} {(function.__doc__ or '').splitlines()[0]}")
        return 0
    if options.dry_run:
        return dry_run(options.only)
    if not torch.cuda.is_available():
        print(
            "bench.gpu: PyTorch sees no NVIDIA GPU, nothing was measured and nothing was written. "
            "Run it on a machine with one; here `python -m bench.gpu --dry-run` runs every section in small on the "
            "CPU, and `make test-kernels` checks the kernels.",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    bench = Bench(options.minutes, name="gpu_some" if options.only else "gpu")
    print("building", flush=True)
    build(bench)
    if not options.no_tests:
        print("testing", flush=True)
        run_tests(bench, seconds=min(150.0, bench.left / 3))
    run_sections(bench, options.only)
    print(
        f"wrote {bench.folder / bench.name}.json and .md after {time.monotonic() - bench.start:.0f} s; "
        + "; ".join(bench.notes)
    )
    return int(bench.failed)


def run_sections(bench: Bench, only: list[str] | None) -> None:
    """The ceilings, then each section, writing what there is after each."""
    print("ceilings", flush=True)
    ceilings(bench)
    for name, function in SECTIONS.items():
        if only and name not in only:
            continue
        if bench.left < 30:
            bench.notes.append(f"{name}: left out, the time was up")
            continue
        print(name, flush=True)
        try:
            function(bench)
        except Exception as problem:  # one section must not take the others' results with it
            bench.fail(f"{name}: {_short(problem)}")
        write(bench)
    write(bench)


def dry_run(only: list[str] | None) -> int:
    """Everything but the measuring, on the CPU; leaves nothing behind."""
    global DEVICE, DTYPE, SIZES, _host_library
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which is below
    os.environ["SPARSE_ENGINE_IMPL"] = "kd_rows:triton"
    # half precision: both Triton's interpreter and the CUDA kernels on the host compute in it
    DEVICE, DTYPE, SIZES = "cpu", torch.float16, DRY_SIZES
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = DryBench(60, Path(folder))
        print("building", flush=True)
        _compile(bench, Path(folder) / "kernels_sm_90.so", "90")
        _host_library = _build_for_host(bench, Path(folder) / "kernels_host.so")
        print("tests that a GPU would run", flush=True)
        if importlib.util.find_spec("pytest") is None:
            bench.notes.append("pytest is not installed: no tests")
        else:
            tests, said = collect_tests()
            print(f"  {said}", flush=True)
            if not tests:
                bench.fail(f"the tests cannot be collected: {said}")
        run_sections(bench, only)
        written = sum(path.stat().st_size for path in Path(folder).glob("gpu.*"))
    ours = [row for row in bench.rows if row["contender"].startswith(OURS)]
    good = sum("problem" not in row for row in ours)
    others = sum("problem" in row for row in bench.rows if row not in ours)
    print(
        f"dry run: {good} of {len(ours)} results of our kernels right, {others} contenders that this machine lacks, "
        f"{len(bench.rows)} rows ({written} bytes of JSON and Markdown, deleted); nothing measured, nothing in "
        "bench/results" + "".join(f"\n  {note}" for note in bench.notes)
    )
    return int(bench.failed)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates at most, beyond what was allocated before."""
    if DEVICE != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def _blocks(outputs: int, inputs: int, side: int, sparsity: float) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A random block pattern, its values, and the dense weight."""
    from sparse_engine import kernels

    kept = torch.rand(outputs // side, inputs // side, device=DEVICE) >= sparsity
    kept[0, 0] = True  # so that there is one, however small the weight
    pattern = kernels.block_pattern(kept, (side, side))
    values = _random(pattern.blocks, side, side)
    return pattern, values, kernels.unpack_blocks(values, pattern)


def _kept_channels(channels: int, run: int) -> torch.Tensor:
    """Half of the channels, in aligned runs."""
    groups = channels // run
    kept = torch.zeros(groups, dtype=torch.bool, device=DEVICE)
    kept[torch.randperm(groups, device=DEVICE)[: groups // 2]] = True
    return kept.repeat_interleave(run)


_host_library: Any = None


def _library() -> Any:
    """The CUDA kernels, or None where they cannot run."""
    from sparse_engine.ops import cuda_library

    if DEVICE != "cuda":
        return _host_library
    return None if cuda_library.why_not() else cuda_library.library()


def _build_for_host(bench: Bench, output: Path) -> Any:
    """The CUDA kernels' source built for the CPU, or None without a C++ compiler."""
    from sparse_engine.ops import cuda_library

    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        bench.notes.append("no C++ compiler: the CUDA kernels were not run on the host")
        return None
    command = [compiler, "-std=c++20", "-O1", "-Icsrc", "-fPIC", "-shared", "-x", "c++", "csrc/cuda/kernels.cu"]
    run = subprocess.run([*command, "-o", str(output)], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        bench.fail(f"{compiler} failed: {run.stderr[-500:]}")
        return None
    print(f"  {output.name}: {output.stat().st_size} bytes", flush=True)
    return cuda_library.Library(output)


def _made(make: Callable[[], tuple], call: Callable[..., Any]) -> Callable[[], Any]:
    """A contender whose operands are made at its first call, which is not timed: what cannot be made is then a problem
    of this contender, not of its section."""
    operands: list[tuple] = []

    def run() -> Any:
        if not operands:
            operands.append(make())
        return call(*operands[0])

    return run


def _bsr(dense: torch.Tensor, side: int, x: torch.Tensor) -> Contenders:
    """PyTorch's block-sparse products: as a user calls them, and its Triton kernel by name."""

    def by_name(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        from torch.sparse._triton_ops import bsr_dense_addmm

        out = columns.new_empty(weight.shape[0], columns.shape[1])
        return bsr_dense_addmm(out, weight, columns, beta=0)

    def pack() -> torch.Tensor:
        return dense.to_sparse_bsr((side, side))

    return {
        "torch BSR": _made(lambda: (pack(),), lambda weight: F.linear(x, weight)),
        "torch BSR, Triton": _made(lambda: (pack(), x.T), lambda weight, columns: by_name(weight, columns).T),
    }


def _sampled(dense: torch.Tensor, side: int, dy: torch.Tensor, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """PyTorch's product sampled at the blocks of a BSR matrix."""

    def call(pattern: torch.Tensor) -> torch.Tensor:
        from torch.sparse._triton_ops import sampled_addmm

        return sampled_addmm(pattern, dy.T, x, beta=0.0)

    return _made(lambda: (dense.to_sparse_bsr((side, side)),), call)


def _liger_linear() -> tuple[Callable[..., torch.Tensor]]:
    """Liger-Kernel's fused linear layer and divergence; with β = 0 KL from teacher to student, mean over the rows."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=0.0, temperature=1.0)
    return (module,)


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True, check=False)
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else "unknown"


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _short(problem: BaseException) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0][:200] if text else ''}"


def _cell(value: Any) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
