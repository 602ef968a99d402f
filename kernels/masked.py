"""Linear layer whose mask may change every step: tiles of the weight that are all zero are skipped, decided on the GPU.

    1. tile_flags:    one program per tile of the mask (128 × 64): is anything kept?
    2. tile_compact:  one program per row of tiles: the list of kept tiles, and its length     (and per column)
    3. product:       out[t, m tile] = Σ over the list: x[t, k tile] · (W ∘ mask)[m tile, k tile]ᵀ

No list is read by the host, so there is no synchronisation and the whole step can be captured in a CUDA graph. The
product runs transposed, acc [BM, BT] = (W ∘ mask) · xᵀ: the masked weight is then the left operand, which the tensor
cores of Hopper take from registers, so masking costs no trip through shared memory. At no sparsity it is a dense
product that reads one byte of mask per weight more; tiles are 128 rows high so that it is as intense as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_engine.errors import ShapeError

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

TILE = (128, 64)
TILE_SIDES = (16, 32, 64, 128)

# GPU generation: tokens per tile, warps, stages of the products; tokens per step of the weight gradient
CONFIGS: dict[str, dict[str, int]] = {
    "sm_80": {"BLOCK_T": 128, "num_warps": 8, "num_stages": 4},
    "sm_90": {"BLOCK_T": 256, "num_warps": 8, "num_stages": 4},
}
GRADIENT_CONFIGS: dict[str, dict[str, int]] = {
    "sm_80": {"BLOCK_T": 64, "num_warps": 4, "num_stages": 3},
    "sm_90": {"BLOCK_T": 64, "num_warps": 4, "num_stages": 4},
}


@dataclass(frozen=True)
class TileLists:
    """Which tiles of a mask hold anything, as the products read it; made on the device by `tile_lists`.

    Attributes:
        shape: (M, K) of the mask. tile: (rows, columns) of a tile.
        flags: [Mt, Kt] uint8.
        by_row: [Mt, Kt] int32, kept tile columns of each tile row first; row_counts: [Mt] int32, how many.
        by_column: [Kt, Mt] int32, kept tile rows of each tile column first; column_counts: [Kt] int32.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    flags: torch.Tensor
    by_row: torch.Tensor
    row_counts: torch.Tensor
    by_column: torch.Tensor
    column_counts: torch.Tensor


@triton.jit
def tile_flags_kernel(
    mask_ptr,  # [M, stride ≥ K] any type
    flags_ptr,  # [Mt, Kt] uint8 out
    m,
    k,
    stride,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_k = tl.cdiv(k, BK)
    pid = tl.program_id(0)
    rows = (pid // tiles_k) * BM + tl.arange(0, BM)
    columns = (pid % tiles_k) * BK + tl.arange(0, BK)
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    value = tl.load(mask_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0)
    kept = tl.max(tl.max((value != 0).to(tl.int32), 1), 0)
    tl.store(flags_ptr + pid, kept.to(tl.uint8))


@triton.jit
def tile_compact_kernel(
    flags_ptr,  # flags of list i, entry j at i·outer + j·inner
    list_ptr,  # [lists, entries] int32 out
    count_ptr,  # [lists] int32 out
    entries,
    outer,
    inner,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    flag = tl.load(flags_ptr + i * outer + j * inner, mask=j < entries, other=0).to(tl.int32)
    place = tl.cumsum(flag, 0) - flag
    tl.store(list_ptr + i * entries + place, j, mask=flag != 0)
    tl.store(count_ptr + i, tl.sum(flag, 0))


@triton.jit
def masked_product_kernel(
    x_ptr,  # [T, x_stride ≥ N_IN]
    w_ptr,  # weight of output o and input i at o·w_out + i·w_in
    mask_ptr,  # likewise
    list_ptr,  # [output tiles, input tiles] int32
    count_ptr,  # [output tiles] int32
    bias_ptr,  # [N_OUT]
    out_ptr,  # [T, out_stride ≥ N_OUT]
    tokens,
    n_out,
    n_in,
    x_stride,
    out_stride,
    w_out,
    w_in,
    mask_out,
    mask_in,
    slope,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles_o = tl.cdiv(n_out, BO)
    pid = tl.program_id(0)
    o_tile = pid % tiles_o  # neighbours share the tokens of x
    t = (pid // tiles_o) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = o_tile * BO + tl.arange(0, BO)
    o_in = o < n_out
    t_in = t < tokens
    count = tl.load(count_ptr + o_tile)
    entries = tl.cdiv(n_in, BI)
    x_columns = x_ptr + t.to(tl.int64)[None, :] * x_stride
    # one of the two weight strides is 1: leaving it out lets the compiler see contiguous rows
    if TRANSPOSED:
        w_rows = w_ptr + o[:, None]
        m_rows = mask_ptr + o[:, None]
    else:
        w_rows = w_ptr + o.to(tl.int64)[:, None] * w_out
        m_rows = mask_ptr + o.to(tl.int64)[:, None] * mask_out
    PARTS: tl.constexpr = BI // STEP
    acc = tl.zeros((BO, BLOCK_T), tl.float32)
    for step in range(count * PARTS):
        tile = tl.load(list_ptr + o_tile * entries + step // PARTS)
        i = tile * BI + (step % PARTS) * STEP + tl.arange(0, STEP)
        i_in = i < n_in
        inside = o_in[:, None] & i_in[None, :]
        if TRANSPOSED:
            w = tl.load(w_rows + i.to(tl.int64)[None, :] * w_in, mask=inside, other=0.0)
            if MASKED:
                keep = tl.load(m_rows + i.to(tl.int64)[None, :] * mask_in, mask=inside, other=0)
                w = tl.where(keep != 0, w, 0.0)
        else:
            w = tl.load(w_rows + i[None, :], mask=inside, other=0.0)
            if MASKED:
                keep = tl.load(m_rows + i[None, :], mask=inside, other=0)
                w = tl.where(keep != 0, w, 0.0)
        x = tl.load(x_columns + i[:, None], mask=i_in[:, None] & t_in[None, :], other=0.0)  # [STEP, BT]
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o, mask=o_in, other=0.0).to(tl.float32)[:, None]
    acc = activate(acc, ACTIVATION, slope)
    where = t.to(tl.int64)[None, :] * out_stride + o[:, None]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=o_in[:, None] & t_in[None, :])


@triton.jit
def masked_weight_gradient_kernel(
    dy_ptr,  # [T, dy_stride ≥ M]
    x_ptr,  # [T, x_stride ≥ K]
    mask_ptr,  # [M, mask_stride ≥ K]
    flags_ptr,  # [Mt, Kt] uint8
    out_ptr,  # [M, K]
    tokens,
    m,
    k,
    dy_stride,
    x_stride,
    mask_stride,
    MASKED: tl.constexpr,
    EVERYWHERE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles_k = tl.cdiv(k, BK)
    pid = tl.program_id(0)
    rows = (pid // tiles_k) * BM + tl.arange(0, BM)
    columns = (pid % tiles_k) * BK + tl.arange(0, BK)
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    steps = tl.cdiv(tokens, BLOCK_T)
    if not EVERYWHERE:
        steps = tl.where(tl.load(flags_ptr + pid) != 0, steps, 0)  # an empty loop, then zeros
    t = tl.arange(0, BLOCK_T)
    acc = tl.zeros((BM, BK), tl.float32)
    for step in range(steps):
        token = step * BLOCK_T + t
        t_in = token < tokens
        token = token.to(tl.int64)
        left = (rows < m)[:, None] & t_in[None, :]
        right = t_in[:, None] & (columns < k)[None, :]
        dy = tl.load(dy_ptr + token[None, :] * dy_stride + rows[:, None], mask=left, other=0.0)
        x = tl.load(x_ptr + token[:, None] * x_stride + columns[None, :], mask=right, other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    if MASKED:
        keep = tl.load(mask_ptr + rows.to(tl.int64)[:, None] * mask_stride + columns[None, :], mask=inside, other=0)
        acc = tl.where(keep != 0, acc, 0.0)
    where = rows.to(tl.int64)[:, None] * k + columns[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=inside)


@on_its_device
def tile_lists(mask: torch.Tensor, tile: tuple[int, int] = TILE) -> TileLists:
    """Finds the tiles of a mask (or of a weight: its non-zeros) that hold anything. Three launches, no synchronisation.

    Args:
        mask: [M, K], bool or any number type, columns contiguous.
        tile: rows × columns, each 16, 32, 64 or 128.
    """
    check_tensors("tile_lists", mask)
    if mask.dim() != 2 or tile[0] not in TILE_SIDES or tile[1] not in TILE_SIDES:
        raise ShapeError(f"tile_lists: a matrix and tiles of {TILE_SIDES}; got {tuple(mask.shape)} and {tile}")
    mask = mask if mask.stride(1) == 1 else mask.contiguous()
    source = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    m, k = mask.shape
    rows, columns = triton.cdiv(m, tile[0]), triton.cdiv(k, tile[1])
    flags = torch.empty(rows, columns, dtype=torch.uint8, device=mask.device)
    whole = {"dtype": torch.int32, "device": mask.device}
    by_row, row_counts = torch.zeros(rows, columns, **whole), torch.zeros(rows, **whole)
    by_column, column_counts = torch.zeros(columns, rows, **whole), torch.zeros(columns, **whole)
    if flags.numel():
        tile_flags_kernel[(grid_size(rows, columns),)](
            source, flags, m, k, source.stride(0), BM=tile[0], BK=tile[1], num_warps=4
        )
        tile_compact_kernel[(rows,)](
            flags, by_row, row_counts, columns, columns, 1, BLOCK=power_of_two(columns), num_warps=4
        )
        tile_compact_kernel[(columns,)](
            flags, by_column, column_counts, rows, 1, columns, BLOCK=power_of_two(rows), num_warps=4
        )
    return TileLists((m, k), tile, flags, by_row, row_counts, by_column, column_counts)


@on_its_device
def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    lists: TileLists,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    slope: float = 0.01,
) -> torch.Tensor:
    """`activation(x · (weight ∘ mask)ᵀ + bias)`, skipping tiles of the mask that are all zero.

    Args:
        x: [..., K]. weight: [M, K]. mask: [M, K] bool, or None where the weight already holds zeros.
        lists: `tile_lists(mask)` (or of the weight), made again whenever the mask changes.
        bias: [M] or None.

    Returns:
        [..., M]. The result does not depend on numbers of the weight under the mask, NaN included.
    """
    return _product("masked_linear", x, weight, mask, lists, False, bias, check_activation("masked", activation), slope)


@on_its_device
def masked_input_gradient(
    dy: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None, lists: TileLists
) -> torch.Tensor:
    """`dy · (weight ∘ mask)`: [..., K]."""
    return _product("masked_input_gradient", dy, weight, mask, lists, True, None, "none", 0.0)


@on_its_device
def masked_weight_gradient(
    dy: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, lists: TileLists, everywhere: bool = False
) -> torch.Tensor:
    """`dyᵀ · x`: [M, K], zero where the mask is.

    Args:
        mask: None: every number of a tile that holds anything.
        everywhere: the dense gradient, as growing weights back (RigL) needs it; the mask is not applied.
    """
    name = "masked_weight_gradient"
    device = check_tensors(name, dy, x, mask, lists.flags)
    dtype = check_float(name, dy, x)
    m, k = lists.shape
    dy, x = as_rows(dy), as_rows(x)
    check_lengths(name, outputs=(dy.shape[1], m), inputs=(x.shape[1], k), tokens=(dy.shape[0], x.shape[0]))
    out = x.new_empty(m, k)
    if not out.numel():
        return out
    masked = mask is not None and not everywhere
    mask_bytes = _mask_bytes(mask, lists.shape, name) if masked else lists.flags
    config = gradient_config(generation(device), lists.tile, dtype)
    masked_weight_gradient_kernel[(grid_size(*lists.flags.shape),)](
        dy, x, mask_bytes, lists.flags, out, x.shape[0], m, k, dy.stride(0), x.stride(0), mask_bytes.stride(0),
        MASKED=masked, EVERYWHERE=everywhere, PRECISION=precision(dtype), BM=lists.tile[0], BK=lists.tile[1], **config,
    )  # fmt: skip
    return out


def gradient_config(arch: str, tile: tuple[int, int], dtype: torch.dtype) -> dict[str, int]:
    """The configuration of one launch of the weight gradient."""
    config = dict(GRADIENT_CONFIGS[arch])
    if dtype == torch.float32:
        config["BLOCK_T"] //= 2
    if dtype == torch.float32 or tile[0] * tile[1] > 128 * 64:
        config["num_warps"] = 8  # as few sums per thread as registers allow
    if tile[0] * tile[1] <= 32 * 32:
        config["num_warps"] = 2
    return config


def product_config(arch: str, inputs_per_tile: int, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """The configuration of one product launch."""
    config = dict(CONFIGS[arch])
    config["BLOCK_T"] = min(config["BLOCK_T"], power_of_two(tokens))
    config["STEP"] = min(inputs_per_tile, 64 if arch == "sm_90" else 32)
    if dtype == torch.float32:
        config["BLOCK_T"] = min(config["BLOCK_T"], 128)
        config["STEP"] = min(inputs_per_tile, 32)
        config["num_stages"] = 3
    return config


def _product(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    lists: TileLists,
    transposed: bool,
    bias: torch.Tensor | None,
    activation: str,
    slope: float,
) -> torch.Tensor:
    device = check_tensors(name, x, weight, mask, lists.flags, bias)
    dtype = check_float(name, x, weight)
    check_lengths(name, **{"lists' shape": (lists.shape, tuple(weight.shape))})  # type: ignore[dict-item]
    n_out, n_in = lists.shape[::-1] if transposed else lists.shape
    tile_out, tile_in = lists.tile[::-1] if transposed else lists.tile
    check_lengths(name, inputs=(x.shape[-1], n_in))
    if bias is not None:
        check_lengths(name, bias=(bias.numel(), n_out))
    shape = (*x.shape[:-1], n_out)
    x = as_rows(x)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    mask_bytes = _mask_bytes(mask, lists.shape, name) if mask is not None else lists.flags
    out = x.new_empty(x.shape[0], n_out)
    if not out.numel():
        return out.reshape(shape)
    config = product_config(generation(device), tile_in, dtype, x.shape[0])
    w_strides, mask_strides = weight.stride(), mask_bytes.stride()
    if transposed:
        w_strides, mask_strides = w_strides[::-1], mask_strides[::-1]
    masked_product_kernel[(grid_size(triton.cdiv(n_out, tile_out), triton.cdiv(x.shape[0], config["BLOCK_T"])),)](
        x, weight, mask_bytes, lists.by_column if transposed else lists.by_row,
        lists.column_counts if transposed else lists.row_counts, bias if bias is not None else x, out,
        x.shape[0], n_out, n_in, x.stride(0), out.stride(0), *w_strides, *mask_strides, slope,
        MASKED=mask is not None, HAS_BIAS=bias is not None, TRANSPOSED=transposed, ACTIVATION=activation,
        PRECISION=precision(dtype), BO=tile_out, BI=tile_in, **config,
    )  # fmt: skip
    return out.reshape(shape)


def _mask_bytes(mask: torch.Tensor, shape: tuple[int, int], name: str) -> torch.Tensor:
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ShapeError(f"{name}: mask must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
    return (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)


def aot_cases(arch: str) -> list:
    """Products and gradient in the default tile in every type, in other tiles in bf16, and the list kernels."""
    from .aot import KINDS, AotCase, expected_instruction

    found = []
    sizes = ("tokens", "n_out", "n_in", "x_stride", "out_stride")
    tiles = [(kind, TILE, 4096) for kind in KINDS] + [("bf16", TILE, 16)]
    tiles += [("bf16", tile, 4096) for tile in ((64, 64), (128, 128), (16, 16), (16, 128))]
    for kind, tile, tokens in tiles:
        pointer, name, multiply = KINDS[kind]
        dtype = getattr(torch, name)
        shown = f"{kind} {tile[0]}×{tile[1]}, {tokens} tokens"
        for transposed in (False, True):
            for masked in (True, False) if tile == TILE and tokens == 4096 else (True,):
                tile_out, tile_in = tile[::-1] if transposed else tile
                config = product_config(arch, tile_in, dtype, tokens)
                pointers = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "out_ptr"), pointer)
                strides = {"w_in": "i32", "mask_in": "i32"} if transposed else {"w_out": "i32", "mask_out": "i32"}
                unit = {"w_out": 1, "mask_out": 1} if transposed else {"w_in": 1, "mask_in": 1}
                found.append(
                    AotCase(
                        name=f"{shown}{' transposed' if transposed else ''}{'' if masked else ', zeros in place'}",
                        kernel=masked_product_kernel,
                        signature=pointers
                        | {"mask_ptr": "*u8", "list_ptr": "*i32", "count_ptr": "*i32", "slope": "fp32"}
                        | dict.fromkeys(sizes, "i32")
                        | strides,
                        constants={"MASKED": masked, "HAS_BIAS": not transposed, "TRANSPOSED": transposed}
                        | {"ACTIVATION": "none", "PRECISION": multiply, "BO": tile_out, "BI": tile_in}
                        | {"STEP": config["STEP"], "BLOCK_T": config["BLOCK_T"]}
                        | unit,
                        options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                        expects=expected_instruction(kind, arch, tile_out >= 64),
                        quick=kind == "bf16" and masked and tile == TILE and tokens == 4096,
                        divisible=("n_out", "n_in", "w_out", "w_in", "mask_out", "mask_in"),
                    )
                )
        if tokens != 4096:
            continue
        config = gradient_config(arch, tile, dtype)
        found.append(
            AotCase(
                name=f"{kind} {tile[0]}×{tile[1]}",
                kernel=masked_weight_gradient_kernel,
                signature=dict.fromkeys(("dy_ptr", "x_ptr", "out_ptr"), pointer)
                | {"mask_ptr": "*u8", "flags_ptr": "*u8"}
                | dict.fromkeys(("tokens", "m", "k", "dy_stride", "x_stride", "mask_stride"), "i32"),
                constants={"MASKED": True, "EVERYWHERE": False, "PRECISION": multiply, "BM": tile[0], "BK": tile[1]}
                | {"BLOCK_T": config["BLOCK_T"]},
                options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                expects=expected_instruction(kind, arch, tile[0] >= 64),
                quick=kind == "bf16" and tile == TILE,
                divisible=("m", "k"),
            )
        )
    for source, pointer in (("bytes", "*u8"), ("bf16", "*bf16"), ("fp32", "*fp32")):
        found.append(
            AotCase(
                name=f"{TILE[0]}×{TILE[1]} of {source}",
                kernel=tile_flags_kernel,
                signature={"mask_ptr": pointer, "flags_ptr": "*u8", "m": "i32", "k": "i32", "stride": "i32"},
                constants={"BM": TILE[0], "BK": TILE[1]},
                options={"num_warps": 4, "num_stages": 1},
                divisible=("k",),
            )
        )
    found += [
        AotCase(
            name=f"{count} tiles",
            kernel=tile_compact_kernel,
            signature={"flags_ptr": "*u8", "list_ptr": "*i32", "count_ptr": "*i32"}
            | dict.fromkeys(("entries", "outer", "inner"), "i32"),
            constants={"BLOCK": count},
            options={"num_warps": 4, "num_stages": 1},
        )
        for count in (16, 64, 1024)
    ]
    return found
