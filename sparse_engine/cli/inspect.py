"""`sparse-engine inspect`: sparsity by layer, the structure found, and what packing saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparse_engine.cli._common import DebugOption, JsonOption, UsageError, command, console, progress, size, table
from sparse_engine.cli._models import ArgOption, CheckpointOption, ModelOption, build_model
from sparse_engine.io import resolve_masks
from sparse_engine.report.sparsity import SparsityReport, sparsity_of_file, sparsity_of_state


@command(
    "inspect",
    "inspect pruned.safetensors",
    "inspect model.spx --json",
    "inspect --model resnet20 --checkpoint pruned.pt",
)
def inspect(
    file: Annotated[
        Path | None, typer.Argument(help="A checkpoint (.pt, .safetensors) or an executable (.spx).")
    ] = None,
    model: ModelOption = None,
    arg: ArgOption = None,
    checkpoint: CheckpointOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> dict[str, Any]:
    """Show the sparsity of each weight, the structure its zeros form, its packed size and predicted speed-up."""
    if (file is None) == (model is None):
        raise UsageError("give either a file, or --model (with --checkpoint for its weights)")
    if file is not None and (checkpoint is not None or arg):
        raise UsageError("--checkpoint and --arg belong to --model; a file is inspected as it is")
    with progress("measuring zeros", as_json) as advance:
        if file is not None:
            report = sparsity_of_file(file, advance)
        else:
            state = build_model(model, arg, checkpoint).state_dict()
            report = sparsity_of_state(resolve_masks(state), advance)
    if not as_json:
        _print(report)
    return report.to_json()


def _print(report: SparsityReport) -> None:
    screen = console()
    layers = table("Weights", "name", "shape", ">sparsity", "structure", ">empty", ">dense", ">packed", ">predicted")
    for layer in report.layers:
        empty = [f"{layer.empty_rows} out"] * (layer.empty_rows > 0) + [f"{layer.empty_inputs} in"] * (
            layer.empty_inputs > 0
        )
        layers.add_row(
            escape(layer.name),
            "×".join(map(str, layer.shape)),
            f"{100 * layer.sparsity:.2f} %",
            layer.structure,
            ", ".join(empty),
            size(layer.dense_bytes),
            size(layer.packed_bytes),
            f"{layer.predicted_speedup:.1f}×" if layer.predicted_speedup else "",
        )
    screen.print(layers)
    screen.print(
        f"{report.zeros:,} of {report.weights:,} weights are zero ({100 * report.sparsity:.2f} %), "
        f"in {report.sparse_layers} of {len(report.layers)} layers."
    )
    if any(layer.predicted_speedup for layer in report.layers):
        screen.print(
            "Predicted: speed-up over the dense kernel, by the cost model, for many pixels or tokens per call."
        )
    screen.print(f"Size: {size(report.dense_bytes)} dense, {size(report.packed_bytes)} packed.")
    if not report.zeros:
        screen.print(
            "Nothing is pruned: converting it gives no speed-up. Prune it first, e.g. with `sparse-engine prune`."
        )
