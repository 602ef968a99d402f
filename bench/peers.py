"""Whole networks against the other engines, each in its own environment, on the same weights, in turns.

    python -m bench.peers --setup DIR                                makes the environment of the engines, then measures
    python -m bench.peers --engines-python DIR/bin/python            with an environment that is there
    python -m bench.peers --only 'resnet50*' --batch 1                 some cases; rows of the others stay as they are

Writes bench/results/networks_cpu.json and the plot docs/networks_cpu.svg. DeepSparse's licence allows evaluation only:
it is measured, and nothing here depends on it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy
import torch

import sparse_engine as se
from bench import results_io
from bench.engines import PEERS, Contender, contenders, disturbed, make_environment, one_round, summarised
from bench.networks import IMAGE, NETWORKS, pruned_network, write_onnx
from bench.peak import core_to_core_ns, peak_gflops
from bench.rows import merged

WORK = results_io.RESULTS.parent.parent / "build" / "bench" / "networks"
PLOT = results_io.RESULTS.parent.parent / "docs" / "networks_cpu.svg"
NEAR_NS = 120
engine_versions: dict[str, str] = {}
CASES = [
    *((network, 0.9, (1, 1), batch) for network in NETWORKS for batch in (1, 16)),
    *(("resnet50", sparsity, (1, 1), batch) for sparsity in (0.8, 0.95) for batch in (1, 16)),
    ("resnet50", 0.9, (16, 1), 1),
    *(("resnet50", 0.0, (1, 1), batch) for batch in (1, 16)),
]


def stem_of(network: str, sparsity: float, block: tuple[int, int]) -> str:
    blocks = "" if block == (1, 1) else f"_{block[0]}x{block[1]}"
    return f"{network}_{sparsity * 100:.0f}{blocks}"


def prepare(network: str, sparsity: float, block: tuple[int, int], batch: int, engines_python: Path | None) -> Path:
    """Write the ONNX file (once) and return it without its suffix."""
    stem = WORK / f"{stem_of(network, sparsity, block)}_b{batch}"
    if engines_python is not None and not stem.with_suffix(".onnx").exists():
        write_onnx(pruned_network(network, sparsity=sparsity, block=block), batch, stem.with_suffix(".onnx"))
    return stem


def convert(network: str, sparsity: float, block: tuple[int, int], batch: int, threads: int, file: Path) -> None:
    """Convert the network, tuned for the batch size, and write the executable; run in a process of its own."""
    torch.set_num_threads(threads)
    model = pruned_network(network, sparsity=sparsity, block=block)
    x = torch.from_numpy(numpy.random.default_rng(0).standard_normal((batch, *IMAGE), dtype=numpy.float32))
    file.parent.mkdir(parents=True, exist_ok=True)
    se.convert(model, (x,), threads=threads).save(file)


def sparse_gflop(file: Path) -> float:
    """Billions of floating-point operations per call that are left when zero weights are skipped."""
    return sum(layer.flops * (1 - (layer.sparsity or 0)) for layer in se.load(file).report.layers) / 1e9


def rounds_of_one_placement(
    ready: Mapping[str, Contender], options: argparse.Namespace
) -> tuple[str | None, dict[str, dict[str, float]]]:
    """Rounds until enough of them began and ended with the cores placed alike; near, far, or changing throughout."""
    found: dict[str | None, list[dict[str, float]]] = {}
    before = core_to_core_ns()
    for _ in range(2 * options.rounds):
        one = one_round(ready, seconds=options.seconds, calls=options.calls, warm=0.2)
        after = core_to_core_ns()
        place = None
        if before is not None and after is not None:
            place = "near" if max(before, after) < NEAR_NS else "far" if min(before, after) >= NEAR_NS else "changing"
        found.setdefault(place, []).append(one)
        before = after
        if place != "changing" and len(found[place]) == options.rounds:
            return place, summarised(found[place])
    most = max(found, key=lambda place: len(found[place]))
    return most, summarised(found[most])


def measure(
    case: tuple[str, float, tuple[int, int], int], options: argparse.Namespace, peak: float
) -> dict[str, Any] | None:
    """A row of the table; None, after saying so, when other work disturbed the measurement."""
    network, sparsity, block, batch = case
    stem = prepare(network, sparsity, block, batch, options.engines_python)
    spx = stem.with_name(f"{stem.name}_t{options.threads}.spx")
    if options.reconvert or not spx.exists():
        arguments = [network, sparsity, *block, batch, options.threads, spx]
        subprocess.run([sys.executable, "-m", "bench.peers", "--convert", *map(str, arguments)], check=True)
    wanted = {"ours": ("sparse_engine", spx, sys.executable)}
    if options.engines_python is not None:
        wanted |= {engine: (engine, stem.with_suffix(".onnx"), options.engines_python) for engine in options.engines}
    outputs = WORK / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    for old in outputs.glob("*.npy"):
        old.unlink()
    with contenders(wanted, batch=batch, threads=options.threads, outputs=outputs) as ready:
        cores, times = rounds_of_one_placement(ready, options)
        found_versions = {label: contender.version for label, contender in ready.items()}
    ms = {label: summary["median_ms"] for label, summary in times.items()}
    print("median, best round:", {k: (round(s["median_ms"], 2), round(s["best_ms"], 2)) for k, s in times.items()})
    if reason := disturbed(times):
        print(f"not written, the machine was not quiet: {reason}", flush=True)
        return None
    peers = {label: value for label, value in ms.items() if label != "ours"}
    gflop = sparse_gflop(spx)
    row: dict[str, Any] = {
        "network": network,
        "sparsity_%": round(100 * sparsity),
        "structure": "unstructured" if block == (1, 1) else f"{block[0]}x{block[1]} blocks",
        "batch": batch,
        "cores": cores,
        "threads": options.threads,
        **{f"{engine}_ms": ms.get(engine) for engine in PEERS},
        "ours_ms": ms["ours"],
        "best_peer": min(peers, key=peers.__getitem__) if peers else None,
        "speed_up_over_best": min(peers.values()) / ms["ours"] if peers else None,
        "speed_up_over_deepsparse": ms["deepsparse"] / ms["ours"] if "deepsparse" in ms else None,
        "sparse_gflop": gflop,
        "ours_share_of_peak_%": 100 * gflop / (ms["ours"] / 1e3) / peak,
        "largest_difference": disagreement(outputs, found_versions),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }
    engine_versions.update({label: version for label, version in found_versions.items() if label != "ours"})
    return row


def disagreement(outputs: Path, labels: Any) -> float | None:
    """The largest difference between our output and the nearest peer's on the same input, relative to its scale."""
    found = {label: numpy.load(outputs / f"{label}.npy") for label in labels if (outputs / f"{label}.npy").exists()}
    if "ours" not in found or len(found) < 2:
        return None
    ours = found.pop("ours")
    return min(float(abs(ours - other).max() / abs(other).max()) for other in found.values())


def write(rows: list[dict[str, Any]], peak: float) -> None:
    keys = ("network", "sparsity_%", "structure", "batch", "threads", "cores")
    final = sorted(merged("networks_cpu", rows, keys), key=_place)
    results_io.write(
        "networks_cpu",
        rows=final,
        claim="Whole pruned networks, fp32: our executable beside the other engines on the same weights.",
        command="python -m bench.peers --engines-python ENGINES/bin/python",
        notes="Every engine in a process of its own, in turns, the others stopped; ms per call, "
        "median over rounds of each round's median. Share of peak: operations left when zeros are skipped, over the "
        f"fused multiply-add peak of the same run ({peak:.0f} GFLOP/s in the last one). Cores: near when a word "
        f"passes between them in less than {NEAR_NS} ns (shared cache), else far; a virtual machine's may be either at "
        "different times, and only rounds that began and ended alike are taken. Largest difference: "
        "between our output and the nearest peer's, relative to the output's scale. Engines: "
        + ", ".join(f"{engine} {version}" for engine, version in sorted(engine_versions.items()))
        + ".",
    )
    plot(final)


def _place(row: dict[str, Any]) -> tuple[int, float, str, int, int, str]:
    place = NETWORKS.index(row["network"]), row["sparsity_%"], row["structure"], row["threads"], row["batch"]
    return (*place, row.get("cores") or "")


def plot(rows: list[dict[str, Any]]) -> None:
    """Bars by case: milliseconds relative to ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7))
    colours = {"onnxruntime": "#8da0cb", "openvino": "#66c2a5", "deepsparse": "#fc8d62", "ours": "#222222"}
    for axis, batch in zip(axes, (1, 16), strict=True):
        chosen = [row for row in rows if row["batch"] == batch and row["threads"] == os.cpu_count()]
        near = {_place(row)[:-1] for row in chosen if row.get("cores") != "far"}
        chosen = [row for row in chosen if row.get("cores") != "far" or _place(row)[:-1] not in near]
        for place, (engine, colour) in enumerate(colours.items()):
            values = [(row.get(f"{engine}_ms") or 0) / row["ours_ms"] for row in chosen]
            positions = [i + 0.2 * (place - 1.5) for i in range(len(chosen))]
            axis.bar(positions, values, 0.19, color=colour, label=engine.replace("ours", "sparse_engine"))
        names = [
            f"{row['network']}\n{row['sparsity_%']} %" + ("" if row["structure"] == "unstructured" else " 16x1")
            for row in chosen
        ]
        axis.set_xticks(range(len(chosen)), names, fontsize=8)
        axis.set_ylabel("time, ours = 1")
        axis.set_title(f"batch {batch}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, ncols=4)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": "networks"}):
        figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["--convert"]:
        network, sparsity, height, width, batch, threads, file = sys.argv[2:]
        convert(network, float(sparsity), (int(height), int(width)), int(batch), int(threads), Path(file))
        return
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--setup", type=Path, metavar="DIR", help="make the environment of the engines in DIR")
    parser.add_argument("--engines-python", type=Path, help="interpreter of an environment that holds the engines")
    parser.add_argument("--export-only", action="store_true", help="write the ONNX files and stop")
    parser.add_argument("--engines", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--only", default="*", help="cases by pattern: resnet50_90, 'resnet50*', resnet50_90_16x1, …")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each engine's turn, at least")
    parser.add_argument("--calls", type=int, default=2, help="in each turn, at least")
    parser.add_argument("--keep", dest="reconvert", action="store_false", help="use executables that are there")
    options = parser.parse_args()
    if options.setup is not None:
        options.engines_python = make_environment(options.setup)
    chosen = [c for c in CASES if fnmatch(stem_of(*c[:3]), options.only) and c[3] in options.batch]
    if options.export_only:
        for case in chosen:
            print(prepare(*case, options.engines_python or Path(sys.executable)), flush=True)
        return
    peak = peak_gflops(options.threads)
    for case in chosen:
        row = measure(case, options, peak)
        if row is not None:
            print(row, flush=True)
            write([row], peak)


if __name__ == "__main__":
    main()
