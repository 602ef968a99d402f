// Linear layers on one vector or a few, with weights as small as they can be: see pack/vector_matrix.h.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "pack/byte_lookup.h"
#include "pack/vector_matrix.h"
#include "runtime/plan.h"

namespace sparse_engine {

// out[i][m] = act(scale[m] · Σ_k w[m][k] x[i][k] + bias[m] + residual[i][m]) for each of `count` vectors.
class VectorProductNode : public Node {
  public:
    std::shared_ptr<const LookupMatrix> sparse;  // one of the three
    std::shared_ptr<const ByteLookup> bytes;
    std::shared_ptr<const RowMatrix> dense;
    std::shared_ptr<const std::vector<float>> scale, bias;  // or null
    int64_t count = 1;
    Ref x;
    int64_t x_stride = 0;  // floats from one vector to the next
    Ref out;
    int64_t out_stride = 0;
    bool has_bias_ref = false;
    Ref bias_ref;  // used when has_bias_ref: a bias in an external buffer
    bool has_residual = false;
    Ref residual;
    int64_t residual_stride = 0;
    Epilogue epilogue;

    void run(Context& context) const override;

  private:
    int64_t rows() const { return sparse ? sparse->rows : bytes ? bytes->rows : dense->rows; }
    VectorArgs destination(const Context& context, int64_t vector, int64_t row0) const;
    void run_sparse(Context& context) const;
    void run_dense(Context& context) const;
    void run_bytes(Context& context) const;
};

// A weight of its own precision as a layer on the caller's memory.
class VectorLayer {
  public:
    VectorLayer(std::shared_ptr<const LookupMatrix> sparse, std::shared_ptr<const ByteLookup> bytes, std::shared_ptr<const RowMatrix> dense,
                std::shared_ptr<const std::vector<float>> scale);
    void forward(const float* x, int64_t ldx, int64_t n, float* y, int64_t ldy, const float* bias);
    // The product alone: input and output are still to be set.
    std::unique_ptr<VectorProductNode> node() const;
    int64_t rows() const { return sparse ? sparse->rows : bytes ? bytes->rows : dense->rows; }
    int64_t cols() const { return sparse ? sparse->cols : bytes ? bytes->cols : dense->cols; }
    int64_t stored() const { return sparse ? sparse->stored() : bytes ? bytes->stored() : dense->rows * dense->pitch; }
    int64_t nbytes() const {
        return (sparse  ? sparse->nbytes()
                : bytes ? bytes->nbytes()
                        : dense->nbytes()) +
               (scale ? static_cast<int64_t>(scale->size()) * 4 : 0);
    }

    const std::shared_ptr<const LookupMatrix> sparse;  // one of the three
    const std::shared_ptr<const ByteLookup> bytes;
    const std::shared_ptr<const RowMatrix> dense;
    const std::shared_ptr<const std::vector<float>> scale;

  private:
    using Key = std::tuple<int64_t, int64_t, int64_t, bool>;
    std::map<Key, std::shared_ptr<Plan>> plans_;
    std::mutex mutex_;
};

}  // namespace sparse_engine
