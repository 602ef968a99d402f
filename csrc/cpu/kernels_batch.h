// What batches of convolutions need of each instruction set: kernels_batch.cpp, used by runtime/batch_conv.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_engine {

// A tile of a convolution whose source has the images of a batch along the lanes; see kernels_batch.cpp. Rows are those of the weight.
struct BatchConvArgs {
    const float* x;          // source of the tile's first pixel at offset 0
    size_t step;             // vectors from one pixel's source to the next one's
    const uint16_t* offset;  // of each entry, in vectors
    const float* values;
    const uint32_t* begin;  // a row's entries: begin[row · ranges] … end[row · ranges]
    const uint32_t* end;
    size_t ranges;
    int64_t rows;
    const float* bias;  // or null
    int vectors;        // pixels, 1 to 8
    float* out;
    size_t out_row, out_step;  // floats from one row, from one pixel to the next
};

// out[entry] += sum over pixels and lanes of dy · source, for the entries of one row.
struct BatchDotsArgs {
    const float* dy;
    size_t dy_row;   // floats from one row of pixels to the next
    const float* x;  // source of the first pixel at offset 0
    size_t x_row;    // floats
    size_t step;     // vectors
    int64_t height, width;
    const uint16_t* offset;
    int64_t entries;
    float* out;
};

constexpr int kBatchVectors = 8;  // pixels of a tile, at most

struct BatchKernels {
    int lanes;
    // Up to `lanes` images into the lanes of vectors and back: lanes[k · step + i] = x[i · ld + k] for k < columns, zero where i ≥ n;
    // y[i · ld + k] = lanes[k · step + i] for i < n.
    void (*to_lanes)(const float* x, size_t ld, int n, int columns, float* lanes, size_t step);
    void (*from_lanes)(const float* lanes, size_t step, int n, int columns, float* y, size_t ld);
    void (*conv)(const BatchConvArgs&);
    void (*dots)(const BatchDotsArgs&);
};

// Those of the build in use (see active_isa()).
const BatchKernels& batch_kernels();

}  // namespace sparse_engine
