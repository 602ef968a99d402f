// out[t, m] = act(bias[m] + Σ_k W[m, k] · x[t, k]) for an unstructured W in bitmask records (bitmask_format.h).
//
// bitmask_linear: many tokens.      One block: 64 outputs (4 warps × 16) × 64 tokens, loop over inputs 64 at a time.
//
//     global ── cp.async ──> shared: x tile [64 tokens][64 inputs], 4 records      three stages in flight
//     records ── expand ──> left operands in registers (never dense in memory)      x ── ldmatrix ──> right operands
//
//   Bytes from global per step: 8 KB of x (shared by the 4 warps), 4 records of 128 + 2·nnz; operations 2·64·64·64 whatever the sparsity.
//   The weight's bytes shrink, the arithmetic does not: it pays where the weight's bytes are the bound, and never beyond mma.sync's peak.
//
// bitmask_decode: at most 16 tokens.   One block: 32 outputs; 8 warps share the inputs, each streams its own records through a ring of four
//   stages without any block-wide barrier, and the partial sums meet in shared memory once at the end, in a fixed order. Bound: bytes of
//   the records.
#pragma once

#include "cuda/bitmask_format.h"
#include "cuda/epilogue.h"

namespace se::cuda {

struct BitmaskLinear {
    const uint16_t* x;  // [tokens, inputs], inputs a multiple of 8, 16-byte aligned
    const uint32_t* start;
    const uint8_t* records;
    const uint16_t* bias;  // [outputs] or null
    uint16_t* out;         // [tokens, outputs]
    int tokens, outputs, inputs;
    int record_bytes;  // the largest record, a multiple of 16
    Activation activation;
};

constexpr int kLinearThreads = 128;
constexpr int kLinearTokens = 64;
constexpr int kLinearOutputs = 64;
constexpr int kLinearStages = 3;
constexpr int kRowBytes = kTileInputs * 2;         // one token of the x tile
constexpr int kOutRow = (kLinearOutputs + 8) * 2;  // padded against bank conflicts
constexpr int kLinearXBytes = kLinearTokens * kRowBytes;

inline size_t bitmask_linear_shared(int record_bytes) {
    const size_t loop = static_cast<size_t>(kLinearStages) * (kLinearXBytes + 4 * record_bytes);
    const size_t out = static_cast<size_t>(kLinearTokens) * kOutRow;
    return loop > out ? loop : out;
}

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows: chunks are permuted so that ldmatrix meets no bank twice.
SE_DEVICE int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Starts copying a record; the lanes of one warp.
SE_DEVICE void copy_record(char* to, const uint8_t* records, const uint32_t* start, int64_t tile) {
    const uint32_t first = start[tile], units = start[tile + 1] - first;
    for (uint32_t unit = thread_index() % 32; unit < units; unit += 32) {
        copy_async<16>(to + unit * 16, records + (static_cast<int64_t>(first) + unit) * 16, true);
    }
}

template <Type kType>
SE_KERNEL void SE_BOUNDS(kLinearThreads, 2) bitmask_linear(BitmaskLinear p) {
    char* memory = shared_memory();
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
    const int across = tiles_across(p.inputs);
    const int first_token = block_y() * kLinearTokens;
    const int row_tile = block_x() * 4 + warp;
    const bool rows_exist = row_tile < tiles_down(p.outputs);
    const int stage_bytes = kLinearXBytes + 4 * p.record_bytes;

    const auto fetch = [&](int step) {
        if (step < across) {
            char* stage = memory + step % kLinearStages * stage_bytes;
            SE_UNROLL
            for (int i = 0; i < kLinearTokens * 8 / kLinearThreads; ++i) {
                const int piece = thread + i * kLinearThreads, row = piece / 8, chunk = piece % 8;
                const int token = first_token + row, input = step * kTileInputs + chunk * 8;
                const bool valid = token < p.tokens && input < p.inputs;
                const uint16_t* from = valid ? p.x + static_cast<int64_t>(token) * p.inputs + input : p.x;
                copy_async<16>(stage + swizzled(row, chunk), from, valid);
            }
            if (rows_exist) {
                copy_record(stage + kLinearXBytes + warp * p.record_bytes, p.records, p.start,
                            static_cast<int64_t>(row_tile) * across + step);
            }
        }
        copy_async_commit();  // also where there is nothing: the count of groups stays the same
    };

    float sums[kLinearTokens / 8][4] = {};
    for (int step = 0; step < kLinearStages - 1; ++step) fetch(step);
    for (int step = 0; step < across; ++step) {
        copy_async_wait<kLinearStages - 2>();
        sync_threads();  // this step's copies are there, and nobody still reads the stage that the next ones replace
        fetch(step + kLinearStages - 1);
        if (!rows_exist) continue;
        const char* stage = memory + step % kLinearStages * stage_bytes;
        uint32_t a[4][4];
        expand_record(a, stage + kLinearXBytes + warp * p.record_bytes);
        SE_UNROLL
        for (int q = 0; q < 4; ++q) {
            SE_UNROLL
            for (int n = 0; n < kLinearTokens / 16; ++n) {
                uint32_t b[4];
                load_matrices(b, stage + swizzled(16 * n + lane / 16 * 8 + lane % 8, 2 * q + lane / 8 % 2));
                multiply_add<kType>(sums[2 * n], a[q], b);
                multiply_add<kType>(sums[2 * n + 1], a[q], b + 2);
            }
        }
    }

    // turn the tile round in shared memory, so that neighbours write neighbours
    copy_async_wait<0>();
    sync_threads();
    SE_UNROLL
    for (int n = 0; n < kLinearTokens / 8; ++n) {
        SE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int row = warp * 16 + lane / 4 + 8 * (i / 2), token = 8 * n + 2 * (lane % 4) + i % 2;
            const int output = block_x() * kLinearOutputs + row;
            float sum = sums[n][i];
            if (p.bias && output < p.outputs) sum += widen<kType>(p.bias[output]);
            *reinterpret_cast<uint16_t*>(memory + token * kOutRow + row * 2) = narrow<kType>(activate(sum, p.activation));
        }
    }
    sync_threads();
    for (int piece = thread; piece < kLinearTokens * kLinearOutputs; piece += kLinearThreads) {
        const int row = piece % kLinearOutputs, token = piece / kLinearOutputs;
        const int output = block_x() * kLinearOutputs + row;
        if (output < p.outputs && first_token + token < p.tokens) {
            p.out[static_cast<int64_t>(first_token + token) * p.outputs + output] =
                *reinterpret_cast<const uint16_t*>(memory + token * kOutRow + row * 2);
        }
    }
}

constexpr int kDecodeThreads = 256;
constexpr int kDecodeWarps = kDecodeThreads / 32;
constexpr int kDecodeRowTiles = 2;
constexpr int kDecodeOutputs = kDecodeRowTiles * kTileRows;
constexpr int kDecodeStages = 4;

template <int kTokenTiles>
inline size_t bitmask_decode_shared(int record_bytes) {
    return static_cast<size_t>(kDecodeWarps) * kDecodeStages * kDecodeRowTiles * record_bytes +
           static_cast<size_t>(kDecodeWarps) * kDecodeOutputs * kTokenTiles * 8 * sizeof(float);
}

// tokens ≤ 8·kTokenTiles
template <Type kType, int kTokenTiles>
SE_KERNEL void SE_BOUNDS(kDecodeThreads, 1) bitmask_decode(BitmaskLinear p) {
    char* memory = shared_memory();
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
    const int across = tiles_across(p.inputs), down = tiles_down(p.outputs);
    const int first_tile = block_x() * kDecodeRowTiles;
    const int stage_bytes = kDecodeRowTiles * p.record_bytes;
    char* ring = memory + warp * kDecodeStages * stage_bytes;
    float* partial = reinterpret_cast<float*>(memory + kDecodeWarps * kDecodeStages * stage_bytes);

    const auto fetch = [&](int turn) {
        const int step = warp + turn * kDecodeWarps;
        if (step < across) {
            SE_UNROLL
            for (int i = 0; i < kDecodeRowTiles; ++i) {
                if (first_tile + i < down) {
                    char* to = ring + turn % kDecodeStages * stage_bytes + i * p.record_bytes;
                    copy_record(to, p.records, p.start, static_cast<int64_t>(first_tile + i) * across + step);
                }
            }
        }
        copy_async_commit();
    };

    float sums[kDecodeRowTiles][kTokenTiles][4] = {};
    for (int turn = 0; turn < kDecodeStages - 1; ++turn) fetch(turn);
    for (int turn = 0; warp + turn * kDecodeWarps < across; ++turn) {
        const int step = warp + turn * kDecodeWarps;
        uint32_t b[4][kTokenTiles][2];
        SE_UNROLL
        for (int q = 0; q < 4; ++q) {
            SE_UNROLL
            for (int n = 0; n < kTokenTiles; ++n) {
                SE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int token = 8 * n + lane / 4, input = step * kTileInputs + 16 * q + 8 * half + 2 * (lane % 4);
                    b[q][n][half] = 0;
                    if (token < p.tokens && input < p.inputs) {
                        b[q][n][half] = *reinterpret_cast<const uint32_t*>(p.x + static_cast<int64_t>(token) * p.inputs + input);
                    }
                }
            }
        }
        copy_async_wait<kDecodeStages - 2>();
        sync_warp();  // the whole warp's copies of this turn are there, and nobody still reads the stage that is filled next
        fetch(turn + kDecodeStages - 1);
        SE_UNROLL
        for (int i = 0; i < kDecodeRowTiles; ++i) {
            if (first_tile + i >= down) continue;
            uint32_t a[4][4];
            expand_record(a, ring + turn % kDecodeStages * stage_bytes + i * p.record_bytes);
            SE_UNROLL
            for (int q = 0; q < 4; ++q) {
                SE_UNROLL
                for (int n = 0; n < kTokenTiles; ++n) multiply_add<kType>(sums[i][n], a[q], b[q][n]);
            }
        }
    }
    copy_async_wait<0>();
    SE_UNROLL
    for (int i = 0; i < kDecodeRowTiles; ++i) {
        SE_UNROLL
        for (int n = 0; n < kTokenTiles; ++n) {
            SE_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int row = i * kTileRows + lane / 4 + 8 * (e / 2), token = 8 * n + 2 * (lane % 4) + e % 2;
                partial[(warp * kTokenTiles * 8 + token) * kDecodeOutputs + row] = sums[i][n][e];
            }
        }
    }
    sync_threads();
    for (int piece = thread; piece < kDecodeOutputs * kTokenTiles * 8; piece += kDecodeThreads) {
        const int row = piece % kDecodeOutputs, token = piece / kDecodeOutputs;
        const int output = block_x() * kDecodeOutputs + row;
        if (output >= p.outputs || token >= p.tokens) continue;
        float sum = p.bias ? widen<kType>(p.bias[output]) : 0.0f;
        SE_UNROLL
        for (int w = 0; w < kDecodeWarps; ++w) sum += partial[(w * kTokenTiles * 8 + token) * kDecodeOutputs + row];
        p.out[static_cast<int64_t>(token) * p.outputs + output] = narrow<kType>(activate(sum, p.activation));
    }
}

}  // namespace se::cuda
