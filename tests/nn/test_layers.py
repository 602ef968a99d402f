"""`SparseLinear` and `SparseConv2d` as drop-ins: outputs, state dicts, copies, optimisers, exports, DDP."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparse_engine.errors import StructureError
from sparse_engine.nn import SparseConv2d, SparseLinear, sparse_layers
from sparse_engine.structure import NM, Block, Unstructured
from tests.helpers import assert_close_to_fp64

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (2, 5), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": 3, "padding": (1, 2), "groups": 4, "bias": False},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
]


def random_mask(shape, density=0.3):
    return torch.rand(shape) < density


def linear(rows=24, columns=40, bias=True, mask=None):
    dense = nn.Linear(columns, rows, bias)
    mask = random_mask(dense.weight.shape) if mask is None else mask
    with torch.no_grad():
        dense.weight.mul_(mask)
    return dense, SparseLinear.from_dense(dense, mask)


def convolution(**arguments):
    dense = nn.Conv2d(8, 12, **arguments)
    mask = random_mask(dense.weight.shape)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return dense, SparseConv2d.from_dense(dense, mask)


def pairs():
    dense, sparse = linear()
    yield "linear", dense, sparse, torch.randn(5, 40)
    dense, sparse = convolution(kernel_size=3, padding=1)
    yield "conv", dense, sparse, torch.randn(2, 8, 9, 9)


@pytest.fixture(params=["linear", "conv"])
def pair(request):
    torch.manual_seed(3)
    return next((dense, sparse, x) for name, dense, sparse, x in pairs() if name == request.param)


def in_double(module, x):
    return copy.deepcopy(module).double()(x.double())


def check(sparse, dense, x):
    """Same outputs in every way of calling."""
    expected = in_double(dense, x)
    assert_close_to_fp64(sparse(x), expected)
    with torch.no_grad():
        assert_close_to_fp64(sparse(x), expected)
    with torch.inference_mode():
        assert_close_to_fp64(sparse(x), expected)


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
def test_convolutions(arguments):
    dense, sparse = convolution(**arguments)
    x = torch.randn(2, 8, 11, 13)
    check(sparse, dense, x)
    check(sparse, dense, x[0])
    check(sparse, dense, x.contiguous(memory_format=torch.channels_last))
    assert_close_to_fp64(sparse.to_dense()(x), in_double(dense, x))
    assert repr(sparse.to_dense()) == repr(dense)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (0,), (2, 0, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_any_leading_dimensions(leading, bias):
    dense, sparse = linear(bias=bias)
    check(sparse, dense, torch.randn(*leading, 40))


def test_non_contiguous_inputs():
    dense, sparse = linear()
    check(sparse, dense, torch.randn(40, 6).T)
    check(sparse, dense, torch.randn(6, 80)[:, ::2])
    check(sparse, dense, torch.randn(6, 50)[:, 3:43])
    check(sparse, dense, torch.randn(1, 40).expand(6, 40))


def test_wrong_sizes_are_refused_with_numbers(pair):
    _, sparse, x = pair
    with torch.no_grad(), pytest.raises(ValueError, match=r"input of shape"):
        sparse(x[..., :3] if x.dim() == 2 else x[:, :3])


def test_gradients_agree_with_the_dense_layer(pair):
    dense, sparse, x = pair
    x, reference = x.requires_grad_(), x.detach().double().requires_grad_()
    double = copy.deepcopy(dense).double()
    y, expected = sparse(x), double(reference)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert_close_to_fp64(x.grad, reference.grad)
    assert_close_to_fp64(sparse.bias.grad, double.bias.grad)
    dense_gradient = sparse.packed().with_values(sparse.values.grad.double()).to_dense()
    assert_close_to_fp64(dense_gradient, double.weight.grad * sparse.mask)


def test_gradients_of_gradients(pair):
    _, sparse, x = pair
    sparse = sparse.double()
    results = []
    for layer in (sparse, copy.deepcopy(sparse).float()):
        inputs = x.detach().to(layer.values.dtype).requires_grad_()
        (first,) = torch.autograd.grad(layer(inputs).square().sum(), layer.values, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [layer.values, inputs]))
    for double, single in zip(*results, strict=True):
        assert_close_to_fp64(single, double, 1e-4)


@pytest.mark.parametrize("trained", ["values", "bias", "input"])
def test_only_what_requires_a_gradient_gets_one(pair, trained):
    _, sparse, x = pair
    sparse.requires_grad_(False)
    target = {"values": sparse.values, "bias": sparse.bias, "input": x}[trained].requires_grad_()
    sparse(x).square().sum().backward()
    assert target.grad is not None
    assert sum(t.grad is not None for t in (sparse.values, sparse.bias, x)) == 1


# -- making and unmaking -----------------------------------------------------------------------------------------------


def test_exact_zeros_are_the_mask(pair):
    dense, _, x = pair
    sparse = type(pair[1]).from_dense(dense)
    assert torch.equal(sparse.mask, dense.weight != 0)
    assert torch.equal(sparse.weight, dense.weight)
    check(sparse, dense, x)


def test_a_mask_of_a_pruning_library_is_found():
    for prepare in (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.7),
        lambda layer: prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0),
    ):
        dense = nn.Linear(20, 30)
        prepare(dense)
        sparse = SparseLinear.from_dense(dense)
        assert torch.equal(sparse.mask, dense.weight_mask != 0)
        prune.remove(dense, "weight")
        check(sparse, dense, torch.randn(4, 20))


def test_a_mask_of_ao_pruning_is_found():
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(nn.Linear(16, 16))
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4), zeros_per_block=4)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparse = SparseLinear.from_dense(model[0])
    assert 0.4 < sparse.sparsity < 0.6
    assert_close_to_fp64(sparse(torch.ones(2, 16)), in_double(model[0], torch.ones(2, 16)))


def test_a_declared_structure_must_fit():
    dense = nn.Linear(16, 16)
    with pytest.raises(StructureError, match="blocks are partly kept"):
        SparseLinear.from_dense(dense, random_mask((16, 16)), Block((4, 4)))
    mask = torch.arange(16).repeat(16, 1) % 4 < 2
    assert SparseLinear.from_dense(dense, mask, "2:4").structure == NM(2, 4)


def test_blocks_keep_zeros_that_were_trained_to_zero():
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8, :8] = True
    dense = nn.Linear(16, 16)
    with torch.no_grad():
        dense.weight.mul_(mask)
        dense.weight[3, 3] = 0.0
    sparse = SparseLinear.from_dense(dense, mask, Block((8, 8)))
    assert sparse.values.numel() == 64
    assert torch.equal(sparse.weight, dense.weight)


def test_constructors_resemble_pytorchs():
    torch.manual_seed(0)
    reference = nn.Linear(12, 7)
    torch.manual_seed(0)
    layer = SparseLinear(12, 7)
    assert torch.equal(layer.weight, reference.weight)
    assert torch.equal(layer.bias, reference.bias)
    mask = random_mask((7, 12))
    assert torch.equal(SparseLinear(12, 7, False, mask=mask).mask, mask)
    torch.manual_seed(0)
    reference = nn.Conv2d(4, 6, 3, 2, 1, 1, 2)
    torch.manual_seed(0)
    layer = SparseConv2d(4, 6, 3, 2, 1, 1, 2)
    assert torch.equal(layer.weight, reference.weight)
    assert layer.extra_repr().startswith("4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)")
    assert SparseLinear(3, 4, dtype=torch.float64).values.dtype == torch.float64


def test_train_and_eval_and_requires_grad_are_kept():
    dense = nn.Linear(8, 8).eval().requires_grad_(False)
    sparse = SparseLinear.from_dense(dense, random_mask((8, 8)))
    assert not sparse.training
    assert not sparse.values.requires_grad
    assert sparse.bias is dense.bias
    back = sparse.to_dense()
    assert not back.training
    assert not back.weight.requires_grad


# -- state dicts and copies --------------------------------------------------------------------------------------------


def fresh(sparse):
    if isinstance(sparse, SparseLinear):
        return SparseLinear(sparse.in_features, sparse.out_features)
    return SparseConv2d(sparse.in_channels, sparse.out_channels, sparse.kernel_size, padding=sparse.padding)


def test_own_state_dict_round_trip(pair):
    dense, sparse, x = pair
    state = sparse.state_dict()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert size < 0.5 * sum(p.numel() * p.element_size() for p in dense.parameters())
    other = fresh(sparse)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(other.weight, sparse.weight)
    check(other, dense, x)


@pytest.mark.parametrize("block", [(4, 1), (4, 4), (3, 2)], ids=str)
def test_structures_survive_the_state_dict(block):
    mask = random_mask((8, 10)).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:-1]
    sparse = SparseLinear.from_dense(nn.Linear(mask.shape[1], mask.shape[0]), mask, Block(block))
    other = SparseLinear(mask.shape[1], mask.shape[0])
    other.load_state_dict(sparse.state_dict())
    assert other.structure == Block(block)
    assert torch.equal(other.weight, sparse.weight)


def test_dense_state_dict(pair):
    dense, sparse, x = pair
    other = fresh(sparse)
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other.weight, dense.weight)
    assert other.sparsity == pytest.approx(sparse.sparsity)
    check(other, dense, x)


def test_dense_state_dict_within_the_pattern_keeps_it(pair):
    dense, sparse, x = pair
    before = sparse.values
    with torch.no_grad():
        dense.weight.mul_(2)
        dense.weight.view(-1)[int(sparse.mask.view(-1).nonzero()[0])] = 0.0
    mask = sparse.mask
    sparse.load_state_dict(dense.state_dict())
    assert sparse.values is before
    assert torch.equal(sparse.mask, mask)
    check(sparse, dense, x)


def test_dense_state_dict_beyond_the_pattern_replaces_it(pair):
    dense, sparse, x = pair
    with torch.no_grad():
        dense.weight.copy_(torch.randn_like(dense.weight) * random_mask(dense.weight.shape, 0.5))
    sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse.weight, dense.weight)
    check(sparse, dense, x)


def test_state_dict_of_a_pruned_layer():
    dense = nn.Linear(20, 30)
    prune.l1_unstructured(dense, "weight", amount=0.7)
    sparse = SparseLinear(20, 30)
    sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse.mask, dense.weight_mask != 0)
    prune.remove(dense, "weight")
    check(sparse, dense, torch.randn(3, 20))


def test_state_dicts_that_do_not_fit(pair):
    _, sparse, _ = pair
    good = sparse.state_dict()
    other = fresh(sparse)
    with pytest.raises(RuntimeError, match="values"):
        other.load_state_dict({"bias": good["bias"]})
    with pytest.raises(RuntimeError, match="more"):
        other.load_state_dict({**good, "more": torch.ones(1)})
    with pytest.raises(RuntimeError, match="values for a pattern"):
        other.load_state_dict({**good, "values": good["values"][1:]})
    with pytest.raises(RuntimeError, match="not JSON"):
        other.load_state_dict({**good, "pattern.meta": good["pattern.meta"][1:]})
    with pytest.raises(RuntimeError, match="expected"):
        other.load_state_dict({"weight": torch.ones(3, 3), "bias": good["bias"]})
    with pytest.raises(RuntimeError, match="bias"):
        other.load_state_dict({**good, "bias": torch.ones(1)})


def test_state_dict_inside_a_model():
    model = nn.Sequential(linear()[1], nn.ReLU(), linear(10, 24)[1])
    other = nn.Sequential(SparseLinear(40, 24), nn.ReLU(), SparseLinear(24, 10))
    other.load_state_dict(model.state_dict(prefix=""))
    x = torch.randn(3, 40)
    assert torch.equal(other(x), model(x))


def saved(sparse):
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), saved], ids=["deepcopy", "pickle", "torch.save"]
)
def test_copies_are_independent(pair, copier):
    dense, sparse, x = pair
    with torch.no_grad():
        sparse(x)  # the copy must not share the C++ object that exists now
    other = copier(sparse)
    check(other, dense, x)
    with torch.no_grad():
        other.values.zero_()
    check(sparse, dense, x)
    assert not torch.equal(other(x), sparse(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype_and_back(pair, dtype):
    dense, sparse, x = pair
    values = sparse.values
    check(sparse, dense, x)
    sparse.to(dtype)
    assert sparse.values is values
    y = sparse(x.to(dtype))
    assert y.dtype == dtype
    expected = copy.deepcopy(dense).to(dtype)(x.to(dtype)).double()
    assert_close_to_fp64(y, expected, 1e-12 if dtype == torch.float64 else 2e-2)
    sparse.float()
    assert sparse(x).dtype == torch.float32


def test_to_meta_and_shapes(pair):
    _, sparse, x = pair
    expected = sparse(x).shape
    assert copy.deepcopy(sparse).to("meta")(x.to("meta")).shape == expected


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, 0.01),
        lambda p: torch.optim.AdamW(p, 0.01),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_optimisers_follow_masked_dense_training(pair, make):
    dense, sparse, x = pair
    dense, target = copy.deepcopy(dense).double(), sparse(x).detach() + 1.0
    mask = sparse.mask
    dense.weight.register_hook(lambda gradient: gradient * mask)
    optimizers = [make(module.parameters()) for module in (dense, sparse)]
    for _ in range(10):
        for module, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            inputs = x.to(next(module.parameters()).dtype)
            nn.functional.mse_loss(module(inputs), target.to(inputs)).backward()
            optimizer.step()
    assert_close_to_fp64(sparse.weight, dense.weight, 1e-4)
    assert_close_to_fp64(sparse(x), dense(x.double()), 1e-4)


def test_edits_of_the_values_are_noticed(pair):
    _, sparse, x = pair
    edits = [
        lambda v: v.mul_(2.0),
        lambda v: v.data.mul_(0.5),
        lambda v: v.data.add_(1.0),
        lambda v: v.__setitem__(0, 5.0),
        lambda v: setattr(v, "data", torch.randn_like(v)),
        lambda v: v.data.copy_(torch.randn_like(v)),
    ]
    with torch.no_grad():
        for edit in edits:
            sparse(x)
            edit(sparse.values)
            assert_close_to_fp64(sparse(x), in_double(sparse.to_dense(), x))
        sparse.values.data[1] = 7.0
        sparse.values_changed_()
        assert_close_to_fp64(sparse(x), in_double(sparse.to_dense(), x))


def test_functional_call(pair):
    _, sparse, x = pair
    values = torch.randn_like(sparse.values)
    with torch.no_grad():
        sparse(x)
        y = torch.func.functional_call(sparse, {"values": values}, (x,))
        again = copy.deepcopy(sparse)
        again.values.copy_(values)
        assert torch.equal(y, again(x))


# -- changing the pattern ----------------------------------------------------------------------------------------------


def test_set_pattern_keeps_what_survives(pair):
    _, sparse, x = pair
    before, old_mask, parameter = sparse.weight.detach().clone(), sparse.mask, sparse.values
    mask = random_mask(before.shape, 0.4)
    change = sparse.set_pattern_(mask)
    assert sparse.values is parameter
    assert torch.equal(sparse.mask, mask)
    assert torch.equal(sparse.weight, before * (mask & old_mask))
    assert int(change.new.sum()) == int((mask & ~old_mask).sum())
    assert change.dropped == int((old_mask & ~mask).sum())
    check(sparse, sparse.to_dense(), x)


def test_set_pattern_of_the_same_size_keeps_the_memory(pair):
    _, sparse, x = pair
    flat = sparse.mask.view(-1).clone()
    kept, removed = flat.nonzero().view(-1), (~flat).nonzero().view(-1)
    flat[kept[:5]], flat[removed[:5]] = False, True
    address = sparse.values.data_ptr()
    change = sparse.set_pattern_(flat.view(sparse.mask.shape))
    assert sparse.values.data_ptr() == address
    assert change.dropped == int(change.new.sum()) == 5
    check(sparse, sparse.to_dense(), x)


def test_set_pattern_fills_new_weights(pair):
    _, sparse, _ = pair
    before, old_mask = sparse.weight.detach().clone(), sparse.mask
    mask = ~old_mask | (torch.rand(before.shape) < 0.5)
    other = copy.deepcopy(sparse)
    sparse.set_pattern_(mask, fill=0.5)
    assert torch.equal(sparse.weight, torch.where(mask & ~old_mask, 0.5, before * mask))
    source = torch.randn(before.shape)
    other.set_pattern_(mask, fill=source)
    assert torch.equal(other.weight, torch.where(mask & ~old_mask, source, before * mask))


@pytest.mark.parametrize("structure", [Block((4, 3)), Unstructured()], ids=str)
def test_optimiser_state_follows_the_pattern(structure):
    def block_mask():
        return random_mask((6, 14), 0.5).repeat_interleave(4, 0).repeat_interleave(3, 1)[:23, :40]

    sparse = SparseLinear.from_dense(nn.Linear(40, 23), block_mask(), structure)
    optimizer = torch.optim.AdamW(sparse.parameters(), 0.01)
    x = torch.randn(6, 40)
    sparse(x).square().sum().backward()
    optimizer.step()
    state = optimizer.state[sparse.values]
    packed = sparse.packed()
    old_mask = sparse.mask
    dense = {name: packed.with_values(state[name]).to_dense() for name in ("exp_avg", "exp_avg_sq")}
    gradient = packed.with_values(sparse.values.grad).to_dense()
    mask = block_mask()
    change = sparse.set_pattern_(mask)
    change.remap_optimizer_(optimizer, sparse.values)
    both = mask & old_mask
    for name, old in dense.items():
        assert torch.equal(sparse.packed().with_values(state[name]).to_dense(), old * both)
    assert torch.equal(sparse.packed().with_values(sparse.values.grad).to_dense(), gradient * both)
    assert sparse.structure == structure
    sparse(x).square().sum().backward()
    optimizer.step()


def test_set_pattern_to_nothing_and_back(pair):
    _, sparse, x = pair
    sparse.set_pattern_(torch.zeros(sparse.weight.shape, dtype=torch.bool))
    assert sparse.values.numel() == 0
    check(sparse, sparse.to_dense(), x)
    sparse.set_pattern_(torch.ones(sparse.weight.shape, dtype=torch.bool), fill=1.0)
    assert sparse.weight.eq(1).all()
    check(sparse, sparse.to_dense(), x)


def test_set_pattern_while_the_graph_of_an_earlier_step_is_alive(pair):
    _dense, sparse, x = pair
    values = sparse.values
    losses = []  # a training loop holds its last loss while the next one is computed
    for seed, share in enumerate((0.2, 0.7, 0.4)):
        sparse.set_pattern_(torch.rand(sparse.weight.shape, generator=torch.Generator().manual_seed(seed)) < share)
        sparse.values.grad = None
        losses.append(sparse(x).square().sum())
        losses[-1].backward()
        assert sparse.values is values
        assert sparse.values.grad.shape == values.shape == (sparse.mask.sum(),)


def test_set_pattern_refuses_what_does_not_fit(pair):
    _, sparse, _ = pair
    with pytest.raises(StructureError, match="does not fit a weight"):
        sparse.set_pattern_(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(StructureError, match="blocks are partly kept"):
        sparse.set_pattern_(random_mask(sparse.weight.shape), Block((4, 4)))


# -- with the rest of PyTorch ------------------------------------------------------------------------------------------


def test_compile_and_export(pair):
    _, sparse, x = pair
    model = nn.Sequential(sparse, nn.ReLU())
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert sparse.values.grad is not None
    exported = torch.export.export(model, (x,), dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}])
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    longer = torch.cat([x, x])
    torch.testing.assert_close(loaded(longer), model(longer))


def test_per_sample_gradients_and_forward_mode(pair):
    _, sparse, x = pair
    parameters = dict(sparse.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(sparse, parameters, (sample.unsqueeze(0),)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for number, sample in enumerate(x):
        sparse.zero_grad()
        sparse(sample.unsqueeze(0)).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(gradients[name][number], parameter.grad)
    direction = torch.randn_like(x)
    _, derivative = torch.func.jvp(sparse, (x,), (direction,))
    shape = (-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(
        derivative, sparse(direction) - (sparse.bias.view(shape) if x.dim() == 4 else sparse.bias)
    )
    assert_close_to_fp64(sparse(x), in_double(sparse.to_dense(), x))


def test_a_change_of_pattern_reaches_a_compiled_model():
    _, sparse = linear()
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    x = torch.randn(3, 40)
    compiled(x)
    sparse.set_pattern_(random_mask((24, 40), 0.6), fill=1.0)
    check(compiled, sparse.to_dense(), x)


def test_autocast(pair):
    dense, sparse, x = pair
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
        mixed = sparse(x.bfloat16())
    assert y.dtype == torch.float32
    assert_close_to_fp64(mixed, in_double(dense, x), 2e-2)


def test_dispatch_modes_see_the_op(pair):
    from torch.utils._python_dispatch import TorchDispatchMode

    _, sparse, x = pair
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        sparse(x)
    assert any("sparse_engine::sparse_" in name for name in seen)


def test_sparse_layers_are_listed():
    model = nn.Sequential(linear()[1], nn.Sequential(convolution(kernel_size=1)[1]), nn.Linear(2, 2))
    assert [name for name, _ in sparse_layers(model)] == ["0", "1.0"]


def _ddp_worker(rank, address, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(convolution(kernel_size=3)[1], nn.ReLU(), nn.Flatten(), linear(4, 12 * 16)[1])
    x, target = torch.randn(8, 8, 6, 6), torch.randn(8, 4)
    alone = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    half = slice(4 * rank, 4 * rank + 4)
    for module, inputs, targets in ((wrapped, x[half], target[half]), (alone, x, target)):
        optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(inputs), targets).backward()
            optimizer.step()
    worst = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    results[rank] = worst
    dist.destroy_process_group()


def test_two_gloo_ranks_train_like_one_process(tmp_path):
    results = torch.full((2,), float("nan")).share_memory_()
    torch.multiprocessing.spawn(_ddp_worker, (f"file://{tmp_path}/rendezvous", results), nprocs=2)
    assert results.max() < 1e-5


@pytest.mark.parametrize("batch", [3, 21])
@pytest.mark.parametrize("gradient_order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("arguments", CONVOLUTIONS[:5])
def test_channels_last_images(arguments, gradient_order, batch):
    """A batch that fills vectors is computed in the memory order it comes in, as PyTorch's own layers do."""
    torch.manual_seed(4)
    dense, sparse = convolution(**arguments)
    x = torch.randn(batch, 8, 6, 9).to(memory_format=torch.channels_last).requires_grad_()
    y = sparse(x)
    if batch >= 16:
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert sparse.eval()(x.detach()).is_contiguous(memory_format=torch.channels_last)
        sparse.train()
    upstream = torch.randn(y.shape).to(memory_format=gradient_order)
    y.backward(upstream)

    exact = copy.deepcopy(dense).double()
    exact.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().double())
    exact_x = x.detach().double().requires_grad_()
    exact_y = exact(exact_x)
    exact_y.backward(upstream.double())
    assert_close_to_fp64(y, exact_y)
    assert_close_to_fp64(x.grad, exact_x.grad)
    wanted = sparse._template.gather(exact.weight.grad)
    assert_close_to_fp64(sparse.values.grad, wanted)
    if sparse.bias is not None:
        assert_close_to_fp64(sparse.bias.grad, exact.bias.grad)
