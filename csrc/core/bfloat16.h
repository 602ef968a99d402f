// bfloat16 as its bits: the upper half of a float.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparse_engine {

inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (f != f) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace sparse_engine
