"""Channel pruning in executables: a compacted network against its dense one, and layers that keep lists of channels.

    python -m bench.structured networks        half of every group's channels gone, compacted
    python -m bench.structured lists           a convolution of which half the inputs or outputs are zero
    python -m bench.structured training        the same in training: output and both gradients
    python -m bench.structured graph           the analysis of a network of 2,000 operators

Write bench/results/structured.json, structured_lists.json, structured_training.json and structured_graph.json;
without a word, the first three.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

import sparse_engine as se
from bench import results_io
from bench.engines import contenders, disturbed, take_turns
from bench.networks import IMAGE, pruned_network
from bench.rows import merged
from sparse_engine.convert.choose import _TILES, _bench_plan, _time_interleaved
from sparse_engine.convert.lower import PANEL_VECTORS, LinearChoice, LinearProblem, default_row_block
from sparse_engine.nn import SparseConv2d
from sparse_engine.ops import native
from sparse_engine.prune.structured import analyse, capture, channel_scores, find_groups, zero_units_
from sparse_engine.prune.structured.compaction import adaptable

WORK = results_io.RESULTS.parent.parent / "build" / "bench" / "structured"
NETWORKS = ("resnet50", "resnet18", "mobilenet_v2")

# Runs where this project cannot be imported: what a compacted model needs is its own code and PyTorch.
PLAIN = """
import sys
sys.modules["sparse_engine"] = None
import torch
program = torch.export.load(sys.argv[1]).module()
x, y = torch.load(sys.argv[2])
with torch.no_grad():
    print(float((program(x) - y).abs().max() / y.abs().max()))
"""


def halve_(model: nn.Module, x: torch.Tensor) -> None:
    """Zero the half of every group's channels that has the smaller filters."""
    analysis = analyse(capture(model, x))
    groups, _, _ = adaptable(analysis, model, find_groups(analysis), x)
    gone = []
    for values in channel_scores(model, groups, "l1"):
        vector = numpy.zeros(len(values), dtype=bool)
        vector[torch.argsort(values, stable=True)[: len(values) // 2].numpy()] = True
        gone.append(vector)
    zero_units_(model, groups, gone)


@torch.no_grad()
def run_networks(names: list[str], batches: list[int], threads: int, rounds: int, keep: bool) -> None:
    """Dense and compacted network, each as an executable and in PyTorch, in turns."""
    WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names:
        for batch in batches:
            facts, files = _prepared(name, batch, threads, keep)
            wanted = {
                label: ("torch" if label.endswith("torch") else "sparse_engine", file, sys.executable)
                for label, file in files.items()
            }
            with contenders(wanted, batch=batch, threads=threads) as ready:
                times = take_turns(ready, rounds=rounds)
            if said := disturbed(times):
                print(f"{name}, batch {batch}: left out, the machine is busy ({said})")
                continue
            ms = {label: summary["median_ms"] for label, summary in times.items()}
            rows.append({
                "network": name, "batch": batch, "threads": threads,
                "parameters_left_%": facts["parameters_left_%"], "flops_left_%": facts["flops_left_%"],
                "dense_ms": ms["dense"], "compact_ms": ms["compact"], "speed_up": ms["dense"] / ms["compact"],
                "dense_torch_ms": ms["dense_torch"], "compact_torch_ms": ms["compact_torch"],
                "speed_up_torch": ms["dense_torch"] / ms["compact_torch"],
                "difference_executable": facts["difference_executable"],
                "difference_plain_torch": facts["difference_plain_torch"],
            })  # fmt: skip
            print(rows[-1], flush=True)
    if rows:
        results_io.write(
            "structured",
            rows=merged("structured", rows, ["network", "batch", "threads"]),
            claim="Half of every group's channels removed: the compacted network against the dense one, fp32.",
            notes=(
                "Random weights; dense and compacted run as executables and in PyTorch (channels last), each in a "
                "process of its own, in turns; ms per call. Differences are from the masked model's outputs, relative "
                "to their scale; the one in plain PyTorch is measured where this project cannot be imported."
            ),
        )


def _prepared(name: str, batch: int, threads: int, keep: bool) -> tuple[dict[str, Any], dict[str, Path]]:
    """What is known of a network and its four files; with `keep`, files of an earlier call are not made again."""
    x = torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(0))
    made = f"{name}_{batch}_{threads}"
    files = {"dense": WORK / f"{made}_dense.spx", "dense_torch": WORK / f"{name}_dense.pt2"}
    files |= {"compact": WORK / f"{made}_compact.spx", "compact_torch": WORK / f"{name}_compact.pt2"}
    known = WORK / f"{made}.json"

    def missing(label: str) -> bool:
        return not (keep and files[label].exists())

    if missing("dense_torch"):
        _export(pruned_network(name, sparsity=0), files["dense_torch"])
    if missing("dense"):
        se.convert(pruned_network(name, sparsity=0), (inputs,), threads=threads).save(files["dense"])
    if missing("compact_torch") or missing("compact") or not (keep and known.exists()):
        model = pruned_network(name, sparsity=0)
        dense_parameters = sum(parameter.numel() for parameter in model.parameters())
        halve_(model, x)
        masked = model(x)
        small = se.compact(model, x).eval()
        _export(small, files["compact_torch"])
        torch.save((x, masked), WORK / f"{name}_outputs.pt")
        executable = se.convert(small, (inputs,), threads=threads)
        executable.save(files["compact"])
        difference = float((executable(x) - masked).abs().max() / masked.abs().max()) if batch == 1 else None
        facts = {
            "parameters_left_%": 100 * sum(p.numel() for p in small.parameters()) / dense_parameters,
            "flops_left_%": 100 * _flops(small, x) / _flops(model, x),
            "difference_executable": difference,
            "difference_plain_torch": _in_plain_pytorch(files["compact_torch"], WORK / f"{name}_outputs.pt"),
        }
        known.write_text(json.dumps(facts))
    return json.loads(known.read_text()), files


def _export(model: nn.Module, path: Path) -> None:
    """Save a program for PyTorch alone, for any batch size."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.export.save(torch.export.export(model, (torch.zeros(2, *IMAGE),), dynamic_shapes=({0: batch},)), path)


def _in_plain_pytorch(program: Path, outputs: Path) -> float:
    """The largest difference of a saved program's outputs, in a process without this project."""
    done = subprocess.run([sys.executable, "-c", PLAIN, str(program), str(outputs)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the compacted network does not run in plain PyTorch: {done.stderr.strip()[-500:]}")
    return float(done.stdout)


def _flops(model: nn.Module, x: torch.Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


# ---- lists of channels

# rows, columns, kernel side, pixels along a side: layers of ResNet-18 and -50 that end in a residual sum, or begin one
LAYERS = (
    (64, 64, 3, 56),
    (128, 128, 3, 28),
    (256, 256, 3, 14),
    (256, 64, 1, 56),
    (1024, 256, 1, 14),
    (256, 1024, 1, 14),
)
_LISTS = tuple(("sparse", panel) for panel in (8, 4))
_DENSE = tuple(("dense", panel) for panel in (8, 4))


def run_lists(threads: int, repeats: int) -> None:
    """Half of the inputs or of the outputs gone: cut out, in lists, and in lists whose rows lie in no order."""
    rows = []
    random = numpy.random.default_rng(0)
    for m, c, k, side in LAYERS:
        weight = random.standard_normal((m, c, k * k)).astype("float32")
        inputs, outputs = random.permutation(c)[: c // 2], random.permutation(m)[: m // 2]
        some_inputs, some_outputs, together = (numpy.zeros_like(weight) for _ in range(3))
        some_inputs[:, inputs] = weight[:, inputs]
        some_outputs[outputs] = weight[outputs]
        together[: m // 2] = weight[outputs]
        cases = {
            "dense_us": (weight, _DENSE),
            "inputs_cut_us": (weight[:, inputs], _DENSE),
            "inputs_listed_us": (some_inputs, _LISTS),
            "outputs_cut_us": (weight[outputs], _DENSE),
            "outputs_listed_us": (together, _LISTS),
            "outputs_unordered_us": (some_outputs, (*_LISTS, ("sparse", 2), ("sparse", 1))),
        }
        plans = []
        for label, (values, kernels) in cases.items():
            problem = _problem(values, k, side)
            plans += [
                (label, _bench_plan(problem, choice, residual=False)) for choice in _choices(problem, kernels, threads)
            ]
        times: dict[str, list[float]] = {label: [] for label in cases}
        for _ in range(repeats):
            seconds = _time_interleaved([plan for _, plan in plans], threads)
            for label in cases:
                times[label].append(min(s for (own, _), s in zip(plans, seconds, strict=True) if own == label))
        best = {label: float(numpy.median(values)) * 1e6 for label, values in times.items()}
        rows.append({
            "outputs": m, "inputs": c, "kernel": f"{k}×{k}", "pixels": f"{side}×{side}", "threads": threads, **best,
            "inputs_listed_vs_cut": best["inputs_listed_us"] / best["inputs_cut_us"],
            "outputs_listed_vs_cut": best["outputs_listed_us"] / best["outputs_cut_us"],
        })  # fmt: skip
        print(rows[-1], flush=True)
    results_io.write(
        "structured_lists",
        rows=rows,
        claim="A convolution with half of its inputs or outputs zero: cut out, or left in place and listed.",
        notes=(
            "Best kernel of each kind, in turns, batch 1. Cut: a smaller dense convolution. Listed: panels of 4 or 8 "
            "rows that read the kept inputs by index; outputs listed: kept rows lie together, as the pass "
            "order_channels arranges it, and the zero rows (which a residual sum needs) pass bias and residual on; "
            "unordered: the same zero rows where they were."
        ),
    )


def run_training(seconds: float) -> None:
    """A training step (output and all gradients) of a layer whose pruned channels stay, against the dense one."""
    torch.set_num_threads(1)
    native.extension().set_num_threads(1)
    rows = []
    for m, c, k, side in LAYERS:
        for label, part_out, part_in in (("both", 0.5, 0.5), ("inputs", 1.0, 0.5), ("outputs", 0.5, 1.0)):
            torch.manual_seed(0)
            dense = nn.Conv2d(c, m, k, padding=k // 2)
            outputs = torch.randperm(m)[: round(m * part_out)].sort().values
            inputs = torch.randperm(c)[: round(c * part_in)].sort().values
            mask = torch.zeros(dense.weight.shape, dtype=torch.bool)
            mask[outputs[:, None], inputs[None]] = True
            listed = SparseConv2d.from_dense(dense, mask, "channel")
            in_place = SparseConv2d.from_dense(dense, mask, "channel")
            x = torch.randn(16, c, side, side)
            upstream = torch.randn(16, m, side, side)
            for layer in (listed, in_place):
                _step(layer, x, upstream)()
            moved = listed._lists is not None
            in_place._lists = None  # made with the kernels, in the first call
            contenders = {
                "dense": _step(dense, x, upstream),
                "listed": _step(listed, x, upstream),
                "in_place": _step(in_place, x, upstream),
            }
            times = results_io.interleaved(contenders, seconds=seconds, warmup=1)
            ms = {name: times[name]["median_ms"] for name in contenders}
            rows.append({
                "outputs": m, "inputs": c, "kernel": f"{k}×{k}", "pixels": f"{side}×{side}", "batch": 16,
                "halved": label, "dense_ms": ms["dense"], "listed_ms": ms["listed"], "in_place_ms": ms["in_place"],
                "way": "copied" if moved else "in place", "speed_up": ms["dense"] / ms["listed"], "threads": 1,
            })  # fmt: skip
            print(rows[-1], flush=True)
    results_io.write(
        "structured_training",
        rows=rows,
        claim="A training step of a convolution with half of its inputs, outputs or both zero and left in place.",
        notes=(
            "Batch 16, one thread, in turns; ms of output and all gradients. Listed: SparseConv2d, structure channel; "
            "way: kept channels are copied to a smaller dense convolution, or the sparse kernels read them in place, "
            "which is timed for all layers under in place."
        ),
    )


def _step(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x.clone().requires_grad_()).backward(upstream)

    return run


class _Residual(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def run_graph(blocks: int) -> None:
    """Time the parts of compaction on a residual network of 7 operators a block; processor time."""
    torch.manual_seed(0)
    layers = [_Residual(8, 6) for _ in range(blocks)]
    model, x = nn.Sequential(nn.Conv2d(2, 8, 1), *layers, nn.Conv2d(8, 2, 1)).eval(), torch.randn(1, 2, 4, 4)
    for layer in layers:
        layer.body[0].weight.data[:3] = 0
    row: dict[str, Any] = {"blocks": blocks}
    times = [time.process_time()]
    program = capture(model, x)
    times.append(time.process_time())
    analysis = analyse(program)
    times.append(time.process_time())
    groups = find_groups(analysis)
    times.append(time.process_time())
    small = se.compact(model, x)
    times.append(time.process_time())
    spent = [after - before for before, after in itertools.pairwise(times)]
    row |= {"operators": len(program.nodes), "groups": len(groups)}
    row |= dict(zip(("export_s", "analysis_s", "groups_s", "compact_s"), spent, strict=True))
    row["parameters_left_%"] = (
        100 * sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    )
    print(row)
    results_io.write(
        "structured_graph",
        rows=[row],
        claim="Dependency analysis of a network of 2,000 operators takes less than 10 seconds.",
        notes="Processor time. Compaction contains all of it: torch.export, analysis, building and verifying.",
    )


def _problem(weight: numpy.ndarray, kernel: int, side: int) -> LinearProblem:
    geometry: dict[str, Any] = {
        "n": 1, "c": weight.shape[1], "h": side, "w": side, "r": kernel, "s": kernel, "stride": (1, 1),
        "padding": (kernel // 2,) * 4, "dilation": (1, 1),
    }  # fmt: skip
    matrix = numpy.ascontiguousarray(weight.reshape(weight.shape[0], -1))
    return LinearProblem("layer", matrix, weight.shape[0], 1, geometry, side * side)


def _choices(problem: LinearProblem, kernels: Any, threads: int) -> list[LinearChoice]:
    found = []
    for kernel, panel in kernels:
        for vectors, part in _TILES[panel] if kernel == "sparse" else ((PANEL_VECTORS[panel], 256),):
            choice = LinearChoice(kernel, panel, part, 0, vectors)
            choice.row_block = default_row_block(problem, choice, threads)
            found.append(choice)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("networks", "lists", "training", "graph"))
    parser.add_argument("--quick", action="store_true", help="ResNet-50 at batch 1 only, fewer rounds")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="networks: take the files of an earlier, interrupted call")
    options = parser.parse_args()
    if options.part in (None, "networks"):
        names, batches = (["resnet50"], [1]) if options.quick else (options.network, options.batch)
        run_networks(names, batches, options.threads, 3 if options.quick else 7, options.keep)
    if options.part in (None, "lists"):
        run_lists(options.threads, 1 if options.quick else 3)
    if options.part in (None, "training"):
        run_training(0.5 if options.quick else 2.0)
    if options.part == "graph":
        run_graph(285)


if __name__ == "__main__":
    main()
