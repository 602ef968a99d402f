// Softmax losses over one row of logits: maximum, sums of exponentials, then losses and gradient, in blocks that stay in L1.
//
// A row is read three times (from L1 or L2 after the first) and the gradient written once: 3·C floats of memory traffic with a teacher.
#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

constexpr int64_t kBlock = 512;
constexpr int kSums = 16;  // independent partial sums: a chain of additions would wait four cycles for each

// to[i] = e^((x[i] − top) / T)
void exponentials(const float* x, int64_t n, float top, float inverse_temperature, float* to) {
    Vec shift = splat(top), scale = splat(inverse_temperature);
    for (int64_t i = 0; i < n; i += kLanes) {
        uint32_t bits = low_bits(std::min<int64_t>(kLanes, n - i));
        store_bits(to + i, exp(mul(sub(load_bits(x + i, bits), shift), scale)), bits);
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
SE_INLINE void add_up(float (&sums)[kSums], int64_t n, F term) {
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
        for (int j = 0; j < kSums; j++) sums[j] += term(i + j);
    for (; i < n; i++) sums[i % kSums] += term(i);
}

double total(const float (&sums)[kSums]) {
    double s = 0;
    for (float v : sums) s += v;
    return s;
}

double sum_of_exponentials(const float* x, int64_t n, float top, float inverse_temperature) {
    float sums[kSums] = {}, block[kBlock];
    for (int64_t from = 0; from < n; from += kBlock) {
        int64_t count = std::min(kBlock, n - from);
        exponentials(x + from, count, top, inverse_temperature, block);
        add_up(sums, count, [&](int64_t i) { return block[i]; });
    }
    return total(sums);
}

void kd_row(KDRowArgs& a) {
    const int64_t n = a.classes;
    const float* z = a.logits;
    const float inverse = 1.0f / a.temperature, top = largest(z, n);
    a.hard_loss = a.soft_loss = 0;
    if (a.gradient) std::fill(a.gradient, a.gradient + n, 0.0f);
    const float nan = std::numeric_limits<float>::quiet_NaN();

    double sum = 0;  // of e^(z − top)
    if (a.hard || (a.teacher && a.temperature == 1.0f)) sum = sum_of_exponentials(z, n, top, 1.0f);
    if (a.hard) {
        bool exists = a.label >= 0 && a.label < n;
        float log_sum = static_cast<float>(std::log(sum));
        float smoothing = a.label_smoothing / static_cast<float>(n);
        auto weight = [&](int64_t c) { return a.class_weights ? a.class_weights[c] : 1.0f; };
        float mass = exists ? (1 - a.label_smoothing) * weight(a.label) : 0.0f, spread_sum = 0;
        double loss = exists ? -static_cast<double>(mass) * ((z[a.label] - top) - log_sum) : nan;
        if (a.label_smoothing != 0) {
            float sums[kSums] = {}, weights[kSums] = {};
            add_up(sums, n, [&](int64_t c) {
                float s = smoothing * weight(c);
                return s != 0 ? s * ((z[c] - top) - log_sum) : 0.0f;
            });
            add_up(weights, n, [&](int64_t c) { return smoothing * weight(c); });
            loss -= total(sums);
            spread_sum = static_cast<float>(total(weights));
        }
        a.hard_loss = static_cast<float>(loss);
        if (a.gradient && a.hard_scale != 0) {
            float factor = a.hard_scale * static_cast<float>((mass + spread_sum) / sum), scale = a.hard_scale;
            float* g = a.gradient;
            for (int64_t from = 0; from < n; from += kBlock) {
                int64_t count = std::min(kBlock, n - from);
                exponentials(z + from, count, top, 1.0f, g + from);
                for (int64_t i = from; i < from + count; i++) g[i] *= factor;
            }
            if (a.label_smoothing != 0)
                for (int64_t c = 0; c < n; c++) g[c] -= scale * smoothing * weight(c);
            if (exists) {
                g[a.label] -= scale * mass;
            } else {
                std::fill(g, g + n, nan);
            }
        }
    }
    if (!a.teacher) return;

    const float* t = a.teacher;
    double student_sum = a.temperature == 1.0f ? sum : sum_of_exponentials(z, n, top, inverse), teacher_sum = 1;
    float teacher_top = 0, mass = 1;
    if (a.soft_targets) {
        float sums[kSums] = {};
        add_up(sums, n, [&](int64_t c) { return t[c]; });
        mass = static_cast<float>(total(sums));
    } else {
        teacher_top = largest(t, n);
        teacher_sum = sum_of_exponentials(t, n, teacher_top, inverse);
    }
    const float log_student = static_cast<float>(std::log(student_sum)), log_teacher = static_cast<float>(std::log(teacher_sum));
    const float student_scale = static_cast<float>(1 / student_sum), teacher_scale = static_cast<float>(1 / teacher_sum);
    const float factor = a.soft_scale * a.temperature;
    const bool gradient = a.gradient && a.soft_scale != 0, entropy = a.kl;
    float sums[kSums] = {}, p[kBlock], q[kBlock];
    for (int64_t from = 0; from < n; from += kBlock) {
        int64_t count = std::min(kBlock, n - from);
        const float *zs = z + from, *ts = t + from;
        if (a.soft_targets) {
            std::copy(ts, ts + count, q);
        } else {
            exponentials(ts, count, teacher_top, inverse, q);
            for (int64_t i = 0; i < count; i++) q[i] *= teacher_scale;
        }
        if (a.soft_targets && entropy) {
            add_up(sums, count,
                   [&](int64_t i) { return q[i] > 0 ? q[i] * (std::log(q[i]) - ((zs[i] - top) * inverse - log_student)) : q[i] * 0.0f; });
        } else {
            add_up(sums, count, [&](int64_t i) {
                float own = entropy ? (ts[i] - teacher_top) * inverse - log_teacher : 0.0f;
                float term = q[i] * (own - ((zs[i] - top) * inverse - log_student));
                return q[i] == 0 ? 0.0f : term;
            });
        }
        if (gradient) {
            exponentials(zs, count, top, inverse, p);
            float* g = a.gradient + from;
            for (int64_t i = 0; i < count; i++) g[i] += factor * (p[i] * student_scale * mass - q[i]);
        }
    }
    a.soft_loss = static_cast<float>(a.temperature * a.temperature * total(sums));
}

}  // namespace

void fill_losses(KernelTable& t) { t.kd_row = kd_row; }

}  // namespace SE_ISA
}  // namespace sparse_engine
