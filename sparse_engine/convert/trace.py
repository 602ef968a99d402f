"""What ``executable.trace`` returns: which thread worked on which node when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CallTrace", "Span", "trace_call"]


@dataclass(frozen=True)
class Span:
    """What one thread did for one native node.

    Attributes:
        name: the node's; copies that a node needs have names that begin with its own, or with a value's.
        thread: 0 made the call, the others are workers.
        band: which band of rows of the image, where one image is cut in bands; else None.
        pass_index: which pass over the network, where a batch runs in several; else None.
        start_us: since the call began.
        dur_us: until the thread's last own work for the node; a gap to its next span is waiting for other threads.
        busy_us: of dur_us, without waiting in the middle.
        items: pieces of work that the thread took; 0 where the node runs on one thread.
    """

    name: str
    thread: int
    band: int | None
    pass_index: int | None
    start_us: float
    dur_us: float
    busy_us: float
    items: int


@dataclass(frozen=True)
class CallTrace:
    """One call: its wall time in microseconds, and its spans in the order of their beginnings."""

    wall_us: float
    spans: list[Span]


def trace_call(call: Callable[[], Any]) -> CallTrace:
    """Run a function and record what the plans that it runs on this thread do.

    Example::

        trace_call(lambda: executable(x)).wall_us

    Args:
        call: takes nothing; what it raises is passed on.
    """
    # Here, so that a Python-only installation can import this module.
    from sparse_engine import _C

    wall, spans = _C.trace(call)
    return CallTrace(
        wall,
        [
            Span(name, thread, band if band >= 0 else None, number if number >= 0 else None, *rest)
            for name, thread, band, number, *rest in spans
        ],
    )
