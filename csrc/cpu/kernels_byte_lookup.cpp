// A sparse weight in bfloat16 or int8 (pack/byte_lookup.h) times one vector.
//
//     sixteen rows  ×  255 columns, of which the registers hold every byte of x:
//     per group     64 column bytes → the bytes of x (vpermi2b from each half of a table, and a blend)
//                   → bfloat16: put together to pairs, vpdpbf16ps with 64 values
//                   → int8: vpdpbusd with 64 values, for each of the three bytes of x
//
// 3 or 2 bytes and 13 to 21 instructions for 64 multiplications, so that memory is the bound: a group of bfloat16 (192 bytes) takes some 14
// cycles, in which a core gets about 120 bytes from memory.
//
// Sums are in single precision (bfloat16) or exact (int8), and only the weight is rounded: x is the sum of two bfloat16 numbers (what is
// lost is below 2^-16 of each element) or an integer of 24 bits. An x that is bfloat16 itself needs one of the two.
#include "cpu/kernels_byte_lookup.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "core/cpu_features.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

constexpr int kSlice = ByteLookup::kSlice, kTile = ByteLookup::kTile, kGroup = ByteLookup::kGroup, kColumns = kSlice * kGroup;

// `kLanes` rows from `row` on, the first `bits` of them.
SE_INLINE void finish_rows(const VectorArgs& a, int64_t row, Vec s, uint32_t bits) {
    if (a.scale) s = mul(s, load_bits(a.scale + row, bits));
    if (a.bias) s = add(s, load_bits(a.bias + row, bits));
    if (a.residual) s = add(s, load_bits(a.residual + row, bits));
    store_bits(a.out + row, at_most(at_least(s, splat(a.low)), splat(a.high)), bits);
}

// ---------------------------------------------------------------------------------------------------------------- entry by entry

template <Precision P>
SE_INLINE float value_at(const uint8_t* values, int i) {
    if constexpr (P == Precision::bfloat16) {
        uint16_t half;
        std::memcpy(&half, values + 2 * i, 2);
        const uint32_t bits = uint32_t{half} << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    } else {
        return static_cast<float>(static_cast<int8_t>(values[i]));
    }
}

template <Precision P>
void lookup_any(const ByteLookupArgs& a) {
    const uint8_t *groups = a.groups, *entries = a.entries;
    float table[kTile + 1] = {};  // the last one stays zero
    for (int64_t row = 0; row < a.rows; row += kSlice) {
        float sums[kSlice] = {};
        for (int64_t tile = 0; tile < a.tiles; tile++) {
            int n = *groups++;
            if (n == 0) continue;
            std::memcpy(table, a.x + tile * kTile, size_t(std::min<int64_t>(kTile, a.cols - tile * kTile)) * sizeof(float));
            for (; n > 0; n--, entries += kColumns * (1 + precision_bytes(P)))
                for (int lane = 0; lane < kSlice; lane++)
                    for (int e = 0; e < kGroup; e++)
                        sums[lane] += value_at<P>(entries + kColumns, ByteLookup::value_place(P, lane, e)) *
                                      table[entries[ByteLookup::column_place(P, lane, e)]];
        }
        for (int lane = 0; lane < kSlice; lane += kLanes)
            if (row + lane < a.rows)
                finish_rows(a.to, row + lane, load(sums + lane), low_bits(std::min<int64_t>(kLanes, a.rows - row - lane)));
    }
}

#if defined(__AVX512F__)

// Entries are read once, in order, and come from beyond the L2: too slowly for the hardware's prefetcher to run far ahead.
constexpr int64_t kAhead = 2048;

// A plane of a tile: 256 bytes in four registers.
struct Table {
    __m512i part[4];
};

SE_INLINE Table load_table(const uint8_t* from) {
    return {{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64), _mm512_loadu_si512(from + 128), _mm512_loadu_si512(from + 192)}};
}

__attribute__((always_inline, target("avx512vbmi"))) inline __m512i look_up(const Table& t, __m512i columns, __mmask64 upper) {
    return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t.part[0], columns, t.part[1]),
                                  _mm512_permutex2var_epi8(t.part[2], columns, t.part[3]));
}

// ---------------------------------------------------------------------------------------------------------------- bfloat16

// Two tables for each bfloat16 number of an element: its lower byte, its upper byte.
template <int kNumbers>
__attribute__((target("avx512vbmi,avx512bf16"))) void lookup_bfloat16(const ByteLookupArgs& a) {
    const uint8_t *groups = a.groups, *entries = a.entries;
    for (int64_t row = 0; row < a.rows; row += kSlice) {
        Vec sums[2 * kNumbers];
        for (Vec& s : sums) s = _mm512_setzero_ps();
        for (int64_t tile = 0; tile < a.tiles; tile++) {
            int n = *groups++;
            if (n == 0) continue;
            Table t[2 * kNumbers];
#pragma GCC unroll 4
            for (int plane = 0; plane < 2 * kNumbers; plane++) t[plane] = load_table(a.tables + (tile * 2 * kNumbers + plane) * 256);
            for (; n > 0; n--, entries += 3 * kColumns) {
                __builtin_prefetch(entries + kAhead), __builtin_prefetch(entries + kAhead + 64), __builtin_prefetch(entries + kAhead + 128);
                const __m512i columns = _mm512_loadu_si512(entries);
                const __mmask64 upper = _mm512_movepi8_mask(columns);
                const auto first = (__m512bh)_mm512_loadu_si512(entries + kColumns),
                           second = (__m512bh)_mm512_loadu_si512(entries + 2 * kColumns);
#pragma GCC unroll 2
                for (int i = 0; i < kNumbers; i++) {
                    const __m512i low = look_up(t[2 * i], columns, upper), high = look_up(t[2 * i + 1], columns, upper);
                    sums[2 * i] = _mm512_dpbf16_ps(sums[2 * i], first, (__m512bh)_mm512_unpacklo_epi8(low, high));
                    sums[2 * i + 1] = _mm512_dpbf16_ps(sums[2 * i + 1], second, (__m512bh)_mm512_unpackhi_epi8(low, high));
                }
            }
        }
        Vec s = _mm512_add_ps(sums[0], sums[1]);
        if constexpr (kNumbers == 2) s = _mm512_add_ps(s, _mm512_add_ps(sums[2], sums[3]));
        finish_rows(a.to, row, s, low_bits(std::min<int64_t>(kSlice, a.rows - row)));
    }
}

void lookup_bfloat16_tables(const ByteLookupArgs& a) {
    if (a.planes == 2) {
        lookup_bfloat16<1>(a);
    } else {
        lookup_bfloat16<2>(a);
    }
}

// To the nearest bfloat16, halves to even, as an integer in each lane.
SE_INLINE __m512i nearest_bfloat16(Vec v) {
    const __m512i bits = _mm512_castps_si512(v), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
}

SE_INLINE Vec float_of(__m512i bfloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(bfloat16, 16)); }

SE_INLINE void store_bytes(uint8_t* to, __m512i words) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(words)); }

// Sixteen columns of a tile from column k on; zeros past the tile and past the end.
SE_INLINE Vec columns_of_tile(const float* x, int64_t cols, int64_t tile, int64_t k) {
    const int64_t left = std::min(cols - tile * kTile, static_cast<int64_t>(kTile)) - k;
    return left <= 0 ? zero() : load_bits(x + tile * kTile + k, low_bits(std::min<int64_t>(16, left)));
}

int make_bfloat16_tables(const float* x, int64_t cols, uint8_t* to, double*) {
    Vec largest = zero();
    __mmask16 odd = 0, rest = 0;
    for (int64_t k = 0; k < cols; k += 16) {
        const Vec v = load_bits(x + k, low_bits(std::min<int64_t>(16, cols - k)));
        odd |= _mm512_fpclass_ps_mask(v, 0x99);  // NaN or infinity
        largest = _mm512_max_ps(_mm512_abs_ps(v), largest);
        rest |= _mm512_test_epi32_mask(_mm512_castps_si512(v), _mm512_set1_epi32(0xffff));
    }
    const float most = _mm512_reduce_max_ps(largest);
    if (odd || most > 8.5e37f || (most > 0 && most < 8.1e-28f)) return 0;
    const int planes = rest ? 4 : 2;
    const int64_t tiles = (cols + kTile - 1) / kTile;
    for (int64_t tile = 0; tile < tiles; tile++, to += planes * 256)
        for (int64_t k = 0; k < 256; k += 16) {
            const Vec v = columns_of_tile(x, cols, tile, k);
            const __m512i first = nearest_bfloat16(v);
            store_bytes(to + k, first), store_bytes(to + 256 + k, _mm512_srli_epi32(first, 8));
            if (planes == 2) continue;
            const __m512i second = nearest_bfloat16(sub(v, float_of(first)));
            store_bytes(to + 512 + k, second), store_bytes(to + 768 + k, _mm512_srli_epi32(second, 8));
        }
    return planes;
}

// ---------------------------------------------------------------------------------------------------------------- int8

constexpr int64_t kExact = 128;  // tiles whose products fit 32-bit sums: 128 · 255 entries · 255 · 127 < 2^31

__attribute__((target("avx512vbmi,avx512vnni"))) void lookup_int8_tables(const ByteLookupArgs& a) {
    const uint8_t *groups = a.groups, *entries = a.entries;
    for (int64_t row = 0; row < a.rows; row += kSlice) {
        // Integers far below 2^53: exact.
        __m512d totals[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
        for (int64_t from = 0; from < a.tiles; from += kExact) {
            __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int64_t tile = from; tile < std::min(a.tiles, from + kExact); tile++) {
                int n = *groups++;
                if (n == 0) continue;
                Table t[3];
#pragma GCC unroll 3
                for (int plane = 0; plane < 3; plane++) t[plane] = load_table(a.tables + (tile * 3 + plane) * 256);
                for (; n > 0; n--, entries += 2 * kColumns) {
                    __builtin_prefetch(entries + kAhead), __builtin_prefetch(entries + kAhead + 64);
                    const __m512i columns = _mm512_loadu_si512(entries), values = _mm512_loadu_si512(entries + kColumns);
                    const __mmask64 upper = _mm512_movepi8_mask(columns);
#pragma GCC unroll 3
                    for (int plane = 0; plane < 3; plane++)
                        sums[plane] = _mm512_dpbusd_epi32(sums[plane], look_up(t[plane], columns, upper), values);
                }
            }
            for (int half = 0; half < 2; half++)
                for (int plane = 0; plane < 3; plane++) {
                    const __m256i part = half ? _mm512_extracti64x4_epi64(sums[plane], 1) : _mm512_castsi512_si256(sums[plane]);
                    totals[half] = _mm512_fmadd_pd(_mm512_cvtepi32_pd(part), _mm512_set1_pd(1 << (8 * plane)), totals[half]);
                }
        }
        __m256 parts[2];
        for (int half = 0; half < 2; half++) {
            const __m256i of_rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.sums + row + 8 * half));
            const __m512d exact = _mm512_fnmadd_pd(_mm512_cvtepi32_pd(of_rows), _mm512_set1_pd(1 << 23), totals[half]);
            parts[half] = _mm512_cvtpd_ps(_mm512_div_pd(exact, _mm512_set1_pd(a.plane_scale)));
        }
        finish_rows(a.to, row, _mm512_insertf32x8(_mm512_castps256_ps512(parts[0]), parts[1], 1),
                    low_bits(std::min<int64_t>(kSlice, a.rows - row)));
    }
}

int make_int8_tables(const float* x, int64_t cols, uint8_t* to, double* scale) {
    Vec most = zero();
    __mmask16 odd = 0;
    for (int64_t k = 0; k < cols; k += 16) {
        const Vec v = load_bits(x + k, low_bits(std::min<int64_t>(16, cols - k)));
        odd |= _mm512_fpclass_ps_mask(v, 0x99);  // NaN or infinity
        most = _mm512_max_ps(_mm512_abs_ps(v), most);
    }
    const float largest = _mm512_reduce_max_ps(most), wanted = largest > 0 ? 8388607.0f / largest : 1.0f;
    if (odd || wanted > FLT_MAX / 2) return 0;
    const float safe = std::nextafter(wanted, 0.0f);  // the division may have rounded up
    *scale = safe;
    const int64_t tiles = (cols + kTile - 1) / kTile;
    for (int64_t tile = 0; tile < tiles; tile++, to += 3 * 256)
        for (int64_t k = 0; k < 256; k += 16) {
            const __m512i q = _mm512_cvtps_epi32(mul(columns_of_tile(x, cols, tile, k), splat(safe)));
            const __m512i above = _mm512_add_epi32(q, _mm512_set1_epi32(1 << 23));
            store_bytes(to + k, above), store_bytes(to + 256 + k, _mm512_srli_epi32(above, 8));
            store_bytes(to + 512 + k, _mm512_srli_epi32(above, 16));
        }
    return 3;
}

#endif

}  // namespace

ByteLookupKernels make_byte_lookup_kernels() {
    ByteLookupKernels k{};
    constexpr int half = static_cast<int>(Precision::bfloat16), whole = static_cast<int>(Precision::int8);
    k.any[half] = lookup_any<Precision::bfloat16>, k.any[whole] = lookup_any<Precision::int8>;
#if defined(__AVX512F__)
    const CpuInfo& cpu = cpu_info();
    if (cpu.avx512_vbmi && cpu.avx512_bf16) k.tables[half] = lookup_bfloat16_tables, k.make_tables[half] = make_bfloat16_tables;
    if (cpu.avx512_vbmi && cpu.avx512_vnni) k.tables[whole] = lookup_int8_tables, k.make_tables[whole] = make_int8_tables;
#endif
    return k;
}

}  // namespace SE_ISA
}  // namespace sparse_engine
