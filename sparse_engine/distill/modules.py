"""The distillation loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import LossParts, kd_loss


class KDLoss(nn.Module):
    """:func:`sparse_engine.distill.functional.kd_loss` with its settings fixed.

    Example::

        criterion = KDLoss(alpha=0.9, temperature=4.0)
        loss = criterion(student(x), y, teacher(x))

    Args:
        alpha: share of the soft part.
        temperature: T.
        label_smoothing, ignore_index, reduction, return_parts: as in the function.
        class_weights: [C], moves with the module.
    """

    def __init__(
        self,
        alpha: float = 0.9,
        temperature: float = 4.0,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_weights: Tensor | None = None,
        reduction: str = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.return_parts = return_parts
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: Tensor, targets: Tensor | None, teacher_logits: Tensor) -> Tensor | LossParts:
        """The loss of [..., C] student logits, [...] labels and [..., C] teacher logits."""
        return kd_loss(
            logits,
            targets,
            teacher_logits=teacher_logits,
            alpha=self.alpha,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            class_weights=self.class_weights,
            reduction=self.reduction,
            return_parts=self.return_parts,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}, label_smoothing={self.label_smoothing}"
