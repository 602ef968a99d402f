"""Single layers beside the best dense library and torch's CSR product, over shapes, sparsities and structures.

    python -m bench.kernels                   all of it, in about eight minutes
    python -m bench.kernels layers            the sweep; --only resnet50 limits it, rows of the others stay
    python -m bench.kernels dlmc              the magnitude-pruned matrices in $SPARSE_ENGINE_DATA/dlmc
    python -m bench.kernels precision         bf16 and int8 weights at batch 1 (bench/precision.py); --only mlp
    python -m bench.kernels --quick layers    fewer shapes and sparsities, shorter; --full: more
    python -m bench.kernels --resume          goes on where an interrupted run of the same command stopped
    python -m bench.kernels --budget 55 --resume layers      stops after 55 seconds, to go on in another call

Write bench/results/layers.json, layers_break_even.json, layers_summary.json, dlmc.json, dlmc_summary.json and
precision.json, and the plot docs/layers.svg.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparse_engine as se
from bench import precision, results_io
from bench.networks import magnitude_mask
from bench.peak import peak_gflops, peak_source
from bench.rows import Unfinished, merged

PLOT = results_io.RESULTS.parent.parent / "docs" / "layers.svg"
PAIRS = {"2:4": (2, 4), "1:4": (1, 4), "1:8": (1, 8), "1:16": (1, 16)}
CLOSE = 1e-4  # of the output's scale: a layer that is off by more is not timed
BLOCKS = {"4x1": (4, 1), "16x1": (16, 1), "1x4": (1, 4)}


@dataclass(frozen=True)
class Layer:
    """A layer of a real network: a convolution over pixels, or a linear layer over rows.

    Attributes:
        name: network and place.
        outputs, inputs: channels.
        kernel: side of the filter; 0 for a linear layer.
        size: side of the (square) input in pixels, or the number of rows.
        batch: images.
    """

    name: str
    outputs: int
    inputs: int
    kernel: int
    size: int
    batch: int = 1

    @property
    def product(self) -> tuple[int, int, int]:
        """Rows, depth and columns (M, K, N) of the matrix product that the layer is."""
        if self.kernel == 0:
            return self.outputs, self.inputs, self.size
        return self.outputs, self.inputs * self.kernel**2, self.batch * self.size**2

    def weight(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (self.outputs, self.inputs, *((self.kernel, self.kernel) if self.kernel else ()))
        return torch.randn(shape, generator=generator) / math.sqrt(self.product[1])

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.kernel == 0:
            return torch.randn(self.size, self.inputs, generator=generator)
        return torch.randn(self.batch, self.inputs, self.size, self.size, generator=generator)


LAYERS = [
    Layer("resnet50 layer1 1x1", 256, 64, 1, 56),
    Layer("resnet50 layer1 3x3", 64, 64, 3, 56),
    Layer("resnet50 layer2 3x3", 128, 128, 3, 28),
    Layer("resnet50 layer2 1x1", 512, 128, 1, 28),
    Layer("resnet50 layer3 3x3", 256, 256, 3, 14),
    Layer("resnet50 layer3 1x1", 1024, 256, 1, 14),
    Layer("resnet50 layer4 3x3", 512, 512, 3, 7),
    Layer("resnet50 layer4 1x1", 2048, 512, 1, 7),
    Layer("resnet50 layer3 3x3, batch 16", 256, 256, 3, 14, 16),
    Layer("resnet50 layer3 1x1, batch 16", 1024, 256, 1, 14, 16),
    Layer("vgg16 conv4 3x3", 512, 512, 3, 28),
    Layer("vit_b_16 mlp up", 3072, 768, 0, 197),
    Layer("vit_b_16 mlp down", 768, 3072, 0, 197),
    Layer("linear 1024", 1024, 1024, 0, 1024),
    Layer("linear 4096 to 1024", 1024, 4096, 0, 1024),
    Layer("one row, 4096x1024", 1024, 4096, 0, 1),
    Layer("one row, 4096x4096", 4096, 4096, 0, 1),
]
QUICK_LAYERS = ("resnet50 layer3 3x3", "resnet50 layer3 1x1", "linear 1024", "one row, 4096x1024")
# By how long the sweep may take: sparsities of unstructured patterns, of blocks, and how many of the N:M patterns.
GRIDS = {
    "quick": ((0.5, 0.7, 0.9, 0.95), (0.5, 0.9), 1),
    "usual": ((0.5, 0.65, 0.8, 0.9, 0.95, 0.99), (0.3, 0.5, 0.9), 1),
    "full": ((0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99), (0.15, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95), 4),
}


def patterns(grid: str) -> Iterable[tuple[str, float]]:
    """Structure and sparsity of every point of the sweep."""
    unstructured, blocked, pairs = GRIDS[grid]
    yield from (("unstructured", sparsity) for sparsity in unstructured)
    for block in BLOCKS:
        # 1x4 gains nothing over single weights: one point says so.
        yield from ((block, sparsity) for sparsity in (blocked if block != "1x4" or grid == "full" else blocked[-1:]))
    yield from ((pair, 1 - n / m) for pair, (n, m) in list(PAIRS.items())[:pairs])


def mask_of(weight: Tensor, structure: str, sparsity: float) -> Tensor:
    """Mask by magnitude, of the structure asked for."""
    if structure in PAIRS:
        kept, group = PAIRS[structure]
        matrix = weight.reshape(weight.shape[0], -1)
        groups = matrix.abs().reshape(matrix.shape[0], -1, group)
        mask = torch.zeros_like(groups).scatter_(2, groups.topk(kept, dim=2).indices, 1.0)
        return mask.reshape(weight.shape)
    return magnitude_mask(weight, sparsity, BLOCKS.get(structure, (1, 1)))


def ours(layer: Layer, weight: Tensor, x: Tensor, threads: int) -> tuple[dict[str, Callable[[], Any]], str]:
    """Our calls and the kernel that was chosen: an executable of the one layer, and `SparseLinear` where it is one."""
    if layer.kernel == 0:
        dense: nn.Module = nn.Linear(layer.inputs, layer.outputs)
    else:
        dense = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, padding=layer.kernel // 2)
    dense.weight.data.copy_(weight)
    executable = se.convert(dense, (x,), threads=threads, verify=False)  # checked here, at one batch size
    expected = dense(x)
    error = float((executable(x) - expected).abs().max() / expected.abs().max())
    if not error < CLOSE:
        raise AssertionError(f"{layer.name}: the executable is off by {error:.1e} of the output's scale")
    kernel = next(entry.kernel for entry in executable.report.layers if entry.op in ("conv2d", "linear"))
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: executable(x)}
    if isinstance(dense, nn.Linear):
        sparse = se.nn.SparseLinear.from_dense(dense)
        calls["SparseLinear"] = lambda: sparse(x)
    return calls, kernel


def rivals(layer: Layer, weight: Tensor, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Dense library calls, and the CSR product where the layer is one matrix product."""
    bias = torch.zeros(layer.outputs)
    if layer.kernel:
        last, weight_last = x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)
        padding = layer.kernel // 2
        return {
            "torch conv2d": lambda: functional.conv2d(x, weight, bias, padding=padding),
            "torch conv2d, channels last": lambda: functional.conv2d(last, weight_last, bias, padding=padding),
        }
    found: dict[str, Callable[[], Any]] = {"torch linear": lambda: functional.linear(x, weight, bias)}
    if layer.size > 1:
        # The same product as a 1×1 convolution: oneDNN instead of MKL.
        pixels = x.T.contiguous().reshape(1, layer.inputs, 1, layer.size)
        filters = weight[:, :, None, None]
        last = pixels.to(memory_format=torch.channels_last)
        found["torch conv2d"] = lambda: functional.conv2d(pixels, filters, bias)
        found["torch conv2d, channels last"] = lambda: functional.conv2d(last, filters, bias)
    compressed, transposed = weight.to_sparse_csr(), x.T.contiguous()
    found["torch csr"] = lambda: compressed @ transposed
    return found


@torch.no_grad()
def measure_layer(layer: Layer, structure: str, sparsity: float, threads: int, seconds: float) -> dict[str, Any]:
    weight, x = layer.weight(), layer.input()
    weight *= mask_of(weight, structure, sparsity)
    calls, kernel = ours(layer, weight, x, threads)
    ms = results_io.burst_medians(calls | rivals(layer, weight, x), seconds=seconds)
    dense = {name: value for name, value in ms.items() if name not in ("ours", "SparseLinear", "torch csr")}
    best = min(dense, key=dense.__getitem__)
    rows, depth, columns = layer.product
    gflop, peak = 2 * rows * depth * columns / 1e9, peak_gflops(threads)
    kept = int(weight.count_nonzero()) / weight.numel()
    return {
        "layer": layer.name,
        "M": rows,
        "K": depth,
        "N": columns,
        "structure": structure,
        "sparsity_%": round(100 * (1 - kept), 1),
        "kernel": kernel,
        "ms": ms["ours"],
        "dense_ms": dense[best],
        "dense_library": best,
        "csr_ms": ms.get("torch csr"),
        "sparse_linear_ms": ms.get("SparseLinear"),
        "speed_up_over_dense": dense[best] / ms["ours"],
        "speed_up_over_csr": ms["torch csr"] / ms["ours"] if "torch csr" in ms else None,
        "share_of_peak_%": 100 * kept * gflop / ms["ours"] * 1e3 / peak,
        "dense_share_of_peak_%": 100 * gflop / dense[best] * 1e3 / peak,
    }


class Budget:
    """Seconds that a run may take.

    Example:
        >>> Budget(None).spent, Budget(-1.0).spent
        (False, True)
    """

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.perf_counter() + seconds

    @property
    def spent(self) -> bool:
        """Whether no other point should be begun."""
        return self.end is not None and time.perf_counter() > self.end


def run_layers(only: str, grid: str, threads: int, resume: bool, budget: Budget) -> None:
    quick = grid == "quick"
    unfinished = Unfinished("layers", resume)
    points = [
        (layer, structure, sparsity)
        for layer in LAYERS
        if only in layer.name and (not quick or layer.name in QUICK_LAYERS)
        for structure, sparsity in patterns(grid)
    ]
    rows: list[dict[str, Any]] = []
    for layer, structure, sparsity in points:
        key = (layer.name, structure, sparsity, quick, threads)
        if budget.spent and not unfinished.has(key):
            print(f"layers: {len(rows)} of {len(points)} points measured; go on with --resume", flush=True)
            return
        measure = functools.partial(measure_layer, layer, structure, sparsity, threads, 0.08 if quick else 0.2)
        rows.append(unfinished.row(key, measure))
        print(
            "{layer:32s} {structure:12s} {sparsity_%:5.1f} % {ms:9.4f} ms, {speed_up_over_dense:5.2f} x dense, "
            "{share_of_peak_%:4.1f} % of peak".format(**rows[-1]),
            flush=True,
        )
    keys = ("layer", "structure", "sparsity_%")
    places = {layer.name: i for i, layer in enumerate(LAYERS)}
    table = sorted(merged("layers", rows, keys), key=lambda row: places.get(row["layer"], len(places)))
    machine = f"{threads} threads; bursts of calls in turns; share of peak: operations left when zeros are skipped, "
    machine += f"over {peak_source()} ({peak_gflops(threads):.0f} GFLOP/s)."
    results_io.write(
        "layers",
        rows=table,
        claim="Single sparse layers beside the best dense library call for the same product.",
        command="python -m bench.kernels layers",
        notes=machine
        + " Ours: a whole call of an executable of that one layer, its kernel chosen by timing, with dense among them; "
        "sparse_linear_ms: the module `SparseLinear`. Dense: the faster of oneDNN convolutions (plain and "
        "channels-last, and as a 1x1 convolution for linear layers) and MKL's product. CSR: torch's, with the "
        "activations already transposed.",
    )
    unfinished.finished()
    write_break_even(table)
    write_layers_summary(table)
    plot_layers(table)


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity (per cent) from which a layer is faster than dense: (sparsity, speed-up) points, interpolated.

    Example:
        >>> break_even([(50, 0.8), (70, 1.2), (90, 4.0)])
        60.0
    """
    points = sorted(points)
    below = [index for index, (_, speed_up) in enumerate(points) if speed_up < 1]
    if not below:
        return points[0][0]
    if below[-1] == len(points) - 1:
        return None
    (low, slow), (high, fast) = points[below[-1]], points[below[-1] + 1]
    return low + (high - low) * (1 - slow) / (fast - slow)


def write_break_even(table: Sequence[dict[str, Any]]) -> None:
    rows = []
    for layer in LAYERS:
        row: dict[str, Any] = {"layer": layer.name}
        for structure in ("unstructured", *BLOCKS):
            points = [
                (entry["sparsity_%"], entry["speed_up_over_dense"])
                for entry in table
                if entry["layer"] == layer.name and entry["structure"] == structure
            ]
            if points:
                row[f"{structure}_%"] = break_even(points)
                row[f"{structure}_at_90_x"] = next((s for p, s in points if abs(p - 90) < 0.6), None)
        if len(row) > 1:
            rows.append(row)
    results_io.write(
        "layers_break_even",
        rows=rows,
        claim="Sparsity from which a layer is faster than the best dense library, and the speed-up at 90 %.",
        command="python -m bench.kernels layers",
        notes="Interpolated between the measured sparsities; a value equal to the lowest measured one means: at the "
        "latest from there on. An executable's layer stays dense where that is faster.",
    )


def write_layers_summary(table: Sequence[dict[str, Any]]) -> None:
    """Geometric means over the layers with many columns and with one, and the worst point against dense."""
    rows = []
    kinds = {"N >= 256": lambda row: row["N"] >= 256, "one row": lambda row: row["N"] == 1, "all": lambda row: True}
    for kind, belongs in kinds.items():
        for structure, sparsity in sorted({(row["structure"], round(row["sparsity_%"])) for row in table}):
            chosen = [
                row
                for row in table
                if belongs(row) and (row["structure"], round(row["sparsity_%"])) == (structure, sparsity)
            ]
            if not chosen:
                continue
            with_csr = [row["speed_up_over_csr"] for row in chosen if row["speed_up_over_csr"]]
            worst = min(chosen, key=lambda row: row["speed_up_over_dense"])
            rows.append(
                {
                    "layers": kind,
                    "structure": structure,
                    "sparsity_%": sparsity,
                    "count": len(chosen),
                    "over_dense": statistics.geometric_mean(row["speed_up_over_dense"] for row in chosen),
                    "over_csr": statistics.geometric_mean(with_csr) if with_csr else None,
                    "share_of_peak_%": statistics.geometric_mean(row["share_of_peak_%"] for row in chosen),
                    "worst_over_dense": worst["speed_up_over_dense"],
                    "worst_layer": worst["layer"],
                    "slower_than_dense_by_3_%": sum(row["speed_up_over_dense"] < 1 / 1.03 for row in chosen),
                }
            )
    results_io.write(
        "layers_summary",
        rows=rows,
        claim="Single sparse layers: geometric means of the speed-ups, and the worst layer against dense.",
        command="python -m bench.kernels layers",
        notes="Of the rows of layers.json. over_csr: linear layers only, where torch has such a product.",
    )


def plot_layers(table: Sequence[dict[str, Any]]) -> None:
    """Speed-up over dense by sparsity, one panel for each kind of pattern."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    structures = ("unstructured", "4x1", "16x1")
    figure, axes = pyplot.subplots(1, len(structures), figsize=(13, 4.2), sharey=True)
    for axis, structure in zip(axes, structures, strict=True):
        for index, layer in enumerate(LAYERS):
            points = sorted(
                (row["sparsity_%"], row["speed_up_over_dense"])
                for row in table
                if row["layer"] == layer.name and row["structure"] == structure
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", color=f"C{index % 10}", label=layer.name, lw=1)
        grid = numpy.linspace(10, 99, 200)
        axis.plot(grid, 100 / (100 - grid), color="#999999", ls=":", label="fewer operations")
        axis.axhline(1, color="#999999", lw=0.8)
        axis.set_yscale("log", base=2)
        axis.set_ylim(0.5, 64)
        axis.set_title(structure, fontsize=10, loc="left")
        axis.set_xlabel("sparsity, %")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("speed-up over the best dense library")
    axes[0].legend(frameon=False, fontsize=6)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)


# ---- the Deep Learning Matrix Collection

DLMC = "python -m bench.kernels dlmc"


def read_smtx(path: Path) -> Tensor:
    """A pattern in the collection's text format ("rows, cols, nnz", row offsets, column indices) with random values."""
    lines = path.read_text().split("\n")
    rows, columns, count = (int(part) for part in lines[0].split(","))
    offsets, indices = (torch.tensor([int(part) for part in line.split()]) for line in lines[1:3])
    if len(offsets) != rows + 1 or len(indices) != count:
        raise ValueError(
            f"{path}: {rows} rows and {count} entries are announced, {len(offsets)} and {len(indices)} found"
        )
    weight = torch.zeros(rows, columns)
    of_row = torch.repeat_interleave(torch.arange(rows), offsets.diff())
    weight[of_row, indices] = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return weight


@torch.no_grad()
def measure_matrix(path: Path, columns: int, threads: int, seconds: float) -> dict[str, Any]:
    weight = read_smtx(path)
    rows, depth = weight.shape
    x = torch.randn(depth, columns, generator=torch.Generator().manual_seed(1))
    image = x.reshape(1, depth, 1, columns)
    convolution = nn.Conv2d(depth, rows, 1, bias=False)
    convolution.weight.data.copy_(weight[:, :, None, None])
    executable = se.convert(convolution, (image,), threads=threads, verify=False)  # checked here, at one batch size
    expected = weight @ x
    error = float((executable(image).reshape(rows, columns) - expected).abs().max() / expected.abs().max())
    if not error < CLOSE:
        raise AssertionError(f"{path.stem}: the executable is off by {error:.1e} of the output's scale")
    compressed = weight.to_sparse_csr()
    filters = weight[:, :, None, None]
    calls = {
        "ours": lambda: executable(image),
        "mm": lambda: weight @ x,
        "conv": lambda: functional.conv2d(image, filters),
        "csr": lambda: compressed @ x,
    }
    ms = results_io.burst_medians(calls, seconds=seconds)
    kept = int(weight.count_nonzero())
    return {
        "matrix": path.stem,
        "collection": path.parent.parent.parent.name,
        "sparsity_%": round(100 * float(path.parent.name)),
        "M": rows,
        "K": depth,
        "N": columns,
        "ms": ms["ours"],
        "mkl_dense_ms": ms["mm"],
        "onednn_dense_ms": ms["conv"],
        "mkl_csr_ms": ms["csr"],
        "over_mkl_csr": ms["csr"] / ms["ours"],
        "over_mkl_dense": ms["mm"] / ms["ours"],
        "over_best_dense": min(ms["mm"], ms["conv"]) / ms["ours"],
        "share_of_peak_%": 100 * 2e-6 * kept * columns / ms["ours"] / peak_gflops(threads),
    }


def run_dlmc(quick: bool, threads: int, resume: bool, budget: Budget) -> None:
    folder = os.environ.get("SPARSE_ENGINE_DATA")
    place = Path(folder or ".") / "dlmc"
    if not place.is_dir():
        print("dlmc: skipped; set SPARSE_ENGINE_DATA to a folder that holds dlmc/")
        return
    pixels = dict(line.split(",") for line in (place / "rn50_batchsizes.txt").read_text().split())
    rows, unfinished = [], Unfinished("dlmc", resume)
    paths = sorted(place.rglob("*.smtx"))[:: 6 if quick else 1]
    for path in paths:
        key = (str(path.relative_to(place)), quick, threads)
        if budget.spent and not unfinished.has(key):
            print(f"dlmc: {len(rows)} of {len(paths)} matrices measured; go on with --resume", flush=True)
            return
        columns = int(pixels.get(path.stem, 256))
        measure = functools.partial(measure_matrix, path, columns, threads, 0.1 if quick else 0.3)
        rows.append(unfinished.row(key, measure))
        print(
            "{matrix:52s} {sparsity_%} % {ms:8.4f} ms, {over_mkl_csr:5.2f} x CSR, {over_mkl_dense:5.2f} x dense".format(
                **rows[-1]
            ),
            flush=True,
        )
    notes = (
        f"{threads} threads; W times X with N columns: the layer's pixels, 256 for the Transformer. Ours: a whole call "
    )
    notes += (
        "of an executable of that one 1x1 convolution. MKL: torch's dense and CSR products; best dense: MKL or oneDNN."
    )
    results_io.write("dlmc", rows=rows, claim="Real magnitude-pruned patterns.", command=DLMC, notes=notes)
    write_dlmc_summary(rows, notes)
    unfinished.finished()


def write_dlmc_summary(rows: Sequence[dict[str, Any]], notes: str) -> None:
    """Geometric means by collection and sparsity, and over all sparsities."""
    summary = []
    for kind in ("all", "N >= 256"):
        for collection in ("rn50", "transformer", "both"):
            for sparsities in ((80,), (90,), (95,), (80, 90, 95)):
                chosen = [
                    row
                    for row in rows
                    if collection in (row["collection"], "both")
                    and row["sparsity_%"] in sparsities
                    and (kind == "all" or row["N"] >= 256)
                ]
                if not chosen:
                    continue
                means = {
                    key: statistics.geometric_mean(row[key] for row in chosen)
                    for key in ("over_mkl_csr", "over_mkl_dense", "over_best_dense", "share_of_peak_%")
                }
                worst = {"worst_over_best_dense": min(row["over_best_dense"] for row in chosen)}
                label = sparsities[0] if len(sparsities) == 1 else "80 to 95"
                point = {"collection": collection, "columns": kind, "sparsity_%": label, "matrices": len(chosen)}
                summary.append(point | means | worst)
    results_io.write(
        "dlmc_summary",
        rows=summary,
        claim="Real magnitude-pruned patterns: geometric means of the speed-ups.",
        command=DLMC,
        notes=notes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer points, shorter")
    parser.add_argument("--full", action="store_true", help="the finest grid of sparsities")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="layers (and models of `precision`) whose name contains this")
    parser.add_argument("--budget", type=float, help="seconds; what is not measured by then is left for --resume")
    every = ("layers", "dlmc", "precision")
    parser.add_argument("part", nargs="*", choices=every, default=list(every))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    budget = Budget(options.budget)
    if "layers" in options.part:
        grid = "quick" if options.quick else "full" if options.full else "usual"
        run_layers(options.only, grid, options.threads, options.resume, budget)
    if "dlmc" in options.part:
        run_dlmc(options.quick, options.threads, options.resume, budget)
    if "precision" in options.part and not budget.spent:
        seconds = 0.5 if options.quick else 2.0
        precision.run(options.only, options.threads, seconds, options.resume, lambda: budget.spent)


if __name__ == "__main__":
    main()
