// Softmax losses over one row of logits, and their gradient.
//
// In float (fast_row): every logit is read from memory once, every exponential computed once and kept for the gradient; see there.
//
// The gradient is a difference of probabilities. Where student and teacher, or the two parts, all but agree, float keeps little of it: such
// rows are recognised by what is left, and computed once more in double (three to four times the time of an ordinary row).
#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------- in double

constexpr int64_t kBlock = 512;
constexpr int kSums = 16;  // independent partial sums: a chain of additions would wait four cycles for each

// A gradient whose largest element is this much smaller than its terms is computed again in double. Float leaves an error of about 1e-7 of
// the largest term, so a gradient that is kept is right to 3e-6 of its largest element; the contract is 1e-5.
constexpr double kCancels = 32;

// to[i] = e^((x[i] − top) / T), to 1e-14 of itself; the compiler makes vectors of it. e^x = 2^n · e^r as in simd.h, with n taken from
// the low bits of x / ln 2 + 1.5 · 2^52, which the addition rounds to an integer.
void exponentials(const float* x, int64_t n, float top, double inverse_temperature, double* to) {
    constexpr double kRound = 6755399441055744.0;
    for (int64_t i = 0; i < n; i++) {
        double v = (static_cast<double>(x[i]) - top) * inverse_temperature;
        v = v < -700.0 ? -700.0 : v;  // NaN stays
        double shifted = v * 1.4426950408889634 + kRound;
        double whole = shifted - kRound;
        double r = (v - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
        double p = 1.0 / 39916800;
        p = p * r + 1.0 / 3628800;
        p = p * r + 1.0 / 362880;
        p = p * r + 1.0 / 40320;
        p = p * r + 1.0 / 5040;
        p = p * r + 1.0 / 720;
        p = p * r + 1.0 / 120;
        p = p * r + 1.0 / 24;
        p = p * r + 1.0 / 6;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        uint64_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        bits = (bits << 52) + (uint64_t{1023} << 52);
        double power;
        std::memcpy(&power, &bits, sizeof power);
        to[i] = p * power;
    }
}

float largest(const float* x, int64_t n) {
    Vec top = splat(x[0]);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) top = at_least(load(x + i), top);
    float lanes[kLanes];
    store(lanes, top);
    float best = lanes[0];
    for (float lane : lanes) best = lane > best || std::isnan(lane) ? lane : best;
    for (; i < n; i++) best = x[i] > best || std::isnan(x[i]) ? x[i] : best;
    return best;
}

template <class F>
SE_INLINE void add_up(double (&sums)[kSums], int64_t n, F term) {
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
        for (int j = 0; j < kSums; j++) sums[j] += term(i + j);
    for (; i < n; i++) sums[i % kSums] += term(i);
}

double total(const double (&sums)[kSums]) {
    double s = 0;
    for (double v : sums) s += v;
    return s;
}

// Σ e^((x − top) / T) over all classes but `without` (−1: none), whose own exponential goes to `*left_out`.
double sum_of_exponentials(const float* x, int64_t n, float top, double inverse_temperature, int64_t without = -1,
                           double* left_out = nullptr) {
    double sums[kSums] = {}, block[kBlock];
    for (int64_t from = 0; from < n; from += kBlock) {
        int64_t count = std::min(kBlock, n - from);
        exponentials(x + from, count, top, inverse_temperature, block);
        if (without >= from && without < from + count) {
            *left_out = block[without - from];
            block[without - from] = 0;
        }
        add_up(sums, count, [&](int64_t i) { return block[i]; });
    }
    return total(sums);
}

// What the parts of one row share.
struct Row {
    float top = 0, teacher_top = 0;          // the largest logits
    double inverse;                          // 1 / T
    double sum = 1, others = 0;              // Σ e^(z − top), and without the label
    double student = 1, teacher = 1;         // Σ e^((z − top) / T), Σ e^((t − teacher_top) / T)
    double mass = 1;                         // Σ q
    double weights = 0;                      // Σ w
    double weight = 0, spread = 0, all = 0;  // (1 − ε) w_y, ε / C, and ε / C · Σ w
    bool exists = false;                     // the label is a class
};

SE_INLINE float class_weight(const KDRowArgs& a, int64_t c) { return a.class_weights ? a.class_weights[c] : 1.0f; }

void add_exponentials(const KDRowArgs& a, Row& r) {
    const int64_t n = a.classes;
    if (a.hard) {
        double own = 0;
        r.others = sum_of_exponentials(a.logits, n, r.top, 1.0, r.exists ? a.label : -1, &own);
        r.sum = r.others + own;
    }
    if (!a.teacher) return;
    r.student = a.hard && a.temperature == 1 ? r.sum : sum_of_exponentials(a.logits, n, r.top, r.inverse);
    if (!a.soft_targets) r.teacher = sum_of_exponentials(a.teacher, n, r.teacher_top, r.inverse);
}

void teacher_block(const KDRowArgs& a, const Row& r, int64_t from, int64_t count, double* q) {
    if (a.soft_targets) {
        std::copy(a.teacher + from, a.teacher + from + count, q);
    } else {
        exponentials(a.teacher + from, count, r.teacher_top, r.inverse, q);
        const double share = 1 / r.teacher;
        for (int64_t i = 0; i < count; i++) q[i] *= share;
    }
}

// The gradient of classes [from, from + count), where the teacher's probabilities are q:
//     hard_scale · (M p − ε/C w) + soft_scale · T · (mass · p_T − q),     M = (1 − ε) w_y + ε/C Σ w
// and for the label, from M p loses (1 − ε) w_y: 1 − p is taken from the other classes' sum, so that it doesn't cancel where p is almost 1.
void gradient_block(const KDRowArgs& a, const Row& r, int64_t from, int64_t count, const double* q) {
    double g[kBlock], e[kBlock];
    const float* z = a.logits + from;
    if (a.hard && a.hard_scale != 0) {
        const double factor = r.exists ? a.hard_scale * (r.weight + r.all) / r.sum : std::numeric_limits<double>::quiet_NaN();
        exponentials(z, count, r.top, 1.0, g);
        for (int64_t i = 0; i < count; i++) g[i] *= factor;
        if (r.exists && a.label >= from && a.label < from + count)
            g[a.label - from] = a.hard_scale * (r.all * ((r.sum - r.others) / r.sum) - r.weight * (r.others / r.sum));
        const double spread = a.hard_scale * r.spread;
        if (spread != 0)
            for (int64_t i = 0; i < count; i++) g[i] -= spread * class_weight(a, from + i);
    } else {
        std::fill(g, g + count, 0.0);
    }
    if (a.teacher && a.soft_scale != 0) {
        const double factor = a.soft_scale * a.temperature, share = r.mass / r.student;
        exponentials(z, count, r.top, r.inverse, e);
        for (int64_t i = 0; i < count; i++) g[i] += factor * (e[i] * share - q[i]);
    }
    for (int64_t i = 0; i < count; i++) a.gradient[from + i] = static_cast<float>(g[i]);
}

// ---------------------------------------------------------------------------------------------------------------- one pass in float
//
//   first   per block of kFast classes, in L1:   d = z − top, t − top'   e^(d / T) of both sides, kept in `scratch`   their sums
//   then    from scratch, which is in L2:        g = a e_z^T + b e_z − c e_t                                          stored
//
// Every logit is read from memory once and every exponential computed once; the hard part's e^(z − top) is a power of the soft part's where
// T is 1, 2, 3 or 4. A block whose maximum is the largest so far only moves `top`: the sums before it, and the blocks kept before it, are
// multiplied by e^(old − new). On Zen 4, from the cache: 24 and 7 cycles for sixteen classes of both sides, where the multiply-add units
// are busy for 17 and 6.

constexpr int64_t kFast = 1024;  // classes: four arrays of so many floats fit the L1

// 2^(d · c / kSteps) for d ≤ 0, to 6e-8 of itself but for the rounding of c; NaN stays, −∞ gives 0.
#if defined(__AVX512F__)
constexpr float kSteps = 32;

// The bits of 2^(k / 32) less k << 18: adding n << 18 then sets the exponent for n = 32 · e + k.
alignas(64) constexpr uint32_t kRoots[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532,
    0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be,
    0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

// d · c = n + f with |f| ≤ 1/2, and 2^(n / 32) from the table: a polynomial of the second degree is left for 2^(f / 32), instead of the
// sixth, and no clamp. Seven operations of the multiply-add units become five.
SE_INLINE Vec power_of_two(Vec d, Vec c) {
    const Vec round = splat(12582912.0f);
    const Vec shifted = fma(d, c, round), f = _mm512_fmsub_ps(d, c, sub(shifted, round));
    const __m512i n = _mm512_castps_si512(shifted);
    const __m512i root = _mm512_permutex2var_epi32(_mm512_load_si512(kRoots), n, _mm512_load_si512(kRoots + 16));
    const Vec power = _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(n, 18)));
    const Vec p = fma(f, splat(0.00023459619820224677f), splat(0.02166116698955562f));
    return _mm512_maskz_fmadd_ps(_mm512_cmp_ps_mask(shifted, splat(12582912.0f - 126 * kSteps), _CMP_NLT_UQ), mul(power, f), p, power);
}
#elif defined(__AVX2__)
constexpr float kSteps = 1;
SE_INLINE Vec power_of_two(Vec d, Vec c) {
    Vec y = at_least(mul(d, c), splat(-152.0f));
    Vec n = round_to_int(y), f = sub(y, n);
    Vec p = splat(1.5594678e-4f);
    p = fma(p, f, splat(1.3406643e-3f));
    p = fma(p, f, splat(9.6176928e-3f));
    p = fma(p, f, splat(5.5503104e-2f));
    p = fma(p, f, splat(2.4022652e-1f));
    p = fma(p, f, splat(6.9314724e-1f));
    p = fma(p, f, splat(1.0f));
    return scale_by_power_of_two(p, n);
}
#else
constexpr float kSteps = 1;
// Not inline: there are dozens of places, and on such a processor the loop takes longer than the call. Without calls in it, so that the
// compiler makes vectors of it; what is below 2^-126 is 0.
__attribute__((noinline)) Vec power_of_two(Vec d, Vec c) {
    for (int i = 0; i < kLanes; i++) {
        const float y = d.lane[i] * c.lane[i], shifted = y + 12582912.0f, f = y - (shifted - 12582912.0f);
        float p = 1.5594678e-4f;
        p = p * f + 1.3406643e-3f;
        p = p * f + 9.6176928e-3f;
        p = p * f + 5.5503104e-2f;
        p = p * f + 2.4022652e-1f;
        p = p * f + 6.9314724e-1f;
        p = p * f + 1.0f;
        uint32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        bits = (bits << 23) + (127u << 23);  // the low bits of `shifted` are the integer
        float power;
        std::memcpy(&power, &bits, sizeof power);
        d.lane[i] = y < -126.0f ? 0.0f : p * power;
    }
    return d;
}
#endif

// log q for q > 0, to some 1e-7.
SE_INLINE Vec logarithm(Vec q) {
#if defined(__AVX512F__)
    const Vec m = _mm512_getmant_ps(q, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const Vec e = _mm512_getexp_ps(div(q, m));  // the quotient is a power of two
    const Vec f = sub(m, splat(1.0f)), s = div(f, add(f, splat(2.0f))), w = mul(s, s);
    Vec p = splat(2.0f / 9);
    p = fma(p, w, splat(2.0f / 7));
    p = fma(p, w, splat(2.0f / 5));
    p = fma(p, w, splat(2.0f / 3));
    p = fma(p, w, splat(2.0f));
    return fma(e, splat(0.693147180559945f), mul(p, s));
#else
    float lanes[kLanes];
    store(lanes, q);
    for (float& lane : lanes) lane = std::log(lane);
    return load(lanes);
#endif
}

#if defined(__AVX512F__)
SE_INLINE Vec keep_bits(Vec v, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }
// sum + e · v, where nothing is added for e = 0 whatever v is
SE_INLINE Vec add_share(Vec sum, Vec e, Vec v) { return _mm512_mask3_fmadd_ps(e, v, sum, _mm512_cmp_ps_mask(e, zero(), _CMP_NEQ_UQ)); }
SE_INLINE Vec magnitude(Vec v) { return _mm512_abs_ps(v); }
SE_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
#elif defined(__AVX2__)
SE_INLINE Vec keep_bits(Vec v, uint32_t bits) { return _mm256_and_ps(v, _mm256_castsi256_ps(lane_mask(bits))); }
SE_INLINE Vec add_share(Vec sum, Vec e, Vec v) { return add(sum, _mm256_and_ps(mul(e, v), _mm256_cmp_ps(e, zero(), _CMP_NEQ_UQ))); }
SE_INLINE Vec magnitude(Vec v) { return _mm256_andnot_ps(splat(-0.0f), v); }
SE_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
#else
SE_INLINE Vec keep_bits(Vec v, uint32_t bits) {
    for (int i = 0; i < kLanes; i++) v.lane[i] = (bits >> i & 1) ? v.lane[i] : 0.0f;
    return v;
}
SE_INLINE Vec add_share(Vec sum, Vec e, Vec v) {
    for (int i = 0; i < kLanes; i++) sum.lane[i] += e.lane[i] == 0 ? 0.0f : e.lane[i] * v.lane[i];
    return sum;
}
SE_INLINE Vec magnitude(Vec v) {
    for (float& lane : v.lane) lane = std::fabs(lane);
    return v;
}
SE_INLINE void stream(float* p, Vec v) { store(p, v); }
#endif

enum Teacher { kNone, kLogits, kProbabilities, kEntropy };  // kEntropy: probabilities whose own entropy counts

// How the hard part's exponentials come from the soft part's: not at all (kOwn), or as their T-th power.
enum Power { kOwn = -1, kNoHard = 0, kSame = 1, kSquare = 2, kCube = 3, kFourth = 4 };

template <int P>
SE_INLINE Vec raised(Vec e) {
    if constexpr (P == kSquare) return mul(e, e);
    if constexpr (P == kCube) return mul(mul(e, e), e);
    if constexpr (P == kFourth) {
        e = mul(e, e);
        return mul(e, e);
    }
    return e;
}

// What is kept of a row between the passes: its exponentials, each relative to the largest logit by then, which is kept per block.
struct Kept {
    float *student, *teacher, *hard;  // [classes]
    float *tops, *teacher_tops;       // [blocks]
    Kept(float* scratch, int64_t classes) {
        const int64_t padded = (classes + 15) / 16 * 16, blocks = (classes + kFast - 1) / kFast;
        student = scratch, teacher = student + padded, hard = teacher + padded, tops = hard + padded, teacher_tops = tops + blocks;
    }
};

float largest_of_block(const float* x, int64_t n) {
    Vec most[4] = {splat(-std::numeric_limits<float>::infinity())};
    most[1] = most[2] = most[3] = most[0];
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) most[u] = at_least(load(x + i + u * kLanes), most[u]);
    for (; i + kLanes <= n; i += kLanes) most[0] = at_least(load(x + i), most[0]);
    float lanes[kLanes], best = -std::numeric_limits<float>::infinity();
    store(lanes, at_least(at_least(most[0], most[1]), at_least(most[2], most[3])));
    // A NaN may get lost here: its exponential is NaN anyway.
    for (float lane : lanes) best = lane > best ? lane : best;
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

// Sums over one block.
template <int T, int P>
struct FirstPass {
    const float *z, *t;
    float *student, *teacher, *hard_kept;  // of the block, or null: nothing is kept
    Vec top, teacher_top, scale, hard_scale, kl, inverse;
    Vec hard[2], soft[2], given[2], cross[2];

    // Classes [i, i + kLanes). Not Whole: those in `bits`, of which `counted` go into the sum of the hard part.
    template <int U, bool Whole>
    SE_INLINE void step(int64_t i, uint32_t bits = 0, uint32_t counted = 0) {
        __builtin_prefetch(z + i + kFast);
        const Vec dz = sub(Whole ? load(z + i) : load_bits(z + i, bits), top);
        Vec e = power_of_two(dz, scale);
        if constexpr (!Whole) e = keep_bits(e, bits);
        if constexpr (P != kNoHard) {
            Vec h = raised<P>(e);
            if constexpr (P == kOwn) {
                h = power_of_two(dz, hard_scale);
                if constexpr (!Whole) h = keep_bits(h, bits);
                if (hard_kept) store(hard_kept + i, h);
            }
            hard[U] = add(hard[U], Whole ? h : keep_bits(h, counted));
        }
        if (student) store(student + i, e);
        if constexpr (T == kNone) return;
        soft[U] = add(soft[U], e);
        __builtin_prefetch(t + i + kFast);
        const Vec given_here = Whole ? load(t + i) : load_bits(t + i, bits);
        if constexpr (T == kLogits) {
            const Vec dt = sub(given_here, teacher_top);
            Vec q = power_of_two(dt, scale);
            if constexpr (!Whole) q = keep_bits(q, bits);
            if (teacher) store(teacher + i, q);
            given[U] = add(given[U], q);
            cross[U] = add_share(cross[U], q, sub(mul(kl, dt), dz));
        } else {
            given[U] = add(given[U], given_here);
            Vec own = mul(dz, inverse);
            if constexpr (T == kEntropy) own = sub(own, logarithm(given_here));
            cross[U] = add_share(cross[U], given_here, own);  // its negative
        }
    }

    void run(int64_t n, int64_t label) {  // label: within the block, or −1
        FirstPass p = *this;              // whose vectors stay in registers: a store could change what `this` points to
        for (int u = 0; u < 2; u++) p.hard[u] = p.soft[u] = p.given[u] = p.cross[u] = zero();
        const uint32_t all = low_bits(kLanes);
        const int64_t apart = label < 0 ? n : label / kLanes * kLanes, whole = n / kLanes * kLanes;
        int64_t i = 0;
        for (const int64_t end : {std::min(apart, whole), whole}) {
            for (; i + 2 * kLanes <= end; i += 2 * kLanes) p.template step<0, true>(i), p.template step<1, true>(i + kLanes);
            if (i < end) p.template step<0, true>(i), i += kLanes;
            if (i < whole) {
                p.template step<1, false>(i, all, all & ~(1u << (label - i)));
                i += kLanes;
            }
        }
        if (whole < n) {
            const uint32_t bits = low_bits(n - whole);
            p.template step<1, false>(whole, bits, apart == whole ? bits & ~(1u << (label - apart)) : bits);
        }
        std::copy(p.hard, p.hard + 2, hard), std::copy(p.soft, p.soft + 2, soft);
        std::copy(p.given, p.given + 2, given), std::copy(p.cross, p.cross + 2, cross);
    }
};

struct Sums {
    double hard = 0, soft = 0, given = 0, cross = 0, smoothed = 0;
};

// Σ w (z − top) and Σ w over one block, for label smoothing; nothing where w = 0, whatever z is.
void smoothed_block(const float* z, const float* weights, int64_t n, float top, double* logits, double* weight) {
    Vec sum = zero(), mass = zero(), shift = splat(top);
    for (int64_t i = 0; i < n; i += kLanes) {
        const uint32_t bits = low_bits(std::min<int64_t>(kLanes, n - i));
        const Vec w = weights ? load_bits(weights + i, bits) : keep_bits(splat(1.0f), bits);
        sum = add_share(sum, w, sub(load_bits(z + i, bits), shift)), mass = add(mass, w);
    }
    *logits = sparse_engine::SE_ISA::sum(sum), *weight = sparse_engine::SE_ISA::sum(mass);
}

template <int T, int P>
void first_pass(const KDRowArgs& a, Row& r, Sums& s, const Kept& kept) {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    const double log2_e = 1.4426950408889634, inverse = T == kNone ? 1.0 : r.inverse;
    const bool keep = a.gradient || a.probabilities;
    FirstPass<T, P> pass{};
    pass.scale = splat(static_cast<float>(log2_e * inverse * kSteps)), pass.hard_scale = splat(static_cast<float>(log2_e * kSteps));
    pass.kl = splat(a.kl ? 1.0f : 0.0f), pass.inverse = splat(static_cast<float>(inverse));
    r.top = r.teacher_top = kNothing;
    for (int64_t from = 0, block = 0; from < a.classes; from += kFast, block++) {
        const int64_t n = std::min(kFast, a.classes - from);
        pass.z = a.logits + from, pass.t = T == kNone ? nullptr : a.teacher + from;
        const float most = largest_of_block(pass.z, n);
        if (most > r.top) {
            s.soft *= std::exp((static_cast<double>(r.top) - most) * inverse);
            s.hard *= std::exp(static_cast<double>(r.top) - most);
            r.top = most;
        }
        // Where all logits so far are −∞ (or NaN), any number will do.
        const float top = r.top == kNothing ? 0.0f : r.top;
        float teacher_top = 0;
        if constexpr (T == kLogits) {
            const float theirs = largest_of_block(pass.t, n);
            if (theirs > r.teacher_top) {
                const double less = std::exp((static_cast<double>(r.teacher_top) - theirs) * inverse);
                s.given *= less, s.cross *= less;
                r.teacher_top = theirs;
            }
            teacher_top = r.teacher_top == kNothing ? 0.0f : r.teacher_top;
        }
        if (keep) {
            kept.tops[block] = r.top, kept.teacher_tops[block] = r.teacher_top;
            pass.student = kept.student + from, pass.teacher = kept.teacher + from, pass.hard_kept = kept.hard + from;
        }
        pass.top = splat(top), pass.teacher_top = splat(teacher_top);
        pass.run(n, P != kNoHard && r.exists && a.label >= from && a.label < from + n ? a.label - from : -1);
        s.hard += sum(add(pass.hard[0], pass.hard[1])), s.soft += sum(add(pass.soft[0], pass.soft[1]));
        const double given = sum(add(pass.given[0], pass.given[1])), cross = sum(add(pass.cross[0], pass.cross[1]));
        s.given += given;
        if constexpr (T == kLogits) s.cross += cross + ((a.kl ? static_cast<double>(teacher_top) : 0.0) - top) * given;
        if constexpr (T == kProbabilities || T == kEntropy) s.cross -= cross + static_cast<double>(top) * inverse * given;
        if (P != kNoHard && r.spread != 0) {
            double logits, weight;
            smoothed_block(pass.z, a.class_weights ? a.class_weights + from : nullptr, n, top, &logits, &weight);
            s.smoothed += logits + static_cast<double>(top) * weight;
        }
    }
}

// g = hard · e_h + soft · e − theirs · q − spread · w over one block; the largest magnitude but for the label's goes to `most`.
template <int T, int P>
SE_INLINE Vec gradient_of_block(const KDRowArgs& a, int64_t from, int64_t n, int64_t label, const float* student, const float* hard_kept,
                                const float* given, float hard, float soft, float theirs, float spread, bool streamed, Vec most) {
    const Vec h = splat(hard), s = splat(soft), t = splat(-theirs), w = splat(-spread);
    float* to = a.gradient + from;
    const float* weights = a.class_weights ? a.class_weights + from : nullptr;
    auto step = [&](int64_t i, auto in) {
        Vec g = zero();
        if constexpr (P == kOwn) g = mul(h, in(hard_kept + i));
        if constexpr (P != kOwn && P != kNoHard) g = mul(h, raised<P>(in(student + i)));
        if constexpr (T != kNone) g = fma(t, in(given + i), fma(s, in(student + i), g));
        if (spread != 0) g = fma(w, weights ? in(weights + i) : splat(1.0f), g);
        return g;
    };
    auto steps = [&](int64_t i, int64_t end) {
        for (; i < end; i += kLanes) {
            const Vec g = step(i, [](const float* p) { return load(p); });
            most = at_least(magnitude(g), most);
            if (streamed) {
                stream(to + i, g);
            } else {
                store(to + i, g);
            }
        }
    };
    auto apart = [&](int64_t i, uint32_t bits, uint32_t counted) {
        const Vec g = step(i, [bits](const float* p) { return load_bits(p, bits); });
        store_bits(to + i, g, bits);
        most = at_least(keep_bits(magnitude(g), counted), most);
    };
    const int64_t whole = n / kLanes * kLanes, of_label = label >= 0 && label < n ? label / kLanes * kLanes : n;
    const uint32_t all = low_bits(kLanes), but_label = of_label < n ? ~(1u << (label - of_label)) : all;
    steps(0, std::min(of_label, whole));
    if (of_label < whole) {
        apart(of_label, all, all & but_label);
        steps(of_label + kLanes, whole);
    }
    if (whole < n) apart(whole, low_bits(n - whole), of_label == whole ? low_bits(n - whole) & but_label : low_bits(n - whole));
    return most;
}

// Returns the largest magnitude of the gradient.
template <int T, int P>
float second_pass(const KDRowArgs& a, const Row& r, const Kept& kept) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const double inverse = a.teacher ? r.inverse : 1.0, factor = a.soft_scale * a.temperature;
    const double hard = r.exists ? a.hard_scale * (r.weight + r.all) / r.sum : nan, soft = factor * r.mass / r.student,
                 theirs = a.soft_targets ? factor : factor / r.teacher;
    const float spread = P == kNoHard ? 0.0f : static_cast<float>(a.hard_scale * r.spread);
    const int64_t label = P != kNoHard && r.exists ? a.label : -1;
    const bool streamed = a.streamed && reinterpret_cast<uintptr_t>(a.gradient) % (kLanes * sizeof(float)) == 0;
    Vec most = zero();
    double label_gradient = 0;
    for (int64_t from = 0, block = 0; from < a.classes; from += kFast, block++) {
        const int64_t n = std::min(kFast, a.classes - from), here = label - from;
        // Exponentials that were kept before a larger logit was met.
        double less = 1, hard_less = 1, theirs_less = 1;
        if (kept.tops[block] != r.top) {
            less = std::exp((static_cast<double>(kept.tops[block]) - r.top) * inverse);
            hard_less = std::exp(static_cast<double>(kept.tops[block]) - r.top);
        }
        if (T == kLogits && kept.teacher_tops[block] != r.teacher_top)
            theirs_less = std::exp((static_cast<double>(kept.teacher_tops[block]) - r.teacher_top) * inverse);
        const float* given = T == kLogits ? kept.teacher + from : T == kNone ? nullptr : a.teacher + from;
        if (here >= 0 && here < n) {
            label_gradient = a.hard_scale * (r.spread * (r.weights * ((r.sum - r.others) / r.sum) - class_weight(a, label)) -
                                             r.weight * (r.others / r.sum));
            if constexpr (T != kNone) label_gradient += soft * less * kept.student[label] - theirs * theirs_less * given[here];
        }
        most = gradient_of_block<T, P>(a, from, n, here, kept.student + from, kept.hard + from, given, static_cast<float>(hard * hard_less),
                                       static_cast<float>(soft * less), static_cast<float>(theirs * theirs_less), spread, streamed, most);
    }
#if defined(__AVX2__)
    if (streamed) _mm_sfence();
#endif
    float lanes[kLanes], largest = 0;
    store(lanes, most);
    for (float lane : lanes) largest = lane > largest || std::isnan(lane) ? lane : largest;
    if (label >= 0) {
        a.gradient[label] = static_cast<float>(label_gradient);
        const float there = std::fabs(a.gradient[label]);
        largest = there > largest || std::isnan(there) ? there : largest;
    }
    return largest;
}

using FirstPassKernel = void (*)(const KDRowArgs&, Row&, Sums&, const Kept&);
using SecondPassKernel = float (*)(const KDRowArgs&, const Row&, const Kept&);

template <int T>
FirstPassKernel first_pass_for(int power) {
    switch (power) {
        case kNoHard: return first_pass<T, kNoHard>;
        case kSame: return first_pass<T, kSame>;
        case kSquare: return first_pass<T, kSquare>;
        case kCube: return first_pass<T, kCube>;
        case kFourth: return first_pass<T, kFourth>;
        default: return first_pass<T, kOwn>;
    }
}

template <int T>
SecondPassKernel second_pass_for(int power) {
    switch (power) {
        case kNoHard: return second_pass<T, kNoHard>;
        case kSame: return second_pass<T, kSame>;
        case kSquare: return second_pass<T, kSquare>;
        case kCube: return second_pass<T, kCube>;
        case kFourth: return second_pass<T, kFourth>;
        default: return second_pass<T, kOwn>;
    }
}

int power_of(const KDRowArgs& a) {
    if (!a.hard) return kNoHard;
    if (!a.teacher) return kSame;
    for (int power : {kSame, kSquare, kCube, kFourth})
        if (a.temperature == power) return power;
    return kOwn;
}

// Losses and gradient of a row, with the row's sums in r. Returns the largest magnitude of the gradient.
float fast_row(KDRowArgs& a, Row& r) {
    const Kept kept(a.scratch, a.classes);
    const int power = power_of(a);
    Sums s;
    if (!a.teacher) {
        first_pass<kNone, kSame>(a, r, s, kept);
    } else if (!a.soft_targets) {
        first_pass_for<kLogits>(power)(a, r, s, kept);
    } else if (a.kl) {
        first_pass_for<kEntropy>(power)(a, r, s, kept);
    } else {
        first_pass_for<kProbabilities>(power)(a, r, s, kept);
    }
    if (a.hard) {
        r.others = s.hard;
        r.sum = r.others + (r.exists ? std::exp(static_cast<double>(a.logits[a.label]) - r.top) : 0.0);
        const double log_sum = std::log(r.sum), nan = std::numeric_limits<double>::quiet_NaN();
        double loss = r.exists ? -r.weight * ((static_cast<double>(a.logits[a.label]) - r.top) - log_sum) : nan;
        if (r.spread != 0) loss -= r.spread * (s.smoothed - r.top * r.weights) - r.all * log_sum;
        a.hard_loss = static_cast<float>(loss);
    }
    if (a.teacher) {
        r.student = s.soft;
        const double log_student = std::log(r.student) + r.top * r.inverse;
        double loss;
        if (a.soft_targets) {
            r.mass = s.given;
            loss = s.cross + r.mass * log_student;
        } else {
            r.teacher = s.given;
            loss = s.cross / r.teacher * r.inverse + log_student;
            if (a.kl) loss -= std::log(r.teacher) + r.teacher_top * r.inverse;
        }
        a.soft_loss = static_cast<float>(a.temperature * a.temperature * loss);
    }
    if (!a.gradient) return 0;
    const bool hard = a.hard && a.hard_scale != 0, soft = a.teacher && a.soft_scale != 0;
    if (!hard && !soft) {
        std::fill(a.gradient, a.gradient + a.classes, 0.0f);
        return 0;
    }
    const int used = hard ? power : kNoHard;
    if (!soft) return second_pass_for<kNone>(used)(a, r, kept);
    return (a.soft_targets ? second_pass_for<kProbabilities>(used) : second_pass_for<kLogits>(used))(a, r, kept);
}

// A bound on the terms of the gradient's elements.
double largest_term(const KDRowArgs& a, const Row& r) {
    double bound = 0;
    if (a.hard) {
        double heaviest = r.spread != 0 && a.class_weights ? largest(a.class_weights, a.classes) : 1.0;
        bound += std::fabs(a.hard_scale) * (r.weight * (r.others / r.sum) + r.all / r.sum + r.spread * heaviest);
    }
    if (a.teacher) {
        double likeliest = a.soft_targets ? largest(a.teacher, a.classes) : 1 / r.teacher;
        bound += std::fabs(a.soft_scale) * a.temperature * (r.mass / r.student + likeliest);
    }
    return bound;
}

void repair_gradient(const KDRowArgs& a, Row r) {
    add_exponentials(a, r);
    if (a.teacher && a.soft_targets) {
        double sums[kSums] = {};
        add_up(sums, a.classes, [&](int64_t c) { return a.teacher[c]; });
        r.mass = total(sums);
    }
    double q[kBlock];
    for (int64_t from = 0; from < a.classes; from += kBlock) {
        int64_t count = std::min(kBlock, a.classes - from);
        if (a.teacher) teacher_block(a, r, from, count, q);
        gradient_block(a, r, from, count, q);
    }
}

// softmax(z), from the exponentials that were kept at temperature 1. Only at the very end: it may replace the teacher's probabilities.
void write_probabilities(const KDRowArgs& a, const Row& r) {
    const Kept kept(a.scratch, a.classes);
    const double sum = a.hard ? r.sum : r.student;
    for (int64_t from = 0, block = 0; from < a.classes; from += kFast, block++) {
        const double less = kept.tops[block] == r.top ? 1.0 : std::exp(static_cast<double>(kept.tops[block]) - r.top);
        const Vec share = splat(static_cast<float>(less / sum));
        const int64_t end = std::min(from + kFast, a.classes);
        int64_t i = from;
        for (; i + kLanes <= end; i += kLanes) store(a.probabilities + i, mul(share, load(kept.student + i)));
        if (i < end) store_bits(a.probabilities + i, mul(share, load(kept.student + i)), low_bits(end - i));
    }
}

void losses_and_gradient(KDRowArgs& a, Row& r) {
    r.inverse = 1 / a.temperature;
    if (a.hard) {
        r.exists = a.label >= 0 && a.label < a.classes;
        r.weight = r.exists ? (1 - a.label_smoothing) * class_weight(a, a.label) : 0.0;
        r.spread = a.label_smoothing / static_cast<double>(a.classes);
        r.weights = a.class_weights ? a.class_weight_sum : static_cast<double>(a.classes);
        r.all = r.spread * r.weights;
    }
    a.hard_loss = a.soft_loss = 0;
    const float found = fast_row(a, r);
    if (!a.gradient) return;
    if (a.classes == 1) {
        a.gradient[0] *= 0;  // its probability is 1 whatever the logit is; NaN stays
        return;
    }
    const float wanted = static_cast<float>(largest_term(a, r) / kCancels);
    if (wanted > 0 && found < wanted) repair_gradient(a, r);  // neither where there is nothing to lose, nor with NaN
}

void kd_row(KDRowArgs& a) {
    Row r;
    losses_and_gradient(a, r);
    if (a.probabilities) write_probabilities(a, r);
}

}  // namespace

void fill_losses(KernelTable& t) { t.kd_row = kd_row; }

}  // namespace SE_ISA
}  // namespace sparse_engine
