// Elementwise functions, reductions, normalisations, and the matrix–vector products of batch 1.
#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

SE_INLINE Vec clamp(Vec x, float low, float high) { return at_most(at_least(x, splat(low)), splat(high)); }
SE_INLINE Vec negate(Vec x) { return mul(x, splat(-1.0f)); }
SE_INLINE Vec sigmoid(Vec x) { return div(splat(1.0f), add(splat(1.0f), exp(negate(x)))); }
SE_INLINE Vec magnitude(Vec x) { return at_least(x, negate(x)); }

// (e^2x − 1) / (e^2x + 1), without a difference of nearly equal numbers for tiny x. Beyond ±10 it is ±1 in float.
SE_INLINE Vec tanh(Vec x) {
    Vec e = expm1(clamp(add(x, x), -20.0f, 20.0f));
    return div(e, add(e, splat(2.0f)));
}

// erf to 5e-7 of itself: x · P(x²) below 0.75, where 1 − erfc would lose what is small, and ±(1 − e^−L(|x|)) beyond, L = −log erfc. Both
// are minimax polynomials in the relative error of erf (1.4e-9 and 3e-9 before rounding), L's up to 4, where erf is 1 in float.
SE_INLINE Vec erf(Vec x) {
    Vec a = at_most(magnitude(x), splat(4.0f)), square = mul(a, a);
    Vec p = splat(-0.0006749513559043407f);
    p = fma(p, square, splat(0.00511434581130743f));
    p = fma(p, square, splat(-0.026834623888134956f));
    p = fma(p, square, splat(0.11283376812934875f));
    p = fma(p, square, splat(-0.3761261999607086f));
    p = fma(p, square, splat(1.1283791065216064f));
    Vec l = splat(-0.00021317755454219878f);
    l = fma(l, a, splat(0.0032058211509138346f));
    l = fma(l, a, splat(-0.022848475724458694f));
    l = fma(l, a, splat(0.10516484826803207f));
    l = fma(l, a, splat(0.6358415484428406f));
    l = fma(l, a, splat(1.1284334659576416f));
    l = fma(l, a, splat(2.1405920051620342e-05f));
    Vec far = sub(splat(1.0f), exp(negate(l)));
    return where_below(a, splat(0.75f), mul(x, p), where_below(x, zero(), negate(far), far));
}

// x · Φ(x). Φ(−a) = erfc(a/√2) / 2 by Abramowitz and Stegun 7.1.26, to 7.5e-8; there is no need for erf's own digits here.
SE_INLINE Vec gelu(Vec x) {
    Vec a = mul(magnitude(x), splat(0.70710678118654752f));
    Vec t = div(splat(1.0f), fma(splat(0.3275911f), a, splat(1.0f)));
    Vec p = splat(0.5f * 1.061405429f);
    p = fma(p, t, splat(0.5f * -1.453152027f));
    p = fma(p, t, splat(0.5f * 1.421413741f));
    p = fma(p, t, splat(0.5f * -0.284496736f));
    p = fma(p, t, splat(0.5f * 0.254829592f));
    Vec tail = mul(mul(p, t), exp(negate(mul(a, a))));
    return mul(x, where_below(x, zero(), tail, sub(splat(1.0f), tail)));
}

template <class F>
SE_INLINE void map(const float* x, float* y, int64_t n, F f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
    if (i < n) {
        uint32_t bits = low_bits(n - i);
        store_bits(y + i, f(load_bits(x + i, bits)), bits);
    }
}

void activate(Activation kind, float p0, float p1, const float* x, float* y, int64_t n) {
    switch (kind) {
        case Activation::none:
            if (x != y && n > 0) std::memmove(y, x, size_t(n) * sizeof(float));
            return;
        case Activation::clamp: return map(x, y, n, [=](Vec v) { return clamp(v, p0, p1); });
        case Activation::leaky_relu: return map(x, y, n, [=](Vec v) { return fma(splat(p0), at_most(v, zero()), at_least(v, zero())); });
        case Activation::gelu: return map(x, y, n, [](Vec v) { return gelu(v); });
        case Activation::gelu_tanh:  // (1 + tanh u) / 2 is the sigmoid of 2u
            return map(x, y, n, [](Vec v) {
                return mul(v, sigmoid(mul(splat(1.59576912160573072f), fma(mul(splat(0.044715f), mul(v, v)), v, v))));
            });
        case Activation::silu: return map(x, y, n, [](Vec v) { return mul(v, sigmoid(v)); });
        case Activation::hardswish:
            return map(x, y, n, [](Vec v) { return mul(mul(v, splat(1.0f / 6)), clamp(add(v, splat(3.0f)), 0.0f, 6.0f)); });
        case Activation::hardsigmoid:
            return map(x, y, n, [](Vec v) { return mul(splat(1.0f / 6), clamp(add(v, splat(3.0f)), 0.0f, 6.0f)); });
        case Activation::sigmoid: return map(x, y, n, [](Vec v) { return sigmoid(v); });
        case Activation::tanh: return map(x, y, n, [](Vec v) { return tanh(v); });
        case Activation::elu: return map(x, y, n, [=](Vec v) { return fma(splat(p0), expm1(at_most(v, zero())), at_least(v, zero())); });
        case Activation::exp: return map(x, y, n, [](Vec v) { return exp(v); });
        case Activation::sqrt: return map(x, y, n, [](Vec v) { return SE_ISA::sqrt(v); });
        case Activation::rsqrt: return map(x, y, n, [](Vec v) { return div(splat(1.0f), SE_ISA::sqrt(v)); });
        case Activation::neg: return map(x, y, n, [](Vec v) { return negate(v); });
        case Activation::abs: return map(x, y, n, [](Vec v) { return magnitude(v); });
        case Activation::reciprocal: return map(x, y, n, [](Vec v) { return div(splat(1.0f), v); });
        case Activation::square: return map(x, y, n, [](Vec v) { return mul(v, v); });
        case Activation::erf: return map(x, y, n, [](Vec v) { return erf(v); });
        case Activation::softplus:  // p0 = beta, p1 = threshold
            for (int64_t i = 0; i < n; i++) y[i] = x[i] * p0 > p1 ? x[i] : std::log1p(std::exp(x[i] * p0)) / p0;
            return;
        case Activation::log:
            for (int64_t i = 0; i < n; i++) y[i] = std::log(x[i]);
            return;
        case Activation::count: return;
    }
}

template <class F>
SE_INLINE void zip(const float* a, int a_step, const float* b, int b_step, float* y, int64_t n, F f) {
    auto get = [](const float* p, int step, int64_t i) { return step ? load(p + i) : splat(*p); };
    auto get_bits = [](const float* p, int step, int64_t i, uint32_t bits) { return step ? load_bits(p + i, bits) : splat(*p); };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, f(get(a, a_step, i), get(b, b_step, i)));
    if (i < n) {
        uint32_t bits = low_bits(n - i);
        store_bits(y + i, f(get_bits(a, a_step, i, bits), get_bits(b, b_step, i, bits)), bits);
    }
}

void binary(Binary kind, const float* a, int a_step, const float* b, int b_step, float* y, int64_t n) {
    switch (kind) {
        case Binary::add: return zip(a, a_step, b, b_step, y, n, [](Vec u, Vec v) { return add(u, v); });
        case Binary::sub: return zip(a, a_step, b, b_step, y, n, [](Vec u, Vec v) { return sub(u, v); });
        case Binary::mul: return zip(a, a_step, b, b_step, y, n, [](Vec u, Vec v) { return mul(u, v); });
        case Binary::div: return zip(a, a_step, b, b_step, y, n, [](Vec u, Vec v) { return div(u, v); });
        case Binary::maximum:  // the sum carries a NaN of either side through
            for (int64_t i = 0; i < n; i++) {
                float u = a[i * a_step], v = b[i * b_step];
                y[i] = std::isnan(u) || std::isnan(v) ? u + v : std::max(u, v);
            }
            return;
        case Binary::minimum:
            for (int64_t i = 0; i < n; i++) {
                float u = a[i * a_step], v = b[i * b_step];
                y[i] = std::isnan(u) || std::isnan(v) ? u + v : std::min(u, v);
            }
            return;
        case Binary::pow:
            for (int64_t i = 0; i < n; i++) y[i] = std::pow(a[i * a_step], b[i * b_step]);
            return;
        case Binary::count: return;
    }
}

void scale_shift(const float* x, float scale, float shift, float* y, int64_t n) {
    map(x, y, n, [=](Vec v) { return fma(v, splat(scale), splat(shift)); });
}

float reduce_sum(const float* x, int64_t n) {
    Vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        s0 = add(s0, load(x + i)), s1 = add(s1, load(x + i + kLanes));
        s2 = add(s2, load(x + i + 2 * kLanes)), s3 = add(s3, load(x + i + 3 * kLanes));
    }
    for (; i + kLanes <= n; i += kLanes) s0 = add(s0, load(x + i));
    if (i < n) s1 = add(s1, load_bits(x + i, low_bits(n - i)));
    return sum(add(add(s0, s1), add(s2, s3)));
}

// Short rows (a plane of 7×7) sixteen at a time: a sum across the lanes of one vector takes as long as the additions before it.
void sum_rows(const float* x, int64_t stride, int64_t rows, int64_t n, float* y) {
    int64_t r = 0;
#if defined(__AVX512F__)
    if (n > 0 && n <= 16 * kLanes) {
        const int64_t whole = (n - 1) / kLanes;  // vectors but for the last
        const uint32_t rest = low_bits(n - whole * kLanes);
        for (; r < rows; r += 16) {
            const int64_t valid = std::min<int64_t>(16, rows - r);
            Vec quads[4];
            for (int64_t q = 0; q < 4; q++) {
                Vec s[4];
                for (int64_t i = 0; i < 4; i++) {  // past the end the last row again; its sum is not stored
                    const float* row = x + (r + std::min(4 * q + i, valid - 1)) * stride;
                    s[i] = load_bits(row + whole * kLanes, rest);
                    for (int64_t v = 0; v < whole; v++) s[i] = add(s[i], load(row + v * kLanes));
                }
                quads[q] = sum_within_lanes(s[0], s[1], s[2], s[3]);
            }
            store_bits(y + r, fold(quads), low_bits(valid));
        }
    }
#endif
    for (; r < rows; r++) y[r] = reduce_sum(x + r * stride, n);
}

float reduce_max(const float* x, int64_t n) {
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < n; i++) best = std::isnan(x[i]) || x[i] > best ? x[i] : best;
    return best;
}

void softmax_row(const float* x, int64_t length, float* y) {
    float top = reduce_max(x, length);
    if (std::isinf(top) && top < 0) top = 0;  // a fully masked row: 0/0, as in PyTorch
    map(x, y, length, [=](Vec v) { return exp(sub(v, splat(top))); });
    float scale = 1.0f / reduce_sum(y, length);
    map(y, y, length, [=](Vec v) { return mul(v, splat(scale)); });
}

void softmax_columns(const float* x, size_t x_stride, int64_t length, float* y, size_t y_stride, int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes) {
        uint32_t bits = low_bits(std::min<int64_t>(kLanes, width - i));
        Vec top = splat(-std::numeric_limits<float>::max());
        for (int64_t k = 0; k < length; k++) top = at_least(load_bits(x + k * x_stride + i, bits), top);
        Vec total = zero();
        for (int64_t k = 0; k < length; k++) {
            Vec e = exp(sub(load_bits(x + k * x_stride + i, bits), top));
            store_bits(y + k * y_stride + i, e, bits);
            total = add(total, e);
        }
        Vec scale = div(splat(1.0f), total);
        for (int64_t k = 0; k < length; k++) store_bits(y + k * y_stride + i, mul(load_bits(y + k * y_stride + i, bits), scale), bits);
    }
}

void layer_norm_columns(const float* x, size_t x_stride, int64_t length, const float* weight, const float* bias, float eps, float* y,
                        size_t y_stride, int64_t width) {
    Vec inverse = splat(1.0f / static_cast<float>(length));
    for (int64_t i = 0; i < width; i += kLanes) {
        uint32_t bits = low_bits(std::min<int64_t>(kLanes, width - i));
        Vec total = zero();
        for (int64_t k = 0; k < length; k++) total = add(total, load_bits(x + k * x_stride + i, bits));
        Vec mean = mul(total, inverse), squares = zero();
        for (int64_t k = 0; k < length; k++) {
            Vec d = sub(load_bits(x + k * x_stride + i, bits), mean);
            squares = fma(d, d, squares);
        }
        Vec scale = div(splat(1.0f), SE_ISA::sqrt(fma(squares, inverse, splat(eps))));
        for (int64_t k = 0; k < length; k++) {
            Vec v = mul(sub(load_bits(x + k * x_stride + i, bits), mean), scale);
            if (weight) v = mul(v, splat(weight[k]));
            if (bias) v = add(v, splat(bias[k]));
            store_bits(y + k * y_stride + i, v, bits);
        }
    }
}

void layer_norm_row(const float* x, int64_t length, const float* weight, const float* bias, float eps, float* y) {
    float mean = reduce_sum(x, length) / static_cast<float>(length);
    map(x, y, length, [=](Vec v) { return sub(v, splat(mean)); });
    Vec s = zero();
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) s = fma(load(y + i), load(y + i), s);
    if (i < length) {
        Vec v = load_bits(y + i, low_bits(length - i));
        s = fma(v, v, s);
    }
    float scale = 1.0f / std::sqrt(sum(s) / static_cast<float>(length) + eps);
    for (int64_t k = 0; k < length; k++) y[k] = y[k] * scale * (weight ? weight[k] : 1.0f) + (bias ? bias[k] : 0.0f);
}

// Lanes 0, 2, 4, … of 2·kLanes floats, of which only the first `valid` may be touched.
SE_INLINE Vec load_even(const float* x, int64_t valid) {
#if defined(__AVX512F__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    Vec low = load_bits(x, low_bits(std::min<int64_t>(valid, kLanes)));
    Vec high = valid > kLanes ? load_bits(x + kLanes, low_bits(valid - kLanes)) : zero();
    return _mm512_permutex2var_ps(low, even, high);
#elif defined(__AVX2__)
    if (valid >= 2 * kLanes) {
        __m256 pairs = _mm256_shuffle_ps(load(x), load(x + kLanes), 0x88);  // 0 2 8 10 4 6 12 14
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
    }
    float lanes[kLanes] = {};
    for (int i = 0; i < kLanes && 2 * i < valid; i++) lanes[i] = x[2 * i];
    return load(lanes);
#else
    float lanes[kLanes] = {};
    for (int i = 0; i < kLanes && 2 * i < valid; i++) lanes[i] = x[2 * i];
    return load(lanes);
#endif
}

template <class F>
SE_INLINE void into(const float* x, int64_t step, float* y, int64_t n, F f) {
    int64_t i = 0;
    if (step == 1) {
        for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(y + i), load(x + i)));
        if (i < n) {
            uint32_t bits = low_bits(n - i);
            store_bits(y + i, f(load_bits(y + i, bits), load_bits(x + i, bits)), bits);
        }
        return;
    }
    if (step == 2) {
        for (; i < n; i += kLanes) {
            int64_t lanes = std::min<int64_t>(kLanes, n - i);
            uint32_t bits = low_bits(lanes);
            store_bits(y + i, f(load_bits(y + i, bits), load_even(x + 2 * i, 2 * lanes - 1)), bits);
        }
        return;
    }
    for (; i < n; i++) {
        Vec one = f(splat(y[i]), splat(x[i * step]));
        store_bits(y + i, one, 1);
    }
}

void copy(const float* x, int64_t step, float* y, int64_t n) {
    if (step == 1) {
        std::memcpy(y, x, size_t(n) * sizeof(float));
        return;
    }
    int64_t i = 0;
    if (step == 2)
        for (; i < n; i += kLanes) {
            int64_t lanes = std::min<int64_t>(kLanes, n - i);
            store_bits(y + i, load_even(x + 2 * i, 2 * lanes - 1), low_bits(lanes));
        }
    for (; i < n; i++) y[i] = x[i * step];
}

// Short rows without a call for each.
void copy_rows(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows, int64_t n) {
#if defined(__AVX512F__)
    if (n <= kLanes) {
        const Mask mask = mask_of(low_bits(n));
        for (int64_t r = 0; r < rows; r++) _mm512_mask_storeu_ps(y + r * y_stride, mask, load_masked(x + r * x_stride, mask));
        return;
    }
    if (n <= 4 * kLanes) {
        const int64_t last = n - kLanes;  // the last vector overlaps the one before
        for (int64_t r = 0; r < rows; r++) {
            const float* from = x + r * x_stride;
            float* to = y + r * y_stride;
            Vec end = load(from + last);
            for (int64_t i = 0; i < last; i += kLanes) store(to + i, load(from + i));
            store(to + last, end);
        }
        return;
    }
#endif
    for (int64_t r = 0; r < rows; r++) std::memcpy(y + r * y_stride, x + r * x_stride, size_t(n) * sizeof(float));
}

// Rows one after the other in y, past the cache: whole lines of y, each from the end of one row and the beginning of the next.
void stream_rows(const float* x, int64_t x_stride, float* y, int64_t rows, int64_t n) {
#if defined(__AVX512F__)
    const int64_t total = rows * n, offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(y) / sizeof(float) % kLanes);
    if (n >= kLanes && total >= 4 * kLanes && reinterpret_cast<uintptr_t>(y) % sizeof(float) == 0) {
        const float* row = x;
        int64_t column = 0;  // of y[i] in its row
        auto next = [&](Mask wanted, int64_t count) {
            const int64_t left = n - column;
            Vec v = load_masked(row + column, count < left ? wanted : static_cast<Mask>(wanted & low_bits(left < kLanes ? left : kLanes)));
            column += count;
            if (column >= n) {
                row += x_stride, column -= n;
                if (column) v = _mm512_mask_loadu_ps(v, static_cast<Mask>(wanted & ~low_bits(left)), row - left);
            }
            return v;
        };
        const int64_t head = (kLanes - offset) % kLanes;
        int64_t i = head;
        if (head) {
            const Mask mask = mask_of(low_bits(head));
            _mm512_mask_storeu_ps(y, mask, next(mask, head));
        }
        const Mask all = mask_of(low_bits(kLanes));
        for (; i + kLanes <= total; i += kLanes) _mm512_stream_ps(y + i, next(all, kLanes));
        if (i < total) {
            const Mask mask = mask_of(low_bits(total - i));
            _mm512_mask_storeu_ps(y + i, mask, next(mask, total - i));
        }
        _mm_sfence();
        return;
    }
#endif
    copy_rows(x, x_stride, y, n, rows, n);
}

void add_into(const float* x, int64_t step, float* y, int64_t n) {
    into(x, step, y, n, [](Vec a, Vec b) { return add(a, b); });
}

// NaN wins, as in PyTorch's pooling.
SE_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
#elif defined(__AVX2__)
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
#else
    for (int i = 0; i < kLanes; i++)
        if (b.lane[i] > a.lane[i] || std::isnan(b.lane[i])) a.lane[i] = std::isnan(a.lane[i]) ? a.lane[i] : b.lane[i];
    return a;
#endif
}

// y[i] = f over the rows x[r · ld + i]
template <class F>
SE_INLINE void rows_into(const float* x, int64_t ld, int rows, float* y, int64_t n, F f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        Vec v = load(x + i);
        for (int r = 1; r < rows; r++) v = f(v, load(x + r * ld + i));
        store(y + i, v);
    }
    if (i < n) {
        uint32_t bits = low_bits(n - i);
        Vec v = load_bits(x + i, bits);
        for (int r = 1; r < rows; r++) v = f(v, load_bits(x + r * ld + i, bits));
        store_bits(y + i, v, bits);
    }
}

// y[i] = f over the taps x[i · step + s · dilation]; two vectors past the last tap may be read.
template <class F>
SE_INLINE void taps_into(const float* x, int taps, int64_t dilation, int64_t step, float* y, int64_t n, F f) {
    int64_t i = 0;
    auto whole = [&](auto take) {
        for (; i < n; i += kLanes) {
            Vec v = take(x + i * step);
            for (int s = 1; s < taps; s++) v = f(v, take(x + i * step + s * dilation));
            if (i + kLanes <= n) {
                store(y + i, v);
            } else {
                store_bits(y + i, v, low_bits(n - i));
            }
        }
    };
    if (step == 1) return whole([](const float* p) { return load(p); });
    if (step == 2) return whole([](const float* p) { return load_even(p, 2 * kLanes); });
    for (; i < n; i++) {
        Vec v = splat(x[i * step]);
        for (int s = 1; s < taps; s++) v = f(v, splat(x[i * step + s * dilation]));
        store_bits(y + i, v, 1);
    }
}

#if defined(__AVX512F__)
constexpr int kStreamAhead = 768;  // floats
template <bool Odd>
SE_INLINE void split_rows(const float* x, int64_t ld, int64_t rows, int64_t even_n, int64_t odd_n, float* even, float* odd,
                          int64_t out_ld) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const int64_t most = std::max(even_n, Odd ? odd_n : 0), valid = std::max(2 * even_n - 1, Odd ? 2 * odd_n : 0);
    auto bits = [](int64_t n) { return low_bits(std::clamp<int64_t>(n, 0, kLanes)); };
    for (int64_t i = 0; i < most; i += kLanes) {  // columns outermost: all masks of a column are the same
        const Mask low = mask_of(bits(valid - 2 * i)), high = mask_of(bits(valid - 2 * i - kLanes));
        const uint32_t to_even = bits(even_n - i), to_odd = bits(odd_n - i);
        const float* from = x + 2 * i;
        float *e = even + i, *o = Odd ? odd + i : nullptr;
        for (int64_t row = 0; row < rows; row++, from += ld, e += out_ld) {
            // One wide row after the other is a stream, which an image comes in by: straight from memory.
            if (rows == 1) __builtin_prefetch(from + kStreamAhead), __builtin_prefetch(from + kStreamAhead + kLanes);
            Vec a = load_masked(from, low), b = load_masked(from + kLanes, high);
            store_bits(e, _mm512_permutex2var_ps(a, evens, b), to_even);
            if (Odd) {
                store_bits(o, _mm512_permutex2var_ps(a, odds, b), to_odd);
                o += out_ld;
            }
        }
    }
}
#endif

void split(const float* x, int64_t ld, int64_t rows, int64_t even_n, int64_t odd_n, float* even, float* odd, int64_t out_ld) {
#if defined(__AVX512F__)
    int64_t together = std::max(even_n, odd_n) > 2 * kLanes ? 1 : rows;  // wide rows one by one, in the order of memory
    for (int64_t row = 0; row < rows; row += together)
        if (odd) {
            split_rows<true>(x + row * ld, ld, together, even_n, odd_n, even + row * out_ld, odd + row * out_ld, out_ld);
        } else {
            split_rows<false>(x + row * ld, ld, together, even_n, 0, even + row * out_ld, nullptr, out_ld);
        }
#else
    for (int64_t row = 0; row < rows; row++) {
        copy(x + row * ld, 2, even + row * out_ld, even_n);
        if (odd) copy(x + row * ld + 1, 2, odd + row * out_ld, odd_n);
    }
#endif
}

void max_rows(const float* x, int64_t ld, int rows, float* y, int64_t n) {
    rows_into(x, ld, rows, y, n, [](Vec a, Vec b) { return larger(a, b); });
}
void add_rows(const float* x, int64_t ld, int rows, float* y, int64_t n) {
    rows_into(x, ld, rows, y, n, [](Vec a, Vec b) { return add(a, b); });
}
void max_taps(const float* x, int taps, int64_t dilation, int64_t step, float* y, int64_t n) {
    taps_into(x, taps, dilation, step, y, n, [](Vec a, Vec b) { return larger(a, b); });
}
void add_taps(const float* x, int taps, int64_t dilation, int64_t step, float* y, int64_t n) {
    taps_into(x, taps, dilation, step, y, n, [](Vec a, Vec b) { return add(a, b); });
}

}  // namespace

void fill_elementwise(KernelTable& t) {
    t.activate = activate;
    t.binary = binary;
    t.scale_shift = scale_shift;
    t.reduce_sum = reduce_sum;
    t.sum_rows = sum_rows;
    t.copy_rows = copy_rows, t.stream_rows = stream_rows;
    t.reduce_max = reduce_max;
    t.softmax_row = softmax_row;
    t.softmax_columns = softmax_columns;
    t.layer_norm_row = layer_norm_row;
    t.layer_norm_columns = layer_norm_columns;
    t.copy = copy;
    t.split = split;
    t.max_rows = max_rows;
    t.max_taps = max_taps;
    t.add_rows = add_rows;
    t.add_taps = add_taps;
    t.add_into = add_into;
}

}  // namespace SE_ISA
}  // namespace sparse_engine
