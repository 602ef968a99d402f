"""Schedules: the path from dense to the wanted density. A schedule is a small object that lists or evaluates
densities.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_engine.errors import PruneError


class Schedule:
    """Base: ``densities(final)`` are the densities of successive pruning rounds, the last one being the final
    density.
    """

    def densities(self, final: float) -> list[float]:
        """Densities of the rounds, decreasing, ending in ``final``."""
        raise NotImplementedError


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything in one round."""

    def densities(self, final: float) -> list[float]:
        return [final]


@dataclass(frozen=True)
class Iterative(Schedule):
    """The exponential ladder ``d^((r+1)/R)``: every round removes the same share of what is left.

    Example::

        Iterative(3).densities(0.001)      # [0.1, 0.01, 0.001]

    Args:
        rounds: R, at least 1.
    """

    rounds: int

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise PruneError(f"rounds is {self.rounds}; at least one is needed")

    def densities(self, final: float) -> list[float]:
        ladder = [final ** ((i + 1) / self.rounds) for i in range(self.rounds)]
        return [*ladder[:-1], final]


@dataclass(frozen=True)
class Cubic(Schedule):
    """Gradual pruning during training: ``s(t) = s_f + (s_i − s_f)(1 − (t − begin)/(end − begin))³`` (arXiv 1710.01878).

    Example::

        schedule = Cubic(begin=0, end=1000, every=100)
        schedule.sparsity(500, final=0.9)          # 0.7875
        schedule.due(500)                          # True

    Args:
        begin: step of the first pruning.
        end: step at which the final sparsity is reached.
        every: steps between prunings.
        initial: sparsity before ``begin``.
    """

    begin: int
    end: int
    every: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end or self.every < 1:
            raise PruneError(f"a cubic schedule needs 0 <= begin < end and every >= 1; got {self}")

    def sparsity(self, step: int, final: float) -> float:
        """The sparsity that holds after ``step``."""
        share = min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.initial if share == 0 else final + (self.initial - final) * (1 - share) ** 3

    def due(self, step: int) -> bool:
        """Whether pruning happens after ``step``; always at ``end``, so that the final sparsity is met."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def densities(self, final: float) -> list[float]:
        steps = [step for step in range(self.begin, self.end + 1) if self.due(step)]
        return [*(1 - self.sparsity(step, 1 - final) for step in steps[:-1]), final]


@dataclass(frozen=True)
class Periodic(Schedule):
    """A fixed list of (step, sparsity) with training in between, e.g. iterative magnitude pruning.

    Example::

        Periodic.iterative(rounds=3, every=500).sparsity(1000, final=0.999)     # 0.99

    Args:
        points: (step, share of the ladder 0..1), increasing; at share q the density is ``final^q``.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def iterative(cls, rounds: int, every: int, begin: int = 0) -> Periodic:
        """R prunings, ``every`` steps apart, along the exponential ladder."""
        if rounds < 1 or every < 1:
            raise PruneError(f"rounds={rounds} and every={every} have to be at least 1")
        return cls(
            tuple((begin + (i + 1) * every - every if begin else i * every, (i + 1) / rounds) for i in range(rounds))
        )

    def sparsity(self, step: int, final: float) -> float:
        """The sparsity that holds after ``step``."""
        share = max((q for at, q in self.points if at <= step), default=0.0)
        return final if share == 1 else 1 - (1 - final) ** share

    def due(self, step: int) -> bool:
        """Whether pruning happens after ``step``."""
        return any(step == at for at, _ in self.points)

    def densities(self, final: float) -> list[float]:
        return [final if q == 1 else final**q for _, q in self.points]
