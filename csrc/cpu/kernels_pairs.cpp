// The sparse product on one tile in bfloat16, with sums in single precision.
//
//            tile of X: columns of one part × L lines of 32 pixels, in L1
//   row  →   two entries: a line of each column, their words interleaved (vpunpcklwd, vpunpckhwd), so that every pair of words is one
//   pixel's
//            → vdpbf16ps with the pair of weights: 2 · 32 multiplications from two loads, two shuffles and two products
//
// In single precision the same takes four loads and four FMAs, and loads are what bounds that kernel. Sums are in the order in which the
// shuffles leave the pixels, within each vector of 32: the first four of each eight, then the others. The last store puts them right.
// Where a row has an odd number of entries the last one is paired with zeros, not with a weight of zero, which would spread infinities.
#include "cpu/kernels_pairs.h"

#include <algorithm>

#include "core/bfloat16.h"
#include "core/cpu_features.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

constexpr int kHalf = kLinePixels / 2;

// ---------------------------------------------------------------------------------------------------------------- without instructions

// Sums of some lines of pixels, in their order.
template <int L>
void product_of_floats(const PairArgs& a) {
    constexpr int kWidth = L * kLinePixels;
    const uint16_t* rows = a.panel_rows;
    const uint8_t* index = a.index;
    const uint16_t* w = a.values;
    for (const PanelRun* run = a.runs; run != a.runs_end; run++)
        for (int p = 0; p < run->panels; p++) {
            const size_t row = *rows++;
            float* sums = a.sums ? a.sums + row * a.sums_stride : nullptr;
            float acc[kWidth];
            const int room = std::min(kWidth, a.groups * kHalf);
            if (a.first) {
                const float start = a.bias ? a.bias[row] : 0.0f;
                for (float& sum : acc) sum = start;
                if (a.residual)
                    for (int i = 0; i < room; i++) acc[i] += a.residual[row * a.residual_stride + i];
                if (a.residual16)
                    for (int i = 0; i < kWidth; i++) acc[i] += from_bfloat16(a.residual16[row * a.residual_stride + i]);
            } else {
                std::memcpy(acc, sums, sizeof acc);
            }
            for (int e = 0; e < run->entries; e++) {
                const uint16_t* x = a.x + size_t(*index++) * a.x_stride;
                const float weight = from_bfloat16(*w++);
                for (int i = 0; i < kWidth; i++) acc[i] += weight * from_bfloat16(x[i]);
            }
            if (!a.last) {
                std::memcpy(sums, acc, sizeof acc);
                continue;
            }
            for (float& sum : acc) sum = sum < a.low ? a.low : sum > a.high ? a.high : sum;  // NaN passes through
            if (a.out) {
                std::memcpy(a.out + row * a.out_stride, acc, size_t(room) * sizeof(float));
            } else {
                for (int i = 0; i < kWidth; i++) a.out16[row * a.out_stride + i] = to_bfloat16(acc[i]);
            }
        }
}

void taps_of_words(const PairTapArgs& a) {
    const int width = a.lines * kLinePixels;
    for (int k = 0; k < a.columns; k++) {
        const int tap = (a.tap0 + k) % a.taps, channel = (a.tap0 + k) / a.taps;
        const uint16_t* from = a.x + size_t(channel) * a.channel_stride + a.tap_offset[tap];
        const uint16_t* mask = a.tap_mask + size_t(tap) * a.mask_stride;
        uint16_t* to = a.tile + size_t(k) * width;
        for (int i = 0; i < width; i++) to[i] = (mask[i >> 4] >> (i & 15) & 1) ? from[i] : uint16_t{0};
    }
}

void depthwise_of_floats(const PairDepthwiseArgs& a) {
    for (int64_t l = 0; l < a.lines; l++) {
        const int64_t begin = l * kLinePixels;
        const int room = static_cast<int>(std::min<int64_t>(kLinePixels, (a.groups - 2 * l) * kHalf));
        float acc[kLinePixels];
        for (float& sum : acc) sum = a.bias;
        for (int tap = 0; tap < a.taps; tap++) {
            const uint16_t* mask = a.tap_mask + size_t(tap) * a.mask_stride + 2 * l;
            const uint16_t* x = a.x + a.tap_offset[tap] + begin;
            const float weight = from_bfloat16(a.weight[tap]);
            for (int i = 0; i < kLinePixels; i++)
                if (mask[i >> 4] >> (i & 15) & 1) acc[i] += weight * from_bfloat16(x[i]);
        }
        for (int i = 0; i < room; i++) {
            float sum = acc[i];
            if (a.residual) sum += a.residual[begin + i];
            if (a.residual16) sum += from_bfloat16(a.residual16[begin + i]);
            sum = sum < a.low ? a.low : sum > a.high ? a.high : sum;
            if (a.out) {
                a.out[begin + i] = sum;
            } else {
                a.out16[begin + i] = to_bfloat16(sum);
            }
        }
    }
}

void narrow_floats(const float* x, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; i++) to[i] = to_bfloat16(x[i]);
}

void every_word(const uint16_t* x, int64_t step, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; i++) to[i] = x[i * step];
}

void split_words(const uint16_t* x, int64_t ld, int64_t rows, int64_t even_n, int64_t odd_n, uint16_t* even, uint16_t* odd,
                 int64_t out_ld) {
    for (int64_t r = 0; r < rows; r++, x += ld, even += out_ld) {
        every_word(x, 2, even_n, even);
        if (odd) every_word(x + 1, 2, odd_n, odd + r * out_ld);
    }
}

// ---------------------------------------------------------------------------------------------------------------- with them

#if defined(__AVX512F__)

#define SE_PAIRS __attribute__((target("avx512bf16")))

// The sums of 32 pixels: the first four of each eight, and the last four.
struct Line {
    Vec low, high;
};

// In a register: as an operand of both shuffles it would be loaded twice.
SE_INLINE __m512i load_line(const uint16_t* p) {
    __m512i line = _mm512_loadu_si512(p);
    asm("" : "+v"(line));
    return line;
}
SE_INLINE Vec lower_words(__m512i x) { return _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), x)); }
SE_INLINE Vec upper_words(__m512i x) { return _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), x)); }

SE_INLINE Line split(Vec first, Vec second) {
    return {_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd)};
}
SE_INLINE void store_floats(float* to, Line line, bool both) {
    const Vec first = _mm512_shuffle_f32x4(line.low, line.high, 0x44), second = _mm512_shuffle_f32x4(line.low, line.high, 0xee);
    store(to, _mm512_shuffle_f32x4(first, first, 0xd8));
    if (both) store(to + kHalf, _mm512_shuffle_f32x4(second, second, 0xd8));
}

SE_PAIRS inline __attribute__((always_inline)) void store_words(uint16_t* to, Line line) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, (__m512i)_mm512_cvtne2ps_pbh(line.high, line.low)));
}

template <int L>
SE_PAIRS inline __attribute__((always_inline)) void add_pair(Line (&acc)[L], const uint16_t* w, const uint16_t* x0, const uint16_t* x1) {
    int both;
    std::memcpy(&both, w, 4);
    const __m512bh weights = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
    for (int l = 0; l < L; l++) {
        const __m512i a = load_line(x0 + l * kLinePixels), b = load_line(x1 + l * kLinePixels);
        acc[l].low = _mm512_dpbf16_ps(acc[l].low, (__m512bh)_mm512_unpacklo_epi16(a, b), weights);
        acc[l].high = _mm512_dpbf16_ps(acc[l].high, (__m512bh)_mm512_unpackhi_epi16(a, b), weights);
    }
}

template <int L>
SE_PAIRS inline __attribute__((always_inline)) void add_single(Line (&acc)[L], uint16_t w, const uint16_t* x) {
    const __m512bh weights = (__m512bh)_mm512_set1_epi32(w);
    const __m512i none = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int l = 0; l < L; l++) {
        const __m512i a = load_line(x + l * kLinePixels);
        acc[l].low = _mm512_dpbf16_ps(acc[l].low, (__m512bh)_mm512_unpacklo_epi16(a, none), weights);
        acc[l].high = _mm512_dpbf16_ps(acc[l].high, (__m512bh)_mm512_unpackhi_epi16(a, none), weights);
    }
}

template <int L>
SE_INLINE void begin_line_sums(Line (&acc)[L], const PairArgs& a, size_t row) {
    if (!a.first) {
        const float* sums = a.sums + row * a.sums_stride;
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) acc[l] = {load(sums + l * kLinePixels), load(sums + l * kLinePixels + kHalf)};
        return;
    }
    const Vec start = a.bias ? splat(a.bias[row]) : zero();
#pragma GCC unroll 4
    for (int l = 0; l < L; l++) acc[l] = {start, start};
    if (a.residual16) {
        const uint16_t* r = a.residual16 + row * a.residual_stride;
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) {
            const __m512i words = load_line(r + l * kLinePixels);
            acc[l] = {add(acc[l].low, lower_words(words)), add(acc[l].high, upper_words(words))};
        }
    } else if (a.residual) {
        const float* r = a.residual + row * a.residual_stride;
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) {
            const Vec first = load(r + l * kLinePixels), second = 2 * l + 1 < a.groups ? load(r + l * kLinePixels + kHalf) : zero();
            const Line more = split(first, second);
            acc[l] = {add(acc[l].low, more.low), add(acc[l].high, more.high)};
        }
    }
}

template <int L>
SE_PAIRS inline __attribute__((always_inline)) void end_line_sums(Line (&acc)[L], const PairArgs& a, size_t row) {
    if (!a.last) {
        float* sums = a.sums + row * a.sums_stride;
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) store(sums + l * kLinePixels, acc[l].low), store(sums + l * kLinePixels + kHalf, acc[l].high);
        return;
    }
    const Vec low = splat(a.low), high = splat(a.high);
#pragma GCC unroll 4
    for (int l = 0; l < L; l++) acc[l] = {at_most(at_least(acc[l].low, low), high), at_most(at_least(acc[l].high, low), high)};
    if (a.out16) {
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) store_words(a.out16 + row * a.out_stride + l * kLinePixels, acc[l]);
    } else {
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) store_floats(a.out + row * a.out_stride + l * kLinePixels, acc[l], 2 * l + 1 < a.groups);
    }
}

constexpr int kAhead = 512;  // entries: weights come from beyond the L2, and the prefetcher does not run ahead far enough

// Runs whose number of entries is 4·fours + Rest.
template <int L, int Rest>
SE_PAIRS inline __attribute__((always_inline)) void run_of_pairs(const PairArgs& a, int panels, int fours, const uint16_t*& rows_,
                                                                 const uint8_t*& index_, const uint16_t*& w_) {
    const uint16_t* rows = rows_;
    const uint8_t* index = index_;
    const uint16_t* w = w_;
    const uint16_t* x = a.x;
    const size_t stride = a.x_stride;
    for (int p = 0; p < panels; p++) {
        const size_t row = *rows++;
        for (int line = 0; line < 4 * fours + Rest; line += 32) __builtin_prefetch(w + kAhead + line);
        __builtin_prefetch(index + kAhead);
        Line acc[L];
        begin_line_sums(acc, a, row);
        for (int g = 0; g < fours; g++, index += 4, w += 4) {
            uint32_t four;
            std::memcpy(&four, index, 4);
            add_pair(acc, w, x + size_t(four & 255) * stride, x + size_t((four >> 8) & 255) * stride);
            add_pair(acc, w + 2, x + size_t((four >> 16) & 255) * stride, x + size_t(four >> 24) * stride);
        }
        if constexpr (Rest >= 2) add_pair(acc, w, x + size_t(index[0]) * stride, x + size_t(index[1]) * stride);
        if constexpr (Rest % 2 == 1) add_single(acc, w[Rest - 1], x + size_t(index[Rest - 1]) * stride);
        index += Rest, w += Rest;
        end_line_sums(acc, a, row);
    }
    rows_ = rows, index_ = index, w_ = w;
}

template <int L>
SE_PAIRS void product_of_pairs(const PairArgs& args) {
    const PairArgs a = args;
    const uint16_t* rows = a.panel_rows;
    const uint8_t* index = a.index;
    const uint16_t* w = a.values;
    for (const PanelRun* run = a.runs; run != a.runs_end; run++) {
        const int fours = run->entries / 4;
        switch (run->entries % 4) {
            case 0: run_of_pairs<L, 0>(a, run->panels, fours, rows, index, w); break;
            case 1: run_of_pairs<L, 1>(a, run->panels, fours, rows, index, w); break;
            case 2: run_of_pairs<L, 2>(a, run->panels, fours, rows, index, w); break;
            case 3: run_of_pairs<L, 3>(a, run->panels, fours, rows, index, w); break;
        }
    }
}

// Tap by tap: the masks of a tap are the same for every channel and stay in registers.
template <int L>
void taps_of_lines(const PairTapArgs& a) {
    constexpr int kWidth = L * kLinePixels;
    for (int tap = 0; tap < a.taps; tap++) {
        const int first = tap >= a.tap0 ? tap - a.tap0 : tap - a.tap0 + a.taps;
        if (first >= a.columns) continue;
        const uint16_t* source = a.x + (tap < a.tap0 ? int64_t(a.channel_stride) : 0) + a.tap_offset[tap];
        __mmask32 mask[L];
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) std::memcpy(&mask[l], a.tap_mask + size_t(tap) * a.mask_stride + 2 * l, 4);
        uint16_t* tile = a.tile + size_t(first) * kWidth;
        for (int k = first; k < a.columns; k += a.taps, source += a.channel_stride, tile += a.taps * kWidth) {
#pragma GCC unroll 4
            for (int l = 0; l < L; l++)
                _mm512_storeu_si512(tile + l * kLinePixels, _mm512_maskz_loadu_epi16(mask[l], source + l * kLinePixels));
        }
    }
}

// Two taps at a time, as two columns of a product. Taps: 0 where their number is not known.
template <int Taps>
SE_PAIRS void depthwise_of_taps(const PairDepthwiseArgs& args) {
    const PairDepthwiseArgs a = args;
    const int taps = Taps ? Taps : a.taps;
    const Vec low = splat(a.low), high = splat(a.high), bias = splat(a.bias);
    for (int64_t l = 0; l < a.lines; l++) {
        const int64_t begin = l * kLinePixels;
        auto tap_line = [&](int tap) __attribute__((always_inline)) {
            __mmask32 mask;
            std::memcpy(&mask, a.tap_mask + size_t(tap) * a.mask_stride + 2 * l, 4);
            return _mm512_maskz_loadu_epi16(mask, a.x + a.tap_offset[tap] + begin);
        };
        Line sums = {bias, bias}, odd = {zero(), zero()};
        if (a.residual16) {
            const __m512i words = load_line(a.residual16 + begin);
            sums = {add(sums.low, lower_words(words)), add(sums.high, upper_words(words))};
        } else if (a.residual) {
            const bool both = 2 * l + 1 < a.groups;
            const Line more = split(load(a.residual + begin), both ? load(a.residual + begin + kHalf) : zero());
            sums = {add(sums.low, more.low), add(sums.high, more.high)};
        }
        int tap = 0;
#pragma GCC unroll 5
        for (; tap + 1 < taps; tap += 2) {
            int both;
            std::memcpy(&both, a.weight + tap, 4);
            const __m512bh weights = (__m512bh)_mm512_set1_epi32(both);
            const __m512i first = tap_line(tap), second = tap_line(tap + 1);
            Line& to = tap % 4 ? odd : sums;
            to.low = _mm512_dpbf16_ps(to.low, (__m512bh)_mm512_unpacklo_epi16(first, second), weights);
            to.high = _mm512_dpbf16_ps(to.high, (__m512bh)_mm512_unpackhi_epi16(first, second), weights);
        }
        if (tap < taps) {
            const __m512bh weights = (__m512bh)_mm512_set1_epi32(a.weight[tap]);
            const __m512i line = tap_line(tap), none = _mm512_setzero_si512();
            odd.low = _mm512_dpbf16_ps(odd.low, (__m512bh)_mm512_unpacklo_epi16(line, none), weights);
            odd.high = _mm512_dpbf16_ps(odd.high, (__m512bh)_mm512_unpackhi_epi16(line, none), weights);
        }
        sums = {at_most(at_least(add(sums.low, odd.low), low), high), at_most(at_least(add(sums.high, odd.high), low), high)};
        if (a.out16) {
            store_words(a.out16 + begin, sums);
        } else {
            store_floats(a.out + begin, sums, 2 * l + 1 < a.groups);
        }
    }
}

SE_PAIRS void depthwise_of_any(const PairDepthwiseArgs& a) {
    if (a.taps == 9) return depthwise_of_taps<9>(a);
    depthwise_of_taps<0>(a);
}

void taps_of_any(const PairTapArgs& a) {
    switch (a.lines) {
        case 1: return taps_of_lines<1>(a);
        case 2: return taps_of_lines<2>(a);
        case 3: return taps_of_lines<3>(a);
        default: return taps_of_lines<4>(a);
    }
}

SE_INLINE uint32_t words(int64_t n) { return n <= 0 ? 0 : low_bits(n); }

void split_lines(const uint16_t* x, int64_t ld, int64_t rows, int64_t even_n, int64_t odd_n, uint16_t* even, uint16_t* odd,
                 int64_t out_ld) {
    const int64_t read = std::max(2 * even_n - 1, odd ? 2 * odd_n : 0);
    alignas(64) uint16_t places[kLinePixels];
    for (int i = 0; i < kLinePixels; i++) places[i] = static_cast<uint16_t>(2 * i);
    const __m512i evens = _mm512_load_si512(places), odds = _mm512_or_si512(evens, _mm512_set1_epi16(1));
    for (int64_t r = 0; r < rows; r++, x += ld, even += out_ld) {
        for (int64_t i = 0; 2 * i < read; i += kLinePixels) {
            const __m512i first = _mm512_maskz_loadu_epi16(words(read - 2 * i), x + 2 * i);
            const __m512i second = _mm512_maskz_loadu_epi16(words(read - 2 * i - kLinePixels), x + 2 * i + kLinePixels);
            _mm512_mask_storeu_epi16(even + i, words(even_n - i), _mm512_permutex2var_epi16(first, evens, second));
            if (odd) _mm512_mask_storeu_epi16(odd + r * out_ld + i, words(odd_n - i), _mm512_permutex2var_epi16(first, odds, second));
        }
    }
}

SE_PAIRS void narrow_pairs(const float* x, int64_t n, uint16_t* to) {
    int64_t i = 0;
    for (; i + kLinePixels <= n; i += kLinePixels)
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + kHalf), _mm512_loadu_ps(x + i)));
    if (i == n) return;
    const uint32_t bits = low_bits(n - i);
    const Vec first = load_bits(x + i, bits & 0xffff), second = bits >> 16 ? load_bits(x + i + kHalf, bits >> 16) : zero();
    _mm512_mask_storeu_epi16(to + i, bits, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

#endif

}  // namespace

PairKernels make_pair_kernels() {
    PairKernels k{};
    k.product[1] = product_of_floats<1>, k.product[2] = product_of_floats<2>;
    k.product[3] = product_of_floats<3>, k.product[4] = product_of_floats<4>;
    k.taps = taps_of_words, k.depthwise = depthwise_of_floats, k.narrow = narrow_floats, k.every = every_word, k.split = split_words;
#if defined(__AVX512F__)
    k.taps = taps_of_any, k.split = split_lines;
    if (cpu_info().avx512_bf16) {
        k.products = true;
        k.product[1] = product_of_pairs<1>, k.product[2] = product_of_pairs<2>;
        k.product[3] = product_of_pairs<3>, k.product[4] = product_of_pairs<4>;
        k.depthwise = depthwise_of_any, k.narrow = narrow_pairs;
    }
#endif
    return k;
}

}  // namespace SE_ISA
}  // namespace sparse_engine
