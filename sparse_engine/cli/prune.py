"""`sparse-engine prune`: remove weights of a model and save what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from sparse_engine.cli._common import (
    DebugOption,
    JsonOption,
    UsageError,
    check_writable,
    command,
    console,
    steps,
    table,
)
from sparse_engine.cli._models import ArgOption, CheckpointOption, ModelOption, build_model
from sparse_engine.errors import PruneError
from sparse_engine.io import write_checkpoint


@command(
    "prune",
    "prune --model resnet20 --checkpoint dense.pt --sparsity 0.9 -o pruned.safetensors",
    'prune --model vgg16_bn --sparsity 0.9 --structure "block(16, 1)" --ignore classifier.6',
    "prune --model resnet20 --checkpoint dense.pt --sparsity 0.95 --criterion snip --data digits",
)
def prune(
    model: ModelOption = None,
    checkpoint: CheckpointOption = None,
    arg: ArgOption = None,
    sparsity: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Fraction of the weights to remove.", show_default=False)
    ] = None,
    structure: Annotated[
        str, typer.Option(help='What is kept together: unstructured, "block(4, 1)", 2:4, "fan_in(8)" or channel.')
    ] = "unstructured",
    criterion: Annotated[
        str, typer.Option(help="Which weights go first: magnitude, random, snip, grasp, …")
    ] = "magnitude",
    scope: Annotated[str, typer.Option(help="global: one budget for all layers; layer: one for each.")] = "global",
    distribution: Annotated[
        str | None, typer.Option(help="How layers share the budget: uniform, erk or erk_kernel.", show_default=False)
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help='A layer to leave dense, or "re:PATTERN"; repeatable.', show_default=False),
    ] = None,
    keep_one: Annotated[bool, typer.Option("--keep-one", help="Never take the last weight of a layer.")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Data for criteria that need some: a folder, or digits.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write: .safetensors, .pt or .pth.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of criteria that draw random numbers.")] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> dict[str, Any]:
    """Prune a model in one shot, without training, and save its weights with exact zeros.

    Accuracy usually needs training afterwards; `sparse-engine train` prunes and trains in one run.
    """
    import sparse_engine as se

    target = output or Path(f"{checkpoint.stem if checkpoint else 'model'}-pruned.safetensors")
    check_writable(target)
    if target.suffix not in (".safetensors", ".pt", ".pth"):
        raise UsageError(f"{target}: the ending must be .safetensors, .pt or .pth")
    with steps(as_json) as step:
        step("building the model")
        network = build_model(model, arg, checkpoint)
        batches = None if data is None else _batches(data)
        step("choosing weights")
        try:
            report = se.prune(
                network,
                sparsity=sparsity,
                structure=structure,
                criterion=criterion,
                scope=scope,
                distribution=distribution,
                ignore=ignore or (),
                data=batches,
                keep_one=keep_one,
                seed=seed,
            )
        except PruneError as error:
            if batches is None and "needs data" in str(error):
                raise UsageError(
                    f"criterion {criterion!r} looks at data: give --data FOLDER, or --data digits"
                ) from None
            raise
        step("writing the file")
        se.squash_(network)
        write_checkpoint(target, network.state_dict())
    if not as_json:
        _print(report)
        console().print(f"Wrote [bold]{escape(str(target))}[/bold].")
    return {"output": str(target), "report": report.to_dict()}


def _batches(data: str) -> list[Any]:
    """A few hundred training samples: what the criteria that look at data use."""
    from sparse_engine.train import load_data

    train, _ = load_data(data)
    count = min(len(train), 512)
    return [train.batch(torch.arange(start, min(start + 64, count))) for start in range(0, count, 64)]


def _print(report: Any) -> None:
    screen = console()
    layers = table("Layers", "name", "shape", ">kept", ">of", ">sparsity")
    for layer in report.layers:
        shape = "×".join(map(str, layer.shape))
        layers.add_row(escape(layer.name), shape, f"{layer.kept:,}", f"{layer.total:,}", f"{layer.sparsity:.2%}")
    screen.print(layers)
    screen.print(f"{report.kept:,} of {report.total:,} weights kept ({report.sparsity:.2%} sparsity).")
    for note in report.notes:
        screen.print(escape(note))
