"""Engines in processes and environments of their own, timed in turns.

Example:
    >>> with contenders({"ours": ("sparse_engine", "model.spx", sys.executable)}, batch=1) as ready:   # doctest: +SKIP
    ...     take_turns(ready, rounds=5)
    {'ours': {'median_ms': 3.1, 'best_ms': 3.0, 'rounds': 5}}
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "engine_worker.py"
PACKAGES = ("deepsparse==1.8.0", "onnxruntime", "openvino")
PEERS = ("onnxruntime", "openvino", "deepsparse")


class EngineFailure(RuntimeError):
    """An engine that could not load or run a model, with the end of what it said."""


def make_environment(folder: Path) -> Path:
    """Create (once) a virtual environment that holds the other engines; returns its interpreter.

    DeepSparse's licence allows evaluation only: it is measured here, and nothing depends on it.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    done = folder / ".engines-installed"
    if not done.exists():
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        done.touch()
    return python


class Contender:
    """One engine with one model, in a process that sleeps (stopped by a signal) unless it is its turn."""

    def __init__(
        self,
        engine: str,
        model: Path,
        python: str | Path,
        *,
        batch: int,
        threads: int,
        shape: Sequence[int] = (3, 224, 224),
        output: Path | None = None,
    ) -> None:
        self.engine = engine
        command = [str(python), str(WORKER), engine, str(model), "--batch", str(batch), "--threads", str(threads)]
        command += ["--shape", *map(str, shape)]
        if output is not None:
            command += ["--output", str(output)]
        self._log = model.with_name(f"{model.stem}.{engine}.log")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.version = self._answer()["version"]
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, seconds: float, calls: int, warm: float = 0.0) -> list[float]:
        """Latencies in milliseconds of at least `calls` calls, for about `seconds`; before, untimed ones for `warm`."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"seconds": seconds, "calls": calls, "warm": warm}) + "\n")
        self._process.stdin.flush()
        times = self._answer()["ms"]
        self._process.send_signal(signal.SIGSTOP)
        return times

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = self._log.read_text().strip().splitlines()[-3:]
            raise EngineFailure(f"{self.engine} stopped with code {self._process.returncode}: {' / '.join(said)}")
        return json.loads(line)


@contextlib.contextmanager
def contenders(
    wanted: Mapping[str, tuple[str, Path, str | Path]], *, batch: int, threads: int = 2, **options: Any
) -> Iterator[dict[str, Contender]]:
    """Start engines, wait until each has loaded its model, end them afterwards; those that fail are named, left out.

    Args:
        wanted: label -> (engine, model file, interpreter).
        batch: images per call.
        threads: of each engine.
        options: for `Contender`; ``outputs`` is a folder that gets each engine's output as LABEL.npy.
    """
    ready: dict[str, Contender] = {}
    outputs = options.pop("outputs", None)
    try:
        for label, (engine, model, python) in wanted.items():
            output = None if outputs is None else Path(outputs) / f"{label}.npy"
            try:
                ready[label] = Contender(engine, model, python, batch=batch, threads=threads, output=output, **options)
            except EngineFailure as failure:
                print(f"left out: {failure}", file=sys.stderr)
        yield ready
    finally:
        for contender in ready.values():
            contender.close()


def take_turns(
    ready: Mapping[str, Contender], *, rounds: int = 5, seconds: float = 0.3, calls: int = 3, warm: float = 0.1
) -> dict[str, dict[str, float]]:
    """Time the contenders in turns.

    Returns:
        label -> ``median_ms`` (the median over the rounds of each round's median), ``best_ms`` (the best round's
        median) and ``rounds``.
    """
    return summarised([one_round(ready, seconds=seconds, calls=calls, warm=warm) for _ in range(rounds)])


def one_round(ready: Mapping[str, Contender], *, seconds: float, calls: int, warm: float) -> dict[str, float]:
    """One turn of each contender: label -> median ms of its calls."""
    return {label: statistics.median(contender.turn(seconds, calls, warm)) for label, contender in ready.items()}


def summarised(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Rounds as `one_round` returns them, summed up as `take_turns` says."""
    values = {label: [found[label] for found in rounds] for label in rounds[0]}
    return {
        label: {"median_ms": statistics.median(ms), "best_ms": min(ms), "rounds": len(ms)}
        for label, ms in values.items()
    }


def disturbed(times: Mapping[str, Mapping[str, float]], most: float = 1.4) -> str | None:
    """Say which contenders' rounds differ so much that other work must have been in the way; None when all are steady.

    Example:
        >>> disturbed({"ours": {"median_ms": 1.0, "best_ms": 0.9}, "other": {"median_ms": 9.0, "best_ms": 3.0}})
        'other: median 9.0 ms, best round 3.0 ms'

    Args:
        times: what `take_turns` returns.
        most: the largest accepted ratio of a contender's median to its best round.
    """
    uneven = [
        f"{label}: median {summary['median_ms']:.1f} ms, best round {summary['best_ms']:.1f} ms"
        for label, summary in times.items()
        if summary["median_ms"] > most * summary["best_ms"]
    ]
    return "; ".join(uneven) or None
