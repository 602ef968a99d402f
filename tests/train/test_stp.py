"""STP: the loss, the search, the checkpoint, and a whole run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparse_engine as se
from sparse_engine.distill.batch import Batch
from sparse_engine.errors import PruneError, RecipeError
from sparse_engine.prune.structured import Latency, compaction_spec, load_compact
from sparse_engine.train import load_recipe, models, run
from sparse_engine.train.recipe import StpPart
from sparse_engine.train.stp import StimulativeTraining, executable_time
from sparse_engine.train.supernet import Subnet, Supernet


def family(**options: object) -> Supernet:
    torch.manual_seed(0)
    model = models.build("resnet14", num_classes=4, in_channels=1, option="B", width=4, **options)
    return Supernet(model, torch.randn(2, 1, 8, 8))


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randn(8, 1, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator))


@pytest.mark.parametrize("divergence", ["kl", "normalised"])
def test_the_loss_is_its_definition(divergence: str):
    """Cross entropy of the full network plus λ T² KL of the two, the full network's logits detached; batch norm in
    training mode on both sides."""
    net = family()
    net.model.eval()  # without running statistics moving, both passes can be repeated
    part = StpPart(weight=0.7, temperature=2.0, divergence=divergence, expansion=False)
    objective = StimulativeTraining(net, part)
    subnet = Subnet((0, 1, 0), tuple(max(1, w // 2) for w in net.full.widths))
    objective._choose = lambda: (subnet, lambda value: None)
    data = batch()
    loss = objective(net.model, data)
    full = net.model(data.inputs)
    with net.active(subnet):
        student = net.model(data.inputs)
    teacher = full.detach()
    expected = F.cross_entropy(full, data.targets)
    if divergence == "normalised":
        teacher, student = F.layer_norm(teacher, (4,)), F.layer_norm(student, (4,))
    kl = F.kl_div(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean")
    expected = expected + 0.7 * 4 * kl
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradient = net.model.conv1.weight.grad.clone()
    net.model.zero_grad()
    expected.backward()
    torch.testing.assert_close(gradient, net.model.conv1.weight.grad)


def test_expansion_adds_a_larger_subnet():
    net = family()
    seen: list[Subnet] = []
    objective = StimulativeTraining(net, StpPart())
    original = net.active
    net.active = lambda subnet: (seen.append(subnet), original(subnet))[1]  # type: ignore[method-assign]
    objective(net.model, batch())
    current, larger = seen
    assert all(
        a <= b for a, b in zip((*current.depths, *current.widths), (*larger.depths, *larger.widths), strict=True)
    )


def search(part: StpPart, divergence: dict[str, float] | None = None, steps: int = 400) -> StimulativeTraining:
    """A search without training: the divergence of a subnet is made up, the sum over groups of a price times what is
    missing."""
    net = family()
    objective = StimulativeTraining(net, part, steps=steps)
    prices = [(divergence or {}).get(group.name, 1.0) for group in net.groups]
    for step in range(steps):
        objective.progress(step / steps)
        objective._advance()
        subnet, record = objective._choose()
        missing = (1 - have / full for have, full in zip(subnet.widths, net.full.widths, strict=True))
        record(sum(price * share for price, share in zip(prices, missing, strict=True)) + 0.1 * sum(subnet.depths))
    return objective


@pytest.mark.parametrize("target", [0.7, 0.3])
@pytest.mark.parametrize(
    "options", [{}, {"depth": False}, {"width": False}, {"guidance": False}, {"cost": "parameters"}]
)
def test_the_search_meets_its_target(target: float, options: dict):
    if options.get("width") is False:
        target = max(target, 0.6)  # leaving out all blocks saves half
    objective = search(StpPart(target=target, pool=3, **options))
    net, best = objective.supernet, objective.best().subnet
    share = net.cost(best, objective.cost) / objective.full_cost
    assert share <= target
    assert share > target * (0.3 if options.get("width") is False else 0.6)
    assert len(objective.pool) == 1
    if options.get("depth") is False:
        assert best.depths == net.full.depths
    if options.get("width") is False:
        assert best.widths == net.full.widths


def test_guidance_cuts_where_agreement_suffers_least():
    objective = StimulativeTraining(family(), StpPart(target=0.4, depth=False), steps=400)
    objective.progress(0.1)
    objective._advance()
    objective._cut_share = 0.0  # one step a cut
    (member,) = objective.pool
    for group in range(len(member.widths)):
        for divergences in ([1.0] * group + [0.1] + [1.0] * (len(member.widths) - group - 1), [0.0] * group + [9.0]):
            divergences += [0.0] * (len(member.widths) - len(divergences))
            before = list(member.widths)
            member.sums, member.counts = [d * 2 for d in divergences], [2] * len(divergences)
            objective._cut(member)
            (cut,) = [g for g in range(len(before)) if member.widths[g] < before[g]]
            assert (cut == group) == (divergences[group] < 1)
            member.widths, member.done = before, False


@pytest.mark.parametrize(("pool", "rounds", "steps"), [(1, 2, 300), (3, 1, 400), (3, 2, 400)])
def test_the_search_ends_in_time_by_cuts_that_were_measured(pool: int, rounds: int, steps: int, monkeypatch):
    """However few steps there are, a cut takes as much as it has to: nothing is left to be cut blindly at the end."""
    blind: list[float] = []

    def force(objective: StimulativeTraining) -> None:
        blind.extend(objective.supernet.cost(m.subnet, objective.cost) for m in objective.pool if not m.done)
        original(objective)

    original = StimulativeTraining._force
    monkeypatch.setattr(StimulativeTraining, "_force", force)
    objective = search(StpPart(target=0.4, pool=pool, rounds=rounds), steps=steps)
    assert all(cost <= 1.25 * objective.limit for cost in blind)  # at most the last step of a member that chance passed


def test_the_last_cut_gives_back_what_it_does_not_need():
    """A member ends at the target, not a step below it: one unit more of any group of its last cut is too much."""
    for seed in range(3):
        objective = StimulativeTraining(family(), StpPart(target=0.45, pool=1, depth=False), seed=seed, steps=200)
        objective.progress(0.1)
        objective._advance()
        (member,) = objective.pool
        while not member.done:
            before = list(member.widths)
            member.sums, member.counts = [float(g) for g in range(len(before))], [1] * len(before)
            objective._cut(member)
        net, cost = objective.supernet, objective.cost
        assert net.cost(member.subnet, cost) <= objective.limit
        for group in (g for g in range(len(before)) if member.widths[g] < before[g]):
            wider = list(member.widths)
            wider[group] += 1
            assert net.cost(Subnet(member.depths, tuple(wider)), cost) > objective.limit


def test_members_are_compared_by_what_they_did_since_all_were_done():
    objective = StimulativeTraining(family(), StpPart(target=0.5, pool=2), steps=400)
    objective.progress(0.1)
    objective._advance()
    first, second = objective.pool
    objective._force()
    first.total, first.samples = 90.0, 9  # from early, when the network had learnt little
    objective.progress(0.6)
    objective._advance()
    assert (first.samples, second.samples) == (0, 0)
    first.total, first.samples, second.total, second.samples = 1.0, 4, 3.0, 4
    objective.progress(0.75)
    objective._advance()
    assert objective.pool == [first]


def test_the_pool_drops_who_agrees_least():
    """Every block of depth adds to the made-up divergence; no blocks at all would be below the target at once."""
    assert sum(search(StpPart(target=0.5, pool=8)).best().depths) == 1


def test_a_checkpoint_continues_the_same_search():
    part = StpPart(target=0.5, pool=3)
    straight = search(part)
    halfway = StimulativeTraining(family(), part, steps=400)
    runs = [halfway]
    for step in range(400):
        if step == 150:
            resumed = StimulativeTraining(family(), part, steps=400)
            resumed.load_state_dict(halfway.state_dict())
            runs.append(resumed)
        objective = runs[-1]
        objective.progress(step / 400)
        objective._advance()
        subnet, record = objective._choose()
        widths = objective.supernet.full.widths
        missing = (1 - have / full for have, full in zip(subnet.widths, widths, strict=True))
        record(sum(missing) + 0.1 * sum(subnet.depths))
    assert runs[-1].best().subnet == straight.best().subnet


def test_a_latency_target_is_measured_on_executables():
    """The table is filled by converting single layers; on a made-up clock the subnet meets its milliseconds."""
    assert 0 < executable_time(torch.nn.Conv2d(2, 3, 1).eval(), torch.randn(1, 2, 4, 4)) < 1000
    clock = Latency(measure=lambda layer, x: layer.weight.numel() * 1e-3, rounding=2)
    net = family()
    limit = 0.5 * net.cost(net.full, clock)
    objective = StimulativeTraining(net, StpPart(target=limit, cost="latency", pool=2), cost=clock)
    small = objective.finish([torch.randn(4, 1, 8, 8)])
    assert net.cost(objective.subnet, clock) <= limit
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.model.parameters())


def test_a_recipe_with_a_latency_target(tmp_path, monkeypatch):
    """`stp.cost=latency` goes from data to a subnet of at most so many milliseconds, here on a made-up clock."""
    asked: list[tuple[int, ...]] = []

    def clock(layer: torch.nn.Module, x: torch.Tensor) -> float:
        asked.append(tuple(layer.weight.shape))
        return layer.weight.numel() * 1e-3

    monkeypatch.setattr("sparse_engine.train.stp.executable_time", clock)
    whole = models.build("resnet14", num_classes=10, in_channels=1, option="B", width=4)
    weights = sum(m.weight.numel() for m in whole.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    settings = {
        "model.name": "resnet14", "model.options": {"option": "B", "width": 4}, "data.limit": 64, "train.epochs": 2,
        "train.batch_size": 32, "stp.cost": "latency", "stp.pool": 1, "stp.step": 0.2, "stp.calibration": 2,
        "convert.enabled": False,
        "stp.target": 0.5 * weights * 1e-3,
    }  # fmt: skip
    result = run("stp", "digits", out=tmp_path / "run", progress=False, **settings)
    found = result.summary["stp"]
    assert found["unit"] == "ms"
    assert found["full_cost"] == pytest.approx(weights * 1e-3)
    assert found["cost"] <= settings["stp.target"]
    assert len(set(asked)) > 4
    left = sum(m.weight.numel() for m in result.model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    assert left <= 0.5 * weights


FAMILIES = {
    "resnet18": {"small_input": True, "width": 8},
    "mobilenet_v2": {"small_input": True, "width": 0.25},
    "vit_small": {"layers": 2, "width": 24, "mlp": 32, "heads": 3, "image_size": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_runs_to_an_executable(name: str, tmp_path):
    """The ImageNet form of ResNets, inverted residuals and transformers: searched, extracted, converted."""
    settings = {
        "model.name": name, "model.options": FAMILIES[name], "data.limit": 96, "train.epochs": 2,
        "train.batch_size": 16, "stp.pool": 2, "stp.rounds": 1, "stp.target": 0.6, "stp.calibration": 2,
        "convert.tune": False, "convert.tolerance": 0.0,
    }  # fmt: skip
    result = run("stp", "digits", out=tmp_path / "run", progress=False, **settings)
    found = result.summary["stp"]
    assert found["cost"] <= 0.6 * found["full_cost"]
    executable = se.load(tmp_path / "run" / "model.spx")
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected = result.model(x)
    torch.testing.assert_close(executable(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    dense = models.build(name, num_classes=10, in_channels=1, **FAMILIES[name])
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in dense.parameters())
    rebuilt = load_compact(tmp_path / "run" / "compact.safetensors", dense).eval()
    torch.testing.assert_close(rebuilt(x), expected)


def test_errors():
    with pytest.raises(PruneError, match="out of reach"):
        StimulativeTraining(family(), StpPart(target=0.01))
    for changes, message in (
        ({"stp.target": 1.5}, "at most 1"),
        ({"stp.warmup": 0.8}, "in this order"),
        ({"stp.width": False, "stp.depth": False}, "nothing is left"),
        ({"stp.divergence": "js"}, "normalised"),
        ({"prune.sparsity": 0.5}, "leave out prune"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe("stp", changes)


@pytest.mark.slow
def test_a_whole_run_learns_and_resumes(tmp_path):
    settings = {
        "model.name": "resnet14", "model.options": {"option": "B", "width": 8}, "train.epochs": 8,
        "train.batch_size": 32,
        "train.learning_rate": 0.05, "stp.target": 0.4, "stp.pool": 3, "convert.enabled": False,
    }  # fmt: skip
    result = run("stp", "digits", out=tmp_path / "run", progress=False, **settings)
    assert result.summary["test_accuracy"] > 0.9
    assert result.summary["stp"]["cost"] <= 0.4 * result.summary["stp"]["full_cost"]
    history = result.summary["stp"]["history"]
    assert len(history) == 8
    assert history[-1]["kept_magnitude"] > 0
    again = run("stp", "digits", out=tmp_path / "run", progress=False, resume=True, **settings)
    assert again.summary["test_accuracy"] == result.summary["test_accuracy"]
    dense = models.build("resnet14", num_classes=10, in_channels=1, option="B", width=8)
    rebuilt = load_compact(tmp_path / "run" / "compact.safetensors", dense).eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(rebuilt(x), result.model(x))
    assert compaction_spec(rebuilt).to_json() == compaction_spec(result.model).to_json()
