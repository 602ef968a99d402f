"""`sparse-engine bench`: latency of an executable and of the dense model, measured in turns."""

from __future__ import annotations

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
    table,
)
from sparse_engine.cli._models import ArgOption, CheckpointOption, ModelOption, ShapeOption, build_model, example_inputs
from sparse_engine.cli._tables import milliseconds
from sparse_engine.cli.run import random_inputs
from sparse_engine.report.environment import busy_warning, machine_line
from sparse_engine.report.measure import profile_call
from sparse_engine.report.trace import write_trace


@command(
    "bench",
    "bench model.spx --batch 1 --batch 16",
    "bench model.spx --model resnet20 --checkpoint pruned.safetensors",
    "bench model.spx --trace trace.json",
)
def bench(
    file: Annotated[Path | None, typer.Argument(help="An executable (.spx); without it --model is converted.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", "-b", min=1, help="A batch size; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long to measure each batch size.")] = 3.0,
    model: ModelOption = None,
    checkpoint: CheckpointOption = None,
    arg: ArgOption = None,
    input_shape: ShapeOption = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write one profiled call as a trace for Perfetto or Chrome (.json).")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> dict[str, Any]:
    """Measure latency quantiles and throughput against the dense model, in turns, in one run.

    The dense contender is the model named with --model; without it, the graph in the file run by PyTorch.
    """
    import sparse_engine as se

    if file is None and model is None:
        raise UsageError("give an executable (.spx), or --model to convert one for the measurement")
    if trace is not None:
        check_writable(trace)
    batches, busy = batch or [1], busy_warning()
    results = []
    with steps(as_json) as step:
        network = None
        if model is not None:
            step("building the model")
            network = build_model(model, arg, checkpoint)
        if file is not None:
            step("loading the executable")
            executable = se.load(file, threads=threads)
        else:
            examples = example_inputs(str(model), input_shape, network)  # type: ignore[arg-type]
            executable = se.convert(network, tuple(examples), threads=threads, progress=step)
        for size in batches:
            step(f"measuring batch {size}")
            results.append(executable.benchmark(*random_inputs(executable, size), seconds=seconds, model=network))
        if trace is not None:
            step("profiling one call")
            profile = profile_call(executable, random_inputs(executable, batches[0]))
            write_trace(trace, profile.spans, title=f"{file or model}, batch {batches[0]}", wall_us=profile.wall_us)
    if not as_json:
        _print(results)
        if busy:
            console().print(f"[yellow]{escape(busy)}[/yellow]")
        if trace is not None:
            console().print(f"Wrote [bold]{escape(str(trace))}[/bold]; open it at ui.perfetto.dev or chrome://tracing.")
    return {
        "machine": machine_line(),
        "warning": busy or None,
        "results": [result.to_json() for result in results],
        "trace": None if trace is None else str(trace),
    }


def _print(results: list[Any]) -> None:
    screen = console()
    columns = (">p10 ms", ">p50 ms", ">p90 ms", ">p99 ms", ">samples/s", ">runs", ">speed-up")
    made = table("Latency per call, measured in turns", ">batch", "contender", *columns)
    for result in results:
        for name, timing in (("executable", result.executable), (result.dense_name, result.dense)):
            first = name == "executable"
            made.add_row(
                str(result.batch) if first else "",
                escape(name),
                *(milliseconds(value) for value in (timing.p10, timing.p50, timing.p90, timing.p99)),
                f"{result.throughput(timing):,.1f}",
                str(timing.runs),
                f"{result.speedup:.2f}×" if first else "",
            )
    screen.print(made)
    threads = results[0].threads
    screen.print(
        f"{machine_line()}; executable threads: {threads or 'all'}, PyTorch threads: {results[0].dense_threads}"
    )
