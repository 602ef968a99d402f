"""N:M sparse linear layer: at most n of every m neighbouring inputs are kept, stored as n values and one bitmask per
group.

    weight [M, K]  →  values [M, K/m·n],  bits [M, K/m] (uint8 for m ≤ 8, int16 for m = 16)

A tile of the weight is expanded in registers, value = values[rank of the bit in its group], and goes straight to the
tensor cores as their left operand: acc [BM, BT] = W · xᵀ. Nothing is saved in arithmetic; bytes are: 2:4 in bf16 reads
    5
bytes where dense reads 8, 1:4 3, 2:16 6 where dense reads 32. So it wins where the weight's bytes are the bound, that
is for few tokens; with many tokens 2:4 belongs to PyTorch's semi-structured path, which skips the arithmetic too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparse_engine.errors import ShapeError, StructureError

from ._common import (
    activate,
    as_rows,
    check_activation,
    check_float,
    check_lengths,
    check_tensors,
    generation,
    grid_size,
    on_its_device,
    power_of_two,
    precision,
)

GROUPS = (2, 4, 8, 16)

# GPU generation: outputs, inputs per step, most tokens per tile, warps, stages
CONFIGS: dict[str, dict[str, int]] = {
    "sm_80": {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_T": 32, "num_warps": 4, "num_stages": 3},
    "sm_90": {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_T": 64, "num_warps": 4, "num_stages": 3},
}


def pack_nm(weight: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs a weight whose every group of m inputs has at most n non-zeros; exact zeros (−0.0 too) are what is removed.

    Example:
        >>> values, bits = pack_nm(torch.tensor([[0.0, 5.0, 0.0, 7.0]]), 2, 4)
        >>> values.tolist(), bits.tolist()
        ([[5.0, 7.0]], [[10]])

    Args:
        weight: [M, K], K a multiple of m. n: kept. m: group, 2, 4, 8 or 16.

    Returns:
        values [M, K/m·n] (zero where a group has fewer than n) and bits [M, K/m], bit j for input j of the group.

    Raises:
        StructureError: a group with more than n non-zeros, with its place.
    """
    if m not in GROUPS or not 1 <= n <= m or weight.dim() != 2 or weight.shape[1] % m:
        raise StructureError(f"pack_nm: {n}:{m} of a weight {tuple(weight.shape)}; groups are {GROUPS} and divide K")
    groups = weight.reshape(weight.shape[0], -1, m)
    kept = groups != 0
    counts = kept.sum(-1)
    if counts.numel() and int(counts.max()) > n:
        row, group = (int(i) for i in (counts > n).nonzero()[0])
        raise StructureError(
            f"pack_nm: row {row}, inputs {group * m} to {group * m + m - 1} hold {int(counts[row, group])} non-zeros; "
            f"{n}:{m} allows {n}"
        )
    order = torch.argsort(kept.to(torch.uint8), dim=-1, descending=True, stable=True)[..., :n]
    values = groups.gather(-1, order)
    values = torch.where(kept.gather(-1, order), values, 0)
    bits = (kept.int() << torch.arange(m, device=weight.device, dtype=torch.int32)).sum(-1)
    narrow = torch.uint8 if m <= 8 else torch.int16
    return values.reshape(weight.shape[0], -1).contiguous(), bits.to(narrow).contiguous()


def unpack_nm(values: torch.Tensor, bits: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The dense weight of `pack_nm`'s tensors."""
    rows, groups = bits.shape
    places = torch.arange(m, device=bits.device)
    kept = (bits.int().unsqueeze(-1) >> places) & 1
    rank = (kept.cumsum(-1) - kept).clamp(max=n - 1)
    dense = values.reshape(rows, groups, n).gather(-1, rank)
    return torch.where(kept.bool(), dense, 0).reshape(rows, groups * m)


@triton.jit
def nm_kernel(
    x_ptr,  # [T, x_stride ≥ K]
    values_ptr,  # [M, K/GROUP·KEEP]
    bits_ptr,  # [M, K/GROUP]
    bias_ptr,  # [M]
    out_ptr,  # [T, M]
    tokens,
    m,
    k,
    x_stride,
    slope,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles_m = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    row = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = (pid // tiles_m) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_in, t_in = row < m, t < tokens
    groups = k // GROUP
    bits_rows = bits_ptr + row.to(tl.int64)[:, None] * groups
    values_rows = values_ptr + row.to(tl.int64)[:, None] * (groups * KEEP)
    x_columns = x_ptr + t.to(tl.int64)[None, :] * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    for start in range(0, k, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        inside = row_in[:, None] & (i < k)[None, :]
        group = i // GROUP
        place = i % GROUP
        bits = tl.load(bits_rows + group[None, :], mask=inside, other=0).to(tl.int32)  # [BM, BK]
        # rank = how many bits lie below: a population count in 16 bits, so that the group's size costs nothing
        rank = bits & ((1 << place) - 1)[None, :]
        rank = rank - ((rank >> 1) & 0x5555)
        rank = (rank & 0x3333) + ((rank >> 2) & 0x3333)
        rank = (rank + (rank >> 4)) & 0x0F0F
        rank = (rank + (rank >> 8)) & 0x1F
        kept = ((bits >> place[None, :]) & 1) != 0
        w = tl.load(values_rows + group[None, :] * KEEP + rank, mask=inside & kept, other=0.0)
        x = tl.load(x_columns + i[:, None], mask=(i < k)[:, None] & t_in[None, :], other=0.0)  # [BK, BT]
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
    acc = activate(acc, ACTIVATION, slope)
    where = t.to(tl.int64)[None, :] * m + row[:, None]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=row_in[:, None] & t_in[None, :])


def nm_config(arch: str, tokens: int, group: int, fp32: bool) -> dict[str, int]:
    """The configuration of one launch."""
    config = dict(CONFIGS[arch])
    config["BLOCK_T"] = min(config["BLOCK_T"], power_of_two(tokens))
    if fp32:
        config["BLOCK_K"] = max(group, config["BLOCK_K"] // 2)
        config["num_stages"] = 3
        config["num_warps"] = 8
    return config


@on_its_device
def nm_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    n: int,
    m: int,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    slope: float = 0.01,
) -> torch.Tensor:
    """`activation(x · Wᵀ + bias)` for an n:m weight.

    Args:
        x: [..., K]. values, bits: from `pack_nm(weight, n, m)`. bias: [M] or None.

    Returns:
        [..., M].
    """
    name = "nm_linear"
    device = check_tensors(name, x, values, bits, bias)
    dtype = check_float(name, x, values)
    activation = check_activation(name, activation)
    outputs, groups = bits.shape
    check_lengths(
        name,
        inputs=(x.shape[-1], groups * m),
        **{"values per row": (values.shape[1], groups * n), "value rows": (values.shape[0], outputs)},
    )
    if m not in GROUPS or bits.dtype != (torch.uint8 if m <= 8 else torch.int16):
        raise ShapeError(f"{name}: bits of {bits.dtype} do not belong to groups of {m}")
    if bias is not None:
        check_lengths(name, bias=(bias.numel(), outputs))
    shape = (*x.shape[:-1], outputs)
    x = as_rows(x)
    out = x.new_empty(x.shape[0], outputs)
    if out.numel():
        config = nm_config(generation(device), x.shape[0], m, dtype == torch.float32)
        grid = (grid_size(triton.cdiv(outputs, config["BLOCK_M"]), triton.cdiv(x.shape[0], config["BLOCK_T"])),)
        nm_kernel[grid](
            x, values.contiguous(), bits.contiguous(), x if bias is None else bias, out, x.shape[0], outputs,
            groups * m, x.stride(0), slope, KEEP=n, GROUP=m, HAS_BIAS=bias is not None, ACTIVATION=activation,
            PRECISION=precision(dtype), **config,
        )  # fmt: skip
    return out.reshape(shape)


def aot_cases(arch: str) -> list:
    """Every size of group, few and many tokens, in every type."""
    from .aot import KINDS, AotCase, expected_instruction

    found = []
    cases = [("bf16", n, m, tokens) for n, m in ((1, 2), (2, 4), (1, 4), (4, 8), (2, 16)) for tokens in (4096, 16)]
    cases += [(kind, 2, 4, tokens) for kind in ("fp16", "tf32", "fp32") for tokens in (4096, 16)]
    for kind, n, m, tokens in cases:
        pointer, name, multiply = KINDS[kind]
        config = nm_config(arch, tokens, m, name == "float32")
        found.append(
            AotCase(
                name=f"{kind} {n}:{m}, {tokens} tokens",
                kernel=nm_kernel,
                signature=dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "out_ptr"), pointer)
                | {"bits_ptr": "*u8" if m <= 8 else "*i16", "slope": "fp32"}
                | dict.fromkeys(("tokens", "m", "k", "x_stride"), "i32"),
                constants={"KEEP": n, "GROUP": m, "HAS_BIAS": True, "ACTIVATION": "none", "PRECISION": multiply}
                | {name: config[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_T")},
                options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                expects=expected_instruction(kind, arch, True),
                quick=kind == "bf16" and tokens == 16 and (n, m) == (2, 4),
                divisible=("m", "k"),
            )
        )
    return found
