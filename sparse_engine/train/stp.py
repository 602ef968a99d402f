"""STP: enhanced sparsification by stimulative training (arXiv 2403.06417).

One training run gives a network whose smaller subnet needs no fine-tuning:

* *stimulative training*: every step trains the full network on the labels and one subnet on the full network's
  outputs. No penalty pushes weights down: those of the subnet grow, the rest stay, and removing the rest costs
  little.
* *knowledge-guided shrinking*: a pool of depths, each with its own widths, shrinks step by step; what goes is the
  step whose subnet lost the least agreement with the full network for the operations it saved.
* *mutating expansion*: each step also trains a random larger subnet on the full network's outputs.

The paper has no public code. Facts about the loss and the overall search are its own; step sizes, the share of
training for each part and every tie are choices made here, named in `StpPart`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.distill.batch import Batch, Forward
from sparse_engine.distill.functional import kd_loss
from sparse_engine.distill.objectives import Objective
from sparse_engine.errors import PruneError
from sparse_engine.prune.structured.targets import Cost, Latency, cost_named, time_layer

from .loop import Mechanism, Phase
from .recipe import StpPart, check_stp
from .supernet import Subnet, Supernet, magnitudes, recalibrate_


@dataclass
class Member:
    """One depth of the pool with its widths and what is known about its next steps.

    Args:
        depths: blocks kept in each stage.
        widths: units kept in each group, now.
        sums, counts: divergence from the full network by group that would be one step narrower.
        total, samples: divergence of the member itself.
        turn: the group that is tried next.
        done: the target is reached.
    """

    depths: tuple[int, ...]
    widths: list[int]
    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    samples: int = 0
    turn: int = 0
    done: bool = False

    @property
    def subnet(self) -> Subnet:
        """The member as a subnet."""
        return Subnet(self.depths, tuple(self.widths))

    def forget(self) -> None:
        """Start the statistics anew, after a cut."""
        self.sums, self.counts = [0.0] * len(self.widths), [0] * len(self.widths)


class StimulativeTraining(Objective):
    """``CE(full) + λ T² KL(full ‖ subnet)`` with a subnet that a search chooses; the objective of STP.

    Example::

        supernet = Supernet(model, x)
        objective = StimulativeTraining(supernet, StpPart(target=0.5))
        fit(Phase("train", model, objective, source, part, epochs, [objective.mechanism()]))
        network = objective.finish(inputs for inputs, _ in loader)

    The search needs to know how far training is: pass `mechanism` to the phase, or call `progress` yourself.

    Args:
        supernet: of the model that is trained.
        part: the settings.
        cost: instead of the one that ``part.cost`` names (for ``latency`` the sum of the layers' times as executables).
        seed: of everything drawn.
        steps: optimiser steps of the whole training, for the step size of the search; `mechanism` fills it in.

    Raises:
        PruneError: the target is out of reach.
    """

    def __init__(
        self, supernet: Supernet, part: StpPart, *, cost: Cost | None = None, seed: int = 0, steps: int | None = None
    ) -> None:
        check_stp(part)
        self.supernet, self.part = supernet, part
        self.cost = cost or (Latency(measure=agreed_time) if part.cost == "latency" else cost_named(part.cost))
        self.steps = steps
        self.share = 0.0
        self.generator = torch.Generator().manual_seed(seed)
        self.full_cost = supernet.cost(supernet.full, self.cost)
        self.limit = part.target if self.cost.unit == "ms" else part.target * self.full_cost
        least = supernet.cost(self._smallest(), self.cost)
        if least > self.limit:
            raise PruneError(
                f"the target of {self.limit:,.6g} {self.cost.unit} is out of reach: the smallest "
                f"subnet needs {least:,.6g} of {self.full_cost:,.6g}; "
                "raise stp.target"
            )
        self.pool: list[Member] = []
        self.history: list[dict[str, Any]] = []
        self._step_units: list[int] = []
        self._cut_share = 0.0

    # the loss

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        self._advance()
        part = self.part
        logits = forward(batch.inputs)
        caught = getattr(forward, "caught", None)  # training accuracy is that of the full network
        loss = kd_loss(logits, batch.targets, sample_weights=batch.weights)
        subnet, record = self._choose()
        divergence = self._divergence(forward, batch, logits, subnet)
        loss = loss + part.weight * divergence
        record(self._average(float(divergence.detach())))
        if part.expansion and subnet != self.supernet.full:
            larger = self.supernet.sample(self.generator, subnet)
            loss = loss + part.weight * self._divergence(forward, batch, logits, larger)
        if caught is not None:
            forward.caught = caught  # type: ignore[attr-defined]
        return loss

    def _divergence(self, forward: Forward, batch: Batch, teacher: Tensor, subnet: Subnet) -> Tensor:
        with self.supernet.active(subnet):
            student = forward(batch.inputs)
        teacher = teacher.detach()
        if self.part.divergence == "normalised":
            shape = teacher.shape[-1:]
            teacher, student = F.layer_norm(teacher, shape), F.layer_norm(student, shape)
        return kd_loss(  # type: ignore[return-value]
            student,
            teacher_logits=teacher,
            temperature=self.part.temperature,
            hard_weight=0.0,
            soft_weight=1.0,
            sample_weights=batch.weights,
        )

    def _average(self, value: float) -> float:
        """The mean over processes, so that all of them make the same cuts."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(tensor)
        return float(tensor) / torch.distributed.get_world_size()

    # the search

    @property
    def searching(self) -> bool:
        """Whether some member of the pool is still above the target."""
        return any(not member.done for member in self.pool)

    def progress(self, share: float) -> None:
        """Tell the share of training that is done, before each step."""
        self.share = share

    def mechanism(self) -> Mechanism:
        """What tells this objective how far training is; pass it to the phase."""
        return _Progress(self)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.share = max(self.share, epoch / max(1, epochs))

    def end_epoch(self) -> None:
        subnet = self.best().subnet if self.pool else self._half()
        kept, dropped = magnitudes(self.supernet, subnet)
        self.history.append(
            {
                "share": self.share,
                "members": len(self.pool),
                "cost": self.supernet.cost(subnet, self.cost) / self.full_cost,
                "kept_magnitude": kept,
                "dropped_magnitude": dropped,
            }
        )

    def best(self) -> Member:
        """The member that agrees best with the full network (those not yet sampled come last)."""
        return min(self.pool, key=lambda member: member.total / member.samples if member.samples else math.inf)

    def finish(self, batches: Iterable[Any], check: Any = None) -> nn.Module:
        """End the search and take the result out, with batch norm recalibrated.

        Args:
            batches: inputs for the recalibration; the first ``part.calibration`` are used.
            check: inputs on which the extracted network is compared with the sliced one; the first batch when None.

        Returns:
            The subnet as a module of its own; `subnet` says which.

        Raises:
            PruneError: the extracted network differs from the sliced one by more than 1e-5 of the output's scale.
        """
        if not self.pool:
            self._open_pool()
        self._force()
        self.subnet = self.best().subnet
        batches = list(itertools.islice(batches, self.part.calibration))
        network = self.supernet.extract(self.subnet)
        verify_extraction(self.supernet, self.subnet, network, batches[0] if check is None else check)
        return recalibrate_(network, batches)

    def summary(self) -> dict[str, Any]:
        """The result and the curves as plain data; after `finish`."""
        return {
            "depths": list(self.subnet.depths),
            "widths": list(self.subnet.widths),
            "groups": [group.name for group in self.supernet.groups],
            "cost": self.supernet.cost(self.subnet, self.cost),
            "full_cost": self.full_cost,
            "unit": self.cost.unit,
            "history": self.history,
        }

    def _half(self) -> Subnet:
        full = self.supernet.full
        return Subnet(full.depths, tuple(max(1, width // 2) for width in full.widths))

    def _choose(self) -> tuple[Subnet, Callable[[float], None]]:
        """The subnet of this step, and who wants to know its divergence."""
        if not self.pool:
            return self.supernet.sample(self.generator, self._smallest()), lambda value: None
        member = self.pool[int(torch.randint(len(self.pool), (), generator=self.generator))]
        if member.done:

            def note(value: float) -> None:
                member.total += value
                member.samples += 1

            return member.subnet, note
        group = self._next_group(member)
        widths = list(member.widths)
        widths[group] = self._narrower(member, group)

        def record(value: float) -> None:
            member.sums[group] += value
            member.counts[group] += 1
            if all(member.counts[g] >= self.part.rounds for g in self._candidates(member)):
                self._cut(member)

        return Subnet(member.depths, tuple(widths)), record

    def _advance(self) -> None:
        if not self.pool and self.share >= self.part.warmup:
            self._open_pool()
        if self.pool and self.searching and self.share >= self.part.search:
            self._force()
        if self.pool and not self.searching:
            self._thin_pool()

    def _smallest(self) -> Subnet:
        full, part = self.supernet.full, self.part
        depths = tuple(0 for _ in full.depths) if part.depth else full.depths
        widths = tuple(max(1, math.ceil(part.floor * width)) for width in full.widths) if part.width else full.widths
        return Subnet(depths, widths)

    def _open_pool(self) -> None:
        """Fix the order of the units and list the depths that are still above the target."""
        self.supernet.set_order("l1")
        full = self.supernet.full
        depths = [full.depths]
        if self.part.depth:
            depths = list(itertools.product(*(range(most + 1) for most in full.depths)))
        priced = {d: self.supernet.cost(Subnet(d, full.widths), self.cost) for d in depths}
        if self.part.width:
            floor = self._smallest().widths
            able = [
                d
                for d in depths
                if priced[d] >= self.limit and self.supernet.cost(Subnet(d, floor), self.cost) <= self.limit
            ]
        else:  # depth alone: the depths that just meet the target
            met = sorted((d for d in depths if priced[d] <= self.limit), key=lambda d: -priced[d])
            able = met[: self.part.pool]
        if not able:
            able = [min(depths, key=lambda d: (priced[d] < self.limit, abs(priced[d] - self.limit)))]
        if len(able) > self.part.pool:
            deepest = max(able, key=lambda d: (sum(d), d))
            rest = [d for d in able if d != deepest]
            chosen = torch.randperm(len(rest), generator=self.generator)[: self.part.pool - 1].tolist()
            able = [deepest, *(rest[i] for i in sorted(chosen))]
        self.pool = [Member(d, list(full.widths)) for d in able]
        for member in self.pool:
            member.forget()
            member.done = self.supernet.cost(member.subnet, self.cost) <= self.limit
        self._cut_share = self._share_of_a_cut()
        self._step_units = self._steps()

    def _share_of_a_cut(self) -> float:
        """The share of the full cost that one cut has to save for the search to end in time."""
        if self.part.step is not None:
            return self.part.step
        window = (self.part.search - self.part.warmup) * (self.steps or 1000) * 0.8
        cuts = window / max(1, len(self.pool) * self.part.rounds * max(1, len(self.supernet.full.widths)))
        excess = max((self.supernet.cost(m.subnet, self.cost) for m in self.pool), default=0.0) / self.full_cost
        return max(0.005, (excess - self.limit / self.full_cost) / max(1.0, cuts))

    def _steps(self) -> list[int]:
        """Units that one step takes from each group: as many as save the share of a cut, at most a quarter."""
        full = self.supernet.full
        share = min(0.25, self._cut_share)
        units = []
        for group, width in enumerate(full.widths):
            half = max(1, width // 2)
            widths = list(full.widths)
            widths[group] = width - half if width > half else width
            saved = self.full_cost - self.supernet.cost(Subnet(full.depths, tuple(widths)), self.cost)
            per_unit = max(saved / half, 1e-12)
            units.append(int(min(max(1, width // 4), max(1, math.ceil(share * self.full_cost / per_unit)))))
        return units

    def _candidates(self, member: Member) -> list[int]:
        floor = self._smallest().widths
        return [
            g for g, width in enumerate(member.widths) if width > floor[g] and self.supernet.lives(g, member.depths)
        ]

    def _next_group(self, member: Member) -> int:
        candidates = self._candidates(member)
        waiting = [g for g in candidates if member.counts[g] < self.part.rounds] or candidates
        group = next((g for g in waiting if g >= member.turn), waiting[0])
        member.turn = group + 1
        return group

    def _narrower(self, member: Member, group: int) -> int:
        return max(self._smallest().widths[group], member.widths[group] - self._step_units[group])

    def _cut(self, member: Member) -> None:
        """Take the steps with the least divergence, beyond what all steps have in common, per cost saved; each group
        at most one step, until the share of the cost is saved that one cut is to save."""
        candidates = self._candidates(member)
        now = self.supernet.cost(member.subnet, self.cost)

        known = {g: member.sums[g] / member.counts[g] for g in candidates if member.counts[g]}
        # what all candidates share is the divergence of the member itself; it says nothing about where to cut
        shared = min(known.values(), default=0.0)
        usual = sum(known.values()) / len(known) - shared if known else 0.0
        usual = max(
            usual, 1e-12
        )  # a quarter of it on top keeps the cheapest step from being free, whatever little it saves

        def price(group: int) -> float:
            widths = list(member.widths)
            widths[group] = self._narrower(member, group)
            saved = max(now - self.supernet.cost(Subnet(member.depths, tuple(widths)), self.cost), 1e-12)
            if group in known:
                return (known[group] - shared + usual / 4) / saved
            return 2 * usual * self.supernet.full.widths[group] / member.widths[group] / saved  # unsampled: spread them

        if self.part.guidance:
            order = sorted(candidates, key=price)
        else:
            order = [candidates[i] for i in torch.randperm(len(candidates), generator=self.generator).tolist()]
        enough = max(self.limit, now - self._cut_share * self.full_cost)
        before, cut = list(member.widths), []
        for group in order:
            member.widths[group] = self._narrower(member, group)
            cut.append(group)
            if self.supernet.cost(member.subnet, self.cost) <= enough:
                break
        if self.supernet.cost(member.subnet, self.cost) <= self.limit:
            self._give_back(member, before, cut)
        member.forget()
        member.done = self.supernet.cost(member.subnet, self.cost) <= self.limit or not self._candidates(member)

    def _give_back(self, member: Member, before: list[int], cut: list[int]) -> None:
        """The last cut goes below the target: what of it is not needed comes back, the dearest step first."""
        for group in reversed(cut):
            while member.widths[group] < before[group]:
                member.widths[group] += 1
                if self.supernet.cost(member.subnet, self.cost) > self.limit:
                    member.widths[group] -= 1
                    break

    def _force(self) -> None:
        """Out of time: cut with what is known."""
        for member in self.pool:
            while not member.done:
                self._cut(member)

    def _thin_pool(self) -> None:
        """Drop members one by one, evenly until `settle`; always the one that agrees least."""
        if not hasattr(self, "_opened"):
            self._opened = len(self.pool)
            self._began = self.share
            for member in self.pool:  # who was done early was measured against a network that had learnt less
                member.total, member.samples = 0.0, 0
        span = max(1e-9, self.part.settle - self._began)
        left = min(1.0, max(0.0, (self.share - self._began) / span))
        allowed = max(self.part.members, round(self._opened - left * (self._opened - self.part.members)))
        while len(self.pool) > allowed and all(member.samples for member in self.pool):
            self.pool.remove(self._worst())

    def _worst(self) -> Member:
        return max(self.pool, key=lambda member: member.total / member.samples)

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "share": self.share,
            "order": [torch.from_numpy(order) for order in self.supernet.order],
            "pool": [vars(member).copy() for member in self.pool],
            "step_units": self._step_units,
            "cut_share": self._cut_share,
            "opened": (self._opened, self._began) if hasattr(self, "_opened") else None,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.share = state["share"]
        self.supernet.order = [order.numpy() for order in state["order"]]
        self.supernet.forget()
        self.pool = [
            Member(**{**entry, "depths": tuple(entry["depths"]), "widths": list(entry["widths"])})
            for entry in state["pool"]
        ]
        self._step_units = list(state["step_units"])
        self._cut_share = state.get("cut_share", 0.0)  # states of old have none: one group a cut
        if state["opened"] is not None:
            self._opened, self._began = state["opened"]
        self.history = list(state["history"])


class _Progress(Mechanism):
    """Tells a `StimulativeTraining` the share of its phase that is done."""

    def __init__(self, objective: StimulativeTraining) -> None:
        self.objective = objective

    def attach(self, phase: Phase) -> None:
        self.objective.steps = phase.total_steps

    def progress(self, share: float) -> None:
        self.objective.progress(share)


@torch.no_grad()
def verify_extraction(supernet: Supernet, subnet: Subnet, network: nn.Module, inputs: Any) -> float:
    """The largest difference between a sliced subnet and its extracted network, as a share of the output's scale.

    Raises:
        PruneError: it is more than 1e-5.
    """
    training = supernet.model.training, network.training
    supernet.model.eval()
    network.eval()
    with supernet.active(subnet):
        sliced = supernet.model(inputs)
    extracted = network(inputs)
    supernet.model.train(training[0])
    network.train(training[1])
    error = float((sliced - extracted).abs().max() / sliced.abs().max().clamp_min(torch.finfo(sliced.dtype).tiny))
    if not error <= 1e-5:
        raise PruneError(
            f"the extracted network differs from the sliced subnet by {error:.3g} of the output's "
            "scale; please report this model"
        )
    return error


def agreed_time(layer: nn.Module, x: Tensor) -> float:
    """The first process's `executable_time` of a layer, on every process: all of them have to make the same cuts."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return executable_time(layer, x)
    box = [executable_time(layer, x) if torch.distributed.get_rank() == 0 else 0.0]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def executable_time(layer: nn.Module, x: Tensor) -> float:
    """The median time in milliseconds of one layer as a CPU executable; what ``stp.cost=latency`` measures.

    Example::

        prune_channels(model, x, target=4.0, cost=Latency(measure=executable_time))
    """
    from sparse_engine.convert import convert

    return time_layer(convert(layer, (x,), verify=False), x)
