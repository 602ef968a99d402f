"""What a run leaves behind: a table of epochs (CSV and JSON), TensorBoard events where installed, plots, a progress
line."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from sparse_engine.io.atomic import atomic_write_text


class RunLog:
    """Rows of a run, one per epoch, rewritten whole (atomically) after each.

    Example::

        log = RunLog(folder)
        log.add({"phase": "train", "epoch": 1, "loss": 0.3})
    """

    def __init__(self, folder: Path | None, rows: list[dict[str, Any]] | None = None) -> None:
        self.folder = folder
        self.rows = list(rows or [])
        self.events = _events(folder)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the files."""
        self.rows.append(row)
        if self.folder is not None:
            self.write()
        if self.events is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    self.events.add_scalar(f"{row.get('phase', 'run')}/{key}", value, int(row.get("epoch", 0)))
            self.events.flush()

    def write(self) -> None:
        """``log.csv`` and ``log.json`` in the run's folder."""
        if self.folder is None or not self.rows:
            return
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write_text(self.folder / "log.csv", text.getvalue())
        atomic_write_text(self.folder / "log.json", json.dumps(self.rows, indent=1) + "\n")


class Progress:
    """A progress bar with the time left on a terminal, one line per epoch elsewhere, nothing when switched off."""

    def __init__(self, enabled: bool | None) -> None:
        self.terminal = sys.stderr.isatty() if enabled is None else enabled and sys.stderr.isatty()
        self.lines = enabled if enabled is not None else True
        self.bar: Any = None
        self.task: Any = None
        self.began = time.monotonic()

    def start(self, name: str, steps: int) -> None:
        """A phase begins."""
        self.stop()
        if self.terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), transient=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(name, total=steps, note="")

    def advance(self, loss: float) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update(self.task, advance=1, note=f"loss {loss:.3f}")

    def skip(self, steps: int) -> None:
        """Steps that an earlier run did."""
        if self.bar is not None:
            self.bar.update(self.task, advance=steps)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        elif self.lines:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """The phase is over."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def plot_run(rows: list[dict[str, Any]], densities: dict[str, float], folder: Path) -> list[Path]:
    """Loss and accuracy over the run, and density by layer, as PNG files; nothing where matplotlib is missing.

    Returns:
        The files written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return []
    written = []
    rows = [row for row in rows if "loss" in row]
    if rows:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
        x = list(range(1, len(rows) + 1))
        left.plot(x, [row["loss"] for row in rows], color="tab:blue")
        left.set(xlabel="epoch of the run", ylabel="training loss")
        right.plot(x, [row["train_accuracy"] for row in rows], label="training", color="tab:blue")
        tested = [
            (i, row["test_accuracy"]) for i, row in zip(x, rows, strict=True) if row.get("test_accuracy") is not None
        ]
        right.plot([i for i, _ in tested], [value for _, value in tested], label="test", color="tab:orange")
        right.set(xlabel="epoch of the run", ylabel="accuracy")
        right.legend()
        for i in range(1, len(rows)):
            if rows[i]["phase"] != rows[i - 1]["phase"]:
                for axis in (left, right):
                    axis.axvline(i + 0.5, color="0.7", linewidth=0.8)
        written.append(folder / "curves.png")
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    if densities:
        from .diagnostics import plot_density

        written.append(plot_density(densities, folder / "density.png"))
    return written


def _events(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
