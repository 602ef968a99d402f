// Sparse products in bfloat16 with sums in single precision: what each instruction set offers. kernels_pairs.cpp, used by
// runtime/pair_product.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pack/panel_matrix.h"

namespace sparse_engine {

constexpr int kLinePixels = 32;  // of bfloat16 in a cache line
constexpr int kMaxLines = 4;

// One segment of a PairMatrix times one tile of X, some lines of pixels wide.
struct PairArgs {
    const PanelRun* runs;
    const PanelRun* runs_end;
    const uint16_t* panel_rows;
    const uint8_t* index;
    const uint16_t* values;
    const uint16_t* x;  // first column of the part, first pixel of the tile
    size_t x_stride;    // from one column to the next
    float* sums;        // first row of the row block: where sums stay between parts, in an order of the kernel's own
    size_t sums_stride;
    bool first, last;  // first part: start from bias + residual; last part: clamp and write to one of the two outputs
    float* out;        // or null. First row of the row block, first pixel of the tile
    uint16_t* out16;   // or null
    size_t out_stride;
    int groups;         // of 16 pixels that `out` and `residual` have room for
    const float* bias;  // of the row block, or null
    const float* residual;
    const uint16_t* residual16;  // or null, both
    size_t residual_stride;
    float low, high;
};

// As Im2colArgs, for planes and tiles in bfloat16 and taps that are shifts.
struct PairTapArgs {
    const uint16_t* x;  // plane of the first column's channel, the tile's first pixel
    size_t channel_stride;
    int taps, tap0, columns;
    const int64_t* tap_offset;
    const uint16_t* tap_mask;  // at the tile's first pixel
    size_t mask_stride;
    int lines;
    uint16_t* tile;  // [columns][lines · kLinePixels]
};

// One channel of a depthwise convolution, some lines of pixels.
struct PairDepthwiseArgs {
    const uint16_t* x;  // plane, at the first pixel
    const uint16_t* weight;
    int taps;
    const int64_t* tap_offset;
    const uint16_t* tap_mask;  // at the first pixel
    size_t mask_stride;
    int64_t lines;
    int64_t groups;  // of 16 pixels that `out` and `residual` have room for
    float bias, low, high;
    const float* residual;
    const uint16_t* residual16;  // or null, both
    float* out;
    uint16_t* out16;  // or null, one of the two
};

struct PairKernels {
    bool products;  // whether there are instructions for pairs of products: without them this is no faster than single precision
    void (*product[kMaxLines + 1])(const PairArgs&);  // by lines
    void (*taps)(const PairTapArgs&);
    void (*depthwise)(const PairDepthwiseArgs&);
    void (*narrow)(const float* x, int64_t n, uint16_t* to);
    void (*every)(const uint16_t* x, int64_t step, int64_t n, uint16_t* to);  // to[i] = x[i · step]
    // even[r · out_ld + i] = x[r · ld + 2i] for i < even_n and, unless odd is null, odd[r · out_ld + i] = x[r · ld + 2i + 1] for i < odd_n.
    void (*split)(const uint16_t* x, int64_t ld, int64_t rows, int64_t even_n, int64_t odd_n, uint16_t* even, uint16_t* odd,
                  int64_t out_ld);
};

// Those of the build in use (see active_isa()).
const PairKernels& pair_kernels();

}  // namespace sparse_engine
