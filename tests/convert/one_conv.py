"""One convolution by a kernel of choice, and what it should be."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparse_engine import _C
from sparse_engine.convert.lower import LinearChoice, LinearProblem, add_linear, make_weight


def problem_of(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int, int, int]) -> LinearProblem:
    n, c, h, w = x.shape
    rows, _, r, s = weight.shape
    geometry = {
        "n": n, "c": c, "h": h, "w": w, "r": r, "s": s, "stride": stride, "padding": padding, "dilation": (1, 1)
    }  # fmt: skip
    height = (h + padding[0] + padding[2] - r) // stride[0] + 1
    width = (w + padding[1] + padding[3] - s) // stride[1] + 1
    return LinearProblem("conv", weight.flatten(1).numpy(), rows, 1, geometry, n * height * width)


def run(
    problem: LinearProblem,
    choice: LinearChoice,
    x: Tensor,
    bias: Tensor,
    activation: tuple[str, float, float],
    residual: Tensor | None = None,
    threads: int = 2,
) -> Tensor:
    """[rows, images, pixels], computed on memory full of NaN. A residual, of the same shape, is added in place."""
    n, c, h, w = x.shape
    plane = _C.padded_pixels(problem.pixels)
    add = torch.zeros(1) if residual is None else residual.contiguous()
    plan = _C.Plan(problem.rows * plane + 64, [x.numel(), problem.rows * problem.pixels, add.numel()])
    plan.fill("poison", (0, 0, [problem.rows * plane], [1]), math.nan)
    planes = (0, 0, [problem.rows, problem.pixels], [plane, 1])
    if residual is not None:
        plan.copy("residual", (3, 0, [problem.rows, problem.pixels], [problem.pixels, 1]), planes)
    add_linear(
        plan, problem, choice, make_weight(problem, choice), bias.numpy(),
        (1, 0, [n, c, h, w], [c * h * w, h * w, w, 1]), (0, 0), (0, 0), plane,
        None if residual is None else (0, 0), plane, activation
    )  # fmt: skip
    plan.copy("out", planes, (2, 0, [problem.rows, problem.pixels], [problem.pixels, 1]))
    y = torch.empty(problem.rows, n, problem.pixels // n)
    plan.run([x.data_ptr(), y.data_ptr(), add.data_ptr()], threads)
    return y


def reference(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, ...]) -> Tensor:
    padded = nn.functional.pad(x.double(), (padding[1], padding[3], padding[0], padding[2]))
    y = nn.functional.conv2d(padded, weight.double(), bias.double(), stride)
    return y.flatten(2).transpose(0, 1)
