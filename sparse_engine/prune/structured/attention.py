"""Multi-head attention whose heads need not add up to the embedding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CompactMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with some heads removed: same parameter names, same arguments, same results.

    PyTorch's own module insists on ``num_heads * head_dim == embed_dim``; this one takes the sizes of its weights as
    they are. Modules of PyTorch's class become this one when `compact` removes heads; nobody has to construct it.

    Example::

        small = se.compact(vision_transformer, x)
        type(small.encoder.layers[0].self_attention)      # CompactMultiheadAttention
    """

    head_dim: int
    num_heads: int

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``.

        Args:
            query: (L, N, E), or (N, L, E) with ``batch_first``, or (L, E) without a batch.
            key, value: the same with S instead of L.
            key_padding_mask: (N, S), True (or minus infinity) = ignore.
            need_weights: also return the attention weights, (N, L, S) averaged over heads or (N, heads, L, S).
            attn_mask: (L, S) or (N * heads, L, S), True = ignore, or added.
            average_attn_weights: see ``need_weights``.
            is_causal: a hint that ``attn_mask`` is causal; the mask itself decides.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = key_padding_mask.unsqueeze(0) if key_padding_mask is not None else None
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        batch, length, source = q.shape[0], q.shape[1], k.shape[1]
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        mask = self._merged_mask(attn_mask, key_padding_mask, batch, length, source, q)
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, self.dropout, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
            )
        out = self.out_proj(out.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))
        if not batched:
            return out.squeeze(0), weights.squeeze(0) if weights is not None else None
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        if self.in_proj_weight is not None:
            if query is key and key is value:
                return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)  # type: ignore[return-value]
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _merged_mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        batch: int,
        length: int,
        source: int,
        like: Tensor,
    ) -> Tensor | None:
        """Both masks as one additive tensor that broadcasts to (N, heads, L, S)."""

        def additive(mask: Tensor) -> Tensor:
            return (
                like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
                if mask.dtype.is_floating_point is False
                else mask.to(like.dtype)
            )

        merged = None
        if attn_mask is not None:
            merged = additive(attn_mask)
            merged = merged.view(batch, -1, length, source) if merged.dim() == 3 else merged.view(1, 1, length, source)
        if key_padding_mask is not None:
            padding = additive(key_padding_mask).view(batch, 1, 1, source)
            merged = padding if merged is None else merged + padding
        return merged
