// Block-sparse linear layer, blocks with sides that are multiples of 64: out[t, m] = act(bias[m] + Σ over the kept blocks of m's block
// row). One block of threads: 128 tokens × 64 outputs; the loop runs over the kept blocks of the row, 64 inputs at a time (tile_product.h).
#pragma once

#include "cuda/tile_product.h"

namespace se::cuda {

struct BlockLinear {
    const uint16_t* x;         // [tokens, inputs], inputs a multiple of 8
    const uint16_t* values;    // [blocks, block_rows, block_cols]
    const int32_t* row_ptr;    // [block rows + 1]
    const int32_t* cols;       // [blocks]
    const int32_t* row_order;  // [block rows], longest first
    const uint16_t* bias;      // [outputs] or null
    uint16_t* out;             // [tokens, outputs]
    int tokens, outputs, inputs, block_rows, block_cols;
    Activation activation;
};

template <Type kType>
SE_KERNEL void SE_BOUNDS(kTileThreads, 2) block_linear(BlockLinear p) {
    const int thread = thread_index();
    const int parts_down = p.block_rows / kTileRight, parts_across = p.block_cols / kTileInputs;
    const int block_row = p.row_order[block_x() / parts_down];
    const int inner_row = block_x() % parts_down * kTileRight;
    const int first_token = block_y() * kTileLeft;
    const int first = p.row_ptr[block_row], steps = (p.row_ptr[block_row + 1] - first) * parts_across;

    TileSums sums;
    tile_product<kType>(
        sums, steps,
        [&](char* stage, int step) {
            const int64_t column =
                static_cast<int64_t>(p.cols[first + step / parts_across]) * p.block_cols + step % parts_across * kTileInputs;
            SE_UNROLL
            for (int i = 0; i < kTileLeft * 8 / kTileThreads; ++i) {
                const int piece = thread + i * kTileThreads, row = piece / 8, chunk = piece % 8;
                const int64_t token = first_token + row, input = column + chunk * 8;
                const bool valid = token < p.tokens && input < p.inputs;
                copy_async<16>(stage + swizzled(row, chunk), valid ? p.x + token * p.inputs + input : p.x, valid);
            }
        },
        [&](char* stage, int step) {
            const int64_t block = first + step / parts_across;
            const uint16_t* values = p.values + (block * p.block_rows + inner_row) * p.block_cols + step % parts_across * kTileInputs;
            SE_UNROLL
            for (int i = 0; i < kTileRight * 8 / kTileThreads; ++i) {
                const int piece = thread + i * kTileThreads, row = piece / 8, chunk = piece % 8;
                copy_async<16>(stage + swizzled(row, chunk), values + static_cast<int64_t>(row) * p.block_cols + chunk * 8, true);
            }
        });

    SE_UNROLL
    for (int i = 0; i < 2; ++i) {
        SE_UNROLL
        for (int j = 0; j < 4; ++j) {
            SE_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int64_t token = first_token + TileSums::left(i, e);
                const int output = block_row * p.block_rows + inner_row + TileSums::right(j, e);
                if (token >= p.tokens || output >= p.outputs) continue;
                const float bias = p.bias ? widen<kType>(p.bias[output]) : 0.0f;
                p.out[token * p.outputs + output] = narrow<kType>(activate(sums.value[i][j][e] + bias, p.activation));
            }
        }
    }
}

}  // namespace se::cuda
