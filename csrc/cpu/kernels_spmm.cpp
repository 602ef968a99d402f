// The sparse product on one tile.
//
//            tile of X: columns of one part × V vectors of pixels, in L1/L2
//   panel →  acc[R][V] in registers: for each entry (column c): R weights, V loads of x[c], R·V FMAs
//
// Loads bound an unstructured row (R = 1): V line loads per V FMAs, plus 5 bytes per entry. So indices and weights are loaded four at a
// time and weights spread by in-register shuffles. Panels of one run have the same number of entries: the loop exit is predicted.
// Arithmetic intensity: 2·R·V·lanes flops per (1 + 4·R) bytes of weights; the tile is read from L1 once per entry.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

// The sums of one row: V vectors of pixels and, in AVX-512, perhaps half of one more (7×7 images end in one pixel, 14×14 ones in four).
template <int V, bool H>
struct Sums {
    Vec v[V ? V : 1];
    HalfVec h;
};

template <int V, bool H>
SE_INLINE void axpy(Sums<V, H>& acc, Vec w, const float* x) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc.v[v] = fma(w, load(x + v * kLanes), acc.v[v]);
    if constexpr (H) acc.h = fma(lower_half(w), load_half(x + V * kLanes), acc.h);
}

#if defined(__AVX512F__)
template <int V, bool H>
SE_INLINE void four_entries(Sums<V, H>& acc, Sums<V, H>& odd, const uint8_t* index, const float* w, const float* x, size_t stride) {
    uint32_t four;
    std::memcpy(&four, index, 4);
    const float* x0 = x + size_t(four & 255) * stride;
    const float* x1 = x + size_t((four >> 8) & 255) * stride;
    const float* x2 = x + size_t((four >> 16) & 255) * stride;
    const float* x3 = x + size_t(four >> 24) * stride;
    Vec quad = _mm512_broadcast_f32x4(_mm_loadu_ps(w));
    axpy(acc, _mm512_permute_ps(quad, 0x00), x0);
    axpy(odd, _mm512_permute_ps(quad, 0x55), x1);
    axpy(acc, _mm512_permute_ps(quad, 0xaa), x2);
    axpy(odd, _mm512_permute_ps(quad, 0xff), x3);
}
#else
template <int V, bool H>
SE_INLINE void four_entries(Sums<V, H>& acc, Sums<V, H>& odd, const uint8_t* index, const float* w, const float* x, size_t stride) {
    uint32_t four;
    std::memcpy(&four, index, 4);
    axpy(acc, splat(w[0]), x + size_t(four & 255) * stride);
    axpy(odd, splat(w[1]), x + size_t((four >> 8) & 255) * stride);
    axpy(acc, splat(w[2]), x + size_t((four >> 16) & 255) * stride);
    axpy(odd, splat(w[3]), x + size_t(four >> 24) * stride);
}
#endif

template <int V, bool H>
SE_INLINE void begin_row(Sums<V, H>& acc, const SpmmArgs& a, int row, const float* out) {
    if (!a.first) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc.v[v] = load(out + v * kLanes);
        if constexpr (H) acc.h = load_half(out + V * kLanes);
        return;
    }
    Vec start = a.bias ? splat(a.bias[row]) : zero();
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc.v[v] = start;
    if constexpr (H) acc.h = lower_half(start);
    if (a.residual) {
        const float* r = a.residual + size_t(row) * a.residual_stride;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc.v[v] = add(acc.v[v], load(r + v * kLanes));
        if constexpr (H) acc.h = add(acc.h, load_half(r + V * kLanes));
    }
}

template <int V, bool H>
SE_INLINE void end_row(const Sums<V, H>& acc, const SpmmArgs& a, float* out) {
    if (!a.last) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(out + v * kLanes, acc.v[v]);
        if constexpr (H) store_half(out + V * kLanes, acc.h);
        return;
    }
    Vec low = splat(a.low), high = splat(a.high);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(out + v * kLanes, at_most(at_least(acc.v[v], low), high));
    if constexpr (H) store_half(out + V * kLanes, at_most(at_least(acc.h, lower_half(low)), lower_half(high)));
}

// Weights are read once, in order, from beyond the L2, and slower than the hardware's prefetcher expects a stream to be: it
// does not run ahead by itself.
constexpr int kAhead = 512;  // entries

// Runs whose number of entries is 4·groups + Rest.
template <int V, bool H, int Rest>
SE_INLINE void run_of_rows(const SpmmArgs& a, int panels, int groups, const uint16_t*& rows_, const uint8_t*& index_, const float*& w_) {
    const uint16_t* rows = rows_;
    const uint8_t* index = index_;
    const float* w = w_;
    const float* x = a.x;
    const size_t stride = a.x_stride;
    for (int p = 0; p < panels; p++) {
        int row = *rows++;
        float* out = a.out + size_t(row) * a.out_stride;
        for (int line = 0; line < 4 * groups + Rest; line += 16) __builtin_prefetch(w + kAhead + line);
        __builtin_prefetch(index + kAhead);
        Sums<V, H> acc;
        begin_row(acc, a, row, out);
        // Entries go to two sets of sums in turns. An FMA takes four cycles, so few sums would leave the unit idle, and every width of tile
        // adds in the same order: a result does not depend on how the pixels are cut. The additions have units of their own.
        Sums<V, H> odd;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) odd.v[v] = zero();
        if constexpr (H) odd.h = lower_half(zero());
        for (int g = 0; g < groups; g++, index += 4, w += 4) four_entries(acc, odd, index, w, x, stride);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc.v[v] = add(acc.v[v], odd.v[v]);
        if constexpr (H) acc.h = add(acc.h, odd.h);
#pragma GCC unroll 4
        for (int e = 0; e < Rest; e++) axpy(acc, splat(w[e]), x + size_t(index[e]) * stride);
        index += Rest, w += Rest;
        end_row(acc, a, out);
    }
    rows_ = rows, index_ = index, w_ = w;
}

template <int V, bool H = false>
void spmm_rows(const SpmmArgs& args) {
    const SpmmArgs a = args;
    const uint16_t* rows = a.panel_rows;
    const uint8_t* index = a.index;
    const float* w = a.values;
    for (const PanelRun* run = a.runs; run != a.runs_end; run++) {
        int groups = run->entries / 4;
        switch (run->entries % 4) {
            case 0: run_of_rows<V, H, 0>(a, run->panels, groups, rows, index, w); break;
            case 1: run_of_rows<V, H, 1>(a, run->panels, groups, rows, index, w); break;
            case 2: run_of_rows<V, H, 2>(a, run->panels, groups, rows, index, w); break;
            case 3: run_of_rows<V, H, 3>(a, run->panels, groups, rows, index, w); break;
        }
    }
}

// R rows that share their columns: each load of x feeds R FMAs.
template <int R, int V, bool Dense>
void spmm_panels(const SpmmArgs& args) {
    const SpmmArgs a = args;
    const uint16_t* rows = a.panel_rows;
    const uint8_t* index = a.index;
    const float* w = a.values;
    for (const PanelRun* run = a.runs; run != a.runs_end; run++) {
        const int entries = run->entries;
        for (int p = 0; p < run->panels; p++) {
            int row = *rows++ * R, valid = a.rows - row;
            float* out = a.out + size_t(row) * a.out_stride;
            Sums<V, false> acc[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                if (r < valid) {
                    begin_row(acc[r], a, row + r, out + r * a.out_stride);
                } else {
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) acc[r].v[v] = zero();
                }
            const float* dense_x = a.x;
            for (int e = 0; e < entries; e++, w += R) {
                const float* x;
                if (Dense) {
                    x = dense_x;
                    dense_x += a.x_stride;
                } else {
                    x = a.x + size_t(*index++) * a.x_stride;
                }
                Vec xs[V];
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) xs[v] = load(x + v * kLanes);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    Vec weight = splat(w[r]);
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) acc[r].v[v] = fma(weight, xs[v], acc[r].v[v]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                if (r < valid) end_row(acc[r], a, out + r * a.out_stride);
        }
    }
}

// One row, all columns (panel 1, dense): a plain row of axpys.
template <int V>
void spmm_dense_rows(const SpmmArgs& args) {
    spmm_panels<1, V, true>(args);
}

}  // namespace

void fill_spmm(KernelTable& t) {
    t.sparse[0][1] = spmm_rows<1>, t.sparse[0][2] = spmm_rows<2>, t.sparse[0][3] = spmm_rows<3>, t.sparse[0][4] = spmm_rows<4>;
    t.sparse[0][5] = spmm_rows<5>, t.sparse[0][6] = spmm_rows<6>, t.sparse[0][7] = spmm_rows<7>, t.sparse[0][8] = spmm_rows<8>;
    for (auto& kernel : t.sparse_half) kernel = nullptr;
    if constexpr (kHalves) {
        t.sparse_half[0] = spmm_rows<0, kHalves>, t.sparse_half[1] = spmm_rows<1, kHalves>, t.sparse_half[2] = spmm_rows<2, kHalves>;
        t.sparse_half[3] = spmm_rows<3, kHalves>, t.sparse_half[4] = spmm_rows<4, kHalves>, t.sparse_half[5] = spmm_rows<5, kHalves>;
        t.sparse_half[6] = spmm_rows<6, kHalves>, t.sparse_half[7] = spmm_rows<7, kHalves>;
    }
    t.dense[0][1] = spmm_dense_rows<1>, t.dense[0][2] = spmm_dense_rows<2>, t.dense[0][3] = spmm_dense_rows<3>,
    t.dense[0][4] = spmm_dense_rows<4>;
    t.dense[0][5] = spmm_dense_rows<5>, t.dense[0][6] = spmm_dense_rows<6>, t.dense[0][7] = spmm_dense_rows<7>,
    t.dense[0][8] = spmm_dense_rows<8>;
#define SE_PANEL(LOG, R, V) t.sparse[LOG][V] = spmm_panels<R, V, false>, t.dense[LOG][V] = spmm_panels<R, V, true>
    SE_PANEL(1, 2, 1), SE_PANEL(1, 2, 2), SE_PANEL(1, 2, 3), SE_PANEL(1, 2, 4), SE_PANEL(1, 2, 5), SE_PANEL(1, 2, 6);
    SE_PANEL(2, 4, 1), SE_PANEL(2, 4, 2), SE_PANEL(2, 4, 3);
    SE_PANEL(3, 8, 1);
    t.max_vectors[0] = 6, t.max_vectors[1] = 6, t.max_vectors[2] = 3, t.max_vectors[3] = 1;
#if defined(__AVX512F__)
    SE_PANEL(1, 2, 7), SE_PANEL(1, 2, 8), SE_PANEL(2, 4, 4), SE_PANEL(2, 4, 5), SE_PANEL(2, 4, 6), SE_PANEL(3, 8, 2), SE_PANEL(3, 8, 3);
    t.max_vectors[0] = 8, t.max_vectors[1] = 8, t.max_vectors[2] = 6, t.max_vectors[3] = 3;
#endif
#undef SE_PANEL
}

}  // namespace SE_ISA
}  // namespace sparse_engine
