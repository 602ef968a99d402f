// Bringing inputs into tiles (im2col, transposes), the depthwise convolution, and the sampled product of the weight gradient.
#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

SE_INLINE uint32_t lanes_of(const uint16_t* mask, int64_t pixel) {  // the bits of `kLanes` pixels; pixel is a multiple of kLanes
    uint32_t bits = mask[pixel >> 4];
    return kLanes == 16 ? bits : (bits >> (pixel & 15)) & low_bits(kLanes);
}

SE_INLINE Vec gather_or_zero(const float* x, const int32_t* source) {
#if defined(__AVX512F__)
    __m512i where = _mm512_loadu_si512(source);
    __mmask16 valid = _mm512_cmpge_epi32_mask(where, _mm512_setzero_si512());
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), valid, where, x, 4);
#else
    float lanes[kLanes];
    for (int i = 0; i < kLanes; i++) lanes[i] = source[i] >= 0 ? x[source[i]] : 0.0f;
    return load(lanes);
#endif
}

// Tap by tap: the masks of a tap are the same for every channel and stay in registers.
template <int V>
void im2col_affine(const Im2colArgs& a) {
    constexpr int kWidth = V * kLanes;
    for (int tap = 0; tap < a.taps; tap++) {
        int first = tap >= a.tap0 ? tap - a.tap0 : tap - a.tap0 + a.taps;
        if (first >= a.columns) continue;
        int64_t channel = a.channel0 + (tap < a.tap0 ? 1 : 0);
        const float* source = a.x + channel * int64_t(a.channel_stride) + a.pixel0 + a.tap_offset[tap];
        const uint16_t* bits = a.tap_mask + tap * a.mask_stride;
        Mask mask[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) mask[v] = mask_of(lanes_of(bits, a.pixel0 + v * kLanes));
        float* tile = a.tile + size_t(first) * kWidth;
        for (int k = first; k < a.columns; k += a.taps, source += a.channel_stride, tile += a.taps * kWidth) {
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) store(tile + v * kLanes, load_masked(source + v * kLanes, mask[v]));
        }
    }
}

#if defined(__AVX512F__)
SE_INLINE Vec shifted(Vec high, Vec low, Mask mask, std::integral_constant<int, 1>) {
    return _mm512_castsi512_ps(_mm512_maskz_alignr_epi32(mask, _mm512_castps_si512(high), _mm512_castps_si512(low), 1));
}
SE_INLINE Vec shifted(Vec high, Vec low, Mask mask, std::integral_constant<int, 15>) {
    return _mm512_castsi512_ps(_mm512_maskz_alignr_epi32(mask, _mm512_castps_si512(high), _mm512_castps_si512(low), 15));
}

// Whole channels of kernels whose rows have three adjacent taps: each row of the image is loaded once, and shifted for the outer taps. A
// load for each would cross a cache line two times of three, and read the L2 three times.
template <int V>
void im2col_rows(const Im2colArgs& a, int64_t channel, int64_t channels, float* tile) {
    constexpr int kWidth = V * kLanes;
    const size_t step = static_cast<size_t>(a.taps) * kWidth;
    for (int tap = 0; tap < a.taps; tap += 3, tile += 3 * kWidth) {
        const uint16_t* bits = a.tap_mask + tap * a.mask_stride + (a.pixel0 >> 4);
        Mask left[V], middle[V], right[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) left[v] = bits[v], middle[v] = bits[a.mask_stride + v], right[v] = bits[2 * a.mask_stride + v];
        const Mask first = static_cast<Mask>(left[0] << 15), last = static_cast<Mask>(right[V - 1] >> 15);
        const float* row = a.x + channel * int64_t(a.channel_stride) + a.pixel0 + a.tap_offset[tap + 1];
        float* to = tile;
        for (int64_t c = 0; c < channels; c++, row += a.channel_stride, to += step) {
            Vec before = load_masked(row - kLanes, first), here = load_masked(row, middle[0]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                Vec after = v + 1 < V ? load_masked(row + (v + 1) * kLanes, middle[v + 1]) : load_masked(row + V * kLanes, last);
                store(to + v * kLanes, shifted(here, before, left[v], std::integral_constant<int, 15>()));
                store(to + kWidth + v * kLanes, here);
                store(to + 2 * kWidth + v * kLanes, shifted(after, here, right[v], std::integral_constant<int, 1>()));
                before = here, here = after;
            }
        }
    }
}
#endif

template <int V>
void im2col_shifts(const Im2colArgs& a) {
#if defined(__AVX512F__)
    const int head = (a.taps - a.tap0) % a.taps;  // columns of a channel that began before
    const int64_t whole = (a.columns - head) / a.taps;
    if (a.rows_of_three && whole > 0) {
        Im2colArgs rest = a;
        if (head) {
            rest.columns = head;
            im2col_affine<V>(rest);
        }
        im2col_rows<V>(a, a.channel0 + (head ? 1 : 0), whole, a.tile + size_t(head) * V * kLanes);
        const int done = head + static_cast<int>(whole) * a.taps;
        if (done < a.columns) {
            rest.channel0 = a.channel0 + (head ? 1 : 0) + whole, rest.tap0 = 0, rest.columns = a.columns - done;
            rest.tile = a.tile + size_t(done) * V * kLanes;
            im2col_affine<V>(rest);
        }
        return;
    }
#endif
    im2col_affine<V>(a);
}

void im2col(const Im2colArgs& a) {
    if (!a.gather) {
        switch (a.vectors) {
            case 1: return im2col_shifts<1>(a);
            case 2: return im2col_shifts<2>(a);
            case 3: return im2col_shifts<3>(a);
            case 4: return im2col_shifts<4>(a);
            case 5: return im2col_shifts<5>(a);
            case 6: return im2col_shifts<6>(a);
            case 7: return im2col_shifts<7>(a);
            default: return im2col_shifts<8>(a);
        }
    }
    int64_t channel = a.channel0;
    int tap = a.tap0;
    float* tile = a.tile;
    for (int k = 0; k < a.columns; k++) {
        const float* plane = a.x + channel * int64_t(a.channel_stride);
        const int32_t* source = a.gather + tap * a.gather_stride + a.pixel0;
        for (int v = 0; v < a.vectors; v++, tile += kLanes, source += kLanes) store(tile, gather_or_zero(plane, source));
        if (++tap == a.taps) tap = 0, channel++;
    }
}

// V vectors of one plane in registers; each tap is one masked, shifted load and one FMA.
template <int V>
SE_INLINE void depthwise_tile(const DepthwiseArgs& a, int64_t pixel) {
    Vec acc[V];
    for (int v = 0; v < V; v++) acc[v] = splat(a.bias);
    if (a.residual)
        for (int v = 0; v < V; v++) acc[v] = add(acc[v], load(a.residual + pixel + v * kLanes));
    for (int tap = 0; tap < a.taps; tap++) {
        Vec w = splat(a.weight[tap]);
        const float* source = a.x + pixel + a.tap_offset[tap];
        const uint16_t* mask = a.tap_mask + tap * a.mask_stride;
        for (int v = 0; v < V; v++) acc[v] = fma(w, load_bits(source + v * kLanes, lanes_of(mask, pixel + v * kLanes)), acc[v]);
    }
    Vec low = splat(a.low), high = splat(a.high);
    for (int v = 0; v < V; v++) store(a.out + pixel + v * kLanes, at_most(at_least(acc[v], low), high));
}

#if defined(__AVX512F__)
// Vectors of pixels that all have neighbours above and below. The three taps of a row come from one load: a load of its own for each
// would cross a cache line two times of three, and cost twice. Products are added in the same order as above.
template <int V>
SE_INLINE void depthwise_inner(const DepthwiseArgs& a, const Vec (&w)[9], Vec low, Vec high, int64_t pixel) {
    Vec acc[V];
    Mask left[V], right[V];
    for (int v = 0; v < V; v++) {
        acc[v] = splat(a.bias);
        if (a.residual) acc[v] = add(acc[v], load(a.residual + pixel + v * kLanes));
        left[v] = mask_of(lanes_of(a.tap_mask + 3 * a.mask_stride, pixel + v * kLanes));
        right[v] = mask_of(lanes_of(a.tap_mask + 5 * a.mask_stride, pixel + v * kLanes));
    }
#pragma GCC unroll 3
    for (int r = 0; r < 3; r++) {
        const float* row = a.x + pixel + a.tap_offset[3 * r + 1];
        Vec before = load(row - kLanes), here = load(row);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            Vec after = load(row + (v + 1) * kLanes);
            acc[v] = fma(w[3 * r], shifted(here, before, left[v], std::integral_constant<int, 15>()), acc[v]);
            acc[v] = fma(w[3 * r + 1], here, acc[v]);
            acc[v] = fma(w[3 * r + 2], shifted(after, here, right[v], std::integral_constant<int, 1>()), acc[v]);
            before = here, here = after;
        }
    }
    for (int v = 0; v < V; v++) store(a.out + pixel + v * kLanes, at_most(at_least(acc[v], low), high));
}

void depthwise_3x3(const DepthwiseArgs& a) {
    Vec w[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; tap++) w[tap] = splat(a.weight[tap]);
    const Vec low = splat(a.low), high = splat(a.high);
    int64_t pixel = a.pixel0, end = a.pixel0 + a.pixels;
    auto inner = [&](int vectors) {
        for (int v = 0; v < vectors; v++)
            if (!a.inner[(pixel >> 4) + v]) return false;
        return pixel + vectors * kLanes <= end;
    };
    while (pixel + 2 * kLanes <= end) {
        if (inner(4)) {
            depthwise_inner<4>(a, w, low, high, pixel);
            pixel += 4 * kLanes;
        } else if (inner(2)) {
            depthwise_inner<2>(a, w, low, high, pixel);
            pixel += 2 * kLanes;
        } else {
            depthwise_tile<2>(a, pixel);
            pixel += 2 * kLanes;
        }
    }
    for (; pixel < end; pixel += kLanes) depthwise_tile<1>(a, pixel);
}
#endif

void depthwise(const DepthwiseArgs& a) {
#if defined(__AVX512F__)
    if (a.inner) return depthwise_3x3(a);
#endif
    int64_t pixel = a.pixel0, end = a.pixel0 + a.pixels;
    for (; pixel + 6 * kLanes <= end; pixel += 6 * kLanes) depthwise_tile<6>(a, pixel);
    for (; pixel + 2 * kLanes <= end; pixel += 2 * kLanes) depthwise_tile<2>(a, pixel);
    for (; pixel < end; pixel += kLanes) depthwise_tile<1>(a, pixel);
}

void transpose_in(const float* x, size_t ld, int n, int columns, float* tile, int width) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= width && i < n; i += 16) {
        int valid = std::min(16, n - i), k = 0;
        for (; k < columns; k += 16) {
            uint32_t bits = low_bits(std::min(16, columns - k));
            Vec r[16];
            for (int j = 0; j < 16; j++) r[j] = j < valid ? load_bits(x + size_t(i + j) * ld + k, bits) : zero();
            transpose16(r);
            int rows = std::min(16, columns - k);
            for (int j = 0; j < rows; j++) store(tile + size_t(k + j) * width + i, r[j]);
        }
    }
#endif
    for (; i < width; i += 8) {  // in strips, so that the tile's rows are written in short runs that share cache lines
        int wide = std::min(8, width - i);
        for (int k = 0; k < columns; k++)
            for (int j = 0; j < wide; j++) tile[size_t(k) * width + i + j] = i + j < n ? x[size_t(i + j) * ld + k] : 0.0f;
    }
}

void transpose_out(const float* tile, int width, int rows, int n, float* y, size_t ld) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= width && i < n; i += 16) {
        int valid = std::min(16, n - i);
        for (int m = 0; m < rows; m += 16) {
            int wide = std::min(16, rows - m);
            uint32_t bits = low_bits(wide);
            Vec r[16];
            for (int j = 0; j < 16; j++) r[j] = j < wide ? load(tile + size_t(m + j) * width + i) : zero();
            transpose16(r);
            for (int j = 0; j < valid; j++) store_bits(y + size_t(i + j) * ld + m, r[j], bits);
        }
    }
#endif
    for (; i < n; i += 8) {
        int wide = std::min(8, n - i);
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < wide; j++) y[size_t(i + j) * ld + m] = tile[size_t(m) * width + i + j];
    }
}

template <int V>
SE_INLINE Vec products(const Vec (&g)[V], const float* row) {
    Vec s = mul(g[0], load(row));
#pragma GCC unroll 8
    for (int v = 1; v < V; v++) s = fma(g[v], load(row + v * kLanes), s);
    return s;
}

// out[e] += dy · x[col[e]]: V vectors of dy stay in registers. Sixteen dot products are folded together by a transposing tree of additions,
// three operations each, where a sum across one register would take ten.
template <int V>
SE_INLINE void dots_of_row(const float* dy, const int32_t* col, int64_t from, int64_t to, int32_t col0, const float* x, size_t x_stride,
                           float* out) {
    Vec g[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) g[v] = load(dy + v * kLanes);
    int64_t e = from;
#if defined(__AVX512F__)
    for (; e < to; e += 16) {
        int64_t left = to - e;
        Vec quads[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            if (4 * q >= left) {
                quads[q] = zero();
                continue;
            }
            Vec s[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {  // past the end the last column is used again; its sum is not stored
                int64_t entry = e + std::min<int64_t>(4 * q + i, left - 1);
                s[i] = products(g, x + size_t(col[entry] - col0) * x_stride);
            }
            quads[q] = sum_within_lanes(s[0], s[1], s[2], s[3]);
        }
        Vec sums = fold(quads);
        uint32_t bits = low_bits(std::min<int64_t>(16, left));
        store_bits(out + e, add(load_bits(out + e, bits), sums), bits);
    }
#else
    for (; e < to; e++) out[e] += sum(products(g, x + size_t(col[e] - col0) * x_stride));
#endif
}

void sddmm(int64_t row0, int64_t row1, const int64_t* row_end, int64_t* cursor, const int32_t* col, int32_t col0, int32_t col1,
           const float* dy, size_t dy_stride, const float* x, size_t x_stride, int width, float* out) {
    for (int64_t row = row0; row < row1; row++) {
        int64_t from = cursor[row], to = from;
        while (to < row_end[row] && col[to] < col1) to++;
        cursor[row] = to;
        const float* g = dy + size_t(row - row0) * dy_stride;
        int done = 0;
        for (; done + 8 * kLanes <= width; done += 8 * kLanes) dots_of_row<8>(g + done, col, from, to, col0, x + done, x_stride, out);
        for (; done + 4 * kLanes <= width; done += 4 * kLanes) dots_of_row<4>(g + done, col, from, to, col0, x + done, x_stride, out);
        for (; done < width; done += kLanes) dots_of_row<1>(g + done, col, from, to, col0, x + done, x_stride, out);
    }
}

}  // namespace

void fill_pack(KernelTable& t) {
    t.im2col = im2col;
    t.depthwise = depthwise;
    t.transpose_in = transpose_in;
    t.transpose_out = transpose_out;
    t.sddmm = sddmm;
}

}  // namespace SE_ISA
}  // namespace sparse_engine
