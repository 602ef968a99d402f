"""All measurements in turn, each in a process of its own: ``python -m bench [--quick]``, or ``make bench``.

Engines to compare with and real data are used where they are: ``--engines-python`` (or $SPARSE_ENGINE_PEERS) names the
interpreter of an environment that holds ONNX Runtime, OpenVINO and DeepSparse, $SPARSE_ENGINE_DATA the data folder.
The sweep over layers comes last, in what is left of ``--minutes``; networks in bfloat16 come after other layers of low
precision, as many as begin within 110 seconds of these. The next run goes on where both stop. Of the networks pruned by
channels only ResNet-50 at batch 1 is measured here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

_TABLES = 20.0  # seconds of `make bench` after this


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few points of each, in a few minutes")
    parser.add_argument("--only", nargs="+", default=[], help="parts whose name contains one of these")
    parser.add_argument("--engines-python", default=os.environ.get("SPARSE_ENGINE_PEERS"))
    parser.add_argument("--minutes", type=float, default=20, help="for everything but other engines and real data")
    options = parser.parse_args()
    quick = ["--quick"] if options.quick else []
    peers = ["--engines-python", options.engines_python] if options.engines_python else []
    parts: dict[str, list[str]] = {
        "overhead": ["bench.runtime", *quick, "overhead"],
        "memory": ["bench.runtime", "memory"],
        "threads": ["bench.runtime", *quick, "threads"],
        "precision": ["bench.kernels", *quick, *([] if quick else ["--resume", "--budget", "110"]), "precision"],
        "structured": ["bench.structured", "--quick"],
        "losses": ["bench.training", *quick, "losses"],
        "training": ["bench.training", *quick, "steps"],
    }
    own = tuple(parts)
    if os.environ.get("SPARSE_ENGINE_DATA"):
        parts["dlmc"] = ["bench.kernels", *quick, "dlmc"]
        parts["real accuracy"] = ["bench.real", "accuracy"]
        parts["real speed"] = ["bench.real", "speed", *peers, *(["--batch", "1", "--rounds", "3"] if quick else [])]
    if peers:
        some = ["--only", "resnet50_90", "--rounds", "3"] if quick else ["--rounds", "4"]
        parts["networks"] = ["bench.peers", *peers, *some]
    parts["layers"] = ["bench.kernels", *quick, "layers"]
    failed = []
    left = 60 * options.minutes
    for name, command in parts.items():
        if options.only and not any(part in name for part in options.only):
            continue
        begin = time.perf_counter()
        if name == "layers" and not quick:
            command += ["--resume", "--budget", str(max(60.0, left - _TABLES))]
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-W", "ignore", "-m", *command]).returncode != 0:
            failed.append(name)
        seconds = time.perf_counter() - begin
        left -= seconds if name in own else 0
        print(f"== {name}: {seconds:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
