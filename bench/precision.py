"""Precisions beside PyTorch: rounded weights at batch 1 (linear layers of 16 MB and more), and networks in bfloat16.

    python -m bench.kernels precision
    python -m bench.kernels precision --only mlp
    python -m bench.kernels precision --only mobilenet

Writes bench/results/precision.json and precision_networks.json.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparse_engine as se
from bench import results_io
from bench.networks import IMAGE, NETWORKS, pruned_network
from bench.rows import Unfinished, merged

# Inputs and outputs of linear layers one after the other, with ReLU between them; 16 to 218 MB dense.
CHAINS: dict[str, tuple[int, ...]] = {
    "layer 1024x4096": (1024, 4096),
    "layer 4096x4096": (4096, 4096),
    "mlp": (4096, 4096, 4096, 1000),
    "alexnet classifier": (9216, 4096, 4096, 1000),
}
SPARSITIES = (0.9, 0.95)
BATCHES = (1, 16)


def run(only: str, threads: int, seconds: float, resume: bool, spent: Callable[[], bool]) -> None:
    """Measure the layers and models whose name contains a text; rows of the others stay.

    The networks come last. Where the time is spent, the others are left for another run that resumes.
    """
    wanted = [(name, sizes, sparsity) for name, sizes in CHAINS.items() if only in name for sparsity in SPARSITIES]
    if wanted:
        _run_chains(wanted, threads, seconds)
    unfinished, rows = Unfinished("precision_networks", resume), []
    points = [(name, batch) for name in NETWORKS if only in name for batch in BATCHES]
    for name, batch in points:
        if spent() and not unfinished.has((name, batch, threads)):
            print(f"precision: {len(rows)} of {len(points)} networks measured; go on with --resume", flush=True)
            break
        measure_it = functools.partial(measure_network, name, batch, threads, 3 * seconds)
        rows.append(unfinished.row((name, batch, threads), measure_it))
    if rows:
        _write_networks(rows, threads)
    if len(rows) == len(points):
        unfinished.finished()


def _run_chains(wanted: Sequence[tuple[str, Sequence[int], float]], threads: int, seconds: float) -> None:
    rows = [measure(*point, threads, seconds) for point in wanted]
    results_io.write(
        "precision",
        rows=merged("precision", rows, ("what", "sparsity_%")),
        claim="Rounded weights at batch 1: bf16 and int8 executables beside float32 ones and beside PyTorch.",
        command="python -m bench.kernels precision",
        notes=f"{threads} threads; one row; whole calls of executables in turns with PyTorch's dense layers (float32 "
        "and bfloat16) and, for single layers, its CSR product with the activations already transposed. Errors: the "
        "largest difference from float64, relative to the largest output; PyTorch bf16 rounds inputs, weights "
        "and outputs. MB: 10^6 bytes of the .spx constants.",
    )


def _write_networks(rows: Sequence[dict[str, Any]], threads: int) -> None:
    results_io.write(
        "precision_networks",
        rows=merged("precision_networks", rows, ("network", "batch")),
        claim="Networks pruned to 90 %: executables in bfloat16 beside float32 ones and beside PyTorch in bfloat16.",
        command="python -m bench.kernels precision",
        notes=f"{threads} threads; bursts of calls in turns. PyTorch: the same pruned model in bfloat16, "
        "convolutions channels-last, which it multiplies densely. Errors: the largest difference from PyTorch in "
        "float32, relative to the largest output. bf16_layers: how many compute in bfloat16; the others were "
        "faster in float32. MB: 10^6 bytes of the .spx constants.",
    )


@torch.no_grad()
def measure_network(name: str, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """One row: a network in both precisions, and PyTorch's own in bfloat16."""
    model = pruned_network(name, sparsity=0.9)
    x = torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(1))
    exact = model(x).double()
    half = copy.deepcopy(model).bfloat16().to(memory_format=torch.channels_last)
    half_x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    executables = {p: se.convert(model, x, precision=p, threads=threads) for p in ("fp32", "bf16")}
    calls: dict[str, Callable[[], Any]] = {p: functools.partial(exe, x) for p, exe in executables.items()}
    calls["torch_bf16"] = lambda: half(half_x)
    ms = results_io.burst_medians(calls, seconds)
    layers = [layer for layer in executables["bf16"].report.layers if layer.op in ("conv2d", "linear")]
    row = {
        "network": name,
        "batch": batch,
        **{f"{call}_ms": value for call, value in ms.items()},
        "bf16_over_fp32": ms["fp32"] / ms["bf16"],
        "bf16_over_torch_bf16": ms["torch_bf16"] / ms["bf16"],
        "bf16_layers": sum(", bf16" in layer.kernel for layer in layers),
        "layers": len(layers),
        **{f"{p}_MB": exe.packed_bytes / 1e6 for p, exe in executables.items()},
        **{f"{p}_error": _error(exe(x), exact) for p, exe in executables.items()},
        "torch_bf16_error": _error(half(half_x), exact),
    }
    print("{network} batch {batch}: fp32 {fp32_ms:.2f} ms, bf16 {bf16_ms:.2f}, torch {torch_bf16_ms:.1f}".format(**row))
    return row


@torch.no_grad()
def measure(name: str, sizes: Sequence[int], sparsity: float, threads: int, seconds: float) -> dict[str, Any]:
    """One row: times, errors and bytes of a chain of linear layers with ReLU between them."""
    model = chain(sizes, sparsity)
    x = torch.randn(1, sizes[0], generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(model).double()(x.double())
    half, half_x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: model(x), "dense_bf16": lambda: half(half_x)}
    errors, megabytes, kept = {"torch_bf16_error": _error(half(half_x), exact)}, {}, {}
    for precision in ("fp32", "bf16", "int8"):
        executable = se.convert(model, x, precision=precision, threads=threads)
        calls[precision] = lambda executable=executable: executable(x)
        errors[f"{precision}_error"] = _error(executable(x), exact)
        megabytes[f"{precision}_MB"] = executable.packed_bytes / 1e6
        kept[f"rounded_{precision}"] = sum(f", {precision} " in layer.kernel for layer in executable.report.layers)
    if len(sizes) == 2:
        csr, column, bias = model[0].weight.to_sparse_csr(), x.T.contiguous(), model[0].bias[:, None]
        calls["csr"] = lambda: csr @ column + bias
    ms = {call: summary["median_ms"] for call, summary in results_io.interleaved(calls, seconds=seconds).items()}
    row = {
        "what": name,
        "sparsity_%": round(100 * sparsity),
        "dense_MB": 4e-6 * sum(a * b for a, b in itertools.pairwise(sizes)),
        **{f"{call}_ms": ms.get(call) for call in ("fp32", "bf16", "int8", "dense", "dense_bf16", "csr")},
        "bf16_over_fp32": ms["fp32"] / ms["bf16"],
        "int8_over_fp32": ms["fp32"] / ms["int8"],
        "fp32_over_dense": ms["dense"] / ms["fp32"],
        "fp32_over_csr": ms["csr"] / ms["fp32"] if "csr" in ms else None,
        **{key: value for key, value in kept.items() if key != "rounded_fp32"},
        **megabytes,
        **errors,
    }
    print(
        "{what:18s} {sparsity_%} %: fp32 {fp32_ms:.3f} ms, bf16 {bf16_ms:.3f}, int8 {int8_ms:.3f}, "
        "dense {dense_ms:.3f}, dense bf16 {dense_bf16_ms:.3f}".format(**row),
        flush=True,
    )
    return row


def chain(sizes: Sequence[int], sparsity: float) -> nn.Sequential:
    """Linear layers with ReLU between them, pruned by magnitude: of normal weights what lies beyond a quantile."""
    limit = float(torch.special.ndtri(torch.tensor((1 + sparsity) / 2, dtype=torch.float64)))
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        generator = torch.Generator().manual_seed(index)
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
        weight = torch.randn(outputs, inputs, generator=generator)
        layer.weight.data = weight * (weight.abs() > limit) * math.sqrt(2 / inputs)
        layer.bias.data = torch.randn(outputs, generator=generator) / 10
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()
