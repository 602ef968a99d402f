"""The command line of the reproduction."""

from __future__ import annotations

import argparse
import itertools
import time

import torch

from . import claims
from .study import SCALES, STUDIES, Store, rank, results_of, run_cells


def main() -> None:
    """Run studies, or write the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.repro", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    go = commands.add_parser("run", help="run what is missing")
    go.add_argument("--study", nargs="*", choices=list(STUDIES), help="all of the scale's when not given")
    go.add_argument("--rank", nargs="*", type=int, default=[0, 1, 2, 3], help="0: the main claims; 3: only for tables")
    go.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    go.add_argument("--scale", choices=list(SCALES), default="digits")
    go.add_argument("--data", help="the data folder, for scales other than digits")
    go.add_argument("--until", help="stop before this time of day (UTC, HH:MM)")
    go.add_argument("--threads", type=int, default=1)
    commands.add_parser("tables", help="write docs/reproduction.md")
    arguments = parser.parse_args()
    if arguments.command == "tables":
        print(claims.write())
        return
    if arguments.scale != "digits" and not arguments.data:
        parser.error(f"--scale {arguments.scale} needs --data FOLDER")
    torch.set_num_threads(arguments.threads)
    store = Store(results_of(arguments.scale))
    # two seeds make a claim judged, so every claim gets its first two before any gets a third; the main claims first,
    # and the studies in turns, so that an interrupted run has something of each
    cells = []
    for seeds in (arguments.seeds[:2], arguments.seeds[2:]):
        for level, seed in itertools.product(sorted(arguments.rank), seeds):
            lists = [
                [
                    (study, cell, seed)
                    for cell in STUDIES[study](arguments.scale)
                    if rank(cell, arguments.scale) == level
                ]
                for study in arguments.study or SCALES[arguments.scale]["studies"]
            ]
            cells += [entry for turn in itertools.zip_longest(*lists) for entry in turn if entry is not None]
    run_cells(store, cells, arguments.scale, arguments.data or "digits", _deadline(arguments.until))


def _deadline(text: str | None) -> float | None:
    if text is None:
        return None
    hours, minutes = map(int, text.split(":"))
    now = time.gmtime()
    seconds = (hours - now.tm_hour) * 3600 + (minutes - now.tm_min) * 60 - now.tm_sec
    # a time more than half a day ago is tomorrow's
    return time.monotonic() + (seconds if seconds > -43200 else seconds + 86400)


if __name__ == "__main__":
    main()
