// The loop that block-sparse linear and gather convolution share: a 128 × 64 tile of the output, inputs 64 at a time, three stages.
//
//     left  [128 rows][64 inputs] ──┐                 8 warps as 4 × 2, each 32 × 32 of the tile: 2 × 4 products of 16 × 8 × 16
//     right [ 64 rows][64 inputs] ──┘ shared, swizzled  intensity towards shared memory's filler: 2·128·64·64 operations per 24 KB
//
// What lies in the tiles is up to two functions of (stage's memory, step) that start the copies of this thread.
#pragma once

#include "cuda/bitmask_linear.h"

namespace se::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileLeft = 128;
constexpr int kTileRight = 64;
constexpr int kTileStages = 3;
constexpr int kTileStageBytes = (kTileLeft + kTileRight) * 128;
constexpr size_t kTileShared = static_cast<size_t>(kTileStages) * kTileStageBytes;

struct TileSums {
    float value[2][4][4];

    // Row of the left tile and row of the right tile that value[i][j][e] belongs to.
    SE_DEVICE static int left(int i, int e) { return thread_index() / 64 * 32 + 16 * i + thread_index() % 32 / 4 + 8 * (e / 2); }
    SE_DEVICE static int right(int j, int e) { return thread_index() / 32 % 2 * 32 + 8 * j + 2 * (thread_index() % 4) + e % 2; }
};

template <Type kType, class FetchLeft, class FetchRight>
SE_DEVICE void tile_product(TileSums& sums, int steps, const FetchLeft& fetch_left, const FetchRight& fetch_right) {
    char* memory = shared_memory();
    const int lane = thread_index() % 32, down = thread_index() / 64, across = thread_index() / 32 % 2;
    const auto fetch = [&](int step) {
        if (step < steps) {
            char* stage = memory + step % kTileStages * kTileStageBytes;
            fetch_left(stage, step);
            fetch_right(stage + kTileLeft * 128, step);
        }
        copy_async_commit();
    };
    SE_UNROLL
    for (int i = 0; i < 2; ++i) {
        SE_UNROLL
        for (int j = 0; j < 4; ++j) {
            SE_UNROLL
            for (int e = 0; e < 4; ++e) sums.value[i][j][e] = 0.0f;
        }
    }
    for (int step = 0; step < kTileStages - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<kTileStages - 2>();
        sync_threads();
        fetch(step + kTileStages - 1);
        const char* left = memory + step % kTileStages * kTileStageBytes;
        const char* right = left + kTileLeft * 128;
        SE_UNROLL
        for (int q = 0; q < 4; ++q) {
            uint32_t a[2][4], b[2][4];
            SE_UNROLL
            for (int i = 0; i < 2; ++i) load_matrices(a[i], left + swizzled(32 * down + 16 * i + lane % 16, 2 * q + lane / 16));
            SE_UNROLL
            for (int j = 0; j < 2; ++j) {
                load_matrices(b[j], right + swizzled(32 * across + 16 * j + lane / 16 * 8 + lane % 8, 2 * q + lane / 8 % 2));
            }
            SE_UNROLL
            for (int i = 0; i < 2; ++i) {
                SE_UNROLL
                for (int j = 0; j < 4; ++j) multiply_add<kType>(sums.value[i][j], a[i], b[j / 2] + 2 * (j % 2));
            }
        }
    }
    copy_async_wait<0>();
}

}  // namespace se::cuda
