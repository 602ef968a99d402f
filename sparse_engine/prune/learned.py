"""Learned masks: a gate on every weight, trained with it by gradient descent and folded into scores for pruning."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_engine.errors import PruneError

from .masks import Ignore, prunable_weights


class Gate(nn.Module):
    """Base: a parametrisation ``w → w ⊙ gate``. ``openness`` is the gate's expected value, ``penalty`` what pushes it
    closed."""

    name: ClassVar[str]

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gate()

    def gate(self) -> Tensor:
        """The factor on each weight in this pass."""
        raise NotImplementedError

    def openness(self) -> Tensor:
        """The factor expected of each weight, 0 to 1, without randomness."""
        raise NotImplementedError

    def penalty(self, variance: float, size: float) -> Tensor:
        """``λ1 Σ p (1 − p) + λ2 Σ p`` with p the openness."""
        p = self.openness()
        return variance * (p * (1 - p)).sum() + size * p.sum()

    def set_progress(self, share: float) -> None:
        """Told the share of training done, for gates that harden."""

    def scores(self, weight: Tensor) -> Tensor:
        """``|w| · openness``, by which the weights are ranked at the end."""
        return weight.abs() * self.openness()

    def folded(self, weight: Tensor) -> Tensor:
        """The weight that stays when the gate is taken away (pruning sets the removed ones to zero)."""
        return weight


class BernoulliGate(Gate):
    """A probability p per weight; each training pass draws a mask of zeros and ones, with the gradient passed straight
    to p.

    In evaluation the mask is ``p ≥ 1/2``. The two-term penalty drives p towards 0 or 1 and towards 0 (after Srinivas et
    al., arXiv 1611.06694).

    At a weight that is exactly zero the loss does not depend on the mask (its gradient is w ⊙ ∂L/∂(w ⊙ m) = 0), so only
    the penalty acts there and closes the gate before the weight has begun to move: that is why ZerO's initialisation
    and a learned mask collapse together.
    Remedies: ``initial`` near 1, and penalties that warm up.
    """

    name = "bernoulli"

    def __init__(self, weight: Tensor, initial: float = 0.9) -> None:
        super().__init__()
        initial = min(max(initial, 1e-4), 1 - 1e-4)
        self.logits = nn.Parameter(torch.full_like(weight, math.log(initial / (1 - initial))))

    def openness(self) -> Tensor:
        return self.logits.sigmoid()

    def gate(self) -> Tensor:
        p = self.openness()
        hard = (torch.rand_like(p) < p).to(p) if self.training else (p >= 0.5).to(p)
        return hard + p - p.detach()


class ContinuousGate(Gate):
    """Continuous sparsification: ``σ(β s) / σ(s₀)``, β growing from 1 to 200 over training (arXiv 1912.04427)."""

    name = "continuous"

    def __init__(self, weight: Tensor, initial: float = 0.9, final_beta: float = 200.0) -> None:
        super().__init__()
        initial = min(max(initial, 1e-4), 1 - 1e-4)
        start = math.log(initial / (1 - initial))
        self.scale = 1 / initial
        self.final_beta = final_beta
        self.beta = 1.0
        self.logits = nn.Parameter(torch.full_like(weight, start))

    def openness(self) -> Tensor:
        return (self.beta * self.logits).sigmoid()

    def gate(self) -> Tensor:
        return self.openness() * self.scale

    def set_progress(self, share: float) -> None:
        self.beta = self.final_beta**share

    def folded(self, weight: Tensor) -> Tensor:
        return weight * self.gate().detach()


class SoftThreshold(Gate):
    """STR: ``sign(w) · relu(|w| − σ(s))`` with one learned threshold per layer (arXiv 2002.03231).

    The penalty is the decay of s towards 0, ``λ2 s²/2``, which raises the threshold from its small start to at most
    1/2.
    """

    name = "str"

    def __init__(self, weight: Tensor, initial: float = 0.9) -> None:
        super().__init__()
        # the starting threshold leaves the share `initial` of the weights
        start = weight.detach().abs().flatten().float().quantile(1 - initial) if weight.numel() < 2**24 else 1e-3
        start = float(min(max(float(start), 1e-4), 0.4))
        self.threshold = nn.Parameter(weight.new_tensor(math.log(start / (1 - start))))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.sign() * torch.relu(weight.abs() - self.threshold.sigmoid())

    def openness(self) -> Tensor:
        return torch.ones_like(self.threshold)

    def gate(self) -> Tensor:
        return self.openness()

    def penalty(self, variance: float, size: float) -> Tensor:
        return size * self.threshold.square() / 2

    def scores(self, weight: Tensor) -> Tensor:
        return weight.abs()

    def folded(self, weight: Tensor) -> Tensor:
        return self.forward(weight).detach()


class HardConcreteGate(Gate):
    """L0 by hard-concrete gates: a stretched, clipped concrete variable that is exactly 0 or 1 with some probability
    (arXiv 1712.01312).

    The penalty's p is the probability that the gate is not 0.
    """

    name = "hard_concrete"
    beta, low, high = 2 / 3, -0.1, 1.1

    def __init__(self, weight: Tensor, initial: float = 0.9) -> None:
        super().__init__()
        initial = min(max(initial, 1e-4), 1 - 1e-4)
        start = math.log(initial / (1 - initial)) + self.beta * math.log(-self.low / self.high)
        self.logits = nn.Parameter(torch.full_like(weight, start))

    def openness(self) -> Tensor:
        return (self.logits - self.beta * math.log(-self.low / self.high)).sigmoid()

    def gate(self) -> Tensor:
        if self.training:
            u = torch.rand_like(self.logits).clamp(1e-6, 1 - 1e-6)
            s = ((u.log() - (1 - u).log() + self.logits) / self.beta).sigmoid()
        else:
            s = self.logits.sigmoid()
        return (s * (self.high - self.low) + self.low).clamp(0, 1)

    def scores(self, weight: Tensor) -> Tensor:
        return weight.abs() * self._settled()

    def folded(self, weight: Tensor) -> Tensor:
        return weight * self._settled()

    def _settled(self) -> Tensor:
        return (self.logits.detach().sigmoid() * (self.high - self.low) + self.low).clamp(0, 1)


GATES: dict[str, type[Gate]] = {
    kind.name: kind for kind in (BernoulliGate, ContinuousGate, SoftThreshold, HardConcreteGate)
}


class LearnedMasks:
    """Gates on all prunable weights of a model.

    Example::

        gates = LearnedMasks(model, "bernoulli", initial=0.9, variance_penalty=1e-5, size_penalty=1e-5)
        optimizer = torch.optim.SGD([*model.parameters()], lr=0.1)          # the gates are among them
        (loss(model(x), y) + gates.penalty()).backward()
        scores = gates.fold_()                                               # the model is plain again
        se.prune(model, sparsity=0.99, criterion=se.prune.GivenScores(scores))

    The gates are parametrisations of the weights (``torch.nn.utils.parametrize``), so the model is used as before.

    Args:
        model: changed in place until :meth:`fold_`.
        kind: a name in ``GATES``.
        initial: openness at the start.
        variance_penalty, size_penalty: λ1 and λ2.
        penalty_warmup: share of training over which both grow from 0.
        ignore: as in :func:`sparse_engine.prune`.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "bernoulli",
        *,
        initial: float = 0.9,
        variance_penalty: float = 1e-5,
        size_penalty: float = 1e-5,
        penalty_warmup: float = 0.0,
        ignore: Ignore = (),
    ) -> None:
        if kind not in GATES:
            raise PruneError(f"gates of kind {kind!r} are not known; use one of {', '.join(GATES)}")
        weights = prunable_weights(model, ignore)
        if not weights:
            raise PruneError("the model has no prunable weight to put a gate on")
        self.model = model
        self.variance_penalty = variance_penalty
        self.size_penalty = size_penalty
        self.penalty_warmup = penalty_warmup
        self.progress = 0.0
        self.gates: dict[str, Gate] = {}
        self.order: dict[str, list[str]] = {}
        for name, weight in weights.items():
            module_name, _, attribute = name.rpartition(".")
            gate = GATES[kind](weight, initial)
            gate.train(model.training)
            module = model.get_submodule(module_name)
            self.order[name] = list(module._parameters)
            parametrize.register_parametrization(module, attribute, gate, unsafe=True)
            self.gates[name] = gate

    def parameters(self) -> list[nn.Parameter]:
        """The gates' own parameters."""
        return [parameter for gate in self.gates.values() for parameter in gate.parameters()]

    def set_progress(self, share: float) -> None:
        """Tell the gates which share of their training is done."""
        self.progress = share
        for gate in self.gates.values():
            gate.set_progress(share)

    def penalty(self) -> Tensor:
        """The regulariser of all gates, to be added to the loss."""
        factor = 1.0 if self.penalty_warmup <= 0 else min(1.0, self.progress / self.penalty_warmup)
        parts = [
            gate.penalty(self.variance_penalty * factor, self.size_penalty * factor) for gate in self.gates.values()
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def openness(self) -> float:
        """Mean openness over all weights."""
        sums = [(float(gate.openness().sum()), gate.openness().numel()) for gate in self.gates.values()]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    @torch.no_grad()
    def fold_(self) -> dict[str, Tensor]:
        """Take the gates away, leaving plain weights, and return the scores ``|w ⊙ mask|`` by weight name.

        The weight that stays is the one the gate leaves (for Bernoulli gates the weight itself: the scores decide).
        """
        scores = {}
        for name, gate in self.gates.items():
            module_name, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(module_name)
            original = module.parametrizations[attribute].original
            scores[name] = gate.scores(original).detach().clone()
            folded = gate.folded(original).detach().clone()
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            getattr(module, attribute).data.copy_(folded)
            # removal puts the parameter at the end; state dicts and optimisers expect the order it had
            module._parameters = {key: module._parameters[key] for key in self.order[name]}
        self.gates = {}
        return scores
