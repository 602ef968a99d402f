// Products with a weight of so few entries that one at a time is fastest: rows of x stay as they are, and only what an entry meets is read.
#pragma once

#include <cstdint>
#include <vector>

namespace sparse_engine {

class EntryProduct {
  public:
    EntryProduct(int64_t rows, int64_t cols, const std::vector<int64_t>& row_ptr, const std::vector<int32_t>& col);

    // values: in the order of the pattern. Rows of x and y have at least `cols` and `rows` elements and lie ldx and ldy apart.
    void forward(const float* values, const float* x, int64_t ldx, int64_t n, float* y, int64_t ldy, const float* bias) const;
    void input_grad(const float* values, const float* dy, int64_t lddy, int64_t n, float* dx, int64_t lddx) const;
    void weight_grad(const float* dy, int64_t lddy, const float* x, int64_t ldx, int64_t n, float* dvalues) const;
    int64_t nbytes() const { return static_cast<int64_t>(filled_.size() * sizeof(Row) + (row_.size() + col_.size()) * sizeof(int32_t)); }

  private:
    struct Row {
        int64_t row, begin, end;
    };
    std::vector<Row> filled_;  // those with entries
    int64_t rows_, cols_;
    std::vector<int32_t> row_, col_;
};

}  // namespace sparse_engine
