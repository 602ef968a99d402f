// One vector type per build: 16 floats (AVX-512), 8 (AVX2) or 8 in portable C++. Included only by kernels_*.cpp, inside their own namespace
// per build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns about the deliberately undefined pass-through operands of its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

// Each build's functions live in their own namespace, so that the linker never mixes them up: sparse_engine::avx512 and so on.
#ifndef SE_ISA
#define SE_ISA portable
#endif

#define SE_INLINE __attribute__((always_inline)) inline

namespace sparse_engine {
namespace SE_ISA {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;
SE_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
SE_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
SE_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
SE_INLINE Vec zero() { return _mm512_setzero_ps(); }
SE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SE_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SE_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SE_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SE_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// NaN in x passes through both, as PyTorch's clamp does.
SE_INLINE Vec at_least(Vec x, Vec low) { return _mm512_max_ps(low, x); }
SE_INLINE Vec at_most(Vec x, Vec high) { return _mm512_min_ps(high, x); }
// The low lanes whose bit is set are read, the others are 0; memory under cleared lanes is not touched.
SE_INLINE Vec load_bits(const float* p, uint32_t bits) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p); }
SE_INLINE void store_bits(float* p, Vec v, uint32_t bits) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(bits), v); }
// The same with the bits made ready beforehand, for loops that use them again and again.
using Mask = __mmask16;
SE_INLINE Mask mask_of(uint32_t bits) { return static_cast<__mmask16>(bits); }
SE_INLINE Vec load_masked(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
SE_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
SE_INLINE Vec round_to_int(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SE_INLINE Vec scale_by_power_of_two(Vec v, Vec power) { return _mm512_scalef_ps(v, power); }
SE_INLINE Vec sqrt(Vec v) { return _mm512_sqrt_ps(v); }
// then where x < bound, otherwise elsewhere and for NaN
SE_INLINE Vec where_below(Vec x, Vec bound, Vec then, Vec otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), then);
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;
SE_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
SE_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
SE_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
SE_INLINE Vec zero() { return _mm256_setzero_ps(); }
SE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SE_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SE_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
SE_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SE_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
SE_INLINE Vec at_least(Vec x, Vec low) { return _mm256_max_ps(low, x); }
SE_INLINE Vec at_most(Vec x, Vec high) { return _mm256_min_ps(high, x); }
SE_INLINE __m256i lane_mask(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
}
SE_INLINE Vec load_bits(const float* p, uint32_t bits) { return _mm256_maskload_ps(p, lane_mask(bits)); }
SE_INLINE void store_bits(float* p, Vec v, uint32_t bits) { _mm256_maskstore_ps(p, lane_mask(bits), v); }
using Mask = __m256i;
SE_INLINE Mask mask_of(uint32_t bits) { return lane_mask(bits); }
SE_INLINE Vec load_masked(const float* p, Mask mask) { return _mm256_maskload_ps(p, mask); }
SE_INLINE float sum(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
SE_INLINE Vec round_to_int(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SE_INLINE Vec scale_by_power_of_two(Vec v, Vec power) {  // power within ±254: two steps, so that neither exponent overflows
    __m256i n = _mm256_cvtps_epi32(power), half = _mm256_srai_epi32(n, 1), rest = _mm256_sub_epi32(n, half);
    const __m256i bias = _mm256_set1_epi32(127);
    v = _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
SE_INLINE Vec sqrt(Vec v) { return _mm256_sqrt_ps(v); }
SE_INLINE Vec where_below(Vec x, Vec bound, Vec then, Vec otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, bound, _CMP_LT_OQ));
}

#else

constexpr int kLanes = 8;
struct Vec {
    float lane[kLanes];
};
#define SE_EACH for (int i = 0; i < kLanes; i++)
SE_INLINE Vec load(const float* p) {
    Vec r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
SE_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
SE_INLINE Vec splat(float x) {
    Vec r;
    SE_EACH r.lane[i] = x;
    return r;
}
SE_INLINE Vec zero() { return splat(0.0f); }
SE_INLINE Vec fma(Vec a, Vec b, Vec c) {
    SE_EACH c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
SE_INLINE Vec add(Vec a, Vec b) {
    SE_EACH a.lane[i] += b.lane[i];
    return a;
}
SE_INLINE Vec sub(Vec a, Vec b) {
    SE_EACH a.lane[i] -= b.lane[i];
    return a;
}
SE_INLINE Vec mul(Vec a, Vec b) {
    SE_EACH a.lane[i] *= b.lane[i];
    return a;
}
SE_INLINE Vec div(Vec a, Vec b) {
    SE_EACH a.lane[i] /= b.lane[i];
    return a;
}
SE_INLINE Vec at_least(Vec x, Vec low) {
    SE_EACH x.lane[i] = low.lane[i] > x.lane[i] ? low.lane[i] : x.lane[i];
    return x;
}
SE_INLINE Vec at_most(Vec x, Vec high) {
    SE_EACH x.lane[i] = high.lane[i] < x.lane[i] ? high.lane[i] : x.lane[i];
    return x;
}
SE_INLINE Vec load_bits(const float* p, uint32_t bits) {
    Vec r;
    SE_EACH r.lane[i] = (bits >> i & 1) ? p[i] : 0.0f;
    return r;
}
using Mask = uint32_t;
SE_INLINE Mask mask_of(uint32_t bits) { return bits; }
SE_INLINE Vec load_masked(const float* p, Mask mask) { return load_bits(p, mask); }
SE_INLINE void store_bits(float* p, Vec v, uint32_t bits) { SE_EACH if (bits >> i & 1) p[i] = v.lane[i]; }
SE_INLINE float sum(Vec v) {
    float s = 0;
    SE_EACH s += v.lane[i];
    return s;
}
SE_INLINE Vec round_to_int(Vec v) {
    SE_EACH v.lane[i] = std::nearbyint(v.lane[i]);
    return v;
}
SE_INLINE Vec scale_by_power_of_two(Vec v, Vec power) {
    // v is NaN wherever power is, and stays so; converting that power would be undefined.
    SE_EACH v.lane[i] = std::ldexp(v.lane[i], power.lane[i] == power.lane[i] ? static_cast<int>(power.lane[i]) : 0);
    return v;
}
SE_INLINE Vec sqrt(Vec v) {
    SE_EACH v.lane[i] = std::sqrt(v.lane[i]);
    return v;
}
SE_INLINE Vec where_below(Vec x, Vec bound, Vec then, Vec otherwise) {
    SE_EACH otherwise.lane[i] = x.lane[i] < bound.lane[i] ? then.lane[i] : otherwise.lane[i];
    return otherwise;
}
#undef SE_EACH

#endif

// Half a vector costs half a slot of the FMA units and of the L1's ports.
#if defined(__AVX512F__)
using HalfVec = __m256;
SE_INLINE HalfVec lower_half(Vec v) { return _mm512_castps512_ps256(v); }
SE_INLINE HalfVec load_half(const float* p) { return _mm256_loadu_ps(p); }
SE_INLINE void store_half(float* p, HalfVec v) { _mm256_storeu_ps(p, v); }
SE_INLINE HalfVec fma(HalfVec a, HalfVec b, HalfVec c) { return _mm256_fmadd_ps(a, b, c); }
SE_INLINE HalfVec add(HalfVec a, HalfVec b) { return _mm256_add_ps(a, b); }
SE_INLINE HalfVec at_least(HalfVec x, HalfVec low) { return _mm256_max_ps(low, x); }
SE_INLINE HalfVec at_most(HalfVec x, HalfVec high) { return _mm256_min_ps(high, x); }
constexpr bool kHalves = true;
#else
constexpr bool kHalves = false;
struct HalfVec {};
SE_INLINE HalfVec lower_half(Vec) { return {}; }
SE_INLINE HalfVec load_half(const float*) { return {}; }
SE_INLINE void store_half(float*, HalfVec) {}
SE_INLINE HalfVec fma(HalfVec, HalfVec, HalfVec c) { return c; }
SE_INLINE HalfVec add(HalfVec a, HalfVec) { return a; }
SE_INLINE HalfVec at_least(HalfVec x, HalfVec) { return x; }
SE_INLINE HalfVec at_most(HalfVec x, HalfVec) { return x; }
#endif

#if defined(__AVX512F__)
// Per 128-bit lane: the sums of a, b, c, d over that lane.
SE_INLINE Vec sum_within_lanes(Vec a, Vec b, Vec c, Vec d) {
    __m512d ab = _mm512_castps_pd(add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}
SE_INLINE Vec add_lane_pairs(Vec a, Vec b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
// The sixteen sums over four such vectors, in the order of what went into them.
SE_INLINE Vec fold(const Vec (&quads)[4]) { return add_lane_pairs(add_lane_pairs(quads[0], quads[1]), add_lane_pairs(quads[2], quads[3])); }

// Transposes 16×16 floats held in r.
SE_INLINE void transpose16(Vec (&r)[16]) {
    Vec t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]), c = _mm512_castps_pd(t[4 * i + 2]),
                d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
#endif

SE_INLINE uint32_t low_bits(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// e^x = 2^n · (1 + q·r): x = n·ln2 + r, |r| ≤ ln2/2, and q a polynomial in r. x is kept within −104..89; NaN stays NaN.
struct ReducedExp {
    Vec n, r, q;
};
SE_INLINE ReducedExp reduced_exp(Vec x) {
    Vec clamped = at_most(at_least(x, splat(-104.0f)), splat(89.0f));
    Vec n = round_to_int(mul(clamped, splat(1.44269504088896341f)));
    Vec r = fma(n, splat(-0.693145751953125f), clamped);  // ln2 in two parts: the first has few bits, so n·part is exact
    r = fma(n, splat(-1.42860682030941723e-6f), r);
    Vec q = splat(1.0f / 5040);
    q = fma(q, r, splat(1.0f / 720));
    q = fma(q, r, splat(1.0f / 120));
    q = fma(q, r, splat(1.0f / 24));
    q = fma(q, r, splat(1.0f / 6));
    q = fma(q, r, splat(0.5f));
    q = fma(q, r, splat(1.0f));
    return {n, r, q};
}

// e^x to about 1 ulp over the whole range.
SE_INLINE Vec exp(Vec x) {
    ReducedExp e = reduced_exp(x);
    return scale_by_power_of_two(fma(e.q, e.r, splat(1.0f)), e.n);
}

// e^x − 1 to a few ulp of itself, also for tiny x, where n = 0 and the result is q·x. For x up to 88.
SE_INLINE Vec expm1(Vec x) {
    ReducedExp e = reduced_exp(x);
    Vec power = scale_by_power_of_two(splat(1.0f), e.n);
    return fma(power, mul(e.q, e.r), sub(power, splat(1.0f)));
}

}  // namespace SE_ISA
}  // namespace sparse_engine
