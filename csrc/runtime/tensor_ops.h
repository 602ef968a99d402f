// Everything that is not a linear operator: elementwise functions, copies, pooling, reductions, normalisation, attention, products of two
// activations.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "runtime/plan.h"

namespace sparse_engine {

// Loops over the same index space for several operands, with dimensions merged and ordered so that the last one is the innermost row.
struct LoopNest {
    LoopNest() = default;
    // strides[operand][dimension]; operand 0 decides the order.
    LoopNest(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& strides);
    std::vector<int64_t> sizes;                 // outer dimensions
    std::vector<std::vector<int64_t>> strides;  // [operand][outer dimension]
    int64_t row = 1;                            // length of the innermost dimension
    std::vector<int64_t> row_strides;           // [operand]
    int64_t rows() const;
    void offsets(int64_t row_index, int64_t* out) const;  // one offset per operand
};

class CopyNode : public Node {  // also permutes, slices, expands: any strides to any strides
  public:
    CopyNode(View from, View to);
    void run(Context& context) const override;
    bool past_cache = false;  // the target is large, and nobody reads it soon

  private:
    void run_in_strips(Context& context) const;

    LoopNest loops_;
    Ref from_, to_;
    // A permutation of more than two dimensions, or with short rows: the source is contiguous along an outer dimension.
    int64_t strip_ = 0;  // its size, or 0
    int64_t strip_to_step_ = 0;
    LoopNest others_;  // the outer dimensions without it
};

class FillNode : public Node {
  public:
    FillNode(View to, float value);
    void run(Context& context) const override;

  private:
    LoopNest loops_;
    Ref to_;
    float value_;
};

class UnaryNode : public Node {
  public:
    UnaryNode(View x, View y, Epilogue activation);
    void run(Context& context) const override;

  private:
    LoopNest loops_;
    Ref x_, y_;
    Epilogue activation_;
};

class BinaryNode : public Node {  // a and b already broadcast: strides 0 where a dimension is repeated
  public:
    BinaryNode(View a, View b, View y, Binary kind, Epilogue activation);
    void run(Context& context) const override;

  private:
    LoopNest loops_;
    Ref a_, b_, y_;
    Binary kind_;
    Epilogue activation_;
};

class AffineNode : public Node {  // y = act(x · scale[axis] + shift[axis])
  public:
    AffineNode(View x, View y, int axis, std::vector<float> scale, std::vector<float> shift, Epilogue activation);
    void run(Context& context) const override;

  private:
    LoopNest loops_;
    Ref x_, y_;
    int64_t channels_, x_step_, y_step_;
    std::vector<float> scale_, shift_;
    Epilogue activation_;
};

struct PoolOptions {
    bool max = true;
    int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0,
            dilation_h = 1, dilation_w = 1;
    bool count_include_pad = true;
    int64_t divisor = 0;  // 0 = the window's size
};

class PoolNode : public Node {  // x, y: (N, C, H, W)
  public:
    PoolNode(View x, View y, PoolOptions options) : x_(std::move(x)), y_(std::move(y)), o_(options) {}
    void run(Context& context) const override;

  private:
    View x_, y_;
    PoolOptions o_;
};

class AdaptiveAveragePoolNode : public Node {
  public:
    AdaptiveAveragePoolNode(View x, View y) : x_(std::move(x)), y_(std::move(y)) {}
    void run(Context& context) const override;

  private:
    View x_, y_;
};

enum class Reduction : int { mean, sum, amax, amin, count };

class ReduceNode : public Node {  // y has x's rank, size 1 along `dims`
  public:
    ReduceNode(View x, View y, std::vector<int> dims, Reduction kind);
    void run(Context& context) const override;

  private:
    LoopNest kept_, reduced_;
    Ref x_, y_;
    Reduction kind_;
    int64_t count_ = 1;
};

class SoftmaxNode : public Node {
  public:
    SoftmaxNode(View x, View y, int dim);
    void run(Context& context) const override;

  private:
    LoopNest loops_;
    Ref x_, y_;
    int64_t length_, x_step_, y_step_;
};

class LayerNormNode : public Node {  // over the last `dims` dimensions, which must merge into one strided dimension in x and y
  public:
    LayerNormNode(View x, View y, int dims, std::vector<float> weight, std::vector<float> bias, float eps);
    void run(Context& context) const override;

  private:
    LoopNest loops_;
    Ref x_, y_;
    int64_t length_, x_step_, y_step_;
    std::vector<float> weight_, bias_;
    float eps_;
};

class GroupNormNode : public Node {  // x, y: (N, C, pixels…) with any strides
  public:
    GroupNormNode(View x, View y, int64_t groups, std::vector<float> weight, std::vector<float> bias, float eps);
    void run(Context& context) const override;

  private:
    View x_, y_;
    LoopNest pixels_;
    int64_t groups_;
    std::vector<float> weight_, bias_;
    float eps_;
};

// y[…, i, j] = sum_k a[…, i, k] · b[…, k, j]; b and y have stride 1 along j, batch dimensions already broadcast.
class MatmulNode : public Node {
  public:
    MatmulNode(View a, View b, View y);
    void run(Context& context) const override;

  private:
    LoopNest batch_;
    Ref a_, b_, y_;
    int64_t i_, j_, k_, a_i_, a_k_, b_k_, y_i_;
};

// softmax(scale · q kᵀ + mask) v for q, k, v, y: (…, length, depth), stride 1 along the length of q and y (channel-major tokens).
class AttentionNode : public Node {
  public:
    AttentionNode(View q, View k, View v, View y, float scale, bool causal, bool has_mask, View mask);
    void run(Context& context) const override;

  private:
    LoopNest batch_;
    Ref q_, k_, v_, y_, mask_;
    int64_t queries_, keys_, depth_, value_depth_;
    int64_t q_d_, k_l_, k_d_, v_l_, v_d_, y_d_, mask_q_ = 0, mask_k_ = 0;
    float scale_;
    bool causal_, has_mask_;
};

class CallbackNode : public Node {
  public:
    explicit CallbackNode(std::function<void(const std::vector<float*>&)> call, std::vector<Ref> places)
        : call_(std::move(call)), places_(std::move(places)) {}
    void run(Context& context) const override {
        std::vector<float*> pointers;
        for (const Ref& ref : places_) pointers.push_back(context.at(ref));
        call_(pointers);
    }

  private:
    std::function<void(const std::vector<float*>&)> call_;
    std::vector<Ref> places_;
};

}  // namespace sparse_engine
