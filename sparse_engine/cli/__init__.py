"""The `sparse-engine` command. Each command is thin: what it does can be called from Python.

Example:
    >>> from sparse_engine.cli import main                         # doctest: +SKIP
    >>> main(["doctor", "--json"])                                 # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_engine.cli import bench, convert, doctor, inspect, prune, report, run, train
from sparse_engine.cli._common import app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with the exit status.

    Args:
        arguments: the words after `sparse-engine`; those of the process when None.

    Raises:
        SystemExit: always; status 0 after success, 1 after an error, 2 for wrong arguments, 130 after Ctrl-C.
    """
    app(args=None if arguments is None else list(arguments), prog_name="sparse-engine")
