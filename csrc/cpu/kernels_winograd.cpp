// Dense convolution with fewer multiplications along the rows of the image: Winograd's F(4, r), four outputs of an r-tap filter from r + 3
// products instead of 4r (r = 3: half of them, r = 4: 7/16). Only along rows, so that what it costs in accuracy is a factor of about two.
//
//   D  four planes of every fourth pixel of a row      U[p][t] = sum over j of Bt[p][j] · D[j % 4][t + j / 4]
//   M[p][row][t] = sum over k of Gw[p][row][k] · U[p][k][t]       k: (channel, phase of the column's stride, kernel row)
//   y[row][4t + i] = sum over p of At[i][p] · M[p][row][t]
//
// Points 0, 1, −1, 2, −1/2, ∞ for r = 3 and 0, 1, −1, 2, −2, −1/2, ∞ for r = 4: of the sets of small numbers tried, those with the smallest
// error. The first set is the second without −2: At has a column for each point that depends on nothing else, so the phases of a stride
// share their sums M even where one has four taps and the other three. The matrices follow from the points by Toom and Cook's
// interpolation; tests derive them anew.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

template <int P>
struct Transform;

template <>
struct Transform<6> {
    static constexpr float output[4][6] = {
        {1, 1, 1, 1, 1, 0},
        {0, 1, -1, 2, -0.5f, 0},
        {0, 1, 1, 4, 0.25f, 0},
        {0, 1, -1, 8, -0.125f, 1},
    };
    static constexpr float input[6][6] = {
        {0.25f, 0.375f, -0.5f, -0.375f, 0.25f, 0}, {0, -0.25f, -0.625f, -0.125f, 0.25f, 0}, {0, 0.25f, 0.125f, -0.625f, 0.25f, 0},
        {0, -0.25f, -0.5f, 0.25f, 0.5f, 0},        {0, 0.5f, -0.25f, -0.5f, 0.25f, 0},      {0, 0.25f, 0.375f, -0.5f, -0.375f, 0.25f},
    };
};

template <>
struct Transform<7> {
    static constexpr float output[4][7] = {
        {1, 1, 1, 1, 1, 1, 0},
        {0, 1, -1, 2, -2, -0.5f, 0},
        {0, 1, 1, 4, 4, 0.25f, 0},
        {0, 1, -1, 8, -8, -0.125f, 1},
    };
    static constexpr float input[7][7] = {
        {0.25f, 0.5f, -0.3125f, -0.625f, 0.0625f, 0.125f, 0}, {0, -0.25f, -0.75f, -0.4375f, 0.1875f, 0.125f, 0},
        {0, 0.5f, 0.5f, -1.125f, -0.125f, 0.25f, 0},          {0, -0.25f, -0.625f, 0, 0.625f, 0.25f, 0},
        {0, 0.25f, 0.375f, -0.5f, -0.375f, 0.25f, 0},         {0, 0.5f, 0, -0.625f, 0, 0.125f, 0},
        {0, 0.25f, 0.5f, -0.3125f, -0.625f, 0.0625f, 0.125f},
    };
};

// acc + m · v for an m known when this is compiled: nothing for zeros, no product for ones.
template <class T>
SE_INLINE void add_scaled(Vec& acc, bool& begun, T m, Vec v) {
    if (m == 0) return;
    if (!begun) {
        acc = m == 1 ? v : m == -1 ? sub(zero(), v) : mul(splat(static_cast<float>(m)), v);
        begun = true;
    } else {
        acc = m == 1 ? add(acc, v) : m == -1 ? sub(acc, v) : fma(splat(static_cast<float>(m)), v, acc);
    }
}

template <int P>
void winograd_input(const WinogradInputArgs& a) {
    using M = Transform<P>;
    for (int64_t row = 0; row < a.rows; row++) {
        float* to = a.to + row % a.classes * a.class_stride + row / a.classes * a.tiles;
        const int64_t at = row * a.pitch;
        // Whole vectors are stored: what reaches past a row's end is overwritten by the next row, or lies in the room after the last.
        for (int64_t t = 0; t < a.tiles; t += kLanes) {
            Vec d[P];
#pragma GCC unroll 8
            for (int j = 0; j < P; j++) d[j] = load(a.quarter[j % 4] + at + t + j / 4);
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) {
                Vec u = zero();
                bool begun = false;
#pragma GCC unroll 8
                for (int j = 0; j < P; j++) add_scaled(u, begun, M::input[p][j], d[j]);
                store(to + (p + (a.spare && p >= kWinogradSpare)) * a.point_stride + t, u);
            }
        }
    }
}

// to[4t + i] = y[i][t]
SE_INLINE void interleave(const Vec* y, Vec* to) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i low_pairs = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high_pairs = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    auto pairs = [](Vec a, __m512i index, Vec b) {
        return _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(a), index, _mm512_castps_pd(b)));
    };
    Vec a = _mm512_permutex2var_ps(y[0], low, y[1]), b = _mm512_permutex2var_ps(y[2], low, y[3]);
    to[0] = pairs(a, low_pairs, b), to[1] = pairs(a, high_pairs, b);
    a = _mm512_permutex2var_ps(y[0], high, y[1]), b = _mm512_permutex2var_ps(y[2], high, y[3]);
    to[2] = pairs(a, low_pairs, b), to[3] = pairs(a, high_pairs, b);
#elif defined(__AVX2__)
    Vec a = _mm256_unpacklo_ps(y[0], y[1]), b = _mm256_unpacklo_ps(y[2], y[3]);
    Vec c = _mm256_unpackhi_ps(y[0], y[1]), d = _mm256_unpackhi_ps(y[2], y[3]);
    Vec t0 = _mm256_shuffle_ps(a, b, 0x44), t1 = _mm256_shuffle_ps(a, b, 0xee);
    Vec t2 = _mm256_shuffle_ps(c, d, 0x44), t3 = _mm256_shuffle_ps(c, d, 0xee);
    to[0] = _mm256_permute2f128_ps(t0, t1, 0x20), to[1] = _mm256_permute2f128_ps(t2, t3, 0x20);
    to[2] = _mm256_permute2f128_ps(t0, t1, 0x31), to[3] = _mm256_permute2f128_ps(t2, t3, 0x31);
#else
    float lanes[4 * kLanes];
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < kLanes; t++) lanes[4 * t + i] = y[i].lane[t];
    for (int i = 0; i < 4; i++) to[i] = load(lanes + i * kLanes);
#endif
}

// out[0:n) = clamp(from + residual)
SE_INLINE void finish(const float* from, const float* residual, float* out, int64_t n, Vec low, Vec high) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const uint32_t bits = low_bits(std::min<int64_t>(n - i, kLanes));
        Vec y = n - i >= kLanes ? load(from + i) : load_bits(from + i, bits);
        if (residual) y = add(y, load_bits(residual + i, bits));
        y = at_most(at_least(y, low), high);
        if (n - i >= kLanes) {
            store(out + i, y);
        } else {
            store_bits(out + i, y, bits);
        }
    }
}

template <int P, int V>
SE_INLINE void output_row(const WinogradPanelArgs& a, int row, const float* sums) {
    using M = Transform<P>;
    constexpr int kWidth = V * kLanes;
    const Vec bias = splat(a.bias ? a.bias[row] : 0.0f), low = splat(a.low), high = splat(a.high);
    float* out = a.out + size_t(row) * a.out_stride;
    const float* residual = a.residual ? a.residual + size_t(row) * a.residual_stride : nullptr;
    // Rows that are whole numbers of tiles follow each other without gaps, and so do the results.
    const bool whole = a.out_width == 4 * a.tiles;
    const int64_t first = 4 * a.column0, last = 4 * a.columns;
    float lines[4 * kWidth];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
        Vec y[4], results[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            y[i] = bias;
            bool begun = true;
#pragma GCC unroll 8
            for (int p = 0; p < P; p++)
                if (M::output[i][p] != 0) add_scaled(y[i], begun, M::output[i][p], load(sums + p * kWidth + v * kLanes));
        }
        interleave(y, results);
        const int64_t at = first + 4 * v * kLanes;
        if (whole && at + 4 * kLanes <= last) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                Vec r = results[i];
                if (residual) r = add(r, load(residual + at + i * kLanes));
                store(out + at + i * kLanes, at_most(at_least(r, low), high));
            }
            continue;
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) store(lines + 4 * v * kLanes + i * kLanes, results[i]);
        if (whole) finish(lines + 4 * v * kLanes, residual ? residual + at : nullptr, out + at, std::max<int64_t>(0, last - at), low, high);
    }
    if (whole) return;
    const int64_t end = std::min<int64_t>(a.columns, a.column0 + kWidth);
    for (int64_t column = a.column0; column < end;) {
        const int64_t y = column / a.tiles, t = column % a.tiles, n = std::min(a.tiles - t, end - column);
        const int64_t to = y * a.out_width + 4 * t;
        finish(lines + 4 * (column - a.column0), residual ? residual + to : nullptr, out + to, std::min(4 * n, a.out_width - 4 * t), low,
               high);
        column += n;
    }
}

template <int P, int R, int V>
void winograd_panel(const WinogradPanelArgs& args) {
    const WinogradPanelArgs a = args;
    constexpr int kWidth = V * kLanes;
    alignas(64) float sums[P * R * kWidth];
    const float* w = a.weights;
    for (int p = 0; p < P; p++) {
        Vec acc[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] = zero();
        const float* planes = a.planes + p * a.point_stride + a.column0;
        const int64_t entries = P == 7 && p == kWinogradSpare ? a.fewer : a.entries;
        for (int64_t k = 0; k < entries; k++, w += R) {
            const float* x = planes + a.offset[k];
            Vec xs[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) xs[v] = load(x + v * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                Vec weight = splat(w[r]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) acc[r][v] = fma(weight, xs[v], acc[r][v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) store(sums + (r * P + p) * kWidth + v * kLanes, acc[r][v]);
    }
    for (int r = 0; r < a.rows; r++) output_row<P, V>(a, r, sums + r * P * kWidth);
}

bool all_below(const float* x, int64_t n, float bound) {
    const Vec limit = splat(bound), one = splat(1.0f);
    Vec beyond = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        Vec v = n - i >= kLanes ? load(x + i) : load_bits(x + i, low_bits(n - i));
        beyond = add(beyond, where_below(at_least(v, sub(zero(), v)), limit, zero(), one));
    }
    return sum(beyond) == 0;
}

// Four rows of up to six vectors: 24 sums, and ten loads for as many products.
constexpr int kRows = 4;

template <int V>
void fill_width(KernelTable& t) {
    t.winograd_panel[0][V - 1] = winograd_panel<6, kRows, V>, t.winograd_panel[1][V - 1] = winograd_panel<7, kRows, V>;
}

}  // namespace

void fill_winograd(KernelTable& t) {
    t.winograd_rows = kRows, t.winograd_vectors = 3;
    t.winograd_input[0] = winograd_input<6>, t.winograd_input[1] = winograd_input<7>;
    fill_width<1>(t), fill_width<2>(t), fill_width<3>(t);
#if defined(__AVX512F__)
    t.winograd_vectors = 6;
    fill_width<4>(t), fill_width<5>(t), fill_width<6>(t);
#endif
    t.all_below = all_below;
}

}  // namespace SE_ISA
}  // namespace sparse_engine
