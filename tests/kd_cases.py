"""Cases of the distillation ops that all their backends are tested over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tests.helpers import assert_close_to_fp64

# rows, classes, k of a top-k table or None, α
TABLE_CASES = [
    (1, 2, None, 0.5),
    (7, 10, None, 0.0),
    (7, 100, None, 1.0),
    (9, 1000, None, 0.4),
    (3, 9001, None, 0.8),  # more than lie in registers
    (7, 10, 1, 0.4),
    (6, 257, 4, 0.7),
    (5, 1000, 16, 0.3),
    (4, 9001, 4, 0.6),
    (3, 20011, 16, 0.5),
]


@dataclass(frozen=True)
class TableData:
    """One case and what has to come out of it, in fp64."""

    z: torch.Tensor
    y: torch.Tensor
    table: torch.Tensor
    index: torch.Tensor | None
    samples: torch.Tensor
    scale: torch.Tensor
    alpha: float
    hard: torch.Tensor
    soft: torch.Tensor
    gradient: torch.Tensor
    predictions: torch.Tensor
    untouched: torch.Tensor

    def call(self, device: str = "cpu") -> tuple[torch.Tensor, ...]:
        """Operands of `kd_table_rows`."""
        return tuple(tensor.to(device) for tensor in (self.z, self.y, self.table, self.samples, self.scale))

    def check(self, rows, table: torch.Tensor | None = None, index: torch.Tensor | None = None) -> None:
        """What was returned and what the table holds now."""
        table, index = self.table if table is None else table.cpu(), self.index if index is None else index.cpu()
        assert_close_to_fp64(rows.hard, self.hard, name="hard")
        assert_close_to_fp64(rows.soft, self.soft, name="soft")
        assert_close_to_fp64(rows.gradient, self.gradient, name="gradient")
        if index is None:
            assert_close_to_fp64(table[self.samples], self.predictions, name="table")
        else:
            values, place = self.predictions.topk(index.shape[1])
            assert torch.equal(index[self.samples].long(), place)
            assert_close_to_fp64(table[self.samples], values, name="table")
        others = torch.ones(len(table), dtype=torch.bool)
        others[self.samples] = False
        assert torch.equal(table[others], self.untouched[others])


def table_case(rows: int, classes: int, top_k: int | None, alpha: float) -> TableData:
    """Random logits and a table that somebody has written before; one row is ignored, one logit is −∞."""
    size = rows + 3
    z, y = torch.randn(rows, classes) * 3, torch.randint(0, classes, (rows,))
    samples = torch.randperm(size)[:rows]
    scale = torch.rand(rows) + 0.1
    if top_k is None:
        table, index = torch.rand(size, classes).softmax(1), None
        past = table[samples].double()
    else:
        values, index = (torch.randn(size, classes) * 2).softmax(1).topk(top_k)
        table, index = values.clone(), index.int()
        index[samples[0], top_k - 1], table[samples[0], top_k - 1] = -1, 0  # an entry that is not used
        past = ((1 - table.double().sum(1, keepdim=True)) / (classes - top_k)).repeat(1, classes)
        for i in range(size):
            for j in range(top_k):
                if index[i, j] >= 0:
                    past[i, index[i, j]] = table[i, j].double()
        past = past[samples]
    if rows > 2:
        y[2] = -100
    if rows > 3 and classes > 4 and top_k is None:
        z[3, 1], table[samples[3], 1], past[3, 1], y[3] = -float("inf"), 0, 0, 2
    wide = z.double().requires_grad_()
    log_p = wide.log_softmax(1)
    counts = (y != -100).double()
    hard = F.cross_entropy(wide, y, reduction="none")
    soft = -torch.where(past == 0, 0.0, past * log_p).sum(1) * counts
    (((1 - alpha) * hard + alpha * soft) * scale.double()).sum().backward()
    return TableData(
        z, y, table, index, samples, scale, alpha, hard.detach(), soft.detach(), wide.grad,
        wide.detach().softmax(1), table.clone(),
    )  # fmt: skip
