"""Training: whole steps with sparse layers against dense training under a mask, and distillation losses.

    python -m bench.training steps      forward + backward + optimiser: VGG-16, ResNet-18 on 32x32, batch 128; an MLP
    python -m bench.training losses     knowledge distillation, forward + backward, against eager PyTorch

Write bench/results/training_steps.json and losses.json.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparse_engine as se
from bench import results_io
from bench.networks import magnitude_mask
from bench.rows import merged
from sparse_engine.distill import dlb_loss, kd_loss, kd_loss_into_table
from sparse_engine.report.measure import Ceilings, measure_ceilings
from sparse_engine.train import keep_freed_memory
from sparse_engine.train.models import build

NETWORKS = {"vgg16_cifar": (3, 32, 32), "resnet18_cifar": (3, 32, 32), "mlp": (784,)}
SPARSITIES = (0.9, 0.98, 0.995)
STEPS_PER_TURN = 20  # of networks whose step takes milliseconds
LOSS_SHAPES = ((256, 1000), (1024, 1000), (512, 32000))


def masked_network(name: str, sparsity: float) -> tuple[nn.Module, dict[nn.Parameter, Tensor]]:
    """A network with all weights but the first convolution's pruned by magnitude, and the masks."""
    torch.manual_seed(0)
    model = build(name)
    masks: dict[nn.Parameter, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers[1:] if isinstance(layers[0], nn.Conv2d) else layers:
        masks[layer.weight] = magnitude_mask(layer.weight, sparsity)
        layer.weight.data.mul_(masks[layer.weight])
    return model, masks


def step_of(model: nn.Module, masks: dict[nn.Parameter, Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    """One training step: SGD with momentum; what is masked is set to zero again afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in masks.items():
                parameter.mul_(mask)

    return step


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(times):
            step()

    return turn


def _faster_forms(turns: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """Of either side, dense and ours, the form that is faster, and the other where it is within a fifth of that."""
    once = {}
    for label, turn in turns.items():
        turn()  # makes what the next ones find made
        timed = []
        for _ in range(2):
            begin = time.perf_counter()
            turn()
            timed.append(time.perf_counter() - begin)
        once[label] = min(timed)

    def best(side: str) -> float:
        return min(seconds for label, seconds in once.items() if label.startswith(side))

    return {
        label: turn
        for label, turn in turns.items()
        if once[label] <= 1.2 * best("dense" if "dense" in label else "ours")
    }


def measure_step(name: str, sparsity: float, batch: int, seconds: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(batch, *NETWORKS[name], generator=generator), torch.arange(batch) % 10
    # A step that starts where another contender has left its data in the caches is nobody's training: each turn is some
    # steps of one contender.
    many = 1 if len(x.shape) == 4 else STEPS_PER_TURN
    steps = {}
    for label in ("dense", "dense, channels last") if len(x.shape) == 4 else ("dense",):
        model, masks = masked_network(name, sparsity)
        if label == "dense":
            steps[label] = step_of(model, masks, x, y)
        else:
            steps[label] = step_of(
                model.to(memory_format=torch.channels_last), masks, x.to(memory_format=torch.channels_last), y
            )
    for label in tuple(steps):
        model, _ = masked_network(name, sparsity)
        order = torch.channels_last if label.endswith("last") else torch.contiguous_format
        images = x.to(memory_format=order) if len(x.shape) == 4 else x
        model = model.to(memory_format=order) if len(x.shape) == 4 else model
        report = se.sparsify_(model, example_inputs=images)
        steps[label.replace("dense", "ours")] = step_of(model, {}, images, y)
    turns = {label: repeated(step, many) for label, step in steps.items()}
    times = results_io.interleaved(_faster_forms(turns), seconds=seconds, warmup=0)
    ms = {label: summary["median_ms"] / many for label, summary in times.items()}
    dense = {label: value for label, value in ms.items() if label.startswith("dense")}
    ours = {label: value for label, value in ms.items() if label.startswith("ours")}
    ours_best = min(ours, key=ours.__getitem__)
    best = min(dense, key=dense.__getitem__)
    return {
        "network": name,
        "sparsity_%": 100 * sparsity,
        "batch": batch,
        "sparse_layers": f"{len(report.converted)} of {len(report.layers)}",
        "ms": ours[ours_best],
        "form": ours_best,
        "dense_masked_ms": dense[best],
        "dense_form": best,
        "speed_up": dense[best] / ours[ours_best],
    }


def eager_kd(z: Tensor, y: Tensor, t: Tensor, temperature: float, alpha: float) -> Tensor:
    """Distillation as it is usually written in PyTorch."""
    soft = functional.kl_div(
        functional.log_softmax(z / temperature, 1), functional.softmax(t / temperature, 1), reduction="batchmean"
    )
    return (1 - alpha) * functional.cross_entropy(z, y) + alpha * temperature**2 * soft


def eager_cs_kd(z: Tensor, y: Tensor, t: Tensor, temperature: float) -> Tensor:
    soft = functional.kl_div(
        functional.log_softmax(z / temperature, 1), functional.softmax(t / temperature, 1), reduction="batchmean"
    )
    return functional.cross_entropy(z, y) + temperature**2 * soft


def eager_ps_kd(z: Tensor, y: Tensor, table: Tensor, samples: Tensor, alpha: float) -> Tensor:
    target = alpha * table[samples] + (1 - alpha) * functional.one_hot(y, z.shape[1])
    table[samples] = functional.softmax(z.detach(), 1)
    return -(target * functional.log_softmax(z, 1)).sum(1).mean()


def eager_dlb(z: Tensor, y: Tensor, last: Tensor, temperature: float) -> Tensor:
    soft = functional.kl_div(
        functional.log_softmax(z[-len(last) :] / temperature, 1),
        functional.softmax(last / temperature, 1),
        reduction="batchmean",
    )
    return functional.cross_entropy(z, y) + temperature**2 * soft


def measure_losses(rows: int, classes: int, seconds: float, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Each loss with its gradient, in turns with eager PyTorch and with an addition that moves as many bytes."""
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(rows, classes, generator=generator) for _ in range(2))
    y = torch.randint(0, classes, (rows,), generator=generator)
    table, samples = functional.softmax(t, 1), torch.randperm(rows, generator=generator)
    own_table, last = table.clone(), t[rows // 2 :]
    z.requires_grad_()
    # Loss, eager loss, and how often an array of the logits' size is read and written.
    losses: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], float]] = {
        "KD": (
            lambda: kd_loss(z, y, teacher_logits=t, temperature=4.0, alpha=0.9),
            lambda: eager_kd(z, y, t, 4.0, 0.9),
            3,
        ),
        "CS-KD": (
            lambda: kd_loss(z, y, teacher_logits=t, temperature=4.0),
            lambda: eager_cs_kd(z, y, t, 4.0),
            3,
        ),
        "PS-KD": (
            lambda: kd_loss_into_table(z, y, own_table, samples, alpha=0.8),
            lambda: eager_ps_kd(z, y, table, samples, 0.8),
            4,
        ),
        "DLB": (lambda: dlb_loss(z, y, last, temperature=3.0), lambda: eager_dlb(z, y, last, 3.0), 2.5),
    }
    moved = torch.empty(rows, classes)

    def run(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            torch.autograd.grad(loss(), z)

        return step

    for name, (ours, eager, arrays) in losses.items():
        calls = {
            "eager": run(eager),
            "ours": run(ours),
            "addition": lambda: torch.add(z.detach(), t, out=moved),
        }
        times = results_io.interleaved(calls, seconds=seconds)
        for _ in range(4):  # a busy machine: a call that waits for another process tells nothing
            if all(s["median_ms"] <= 1.4 * s["p10_ms"] for s in times.values()):
                break
            times = results_io.interleaved(calls, seconds=seconds)
        ms = {call: s["median_ms"] for call, s in times.items()}
        size = arrays * 4 * rows * classes
        source, gbytes = ceilings.reading(size)
        limit = size / gbytes / 1e6
        yield {
            "loss": name,
            "rows": rows,
            "classes": classes,
            "ms": ms["ours"],
            "eager_ms": ms["eager"],
            "speed_up": ms["eager"] / ms["ours"],
            "limit_of_bytes_ms": limit,
            "read_from": source,
            "over_the_limit": ms["ours"] / limit,
            "moved_by_torch_ms": ms["addition"] * arrays / 3,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one sparsity, a smaller batch, shorter")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("part", nargs="*", choices=("steps", "losses"), default=["steps", "losses"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if "steps" in options.part:
        keep_freed_memory()
        keys, batch = ("network", "sparsity_%", "batch"), 16 if options.quick else 128
        for name in NETWORKS:
            if options.only not in name:
                continue
            for sparsity in SPARSITIES[:1] if options.quick else SPARSITIES:
                row = measure_step(name, sparsity, batch, 2.0 if options.quick else 6.0)
                print(row, flush=True)
                results_io.write(
                    "training_steps",
                    rows=merged("training_steps", [row], keys),
                    claim="A training step (forward, backward, SGD with momentum) on sparse layers beside dense "
                    "training under a mask.",
                    command="python -m bench.training steps",
                    notes=f"{options.threads} threads, in turns (the MLP: of {STEPS_PER_TURN} steps). Both: the faster "
                    "of plain and channels-last images; freed memory is kept (`keep_freed_memory`), which makes the "
                    "dense step faster too. Ours: `sparsify_` with example inputs, which leaves layers dense where "
                    "that is faster.",
                )
    if "losses" in options.part:
        ceilings = measure_ceilings(seconds=0.4 if options.quick else 4.0)
        rows = []
        for shape in LOSS_SHAPES:
            for row in measure_losses(*shape, 0.5 if options.quick else 3.0, ceilings):
                print(row, flush=True)
                rows.append(row)
        results_io.write(
            "losses",
            rows=rows,
            claim="Distillation losses on the CPU, forward and backward: KD (temperature 4, alpha 0.9), CS-KD, PS-KD "
            "with its table, DLB.",
            command="python -m bench.training losses",
            notes=f"{options.threads} threads, in turns with eager PyTorch. The limit: logits of both sides read once, "
            "the gradient (for PS-KD also the table) written once, at the rate of reading an array, measured in this "
            f"run: 4 MiB from the cache, {ceilings.cache_gbytes:.0f} GB/s, or 64 MiB from memory, "
            f"{ceilings.gbytes:.0f} GB/s. Beside it: what PyTorch takes to move as many bytes (`torch.add` of two "
            "matrices into a third), in turns.",
        )


if __name__ == "__main__":
    main()
