"""What ``executable.report`` and ``executable.benchmark`` return: plain data that prints as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Benchmark", "LayerReport", "Report", "Timing"]


@dataclass(frozen=True)
class LayerReport:
    """One node of the executable.

    Attributes:
        name: the layer's name in the model (`layer1.0.conv1`).
        op: the graph op; for a fallback its aten function.
        shape: of the output, for the example batch.
        structure: what is kept together in its weight, as text; None for ops without a weight.
        sparsity: fraction of the weight's entries that are exact zeros; None without a weight.
        flops: of the dense operation, for the example batch (a multiplication and an addition are two).
        kernel: what runs it.
        ms: measured time per call on the example inputs; None where nothing was measured.
        dense_ms: the same for the best dense candidate.
        reason: why this kernel, why it stayed dense, or why it is a fallback.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    structure: str | None
    sparsity: float | None
    flops: int
    kernel: str
    ms: float | None
    dense_ms: float | None
    reason: str


@dataclass
class Report:
    """What became of a model, layer by layer and in all; prints as a table.

    Example::

        print(executable.report)
        json.dumps(executable.report.to_json())

    Attributes:
        layers: in running order; movement (reshape, permute, …) that costs nothing is left out.
        native_share: fraction of the dense FLOPs that run in native kernels rather than through PyTorch.
        fallbacks: names of the fallback nodes with the reasons.
        sparsity: fraction of zeros over all weights of linear operators, before dead channels were removed.
        bytes_before: of the model's parameters and buffers.
        bytes_after: of the executable's packed constants.
        max_error: largest difference from the model on the example inputs, relative to the output's largest magnitude;
            None when not verified.
        bound: the bound that error was held against.
        batch: batch size of the example inputs.
        batch_sizes: "any", or why only one batch size is captured.
        threads: the number of threads of the kernels; None for all cores.
        native: False where the native runtime is not there and the PyTorch reference runs instead.
        removed_channels: output channels that were constant and are gone.
        precision: that was asked for: "fp32", "bf16" or "int8".
        notes: sentences for the user, the most important first.
    """

    layers: list[LayerReport]
    native_share: float
    fallbacks: dict[str, str]
    sparsity: float
    bytes_before: int
    bytes_after: int
    max_error: float | None
    bound: float
    batch: int
    batch_sizes: str
    threads: int | None
    native: bool
    removed_channels: int = 0
    precision: str = "fp32"
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` is the inverse."""
        data = asdict(self)
        for layer in data["layers"]:
            layer["shape"] = list(layer["shape"])
        return data

    @staticmethod
    def from_json(data: Any) -> Report:
        """The report that `to_json` described; nothing about the data is trusted.

        Raises:
            FileFormatError: naming the field that is wrong.
        """
        from sparse_engine.io.plain import from_plain

        return from_plain(Report, data, "report")

    def __str__(self) -> str:
        rows = [("layer", "op", "output", "structure", "sparsity", "kernel", "ms", "dense ms", "reason")]
        rows.extend(
            (
                layer.name,
                layer.op,
                "×".join(map(str, layer.shape)),
                layer.structure or "",
                "" if layer.sparsity is None else f"{layer.sparsity:.1%}",
                layer.kernel,
                _milliseconds(layer.ms),
                _milliseconds(layer.dense_ms),
                layer.reason,
            )
            for layer in self.layers
        )
        lines = [_table(rows), ""]
        smaller = (
            f" ({self.bytes_before / self.bytes_after:.1f}× smaller)"
            if 0 < self.bytes_after < self.bytes_before
            else ""
        )
        lines.append(
            f"weights: {self.sparsity:.1%} zeros, {_bytes(self.bytes_before)} before, {_bytes(self.bytes_after)} "
            f"packed{smaller}"
        )
        lines.append(f"work: {self.native_share:.1%} of the dense FLOPs run natively")
        if self.removed_channels:
            lines.append(f"channels removed: {self.removed_channels}")
        lines.extend(f"fallback {name}: {reason}" for name, reason in self.fallbacks.items())
        if self.max_error is not None:
            lines.append(
                f"max error against the model: {self.max_error:.2e} of the output's scale (bound {self.bound:.0e})"
            )
        lines.append(f"batch sizes: {self.batch_sizes}")
        lines.extend(self.notes)
        return "\n".join(lines)


@dataclass(frozen=True)
class Timing:
    """Latencies of one contender, in milliseconds per call."""

    p10: float
    p50: float
    p90: float
    p99: float
    runs: int

    @staticmethod
    def of(milliseconds: Sequence[float]) -> Timing:
        """Quantiles of measured times."""
        ordered = sorted(milliseconds)
        pick = [ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.1, 0.5, 0.9, 0.99)]
        return Timing(*pick, len(ordered))


@dataclass(frozen=True)
class Benchmark:
    """An executable against the dense model, measured in turns in one run; prints as a table.

    Attributes:
        executable, dense: latencies.
        batch: samples per call.
        dense_name: what the dense contender is.
        threads: the executable's threads (None: all cores).
        dense_threads: PyTorch's threads.
    """

    executable: Timing
    dense: Timing
    batch: int
    dense_name: str
    threads: int | None
    dense_threads: int

    @property
    def speedup(self) -> float:
        """Dense median over the executable's median."""
        return self.dense.p50 / self.executable.p50

    def throughput(self, timing: Timing) -> float:
        """Samples per second at the median latency."""
        return self.batch / timing.p50 * 1e3

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **asdict(self),
            "speedup": self.speedup,
            "samples_per_second": {
                "executable": self.throughput(self.executable),
                "dense": self.throughput(self.dense),
            },
        }

    def __str__(self) -> str:
        rows = [("", "p10 ms", "p50 ms", "p90 ms", "p99 ms", "samples/s", "runs")]
        for name, timing in (("executable", self.executable), (self.dense_name, self.dense)):
            rows.append(
                (
                    name,
                    *(_milliseconds(value) for value in (timing.p10, timing.p50, timing.p90, timing.p99)),
                    f"{self.throughput(timing):.1f}",
                    str(timing.runs),
                )
            )
        return f"{_table(rows)}\nbatch {self.batch}: {self.speedup:.2f}× the dense model's speed"


# ---- helpers


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
