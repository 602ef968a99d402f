"""Compaction: from a network with exact zeros to a smaller one with the same outputs."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from sparse_engine.errors import PruneError

from .analysis import Analysis, Contraction, analyse
from .axes import Condition, Constraint, Removed
from .capture import ExampleInputs, arguments, capture, operator_name, shape_of, split_inputs
from .constants import Knowledge, Partial, connections, constant_indices, propagate
from .spec import CompactionSpec, compaction_spec, replace_tensor, tensor_owners, unwrapped
from .units import Group, removal

_BIASABLE = (nn.Linear, nn.modules.conv._ConvNd)
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def compact(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Sequence[str] = (),
    blocks: bool = True,
    verify: bool = True,
) -> nn.Module:
    """Remove everything that exact zeros have made superfluous: channels, features, heads, groups, residual blocks.

    Example::

        se.prune(model, sparsity=0.5, structure=se.Channel())
        small = se.compact(model, torch.randn(1, 3, 224, 224))
        compaction_spec(small)                 # what went
        save_compact(small, "small.safetensors")

    A channel goes when nothing that is kept depends on how it varies: its consumers' weights for it are zero, or it
    is a constant, and then the constant is carried through bias, batch norm and activation into the consumers'
    biases. Where zero padding makes a constant vary at the border, where it would have to change a normalisation's
    statistics, or where the model's own code counts on a size, the channel stays. So the outputs are the masked
    model's, up to rounding: nothing is approximated, nothing is retrained.

    Args:
        model: any module that ``torch.export`` captures; not changed. Zeros are taken as they lie in the weights,
            masks need not be known. Wrapped models (DDP, DataParallel, AveragedModel) are unwrapped.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; only shapes and
            types matter.
        keep: names of tensors, or of modules with everything below them, whose sizes must stay.
        blocks: also replace modules that pass their input through unchanged by ``nn.Identity``.
        verify: run both models on the example inputs and on random ones and compare. Without it, code of the model
            that cannot run with other sizes is not noticed.

    Returns:
        A new module of the model's own class, in the model's own mode. Every dimension keeps at least one index.

    Raises:
        CaptureError: the model cannot be captured.
        PruneError: ``keep`` names nothing, or the result differs from the masked model (a bug worth reporting; the
        message has the numbers).

    Source:
        The masked = compacted contract is that of torch.ao's structured pruner; the zero-invariant groups of
        Only-Train-Once (arXiv 2107.07467) are the special case in which every constant is zero.
    """
    model = unwrapped(model)
    base = copy.deepcopy(model)
    training = {path: module.training for path, module in base.named_modules()}
    base.eval()
    program = capture(base, example_inputs)
    facts = propagate(program, program.tensors)
    analysis = analyse(program)
    _protect(analysis, base, keep)
    identities = _pass_through_modules(analysis, facts, base) if blocks else []
    plan = _Plan(analysis, facts, base)
    attempts = _Attempts(analysis)
    probe = probe_inputs(example_inputs)
    while True:
        small = plan.build(copy.deepcopy(base), attempts.frozen, attempts.attributes, identities)
        problem = _difference(base, small, probe) if verify else None
        if problem is None:
            break
        if isinstance(problem, float):
            if not attempts.freeze_everything():
                raise PruneError(
                    f"the compacted {type(model).__name__} differs from the masked one by "
                    f"{problem:.3g} of the output's scale; "
                    "please report this model. compact(..., keep=[...]) leaves named modules alone"
                )
        elif not attempts.learn(problem, small, plan.removed):
            raise PruneError(
                f"{type(model).__name__}'s own code does not run with the sizes left by compaction: {problem.message}. "
                "Make parametrizations and pruning hooks permanent first (torch.nn.utils.prune.remove, "
                "remove_parametrizations), or name what has to stay in keep="
            )
    compaction_spec(small).notes.extend(attempts.notes)
    for path, module in small.named_modules():
        module.training = training.get(path, training[""])
    return small


def probe_inputs(example_inputs: ExampleInputs) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example inputs, and the same with random numbers in place of every floating tensor."""
    args, kwargs = split_inputs(example_inputs)
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        return value

    return [(args, kwargs), (torch.utils._pytree.tree_map(noise, args), torch.utils._pytree.tree_map(noise, kwargs))]


def adaptable(
    analysis: Analysis, model: nn.Module, groups: Sequence[Group], example_inputs: ExampleInputs
) -> tuple[list[Group], dict[str, dict[str, tuple[int, str]]], list[str]]:
    """Which groups the model's own code can shrink, found by running it with half of each.

    Args:
        analysis: of the model.
        model: in evaluation mode; not changed.
        groups: from `find_groups`.
        example_inputs: as for `compact`.

    Returns:
        The groups that can shrink; the attributes of the model's modules that have to follow, for `slicing_spec`; and
        the reasons for the rest.
    """
    attempts = _Attempts(analysis)
    args, kwargs = split_inputs(example_inputs)
    able = list(groups)
    while True:
        gone = [np.arange(len(group)) < len(group) // 2 for group in able]
        removed = removal(analysis, able, gone)
        small = copy.deepcopy(model)
        slicing_spec(analysis, removed, small, attempts.attributes).apply_(small)
        problem = _run(small, args, kwargs)
        if not isinstance(problem, _Failure):
            return able, attempts.attributes, attempts.notes
        if not attempts.learn(problem, small, removed):
            raise PruneError(f"{type(model).__name__}'s own code does not run with smaller layers: {problem.message}")
        able = [group for group in able if not set(group.axes) & attempts.frozen]


# -- the plan ------------------------------------------------------------------------------------------------------


class _Plan:
    """What can go, given the facts; and how to build the network without it."""

    def __init__(self, analysis: Analysis, facts: dict[fx.Node, Knowledge], model: nn.Module) -> None:
        self.analysis = analysis
        self.sites = [_Site(contraction, analysis, facts, model) for contraction in analysis.contractions]
        shared: dict[str, list[_Site]] = {}
        for site in self.sites:
            for name in {site.contraction.weight, site.contraction.bias} - {None}:
                shared.setdefault(name, []).append(site)  # type: ignore[arg-type]
        for sites in shared.values():
            if len(sites) > 1:  # each call would need its own constant in the one bias
                for site in sites:
                    site.pushable = False
        uses = dict.fromkeys(analysis.tensors, 0)
        for node, name in analysis.program.state.items():
            uses[name] += len(node.users)
        for site in self.sites:
            if site.contraction.bias is not None and uses[site.contraction.bias] != 1:
                site.pushable = False
        self.conditions: list[Constraint] = [site.condition() for site in self.sites]
        self.conditions += [_product_condition(product, facts) for product in analysis.products]
        self.removed: Removed = {}

    def build(
        self,
        model: nn.Module,
        frozen: set[int],
        attributes: dict[str, dict[str, tuple[int, str]]],
        identities: list[str],
    ) -> nn.Module:
        """Shrink `model`, a dense copy, and return it."""
        axes = self.analysis.axes
        wish = axes.everything()
        for axis in frozen:
            wish[axis][:] = False
        self.removed = axes.settle(wish, self.conditions)
        spec = slicing_spec(self.analysis, self.removed, model, attributes, identities)
        corrections: dict[str, Tensor] = {}
        for site in self.sites:
            shift = site.shift(self.removed)
            if shift is not None:
                if site.contraction.bias is None:
                    spec.biases[site.path] = int(axes.sizes[site.contraction.outputs])
                    kept = np.flatnonzero(~self.removed[site.contraction.outputs])
                    if len(kept) != axes.sizes[site.contraction.outputs]:
                        spec.kept[f"{site.path}.bias"] = {0: kept.tolist()}
                        spec.shapes[f"{site.path}.bias"] = [int(axes.sizes[site.contraction.outputs])]
                corrections[f"{site.path}.bias" if site.contraction.bias is None else site.contraction.bias] = shift
        owners = tensor_owners(model)
        dense = {name: getattr(*owners[name][0]).detach().double() for name in corrections if name in owners}
        spec.apply_(model)
        owners = tensor_owners(model)
        for name, shift in corrections.items():
            tensor = getattr(*owners[name][0])
            total = shift.to(tensor.device) + dense.get(name, 0)
            replace_tensor(owners[name], spec.slice(name, total).to(tensor.dtype))
        return model


def slicing_spec(
    analysis: Analysis,
    removed: Removed,
    model: nn.Module,
    attributes: dict[str, dict[str, tuple[int, str]]] | None = None,
    identities: Sequence[str] = (),
) -> CompactionSpec:
    """The spec of a consistent set of removals: which indices of which tensors stay, what attributes become.

    Args:
        analysis: of the dense model.
        removed: axis -> bool vector, as `Axes.settle` leaves it.
        model: the dense model.
        attributes: module path -> attribute -> (axis, name) for attributes of the model's own modules that follow the
            size of an axis.
        identities: paths of modules to skip.
    """
    spec = CompactionSpec(identities=list(identities))
    owners = tensor_owners(model)
    skipped = tuple(f"{path}." for path in identities)
    sizes: dict[str, list[int]] = {}
    for name in analysis.tensors:
        if name not in owners or name.startswith(skipped):
            continue
        axes = analysis.tensor_axes(name)
        kept = {dim: np.flatnonzero(~removed[axis]).tolist() for dim, axis in enumerate(axes) if removed[axis].any()}
        shape = list(getattr(*owners[name][0]).shape)
        sizes[name] = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(shape)]
        if kept:
            spec.kept[name] = kept
            spec.shapes[name] = shape
    paths = {id(module): path for path, module in model.named_modules()}
    names = {id(getattr(*sites[0])): name for name, sites in owners.items()}
    for contraction in analysis.contractions:
        if (
            contraction.group_axis is not None
            and contraction.weight is not None
            and removed[contraction.group_axis].any()
        ):
            module, _ = owners[contraction.weight][0]
            if hasattr(module, "groups"):
                spec.attributes.setdefault(paths[id(module)], {})["groups"] = int(
                    np.count_nonzero(~removed[contraction.group_axis])
                )
    for name, axis in analysis.norms:
        if removed[axis].any() and name in owners:
            spec.attributes.setdefault(paths[id(owners[name][0][0])], {})["num_groups"] = int(
                np.count_nonzero(~removed[axis])
            )
    for name in spec.kept:
        for module, _ in owners[name]:
            path = paths[id(module)]
            tensors = [*module._parameters.items(), *module._buffers.items()]
            full_names = {key: names.get(id(tensor)) for key, tensor in tensors if tensor is not None}
            own = {key: sizes[full] for key, full in full_names.items() if full in sizes}
            spec.attributes.setdefault(path, {}).update(
                _layer_sizes(module, own, spec.attributes.get(path, {}).get("groups"))
            )
            owner_path, _, leaf = path.rpartition(".")
            owner = model.get_submodule(owner_path)
            for candidate, candidate_path in ((module, path), (owner, owner_path)):
                if isinstance(candidate, nn.MultiheadAttention) and (candidate is module or leaf == "out_proj"):
                    _attention_sizes(spec, candidate, candidate_path, sizes)
    for path, changes in (attributes or {}).items():
        for attribute, (axis, _) in changes.items():
            if removed[axis].any():
                spec.attributes.setdefault(path, {})[attribute] = int(np.count_nonzero(~removed[axis]))
    left = {path: values for path, values in spec.attributes.items() if values and not f"{path}.".startswith(skipped)}
    spec.attributes = left if skipped else {path: values for path, values in spec.attributes.items() if values}
    return spec


def _layer_sizes(module: nn.Module, sizes: dict[str, list[int]], groups: int | None) -> dict[str, Any]:
    """What PyTorch's own layers remember of their sizes."""
    weight = sizes.get("weight")
    if weight is None:
        return {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": weight[0], "out_channels": weight[1] * (groups or module.groups)}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": weight[1] * (groups or module.groups), "out_channels": weight[0]}
    if isinstance(module, nn.Linear):
        return {"in_features": weight[1], "out_features": weight[0]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": weight[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": weight}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    return {}


def _attention_sizes(
    spec: CompactionSpec, module: nn.MultiheadAttention, path: str, sizes: dict[str, list[int]]
) -> None:
    prefix = f"{path}." if path else ""
    out = sizes[f"{prefix}out_proj.weight"]
    head_dim = module.head_dim
    spec.classes[path] = "CompactMultiheadAttention"
    spec.attributes.setdefault(path, {}).update(
        # the flag keeps PyTorch's encoder layers off their fused path, which knows only its own head sizes
        {"num_heads": out[1] // head_dim, "embed_dim": out[0], "_qkv_same_embed_dim": False}
    )


# -- conditions ----------------------------------------------------------------------------------------------------


class _Site:
    """One contraction with all that decides which of its inputs may go."""

    def __init__(
        self, contraction: Contraction, analysis: Analysis, facts: dict[fx.Node, Knowledge], model: nn.Module
    ) -> None:
        self.contraction = contraction
        given = arguments(contraction.node)
        weight = facts.get(given["weight"])
        self.weight = weight.value if isinstance(weight, Partial) and weight.known is None else None
        size = analysis.axes.sizes[contraction.inputs]
        self.constant, self.values = constant_indices(facts.get(contraction.source), contraction.dim, size)
        self.path = contraction.weight.rpartition(".")[0] if contraction.weight is not None else ""
        module = model.get_submodule(self.path) if contraction.weight is not None else None
        self.pushable = (
            module is not None
            and not contraction.transposed
            and (contraction.bias is not None or (isinstance(module, _BIASABLE) and not contraction.computed_bias))
        )
        self.connected: NDArray[np.bool_] | None = None
        self.border: NDArray[np.bool_] | None = None
        # rows whose value is overwritten by a constant right away (batch norm with scale 0) need no inputs
        self.read = ~_overwritten(contraction, facts, analysis.axes.sizes[contraction.outputs])
        if self.weight is not None:
            self.connected = connections(self.weight, contraction.groups, contraction.transposed).numpy()
            taps = (
                _border_taps(contraction.node, given)
                if "conv" in operator_name(contraction.node) and not contraction.transposed
                else None
            )
            if taps is None or not taps.any():
                self.border = np.zeros_like(self.connected)
            else:
                self.border = ((self.weight != 0) & taps).flatten(2).any(2).numpy()

    def condition(self) -> Condition:
        contraction = self.contraction
        if contraction.groups == 1:
            return Condition((contraction.inputs, contraction.outputs), self._whole)
        if contraction.outputs_per_group is None:  # depthwise: nothing is summed over
            return Condition((), lambda removed: [])
        return Condition(
            (contraction.inputs, contraction.outputs, contraction.inputs_per_group, contraction.group_axis),
            self._grouped,
        )  # type: ignore[arg-type]

    def _whole(self, removed: Removed) -> list[int]:
        inputs, outputs = removed[self.contraction.inputs], removed[self.contraction.outputs]
        if not inputs.any():
            return []
        harmless = self.constant & (self.values == 0)
        if self.connected is None or self.border is None:
            allowed = harmless
        else:
            rows = ~outputs & self.read
            allowed = harmless | ~self.connected[rows].any(0)
            if self.pushable:
                allowed |= self.constant & ~self.border[rows].any(0)
        bad = inputs & ~allowed
        if not bad.any():
            return []
        inputs[bad] = False
        return [self.contraction.inputs]

    def _grouped(self, removed: Removed) -> list[int]:
        contraction = self.contraction
        columns = removed[contraction.inputs_per_group]  # type: ignore[index]
        if not columns.any():
            return []
        groups = contraction.groups
        harmless = (self.constant & (self.values == 0)).reshape(groups, 1, -1)
        if self.connected is None or self.border is None:
            allowed = harmless
        else:
            allowed = harmless | ~self.connected.reshape(groups, -1, self.connected.shape[1])
            if self.pushable:
                allowed = allowed | (
                    self.constant.reshape(groups, 1, -1) & ~self.border.reshape(groups, -1, self.border.shape[1])
                )
        kept = (~removed[contraction.outputs] & self.read).reshape(groups, -1, 1)
        bad = columns & (kept & ~allowed).any((0, 1))
        if not bad.any():
            return []
        columns[bad] = False
        return [contraction.inputs_per_group]  # type: ignore[list-item]

    def shift(self, removed: Removed) -> Tensor | None:
        """What the removed inputs added to each (dense) output, float64; None where that is nothing."""
        gone = removed[self.contraction.inputs] & self.constant & (self.values != 0)
        if self.weight is None or not gone.any() or self.connected is None:
            return None
        summed = self.weight.double().flatten(2).sum(2) if self.weight.ndim > 2 else self.weight.double()
        values = torch.from_numpy(np.where(gone, self.values, 0.0))
        if self.contraction.groups == 1:
            shift = summed @ values
        elif self.contraction.outputs_per_group is None:
            return None
        else:
            groups = self.contraction.groups
            shift = torch.einsum(
                "gmk,gk->gm", summed.view(groups, -1, summed.shape[1]), values.view(groups, -1)
            ).reshape(-1)
        kept = torch.from_numpy(~removed[self.contraction.outputs])
        shift = torch.where(kept, shift, torch.zeros((), dtype=torch.float64))
        return shift if bool((shift != 0).any()) else None


def _overwritten(contraction: Contraction, facts: dict[fx.Node, Knowledge], size: int) -> NDArray[np.bool_]:
    """Outputs of a contraction that each of its readers turns into something known."""
    node = contraction.node
    dim = 1 if "conv" in operator_name(node) else len(shape_of(node) or ()) - 1
    out = np.full(size, bool(node.users))
    own = facts.get(node)
    if isinstance(own, Partial):  # known itself: what its readers know may be made of it
        out &= ~own.mask().movedim(dim, 0).reshape(size, -1).any(1).numpy()
    for user in node.users:
        fact = facts.get(user)
        elementwise = operator_name(user) == "batch_norm" or torch.Tag.pointwise in getattr(user.target, "tags", ())
        if not elementwise or shape_of(user) != shape_of(node) or not isinstance(fact, Partial):
            return np.zeros(size, dtype=bool)
        out &= fact.mask().movedim(dim, 0).reshape(size, -1).all(1).numpy()
    return out


def _border_taps(node: fx.Node, given: dict[str, Any]) -> Tensor:
    """Which taps of a convolution's kernel ever read padding: bool tensor of the kernel's shape."""
    weight_shape, source_shape, out_shape = shape_of(given["weight"]), shape_of(given["input"]), shape_of(node)
    if weight_shape is None or source_shape is None or out_shape is None:
        raise PruneError(f"the convolution {node.name!r} does not produce a tensor")
    rank = len(weight_shape) - 2
    padding = given["padding"]

    def spread(value: Any) -> list[int]:
        values = list(value) if isinstance(value, list | tuple) else [value]
        return values * rank if len(values) == 1 else values

    stride, dilation = spread(given["stride"]), spread(given["dilation"])
    outside = torch.zeros(weight_shape[2:], dtype=torch.bool)
    for d in range(rank):
        kernel, size = weight_shape[2 + d], source_shape[2 + d]
        if isinstance(padding, str):
            before = dilation[d] * (kernel - 1) // 2 if padding == "same" else 0
        else:
            before = spread(padding)[d]
        first = torch.arange(kernel) * dilation[d] - before
        last = first + (out_shape[2 + d] - 1) * stride[d]
        view = [1] * rank
        view[d] = -1
        outside = outside | ((first < 0) | (last >= size)).view(view)
    return outside


def _product_condition(product: Any, facts: dict[fx.Node, Knowledge]) -> Condition:
    def zero(node: fx.Node, dim: int) -> NDArray[np.bool_]:
        shape = shape_of(node)
        constant, values = constant_indices(facts.get(node), dim, shape[dim])  # type: ignore[index]
        return constant & (values == 0)

    allowed = zero(product.first, product.first_dim) | zero(product.second, product.second_dim)

    def check(removed: Removed) -> list[int]:
        bad = removed[product.axis] & ~allowed
        if not bad.any():
            return []
        removed[product.axis][bad] = False
        return [product.axis]

    return Condition((product.axis,), check)


# -- blocks --------------------------------------------------------------------------------------------------------


def _pass_through_modules(analysis: Analysis, facts: dict[fx.Node, Knowledge], model: nn.Module) -> list[str]:
    """Paths of modules whose one output is their one input: residual blocks whose branch computes zero."""
    program = analysis.program
    same: dict[fx.Node, fx.Node] = {}

    def origin(node: fx.Node) -> fx.Node:
        return same.get(node, node)

    non_negative: set[fx.Node] = set()
    for node in program.nodes:
        name = operator_name(node)
        tensors = node.all_input_nodes
        if name in ("add", "sub") and len(tensors) == 2 and arguments(node).get("alpha", 1) == 1:
            for kept, other in (tensors, tensors[::-1]) if name == "add" else (tensors,):
                fact = facts.get(other)
                if (
                    isinstance(fact, Partial)
                    and fact.known is None
                    and not bool(fact.value.any())
                    and shape_of(kept) == shape_of(node)
                ):
                    same[node] = origin(kept)
                    break
        elif name == "relu":
            if origin(tensors[0]) in non_negative:
                same[node] = origin(tensors[0])
            else:
                non_negative.add(node)
        elif name in ("dropout", "contiguous", "clone", "detach", "alias", "feature_dropout"):
            same[node] = origin(tensors[0])
        elif name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "sigmoid", "softmax") and (
            name in ("sigmoid", "softmax") or origin(tensors[0]) in non_negative
        ):
            non_negative.add(node)
    if not same:
        return []
    spans: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            spans.setdefault(path, []).append(node)
    found: list[str] = []
    used_elsewhere = _call_counts(program.nodes)
    for path, nodes in spans.items():
        if (
            not path
            or "@" in path
            or used_elsewhere.get(path, 0) != 1
            or any(path.startswith(f"{done}.") for done in found)
        ):
            continue
        inside = set(nodes)
        state = set(program.state)
        entering = {origin(t) for node in nodes for t in node.all_input_nodes if t not in inside and t not in state}
        leaving = [node for node in nodes if any(user not in inside for user in node.users) or node in program.outputs]
        if len(leaving) != 1 or len(entering) != 1 or leaving[0] not in same:
            continue
        if (
            origin(leaving[0]) == next(iter(entering))
            and next(model.get_submodule(path).parameters(), None) is not None
        ):
            found.append(path)
    return found


def _call_counts(nodes: Sequence[fx.Node]) -> dict[str, int]:
    """How often each module is called: export marks the second call of a module with an ``@``."""
    counts: dict[str, set[str]] = {}
    for node in nodes:
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            counts.setdefault(path.split("@")[0], set()).add(key)
    return {path: len(keys) for path, keys in counts.items()}


# -- what the model's own code allows ------------------------------------------------------------------------------


@dataclass
class _Failure:
    """An exception that the compact model raised: where, and what it said."""

    place: str
    message: str


class _Attempts:
    """What has been learnt about the model's own code: sizes that it wrote down and that must therefore stay."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.frozen: set[int] = set()
        self.attributes: dict[str, dict[str, tuple[int, str]]] = {}
        self.notes: list[str] = []
        self.tried: set[str] = set()
        self.whole = False

    def learn(self, failure: _Failure, model: nn.Module, removed: Removed) -> bool:
        """Choose the next attempt after a failure; False when nothing is left to try."""
        if failure.place not in self.tried:
            self.tried.add(failure.place)
            if self._follow_attributes(failure.place, model, removed):
                return True
        self.attributes.pop(failure.place, None)
        place = failure.place
        while True:
            axes = {
                axis
                for where, written in self.analysis.written_sizes
                for axis in written
                if where == place or where.startswith(f"{place}." if place else "")
            }
            fresh = {axis for axis in axes if removed[axis].any()} - self.frozen
            if fresh:
                self.frozen |= fresh
                self.notes.append(
                    f"{place or 'the model'}: its code does not run with other sizes ({failure.message}); kept them"
                )
                return True
            if not place:
                return self.freeze_everything()
            place = place.rpartition(".")[0]

    def freeze_everything(self) -> bool:
        """Keep every size that the model's code may have written down."""
        if self.whole:
            return False
        self.whole = True
        self.attributes.clear()
        self.frozen |= {axis for _, axes in self.analysis.written_sizes for axis in axes}
        self.notes.append(
            "the model's code counts on its sizes: everything that it reshapes, splits or slices was kept"
        )
        return True

    def _follow_attributes(self, place: str, model: nn.Module, removed: Removed) -> bool:
        """A module that reshapes by ``self.num_heads`` runs when that attribute follows the axis that shrank."""
        module = model.get_submodule(place)
        own = {key: value for key, value in vars(module).items() if type(value) is int and not key.startswith("_")}
        changes: dict[str, tuple[int, str]] = {}
        for where, axes in self.analysis.written_sizes:
            for axis in axes if where == place else ():
                if removed[axis].any():
                    changes |= {
                        key: (axis, key) for key, value in own.items() if value == self.analysis.axes.sizes[axis]
                    }
        if not changes:
            return False
        self.attributes[place] = changes
        self.notes.append(f"{place or 'the model'}: {', '.join(sorted(changes))} follow the smaller sizes")
        return True


def _difference(
    base: nn.Module, small: nn.Module, probes: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> _Failure | float | None:
    """None when both models agree; the failure or the relative difference otherwise."""
    small.eval()
    for args, kwargs in probes:
        with torch.no_grad():
            expected = _tensors(base(*args, **kwargs))
        result = _run(small, args, kwargs)
        if isinstance(result, _Failure):
            return result
        if [t.shape for t in expected] != [t.shape for t in result]:
            return float("inf")
        for a, b in zip(expected, result, strict=True):
            if not a.is_floating_point():
                if not torch.equal(a, b):
                    return float("inf")
                continue
            if a.numel() == 0 or not bool(torch.isfinite(a).all()):
                continue  # random inputs may overflow a model; the example inputs still count
            scale = max(float(a.abs().max()), torch.finfo(a.dtype).tiny)
            error = float((a.double() - b.double()).abs().max()) / scale
            if not error <= _TOLERANCE.get(a.dtype, 1e-5) * 10:
                return error
    return None


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | _Failure:
    """The output tensors of a model, or which of its modules failed and how."""
    stack: list[str] = []
    paths = {module: path for path, module in model.named_modules()}

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = [module.register_forward_pre_hook(lambda m, _: stack.append(paths[m])) for module in paths]
    hooks += [module.register_forward_hook(leave) for module in paths]
    try:
        with torch.no_grad():
            return _tensors(model(*args, **kwargs))
    except Exception as error:
        return _Failure(stack[-1] if stack else "", _first_line(error))
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else traceback.format_exception_only(error)[-1].strip()


def _protect(analysis: Analysis, model: nn.Module, keep: Sequence[str]) -> None:
    for entry in keep:
        names = [name for name in analysis.tensors if name == entry or name.startswith(f"{entry}.")]
        if not names and entry not in dict(model.named_modules()):
            raise PruneError(f"keep={entry!r} is neither a tensor nor a module of {type(model).__name__}")
        for name in names:
            for axis in analysis.tensor_axes(name):
                analysis.axes.freeze(axis, None, "keep=")
