"""`sparse-engine report`: one self-contained HTML page about an executable, a checkpoint or a training run."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparse_engine.cli._common import (
    DebugOption,
    JsonOption,
    ThreadsOption,
    UsageError,
    check_writable,
    command,
    console,
    steps,
)
from sparse_engine.cli.run import random_inputs
from sparse_engine.errors import FileFormatError
from sparse_engine.io import atomic_write_text, is_spx
from sparse_engine.report.environment import busy_warning, machine_line
from sparse_engine.report.measure import measure_ceilings, measure_layers
from sparse_engine.report.page import PageData, render_page
from sparse_engine.report.sparsity import sparsity_of_file


@command(
    "report",
    "report model.spx -o report.html",
    "report model.spx --batch 1 --batch 16",
    "report pruned.safetensors",
    "report runs/epsd",
)
def report(
    source: Annotated[
        Path, typer.Argument(help="An executable (.spx), a checkpoint, or the folder of a training run.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page to write; by default beside the file or in the folder."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", "-b", min=1, help="A batch size; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long to measure each batch size.")] = 2.0,
    measure: Annotated[
        bool, typer.Option(help="Measure latency and layers; without it the page shows no times.")
    ] = True,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> dict[str, Any]:
    """Write a page with the per-layer table and plots: time by layer, sparsity, roofline; for a run its diagnostics."""
    target = output or (source / "report.html" if source.is_dir() else source.with_suffix(".html"))
    if target.suffix not in (".html", ".htm"):
        raise UsageError(f"{target}: the page's name must end in .html")
    check_writable(target)
    data = PageData(
        title=source.resolve().name,
        machine=machine_line(),
        warning=busy_warning() if measure else "",
        command=shlex.join(["sparse-engine", *sys.argv[1:]]),
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    with steps(as_json) as step:
        step("reading")
        executable_file = _add_source(data, source)
        if executable_file is not None:
            _add_executable(data, executable_file, batch or [1], seconds, measure, threads, step)
        step("drawing")
        atomic_write_text(target, render_page(data))
    if not as_json:
        console().print(f"Wrote [bold]{escape(str(target))}[/bold].")
    return {
        "output": str(target),
        "report": data.report,
        "sparsity": None if data.sparsity is None else data.sparsity.to_json(),
        "benchmarks": list(data.benchmarks),
        "summary": dict(data.summary),
    }


def _add_source(data: PageData, source: Path) -> Path | None:
    """Fill in what the source itself says; returns the executable to measure, if there is one."""
    if not source.is_dir():
        data.sparsity = sparsity_of_file(source)
        return source if is_spx(source) else None
    summary = source / "summary.json"
    if not summary.is_file():
        raise FileFormatError(f"{source}: is not the folder of a training run (it has no summary.json)")
    data.summary = _read_json(summary, dict)
    log = source / "log.json"
    data.training = _read_json(log, list) if log.is_file() else []
    diagnostics = source / "diagnostics.json"
    data.diagnostics = _read_json(diagnostics, dict) if diagnostics.is_file() else {}
    executables = sorted(source.glob("*.spx"))
    weights = sorted([*source.glob("*.safetensors")])
    if executables:
        data.sparsity = sparsity_of_file(executables[0])
        return executables[0]
    if weights:
        data.sparsity = sparsity_of_file(weights[0])
    return None


def _add_executable(
    data: PageData,
    file: Path,
    batches: list[int],
    seconds: float,
    measure: bool,
    threads: int | None,
    step: Callable[[str], None],
) -> None:
    import sparse_engine as se

    executable = se.load(file, threads=threads)
    data.file_bytes = file.stat().st_size
    data.report = executable.report.to_json()
    if not measure:
        return
    results = []
    for size in batches:
        step(f"measuring batch {size}")
        results.append(executable.benchmark(*random_inputs(executable, size), seconds=seconds).to_json())
    data.benchmarks = results
    if executable.native:
        step("measuring layers")
        data.layers_batch = batches[0]
        data.layers = measure_layers(executable, random_inputs(executable, batches[0]))
        step("measuring ceilings")
        data.ceilings = measure_ceilings(threads=executable.threads)


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(content, kind):
        raise FileFormatError(f"{path}: holds a {type(content).__name__}, a {kind.__name__} was expected")
    return content
