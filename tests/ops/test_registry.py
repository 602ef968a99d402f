"""The registry: order of candidates, explanations, explicit choice, and the environment's override."""

import pytest

from sparse_engine.errors import BackendError
from sparse_engine.ops import explain, registry


@pytest.fixture
def toy(monkeypatch):
    """An op with three backends of which "triton" refuses odd numbers."""
    monkeypatch.setattr(registry, "_candidates", {})
    for backend, why_not in (
        ("torch", lambda number: []),
        ("triton", lambda number: [f"{number} is odd"] if number % 2 else []),
        ("cpu", lambda number: ["too large", "and too slow"] if number > 100 else []),
    ):
        for op in ("toy", "toy_input_grad"):
            registry.register(op, backend, why_not=why_not)(lambda number, backend=backend: (backend, number))
    return registry


def test_auto_takes_the_first_that_can_whatever_the_order_of_registration(toy):
    assert [candidate.backend for candidate in toy.candidates("toy")] == ["triton", "cpu", "torch"]
    assert toy.choose("toy", "auto", 2).run(2) == ("triton", 2)
    assert toy.choose("toy", "auto", 3).run(3) == ("cpu", 3)
    assert toy.choose("toy", "auto", 101).run(101) == ("torch", 101)


def test_explicit_choice(toy):
    assert toy.choose("toy", "torch", 2).backend == "torch"
    with pytest.raises(BackendError) as refusal:
        toy.choose("toy", "triton", 101)
    message = str(refusal.value)
    assert "backend 'triton' cannot run this call" in message
    assert "101 is odd" in message
    assert "too large; and too slow" in message
    assert "torch   can run" in message


def test_nothing_can_run(toy, monkeypatch):
    monkeypatch.setattr(toy, "_candidates", {"toy": toy.candidates("toy")[:2]})
    with pytest.raises(BackendError, match="no backend can run this call"):
        toy.choose("toy", "auto", 101)


def test_explain_lists_every_candidate(toy):
    explanation = explain("toy", 3)
    assert explanation.chosen == "cpu"
    assert explanation.reasons == {"triton": ["3 is odd"], "cpu": [], "torch": []}
    assert str(explanation).splitlines() == [
        "toy: cpu",
        "  triton  3 is odd",
        "  cpu     chosen",
        "  torch   can run",
    ]


def test_the_environment_overrides_auto_for_an_op_and_its_gradients(toy, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "toy:torch")
    assert toy.choose("toy", "auto", 2).backend == "torch"
    assert toy.choose("toy_input_grad", "auto", 2).backend == "torch"
    assert toy.choose("toy", "cpu", 2).backend == "cpu"
    assert "SPARSE_ENGINE_IMPL asks for torch" in str(toy.explain("toy", 2))
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "toy:torch, toy_input_grad:cpu")
    assert toy.choose("toy_input_grad", "auto", 2).backend == "cpu"
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "toy:triton")
    with pytest.raises(BackendError, match="3 is odd"):
        toy.choose("toy", "auto", 3)


@pytest.mark.parametrize("text", ["toy", "toy:", "toy:gpu", "tuy:cpu", "toy:cpu,,"])
def test_an_override_that_makes_no_sense_is_refused(toy, monkeypatch, text):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", text)
    with pytest.raises(BackendError, match="op:backend"):
        toy.choose("toy", "auto", 2)


def test_registration_is_checked(toy):
    with pytest.raises(BackendError, match="already has a cpu"):
        registry.register("toy", "cpu", why_not=lambda number: [])
    with pytest.raises(BackendError, match="unknown backend 'tpu'"):
        registry.register("toy", "tpu", why_not=lambda number: [])
    with pytest.raises(BackendError, match="no op 'other'"):
        explain("other", 1)


def test_every_op_has_a_reference():
    for op in registry.ops():
        assert "torch" in [candidate.backend for candidate in registry.candidates(op)]
