"""A network and all the smaller networks inside it: some blocks of every stage, some units of every group, the weights
shared."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from sparse_engine.errors import PruneError
from sparse_engine.prune.structured import CompactionSpec, Group, analyse, capture, channel_scores, find_groups, removal
from sparse_engine.prune.structured.axes import Removed
from sparse_engine.prune.structured.capture import ExampleInputs, operator_name, shape_of
from sparse_engine.prune.structured.compaction import adaptable, slicing_spec
from sparse_engine.prune.structured.spec import replaced_class, tensor_owners
from sparse_engine.prune.structured.targets import Cost

_CACHED = 512
T = TypeVar("T")


@dataclass(frozen=True)
class Subnet:
    """One network of a supernet.

    Args:
        depths: blocks kept in each stage, 0 to the number of blocks that may be left out.
        widths: units kept in each group.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]


class Supernet:
    """A model as the family of its subnets.

    Example::

        supernet = Supernet(model, torch.randn(1, 3, 32, 32))
        small = Subnet(tuple(0 for _ in supernet.stages), tuple(len(group) // 2 for group in supernet.groups))
        with supernet.active(small):
            logits = model(x)              # the sliced network, gradients flow into the shared weights
        network = supernet.extract(small)  # the same as a smaller module of its own

    Width: the units of every group have an order (`order`), a subnet keeps a prefix of it. Depth: the blocks of a stage
        that can be left out because
    they are residual and keep their input's shape; a subnet keeps a prefix of them, and what comes before them in the
    stage always stays.

    Args:
        model: trained in place; the supernet holds no weights of its own.
        example_inputs: as for `sparse_engine.prune.structured.capture`.
        ignore: tensors or modules whose widths stay.

    Raises:
        CaptureError: the model cannot be captured.
        PruneError: it has neither groups nor blocks to leave out.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, ignore: Sequence[str] = ()) -> None:
        self.model = model
        frozen = copy.deepcopy(model).eval()
        self.analysis = analyse(capture(frozen, example_inputs))
        self.groups, self._attributes, self.notes = adaptable(
            self.analysis, frozen, find_groups(self.analysis, ignore), example_inputs
        )
        self.stages = droppable_blocks(self.analysis.program, frozen)
        if not self.groups and not self.stages:
            raise PruneError(
                f"{type(model).__name__} has no group of channels and no residual block that could be removed"
            )
        self.order: list[NDArray[np.int64]] = [np.arange(len(group)) for group in self.groups]
        self._owners: list[str | None] = [self._block_of(group) for group in self.groups]
        self._removals: OrderedDict[Subnet, Removed] = OrderedDict()
        self._specs: OrderedDict[Subnet, CompactionSpec] = OrderedDict()

    @property
    def full(self) -> Subnet:
        """The whole network."""
        return Subnet(tuple(len(stage) for stage in self.stages), tuple(len(group) for group in self.groups))

    def set_order(self, criterion: str = "l1", **options: Any) -> None:
        """Order the units of every group by importance, the most important first; see `channel_scores`."""
        scores = channel_scores(self.model, self.groups, criterion, normaliser="none", **options)
        self.order = [torch.argsort(values, descending=True, stable=True).numpy() for values in scores]
        self.forget()

    def forget(self) -> None:
        """Drop what is remembered of subnets; needed after `order` was set by hand."""
        self._removals.clear()
        self._specs.clear()

    def skipped(self, subnet: Subnet) -> list[str]:
        """Paths of the blocks that a subnet leaves out."""
        return [path for stage, depth in zip(self.stages, subnet.depths, strict=True) for path in stage[depth:]]

    def lives(self, group: int, depths: Sequence[int]) -> bool:
        """Whether a group is part of the subnets of a depth: its block may be left out."""
        block = self._owners[group]
        return block is None or all(
            block not in stage[depth:] for stage, depth in zip(self.stages, depths, strict=True)
        )

    def removed(self, subnet: Subnet) -> Removed:
        """The removed indices of every axis.

        Raises:
            PruneError: the subnet's sizes do not fit the network.
        """
        full = self.full
        for kept, most, what in ((subnet.depths, full.depths, "depths"), (subnet.widths, full.widths, "widths")):
            least = 0 if what == "depths" else 1
            if len(kept) != len(most) or any(not least <= k <= m for k, m in zip(kept, most, strict=True)):
                raise PruneError(f"{what} {kept} do not fit the network: each has to lie between {least} and {most}")
        return _remembered(self._removals, subnet, lambda: removal(self.analysis, self.groups, self.gone(subnet)))

    def cost(self, subnet: Subnet, cost: Cost) -> float:
        """What a subnet costs."""
        return cost(self.analysis, self.removed(subnet), self.skipped(subnet))

    def gone(self, subnet: Subnet) -> list[NDArray[np.bool_]]:
        """For each group a bool vector over its units, True = not in the subnet."""
        out = []
        for group, width, order in zip(self.groups, subnet.widths, self.order, strict=True):
            vector = np.zeros(len(group), dtype=bool)
            vector[order[width:]] = True
            out.append(vector)
        return out

    def sample(self, generator: torch.Generator, lower: Subnet | None = None) -> Subnet:
        """A random subnet, between `lower` (the smallest when None) and the full network, every depth and width equally
        likely."""
        low = lower or Subnet(tuple(0 for _ in self.stages), tuple(1 for _ in self.groups))

        def draw(smallest: int, largest: int) -> int:
            return int(torch.randint(smallest, largest + 1, (), generator=generator))

        depths = tuple(draw(a, len(stage)) for a, stage in zip(low.depths, self.stages, strict=True))
        widths = tuple(draw(a, len(group)) for a, group in zip(low.widths, self.groups, strict=True))
        return Subnet(depths, widths)

    @contextmanager
    def active(self, subnet: Subnet) -> Iterator[None]:
        """Inside, the model *is* the subnet: layers see slices of the shared weights, gradients flow into them,
        left-out blocks pass through.

        Running statistics of batch norm are those of the full network, sliced; what a forward pass inside does to them
        is forgotten.
        """
        spec = self._spec(subnet)
        model = self.model
        undo: list[tuple[dict[str, Any], str, Any]] = []
        classes: list[tuple[nn.Module, type[nn.Module]]] = []

        def put(place: dict[str, Any], key: str, value: Any) -> None:
            undo.append((place, key, place.get(key, _ABSENT)))
            place[key] = value

        owners = tensor_owners(model)
        modules = dict(model.named_modules())
        try:
            for name, kept in spec.kept.items():
                tensor = getattr(*owners[name][0])
                for dim, index in kept.items():
                    tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
                for module, attribute in owners[name]:
                    put(module._parameters if attribute in module._parameters else module._buffers, attribute, tensor)
            for module in modules.values():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    for attribute, buffer in list(module._buffers.items()):
                        if buffer is not None:
                            put(module._buffers, attribute, buffer.clone())
            for path, attributes in spec.attributes.items():
                for attribute, value in attributes.items():
                    put(modules[path].__dict__, attribute, tuple(value) if isinstance(value, list) else value)
            for path, name in spec.classes.items():
                classes.append((modules[path], type(modules[path])))
                modules[path].__class__ = replaced_class(name)
            for path in spec.identities:
                parent, _, leaf = path.rpartition(".")
                put(modules[parent]._modules, leaf, nn.Identity())
            yield
        finally:
            for module, kind in classes:
                module.__class__ = kind
            for place, key, value in reversed(undo):
                if value is _ABSENT:
                    del place[key]
                else:
                    place[key] = value

    def extract(self, subnet: Subnet) -> nn.Module:
        """A subnet as a module of its own, with `compaction_spec` to rebuild it; the statistics are the full network's
        until recalibrated."""
        model = copy.deepcopy(self.model)
        return copy.deepcopy(self._spec(subnet)).apply_(model)

    def _spec(self, subnet: Subnet) -> CompactionSpec:
        def make() -> CompactionSpec:
            skipped = self.skipped(subnet)
            return slicing_spec(self.analysis, self.removed(subnet), self.model, self._attributes, skipped)

        return _remembered(self._specs, subnet, make)

    def _block_of(self, group: Group) -> str | None:
        """The block that a group lies in entirely, if that block may be left out."""
        for path in itertools.chain.from_iterable(self.stages):
            if all(member.name.startswith(f"{path}.") for member in group.members):
                return path
        return None


def _remembered(store: OrderedDict[Subnet, T], subnet: Subnet, make: Callable[[], T]) -> T:
    """What `make` makes, from a store of the most recently used."""
    if subnet in store:
        store.move_to_end(subnet)
    else:
        store[subnet] = make()
        if len(store) > _CACHED:
            store.popitem(last=False)
    return store[subnet]


class _Absent:
    """Marks an attribute that an object did not have itself."""


_ABSENT = _Absent()


def droppable_blocks(program: Any, model: nn.Module) -> list[list[str]]:
    """The residual blocks that may be left out, by stage.

    A stage is a run of blocks of one ``nn.Sequential`` that keep their input's shape; whatever starts the run (usually
    the block that changes the shape, else its first block) always stays and is not listed.

    Args:
        program: the captured model.
        model: the model itself.

    Returns:
        One list of module paths per stage that has any, in execution order.
    """
    spans: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            spans.setdefault(path, []).append(node)
    stages: list[list[str]] = []
    for parent, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        run: list[str] = []
        for position, (name, child) in enumerate(module.named_children()):
            path = f"{parent}.{name}" if parent else name
            weighty = next(child.parameters(), None) is not None
            if position > 0 and weighty and _is_residual(spans.get(path, []), program):
                run.append(path)
            elif run:
                stages.append(run)
                run = []
        if run:
            stages.append(run)
    nested = {path for stage in stages for path in stage}
    return [stage for stage in stages if not any(stage[0].startswith(f"{other}.") for other in nested)]


def _is_residual(nodes: list[fx.Node], program: Any) -> bool:
    """Whether a module's one output is its one input plus something."""
    inside, state = set(nodes), set(program.state)
    entering = {
        source for node in nodes for source in node.all_input_nodes if source not in inside and source not in state
    }
    leaving = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(entering) != 1 or len(leaving) != 1:
        return False
    source = next(iter(entering))
    if shape_of(source) != shape_of(leaving[0]):
        return False
    pending, seen = [leaving[0]], set()
    while pending:
        node = pending.pop()
        if node is source:
            return True
        if node in seen or node not in inside:
            continue
        seen.add(node)
        if operator_name(node) in ("add", "relu", "dropout", "relu6", "hardtanh"):
            pending.extend(node.all_input_nodes)
    return False


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Measure the statistics of every batch norm anew, as plain averages over the given batches.

    Example::

        recalibrate_(network, (x for x, _ in loader))

    Args:
        model: changed in place; everything but its batch norms runs in evaluation mode.
        batches: inputs.

    Returns:
        The same model, in evaluation mode.

    Raises:
        PruneError: there was no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    model.eval()
    if not norms:
        return model
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise PruneError("recalibration got no batch; the statistics are as they were")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for inputs in itertools.chain([first], remaining):
        model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def magnitudes(supernet: Supernet, subnet: Subnet) -> tuple[float, float]:
    """Mean absolute filter weight of the units that a subnet keeps, and of those that it leaves out (0 where there are
    none).

    The paper's relative sparsity: under stimulative training the first grows while the second stays.
    """
    totals = {True: [0.0, 0], False: [0.0, 0]}
    tensors: dict[str, Tensor] = {
        name: getattr(*sites[0]).detach() for name, sites in tensor_owners(supernet.model).items()
    }
    for group, gone in zip(supernet.groups, supernet.gone(subnet), strict=True):
        for member in group.members:
            if not member.produces:
                continue
            rows = tensors[member.name].movedim(member.dim, 0).abs()
            for kept in (True, False):
                index = torch.from_numpy(member.index[gone != kept].reshape(-1)).to(rows.device)
                totals[kept][0] += float(rows[index].sum())
                totals[kept][1] += int(rows[index].numel())
    return tuple(total / count if count else 0.0 for total, count in (totals[True], totals[False]))  # type: ignore[return-value]
