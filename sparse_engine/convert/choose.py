"""Choosing a kernel for every linear operator: the cost model proposes, timing decides, dense is always a candidate."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from sparse_engine import _C
from sparse_engine.convert.graph import Graph
from sparse_engine.convert.lower import (
    DENSE_PANEL,
    LANES,
    PAIR_KERNELS,
    PANEL_VECTORS,
    ROUNDED_KERNELS,
    LinearChoice,
    LinearProblem,
    _Lowering,
    _share,
    add_linear,
    default_choice,
    default_row_block,
    make_weight,
    panel_entries,
    rounded_kernels,
)
from sparse_engine.convert.parts import part_problems
from sparse_engine.errors import SparseEngineError
from sparse_engine.rounded import RoundedWeight

_ROUNDS = 7  # interleaved timings of each candidate
_TARGET_SECONDS = 0.004  # of one timing: long enough for the clock, short enough for a hundred layers
# (vectors, part) worth trying by panel: together they set how much of X a tile holds, 16 to 64 KB.
_TILES = {
    1: ((4, 128), (3, 192), (2, 256), (4, 192), (3, 256), (6, 64)),
    2: ((4, 128), (4, 256), (2, 256)),
    4: ((6, 128), (6, 256), (4, 192)),
    8: ((2, 256), (3, 256)),
}
# (rows, columns of a part) of row tiles: what lies in the L1, and half as much more.
_ROW_TILES = ((8, 144), (8, 252), (7, 180), (4, 252))
# (lines of 32 pixels, part) of tiles in bfloat16: 8 to 64 KB.
_PAIR_TILES = ((4, 256), (3, 256), (4, 128), (2, 256), (1, 256))
_ROWS_FROM = 0.15  # density from which a dense product with one vector may be faster than a sparse one
_WORTH_ROUNDING = 1.05  # a rounded weight that is not this much faster stays as it is
_WORTH_TIMING = 1.5  # candidates that the cost model puts this far behind the best one are not timed


def choose(
    graph: Graph,
    examples: Sequence[Tensor],
    *,
    tune: bool = True,
    threads: int | None = None,
    precision: str = "fp32",
) -> dict[str, dict[str, Any]]:
    """Choose a kernel for each conv2d and linear node.

    Example::

        choices = choose(graph, (x,))
        choices["layer1.0.conv1"]["kernel"]

    Args:
        graph: optimised, computing in float32.
        examples: one tensor per graph input; their batch size is the one that is tuned for.
        tune: time the candidates; otherwise the cost model alone decides.
        threads: for the kernels; None uses all cores.
        precision: "bf16" or "int8": weights of linear layers that read one vector may be rounded to it where that is
            faster; with "bf16" all other layers, and what they read, too.

    Returns:
        By node name: ``kernel`` (text), ``choice`` (a `LinearChoice` as JSON), ``ms`` and ``dense_ms`` (None without
        timing), ``reason``, ``pixels``; and ``precision`` where a rounded weight is faster. Plain JSON.
    """
    batch = graph.batch_of([tuple(tensor.shape) for tensor in examples])
    threads = threads or _C.get_num_threads()
    share = _share(graph, batch, None, threads)
    # Several passes over smaller batches run one per thread.
    alone = 1 if batch // max(1, share) >= threads else threads
    lowering = _Lowering(graph, share, None, alone, max(1, batch // max(1, share)))
    lowering.emit_steps()
    residuals = {node.name for node in graph.nodes if node.op in ("conv2d", "linear") and len(node.inputs) == 2}
    bands = part_problems(graph, threads) if batch == 1 and threads > 1 else {}
    may_round = _may_round(graph, precision)
    pairs = precision == "bf16" and _C.pair_products()
    known: dict[Any, dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, whole in lowering.problems.items():
        # One image on several threads: what a thread has to do is a band of rows, all by itself.
        problem, cores = (bands[name], 1) if name in bands else (whole, alone)
        key = _signature(problem, name in residuals)
        if key not in known:
            known[key] = _tuned(problem, name in residuals, cores) if tune else _guessed(problem, cores)
        if name in may_round and problem.vector:
            exact, key = known[key], (key, precision)
            if key not in known:
                known[key] = _rounded(problem, name in residuals, cores, precision, exact, tune)
        elif pairs and problem.pairs:
            # Bands and strips hand floats on.
            half = name not in bands and problem.times == 1
            exact, key = known[key], (key, precision, half)
            if key not in known:
                known[key] = _in_pairs(problem, name in residuals, cores, exact, tune, half)
        problem.forget()
        times = {field: known[key][field] for field in ("ms", "dense_ms")}  # of all strips
        times = {field: ms if ms is None else ms * problem.times for field, ms in times.items()}
        found[name] = dict(known[key], **times, pixels=problem.pixels)
        if found[name]["choice"]["kernel"] in PAIR_KERNELS and name in may_round:
            found[name]["precision"] = precision
    return found


def _may_round(graph: Graph, precision: str) -> set[str]:
    """Layers whose weight may be rounded: nobody else uses it, and for int8 they are linear."""
    if precision == "fp32":
        return set()
    uses = Counter(name for node in graph.nodes for name in node.params.values())
    ops = ("linear",) if precision == "int8" else ("linear", "conv2d")
    return {node.name for node in graph.nodes if node.op in ops and uses[node.params["weight"]] == 1}


def _rounded(
    problem: LinearProblem, residual: bool, threads: int, precision: str, exact: dict[str, Any], tune: bool
) -> dict[str, Any]:
    """The choice for one vector where the weight may be rounded; the exact one where that is not faster."""
    try:
        weight = RoundedWeight.from_dense(torch.from_numpy(problem.weight), precision)
    except SparseEngineError as error:
        return dict(exact, reason=f"{exact['reason']}; {error}")
    kernels = rounded_kernels(weight)
    rounded = replace(problem, rounded=weight)
    if not tune:
        # Faster where the weight comes from memory; a small one comes from the cache and is bound by the arithmetic.
        large = make_weight(problem, LinearChoice("vector")).nbytes > _cache_bytes()
        if not large:
            return exact
        choice = LinearChoice(kernels[0])
        return dict(exact, kernel=describe(choice, precision), choice=choice.to_json(), precision=precision)
    options = [LinearChoice.from_json(exact["choice"])] + [LinearChoice(kernel) for kernel in kernels]
    plans = [_bench_plan(problem, options[0], residual)]
    plans += [_bench_plan(rounded, choice, residual) for choice in options[1:]]
    seconds = _time_interleaved(plans, threads)
    best = min(range(len(options)), key=seconds.__getitem__)
    faster = seconds[0] / seconds[best]
    # What rounding costs in accuracy is not given away for the noise of a timing.
    if best == 0 or faster < _WORTH_ROUNDING:
        quickest = min(seconds[1:])
        reason = f"{exact['reason']}; {precision} takes {quickest / seconds[0]:.2f}x as long"
        return dict(exact, ms=seconds[0] * 1e3, reason=reason)
    return dict(
        exact,
        kernel=describe(options[best], precision),
        choice=options[best].to_json(),
        ms=seconds[best] * 1e3,
        reason=f"{faster:.1f}x the float32 kernel; bound by reading the weight once",
        precision=precision,
    )


def _in_pairs(
    problem: LinearProblem, residual: bool, threads: int, exact: dict[str, Any], tune: bool, half: bool
) -> dict[str, Any]:
    """The choice for a layer of several pixels that may compute in bfloat16; the exact one where that is as fast."""

    def option(lines: int, part: int) -> LinearChoice:
        choice = LinearChoice("pairs", 1, part, 0, lines)
        choice.row_block = default_row_block(problem, choice, threads)
        return choice

    options = [option(*tile) for tile in _PAIR_TILES] if not problem.depthwise else [LinearChoice("depthwise_pairs")]
    if not tune:
        kernel = LinearChoice.from_json(exact["choice"]).kernel
        if kernel not in ("sparse", "row_tiles", "depthwise"):
            return exact
        return dict(exact, kernel=describe(options[0]), choice=options[0].to_json())
    plans = [_bench_plan(problem, LinearChoice.from_json(exact["choice"]), residual)]
    plans += [_bench_plan(problem, choice, residual, half) for choice in options]
    seconds = _time_interleaved(plans, threads)
    best = min(range(1, len(plans)), key=seconds.__getitem__)
    faster = seconds[0] / seconds[best]
    if faster < _WORTH_ROUNDING:
        reason = f"{exact['reason']}; bf16 takes {seconds[best] / seconds[0]:.2f}x as long"
        return dict(exact, ms=seconds[0] * 1e3, reason=reason)
    choice = options[best - 1]
    return dict(
        exact,
        kernel=describe(choice),
        choice=choice.to_json(),
        ms=seconds[best] * 1e3,
        reason=f"{faster:.1f}x the float32 kernel: two products in one instruction",
    )


def _cache_bytes() -> int:
    """Bytes of the cache from which a weight costs no more to read than to multiply."""
    return int(_C.cpu_info()["l2"])


def _signature(problem: LinearProblem, residual: bool) -> Any:
    """Layers that look alike are timed once: same shape, and about as many entries in every panel width."""
    size = max(1, problem.rows * problem.columns)
    entries = tuple(round(50 * problem.panel_entries(panel) / size) for panel in PANEL_VECTORS)
    shape = tuple(sorted((k, v) for k, v in problem.geometry.items())), problem.rows, problem.groups
    return shape, entries, residual, problem.in_rows


def candidates(problem: LinearProblem, threads: int) -> list[LinearChoice]:
    """What may be the fastest way to compute a linear operator, the cost model's favourite first, dense among them."""
    first = default_choice(problem, threads)
    if first.kernel == "vector":
        # An entry costs two to three times as much as a place of a dense row; where most are kept, it is one already.
        density = problem.nonzeros / max(1, problem.rows * problem.columns)
        return [first, LinearChoice("rows")] if _ROWS_FROM < density <= 0.5 else [first]
    if first.kernel == "depthwise":
        return [first]
    found = [first]
    dense_cost = float(problem.rows * problem.columns)
    costs = {panel: problem.panel_entries(panel) * weight for panel, weight in _costs().items()}
    best = min(costs.values())

    def add(kernel: str, panel: int, part: int, vectors: int) -> None:
        choice = LinearChoice(kernel, panel, part, 0, vectors)
        choice.row_block = default_row_block(problem, choice, threads)
        if choice not in found:
            found.append(choice)

    for panel, cost in costs.items():
        if cost > _WORTH_TIMING * best or best > 1.3 * dense_cost:
            continue
        for vectors, part in _TILES[panel]:
            add("sparse", panel, part, vectors)
    if problem.row_tiles and problem.out_width >= LANES // 2 and costs[1] <= min(_WORTH_TIMING * best, dense_cost):
        for height, part in _ROW_TILES:
            add("row_tiles", 1, part, height)
    if problem.groups == 1:
        for panel in (8, 4) if DENSE_PANEL == 8 else (4,):
            add("dense", panel, 256, PANEL_VECTORS[panel])
        if problem.pixels <= 2 * LANES:
            add("dense", DENSE_PANEL, 256, 1)
        # Half the products at best: no use where the kept ones are far fewer.
        if problem.winograd and 0.4 * dense_cost < best:
            add("winograd", 1, 256, 4)
    return found


def _costs() -> dict[int, float]:
    from sparse_engine.convert.lower import _PANEL_COST

    return _PANEL_COST


def describe(choice: LinearChoice, precision: str = "fp32") -> str:
    """A kernel choice in words: ``sparse 1x4 rows``, ``dense``, …"""
    if choice.kernel == "rows" and precision == "fp32":
        return "vector, dense"
    if choice.kernel in ROUNDED_KERNELS:
        return f"vector, {precision} {'rows' if choice.kernel == 'rows' else 'lookups'}"
    if choice.kernel == "row_tiles":
        return "sparse, row tiles"
    if choice.kernel in PAIR_KERNELS:
        return f"{'sparse' if choice.kernel == 'pairs' else 'depthwise'}, bf16"
    if choice.kernel == "sparse":
        return "sparse" if choice.panel == 1 else f"sparse, {choice.panel}-row panels"
    return choice.kernel


def predicted_speedup(weight: numpy.ndarray) -> float:
    """The speed-up over dense that the cost model expects of a weight [rows, columns] at many pixels; at least 1."""
    best = min(panel_entries(weight, panel) * cost for panel, cost in _costs().items())
    return max(1.0, weight.size / max(1, best))


def _guessed(problem: LinearProblem, threads: int) -> dict[str, Any]:
    choice = default_choice(problem, threads)
    return {
        "kernel": describe(choice),
        "choice": choice.to_json(),
        "ms": None,
        "dense_ms": None,
        "reason": "cost model, not timed",
    }


def _tuned(problem: LinearProblem, residual: bool, threads: int) -> dict[str, Any]:
    options = candidates(problem, threads)
    runs = [_bench_plan(problem, choice, residual) for choice in options]
    seconds = _time_interleaved(runs, threads)
    best = min(range(len(options)), key=seconds.__getitem__)
    dense = [s for choice, s in zip(options, seconds, strict=True) if choice.kernel in ("dense", "rows")]
    dense_ms = min(dense) * 1e3 if dense else None
    chosen, ms = options[best], seconds[best] * 1e3
    density = problem.nonzeros / max(1, problem.rows * problem.columns)
    if chosen.kernel == "depthwise":
        reason = "depthwise: one shifted read per tap"
    elif chosen.kernel == "vector":
        reason = "one column: bound by reading the weight once"
    elif chosen.kernel in ("dense", "rows"):
        reason = "no zeros" if density == 1 else f"dense is faster at {1 - density:.0%} zeros"
    else:
        reason = f"{dense_ms / ms:.1f}x the dense kernel" if dense_ms else "the only kernel for groups"
        reason += _channel_lists(problem)
    return {"kernel": describe(chosen), "choice": chosen.to_json(), "ms": ms, "dense_ms": dense_ms, "reason": reason}


def _channel_lists(problem: LinearProblem) -> str:
    """What a weight says whose zeros are whole channels: which could not be cut out, and are listed instead."""
    kept = problem.weight != 0
    rows, columns = kept.any(1), kept.any(0)
    count = numpy.count_nonzero(kept)
    if count in (0, kept.size) or count < rows.sum() * columns.sum() or problem.groups > 1:
        return ""
    inputs = columns.reshape(problem.channels, -1).any(1)
    return f"; channels listed: {inputs.sum()} of {inputs.size} in, {rows.sum()} of {rows.size} out"


def _bench_plan(problem: LinearProblem, choice: LinearChoice, residual: bool, half: bool = False) -> Any:
    """A plan with this operator alone, and memory for it. half: what it reads and writes is in bfloat16."""
    geometry = problem.geometry
    pixels_in = geometry["n"] * geometry["h"] * geometry["w"]
    padded = _C.padded_half_pixels if half else _C.padded_pixels
    plane_in, plane_out = padded(pixels_in), padded(problem.pixels if problem.vector else max(2, problem.pixels))
    workspace = max(_C.phase_floats(geometry), _C.phase_floats(geometry, half=True))
    x_floats, out_floats = problem.channels * plane_in, problem.rows * plane_out
    x_at, work_at = 0, x_floats
    out_at = work_at + workspace
    residual_at = out_at + out_floats
    plan = _C.Plan(residual_at + (out_floats if residual else 0), [])
    stride_h = geometry["w"]
    x = (
        0,
        x_at,
        [geometry["n"], problem.channels, geometry["h"], geometry["w"]],
        [geometry["h"] * stride_h, plane_in, stride_h, 1],
    )
    plan.fill("x", (0, x_at, [x_floats], [1]), 0.25)
    plan.fill("out", (0, out_at, [out_floats * (2 if residual else 1)], [1]), 0.25)
    bias = numpy.zeros(problem.rows, dtype=numpy.float32)
    activation = ("clamp", 0.0, math.inf)
    if any(problem.in_rows) and choice.kernel in ("sparse", "dense"):
        columns, pixels = problem.channels, problem.pixels
        strides_in, strides_out = (
            [width, 1] if rows else [1, plane]
            for rows, width, plane in zip(problem.in_rows, (columns, problem.rows), (plane_in, plane_out), strict=True)
        )
        plan.linear(
            problem.name, make_weight(problem, choice), bias, (0, x_at, [pixels, columns], strides_in),
            (0, out_at, [pixels, problem.rows], strides_out), (0, residual_at) if residual else None, plane_out,
            activation, choice.vectors
        )  # fmt: skip
        return plan
    add_linear(
        plan, problem, choice, make_weight(problem, choice), bias, x, (0, work_at), (0, out_at), plane_out, (0,
        residual_at) if residual else None, plane_out, activation, (half, half, half)
    )  # fmt: skip
    return plan


def _time_interleaved(plans: Sequence[Any], threads: int) -> list[float]:
    """Seconds of each plan's operator, phases included: the lower quartile of rounds in which all plans take turns."""
    times: list[list[float]] = [[] for _ in plans]
    repeats = []
    for plan in plans:
        once = min(sum(plan.time_node(node, [], threads, 2)[-1] for node in range(2, len(plan))) for _ in range(2))
        repeats.append(max(1, min(20, int(_TARGET_SECONDS / max(once, 1e-7)))))
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        for index, plan in enumerate(plans):
            total = 0.0
            for node in range(2, len(plan)):
                measured = sorted(plan.time_node(node, [], threads, repeats[index]))
                total += measured[len(measured) // 4]
            times[index].append(total)
        if time.perf_counter() - started > 1.5:
            break
    return [sorted(values)[len(values) // 4] for values in times]
