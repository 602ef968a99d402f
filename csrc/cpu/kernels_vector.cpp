// Products with one vector: weights are read once and nothing else matters, so they are kept small (bfloat16, int8) and nothing is
// gathered.
//
// Sparse (LookupMatrix): 31 columns of x stand in two registers; per group of four entries
//     one word per lane with four column bytes  →  four table lookups (vpermt2ps)  →  four FMAs with the values
// 4 bytes of columns and 4 values per lane and group; 2.3 to 3.5 cycles per entry of sixteen lanes.
//
// Dense (RowMatrix), bfloat16: a word holds an even and an odd column; a shift and a mask turn each into a float, and x is sorted the same
// way before. int8: sign-extended and converted; or, where the processor has vpdpbusd, x as three bytes of a 24-bit number, each multiplied
// with the weights in integers: exact but for the rounding of x to 2^-24 of its largest element.
#include <algorithm>
#include <cmath>

#include "core/cpu_features.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

constexpr int kRows = 4;  // dense rows at a time: x is loaded once for all of them

SE_INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = uint32_t{h} << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// ---------------------------------------------------------------------------------------------------------------- epilogue

SE_INLINE void finish_row(const VectorArgs& a, int64_t row, float s) {
    if (a.scale) s *= a.scale[row];
    if (a.bias) s += a.bias[row];
    if (a.residual) s += a.residual[row];
    s = a.low > s ? a.low : s;
    a.out[row] = a.high < s ? a.high : s;
}

// `kLanes` rows from `row` on, the first `bits` of them.
SE_INLINE void finish_rows(const VectorArgs& a, int64_t row, Vec s, uint32_t bits) {
    if (a.scale) s = mul(s, load_bits(a.scale + row, bits));
    if (a.bias) s = add(s, load_bits(a.bias + row, bits));
    if (a.residual) s = add(s, load_bits(a.residual + row, bits));
    store_bits(a.out + row, at_most(at_least(s, splat(a.low)), splat(a.high)), bits);
}

// ---------------------------------------------------------------------------------------------------------------- sparse

#if defined(__AVX512F__)

template <Precision P>
SE_INLINE void group_of_four(Vec (&sums)[4], Vec x0, Vec x1, const uint32_t* index, const uint8_t* values) {
    const __m512i where = _mm512_loadu_si512(index);
    const Vec v0 = _mm512_permutex2var_ps(x0, where, x1);
    const Vec v1 = _mm512_permutex2var_ps(x0, _mm512_srli_epi32(where, 8), x1);
    const Vec v2 = _mm512_permutex2var_ps(x0, _mm512_srli_epi32(where, 16), x1);
    const Vec v3 = _mm512_permutex2var_ps(x0, _mm512_srli_epi32(where, 24), x1);
    if constexpr (P == Precision::float32) {
        const auto* w = reinterpret_cast<const float*>(values);
        sums[0] = fma(load(w), v0, sums[0]), sums[1] = fma(load(w + 16), v1, sums[1]);
        sums[2] = fma(load(w + 32), v2, sums[2]), sums[3] = fma(load(w + 48), v3, sums[3]);
    } else if constexpr (P == Precision::bfloat16) {
        const __m512i p = _mm512_loadu_si512(values), q = _mm512_loadu_si512(values + 64), high = _mm512_set1_epi32(-65536);
        sums[0] = fma(_mm512_castsi512_ps(_mm512_slli_epi32(p, 16)), v0, sums[0]);
        sums[1] = fma(_mm512_castsi512_ps(_mm512_and_si512(p, high)), v1, sums[1]);
        sums[2] = fma(_mm512_castsi512_ps(_mm512_slli_epi32(q, 16)), v2, sums[2]);
        sums[3] = fma(_mm512_castsi512_ps(_mm512_and_si512(q, high)), v3, sums[3]);
    } else {
        auto w = [&](int e) {
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * e))));
        };
        sums[0] = fma(w(0), v0, sums[0]), sums[1] = fma(w(1), v1, sums[1]);
        sums[2] = fma(w(2), v2, sums[2]), sums[3] = fma(w(3), v3, sums[3]);
    }
}

template <Precision P>
void lookup(const LookupArgs& a) {
    constexpr int64_t kValues = LookupMatrix::kSlice * LookupMatrix::kGroup * precision_bytes(P);
    const uint8_t* groups = a.groups;
    const uint32_t* index = a.index;
    const uint8_t* values = a.values;
    for (int64_t row = 0; row < a.rows; row += LookupMatrix::kSlice) {
        Vec sums[4] = {zero(), zero(), zero(), zero()};
        const float* x = a.x;
        for (int64_t left = a.cols; left > 0; left -= LookupMatrix::kTile, x += LookupMatrix::kTile) {
            int n = *groups++;
            if (n == 0) continue;
            Vec x0, x1;
            if (left >= LookupMatrix::kTile) {
                x0 = load(x), x1 = load_bits(x + 16, 0x7fff);
            } else {
                x0 = load_bits(x, low_bits(std::min<int64_t>(16, left))), x1 = load_bits(x + 16, low_bits(std::max<int64_t>(0, left - 16)));
            }
            for (; n > 0; n--, index += LookupMatrix::kSlice, values += kValues) group_of_four<P>(sums, x0, x1, index, values);
        }
        finish_rows(a.to, row, add(add(sums[0], sums[1]), add(sums[2], sums[3])), low_bits(std::min<int64_t>(16, a.rows - row)));
    }
}

#else

template <Precision P>
SE_INLINE float value_at(const uint8_t* values, int entry, int lane) {
    if constexpr (P == Precision::float32) return reinterpret_cast<const float*>(values)[entry * 16 + lane];
    if constexpr (P == Precision::bfloat16)
        return bf16_to_float(reinterpret_cast<const uint16_t*>(values)[(entry / 2 * 16 + lane) * 2 + entry % 2]);
    return reinterpret_cast<const int8_t*>(values)[entry * 16 + lane];
}

template <Precision P>
void lookup(const LookupArgs& a) {
    constexpr int64_t kValues = LookupMatrix::kSlice * LookupMatrix::kGroup * precision_bytes(P);
    const uint8_t* groups = a.groups;
    const uint32_t* index = a.index;
    const uint8_t* values = a.values;
    float table[LookupMatrix::kTile + 1] = {};  // the last one stays zero
    for (int64_t row = 0; row < a.rows; row += LookupMatrix::kSlice) {
        float sums[LookupMatrix::kSlice] = {};
        const float* x = a.x;
        for (int64_t left = a.cols; left > 0; left -= LookupMatrix::kTile, x += LookupMatrix::kTile) {
            int n = *groups++;
            if (n == 0) continue;
            std::memcpy(table, x, size_t(std::min<int64_t>(left, LookupMatrix::kTile)) * sizeof(float));
            for (; n > 0; n--, index += LookupMatrix::kSlice, values += kValues)
                for (int lane = 0; lane < LookupMatrix::kSlice; lane++) {
                    const uint32_t word = index[lane];
                    float s = value_at<P>(values, 0, lane) * table[word & 255];
                    s += value_at<P>(values, 1, lane) * table[word >> 8 & 255];
                    s += value_at<P>(values, 2, lane) * table[word >> 16 & 255];
                    sums[lane] += s + value_at<P>(values, 3, lane) * table[word >> 24];
                }
        }
        for (int lane = 0; lane < LookupMatrix::kSlice; lane += kLanes)
            if (row + lane < a.rows)
                finish_rows(a.to, row + lane, load(sums + lane), low_bits(std::min<int64_t>(kLanes, a.rows - row - lane)));
    }
}

#endif

// ---------------------------------------------------------------------------------------------------------------- dense

// x in the order in which bfloat16 pairs come apart: per block of 2 · kLanes columns first the even, then the odd ones.
void pair_order(const float* x, int64_t n, int64_t padded, float* to) {
    for (int64_t k = 0; k < padded; k += 2 * kLanes)
        for (int64_t i = 0; i < kLanes; i++) {
            to[k + i] = k + 2 * i < n ? x[k + 2 * i] : 0.0f;
            to[k + kLanes + i] = k + 2 * i + 1 < n ? x[k + 2 * i + 1] : 0.0f;
        }
}

struct Pair {
    Vec even, odd;
};

#if defined(__AVX512F__)
SE_INLINE Pair load_pairs(const uint16_t* w) {
    const __m512i p = _mm512_loadu_si512(w);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(p, 16)), _mm512_castsi512_ps(_mm512_and_si512(p, _mm512_set1_epi32(-65536)))};
}
SE_INLINE Vec load_int8(const int8_t* w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
}
#elif defined(__AVX2__)
SE_INLINE Pair load_pairs(const uint16_t* w) {
    const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(p, 16)), _mm256_castsi256_ps(_mm256_and_si256(p, _mm256_set1_epi32(-65536)))};
}
SE_INLINE Vec load_int8(const int8_t* w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}
#else
SE_INLINE Pair load_pairs(const uint16_t* w) {
    float even[kLanes], odd[kLanes];
    for (int i = 0; i < kLanes; i++) even[i] = bf16_to_float(w[2 * i]), odd[i] = bf16_to_float(w[2 * i + 1]);
    return {load(even), load(odd)};
}
SE_INLINE Vec load_int8(const int8_t* w) {
    float to[kLanes];
    for (int i = 0; i < kLanes; i++) to[i] = w[i];
    return load(to);
}
#endif

template <int R>
SE_INLINE void bf16_rows(const RowsArgs& a, int64_t row) {
    const auto* w = static_cast<const uint16_t*>(a.w) + row * a.pitch;
    Vec even[R], odd[R];
    for (int r = 0; r < R; r++) even[r] = odd[r] = zero();
    for (int64_t k = 0; k < a.pitch; k += 2 * kLanes) {
        const Vec xe = load(a.x + k), xo = load(a.x + k + kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            Pair p = load_pairs(w + r * a.pitch + k);
            even[r] = fma(p.even, xe, even[r]), odd[r] = fma(p.odd, xo, odd[r]);
        }
    }
    for (int r = 0; r < R; r++) finish_row(a.to, row + r, sum(add(even[r], odd[r])));
}

void rows_bf16(const RowsArgs& a) {
    int64_t row = a.row0;
    for (; row + kRows <= a.row1; row += kRows) bf16_rows<kRows>(a, row);
    for (; row < a.row1; row++) bf16_rows<1>(a, row);
}

template <int R>
SE_INLINE void int8_rows(const RowsArgs& a, int64_t row) {
    const auto* w = static_cast<const int8_t*>(a.w) + row * a.pitch;
    Vec sums[R];
    for (int r = 0; r < R; r++) sums[r] = zero();
    for (int64_t k = 0; k < a.pitch; k += kLanes) {
        const Vec x = load(a.x + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r] = fma(load_int8(w + r * a.pitch + k), x, sums[r]);
    }
    for (int r = 0; r < R; r++) finish_row(a.to, row + r, sum(sums[r]));
}

void rows_int8(const RowsArgs& a) {
    int64_t row = a.row0;
    for (; row + kRows <= a.row1; row += kRows) int8_rows<kRows>(a, row);
    for (; row < a.row1; row++) int8_rows<1>(a, row);
}

#if defined(__AVX512F__)

// x as three planes of bytes: x ≈ (65536 high + 256 middle + low − 2^23) / scale.
void byte_planes(const float* x, int64_t n, int64_t padded, float scale, uint8_t* to) {
    for (int64_t k = 0; k < padded; k += 16) {
        const uint32_t bits = low_bits(std::min<int64_t>(16, std::max<int64_t>(0, n - k)));
        const Vec v = k < n ? load_bits(x + k, bits) : zero();
        const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(mul(v, splat(scale))), _mm512_set1_epi32(1 << 23));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 16)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + padded + k), _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * padded + k), _mm512_cvtepi32_epi8(q));
    }
}

constexpr int64_t kExact = 32768;  // columns whose products fit 32-bit sums: 32768 · 255 · 127 < 2^31

template <int R>
__attribute__((target("avx512vnni"))) void int8_rows_of_bytes(const RowsArgs& a, int64_t row) {
    const auto* w = static_cast<const int8_t*>(a.w) + row * a.pitch;
    int64_t totals[R] = {};
    for (int64_t from = 0; from < a.pitch; from += kExact) {
        __m512i high[R], middle[R], low[R];
        for (int r = 0; r < R; r++) high[r] = middle[r] = low[r] = _mm512_setzero_si512();
        for (int64_t k = from; k < std::min(a.pitch, from + kExact); k += 64) {
            const __m512i h = _mm512_loadu_si512(a.planes + k), m = _mm512_loadu_si512(a.planes + a.pitch + k),
                          l = _mm512_loadu_si512(a.planes + 2 * a.pitch + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const __m512i v = _mm512_loadu_si512(w + r * a.pitch + k);
                high[r] = _mm512_dpbusd_epi32(high[r], h, v), middle[r] = _mm512_dpbusd_epi32(middle[r], m, v);
                low[r] = _mm512_dpbusd_epi32(low[r], l, v);
            }
        }
        for (int r = 0; r < R; r++)
            totals[r] += int64_t{_mm512_reduce_add_epi32(high[r])} * 65536 + int64_t{_mm512_reduce_add_epi32(middle[r])} * 256 +
                         _mm512_reduce_add_epi32(low[r]);
    }
    for (int r = 0; r < R; r++) {
        const int64_t exact = totals[r] - int64_t{a.sums[row + r]} * (1 << 23);
        finish_row(a.to, row + r, static_cast<float>(static_cast<double>(exact) / a.plane_scale));
    }
}

void rows_int8_of_bytes(const RowsArgs& a) {
    int64_t row = a.row0;
    for (; row + kRows <= a.row1; row += kRows) int8_rows_of_bytes<kRows>(a, row);
    for (; row < a.row1; row++) int8_rows_of_bytes<1>(a, row);
}

#endif

// ---------------------------------------------------------------------------------------------------------------- plain rows, float

SE_INLINE float finish(float s, int64_t row, const float* bias, const float* residual, float low, float high) {
    if (bias) s += bias[row];
    if (residual) s += residual[row];
    s = low > s ? low : s;
    return high < s ? high : s;
}

#if defined(__AVX2__)
// Four elements of x by ordinary loads: on AMD (Zen 4) a gather instruction takes 1.4 cycles per element, this one.
// Entries are read once, in order, and come from beyond the L2: too slowly for the hardware's prefetcher to run far ahead.
constexpr int64_t kAhead = 512;
template <class C>
SE_INLINE __m128 four_of(const float* x, const C* col) {
    __m128 v = _mm_load_ss(x + col[0]);
    v = _mm_insert_ps(v, _mm_load_ss(x + col[1]), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + col[2]), 0x20);
    return _mm_insert_ps(v, _mm_load_ss(x + col[3]), 0x30);
}

template <class C>
void spmv(const int64_t* row_ptr, const C* col, const float* w, int64_t row0, int64_t row1, const float* x, float* out, const float* bias,
          const float* residual, float low, float high) {
    for (int64_t row = row0; row < row1; row++) {
        int64_t i = row_ptr[row];
        const int64_t end = row_ptr[row + 1];
        __m128 a = _mm_setzero_ps(), b = a, c = a, d = a;
        for (; i + 16 <= end; i += 16) {
            __builtin_prefetch(w + i + kAhead), __builtin_prefetch(col + i + kAhead);
            a = _mm_fmadd_ps(_mm_loadu_ps(w + i), four_of(x, col + i), a);
            b = _mm_fmadd_ps(_mm_loadu_ps(w + i + 4), four_of(x, col + i + 4), b);
            c = _mm_fmadd_ps(_mm_loadu_ps(w + i + 8), four_of(x, col + i + 8), c);
            d = _mm_fmadd_ps(_mm_loadu_ps(w + i + 12), four_of(x, col + i + 12), d);
        }
        for (; i + 4 <= end; i += 4) a = _mm_fmadd_ps(_mm_loadu_ps(w + i), four_of(x, col + i), a);
        float rest = 0;
        for (; i < end; i++) rest += w[i] * x[col[i]];
        a = _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d));
        a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        out[row] = finish(rest + _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a))), row, bias, residual, low, high);
    }
}
#else
template <class C>
void spmv(const int64_t* row_ptr, const C* col, const float* w, int64_t row0, int64_t row1, const float* x, float* out, const float* bias,
          const float* residual, float low, float high) {
    for (int64_t row = row0; row < row1; row++) {
        int64_t i = row_ptr[row], end = row_ptr[row + 1];
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (; i + 4 <= end; i += 4)
            s0 += w[i] * x[col[i]], s1 += w[i + 1] * x[col[i + 1]], s2 += w[i + 2] * x[col[i + 2]], s3 += w[i + 3] * x[col[i + 3]];
        for (; i < end; i++) s0 += w[i] * x[col[i]];
        out[row] = finish((s0 + s1) + (s2 + s3), row, bias, residual, low, high);
    }
}
#endif

#if defined(__AVX512F__)
SE_INLINE __m512i sixteen_of(const int32_t* col, __mmask16 bits) { return _mm512_maskz_loadu_epi32(bits, col); }
SE_INLINE __m512i sixteen_of(const uint16_t* col, __mmask16 bits) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(bits, col)); }

// Each row gathers its columns of x (which stays in L1); two accumulators hide the gather's latency. For processors that gather fast.
template <class C>
void spmv_gathering(const int64_t* row_ptr, const C* col, const float* w, int64_t row0, int64_t row1, const float* x, float* out,
                    const float* bias, const float* residual, float low, float high) {
    for (int64_t row = row0; row < row1; row++) {
        int64_t i = row_ptr[row], end = row_ptr[row + 1];
        Vec a = zero(), b = zero();
        for (; i + 32 <= end; i += 32) {
            a = fma(load(w + i), _mm512_i32gather_ps(sixteen_of(col + i, 0xffff), x, 4), a);
            b = fma(load(w + i + 16), _mm512_i32gather_ps(sixteen_of(col + i + 16, 0xffff), x, 4), b);
        }
        for (; i < end; i += 16) {
            uint32_t bits = low_bits(std::min<int64_t>(16, end - i));
            __m512i where = sixteen_of(col + i, static_cast<__mmask16>(bits));
            a = fma(load_bits(w + i, bits), _mm512_mask_i32gather_ps(zero(), static_cast<__mmask16>(bits), where, x, 4), a);
        }
        out[row] = finish(sum(add(a, b)), row, bias, residual, low, high);
    }
}
#endif

void gemv(const float* w, int64_t cols, int64_t row0, int64_t row1, const float* x, float* out, const float* bias, const float* residual,
          float low, float high) {
    int64_t row = row0;
    for (; row + 4 <= row1; row += 4) {
        const float *w0 = w + row * cols, *w1 = w0 + cols, *w2 = w1 + cols, *w3 = w2 + cols;
        Vec a = zero(), b = zero(), c = zero(), d = zero();
        int64_t k = 0;
        for (; k + kLanes <= cols; k += kLanes) {
            Vec v = load(x + k);
            a = fma(load(w0 + k), v, a), b = fma(load(w1 + k), v, b), c = fma(load(w2 + k), v, c), d = fma(load(w3 + k), v, d);
        }
        if (k < cols) {
            uint32_t bits = low_bits(cols - k);
            Vec v = load_bits(x + k, bits);
            a = fma(load_bits(w0 + k, bits), v, a), b = fma(load_bits(w1 + k, bits), v, b), c = fma(load_bits(w2 + k, bits), v, c),
            d = fma(load_bits(w3 + k, bits), v, d);
        }
        out[row] = finish(sum(a), row, bias, residual, low, high), out[row + 1] = finish(sum(b), row + 1, bias, residual, low, high);
        out[row + 2] = finish(sum(c), row + 2, bias, residual, low, high),
                  out[row + 3] = finish(sum(d), row + 3, bias, residual, low, high);
    }
    for (; row < row1; row++) {
        Vec a = zero();
        int64_t k = 0;
        for (; k + kLanes <= cols; k += kLanes) a = fma(load(w + row * cols + k), load(x + k), a);
        if (k < cols) {
            uint32_t bits = low_bits(cols - k);
            a = fma(load_bits(w + row * cols + k, bits), load_bits(x + k, bits), a);
        }
        out[row] = finish(sum(a), row, bias, residual, low, high);
    }
}

}  // namespace

void fill_vector(KernelTable& t) {
    t.spmv = spmv<int32_t>, t.spmv16 = spmv<uint16_t>;
    t.gemv = gemv;
#if defined(__AVX512F__)
    if (!cpu_info().slow_gather) t.spmv = spmv_gathering<int32_t>, t.spmv16 = spmv_gathering<uint16_t>;
#endif
    t.lookup[static_cast<int>(Precision::float32)] = lookup<Precision::float32>;
    t.lookup[static_cast<int>(Precision::bfloat16)] = lookup<Precision::bfloat16>;
    t.lookup[static_cast<int>(Precision::int8)] = lookup<Precision::int8>;
    t.pair_order = pair_order;
    t.rows_bf16 = rows_bf16;
    t.rows_int8 = rows_int8;
#if defined(__AVX512F__)
    t.byte_planes = byte_planes;
    t.rows_int8_of_bytes = cpu_info().avx512_vnni ? rows_int8_of_bytes : nullptr;
#endif
}

}  // namespace SE_ISA
}  // namespace sparse_engine
