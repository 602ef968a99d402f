"""The ops' GPU candidates: the same function and gradients as the reference, and reasons where they cannot run."""

from __future__ import annotations

import pytest
import torch

from sparse_engine import PackedWeight, distill
from sparse_engine.errors import BackendError
from sparse_engine.ops import Pattern, kd_rows, registry, sparse_conv2d, sparse_linear
from sparse_engine.ops.kd_table import kd_table_rows
from sparse_engine.ops.masked_linear import masked_linear
from sparse_engine.ops.sparse_linear import explain_linear
from sparse_engine.structure import Block, Channel, Unstructured
from tests.helpers import assert_close_to_fp64
from tests.kd_cases import TABLE_CASES, table_case


def make(device, structure):
    weight = torch.randn(50, 70)
    weight[:32, 16:48] = 0
    packed = PackedWeight.from_dense(weight, structure=structure)
    return packed.values.to(device), Pattern.from_packed(packed).to(device), packed.to_dense()


def test_block_linear_and_gradients(device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "sparse_linear:triton")
    values, pattern, dense = make(device, Block((32, 16)))
    x = torch.randn(3, 5, 70).to(device).requires_grad_()
    values, bias = values.requires_grad_(), torch.randn(50).to(device).requires_grad_()
    y = sparse_linear(x, values, pattern, bias)
    dy = torch.randn(3, 5, 50)
    y.backward(dy.to(device))
    x64, w64, b64 = (v.detach().cpu().double().requires_grad_() for v in (x, dense, bias))
    expected = torch.nn.functional.linear(x64, w64, b64)
    expected.backward(dy.double())
    assert_close_to_fp64(y, expected.detach())
    assert_close_to_fp64(x.grad, x64.grad)
    assert_close_to_fp64(bias.grad, b64.grad)
    kept = PackedWeight.from_dense(dense, structure=Block((32, 16)))
    assert_close_to_fp64(values.grad, kept.gather(w64.grad.float()).double())


@pytest.mark.parametrize("soft_targets", [False, True])
def test_distillation_rows(soft_targets, device, monkeypatch):
    z, t, y = torch.randn(6, 30) * 3, torch.randn(6, 30) * 3, torch.randint(0, 30, (6,))
    t = t.softmax(1) if soft_targets else t
    y[2] = -100
    scales = torch.rand(6), torch.rand(6)
    settings = {"temperature": 3.0, "soft_targets": soft_targets, "label_smoothing": 0.1, "gradient": True}
    expected = kd_rows(
        z.double(),
        y,
        t.double(),
        hard_scale=scales[0].double(),
        soft_scale=scales[1].double(),
        impl="torch",
        **settings,
    )
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "kd_rows:triton")
    logits = z.to(device).requires_grad_()
    hard_scale, soft_scale = (scale.to(device) for scale in scales)
    found = kd_rows(logits, y.to(device), t.to(device), hard_scale=hard_scale, soft_scale=soft_scale, **settings)
    for actual, reference in zip(found, expected, strict=True):
        assert_close_to_fp64(actual, reference)
    (found.hard * hard_scale + found.soft * soft_scale).sum().backward()
    assert_close_to_fp64(logits.grad, expected.gradient)


def test_distillation_loss_of_the_package(device, monkeypatch):
    """`sparse_engine.distill.kd_loss` runs on the kernel, gradients included."""
    z, t, y = torch.randn(5, 20), torch.randn(5, 20), torch.randint(0, 20, (5,))
    reference = z.double().requires_grad_()
    expected = distill.kd_loss(reference, y, teacher_logits=t.double(), temperature=4.0, alpha=0.7)
    expected.backward()
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "kd_rows:triton")
    logits = z.to(device).requires_grad_()
    loss = distill.kd_loss(logits, y.to(device), teacher_logits=t.to(device), temperature=4.0, alpha=0.7)
    loss.backward()
    assert_close_to_fp64(loss, expected.detach())
    assert_close_to_fp64(logits.grad, reference.grad)


def test_reasons_on_a_cpu():
    values, pattern, _ = make("cpu", Unstructured())
    reasons = explain_linear(torch.randn(2, 70), values, pattern).reasons
    assert "x is on cpu, not on an NVIDIA GPU" in reasons["cuda"]
    assert "x is on cpu, not on an NVIDIA GPU" in reasons["triton"]
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        sparse_linear(torch.randn(2, 70), values, pattern, impl="triton")


def test_reasons_for_the_wrong_structure(device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "sparse_linear:triton")
    values, pattern, _ = make(device, Block((4, 4)))
    with pytest.raises(BackendError, match="blocks of 4 x 4"):
        sparse_linear(torch.randn(2, 70, device=device), values, pattern)


def test_candidates_are_tried_before_the_reference():
    assert [c.backend for c in registry.candidates("sparse_linear")] == ["cuda", "triton", "cpu", "torch"]


def test_masked_linear_and_gradients(device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "masked_linear:triton")
    mask = torch.rand(40, 70) < 0.3
    x, weight, bias = torch.randn(2, 4, 70), torch.randn(40, 70), torch.randn(40)
    operands = [tensor.to(device).requires_grad_() for tensor in (x, weight, bias)]
    y = masked_linear(operands[0], operands[1], mask.to(device), operands[2])
    dy = torch.randn(2, 4, 40)
    y.backward(dy.to(device))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight * mask, bias)]
    expected = torch.nn.functional.linear(*wide)
    expected.backward(dy.double())
    assert_close_to_fp64(y, expected.detach())
    assert_close_to_fp64(operands[0].grad, wide[0].grad)
    assert_close_to_fp64(operands[1].grad, wide[1].grad * mask)
    assert_close_to_fp64(operands[2].grad, wide[2].grad)


def test_conv_of_pruned_channels_and_gradients(device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "sparse_conv2d:triton")
    weight = torch.randn(10, 8, 3, 3)
    weight[:, [1, 2, 5]] = 0
    weight[[0, 7]] = 0
    packed = PackedWeight.from_dense(weight, structure=Channel())
    pattern = Pattern.from_packed(packed).to(device)
    x, bias, values = torch.randn(2, 8, 7, 6), torch.randn(10), packed.values
    operands = [tensor.clone().to(device).requires_grad_() for tensor in (x, values, bias)]
    y = sparse_conv2d(operands[0], operands[1], pattern, operands[2], stride=(2, 1), padding=(1, 1))
    dy = torch.randn(y.shape)
    y.backward(dy.to(device))
    wide = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = torch.nn.functional.conv2d(*wide, stride=(2, 1), padding=(1, 1))
    expected.backward(dy.double())
    assert_close_to_fp64(y, expected.detach())
    assert_close_to_fp64(operands[0].grad, wide[0].grad)
    assert_close_to_fp64(operands[1].grad, packed.gather(wide[1].grad.float()).double())
    assert_close_to_fp64(operands[2].grad, wide[2].grad)


def test_conv_of_scattered_weights_is_refused(device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "sparse_conv2d:triton")
    weight = torch.randn(4, 4, 3, 3)
    weight[0, 0, 0, 0] = 0
    packed = PackedWeight.from_dense(weight, structure=Unstructured())
    with pytest.raises(BackendError, match="not made of whole channels"):
        sparse_conv2d(
            torch.randn(1, 4, 5, 5, device=device), packed.values.to(device), Pattern.from_packed(packed).to(device)
        )


@pytest.mark.parametrize("case", TABLE_CASES, ids=str)
def test_table_of_past_predictions(case, device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "kd_table_rows:triton")
    data = table_case(*case)
    z, y, table, samples, scale = data.call(device)
    index = None if data.index is None else data.index.to(device)
    rows = kd_table_rows(z, y, table, samples, scale, index=index, alpha=data.alpha, gradient=True)
    data.check(rows, table, index)


def test_a_sample_that_the_table_does_not_have_is_visible(device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "kd_table_rows:triton")
    z, y, table, samples, scale = table_case(4, 20, None, 0.5).call(device)
    samples[1] = len(table)
    before = table.clone()
    rows = kd_table_rows(z, y, table, samples, scale, alpha=0.5, gradient=True)
    assert rows.soft.isnan().tolist() == [False, True, False, False]
    assert rows.gradient[1].isnan().all()
    assert int((table != before).any(1).sum()) == 3


@pytest.mark.parametrize("top_k", [None, 4])
def test_progressive_self_distillation_of_the_package(top_k, device, monkeypatch):
    """The objective with its table beside the model runs on the kernel, and does what it does on the CPU."""
    model = torch.nn.Linear(8, 12)
    batch = distill.Batch(torch.randn(5, 8), torch.randint(0, 12, (5,)), indices=torch.tensor([4, 0, 6, 2, 5]))
    there = distill.Batch(batch.inputs.to(device), batch.targets.to(device), indices=batch.indices.to(device))
    labels = torch.randint(0, 12, (7,))
    labels[batch.indices] = batch.targets
    plain = distill.ProgressiveSelfDistillation(labels, 12, alpha=0.6, top_k=top_k)
    fused = distill.ProgressiveSelfDistillation(
        labels, 12, alpha=0.6, top_k=top_k, dtype=torch.float16, device=torch.device(device)
    )
    for step in range(3):
        model.zero_grad()
        model.to("cpu")
        expected = plain(model, batch)
        expected.backward()
        gradient = model.weight.grad.clone()
        model.zero_grad()
        model.to(device)
        with monkeypatch.context() as patch:
            patch.setenv("SPARSE_ENGINE_IMPL", "kd_table_rows:triton,kd_rows:triton")
            loss = fused(model, there)
            loss.backward()
        torch.testing.assert_close(loss.cpu(), expected, rtol=2e-3, atol=1e-5)  # fp16 predictions
        torch.testing.assert_close(model.weight.grad.cpu(), gradient, rtol=5e-3, atol=5e-4)
        torch.testing.assert_close(fused.table.cpu().float(), plain.table, rtol=1e-3, atol=1e-6)
        with torch.no_grad():
            model.weight.mul_(1.1 + step / 10)
    if top_k is not None:
        assert torch.equal(fused.index.cpu(), plain.index)


@pytest.mark.parametrize("form", ["kl", "ce"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_upstream_gradient_is_applied_in_place_and_again(reduction, form, device, monkeypatch):
    """The saved gradient is given away by the first backward pass; a second one computes it anew."""
    z, t, y = torch.randn(5, 20), torch.randn(5, 20), torch.randint(0, 20, (5,))
    y[1] = -100
    weights = torch.rand(5)
    upstream = torch.rand(5) if reduction == "none" else torch.tensor(0.7)
    settings = {"temperature": 3.0, "alpha": 0.7, "soft_form": form, "reduction": reduction, "label_smoothing": 0.1}
    reference = z.double().requires_grad_()
    expected = distill.kd_loss(reference, y, teacher_logits=t.double(), sample_weights=weights.double(), **settings)
    expected.backward(upstream.double())
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "kd_rows:triton")
    logits = z.to(device).requires_grad_()
    loss = distill.kd_loss(
        logits, y.to(device), teacher_logits=t.to(device), sample_weights=weights.to(device), **settings
    )
    first = torch.autograd.grad(loss, logits, upstream.to(device), retain_graph=True)[0].clone()
    again = torch.autograd.grad(loss, logits, upstream.to(device), retain_graph=True)[0]
    assert_close_to_fp64(loss, expected.detach())
    assert_close_to_fp64(first, reference.grad)
    assert torch.equal(first, again)
    one = torch.autograd.grad(loss.sum(), logits, create_graph=True)[0]
    assert one.requires_grad


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_last_layer_and_loss_in_chunks(dtype, chunk, device, monkeypatch):
    h, w, b = torch.randn(9, 16), torch.randn(30, 16), torch.randn(30)
    th, tw, y = torch.randn(9, 24), torch.randn(30, 24), torch.randint(0, 30, (9,))
    y[4] = -100
    weights = torch.rand(9)
    low = [tensor.to(dtype) for tensor in (h, w, b, th, tw)]
    wide = [tensor.double().requires_grad_() for tensor in low]
    settings = {"temperature": 2.0, "alpha": 0.6, "label_smoothing": 0.1}
    expected = distill.linear_kd_loss(
        wide[0], wide[1], wide[3], wide[4], y, bias=wide[2], sample_weights=weights.double(), **settings
    )
    expected.backward()
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "linear_kd:triton")
    h, w, b, th, tw = (tensor.to(device).requires_grad_() for tensor in low)
    loss = distill.linear_kd_loss(
        h, w, th, tw, y.to(device), bias=b, sample_weights=weights.to(device), chunk=chunk, **settings
    )
    loss.backward()
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close_to_fp64(loss, expected.detach(), bound)
    for tensor, reference in zip((h, w, b), wide[:3], strict=True):
        assert_close_to_fp64(tensor.grad, reference.grad, bound)
    assert th.grad is None
