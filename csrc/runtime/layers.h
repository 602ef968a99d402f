// Single layers on PyTorch's own memory orders, with gradients: what the ops call.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "pack/panel_matrix.h"
#include "pack/vector_matrix.h"
#include "runtime/batch_conv.h"
#include "runtime/entry_product.h"
#include "runtime/linear_operator.h"
#include "runtime/plan.h"

namespace sparse_engine {

// A CSR pattern with its transpose; values are copied in, in CSR order, whenever they change.
class SparseOperator {
  public:
    SparseOperator(std::vector<int64_t> row_ptr, std::vector<int32_t> col, int64_t rows, int64_t cols);
    void set_values(const float* values, int64_t nnz);
    int64_t nnz() const { return static_cast<int64_t>(col_->size()); }
    int64_t nbytes() const;

    // Where entry i of row r, column c stands in the transposed matrix: (row, column). The default is (c, r).
    std::shared_ptr<const PanelMatrix> forward_matrix();
    std::shared_ptr<const PanelMatrix> transposed_matrix();
    // For a few vectors; null where it would not stay in the cache, which the plain rows then do better.
    std::shared_ptr<const LookupMatrix> lookup_matrix();

    int64_t rows, cols, transposed_rows, transposed_cols;

  protected:
    virtual std::pair<int64_t, int64_t> transposed_place(int64_t row, int64_t column) const { return {column, row}; }
    virtual ~SparseOperator() = default;

    // The kernels for batches that fill vectors, built once per geometry. Null where they cannot be used. `fresh`: with the present values.
    std::shared_ptr<const BatchConv> batched(bool backward, const ConvGeometry& geometry, bool fresh);

    struct Batched {
        std::shared_ptr<BatchConv> conv;
        bool stale = true;
    };
    std::map<std::tuple<bool, int64_t, int64_t>, Batched> batched_;  // direction, height, width
    std::shared_ptr<std::vector<int64_t>> row_ptr_;
    std::shared_ptr<std::vector<int32_t>> col_;
    std::shared_ptr<std::vector<float>> values_;
    std::shared_ptr<PanelMatrix> forward_, transposed_;
    std::shared_ptr<LookupMatrix> lookup_;
    bool lookup_too_large_ = false;
    std::vector<int64_t> transposed_order_;
    bool forward_stale_ = true, transposed_stale_ = true, lookup_stale_ = true;
    bool finite_ = true;  // all values
    std::mutex mutex_;
};

class LinearLayer : public SparseOperator {
  public:
    LinearLayer(std::vector<int64_t> row_ptr, std::vector<int32_t> col, int64_t rows, int64_t cols)
        : SparseOperator(std::move(row_ptr), std::move(col), rows, cols) {
        if (nnz() * kTransposedPerEntry <= rows + cols) entries_ = std::make_unique<EntryProduct>(rows, cols, *row_ptr_, *col_);
    }
    void forward(const float* x, int64_t ldx, int64_t n, float* y, int64_t ldy, const float* bias);
    void input_grad(const float* dy, int64_t lddy, int64_t n, float* dx, int64_t lddx);
    void weight_grad(const float* dy, int64_t lddy, const float* x, int64_t ldx, int64_t n, float* dvalues);
    // What a step backwards needs, at once; any of dx, dvalues and dbias may be null, and x is read for dvalues only.
    void gradients(const float* dy, int64_t lddy, const float* x, int64_t ldx, int64_t n, float* dx, int64_t lddx, float* dvalues,
                   float* dbias);
    int64_t nbytes() const { return SparseOperator::nbytes() + (entries_ ? entries_->nbytes() : 0); }

  private:
    using Key = std::tuple<int, int64_t, int64_t, int64_t, bool>;
    // So many elements of a row of x or y are brought into lanes and back in the time that one entry by itself takes.
    static constexpr int64_t kTransposedPerEntry = 8;
    std::shared_ptr<Plan> plan(const Key& key);
    bool few_entries() const;
    // Rows of x taken as images of `*width` pixels each, channels last; null where they do not lie one after the other,
    // their number does not fill vectors or there are more channels than offsets reach.
    std::shared_ptr<const BatchConv> batch(bool backward, bool fresh, int64_t ld_in, int64_t ld_out, int64_t n, int64_t* width);
    std::map<Key, std::shared_ptr<Plan>> plans_;
    std::unique_ptr<const EntryProduct> entries_;  // null where transposing pays
};

class ConvLayer : public SparseOperator {
  public:
    // col: columns of weight.reshape(M, -1), that is within the row's group.
    ConvLayer(std::vector<int64_t> row_ptr, std::vector<int32_t> col, int64_t out_channels, int64_t groups, const ConvGeometry& geometry);
    // Images are [n][channel][h][w], or [n][h][w][channel] where channels_last. False, with nothing written, where they cannot be taken
    // like that, as in a batch too small to fill vectors.
    using Input = BatchConv::Images<const float>;
    using Output = BatchConv::Images<float>;
    bool forward(Input x, int64_t n, int64_t h, int64_t w, Output y, const float* bias);
    // Also false, with dx untouched, where the weight holds an infinity or NaN and the kernel would multiply it with the zeros around dy.
    bool input_grad(Input dy, int64_t n, int64_t h, int64_t w, Output dx);
    bool weight_grad(Input dy, Input x, int64_t n, int64_t h, int64_t w, float* dvalues);

  protected:
    std::pair<int64_t, int64_t> transposed_place(int64_t row, int64_t column) const override {
        int64_t taps = geometry_.taps();
        return {column / taps, row * taps + column % taps};
    }

  private:
    using Key = std::tuple<int, int64_t, int64_t, int64_t, bool>;
    std::shared_ptr<Plan> plan(const Key& key);
    ConvGeometry sized(int64_t n, int64_t h, int64_t w) const;
    // For a batch that fills vectors; null where that does not fit. `fresh`: with the present values.
    std::shared_ptr<const BatchConv> batch_conv(bool backward, int64_t n, int64_t h, int64_t w, bool fresh);
    ConvGeometry geometry_;
    std::map<Key, std::shared_ptr<Plan>> plans_;
};

}  // namespace sparse_engine
