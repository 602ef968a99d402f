"""Plots as inline SVG: time by layer, sparsity by layer, roofline, curves of a training run."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

from sparse_engine.errors import SparseEngineError
from sparse_engine.report.measure import Ceilings, LayerTime

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPARSE, DENSE, ACCENT, MUTED, INK = "#0b6e99", "#c9cfd6", "#d9730d", "#8a939c", "#1f2933"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparse_engine",
}
BARS = 40
"""Layers that the plot of times shows: the slowest ones."""


P = ParamSpec("P")


def _styled(plot: Callable[P, str]) -> Callable[P, str]:
    """Run a plot under this page's style; the settings of the process, and its windows, stay as they are."""

    @functools.wraps(plot)
    def run(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            import matplotlib
        except ImportError:
            raise SparseEngineError(
                "plots need matplotlib, which is not installed: pip install 'sparse-engine[report]'"
            ) from None
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
            return plot(*args, **kwargs)

    return run


@_styled
def plot_times(layers: Sequence[LayerTime]) -> str:
    """Milliseconds of each layer, dense behind and sparse in front; the slowest layers when there are many."""
    timed = [layer for layer in layers if max(layer.ms, layer.dense_ms) > 0]
    shown = sorted(timed, key=lambda layer: -max(layer.ms, layer.dense_ms))[:BARS]
    chosen = [layer for layer in timed if layer in shown]
    names = [_shorten(layer.name) for layer in chosen]
    figure, axes = _bars_figure(len(names))
    rows = range(len(names))
    axes.barh(rows, [layer.dense_ms for layer in chosen], height=0.78, color=DENSE, label="dense, PyTorch")
    axes.barh(rows, [layer.ms for layer in chosen], height=0.42, color=SPARSE, label="executable")
    axes.set_yticks(list(rows), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("milliseconds per call")
    axes.legend(loc="lower right")
    return _svg(figure, "time by layer")


@_styled
def plot_sparsity(names: Sequence[str], sparsities: Sequence[float], weights: Sequence[int]) -> str:
    """Sparsity of each weight, as bars whose depth of colour tells the share of all weights."""
    figure, axes = _bars_figure(len(names))
    largest = max(weights, default=1) or 1
    rows = range(len(names))
    colours = [(*_rgb(SPARSE), 0.35 + 0.65 * (count / largest) ** 0.5) for count in weights]
    axes.barh(rows, [100] * len(names), height=0.7, color="#eef1f4")
    axes.barh(rows, [100 * sparsity for sparsity in sparsities], height=0.7, color=colours)
    axes.set_yticks(list(rows), [_shorten(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("weights that are zero, %  (darker: larger layer)")
    return _svg(figure, "sparsity by layer")


@_styled
def plot_roofline(layers: Sequence[LayerTime], ceilings: Ceilings) -> str:
    """Achieved GFLOP/s against arithmetic intensity, under the ceilings of this machine."""
    points = [layer for layer in layers if layer.sparsity is not None and layer.flops > 0 and layer.ms > 0]
    figure, axes = _figure(7.2, 4.2)
    peak = ceilings.peak
    ridge = peak / ceilings.gbytes
    low = min([layer.intensity for layer in points] + [ridge]) / 2
    high = max([layer.intensity for layer in points] + [ridge]) * 2
    axes.plot([low, ridge, high], [ceilings.gbytes * low, peak, peak], color=MUTED, lw=1.5)
    if ceilings.cache_gbytes is not None and ceilings.cache_gbytes > ceilings.gbytes:
        bend = peak / ceilings.cache_gbytes
        axes.plot([low, max(low, bend)], [ceilings.cache_gbytes * low, peak], color=MUTED, lw=1, ls="--")
    if ceilings.gflops < peak:
        axes.plot([ridge, high], [ceilings.gflops, ceilings.gflops], color=MUTED, lw=1, ls="--")
    axes.annotate(
        f"peak: {peak:.0f} GFLOP/s, dense product: {ceilings.gflops:.0f}"
        if ceilings.gflops < peak
        else f"best dense product: {ceilings.gflops:.0f} GFLOP/s",
        (high, peak),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED,
    )
    axes.annotate(
        f"memory: {ceilings.gbytes:.0f} GB/s",
        (low, ceilings.gbytes * low),
        xytext=(24, 4),
        textcoords="offset points",
        fontsize=8,
        color=MUTED,
    )
    longest = max([layer.ms for layer in points], default=1.0)
    for dense, colour, label in ((True, ACCENT, "dense weight"), (False, SPARSE, "sparse weight")):
        chosen = [layer for layer in points if (layer.structure == "dense") == dense]
        if chosen:
            axes.scatter(
                [layer.intensity for layer in chosen],
                [layer.gflops for layer in chosen],
                s=[12 + 160 * layer.ms / longest for layer in chosen],
                color=colour,
                alpha=0.65,
                linewidths=0,
                label=label,
            )
    for layer in _apart(sorted(points, key=lambda layer: -layer.ms)[:12])[:5]:
        axes.annotate(
            _shorten(layer.name, 24),
            (layer.intensity, layer.gflops),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("FLOPs that remain per byte of least traffic")
    axes.set_ylabel("GFLOP/s over the FLOPs that remain")
    if points:
        axes.legend(loc="lower right", fontsize=8)
    return _svg(figure, "roofline")


@_styled
def plot_latency(results: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds per sample at each batch size, executable beside dense, with the 10 to 90 % range."""
    figure, axes = _figure(7.2, 2.9)
    places = range(len(results))
    for offset, key, colour, label in (
        (-0.2, "dense", DENSE, "dense"),
        (0.2, "executable", SPARSE, "executable"),
    ):
        middle = [result[key]["p50"] / result["batch"] for result in results]
        below = [(result[key]["p50"] - result[key]["p10"]) / result["batch"] for result in results]
        above = [(result[key]["p90"] - result[key]["p50"]) / result["batch"] for result in results]
        at = [place + offset for place in places]
        axes.bar(at, middle, width=0.38, color=colour, label=label)
        axes.errorbar(at, middle, yerr=[below, above], fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
        for x, value in zip(at, middle, strict=True):
            axes.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
                (x, value),
                xytext=(8, 2),
                textcoords="offset points",
                fontsize=8,
                ha="left",
            )
    # One interrupted call must not squeeze the bars: whiskers may leave the picture.
    tallest = max(result[key]["p50"] / result["batch"] for result in results for key in ("dense", "executable"))
    axes.set_ylim(0, 1.5 * tallest)
    axes.set_xlim(-0.7, max(len(results), 3) - 0.3)
    axes.set_xticks(list(places), [f"batch {result['batch']}" for result in results])
    axes.set_ylabel("ms per sample")
    axes.legend(loc="upper right", fontsize=8)
    return _svg(figure, "latency")


@_styled
def plot_training(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss and accuracy over the epochs of a run."""
    figure, (left, right) = _figure(9.2, 3.0, 2)
    epochs = range(1, len(rows) + 1)
    _line(left, epochs, [row.get("loss") for row in rows], SPARSE, "training loss")
    left.set(xlabel="epoch", ylabel="loss")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _line(right, epochs, [row.get("train_accuracy") for row in rows], SPARSE, "training")
    _line(right, epochs, [row.get("test_accuracy") for row in rows], ACCENT, "test")
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend(loc="lower right", fontsize=8)
    phases = [row.get("phase") for row in rows]
    for index in range(1, len(rows)):
        if phases[index] != phases[index - 1]:
            for axes in (left, right):
                axes.axvline(index + 0.5, color=DENSE, lw=1)
    return _svg(figure, "training")


@_styled
def plot_flow(rows: Sequence[Mapping[str, Any]]) -> str:
    """Norm of the gradient over the epochs, and how much of the first mask each later one keeps."""
    moved = any(isinstance(row.get("mask_overlap"), int | float) for row in rows)
    figure, axes = _figure(9.2, 2.8, 2) if moved else _figure(7.2, 2.8)
    left, right = axes if moved else (axes, None)
    epochs = range(1, len(rows) + 1)
    _line(left, epochs, [row.get("gradient_norm") for row in rows], SPARSE, "gradient")
    left.set(xlabel="epoch", ylabel="gradient norm, kept weights", yscale="log")
    left.xaxis.get_major_locator().set_params(integer=True)
    if right is not None:
        _line(right, epochs, [row.get("mask_overlap") for row in rows], ACCENT, "overlap")
        right.set(xlabel="epoch", ylabel="overlap with the first mask", ylim=(0, 1.05))
        right.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure, "gradient flow")


@_styled
def plot_surface(axis: Sequence[float], losses: Sequence[Sequence[float | None]]) -> str:
    """The loss on a plane through the trained weights, as contours; the weights are the cross in the middle."""
    import numpy as np

    figure, axes = _figure(4.8, 3.8)
    heights = np.array([[np.nan if value is None else value for value in row] for row in losses], dtype=float)
    drawn = axes.contourf(axis, axis, np.ma.masked_invalid(heights).T, levels=18, cmap="viridis")
    figure.colorbar(drawn, label="loss")
    axes.plot([0], [0], marker="+", color=ACCENT, ms=10, mew=2)
    axes.set(xlabel="first direction", ylabel="second direction")
    return _svg(figure, "loss surface")


@_styled
def plot_density(densities: Mapping[str, float], overlaps: Mapping[str, float]) -> str:
    """Kept share of every layer on a logarithmic scale; a layer without any weight is marked in words."""
    names = list(densities)[:60]
    figure, axes = _bars_figure(len(names))
    rows = range(len(names))
    kept = [densities[name] for name in names]
    low = min((100 * value for value in kept if value > 0), default=1.0) / 3
    axes.barh(rows, [100 * value for value in kept], height=0.7, color=SPARSE)
    for row, name in enumerate(names):
        note = f"{100 * densities[name]:.3g} %" if densities[name] else "empty"
        if name in overlaps and overlaps[name] < 1:
            note += f", overlap {overlaps[name]:.2f}"
        axes.annotate(
            note, (max(100 * densities[name], low), row), xytext=(4, 0), textcoords="offset points", fontsize=7,
            va="center",
        )  # fmt: skip
    axes.set_yticks(list(rows), [_shorten(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(low, 1000)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("kept weights, %")
    return _svg(figure, "density by layer")


def _apart(layers: Sequence[LayerTime]) -> list[LayerTime]:
    """Those whose labels would not lie on one another, the first ones first."""
    kept: list[LayerTime] = []
    for layer in layers:
        if all(
            abs(math.log(layer.intensity / other.intensity)) > 1.0 or abs(math.log(layer.gflops / other.gflops)) > 0.35
            for other in kept
        ):
            kept.append(layer)
    return kept


def _line(axes: Any, x: Sequence[int] | range, y: Sequence[Any], colour: str, label: str) -> None:
    known = [(at, value) for at, value in zip(x, y, strict=True) if isinstance(value, int | float)]
    if known:
        marker = "o" if len(known) < 25 else None
        axes.plot(
            [at for at, _ in known], [value for _, value in known], color=colour, label=label, marker=marker, ms=3
        )


def _bars_figure(count: int) -> tuple[Figure, Any]:
    return _figure(7.2, 0.9 + 0.19 * max(count, 3))


def _shorten(name: str, length: int = 34) -> str:
    """The beginning and the end of a long name; a dollar sign is no formula."""
    short = name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"
    return short.replace("$", r"\$")


def _rgb(colour: str) -> tuple[float, float, float]:
    return (int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    # Figure, not pyplot: no window, no backend to choose, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element that scales with the page and refers to nothing outside it."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids are unique within a figure only; several figures share the page.
    prefix = label.replace(" ", "-")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return opening.replace("<svg", f'<svg role="img" aria-label="{label}"', 1) + ">" + rest
