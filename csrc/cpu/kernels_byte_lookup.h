// Products of a ByteLookup with one vector: what each instruction set offers. kernels_byte_lookup.cpp, used by runtime/vector_product.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "pack/byte_lookup.h"

namespace sparse_engine {

// Slices of a ByteLookup; all pointers (those of `to` too) are those of the first slice.
struct ByteLookupArgs {
    const uint8_t* groups;
    const uint8_t* entries;
    int64_t tiles;
    int64_t rows;  // that exist, the last slice may have fewer than sixteen
    int64_t cols;
    const float* x;         // for `any`
    const uint8_t* tables;  // for `tables`: [tile][plane][256]
    int planes;
    double plane_scale;   // int8
    const int32_t* sums;  // int8: of each row
    VectorArgs to;
};

constexpr int kMostPlanes = 4;

struct ByteLookupKernels {
    // x may be anything: only kept columns are looked at. By Precision.
    void (*any[kPrecisions])(const ByteLookupArgs&);
    // The same with x as tables of bytes; null where the processor has no such instructions.
    void (*tables[kPrecisions])(const ByteLookupArgs&);
    // Lays x out as tables. bfloat16: the bytes of one or two bfloat16 numbers whose sum is x to 16 bits. int8: three bytes of an integer
    // of 24 bits, x times `scale` plus 2^23. Returns the number of planes; 0 where x cannot be had so: elements that are not finite or
    // beyond 2^126, or all below 2^-90 (where instructions on bfloat16 see zeros).
    int (*make_tables[kPrecisions])(const float* x, int64_t cols, uint8_t* to, double* scale);
};

// Those of the build in use (see active_isa()).
const ByteLookupKernels& byte_lookup_kernels();

}  // namespace sparse_engine
