"""Which backends an op has, which one runs a call, and why the others do not.

Example:
    >>> from sparse_engine.ops import registry
    >>> @registry.register("negate", "torch", why_not=lambda x: [])
    ... def negate(x):
    ...     return -x
    >>> registry.choose("negate", "auto", 3).backend
    'torch'

A candidate answers `why_not(*inputs)` with the reasons why it cannot run exactly this call; an empty list means that it
can. `impl="auto"` takes the first candidate without a reason, in the order of `BACKENDS`. The environment variable
`SPARSE_ENGINE_IMPL` (for tests and for narrowing down a fault), for example
`SPARSE_ENGINE_IMPL=sparse_linear:torch,sparse_conv2d:cpu`, replaces "auto" for an op and its gradients.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparse_engine.errors import BackendError

__all__ = ["BACKENDS", "Candidate", "Explanation", "candidates", "choose", "explain", "ops", "register"]

# Fastest first; "torch" runs everywhere.
BACKENDS = ("cuda", "triton", "cpu", "torch")
_GRADIENTS = ("_input_grad", "_weight_grad", "_backward")
_ENVIRONMENT = "SPARSE_ENGINE_IMPL"


@dataclass(frozen=True)
class Candidate:
    """One implementation of one op."""

    op: str
    backend: str
    why_not: Callable[..., list[str]]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Explanation:
    """What would run a call, and what keeps every other candidate from it; prints as a small table."""

    op: str
    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'nothing can run this call'}"]
        for backend, reasons in self.reasons.items():
            state = "; ".join(reasons) if reasons else "chosen" if backend == self.chosen else "can run"
            lines.append(f"  {backend:<7} {state}")
        return "\n".join(lines)


_candidates: dict[str, list[Candidate]] = {}


def register(
    op: str, backend: str, *, why_not: Callable[..., list[str]]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that runs `op` on `backend`; both functions take the op's inputs, without `impl`.

    Raises:
        BackendError: when the backend is unknown or already has an implementation.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r} for {op}; one of {', '.join(BACKENDS)} expected")
    known = _candidates.setdefault(op, [])
    if any(candidate.backend == backend for candidate in known):
        raise BackendError(f"{op} already has a {backend} implementation")

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        known.append(Candidate(op, backend, why_not, run))
        known.sort(key=lambda candidate: BACKENDS.index(candidate.backend))
        return run

    return add


def ops() -> list[str]:
    """Return the names of all registered ops, sorted."""
    return sorted(_candidates)


def candidates(op: str) -> list[Candidate]:
    """Return an op's candidates, in the order in which "auto" tries them.

    Raises:
        BackendError: for an unknown op.
    """
    if op not in _candidates:
        raise BackendError(f"there is no op {op!r}; known are {', '.join(ops())}")
    return list(_candidates[op])


def choose(op: str, impl: str, *inputs: Any) -> Candidate:
    """Return the candidate that runs this call.

    Args:
        op: the op's name.
        impl: "auto", or the name of a backend.
        inputs: the op's inputs, as its candidates take them.

    Raises:
        BackendError: when the backend asked for, or every backend, has a reason against it; the message lists them all.
    """
    if impl == "auto":
        impl = forced(op) or impl
    for candidate in _candidates.get(op, ()):
        if impl in ("auto", candidate.backend) and not candidate.why_not(*inputs):
            return candidate
    reasons = {candidate.backend: candidate.why_not(*inputs) for candidate in candidates(op)}
    wanted = "no backend can run this call" if impl == "auto" else f"backend {impl!r} cannot run this call"
    if impl != "auto":
        reasons.setdefault(impl, ["not implemented for this op"])
    table = str(Explanation(op, None, reasons)).split("\n", 1)[-1]
    raise BackendError(f"{op}: {wanted}. Candidates:\n{table}")


def explain(op: str, *inputs: Any) -> Explanation:
    """Say which candidate "auto" takes for these inputs, and why not the others.

    Example:
        >>> print(explain("sparse_linear", *inputs))
        sparse_linear: cpu
          cpu     chosen
          torch   can run
    """
    reasons = {candidate.backend: candidate.why_not(*inputs) for candidate in candidates(op)}
    only = forced(op)
    if only is not None:
        for backend in reasons:
            if backend != only:
                reasons[backend] = [*reasons[backend], f"{_ENVIRONMENT} asks for {only}"]
    chosen = next((backend for backend, against in reasons.items() if not against), None)
    return Explanation(op, chosen, reasons)


def forced(op: str) -> str | None:
    """Return the backend that `SPARSE_ENGINE_IMPL` demands for an op; a gradient follows its op unless named."""
    text = os.environ.get(_ENVIRONMENT)
    if not text:
        return None
    demands = {}
    for entry in text.split(","):
        name, _, backend = entry.strip().partition(":")
        if backend not in BACKENDS or name not in _candidates:
            raise BackendError(
                f"{_ENVIRONMENT}={text!r}: {entry.strip()!r} is not op:backend with an op of {', '.join(ops())} and a "
                f"backend of {', '.join(BACKENDS)}"
            )
        demands[name] = backend
    family = next((op.removesuffix(suffix) for suffix in _GRADIENTS if op.endswith(suffix)), op)
    return demands.get(op) or demands.get(family)
