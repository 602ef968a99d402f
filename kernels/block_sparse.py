"""Block-sparse linear layer: forward, input gradient (dsd) and weight gradient sampled at the kept blocks (sdd).

The weight is M × K in blocks of R × C, of which B are kept: `values [B, R, C]`, block rows in order, and a
`BlockPattern` built once.

One program of dsd computes one tile of the output, for one block row i:

    x [T, K]      ┌ BT ┐                values of row i: [R, C] [R, C] [R, C] …
                  │    │ · C columns    acc [BT, R] += x[t, C·col(b) …] · values[b]ᵀ     for b in row i
                  └    ┘                out[t, R·i …] = act(acc + bias)

Loop order: kept blocks of the row (in steps of BK inputs), everything else stays in registers. Each step moves
(BT + R)·BK numbers for 2·BT·R·BK operations, so the intensity towards the L2 cache is BT·R/(BT + R) operations per byte
in bf16: R, not the sparsity, sets the bound. Rows are launched longest first, so that a row with many blocks does not
start last.

The input gradient is the same kernel over the transposed pattern and the same values (`order` finds a block). In sdd
one program computes one kept block, dW[b] = dyᵀ[R, T] · x[T, C], looping over T, which is split over programs where
there are few blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparse_engine.errors import ShapeError

if TYPE_CHECKING:
    from sparse_engine.packed import PackedWeight

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

BLOCK_SIZES = (16, 32, 64, 128)

# (GPU generation, outputs per block): tokens per tile, inputs per step, warps, stages. fp32 halves the step (twice the
# bytes). The block index is itself a pipelined
# load, which takes two of the stages: 5 stages keep 3 tiles in flight.
DSD_CONFIGS: dict[tuple[str, int], dict[str, int]] = {
    ("sm_80", 16): {"BLOCK_T": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    ("sm_80", 32): {"BLOCK_T": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    ("sm_80", 64): {"BLOCK_T": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    ("sm_80", 128): {"BLOCK_T": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
    ("sm_90", 16): {"BLOCK_T": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    ("sm_90", 32): {"BLOCK_T": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    ("sm_90", 64): {"BLOCK_T": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 5},
    ("sm_90", 128): {"BLOCK_T": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 5},
}
# (GPU generation, larger side of the block): tokens per step, warps, stages
SDD_CONFIGS: dict[tuple[str, int], dict[str, int]] = {
    ("sm_80", 16): {"BLOCK_T": 64, "num_warps": 1, "num_stages": 4},
    ("sm_80", 32): {"BLOCK_T": 64, "num_warps": 2, "num_stages": 4},
    ("sm_80", 64): {"BLOCK_T": 64, "num_warps": 4, "num_stages": 4},
    ("sm_80", 128): {"BLOCK_T": 32, "num_warps": 8, "num_stages": 4},
    ("sm_90", 16): {"BLOCK_T": 64, "num_warps": 1, "num_stages": 4},
    ("sm_90", 32): {"BLOCK_T": 64, "num_warps": 2, "num_stages": 4},
    ("sm_90", 64): {"BLOCK_T": 64, "num_warps": 4, "num_stages": 4},
    ("sm_90", 128): {"BLOCK_T": 64, "num_warps": 8, "num_stages": 4},
}


@dataclass(frozen=True)
class BlockPattern:
    """Where the kept blocks of a weight are, in the orders that the three products read. Built once by `block_pattern`;
    all tensors int32 on one device.

    Attributes:
        shape: (M, K) of the dense weight.
        block: (R, C), each of 16, 32, 64, 128.
        row_ptr: [M/R + 1], first block of each block row.
        cols: [B], the block column of each block.
        rows: [B], the block row of each block.
        row_order: [M/R], block rows by falling number of blocks.
        col_ptr, col_rows, col_order: the transposed pattern: [K/C + 1], [B] block rows, [B] index of the block in
            `values`.
        column_order: [K/C], block columns by falling number of blocks.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    row_ptr: torch.Tensor
    cols: torch.Tensor
    rows: torch.Tensor
    row_order: torch.Tensor
    col_ptr: torch.Tensor
    col_rows: torch.Tensor
    col_order: torch.Tensor
    column_order: torch.Tensor

    @property
    def blocks(self) -> int:
        """The number of kept blocks, B."""
        return self.cols.numel()

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return BlockPattern(self.shape, self.block, **moved)


def block_pattern(kept: torch.Tensor, block: tuple[int, int], shape: tuple[int, int] | None = None) -> BlockPattern:
    """The pattern of a weight whose kept blocks are given, with every index table that its kernels need.

    Example:
        >>> kept = torch.tensor([[True, False], [True, True]])
        >>> block_pattern(kept, (32, 64)).row_ptr.tolist()
        [0, 1, 3]

    Args:
        kept: [ceil(M/R), ceil(K/C)] bool, True where a block is kept.
        block: (R, C), outputs × inputs, each 16, 32, 64 or 128.
        shape: (M, K) of the weight; the last block row and column may stick out. Default: exact multiples.

    Raises:
        ShapeError: a block size without a kernel, or a grid of blocks that does not cover the shape.
    """
    rows, cols = block
    if rows not in BLOCK_SIZES or cols not in BLOCK_SIZES:
        raise ShapeError(
            f"block {rows}×{cols}: the GPU kernels take sides of {', '.join(map(str, BLOCK_SIZES))}; use impl='torch'"
        )
    if kept.dim() != 2 or kept.dtype != torch.bool:
        raise ShapeError(f"kept must be a 2-D bool tensor, got {tuple(kept.shape)} {kept.dtype}")
    shape = shape or (kept.shape[0] * rows, kept.shape[1] * cols)
    check_lengths(
        "block_pattern",
        **{"block rows": (kept.shape[0], -(-shape[0] // rows)), "block columns": (kept.shape[1], -(-shape[1] // cols))},
    )
    row_index, col_index = kept.nonzero(as_tuple=True)
    row_ptr, row_order = _pointers(kept.sum(1))
    col_ptr, column_order = _pointers(kept.sum(0))
    by_column = torch.argsort(col_index, stable=True)
    return BlockPattern(
        shape=(int(shape[0]), int(shape[1])),
        block=(rows, cols),
        row_ptr=row_ptr,
        cols=col_index.int(),
        rows=row_index.int(),
        row_order=row_order,
        col_ptr=col_ptr,
        col_rows=row_index[by_column].int(),
        col_order=by_column.int(),
        column_order=column_order,
    )


def pattern_of(packed: PackedWeight, device: torch.device | str | None = None) -> BlockPattern:
    """The pattern of a `PackedWeight` with structure `Block`; its `values.reshape(-1, R, C)` are the kernels' values as
    they lie.

    Raises:
        ShapeError: another structure, a transposed view, or a block size without a kernel.
    """
    if packed.order is not None or packed.block == (1, 1):
        raise ShapeError(
            f"{packed.structure} {'transposed view ' if packed.order is not None else ''}has no block pattern; "
            "pack with structure=Block((64, 64))"
        )
    cells = packed.blocks()
    grid = packed.grid
    kept = torch.zeros(grid, dtype=torch.bool)
    rows = torch.repeat_interleave(torch.arange(grid[0]), cells.row_ptr.diff())
    kept[rows, cells.cols.long()] = True
    pattern = block_pattern(kept, packed.block, (packed.rows, packed.columns))
    return pattern if device is None else pattern.to(device)


def pack_blocks(weight: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    """The kept blocks of a dense weight, `[B, R, C]`; parts of blocks that stick out of the weight are zero."""
    (m, k), (rows, cols) = pattern.shape, pattern.block
    check_lengths("pack_blocks", outputs=(weight.shape[0], m), inputs=(weight.shape[1], k))
    padded = torch.nn.functional.pad(weight, (0, -k % cols, 0, -m % rows))
    tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols).transpose(1, 2)
    return tiles[pattern.rows.long(), pattern.cols.long()].contiguous()


def unpack_blocks(values: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    """The dense weight [M, K] of packed blocks; the inverse of `pack_blocks`."""
    (m, k), (rows, cols) = pattern.shape, pattern.block
    tiles = values.new_zeros(-(-m // rows), -(-k // cols), rows, cols)
    tiles[pattern.rows.long(), pattern.cols.long()] = values
    return tiles.transpose(1, 2).reshape(tiles.shape[0] * rows, tiles.shape[1] * cols)[:m, :k].contiguous()


@triton.jit
def dsd_kernel(
    x_ptr,  # [T, x_stride ≥ N_IN]
    values_ptr,  # [B, OUT_BLOCK, IN_BLOCK], or [B, IN_BLOCK, OUT_BLOCK] when TRANSPOSED
    ptr_ptr,  # [N_OUT / OUT_BLOCK + 1] int32
    index_ptr,  # [B] int32: which block of inputs
    order_ptr,  # [B] int32: where its values are (TRANSPOSED only)
    out_order_ptr,  # [N_OUT / OUT_BLOCK] int32: output blocks, longest first
    bias_ptr,  # [N_OUT]
    residual_ptr,  # [T, out_stride]
    out_ptr,  # [T, out_stride ≥ N_OUT]
    tokens,
    n_out,
    n_in,
    x_stride,
    out_stride,
    slope,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_IN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    block_row = tl.load(out_order_ptr + pid // tiles_t)
    t = (pid % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_in = t < tokens
    first = tl.load(ptr_ptr + block_row)
    last = tl.load(ptr_ptr + block_row + 1)
    x_rows = x_ptr + t.to(tl.int64)[:, None] * x_stride  # [BT, 1]
    r = tl.arange(0, OUT_BLOCK)
    k = tl.arange(0, BLOCK_K)
    OUT_STRIDE: tl.constexpr = 1 if TRANSPOSED else IN_BLOCK
    IN_STRIDE: tl.constexpr = OUT_BLOCK if TRANSPOSED else 1
    acc = tl.zeros((BLOCK_T, OUT_BLOCK), tl.float32)
    if BLOCK_K <= IN_BLOCK:
        # one block at a time, in IN_BLOCK / BLOCK_K parts: the index is a scalar
        PARTS: tl.constexpr = IN_BLOCK // BLOCK_K
        for step in range(first * PARTS, last * PARTS):
            b = step // PARTS
            inner = (step % PARTS) * BLOCK_K + k
            column = tl.load(index_ptr + b) * IN_BLOCK + inner
            where = tl.load(order_ptr + b) if TRANSPOSED else b
            keep = t_in[:, None] if EVEN_IN else t_in[:, None] & (column < n_in)[None, :]
            x = tl.load(x_rows + column[None, :], mask=keep, other=0.0)  # [BT, BK]
            w = tl.load(
                values_ptr
                + where.to(tl.int64) * (OUT_BLOCK * IN_BLOCK)
                + inner[:, None] * IN_STRIDE
                + r[None, :] * OUT_STRIDE
            )  # [BK, R]
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    else:
        # several small blocks make one step: an index per block, contiguous runs of IN_BLOCK numbers
        EACH: tl.constexpr = BLOCK_K // IN_BLOCK
        for base in range(first, last, EACH):
            b = base + k // IN_BLOCK
            inner = k % IN_BLOCK
            there = b < last
            column = tl.load(index_ptr + b, mask=there, other=0) * IN_BLOCK + inner
            column = tl.max_contiguous(tl.multiple_of(column, 16), 16)
            where = tl.load(order_ptr + b, mask=there, other=0) if TRANSPOSED else b
            start = where.to(tl.int64) * (OUT_BLOCK * IN_BLOCK) + inner * IN_STRIDE
            if not TRANSPOSED:
                start = tl.max_contiguous(tl.multiple_of(start, 16), 16)
            inside = there if EVEN_IN else there & (column < n_in)
            x = tl.load(x_rows + column[None, :], mask=t_in[:, None] & inside[None, :], other=0.0)
            w = tl.load(values_ptr + start[:, None] + r[None, :] * OUT_STRIDE, mask=there[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    column = block_row * OUT_BLOCK + r
    keep = t_in[:, None] & (column < n_out)[None, :]
    offsets = t.to(tl.int64)[:, None] * out_stride + column[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column, mask=column < n_out, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION, slope)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def sdd_kernel(
    dy_ptr,  # [T, dy_stride ≥ M]
    x_ptr,  # [T, x_stride ≥ K]
    rows_ptr,  # [B] int32
    cols_ptr,  # [B] int32
    out_ptr,  # [SPLITS, B, R, C]: the gradient, or one fp32 partial sum per split
    tokens,
    m,
    k,
    dy_stride,
    x_stride,
    blocks,
    R: tl.constexpr,
    C: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.load(rows_ptr + b) * R + tl.arange(0, R)
    column = tl.load(cols_ptr + b) * C + tl.arange(0, C)
    steps = tl.cdiv(tokens, BLOCK_T)
    each = tl.cdiv(steps, tl.num_programs(1))
    t = tl.arange(0, BLOCK_T)
    acc = tl.zeros((R, C), tl.float32)
    for step in range(split * each, tl.minimum((split + 1) * each, steps)):
        token = step * BLOCK_T + t
        t_in = token < tokens
        left = t_in[None, :] if EVEN else t_in[None, :] & (row < m)[:, None]
        right = t_in[:, None] if EVEN else t_in[:, None] & (column < k)[None, :]
        token = token.to(tl.int64)
        dy = tl.load(dy_ptr + token[None, :] * dy_stride + row[:, None], mask=left, other=0.0)  # [R, BT]
        x = tl.load(x_ptr + token[:, None] * x_stride + column[None, :], mask=right, other=0.0)  # [BT, C]
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    inside = (tl.arange(0, R) * C)[:, None] + tl.arange(0, C)[None, :]
    start = (split.to(tl.int64) * blocks + b) * (R * C)
    tl.store(out_ptr + start + inside, acc.to(out_ptr.dtype.element_ty))


def dsd_config(arch: str, out_block: int, in_block: int, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """The configuration of one dsd launch: the table's row, narrowed for fp32 and for few tokens."""
    config = dict(DSD_CONFIGS[arch, out_block])
    config["BLOCK_T"] = min(config["BLOCK_T"], power_of_two(tokens))
    if dtype == torch.float32:
        config["BLOCK_K"] //= 2
        config["num_stages"] = 3
    if config["BLOCK_K"] > in_block and out_block >= 128:
        config["BLOCK_K"] = max(in_block, 16)
    if config["BLOCK_T"] <= 32:
        config["num_warps"] = min(config["num_warps"], 4)
    return config


def sdd_config(arch: str, rows: int, cols: int, dtype: torch.dtype) -> dict[str, int]:
    """The configuration of one sdd launch."""
    config = dict(SDD_CONFIGS[arch, max(rows, cols)])
    if dtype == torch.float32:
        config["BLOCK_T"] = max(16, config["BLOCK_T"] // 2)
        config["num_stages"] = 3
    return config


@on_its_device
def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: BlockPattern,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    slope: float = 0.01,
) -> torch.Tensor:
    """`activation(x · Wᵀ + bias + residual)` for a block-sparse W.

    Args:
        x: [..., K] fp32, fp16 or bf16; any number of tokens, also none.
        values: [B, R, C] of the same type.
        pattern: from `block_pattern`, on the same device.
        bias: [M] or None.
        residual: [..., M] or None.
        activation: one of `ACTIVATIONS`, applied last; slope: of leaky_relu.

    Returns:
        [..., M]. Sums are in fp32; fp32 products use TF32 only where `torch.backends.cuda.matmul.allow_tf32`.

    Raises:
        ShapeError: sizes or types that do not fit. BackendError: no GPU that can run it.
    """
    return _dsd("block_sparse_linear", x, values, pattern, False, bias, residual, activation, slope)


@on_its_device
def block_sparse_input_gradient(dy: torch.Tensor, values: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    """`dy · W`: the gradient of the input, [..., K], over the same values. dy: [..., M]."""
    return _dsd("block_sparse_input_gradient", dy, values, pattern, True, None, None, None, 0.0)


@on_its_device
def block_sparse_weight_gradient(dy: torch.Tensor, x: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    """`dyᵀ · x` at the kept blocks only: [B, R, C]. dy: [..., M]; x: [..., K]. The same result every run: no
    atomics."""
    device = check_tensors("block_sparse_weight_gradient", dy, x, pattern.cols)
    dtype = check_float("block_sparse_weight_gradient", dy, x)
    (m, k), (rows, cols) = pattern.shape, pattern.block
    check_lengths("block_sparse_weight_gradient", outputs=(dy.shape[-1], m), inputs=(x.shape[-1], k))
    dy, x = as_rows(dy), as_rows(x)
    check_lengths("block_sparse_weight_gradient", tokens=(dy.shape[0], x.shape[0]))
    tokens, blocks = x.shape[0], pattern.blocks
    if not blocks or not tokens:
        return x.new_zeros(blocks, rows, cols)
    config = sdd_config(generation(device), rows, cols, dtype)
    # enough programs for a large GPU (about 132 multiprocessors, 4 programs each), each with at least 8 steps of its
    # own
    splits = max(1, min(528 // blocks, -(-tokens // (8 * config["BLOCK_T"]))))
    out = x.new_empty(splits, blocks, rows, cols, dtype=dtype if splits == 1 else torch.float32)
    sdd_kernel[(grid_size(blocks), splits)](
        dy, x, pattern.rows, pattern.cols, out, tokens, m, k, dy.stride(0), x.stride(0), blocks,
        R=rows, C=cols, EVEN=m % rows == 0 and k % cols == 0, PRECISION=precision(dtype), **config,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(dtype)


def _dsd(
    name: str,
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: BlockPattern,
    transposed: bool,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    slope: float,
) -> torch.Tensor:
    device = check_tensors(name, x, values, pattern.cols, bias, residual)
    dtype = check_float(name, x, values)
    activation = check_activation(name, activation)
    n_out, n_in = pattern.shape[::-1] if transposed else pattern.shape
    out_block, in_block = pattern.block[::-1] if transposed else pattern.block
    check_lengths(
        name,
        inputs=(x.shape[-1], n_in),
        blocks=(values.shape[0], pattern.blocks),
        **{"block shape": (tuple(values.shape[1:]), pattern.block)},  # type: ignore[dict-item]
    )
    if bias is not None:
        check_lengths(name, bias=(bias.numel(), n_out))
    shape = (*x.shape[:-1], n_out)
    if residual is not None:
        check_lengths(name, residual=(tuple(residual.shape), shape))  # type: ignore[arg-type]
        residual = residual.contiguous()
    x = as_rows(x)
    values = values.contiguous()
    tokens = x.shape[0]
    out = x.new_empty(tokens, n_out)
    if not tokens or not n_out:
        return out.reshape(shape)
    config = dsd_config(generation(device), out_block, in_block, dtype, tokens)
    ptr, index, order, out_order = (
        (pattern.col_ptr, pattern.col_rows, pattern.col_order, pattern.column_order)
        if transposed
        else (pattern.row_ptr, pattern.cols, pattern.cols, pattern.row_order)
    )
    dsd_kernel[(grid_size(triton.cdiv(tokens, config["BLOCK_T"]), out_order.numel()),)](
        x, values, ptr, index, order, out_order,
        bias if bias is not None else x, residual if residual is not None else x, out,
        tokens, n_out, n_in, x.stride(0), out.stride(0), slope,
        OUT_BLOCK=out_block, IN_BLOCK=in_block, TRANSPOSED=transposed,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        EVEN_IN=n_in % in_block == 0, ACTIVATION=activation, PRECISION=precision(dtype), **config,
    )  # fmt: skip
    return out.reshape(shape)


def _pointers(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix sums of the counts, and the indices by falling count (ties in order)."""
    pointers = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    pointers[1:] = counts.cumsum(0)
    return pointers, torch.argsort(counts, descending=True, stable=True).int()


def aot_cases(arch: str) -> list:
    """Every configuration that `block_sparse_linear` and its gradients can launch on one architecture, for the
    ahead-of-time table."""
    from .aot import KINDS, AotCase, expected_instruction, tensor_core

    found = []
    common = {"x_stride": "i32", "out_stride": "i32", "tokens": "i32", "n_out": "i32", "n_in": "i32", "slope": "fp32"}
    index = dict.fromkeys(("ptr_ptr", "index_ptr", "order_ptr", "out_order_ptr"), "*i32")
    shapes = list(itertools.product(BLOCK_SIZES, BLOCK_SIZES))
    for activation in ("relu", "leaky_relu", "silu", "sigmoid", "gelu_tanh", "tanh", "hardswish"):
        config = dsd_config(arch, 64, 64, torch.bfloat16, 4096)
        found.append(
            AotCase(
                name=f"bf16 64×64, residual, {activation}, ragged inputs",
                kernel=dsd_kernel,
                signature=dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "residual_ptr", "out_ptr"), "*bf16")
                | index
                | common,
                constants={"OUT_BLOCK": 64, "IN_BLOCK": 64, "TRANSPOSED": False, "HAS_BIAS": True, "HAS_RESIDUAL": True}
                | {"EVEN_IN": False, "ACTIVATION": activation, "PRECISION": "ieee"}
                | {"BLOCK_T": config["BLOCK_T"], "BLOCK_K": config["BLOCK_K"]},
                options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                expects=tensor_core(arch, True),
                divisible=("n_in", "n_out"),
            )
        )
    for out_block, in_block in shapes:
        square = out_block == in_block
        for kind, (pointer, name, multiply) in KINDS.items():
            if kind != "bf16" and (not square or (out_block < 64 and kind != "fp32")):
                continue
            dtype = getattr(torch, name)
            for transposed in (False, True):
                for tokens in (4096, 16) if square and kind == "bf16" else (4096,):
                    config = dsd_config(arch, out_block, in_block, dtype, tokens)
                    wide = config["BLOCK_T"] >= 64
                    floats = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "residual_ptr", "out_ptr"), pointer)
                    found.append(
                        AotCase(
                            name=f"{kind} {out_block}×{in_block}{' transposed' if transposed else ''}, {tokens} tokens",
                            kernel=dsd_kernel,
                            signature=floats | index | common,
                            constants={
                                "OUT_BLOCK": out_block, "IN_BLOCK": in_block, "TRANSPOSED": transposed,
                                "HAS_BIAS": not transposed, "HAS_RESIDUAL": False,
                                "EVEN_IN": True, "ACTIVATION": "none" if transposed else "gelu", "PRECISION": multiply,
                                "BLOCK_T": config["BLOCK_T"], "BLOCK_K": config["BLOCK_K"],
                            },
                            options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                            expects=expected_instruction(kind, arch, wide and config["num_warps"] % 4 == 0),
                            quick=kind in ("bf16", "fp32")
                            and square
                            and out_block in ((32, 64, 128) if kind == "bf16" else (64,))
                            and tokens == 4096
                            and not transposed,
                        )
                    )  # fmt: skip
            config = sdd_config(arch, out_block, in_block, dtype)
            found.append(
                AotCase(
                    name=f"{kind} {out_block}×{in_block}",
                    kernel=sdd_kernel,
                    signature={"rows_ptr": "*i32", "cols_ptr": "*i32"}
                    | dict.fromkeys(("dy_ptr", "x_ptr", "out_ptr"), pointer)
                    | dict.fromkeys(("tokens", "m", "k", "dy_stride", "x_stride", "blocks"), "i32"),
                    constants={
                        "R": out_block,
                        "C": in_block,
                        "EVEN": True,
                        "PRECISION": multiply,
                        "BLOCK_T": config["BLOCK_T"],
                    },
                    options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                    expects=expected_instruction(kind, arch, out_block >= 64 and config["num_warps"] % 4 == 0),
                    quick=kind == "bf16" and out_block == in_block == 64,
                )
            )
    return found
