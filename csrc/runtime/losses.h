// Cross entropy and distillation loss of many rows at once, with their gradient; the formulas are in sparse_engine/ops/kd_loss.py.
#pragma once

#include <cstdint>

namespace sparse_engine {

struct KDBatch {
    int64_t rows = 0, classes = 0;
    const float* logits = nullptr;
    int64_t pitch = 0;               // floats from one row to the next
    const float* teacher = nullptr;  // logits, or probabilities where soft_targets; or null
    int64_t teacher_pitch = 0;
    int64_t teacher_from = 0;  // rows before it have no teacher: the teacher's first row belongs to this one
    // Or the teacher is a table: row b's probabilities are row samples[b] of it, which becomes softmax(logits) of row b (of an ignored one
    // too) once it has been used. At temperature 1 only.
    float* table = nullptr;
    int64_t table_rows = 0;
    const int64_t* samples = nullptr;      // [rows]
    const int64_t* labels = nullptr;       // [rows] or null: no hard part and no ignored row
    const float* class_weights = nullptr;  // [classes] or null
    double temperature = 1, label_smoothing = 0;
    bool hard = true, soft_targets = false, kl = true;
    int64_t ignore_index = -100;
    float* gradient = nullptr;  // or null
    int64_t gradient_pitch = 0;

    void check() const;  // throws std::invalid_argument
};

// Per row: both losses, and the gradient of hard_scale · hard + soft_scale · soft. Scales: [rows], or null for ones.
void kd_rows(const KDBatch& batch, const float* hard_scale, const float* soft_scale, float* hard_loss, float* soft_loss);

enum class LossReduction : int { none, mean, sum };

struct KDReduction {
    double hard_weight = 1, soft_weight = 1;
    const float* sample_weights = nullptr;  // [rows] or null
    LossReduction kind = LossReduction::mean;
};

// loss = hard_weight · hard + soft_weight · soft, hard and soft, each summed over the rows in double: one number, or [rows] without
// reduction. The mean runs over the rows that are not ignored; that of the hard part, with class weights, over the weights of their labels.
// The gradient is that of the (summed) loss. The mean of the soft part runs over the rows that have a teacher.
// False, and nothing done, where a sample of a table occurs twice in the batch: which prediction it keeps must not depend on the threads.
bool kd_loss(const KDBatch& batch, const KDReduction& reduction, float* loss, float* hard, float* soft);

}  // namespace sparse_engine
