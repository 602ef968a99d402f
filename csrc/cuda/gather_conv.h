// Convolution of the kept channels of an NHWC map, gathered by asynchronous copies: no compacted copy of the map is ever made.
//
//     y[pixel, out_index[m]] = act(bias[m] + Σ_taps Σ_k x[pixel's tap, in_index[k]] · W[m, tap, k])
//
// Implicit product: left tile 128 output pixels, right tile 64 kept outputs, a step is 64 kept inputs of one tap (tile_product.h). Runs of
// kRun neighbouring kept channels are copied together, 2·kRun bytes each; single channels (kRun = 1) are below the 4 bytes that an
// asynchronous copy takes at least and go through registers.
#pragma once

#include "cuda/tile_product.h"

namespace se::cuda {

struct GatherConv {
    const uint16_t* x;         // [batch, height, width, channels]
    const uint16_t* weight;    // [kept outputs, taps, padded inputs]: kept channels only, zeros up to a multiple of 64
    const int32_t* in_index;   // [kept inputs], rising, in aligned runs of kRun
    const int32_t* out_index;  // [kept outputs]
    const uint16_t* bias;      // [kept outputs] or null
    uint16_t* y;               // [batch, out height, out width, out channels]
    int batch, height, width, channels, out_height, out_width, out_channels;
    int kept_in, padded_in, kept_out;
    int kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
    Activation activation;
};

template <Type kType, int kRun>
SE_KERNEL void SE_BOUNDS(kTileThreads, 2) gather_conv(GatherConv p) {
    constexpr int kRows = kTileLeft * 8 / kTileThreads;  // rows of the left tile that this thread fills
    const int thread = thread_index(), chunk = thread % 8;
    const int64_t pixels = static_cast<int64_t>(p.batch) * p.out_height * p.out_width;
    const int64_t first_pixel = static_cast<int64_t>(block_x()) * kTileLeft;
    const int first_output = block_y() * kTileRight;
    const int parts = p.padded_in / kTileInputs, taps = p.kernel_height * p.kernel_width;

    // where each of its pixels' windows begins
    int top[kRows], left[kRows];
    int64_t image[kRows];
    SE_UNROLL
    for (int i = 0; i < kRows; ++i) {
        const int64_t pixel = first_pixel + thread / 8 + i * (kTileThreads / 8);
        const int64_t line = pixel / p.out_width;
        left[i] = static_cast<int>(pixel % p.out_width) * p.stride_x - p.pad_x;
        top[i] = pixel < pixels ? static_cast<int>(line % p.out_height) * p.stride_y - p.pad_y : -(1 << 30);
        image[i] = line / p.out_height * p.height * p.width;
    }

    TileSums sums;
    tile_product<kType>(
        sums, taps * parts,
        [&](char* stage, int step) {
            const int tap = step / parts, inner = step % parts * kTileInputs + chunk * 8;
            const int down = tap / p.kernel_width * p.dilation_y, right = tap % p.kernel_width * p.dilation_x;
            int channel[8 / kRun];
            SE_UNROLL
            for (int r = 0; r < 8 / kRun; ++r) channel[r] = inner + r * kRun < p.kept_in ? p.in_index[inner + r * kRun] : -1;
            SE_UNROLL
            for (int i = 0; i < kRows; ++i) {
                const int row = thread / 8 + i * (kTileThreads / 8), iy = top[i] + down, ix = left[i] + right;
                const bool inside = iy >= 0 && iy < p.height && ix >= 0 && ix < p.width;
                const uint16_t* pixel = p.x + (inside ? image[i] + static_cast<int64_t>(iy) * p.width + ix : 0) * p.channels;
                char* to = stage + swizzled(row, chunk);
                if constexpr (kRun == 1) {
                    uint32_t word[4];
                    SE_UNROLL
                    for (int r = 0; r < 8; ++r) {
                        const uint32_t value = inside && channel[r] >= 0 ? pixel[channel[r]] : 0;
                        word[r / 2] = r % 2 ? word[r / 2] | value << 16 : value;
                    }
                    SE_UNROLL
                    for (int r = 0; r < 4; ++r) reinterpret_cast<uint32_t*>(to)[r] = word[r];
                } else {
                    SE_UNROLL
                    for (int r = 0; r < 8 / kRun; ++r) {
                        const bool valid = inside && channel[r] >= 0;
                        copy_async<2 * kRun>(to + 2 * kRun * r, valid ? pixel + channel[r] : p.x, valid);
                    }
                }
            }
        },
        [&](char* stage, int step) {
            SE_UNROLL
            for (int i = 0; i < kTileRight * 8 / kTileThreads; ++i) {
                const int row = thread / 8 + i * (kTileThreads / 8), output = first_output + row;
                const bool valid = output < p.kept_out;
                const int64_t place =
                    (static_cast<int64_t>(output) * taps + step / parts) * p.padded_in + step % parts * kTileInputs + chunk * 8;
                copy_async<16>(stage + swizzled(row, chunk), valid ? p.weight + place : p.weight, valid);
            }
        });

    SE_UNROLL
    for (int j = 0; j < 4; ++j) {
        SE_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
            const int output = first_output + TileSums::right(j, pair);
            if (output >= p.kept_out) continue;
            const float bias = p.bias ? widen<kType>(p.bias[output]) : 0.0f;
            const int to = p.out_index[output];
            SE_UNROLL
            for (int i = 0; i < 2; ++i) {
                SE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int64_t pixel = first_pixel + TileSums::left(i, 2 * half);
                    if (pixel >= pixels) continue;
                    p.y[pixel * p.out_channels + to] = narrow<kType>(activate(sums.value[i][j][2 * half + pair] + bias, p.activation));
                }
            }
        }
    }
}

}  // namespace se::cuda
