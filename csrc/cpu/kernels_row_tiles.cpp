// Sparse convolutions on tiles of image rows: see pack/row_tiles.h.
//
// An unstructured row of weights loads V vectors of the tile for each entry, as in kernels_spmm.cpp; what differs is what it took to bring
// the tile: 3 · (V + 2) copies for a channel of a 3×3 kernel and V vectors of outputs, where im2col writes 9 · V. With 64 rows of weights
// and one entry in ten kept, 6.4 FMAs use each of those 9: copying was as much work as multiplying.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

enum Kind { whole, partly, halves };  // vectors of one image row; of its last columns; of eight columns of two rows, `height` apart

#if defined(__AVX512F__)
SE_INLINE Vec two_halves(const float* lower, const float* upper) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(lower)), _mm256_loadu_ps(upper), 1);
}
SE_INLINE Vec two_halves(const float* lower, uint32_t lower_bits, const float* upper, uint32_t upper_bits) {
    Vec low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lower_bits), lower);
    return _mm512_mask_loadu_ps(low, static_cast<__mmask16>(upper_bits << 8), upper - 8);
}
SE_INLINE void store_upper(float* p, Vec v) { _mm256_storeu_ps(p, _mm512_extractf32x8_ps(v, 1)); }
SE_INLINE Vec spread(const float* p) { return _mm512_castps256_ps512(_mm256_loadu_ps(p)); }
#else
// Vectors of eight are not halved.
SE_INLINE Vec two_halves(const float*, const float*) { return zero(); }
SE_INLINE Vec two_halves(const float*, uint32_t, const float*, uint32_t) { return zero(); }
SE_INLINE void store_upper(float*, Vec) {}
SE_INLINE Vec spread(const float*) { return zero(); }
#endif

// The vector of outputs number v of a tile. `second` rows of a tile of halves have an upper half.
template <int K>
SE_INLINE Vec load_outputs(const float* p, int v, const RowTileArgs& a) {
    p += v * a.row_stride;
    if (K == whole) return load(p);
    if (K == partly) return load_bits(p, a.bits);
    return v < a.second ? two_halves(p, p + a.height * a.row_stride) : spread(p);
}

template <int K>
SE_INLINE void store_outputs(float* p, Vec value, int v, const RowTileArgs& a) {
    p += v * a.row_stride;
    if (K == whole) return store(p, value);
    if (K == partly) return store_bits(p, value, a.bits);
    store_half(p, lower_half(value));
    if (v < a.second) store_upper(p + a.height * a.row_stride, value);
}

#define SE_EACH_ROW _Pragma("GCC unroll 8") for (int v = 0; v < V; v++)

template <int V>
SE_INLINE void axpy(Vec (&acc)[V], Vec w, const float* x) {
    SE_EACH_ROW acc[v] = fma(w, load(x + v * kLanes), acc[v]);
}

template <int V, int K, int Rest>
SE_INLINE void run_of_rows(const RowTileArgs& a, int panels, int groups, const uint16_t*& rows_, const uint16_t*& offset_,
                           const float*& w_) {
    constexpr int kUnit = 2, kAhead = 512;
    const uint16_t* rows = rows_;
    const uint16_t* offset = offset_;
    const float* w = w_;
    const float* x = a.x;
    for (int p = 0; p < panels; p++) {
        const int row = *rows++;
        float* out = a.out + static_cast<size_t>(row) * a.out_stride;
        for (int line = 0; line < 4 * groups + Rest; line += 16) __builtin_prefetch(w + kAhead + line);
        __builtin_prefetch(offset + kAhead);
        Vec acc[V];
        if (a.first) {
            const Vec start = a.bias ? splat(a.bias[row]) : zero();
            SE_EACH_ROW acc[v] = start;
            if (a.residual) {
                const float* residual = a.residual + static_cast<size_t>(row) * a.residual_stride;
                SE_EACH_ROW acc[v] = add(acc[v], load_outputs<K>(residual, v, a));
            }
        } else {
            SE_EACH_ROW acc[v] = load_outputs<K>(out, v, a);
        }
        for (int g = 0; g < groups; g++, offset += 4, w += 4) {
            uint64_t four;
            std::memcpy(&four, offset, 8);
            const float* x0 = x + kUnit * (four & 0xffff);
            const float* x1 = x + kUnit * (four >> 16 & 0xffff);
            const float* x2 = x + kUnit * (four >> 32 & 0xffff);
            const float* x3 = x + kUnit * (four >> 48);
#if defined(__AVX512F__)
            const Vec quad = _mm512_broadcast_f32x4(_mm_loadu_ps(w));
            axpy(acc, _mm512_permute_ps(quad, 0x00), x0);
            axpy(acc, _mm512_permute_ps(quad, 0x55), x1);
            axpy(acc, _mm512_permute_ps(quad, 0xaa), x2);
            axpy(acc, _mm512_permute_ps(quad, 0xff), x3);
#else
            axpy(acc, splat(w[0]), x0);
            axpy(acc, splat(w[1]), x1);
            axpy(acc, splat(w[2]), x2);
            axpy(acc, splat(w[3]), x3);
#endif
        }
#pragma GCC unroll 4
        for (int e = 0; e < Rest; e++) axpy(acc, splat(w[e]), x + kUnit * static_cast<size_t>(offset[e]));
        offset += Rest, w += Rest;
        if (a.last) {
            const Vec low = splat(a.low), high = splat(a.high);
            SE_EACH_ROW acc[v] = at_most(at_least(acc[v], low), high);
        }
        SE_EACH_ROW store_outputs<K>(out, acc[v], v, a);
    }
    rows_ = rows, offset_ = offset, w_ = w;
}

template <int V, int K>
void row_tile(const RowTileArgs& args) {
    const RowTileArgs a = args;
    const uint16_t* rows = a.panel_rows;
    const uint16_t* offset = a.offsets;
    const float* w = a.values;
    for (const PanelRun* run = a.runs; run != a.runs_end; run++) {
        const int groups = run->entries / 4;
        switch (run->entries % 4) {
            case 0: run_of_rows<V, K, 0>(a, run->panels, groups, rows, offset, w); break;
            case 1: run_of_rows<V, K, 1>(a, run->panels, groups, rows, offset, w); break;
            case 2: run_of_rows<V, K, 2>(a, run->panels, groups, rows, offset, w); break;
            case 3: run_of_rows<V, K, 3>(a, run->panels, groups, rows, offset, w); break;
        }
    }
}

// Lanes whose column x0 + i lies in an image of `width` columns, of `lanes` in all.
SE_INLINE uint32_t columns_inside(int64_t x0, int64_t width, int lanes) {
    const int64_t first = x0 < 0 ? -x0 : 0, end = width - x0 < lanes ? width - x0 : lanes;
    return end <= first ? 0 : low_bits(end) & ~low_bits(first);
}

#if defined(__AVX512F__)
// Kernels three wide: each row of the image is loaded once, and shifted for the outer taps.
void fill_three(const RowTileFillArgs& a) {
    const int64_t step = a.pitch * kLanes;
    const Mask here = mask_of(columns_inside(a.x0 + 1, a.width, kLanes));
    const Mask before = mask_of(columns_inside(a.x0, a.width, 1) ? 0x8000 : 0);
    const Mask after = mask_of(columns_inside(a.x0 + 1 + kLanes, a.width, 1));
    const int64_t first = std::min(std::max<int64_t>(0, -a.y0), a.rows), end = std::max(first, std::min(a.rows, a.height - a.y0));
    for (int64_t c = 0; c < a.channels; c++) {
        const float* row = a.x + c * a.channel_stride + (a.y0 + first) * a.row_stride + a.x0 + 1;
        float* to = a.tile + c * 3 * step;
        auto clear = [&](int64_t r) {
            store(to + r * kLanes, zero()), store(to + step + r * kLanes, zero()), store(to + 2 * step + r * kLanes, zero());
        };
        for (int64_t r = 0; r < first; r++) clear(r);
        for (int64_t r = first; r < end; r++, row += a.row_stride) {
            const Vec left = load_masked(row - kLanes, before), middle = load_masked(row, here), right = load_masked(row + kLanes, after);
            store(to + r * kLanes, _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(middle), _mm512_castps_si512(left), 15)));
            store(to + step + r * kLanes, middle);
            store(to + 2 * step + r * kLanes,
                  _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(right), _mm512_castps_si512(middle), 1)));
        }
        for (int64_t r = end; r < a.rows; r++) clear(r);
    }
}

// The same for tiles of halves: ten columns of a row hold what its eight outputs read.
void fill_three_halves(const RowTileFillArgs& a) {
    const int64_t step = a.pitch * kLanes;
    const Mask inside = mask_of(columns_inside(a.x0, a.width, 10));
    const __m512i from_0 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const __m512i from_1 = _mm512_add_epi32(from_0, _mm512_set1_epi32(1)), from_2 = _mm512_add_epi32(from_0, _mm512_set1_epi32(2));
    auto mask = [&](int64_t row) { return row >= 0 && row < a.height ? inside : Mask(0); };
    for (int64_t c = 0; c < a.channels; c++) {
        const float* row = a.x + c * a.channel_stride + a.y0 * a.row_stride + a.x0;
        float* to = a.tile + c * 3 * step;
        for (int64_t r = 0; r < a.rows; r++, row += a.row_stride, to += kLanes) {
            const Vec lower = load_masked(row, mask(a.y0 + r)),
                      upper = load_masked(row + a.second * a.row_stride, mask(a.y0 + r + a.second));
            store(to, _mm512_permutex2var_ps(lower, from_0, upper));
            store(to + step, _mm512_permutex2var_ps(lower, from_1, upper));
            store(to + 2 * step, _mm512_permutex2var_ps(lower, from_2, upper));
        }
    }
}
#endif

void row_tile_fill(const RowTileFillArgs& a) {
#if defined(__AVX512F__)
    if (a.kernel_w == 3) return a.second ? fill_three_halves(a) : fill_three(a);
#endif
    const int64_t step = a.pitch * kLanes;  // from one column of taps to the next
    auto inside = [&](int64_t row) { return row >= 0 && row < a.height; };
    for (int64_t c = 0; c < a.channels; c++) {
        const float* plane = a.x + c * a.channel_stride;
        float* tile = a.tile + c * a.kernel_w * step;
        for (int64_t s = 0; s < a.kernel_w; s++, tile += step) {
            const int64_t x0 = a.x0 + s;
            const uint32_t bits = columns_inside(x0, a.width, a.second ? kLanes / 2 : kLanes);
            const Mask mask = mask_of(bits);
            for (int64_t r = 0; r < a.rows; r++) {
                const int64_t row = a.y0 + r;
                const float* from = plane + row * a.row_stride + x0;
                float* to = tile + r * kLanes;
                if (!a.second) {
                    store(to, inside(row) ? load_masked(from, mask) : zero());
                } else {
                    const int64_t below = row + a.second;
                    store(to, two_halves(from, inside(row) ? bits : 0, plane + below * a.row_stride + x0, inside(below) ? bits : 0));
                }
            }
        }
    }
}

template <int V>
void fill_height(KernelTable& t) {
    t.row_tile[0][V] = row_tile<V, whole>, t.row_tile[1][V] = row_tile<V, partly>;
    t.row_tile[2][V] = nullptr;
    if constexpr (kHalves) t.row_tile[2][V] = row_tile < V, kHalves ? halves : whole > ;
}

}  // namespace

void fill_row_tiles(KernelTable& t) {
    t.row_tile_fill = row_tile_fill;
    fill_height<1>(t), fill_height<2>(t), fill_height<3>(t), fill_height<4>(t);
    fill_height<5>(t), fill_height<6>(t), fill_height<7>(t), fill_height<8>(t);
}

}  // namespace SE_ISA
}  // namespace sparse_engine
