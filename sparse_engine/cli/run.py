"""`sparse-engine run`: call an executable on inputs from files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
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
    messages,
    table,
)
from sparse_engine.errors import FileFormatError, ShapeError
from sparse_engine.io import Container, atomic_write, read_torch_file, write_container


@command(
    "run",
    "run model.spx --input images.npy --output logits.npy",
    "run model.spx --random --batch 8 --json",
)
def run(
    file: Annotated[Path, typer.Argument(help="An executable (.spx).")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", help="An input: .npy, .npz, .pt or .safetensors; repeat for several inputs."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the outputs: .npy, .npz or .safetensors.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Use normally distributed inputs instead of files.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of --random inputs.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of --random inputs.")] = 0,
    top: Annotated[int, typer.Option(min=0, help="How many largest outputs of each sample to show.")] = 5,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> dict[str, Any]:
    """Run an executable on inputs from files, or on random ones; needs no model code."""
    import sparse_engine as se

    if bool(inputs) == random:
        raise UsageError("give inputs with --input FILE, or ask for --random ones")
    if output is not None:
        if output.suffix not in _WRITERS:
            raise UsageError(f"{output}: the ending must be one of {', '.join(_WRITERS)}")
        check_writable(output)
    executable = se.load(file, threads=threads)
    tensors = random_inputs(executable, batch, seed) if random else read_inputs(executable, inputs or [])
    start = time.perf_counter()
    results = flatten(executable(*tensors))
    elapsed = (time.perf_counter() - start) * 1e3
    if output is not None:
        _WRITERS[output.suffix](output, results)
    shown = [_describe(name, tensor, top) for name, tensor in results.items()]
    if not as_json:
        _print(shown, elapsed)
        if output is not None:
            console().print(f"Wrote [bold]{escape(str(output))}[/bold].")
    return {"outputs": shown, "first_call_ms": elapsed, "output_file": None if output is None else str(output)}


def random_inputs(executable: Any, batch: int, seed: int = 0) -> list[torch.Tensor]:
    """Inputs of the right shapes: normally distributed numbers, zeros where integers are wanted.

    Raises:
        ShapeError: the executable has one fixed batch size, and it is another.
    """
    generator = torch.Generator().manual_seed(seed)
    graph, made = executable.graph, []
    if not graph.dynamic and graph.fixed_batch is None and batch != 1:
        raise ShapeError("this executable takes inputs of one size only; leave --batch out")
    for name in graph.inputs:
        value = graph.values[name]
        shape = [item if isinstance(item, int) else item.at(batch) for item in value.shape]
        if graph.fixed_batch is not None:
            shape[0] = batch
        dtype = getattr(torch, value.dtype)
        floating = dtype.is_floating_point
        made.append(torch.randn(shape, generator=generator).to(dtype) if floating else torch.zeros(shape, dtype=dtype))
    return made


def read_inputs(executable: Any, paths: list[Path]) -> list[torch.Tensor]:
    """Inputs from files, in the executable's order; floating-point inputs are brought to the type it takes.

    Raises:
        UsageError: the files hold more or fewer arrays than the executable takes.
        FileFormatError: a file cannot be read.
    """
    graph = executable.graph
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        arrays = _read_arrays(path)
        # A file with one array is the next input whatever its name; one with several names them.
        if len(arrays) == 1:
            (array,) = arrays.values()
            arrays = {graph.inputs[len(found)] if len(found) < len(graph.inputs) else path.stem: array}
        found.update(arrays)
    if found.keys() != set(graph.inputs):
        wanted = ", ".join(f"{name}: {kind}" for name, kind in executable.inputs.items())
        raise UsageError(f"the files hold {', '.join(found)}; the executable takes {wanted}")
    tensors = []
    for name in graph.inputs:
        tensor, dtype = found[name], getattr(torch, graph.values[name].dtype)
        if tensor.dtype != dtype and tensor.is_floating_point() and dtype.is_floating_point:
            messages().print(f"note: input {name} is converted from {tensor.dtype} to {dtype}")
            tensor = tensor.to(dtype)
        tensors.append(tensor)
    return tensors


def flatten(result: Any, name: str = "output") -> dict[str, torch.Tensor]:
    """Name the tensors of a result: `output`, `output.0`, `output.logits`, …"""
    if isinstance(result, torch.Tensor):
        return {name: result}
    if isinstance(result, Mapping):
        parts: list[tuple[Any, Any]] = list(result.items())
    elif isinstance(result, list | tuple):
        parts = list(enumerate(result))
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, item in parts:
        found.update(flatten(item, f"{name}.{key}"))
    return found


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix in (".npy", ".npz"):
        try:
            loaded = numpy.load(path, allow_pickle=False)
            arrays = {"array": loaded} if isinstance(loaded, numpy.ndarray) else {name: loaded[name] for name in loaded}
            return {name: torch.from_numpy(numpy.ascontiguousarray(array)) for name, array in arrays.items()}
        except (ValueError, EOFError, TypeError, KeyError) as error:
            raise FileFormatError(f"{path}: cannot be read as numpy arrays ({error})") from None
    if path.suffix == ".safetensors":
        return Container(path).tensors()
    if path.suffix in (".pt", ".pth"):
        found = flatten(read_torch_file(path), "array")
        if not found:
            raise FileFormatError(f"{path}: holds no tensors")
        return {name.removeprefix("array.") or name: tensor for name, tensor in found.items()}
    raise UsageError(f"{path}: inputs are .npy, .npz, .pt or .safetensors files")


def _write_npy(path: Path, results: dict[str, torch.Tensor]) -> None:
    if len(results) != 1:
        raise UsageError(f"{path}: .npy holds one array but there are {len(results)} outputs; use .npz")
    (tensor,) = results.values()
    with atomic_write(path) as file:
        numpy.save(file, tensor.numpy(), allow_pickle=False)


def _write_npz(path: Path, results: dict[str, torch.Tensor]) -> None:
    with atomic_write(path) as file:
        numpy.savez(file, **{name: tensor.numpy() for name, tensor in results.items()})


_WRITERS = {".npy": _write_npy, ".npz": _write_npz, ".safetensors": write_container}


def _describe(name: str, tensor: torch.Tensor, top: int) -> dict[str, Any]:
    numbers = tensor.double()
    described: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]}
    if tensor.numel():
        described.update(min=numbers.min().item(), max=numbers.max().item(), mean=numbers.mean().item())
    if tensor.dim() == 2 and tensor.shape[1] > 1 and top:
        values, indices = numbers.topk(min(top, tensor.shape[1]))
        described["top"] = [
            [{"index": index, "value": value} for index, value in zip(row_indices, row_values, strict=True)]
            for row_indices, row_values in zip(indices.tolist(), values.tolist(), strict=True)
        ]
    return described


def _print(shown: list[dict[str, Any]], elapsed: float) -> None:
    screen = console()
    outputs = table("Outputs", "name", "shape", "type", ">min", ">mean", ">max")
    for output in shown:
        numbers = (f"{output[key]:.5g}" if key in output else "" for key in ("min", "mean", "max"))
        outputs.add_row(escape(output["name"]), "×".join(map(str, output["shape"])), output["dtype"], *numbers)
    screen.print(outputs)
    for output in shown:
        for sample, largest in enumerate(output.get("top", [])[:8]):
            listed = ", ".join(f"{entry['index']}: {entry['value']:.4g}" for entry in largest)
            screen.print(f"largest of sample {sample}: {listed}")
    screen.print(f"First call: {elapsed:.1f} ms (planning included; measure with `sparse-engine bench`).")
