"""A fuzzer for `.spx` files: damaged files must load, or give one `FileFormatError`; nothing else, and quickly.

    python -m tests.io.fuzz_spx --minutes 30 --stage run --record

Every case follows from its number alone, so a finding is repeated with `--case NUMBER`. Cases run in a child process
with a bound on its memory: a crash, a hang or an absurd allocation costs that process only, and is reported.

Stages: `read` reads the file and unpacks its constants; `load` builds the executable; `run` calls it too.
`--record` writes bench/results/fuzz_spx.json, which docs/spx.md shows.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse_engine.errors import FileFormatError, SparseEngineError
from sparse_engine.io import read_spx
from tests.io import spx_cases

SECONDS_PER_CASE = 20  # of processor time: a machine with other work may stop a process for as long
_HANGS_AFTER = 300  # seconds by the clock
EXTRA_MEMORY = 3 * 2**29
"""Bytes that loading may take beyond what the idle process has; files of a few kilobytes need a fraction of it."""

_RUN_LIMIT = 2**22
"""Elements of activations above which a loaded graph is not called: large models are allowed to be large."""

_INTERESTING: list[Any] = [
    *(-1, 0, 1, 2, 3, 7, 8, 15, 16, 17, 64, 127, 128, 255, 256, 4095, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**40),
    *(2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1e-300, 1e300, -1e10, True, False, None),
    *("", "x", "relu", "float64", "int64", "F64", "I8", "U8", "BOOL", "\0", "é", "../../x", "a" * 700, "N", "-1"),
    *([], {}, [[]], [0], [1, 2, 3], [-1], [None], {"batch": 1, "plus": 0}, {"batch": 2**31, "plus": -(2**31)}),
    *({"kind": "relu"}, {"kind": "clamp", "min": 1e300, "max": -1e300}, {"tensor": "x"}),
]


# -- the files to start from -------------------------------------------------------------------------------------------


def corpus(folder: Path, stage: str) -> list[bytes]:
    """The well-formed files that are mutated; small, so that many cases fit into a second."""
    files = [spx_cases.write_tiny(folder / "tiny.spx"), spx_cases.write_sample(folder / "sample.spx")]
    if stage != "read":
        files += _executables(folder)
    return [file.read_bytes() for file in files]


def _executables(folder: Path) -> list[Path]:
    import sparse_engine as se

    torch.manual_seed(0)
    paths = []
    models = (
        ("cnn", _random_zeros(_Cnn()), (1, 3, 8, 8)),
        ("attention", _random_zeros(_Attention()), (1, 4, 8)),
        ("structures", _structures(), (1, 32)),
    )
    for name, model, shape in models:
        path = folder / f"{name}.spx"
        se.convert(model.eval(), (torch.randn(shape),), tune=False, threads=1).save(path)
        paths.append(path)
    return paths + _rounded(folder)


def _rounded(folder: Path) -> list[Path]:
    """Files of version 2: weights in bf16 and int8, by rows and as lookups."""
    import sparse_engine as se
    from sparse_engine.convert import choose

    paths = []
    cache_bytes, choose._cache_bytes = choose._cache_bytes, lambda: 0  # small weights are not rounded otherwise
    try:
        for precision in ("bf16", "int8"):
            for density in (0.2, 1.0):
                torch.manual_seed(0)
                model = torch.nn.Sequential(torch.nn.Linear(80, 24), torch.nn.ReLU(), torch.nn.Linear(24, 5)).eval()
                model[0].weight.data *= torch.rand(24, 80) < density
                path = folder / f"{precision}_{density}.spx"
                executable = se.convert(model, (torch.randn(1, 80),), precision=precision, tune=False, threads=1)
                executable.save(path)
                paths.append(path)
    finally:
        choose._cache_bytes = cache_bytes
    return paths


def _random_zeros(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < 0.3)
    return model


@torch.no_grad()
def _structures() -> torch.nn.Module:
    """Layers whose weights are packed in different ways: loaded weights stay packed, and kernels read them so."""
    masks = [torch.rand(32, 32) < 0.05 for _ in range(5)]
    masks[1] = torch.kron(torch.eye(4), torch.ones(8, 8)) > 0
    masks[2] = (torch.arange(32) + torch.arange(32)[:, None]) % 2 == 0
    masks[3] = torch.eye(32) > 0
    masks[4] = torch.ones(32, 32, dtype=torch.bool)
    masks[4][8:12] = False
    layers: list[torch.nn.Module] = []
    for mask in masks:
        linear = torch.nn.Linear(32, 32)
        linear.weight.copy_(torch.where(mask, torch.randn(32, 32), torch.zeros(())))
        layers += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers)


class _Cnn(torch.nn.Module):
    """Most node kinds of convolutional networks, tiny."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.norm = nn.GroupNorm(2, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + torch.nn.functional.hardswish(self.pointwise(self.depthwise(x)))
        x = torch.cat([self.pool(x), torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)], 1)
        x = self.norm(torch.nn.functional.pad(x, (1, 0, 0, 1))) * torch.sigmoid(x.mean((2, 3), keepdim=True))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)).softmax(1)


class _Attention(torch.nn.Module):
    """A transformer block, tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return (x + self.mlp(self.norm(x)))[:, 1:]


# -- mutations ---------------------------------------------------------------------------------------------------------


def make_case(number: int, files: list[bytes]) -> bytes:
    """The damaged file with this number."""
    choose = random.Random(number)
    content = choose.choice(files)
    if choose.random() < 0.25:
        for _ in range(choose.choice((1, 1, 1, 2, 5))):
            content = _mutate_bytes(content, choose, files)
        return content
    parts = spx_cases.split(content)
    for _ in range(choose.choice((1, 1, 1, 2, 3, 8))):
        choose.choice(_STRUCTURED)(parts, choose)
    content = parts.join(seal=choose.random() < 0.97)
    return _mutate_bytes(content, choose, files) if choose.random() < 0.02 else content


def _mutate_bytes(content: bytes, choose: random.Random, files: list[bytes]) -> bytes:
    data = bytearray(content)
    kind = choose.randrange(8)
    at = choose.randrange(len(data) + 1)
    length = choose.choice((1, 2, 4, 8, 100, 4096))
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << choose.randrange(8)
    elif kind == 1:
        data[at : at + length] = choose.randbytes(length)
    elif kind == 2:
        data[at:at] = choose.randbytes(length)
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        other = choose.choice(files)
        data[at:] = other[choose.randrange(len(other)) :]
    elif kind == 6:
        behind = max(0, len(data) - 8)
        data[:8] = choose.choice((0, 1, 2, len(data), behind, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
    else:
        data[at:at] = data[at : at + length]
    return bytes(data)


def _mutate_document(parts: spx_cases.Parts, choose: random.Random) -> None:
    parts.document = _mutate_json(parts.document, choose)


def _mutate_graph(parts: spx_cases.Parts, choose: random.Random) -> None:
    if isinstance(parts.document, dict):
        parts.document["graph"] = _mutate_json(parts.document.get("graph"), choose)


def _mutate_node(parts: spx_cases.Parts, choose: random.Random) -> None:
    """Change one node, or the declared shape of one value: where wrong sizes could reach a kernel."""
    graph = parts.document.get("graph") if isinstance(parts.document, dict) else None
    if not isinstance(graph, dict):
        return
    group = graph.get(choose.choice(("nodes", "values")))
    if isinstance(group, list | dict) and group:
        key = choose.choice(list(group)) if isinstance(group, dict) else choose.randrange(len(group))
        group[key] = _mutate_json(group[key], choose)


def _mutate_attributes(parts: spx_cases.Parts, choose: random.Random) -> None:
    """Change the report, the number of threads or the recorded choice of kernels."""
    attributes = parts.document.get("attributes") if isinstance(parts.document, dict) else None
    if isinstance(attributes, dict) and attributes:
        key = choose.choice(list(attributes))
        attributes[key] = _mutate_json(attributes[key], choose)


def _mutate_packed(parts: spx_cases.Parts, choose: random.Random) -> None:
    table = parts.document.get("constants") if isinstance(parts.document, dict) else None
    if isinstance(table, dict) and table:
        name = choose.choice(list(table))
        table[name] = _mutate_json(table[name], choose)


def _mutate_header(parts: spx_cases.Parts, choose: random.Random) -> None:
    """Change the header and, mostly, the document's copy of it alike."""
    if not parts.header:
        return
    name = choose.choice(list(parts.header))
    fields = parts.header[name] = _mutate_json(parts.header[name], choose)
    table = parts.document.get("tensors") if isinstance(parts.document, dict) else None
    if (
        choose.random() < 0.7
        and isinstance(table, dict)
        and isinstance(fields, dict)
        and isinstance(table.get(name), list)
    ):
        table[name][:2] = [fields.get("dtype"), fields.get("shape")]


def _mutate_metadata(parts: spx_cases.Parts, choose: random.Random) -> None:
    parts.metadata[choose.choice([*parts.metadata, "new"])] = str(choose.choice(_INTERESTING))


def _mutate_tensor(parts: spx_cases.Parts, choose: random.Random) -> None:
    """Change a tensor's bytes and its checksum: indices that lead elsewhere, values of every kind."""
    try:
        name = choose.choice([name for name in parts.header if parts.bytes_of(name)])
        content = bytearray(parts.bytes_of(name))
        for _ in range(choose.choice((1, 1, 2, 10))):
            at = choose.randrange(len(content))
            content[at] = choose.choice((0, 1, 127, 128, 254, 255, choose.randrange(256)))
        if choose.random() < 0.1:
            content = bytearray(choose.randbytes(len(content)))
        parts.retouch(name, bytes(content))
    except (IndexError, KeyError, TypeError, ValueError, AssertionError):
        pass  # an earlier mutation has left no table to correct


def _mutate_json(value: Any, choose: random.Random) -> Any:
    """A copy with one place changed, chosen evenly over depth so that leaves do not drown the structure."""
    value = copy.deepcopy(value)
    holder: list[Any] = [value]
    place: tuple[Any, Any] = (holder, 0)
    while True:
        container, key = place
        item = container[key]
        if isinstance(item, dict | list) and item and choose.random() < 0.85:
            place = (item, choose.choice(list(item)) if isinstance(item, dict) else choose.randrange(len(item)))
            continue
        break
    container, key = place
    item = container[key]
    kind = choose.randrange(7)
    if kind == 0 and container is not holder:
        del container[key]
    elif kind == 1 and isinstance(item, int | float) and not isinstance(item, bool):
        container[key] = choose.choice((item + 1, item - 1, item * 2, -item, item // 2, item * 1000))
    elif kind == 2 and isinstance(container, list):
        container.insert(key, copy.deepcopy(choose.choice(container)))
    elif kind == 3 and isinstance(container, dict):
        container[str(choose.choice(_INTERESTING))] = container.pop(key)
    elif kind == 4 and len(container) > 1:
        other = choose.choice(list(container)) if isinstance(container, dict) else choose.randrange(len(container))
        container[key], container[other] = container[other], container[key]
    elif kind == 5 and isinstance(item, str) and item:
        at = choose.randrange(len(item))
        container[key] = item[:at] + choose.choice(("", "x", item, "\u0301")) + item[at + 1 :]
    else:
        container[key] = copy.deepcopy(choose.choice(_INTERESTING))
    return holder[0]


_STRUCTURED: tuple[Callable[[spx_cases.Parts, random.Random], None], ...] = (
    _mutate_document,
    _mutate_graph,
    _mutate_graph,
    _mutate_node,
    _mutate_node,
    _mutate_node,
    _mutate_attributes,
    _mutate_packed,
    _mutate_packed,
    _mutate_header,
    _mutate_metadata,
    _mutate_tensor,
    _mutate_tensor,
)


# -- trying one case ---------------------------------------------------------------------------------------------------


def attempt(path: Path, stage: str) -> str:
    """Put one file through; returns "accepted" or "refused: …", raises for anything that must not happen."""
    try:
        if stage == "read":
            read_spx(path).dense()
            return "accepted"
        from sparse_engine.convert import load

        executable = load(path)
    except FileFormatError as error:
        message = str(error)
        if path.name not in message:
            raise AssertionError(f"the message does not name the file: {message}") from error
        return f"refused: {_kind_of(message.replace(str(path), 'FILE'))}"
    if stage == "run":
        _call(executable)
    return "accepted"


def _call(executable: Any) -> None:
    graph = executable.graph
    batches = (1, 3) if graph.fixed_batch is None else (graph.fixed_batch,)
    for batch in batches:
        sizes = {name: _sizes(value, batch) for name, value in graph.values.items()}
        if any(size < 0 for shape in sizes.values() for size in shape):
            continue
        if sum(torch.Size(shape).numel() for shape in sizes.values()) > _RUN_LIMIT:
            continue
        inputs = [torch.zeros(sizes[name]).to(getattr(torch, graph.values[name].dtype)) for name in graph.inputs]
        try:
            executable(*inputs)
        except SparseEngineError:
            continue


def _sizes(value: Any, batch: int) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else size.at(batch) for size in value.shape)


def _kind_of(message: str) -> str:
    """The message without its particulars, so that kinds can be counted."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)", "…", message)
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", message)[:110]


# -- running many ------------------------------------------------------------------------------------------------------


def work(first: int, last: int, stage: str, state: Path) -> None:
    """The child: try the cases in turn, noting each number before it begins; print counts at the end."""
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, open(state, "r+b", buffering=0) as note:
        files = corpus(Path(folder), stage)
        path = Path(folder) / "case.spx"
        for content in files:  # everything is loaded and warm before memory is bounded
            path.write_bytes(content)
            if attempt(path, stage if content not in files[:2] else "read") != "accepted":
                raise AssertionError("a file of the corpus itself is refused")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for number in range(first, last):
            note.seek(0)
            note.write(number.to_bytes(8, "little"))
            path.write_bytes(make_case(number, files))
            signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_CASE)
            signal.alarm(_HANGS_AFTER)
            try:
                counts[attempt(path, stage)] += 1
            except Exception:
                print(json.dumps({"finding": number, "what": traceback.format_exc()}), flush=True)
                counts["FINDING"] += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
    print(json.dumps({"counts": counts}), flush=True)


def fuzz(minutes: float, stage: str, first: int, out: Path | None) -> dict[str, Any]:
    """Run children over successive numbers until the time is up.

    Returns:
        Counts by outcome, the findings, and the time.
    """
    counts: collections.Counter[str] = collections.Counter()
    findings: list[dict[str, Any]] = []
    start = time.monotonic()
    number, step = first, 2000
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "number"
        while time.monotonic() - start < 60 * minutes:
            state.write_bytes(bytes(8))
            arguments = ["--work", str(number), str(number + step), "--stage", stage, "--state", str(state)]
            command = [sys.executable, "-m", "tests.io.fuzz_spx", *arguments]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            for line in child.stdout.splitlines():
                entry = json.loads(line)
                if "counts" in entry:
                    counts.update(entry["counts"])
                else:
                    findings.append(entry)
            if child.returncode == 0:
                number += step
            else:
                died = int.from_bytes(state.read_bytes(), "little")
                if died < number:
                    raise RuntimeError(f"the child failed before its first case:\n{child.stderr[-3000:]}")
                how = f"the process ended with status {child.returncode}: {child.stderr[-500:]}"
                findings.append({"finding": died, "what": how})
                counts["FINDING"] += 1
                number = died + 1
            summary = _summary(stage, first, number, time.monotonic() - start, counts, findings)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                (out / f"fuzz_{stage}.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    return summary


def _summary(stage: str, first: int, last: int, seconds: float, counts: Any, findings: list[Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "cases": [first, last],
        "files": sum(counts.values()),
        "minutes": round(seconds / 60, 1),
        "accepted": counts["accepted"],
        "refused": sum(count for key, count in counts.items() if key.startswith("refused")),
        "findings": len(findings),
        "kinds_of_refusal": dict(
            sorted(
                ((key[9:], count) for key, count in counts.items() if key.startswith("refused")),
                key=lambda item: -item[1],
            )
        ),
        "first_findings": findings[:50],
    }


def _record(summary: dict[str, Any]) -> None:
    from bench import results_io
    from bench.rows import merged

    first, last = summary["cases"]
    row = {
        "stage": summary["stage"],
        "first case": first,
        "last case": last - 1,
        "minutes": summary["minutes"],
        "files": summary["files"],
        "loaded": summary["accepted"],
        "refused": summary["refused"],
        "kinds of refusal": len(summary["kinds_of_refusal"]),
        "findings": summary["findings"],
    }
    results_io.write(
        "fuzz_spx",
        rows=merged("fuzz_spx", [row], ("stage", "first case")),
        claim="Damaged .spx files load, or give one FileFormatError that names the file.",
        command="python -m tests.io.fuzz_spx --minutes 30 --stage run --first N --record",
        notes="A case follows from its number. A finding is any other exception, a crash, more than "
        f"{SECONDS_PER_CASE} seconds of processor time, or {EXTRA_MEMORY / 2**30:.1f} GiB beyond the idle process. "
        "Stage run: what loads is called as well. docs/spx.md says what became of findings.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--stage", choices=("read", "load", "run"), default="read")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--out", type=Path, help="folder for the summary")
    parser.add_argument("--record", action="store_true", help="write the outcome to bench/results/fuzz_spx.json")
    parser.add_argument("--case", type=int, help="repeat this one case and show what happens")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work, arguments.stage, arguments.state)
    elif arguments.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.spx"
            path.write_bytes(make_case(arguments.case, corpus(Path(folder), arguments.stage)))
            print(attempt(path, arguments.stage))
    else:
        summary = fuzz(arguments.minutes, arguments.stage, arguments.first, arguments.out)
        shown = {key: value for key, value in summary.items() if key != "kinds_of_refusal"}
        print(json.dumps(shown, indent=1))
        print(f"{len(summary['kinds_of_refusal'])} kinds of refusal")
        if arguments.record:
            _record(summary)
        if summary["findings"]:
            raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
