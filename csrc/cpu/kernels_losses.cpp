// Softmax losses over one row of logits: maximum, sums of exponentials, then losses and gradient, in blocks that stay in L1.
//
// A row is read three times (from L1 or L2 after the first) and the gradient written once: 3·C floats of memory traffic with a teacher.
//
// The gradient is a difference of probabilities. Where student and teacher, or the two parts, all but agree, float keeps little of it: such
// rows are recognised by what is left, and computed once more in double (three times the time of an ordinary row).
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

constexpr int64_t kBlock = 512;
constexpr int kSums = 16;  // independent partial sums: a chain of additions would wait four cycles for each

// A gradient whose largest element is this much smaller than its terms is computed again in double. Float leaves an error of about 1e-7 of
// the largest term, so a gradient that is kept is right to 3e-6 of its largest element; the contract is 1e-5.
constexpr double kCancels = 32;

// to[i] = e^((x[i] − top) / T)
void exponentials(const float* x, int64_t n, float top, double inverse_temperature, float* to) {
    Vec shift = splat(top), scale = splat(static_cast<float>(inverse_temperature));
    for (int64_t i = 0; i < n; i += kLanes) {
        uint32_t bits = low_bits(std::min<int64_t>(kLanes, n - i));
        store_bits(to + i, exp(mul(sub(load_bits(x + i, bits), shift), scale)), bits);
    }
}

// The same in double, to 1e-14 of itself; the compiler makes vectors of it. e^x = 2^n · e^r as in simd.h, with n taken from the low bits of
// x / ln 2 + 1.5 · 2^52, which the addition rounds to an integer.
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

// Whether any |x[i]| ≥ bound; stops at the first block that has one.
bool reaches(const float* x, int64_t n, float bound) {
    for (int64_t from = 0; from < n; from += kBlock) {
        int64_t count = std::min(kBlock, n - from);
        int found = 0;
        for (int64_t i = from; i < from + count; i++) found |= std::fabs(x[i]) >= bound;
        if (found) return true;
    }
    return false;
}

template <class T, class F>
SE_INLINE void add_up(T (&sums)[kSums], int64_t n, F term) {
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
        for (int j = 0; j < kSums; j++) sums[j] += term(i + j);
    for (; i < n; i++) sums[i % kSums] += term(i);
}

template <class T>
double total(const T (&sums)[kSums]) {
    double s = 0;
    for (T v : sums) s += v;
    return s;
}

// Σ e^((x − top) / T) over all classes but `without` (−1: none), whose own exponential goes to `*left_out`.
template <class T>
double sum_of_exponentials(const float* x, int64_t n, float top, double inverse_temperature, int64_t without = -1,
                           double* left_out = nullptr) {
    double sums[kSums] = {};  // over a long row, rounding to float would add up
    T block[kBlock];
    for (int64_t from = 0; from < n; from += kBlock) {
        int64_t count = std::min(kBlock, n - from);
        exponentials(x + from, count, top, inverse_temperature, block);
        if (without >= from && without < from + count) {
            *left_out = block[without - from];
            block[without - from] = 0;
        }
        T part[kSums] = {};
        add_up(part, count, [&](int64_t i) { return block[i]; });
        for (int j = 0; j < kSums; j++) sums[j] += part[j];
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
    double weight = 0, spread = 0, all = 0;  // (1 − ε) w_y, ε / C, and ε / C · Σ w
    bool exists = false;                     // the label is a class
};

SE_INLINE float class_weight(const KDRowArgs& a, int64_t c) { return a.class_weights ? a.class_weights[c] : 1.0f; }

template <class T>
void add_exponentials(const KDRowArgs& a, Row& r) {
    const int64_t n = a.classes;
    if (a.hard) {
        double own = 0;
        r.others = sum_of_exponentials<T>(a.logits, n, r.top, 1.0, r.exists ? a.label : -1, &own);
        r.sum = r.others + own;
    }
    if (!a.teacher) return;
    r.student = a.hard && a.temperature == 1 ? r.sum : sum_of_exponentials<T>(a.logits, n, r.top, r.inverse);
    if (!a.soft_targets) r.teacher = sum_of_exponentials<T>(a.teacher, n, r.teacher_top, r.inverse);
}

template <class T>
void teacher_block(const KDRowArgs& a, const Row& r, int64_t from, int64_t count, T* q) {
    if (a.soft_targets) {
        std::copy(a.teacher + from, a.teacher + from + count, q);
    } else {
        exponentials(a.teacher + from, count, r.teacher_top, r.inverse, q);
        const T share = static_cast<T>(1 / r.teacher);
        for (int64_t i = 0; i < count; i++) q[i] *= share;
    }
}

// The gradient of classes [from, from + count), where the teacher's probabilities are q:
//     hard_scale · (M p − ε/C w) + soft_scale · T · (mass · p_T − q),     M = (1 − ε) w_y + ε/C Σ w
// and for the label, from M p loses (1 − ε) w_y: 1 − p is taken from the other classes' sum, so that it doesn't cancel where p is almost 1.
template <class T>
void gradient_block(const KDRowArgs& a, const Row& r, int64_t from, int64_t count, const T* q) {
    T block[kBlock], e[kBlock];
    T* g = block;
    if constexpr (std::is_same_v<T, float>) g = a.gradient + from;
    const float* z = a.logits + from;
    if (a.hard && a.hard_scale != 0) {
        const T factor = r.exists ? static_cast<T>(a.hard_scale * (r.weight + r.all) / r.sum) : std::numeric_limits<T>::quiet_NaN();
        exponentials(z, count, r.top, 1.0, g);
        for (int64_t i = 0; i < count; i++) g[i] *= factor;
        if (r.exists && a.label >= from && a.label < from + count)
            g[a.label - from] = static_cast<T>(a.hard_scale * (r.all * ((r.sum - r.others) / r.sum) - r.weight * (r.others / r.sum)));
        const T spread = static_cast<T>(a.hard_scale * r.spread);
        if (spread != 0)
            for (int64_t i = 0; i < count; i++) g[i] -= spread * class_weight(a, from + i);
    } else {
        std::fill(g, g + count, T{0});
    }
    if (a.teacher && a.soft_scale != 0) {
        const T factor = static_cast<T>(a.soft_scale * a.temperature), share = static_cast<T>(r.mass / r.student);
        exponentials(z, count, r.top, r.inverse, e);
        for (int64_t i = 0; i < count; i++) g[i] += factor * (e[i] * share - q[i]);
    }
    if constexpr (!std::is_same_v<T, float>)
        for (int64_t i = 0; i < count; i++) a.gradient[from + i] = static_cast<float>(g[i]);
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
    add_exponentials<double>(a, r);
    double q[kBlock];
    for (int64_t from = 0; from < a.classes; from += kBlock) {
        int64_t count = std::min(kBlock, a.classes - from);
        if (a.teacher) teacher_block(a, r, from, count, q);
        gradient_block(a, r, from, count, q);
    }
}

double hard_loss(const KDRowArgs& a, const Row& r) {
    if (!r.exists) return std::numeric_limits<double>::quiet_NaN();
    const float* z = a.logits;
    const double log_sum = std::log(r.sum);
    double loss = -r.weight * ((static_cast<double>(z[a.label]) - r.top) - log_sum);
    if (r.spread != 0) {
        const float spread = static_cast<float>(r.spread), shift = static_cast<float>(log_sum);
        float sums[kSums] = {};
        add_up(sums, a.classes, [&](int64_t c) {
            float s = spread * class_weight(a, c);
            return s != 0 ? s * ((z[c] - r.top) - shift) : 0.0f;
        });
        loss -= total(sums);
    }
    return loss;
}

void kd_row(KDRowArgs& a) {
    const int64_t n = a.classes;
    Row r;
    r.top = largest(a.logits, n), r.inverse = 1 / a.temperature;
    if (a.hard) {
        r.exists = a.label >= 0 && a.label < n;
        r.weight = r.exists ? (1 - a.label_smoothing) * class_weight(a, a.label) : 0.0;
        r.spread = a.label_smoothing / static_cast<double>(n);
        double sums[kSums] = {};
        if (r.spread != 0) add_up(sums, n, [&](int64_t c) { return class_weight(a, c); });
        r.all = r.spread * total(sums);
    }
    if (a.teacher && a.soft_targets) {
        double sums[kSums] = {};
        add_up(sums, n, [&](int64_t c) { return a.teacher[c]; });
        r.mass = total(sums);
    } else if (a.teacher) {
        r.teacher_top = largest(a.teacher, n);
    }
    add_exponentials<float>(a, r);

    a.hard_loss = a.hard ? static_cast<float>(hard_loss(a, r)) : 0.0f;
    const float top = r.top, teacher_top = r.teacher_top, inverse = static_cast<float>(r.inverse);
    const float log_student = static_cast<float>(std::log(r.student)), log_teacher = static_cast<float>(std::log(r.teacher));
    float sums[kSums] = {}, q[kBlock];
    for (int64_t from = 0; from < n && (a.teacher || a.gradient); from += kBlock) {
        int64_t count = std::min(kBlock, n - from);
        if (a.teacher) {
            const float *zs = a.logits + from, *ts = a.teacher + from;
            teacher_block(a, r, from, count, q);
            if (a.soft_targets && a.kl) {
                add_up(sums, count, [&](int64_t i) {
                    return q[i] > 0 ? q[i] * (std::log(q[i]) - ((zs[i] - top) * inverse - log_student)) : q[i] * 0.0f;
                });
            } else {
                add_up(sums, count, [&](int64_t i) {
                    float own = a.kl ? (ts[i] - teacher_top) * inverse - log_teacher : 0.0f;
                    float term = q[i] * (own - ((zs[i] - top) * inverse - log_student));
                    return q[i] == 0 ? 0.0f : term;
                });
            }
        }
        if (a.gradient) gradient_block(a, r, from, count, q);
    }
    a.soft_loss = static_cast<float>(a.temperature * a.temperature * total(sums));
    if (!a.gradient) return;
    if (n == 1) a.gradient[0] *= 0;  // its probability is 1 whatever the logit is; NaN stays
    const float wanted = static_cast<float>(largest_term(a, r) / kCancels);
    if (!(wanted > 0) || n == 1) return;  // nothing to lose, or NaN
    if (r.exists && std::fabs(a.gradient[a.label]) >= wanted) return;
    if (!reaches(a.gradient, n, wanted)) repair_gradient(a, r);
}

}  // namespace

void fill_losses(KernelTable& t) { t.kd_row = kd_row; }

}  // namespace SE_ISA
}  // namespace sparse_engine
