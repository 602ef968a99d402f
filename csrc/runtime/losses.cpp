#include "runtime/losses.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "cpu/kernels.h"

namespace sparse_engine {
namespace {

constexpr int64_t kItem = 16384;  // classes of one work item: some ten microseconds

// A thread's room for the exponentials of a row; kept, because a new one would be paged in at every call.
float* scratch_of_thread(size_t floats) {
    static thread_local AlignedBuffer buffer;
    buffer.reserve(floats * sizeof(float));
    return buffer.as<float>();
}

void run_rows(const KDBatch& b, const float* hard_scale, const float* soft_scale, float* hard_loss, float* soft_loss) {
    const KernelTable& k = kernels();
    double weight_sum = 0;
    for (int64_t c = 0; b.class_weights && c < b.classes; c++) weight_sum += b.class_weights[c];
    // A gradient that does not fit the cache is written past it: written through it, its lines would be read first.
    const size_t l3 = cpu_info().l3_bytes ? cpu_info().l3_bytes : cpu_info().l2_bytes;
    const bool streamed = b.gradient && static_cast<size_t>(b.rows) * static_cast<size_t>(b.classes) * sizeof(float) > l3 / 2;
    const int64_t group = std::max<int64_t>(1, kItem / b.classes);
    parallel_for((b.rows + group - 1) / group, b.rows * b.classes < kItem ? 1 : num_threads(), [&](int64_t item, int) {
        for (int64_t row = item * group; row < std::min(b.rows, (item + 1) * group); row++) {
            KDRowArgs a{};
            a.logits = b.logits + row * b.pitch;
            a.teacher = b.teacher && row >= b.teacher_from ? b.teacher + (row - b.teacher_from) * b.teacher_pitch : nullptr;
            if (b.table) a.teacher = a.probabilities = b.table + b.samples[row] * b.classes;
            a.class_weights = b.class_weights, a.class_weight_sum = weight_sum;
            a.gradient = b.gradient ? b.gradient + row * b.gradient_pitch : nullptr;
            a.classes = b.classes, a.label = b.labels ? b.labels[row] : 0;
            a.hard = b.hard && b.labels, a.soft_targets = b.soft_targets, a.kl = b.kl;
            a.temperature = b.temperature, a.label_smoothing = b.label_smoothing;
            a.hard_scale = hard_scale ? hard_scale[row] : 1.0f, a.soft_scale = soft_scale ? soft_scale[row] : 1.0f;
            a.scratch = b.gradient || b.table ? scratch_of_thread(kd_scratch_floats(b.classes)) : nullptr, a.streamed = streamed;
            if (b.labels && b.labels[row] == b.ignore_index) {
                if (a.gradient) std::fill(a.gradient, a.gradient + b.classes, 0.0f);
                if (a.probabilities) {
                    a.gradient = nullptr, a.teacher = nullptr, a.hard = true, a.label = -1;
                    k.kd_row(a);
                    a.hard_loss = a.soft_loss = 0;
                }
            } else {
                k.kd_row(a);
            }
            hard_loss[row] = a.hard_loss, soft_loss[row] = a.soft_loss;
        }
    });
}

}  // namespace

void KDBatch::check() const {
    if (rows < 0 || classes < 1 || !(temperature > 0)) throw std::invalid_argument("kd: rows, classes or temperature out of range");
    if (teacher_from < 0 || teacher_from > rows) throw std::invalid_argument("kd: the teacher's first row is none of the rows");
    if (!table) return;
    if (temperature != 1 || !soft_targets || teacher || !samples) throw std::invalid_argument("kd: a table holds targets at temperature 1");
    for (int64_t row = 0; row < rows; row++)
        if (samples[row] < 0 || samples[row] >= table_rows)
            throw std::out_of_range("sample " + std::to_string(samples[row]) + " is not in the table, which has " +
                                    std::to_string(table_rows));
}

void kd_rows(const KDBatch& b, const float* hard_scale, const float* soft_scale, float* hard_loss, float* soft_loss) {
    b.check();
    run_rows(b, hard_scale, soft_scale, hard_loss, soft_loss);
}

bool kd_loss(const KDBatch& b, const KDReduction& r, float* loss, float* hard_loss, float* soft_loss) {
    b.check();
    if (b.table) {
        std::vector<int64_t> sorted(b.samples, b.samples + b.rows);
        std::sort(sorted.begin(), sorted.end());
        if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) return false;
    }
    auto ignored = [&](int64_t row) { return b.labels && b.labels[row] == b.ignore_index; };
    double weight = 1, count = 1;  // what the means of the hard and of the soft part divide by
    if (r.kind == LossReduction::mean) {
        int64_t valid = 0, taught = 0;
        double of_labels = 0;
        for (int64_t row = 0; row < b.rows; row++) {
            if (ignored(row)) continue;
            valid++, taught += row >= b.teacher_from;
            if (b.labels && b.class_weights && b.labels[row] >= 0 && b.labels[row] < b.classes) of_labels += b.class_weights[b.labels[row]];
        }
        weight = static_cast<double>(std::max<int64_t>(1, valid)), count = static_cast<double>(std::max<int64_t>(1, taught));
        if (b.labels && b.class_weights) weight = of_labels > 0 ? of_labels : 1;
    }
    const auto rows = static_cast<size_t>(b.rows);
    std::vector<float> work(4 * rows);
    float *hard_scale = work.data(), *soft_scale = hard_scale + rows, *hard = soft_scale + rows, *soft = hard + rows;
    for (size_t row = 0; row < rows; row++) {
        const double factor = r.sample_weights ? r.sample_weights[row] : 1.0;
        hard_scale[row] = static_cast<float>(factor / weight * r.hard_weight);
        soft_scale[row] = static_cast<float>(factor / count * r.soft_weight);
    }
    run_rows(b, hard_scale, soft_scale, hard, soft);
    double total_hard = 0, total_soft = 0;
    for (size_t row = 0; row < rows; row++) {
        const double factor = r.sample_weights ? r.sample_weights[row] : 1.0;
        const double own_hard = hard[row] * factor / weight, own_soft = soft[row] * factor / count;
        if (r.kind == LossReduction::none) {
            loss[row] = static_cast<float>(r.hard_weight * own_hard + r.soft_weight * own_soft);
            hard_loss[row] = static_cast<float>(own_hard), soft_loss[row] = static_cast<float>(own_soft);
        } else {
            total_hard += own_hard, total_soft += own_soft;
        }
    }
    if (r.kind == LossReduction::none) return true;
    *loss = static_cast<float>(r.hard_weight * total_hard + r.soft_weight * total_soft);
    *hard_loss = static_cast<float>(total_hard), *soft_loss = static_cast<float>(total_soft);
    return true;
}

}  // namespace sparse_engine
