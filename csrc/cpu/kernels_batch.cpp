// Convolutions of a batch whose images lie along the lanes: one vector is one pixel of so many images.
//
//   source  [row][channel][column][lane]    zero columns left and right stand for the padding
//   entry   one offset (in vectors) and one weight: a tap of a channel is a fixed distance from the pixel it belongs to
//   tile    V neighbouring pixels of an output row: acc[V] += w · source[pixel + offset], aligned loads, no masks, any stride
//
// An im2col tile is written once per column and pays where a column is used many times. Here nothing is copied per tap, so a column costs
// only where a weight was kept. Arithmetic intensity: 2·V·lanes flops per 6 bytes of weights, one load of the source per FMA.
#include "cpu/kernels_batch.h"

#include <algorithm>

#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

// Sixteen images are sixteen or more streams, of a few lines a page: too many for the hardware's prefetcher where they come
// from beyond the L2. Four lines ahead in each, which at the end of a pixel's channels or a row are the next one's.
constexpr int kAhead = 64;

void to_lanes(const float* x, size_t ld, int n, int columns, float* lanes, size_t step) {
    int k = 0;
#if defined(__AVX512F__)
    for (; k < columns; k += 16) {
        const int wide = std::min(16, columns - k);
        const uint32_t bits = low_bits(wide);
        Vec r[16];
        for (int j = 0; j < 16; j++) r[j] = j < n ? load_bits(x + size_t(j) * ld + k, bits) : zero();
        for (int j = 0; j < n; j++) __builtin_prefetch(x + size_t(j) * ld + k + kAhead);
        transpose16(r);
        for (int j = 0; j < wide; j++) store(lanes + size_t(k + j) * step, r[j]);
    }
#endif
    for (; k < columns; k++)
        for (int j = 0; j < kLanes; j++) lanes[size_t(k) * step + j] = j < n ? x[size_t(j) * ld + k] : 0.0f;
}

void from_lanes(const float* lanes, size_t step, int n, int columns, float* y, size_t ld) {
    int k = 0;
#if defined(__AVX512F__)
    for (; k < columns; k += 16) {
        const int wide = std::min(16, columns - k);
        const uint32_t bits = low_bits(wide);
        Vec r[16];
        for (int j = 0; j < 16; j++) r[j] = j < wide ? load(lanes + size_t(k + j) * step) : zero();
        for (int j = 0; j < n; j++) __builtin_prefetch(y + size_t(j) * ld + k + kAhead, 0, 2);
        transpose16(r);
        for (int j = 0; j < n; j++) store_bits(y + size_t(j) * ld + k, r[j], bits);
    }
#endif
    for (; k < columns; k += 8) {
        const int wide = std::min(8, columns - k);
        for (int j = 0; j < n; j++)
            for (int i = 0; i < wide; i++) y[size_t(j) * ld + k + i] = lanes[size_t(k + i) * step + j];
    }
}

// Step: vectors from one pixel's source to the next one's; 0 = as the arguments say.
template <int V, int Step>
void conv_rows(const BatchConvArgs& args) {
    const BatchConvArgs a = args;
    const size_t step = Step ? size_t(Step) * kLanes : a.step * kLanes;
    for (int64_t row = 0; row < a.rows; row++) {
        uint32_t e = a.begin[row * a.ranges];
        const uint32_t end = a.end[row * a.ranges];
        Vec acc[V];
        const Vec start = a.bias ? splat(a.bias[row]) : zero();
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[v] = start;
        for (; e < end; e++) {
            const float* x = a.x + size_t(a.offset[e]) * kLanes;
            const Vec w = splat(a.values[e]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[v] = fma(w, load(x + v * step), acc[v]);
        }
        float* out = a.out + row * a.out_row;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(out + v * a.out_step, acc[v]);
    }
}

template <int Step>
void conv_tile(const BatchConvArgs& a) {
    switch (a.vectors) {
        case 1: return conv_rows<1, Step>(a);
        case 2: return conv_rows<2, Step>(a);
        case 3: return conv_rows<3, Step>(a);
        case 4: return conv_rows<4, Step>(a);
        case 5: return conv_rows<5, Step>(a);
        case 6: return conv_rows<6, Step>(a);
        case 7: return conv_rows<7, Step>(a);
        default: return conv_rows<8, Step>(a);
    }
}

void batch_conv(const BatchConvArgs& a) {
    if (a.step == 1) return conv_tile<1>(a);
    if (a.step == 2) return conv_tile<2>(a);
    conv_tile<0>(a);
}

#if defined(__AVX512F__)
SE_INLINE Vec sum_quarters(Vec a, Vec b, Vec c, Vec d) {  // per 128 bits: the sums of a, b, c, d over them
    __m512d ab = _mm512_castps_pd(add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}
SE_INLINE Vec add_pairs_of_quarters(Vec a, Vec b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }

// out[i] += sum of acc[i]: sums are folded together by a tree of additions, three operations each, where one across a register takes ten.
template <int E>
SE_INLINE void add_sums(const Vec (&acc)[E], float* out) {
    auto at = [&](int i) { return i < E ? acc[i] : zero(); };
    const Vec four = sum_quarters(at(0), at(1), at(2), at(3));
    const Vec more = E > 4 ? sum_quarters(at(4), at(5), at(6), at(7)) : four;
    const Vec pairs = add_pairs_of_quarters(four, more);
    const uint32_t bits = low_bits(E);
    store_bits(out, add(load_bits(out, bits), add_pairs_of_quarters(pairs, pairs)), bits);
}
#else
template <int E>
SE_INLINE void add_sums(const Vec (&acc)[E], float* out) {
    for (int i = 0; i < E; i++) out[i] += sum(acc[i]);
}
#endif

// E entries at a time: each load of the gradient feeds E products.
template <int E>
SE_INLINE void dots(const BatchDotsArgs& a, int64_t first) {
    const float* x[E];
    Vec acc[E];
#pragma GCC unroll 8
    for (int i = 0; i < E; i++) x[i] = a.x + size_t(a.offset[first + i]) * kLanes, acc[i] = zero();
    const size_t step = a.step * kLanes;
    for (int64_t y = 0; y < a.height; y++) {
        const float* g = a.dy + y * a.dy_row;
        const size_t row = y * a.x_row;
        for (int64_t i = 0; i < a.width; i++) {
            const Vec gradient = load(g + i * kLanes);
#pragma GCC unroll 8
            for (int e = 0; e < E; e++) acc[e] = fma(gradient, load(x[e] + row + i * step), acc[e]);
        }
    }
    add_sums<E>(acc, a.out + first);
}

void batch_dots(const BatchDotsArgs& a) {
    int64_t e = 0;
    for (; e + 8 <= a.entries; e += 8) dots<8>(a, e);
    switch (a.entries - e) {
        case 1: return dots<1>(a, e);
        case 2: return dots<2>(a, e);
        case 3: return dots<3>(a, e);
        case 4: return dots<4>(a, e);
        case 5: return dots<5>(a, e);
        case 6: return dots<6>(a, e);
        case 7: return dots<7>(a, e);
        default: return;
    }
}

}  // namespace

BatchKernels make_batch_kernels();
BatchKernels make_batch_kernels() { return {kLanes, to_lanes, from_lanes, batch_conv, batch_dots}; }

}  // namespace SE_ISA
}  // namespace sparse_engine
