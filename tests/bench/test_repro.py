"""The plan of the reproduction and what its page says about rows that exist."""

from __future__ import annotations

import time

import pytest

from bench.repro import __main__ as command
from bench.repro import claims, study
from sparse_engine.train.recipe import load_recipe


def rows_of(scale: str, ranks: set[int], seeds: int, accuracy=lambda study_name, cell, seed: 0.5 + seed / 100) -> list:
    """Rows as the runs of some ranks would leave them."""
    return [
        {"study": name, "cell": cell, "seed": seed, "scale": scale, "test_accuracy": accuracy(name, cell, seed),
         "validation_accuracy": 0.5, "gate_openness": 0.1, "cpu_seconds": 1.0, "date": "2000-01-01 00:00 UTC",
         "machine": "a machine"}
        for name in study.SCALES[scale]["studies"]
        for cell in study.STUDIES[name](scale)
        if study.rank(cell, scale) in ranks
        for seed in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize("scale", study.SCALES)
def test_every_cell_is_a_recipe_and_no_two_are_the_same(scale):
    for name in study.SCALES[scale]["studies"]:
        cells = list(study.STUDIES[name](scale))
        keys = {study.Store.key(name, cell, 0, scale) for cell in cells}
        assert len(keys) == len(cells)
        for cell in cells:
            load_recipe(study.recipe_of(cell, scale), study.overrides(cell, scale, None))


@pytest.mark.parametrize("scale", ["mnist", "fashion_mnist", "cifar10"])
def test_two_seeds_of_the_first_rank_judge_nearly_every_claim(scale):
    rows = claims.Rows(rows_of(scale, {0}, 2), scale)
    made = claims.claims(rows)
    left = {claim for _, claim, verdict, _ in made if verdict in (claims.NOT_RUN, claims.NOT_JUDGED)}
    wider = {
        "iterative is above one-shot",
        "the full meta-gradient is above the first-order one",
        "the best α falls as the kept fraction rises",
    }
    if scale == "cifar10":
        wider = {f"the pipeline is above {method} at 1, 0.3, 0.1 % density" for method in ("random", "snip", "grasp")}
    assert left == wider
    assert len(made) == (6 if scale == "cifar10" else 24)


@pytest.mark.parametrize("scale", study.SCALES)
def test_all_ranks_and_seeds_judge_every_claim(scale):
    made = claims.claims(claims.Rows(rows_of(scale, {0, 1, 2, 3}, 3), scale))
    assert all(verdict.startswith(("reproduced", "not reproduced")) for _, _, verdict, _ in made)


def test_one_seed_judges_nothing():
    made = claims.claims(claims.Rows(rows_of("mnist", {0, 1, 2, 3}, 1), "mnist"))
    judged = [claim for _, claim, verdict, _ in made if verdict.startswith(("reproduced", "not reproduced"))]
    assert judged == []


def test_a_difference_counts_beyond_the_spread_only():
    def figure(*values: float) -> claims.Figure:
        return claims.Figure(values)

    assert claims.compare([(figure(90, 91), figure(80, 81))])[0] == "reproduced (2 seeds)"
    assert claims.compare([(figure(80, 81), figure(90, 91))])[0] == "not reproduced (2 seeds)"
    assert "no difference beyond the spread" in claims.compare([(figure(90, 80), figure(89, 79))])[0]
    assert claims.compare([(figure(90), figure(80, 81))])[0] == claims.NOT_JUDGED
    assert claims.compare([(figure(), figure(80, 81))])[0] == claims.NOT_RUN


@pytest.mark.parametrize(
    "now, text, seconds", [("22:40", "23:40", 3600), ("22:40", "00:10", 5400), ("00:20", "00:10", -600)]
)
def test_a_deadline_may_be_past_midnight(now, text, seconds, monkeypatch):
    hours, minutes = map(int, now.split(":"))
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2000, 1, 1, hours, minutes, 0, 0, 1, 0)))
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    assert command._deadline(text) == seconds
