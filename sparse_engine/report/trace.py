"""One profiled call as a trace that Perfetto and Chrome open."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_engine.io import atomic_write_text


def trace_events(spans: Sequence[Mapping[str, Any]], title: str, wall_us: float | None = None) -> dict[str, Any]:
    """Spans of a profile in Chrome's trace format.

    Example:
        >>> span = {"name": "conv1", "kind": "conv2d", "thread": 0, "start_us": 0.0, "dur_us": 50.0, "flops": 10**6}
        >>> trace_events([span], "model.spx")["traceEvents"][-1]["args"]["GFLOP/s"]
        20.0

    Args:
        spans: one per node and thread: name, kind, thread, start_us, dur_us, and where known band, pass, items, busy_us
            and the span's own flops and bytes.
        title: what was profiled.
        wall_us: of the whole call.

    Returns:
        Plain JSON. Source: the trace event format of the Chromium project.
    """
    threads = sorted({int(span["thread"]) for span in spans})
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}}]
    events += [
        {"ph": "M", "pid": 1, "tid": thread, "name": "thread_name", "args": {"name": f"thread {thread}"}}
        for thread in threads
    ]
    for span in spans:
        arguments = {key: span[key] for key in ("band", "pass") if span.get(key) is not None}
        for key in ("flops", "bytes"):
            if span.get(key):
                arguments[key] = round(span[key])
                if span["dur_us"] > 0:
                    arguments["GFLOP/s" if key == "flops" else "GB/s"] = round(span[key] / span["dur_us"] / 1e3, 2)
        if span.get("items"):
            arguments["items"] = span["items"]
        if span.get("busy_us") and span["busy_us"] < span["dur_us"]:
            arguments["busy_us"] = round(span["busy_us"], 3)
        events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": int(span["thread"]),
                "name": span["name"],
                "cat": span["kind"],
                "ts": span["start_us"],
                "dur": span["dur_us"],
                "args": arguments,
            }
        )
    trace: dict[str, Any] = {"traceEvents": events, "displayTimeUnit": "ms"}
    if wall_us is not None:
        trace["otherData"] = {"wall_us": wall_us}
    return trace


def write_trace(
    path: str | os.PathLike[str],
    spans: Sequence[Mapping[str, Any]],
    title: str = "sparse_engine",
    wall_us: float | None = None,
) -> None:
    """Write `trace_events` to a file, atomically."""
    atomic_write_text(path, json.dumps(trace_events(spans, title, wall_us)))
