"""`sparse-engine convert`: from a pruned model to an executable file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import nn

from sparse_engine.cli._common import (
    DebugOption,
    JsonOption,
    ThreadsOption,
    UsageError,
    check_writable,
    command,
    console,
    size,
    steps,
)
from sparse_engine.cli._models import (
    ArgOption,
    CheckpointOption,
    ModelOption,
    ShapeOption,
    build_model,
    example_inputs,
)
from sparse_engine.cli._tables import layer_table


@command(
    "convert",
    "convert --model resnet20 --checkpoint pruned.safetensors -o model.spx",
    "convert --model torchvision:resnet50 --checkpoint pruned.pt --input-shape 1,3,224,224",
    "convert --model my_package.models:build --arg width=64 --input-shape 1,128",
)
def convert(
    model: ModelOption = None,
    checkpoint: CheckpointOption = None,
    arg: ArgOption = None,
    input_shape: ShapeOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write; by default named after the checkpoint or model."),
    ] = None,
    threads: ThreadsOption = None,
    tune: Annotated[
        bool, typer.Option(help="Time the candidate kernels of each layer; otherwise a cost model chooses.")
    ] = True,
    verify: Annotated[bool, typer.Option(help="Compare the outputs with the model's before writing anything.")] = True,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or int8 (the latter: weights of linear layers), where that is faster.")
    ] = "fp32",
    bound: Annotated[
        float | None,
        typer.Option(help="Largest accepted error, as a share of the output's scale; 1e-4, bf16 2e-2, int8 5e-2."),
    ] = None,
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="Convert although next to nothing is pruned.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> dict[str, Any]:
    """Turn a pruned model into an executable (.spx) that runs without the model's code."""
    import sparse_engine as se

    target = output or default_output(model, checkpoint)
    check_writable(target)
    with steps(as_json) as step:
        step("building the model")
        network = build_model(model, arg, checkpoint)
        examples = example_inputs(str(model), input_shape, network)
        check_runs(network, examples)
        if not allow_dense:
            refuse_dense(network, checkpoint)
        executable = se.convert(
            network,
            tuple(examples),
            precision=precision,
            threads=threads,
            tune=tune,
            verify=verify,
            bound=bound,
            progress=step,
        )
        step("writing the file")
        sizes = executable.save(target)
    report = executable.report
    if not as_json:
        screen = console()
        screen.print(layer_table(report))
        summarise(report)
        screen.print(f"Wrote [bold]{escape(str(target))}[/bold], {size(sizes.file_bytes)}.")
    return {"output": str(target), "file_bytes": sizes.file_bytes, "report": report.to_json()}


def summarise(report: Any) -> None:
    """Print what a conversion report says beside its table."""
    screen = console()
    smaller = f" ({report.bytes_before / report.bytes_after:.1f}× smaller)" if report.bytes_after else ""
    screen.print(
        f"Weights: {report.sparsity:.1%} zeros; {size(report.bytes_before)} before, "
        f"{size(report.bytes_after)} packed{smaller}."
    )
    screen.print(f"Work: {report.native_share:.1%} of the dense FLOPs run in native kernels.")
    if report.removed_channels:
        screen.print(f"Channels removed: {report.removed_channels}.")
    for name, reason in report.fallbacks.items():
        screen.print(f"Through PyTorch: {escape(name)}: {escape(reason)}")
    if report.max_error is not None:
        screen.print(
            f"Largest error against the model: {report.max_error:.1e} of the output's scale (bound {report.bound:.0e})."
        )
    screen.print(f"Batch sizes: {escape(report.batch_sizes)}.")
    for note in report.notes:
        screen.print(f"[yellow]{escape(note)}[/yellow]")


def default_output(model: str | None, checkpoint: Path | None) -> Path:
    """`pruned.pt` -> `pruned.spx`; `torchvision:resnet50` -> `resnet50.spx`."""
    stem = checkpoint.stem if checkpoint is not None else str(model).rpartition(":")[2].rpartition(".")[2]
    return Path(f"{stem or 'model'}.spx")


def check_runs(model: nn.Module, examples: list[torch.Tensor]) -> None:
    """Run the model once as it is, so that a wrong input shape is not reported as a failed capture.

    Raises:
        UsageError: with the shapes given and the model's own complaint.
    """
    try:
        with torch.no_grad():
            model(*examples)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        shapes = ", ".join("×".join(map(str, example.shape)) for example in examples)
        complaint = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"the model itself fails on inputs of shape {shapes}: {complaint}. Give the right shape, batch first, "
            "with --input-shape; repeat it for several inputs"
        ) from error


def refuse_dense(model: nn.Module, checkpoint: Path | None) -> None:
    """Stop before any long work when there is nothing to gain.

    Raises:
        UsageError: fewer than one weight in a hundred is zero.
    """
    from sparse_engine.io import resolve_masks

    weights = [tensor for tensor in resolve_masks(model.state_dict()).values() if tensor.dim() >= 2]
    total = sum(weight.numel() for weight in weights)
    zeros = total - sum(int(torch.count_nonzero(weight)) for weight in weights)
    if total and zeros < 0.01 * total:
        remedy = (
            "Prune it first (sparse-engine prune --sparsity 0.9 …), or convert it as it is with --allow-dense"
            if checkpoint is not None
            else "Give its pruned weights with --checkpoint, prune it with `sparse-engine prune`, or pass --allow-dense"
        )
        raise UsageError(f"the model is dense: {zeros:,} of its {total:,} weights are zero. {remedy}")
