"""Everything about the GPU kernels in one command: builds them in place, runs their tests on the GPU, and times them
against the best libraries.

    python -m bench.gpu                         all of it, at most 8 minutes
    python -m bench.gpu --only kd_loss decode   some sections
    python -m bench.gpu --list                  the sections

Needs an NVIDIA GPU (Ampere or newer), PyTorch with Triton and, for the CUDA kernels, nvcc; no network. Writes
bench/results/gpu.json and bench/results/gpu.md. On a machine without a GPU it says so and exits with code 2.

How it measures: random data only; between any two timed calls 1 GiB is written, so that the 50 MB L2 cache holds
    nothing and the host runs ahead of the GPU;
contenders of one row run in turns, and a time is the median over the turns, between events on the GPU. Every result is
compared with a float32 product (or a float64 loss on some rows) before it is timed, and a wrong one is reported instead
of timed. Ceilings are measured first: a large copy and a large product.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
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
# what is measured; the tests put small sizes here and run every section once on the CPU
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

Contenders = dict[str, Callable[[], Any]]


class Bench:
    """Clock, ceilings and rows of one run."""

    def __init__(self, minutes: float, folder: Path = RESULTS) -> None:
        self.start = time.monotonic()
        self.limit = minutes * 60
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.copy_bytes = self.flops = float("nan")
        self._flush: torch.Tensor | None = None

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - (time.monotonic() - self.start)

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
        moved: Mapping[str, float] | None = None,
        check: Callable[[Any], torch.Tensor] | None = None,
        targets: Mapping[str, str] | None = None,
    ) -> None:
        """Checks, then times, the contenders of one line; one row for each.

        Args:
            section: the section's name. what: shape, sparsity and the like.
            contenders: the first argument of each row; those that raise are reported, not timed.
            reference: what every contender must agree with; None: not checked here.
            baseline: whose time the speed-up is relative to.
            bound: of ‖out − ref‖ / ‖ref‖.
            flops: useful operations; moved: bytes that a contender has to move at least.
            check: turns a contender's result into what is compared.
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
                    found = (check(result) if check is not None else result).float()
                    errors[name] = float((found - expected).norm() / expected.norm().clamp(min=1e-20))
                    if not errors[name] <= bound:
                        raise ArithmeticError(f"wrong by {errors[name]:.2e} of the norm, the bound is {bound:.0e}")
                fit[name] = call
                del result
            except Exception as problem:  # a contender that this machine lacks must not end the run
                self.rows.append({"section": section, **what, "contender": name, "problem": _short(problem)})
                print(f"  {name}: {_short(problem)}", flush=True)
        del expected
        times = self.times(fit)
        for name, milliseconds in times.items():
            row: dict[str, Any] = {"section": section, **what, "contender": name, "ms": round(milliseconds, 5)}
            if baseline in times:
                row["speedup"] = round(times[baseline] / milliseconds, 3)
                row["relative_to"] = baseline
            if flops:
                row["useful_gflops"] = round(flops / milliseconds / 1e6, 1)
                row["share_of_product_ceiling"] = round(flops / (milliseconds * 1e-3) / self.flops, 4)
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
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


# -- sections --------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """Copy bandwidth and the bf16 product, on random data."""
    source = torch.randn(SIZES["copy"], device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    size = SIZES["product"]
    a, b = _random(size, size), _random(size, size)
    times = bench.times({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
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
    """Block-sparse linear, forward, against cuBLAS and PyTorch's BSR path."""
    from sparse_engine import kernels

    size = SIZES["linear"]
    x = _random(size, size)
    bars = {0.5: "bar 1.2×, goal 1.6×", 0.8: "bar 3×, goal 4×", 0.9: "bar 5×, goal 7.5×"}
    for side in (64, 128, 32, 16):
        for sparsity in (0.5, 0.8, 0.9):
            pattern, values, dense = _blocks(size, size, side, sparsity)
            bsr = dense.to_sparse_bsr((side, side))
            contenders: Contenders = {
                "cuBLAS dense": lambda dense=dense: F.linear(x, dense),
                "triton": lambda values=values, pattern=pattern: kernels.block_sparse_linear(x, values, pattern),
                "torch BSR": lambda bsr=bsr: F.linear(x, bsr),
            }
            library = _library()
            if library is not None and side >= 64:
                contenders["cuda"] = lambda values=values, pattern=pattern, library=library: library.block_linear(
                    x, values, pattern.row_ptr, pattern.cols, pattern.row_order, (size, size)
                )
            bench.compare(
                "block_sparse", {"shape": f"{size}³", "block": side, "sparsity": sparsity}, contenders,
                lambda dense=dense: x.float() @ dense.float().T, baseline="cuBLAS dense",
                flops=2 * size * side * side * pattern.blocks,
                targets={"triton": bars[sparsity] if side >= 64 else "break-even ≤ 70 % (16), ≤ 50 % (32)"},
            )  # fmt: skip
            if bench.left < 60:
                return


def block_gradients(bench: Bench) -> None:
    """Input gradient and sampled weight gradient at 80 %."""
    from sparse_engine import kernels

    size = SIZES["linear"]
    x, dy = _random(size, size), _random(size, size)
    for side in (64, 128):
        pattern, values, dense = _blocks(size, size, side, 0.8)
        flops = 2 * size * side * side * pattern.blocks
        what = {"shape": f"{size}³", "block": side, "sparsity": 0.8}
        target = {"triton": "bar 2.5×, goal 3.5×"}
        bench.compare(
            "block_gradients", {"product": "input gradient", **what},
            {
                "cuBLAS dense": lambda dense=dense: dy @ dense,
                "triton": lambda v=values, p=pattern: kernels.block_sparse_input_gradient(dy, v, p),
            },
            lambda dense=dense: dy.float() @ dense.float(), baseline="cuBLAS dense", flops=flops, targets=target,
        )  # fmt: skip
        bench.compare(
            "block_gradients", {"product": "weight gradient", **what},
            {
                "cuBLAS dense": lambda: dy.T @ x,
                "triton": lambda pattern=pattern: kernels.block_sparse_weight_gradient(dy, x, pattern),
            },
            lambda pattern=pattern: kernels.pack_blocks(dy.float().T @ x.float(), pattern),
            baseline="cuBLAS dense", flops=flops,
            check=lambda found, pattern=pattern: kernels.pack_blocks(found, pattern) if found.dim() == 2 else found,
            targets=target,
        )  # fmt: skip


def masked(bench: Bench) -> None:
    """Masked linear with a mask that changes every step: the time includes finding its empty tiles."""
    from sparse_engine import kernels

    size = SIZES["linear"]
    x, weight = _random(size, size), _random(size, size)
    for sparsity in (0.0, 0.5, 0.8):
        tiles = torch.rand(size // 64, size // 64, device=DEVICE) >= sparsity
        mask = tiles.repeat_interleave(64, 0).repeat_interleave(64, 1)
        zeroed = torch.where(mask, weight, 0)
        lists = kernels.tile_lists(mask)

        def step(mask: torch.Tensor = mask) -> torch.Tensor:
            return kernels.masked_linear(x, weight, mask, kernels.tile_lists(mask))

        bench.compare(
            "masked", {"shape": f"{size}³", "sparsity in 64×64 tiles": sparsity},
            {
                "cuBLAS on zeros": lambda zeroed=zeroed: F.linear(x, zeroed),
                "eager: mask, then cuBLAS": lambda mask=mask: F.linear(x, weight * mask),
                "triton": step,
                "triton, lists given": lambda mask=mask, lists=lists: kernels.masked_linear(x, weight, mask, lists),
            },
            lambda zeroed=zeroed: x.float() @ zeroed.float().T, baseline="cuBLAS on zeros",
            flops=2 * size**3 * float(tiles.float().mean()),
            targets={"triton": {0.0: "never slower by > 3 %", 0.8: "goal 2×"}.get(sparsity, "")},
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
        bench.compare(
            "channel_conv", what, contenders, lambda zeroed=zeroed: F.conv2d(x.float(), zeroed.float(), padding=1),
            baseline="cuDNN full", flops=flops, targets={"triton": "bar 3×", "cuda": "bar 3×"},
        )  # fmt: skip
        bench.compare(
            "channel_conv", what,
            {"cuDNN on the small layer": lambda a=small_x, b=small_w: F.conv2d(a, b, padding=1)}, None,
            baseline="cuDNN on the small layer", flops=flops,
        )  # fmt: skip


def unstructured(bench: Bench) -> None:
    """Unstructured linear with many tokens, against cuBLAS and cuSPARSE."""
    _bitmask(
        bench,
        "unstructured",
        (512, 2048),
        (0.8, 0.9, 0.95),
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
        csr = weight.to_sparse_csr()
        for tokens in counts:
            x = _random(tokens, size)
            contenders: Contenders = {"cuBLAS dense": lambda x=x, weight=weight: F.linear(x, weight)}
            if library is not None:
                contenders["cuda"] = lambda x=x, packed=packed: library.bitmask_linear(x, packed)
            if tokens > 16:
                columns = x.T.contiguous()
                contenders["cuSPARSE (torch CSR)"] = lambda csr=csr, columns=columns: (csr @ columns).T
            io = 2 * x.nbytes
            bench.compare(
                section, {"shape": f"{size}×{size}", "tokens": tokens, "sparsity": sparsity}, contenders,
                lambda x=x, weight=weight: x.float() @ weight.float().T, baseline="cuBLAS dense",
                flops=2 * tokens * float((weight != 0).sum()),
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
        }
        try:
            compressed = torch.sparse.to_sparse_semi_structured(weight)
            contenders["torch 2:4"] = lambda x=x, compressed=compressed: F.linear(x, compressed)
        except RuntimeError as problem:
            bench.notes.append(f"torch 2:4: {_short(problem)}")
        bench.compare(
            "two_of_four", {"shape": f"{size}×{size}", "tokens": tokens}, contenders,
            lambda x=x: x.float() @ weight.float().T, baseline="cuBLAS dense", flops=2 * tokens * size * size / 2,
        )  # fmt: skip


def kd_loss(bench: Bench) -> None:
    """Fused distillation loss, forward and backward, against eager and compiled PyTorch and Liger-Kernel."""
    from sparse_engine import kernels

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

        contenders: Contenders = {"eager": with_backward(eager)}
        if bench.left > 150:
            contenders["torch.compile"] = with_backward(torch.compile(eager))
        raw = z.detach()
        contenders["triton"] = lambda raw=raw, t=t, y=y: (
            kernels.kd_loss(raw, t, y, temperature=temperature, alpha=alpha)[1].gradient
        )
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
    """The last layer with the loss, in chunks: time and peak memory."""
    from sparse_engine import kernels

    rows, width, classes = SIZES["last_layer"]
    h, th = _random(rows, width), _random(rows, width)
    w, tw = (_random(classes, width) * 0.02 for _ in range(2))
    h.requires_grad_()
    w.requires_grad_()

    def eager() -> torch.Tensor:
        student, teacher = F.linear(h, w), F.linear(th, tw)
        loss = F.kl_div(
            F.log_softmax(student.float(), 1), F.log_softmax(teacher.float(), 1), reduction="batchmean", log_target=True
        )
        return torch.autograd.grad(loss, (h, w))[0]

    def chunked() -> torch.Tensor:
        return kernels.linear_kd_loss(h.detach(), w.detach(), th, tw, alpha=1.0, temperature=1.0)[1].hidden

    def reference() -> torch.Tensor:
        some = slice(0, 256)
        with torch.no_grad():
            student = h[some].float() @ w.float().T
            teacher = th[some].float() @ tw.float().T
            return (F.softmax(student, 1) - F.softmax(teacher, 1)) / rows @ w.float()

    contenders: Contenders = {"eager": eager, "triton, chunks": chunked}
    peaks = {}
    for name, call in contenders.items():
        peaks[name] = _peak_memory(call)
    what = {"shape": f"{rows}×{width}×{classes}"}
    bench.compare(
        "linear_kd", what, contenders, reference, baseline="eager", bound=5e-2, check=lambda found: found[:256],
        flops=2 * rows * width * classes * 4, targets={"triton, chunks": "peak memory −85 %, no slower"},
    )  # fmt: skip
    for row in bench.rows:
        if row["section"] == "linear_kd" and row["contender"] in peaks:
            row["peak_mib"] = round(peaks[row["contender"]] / 2**20, 1)
            row["peak_relative_to_eager"] = round(peaks[row["contender"]] / max(peaks["eager"], 1), 4)


def ps_kd(bench: Bench) -> None:
    """PS-KD with its table in fp16, against separate operations."""
    from sparse_engine import kernels

    (rows, classes, samples), alpha = SIZES["table"], 0.5
    z = _random(rows, classes)
    y = torch.randint(0, classes, (rows,), device=DEVICE)
    index = torch.randperm(samples, device=DEVICE)[:rows]
    labels = torch.randint(0, classes, (samples,), device=DEVICE)
    table = kernels.PredictionTable.one_hot(labels, classes)
    other = table.values.clone()

    def eager() -> torch.Tensor:
        target = (1 - alpha) * F.one_hot(y, classes) + alpha * other[index].float()
        logits = z.detach().float().requires_grad_()
        log_p = F.log_softmax(logits, 1)
        loss = -(target * log_p).sum(1).mean()
        other[index] = log_p.detach().exp().half()
        return torch.autograd.grad(loss, logits)[0]

    bench.compare(
        "ps_kd", {"shape": f"{rows}×{classes}"},
        {"eager": eager, "triton": lambda: kernels.ps_kd_loss(z, y, index, table, alpha=alpha)[1].gradient},
        None, baseline="eager", moved={"triton": rows * classes * 8},
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
    compiler = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)
    if compiler is None:
        bench.notes.append("nvcc was not found: the CUDA kernels were not built and not measured")
        return
    major, minor = torch.cuda.get_device_capability()
    arch = f"arch=compute_{major}{minor},code=sm_{major}{minor}"
    command = [
        compiler,
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Icsrc",
        f"-gencode={arch}",
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
        bench.notes.append(f"nvcc failed, the CUDA kernels were not measured: {run.stderr[-500:]}")
        return
    partial.replace(output)


def run_tests(bench: Bench, seconds: float) -> None:
    """Runs the kernel tests on the GPU, one process per file, and notes what they say."""
    if importlib.util.find_spec("pytest") is None:
        bench.notes.append("pytest is not installed: the tests were not run; results were still checked before timing")
        return
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py")) + [ROOT / "tests" / "cuda" / "test_device.py"]
    extra = [] if importlib.util.find_spec("hypothesis") else ["--confcutdir", "tests/kernels"]
    running = {
        file.name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *extra, str(file.relative_to(ROOT))],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for file in files if file.exists() and file.name != "test_aot.py"
    }  # fmt: skip
    end = time.monotonic() + seconds
    for name, process in running.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            last = output.strip().splitlines()[-1] if output.strip() else "no output"
            failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            last, failed = f"stopped after {seconds:.0f} s", []
        bench.rows.append({"section": "tests", "contender": name, "result": last, "failed": failed[:20]})
        print(f"  {name}: {last}", flush=True)
        for line in failed[:20]:
            print(f"    {line}", flush=True)


def write(bench: Bench) -> None:
    """Writes the JSON file and the Markdown tables."""
    from bench.results_io import device_description
    from bench.results_io import write as write_result

    properties = torch.cuda.get_device_properties(0)
    device = device_description() | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }
    notes = "; ".join(bench.notes) or None
    claim = "GPU kernels against the best libraries on one machine"
    write_result(
        "gpu",
        rows=bench.rows,
        claim=claim,
        command="python -m bench.gpu",
        notes=notes,
        device=device,
        folder=bench.folder,
    )
    (bench.folder / "gpu.md").write_text(markdown(bench.rows, device, bench.notes), encoding="utf-8")


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
    """The command; 0 when all went well, 1 when a result was wrong or a test failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Build, test and time the GPU kernels.")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), help="these sections only")
    parser.add_argument("--list", action="store_true", help="list the sections and exit")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after about so long (default 8)")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    options = parser.parse_args(arguments)
    if options.list:
        for name, function in SECTIONS.items():
            print(f"{name:16} {(function.__doc__ or '').splitlines()[0]}")
        return 0
    if not torch.cuda.is_available():
        print(
            "bench.gpu: PyTorch sees no NVIDIA GPU, nothing was measured and nothing was written. "
            "Run it on a machine with one; "
            "`make test-kernels` checks the kernels without.",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    bench = Bench(options.minutes)
    print("building", flush=True)
    build(bench)
    if not options.no_tests:
        print("testing", flush=True)
        run_tests(bench, seconds=min(150.0, bench.left / 3))
    print("ceilings", flush=True)
    ceilings(bench)
    for name, function in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        if bench.left < 30:
            bench.notes.append(f"{name}: left out, the time was up")
            continue
        print(name, flush=True)
        try:
            function(bench)
        except Exception as problem:  # one section must not take the others' results with it
            bench.notes.append(f"{name}: {_short(problem)}")
            print(f"  {_short(problem)}", flush=True)
        write(bench)
    write(bench)
    print(
        f"wrote {bench.folder / 'gpu.json'} and gpu.md after {time.monotonic() - bench.start:.0f} s; "
        + "; ".join(bench.notes)
    )
    return int(any(row.get("failed") or "wrong by" in str(row.get("problem", "")) for row in bench.rows))


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
    pattern = kernels.block_pattern(kept, (side, side))
    values = _random(pattern.blocks, side, side)
    return pattern, values, kernels.unpack_blocks(values, pattern)


def _kept_channels(channels: int, run: int) -> torch.Tensor:
    """Half of the channels, in aligned runs."""
    groups = channels // run
    kept = torch.zeros(groups, dtype=torch.bool, device=DEVICE)
    kept[torch.randperm(groups, device=DEVICE)[: groups // 2]] = True
    return kept.repeat_interleave(run)


def _library() -> Any:
    """The CUDA kernels, or None where they cannot run."""
    from sparse_engine.ops import cuda_library

    return None if DEVICE != "cuda" or cuda_library.why_not() else cuda_library.library()


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
