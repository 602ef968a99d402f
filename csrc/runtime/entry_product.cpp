#include "runtime/entry_product.h"

#include <algorithm>
#include <cstring>

#include "core/thread_pool.h"

namespace sparse_engine {
namespace {

constexpr int64_t kRows = 32;                 // rows of x that a thread takes together
constexpr int64_t kBlock = 128;               // and of those whose products are summed
constexpr int64_t kWorthAThread = 128 << 10;  // elements read and written

}  // namespace

EntryProduct::EntryProduct(int64_t rows, int64_t cols, const std::vector<int64_t>& row_ptr, const std::vector<int32_t>& col)
    : rows_(rows), cols_(cols), col_(col) {
    row_.reserve(col.size());
    for (int64_t r = 0; r < rows; r++) {
        const int64_t begin = row_ptr[r], end = row_ptr[r + 1];
        if (begin == end) continue;
        filled_.push_back({r, begin, end});
        row_.insert(row_.end(), static_cast<size_t>(end - begin), static_cast<int32_t>(r));
    }
}

void EntryProduct::forward(const float* values, const float* x, int64_t ldx, int64_t n, float* y, int64_t ldy, const float* bias) const {
    const size_t count = row_.size();
    const int threads = n * (rows_ + static_cast<int64_t>(count)) < kWorthAThread ? 1 : num_threads();
    parallel_for((n + kRows - 1) / kRows, threads, [&](int64_t block, int) {
        for (int64_t i = block * kRows; i < std::min(n, (block + 1) * kRows); i++) {
            const float* from = x + i * ldx;
            float* to = y + i * ldy;
            if (bias)
                std::memcpy(to, bias, size_t(rows_) * sizeof(float));
            else
                std::memset(to, 0, size_t(rows_) * sizeof(float));
            for (const Row& row : filled_) {
                float sum = to[row.row];
                for (int64_t e = row.begin; e < row.end; e++) sum += values[e] * from[col_[e]];
                to[row.row] = sum;
            }
        }
    });
}

void EntryProduct::input_grad(const float* values, const float* dy, int64_t lddy, int64_t n, float* dx, int64_t lddx) const {
    const size_t count = row_.size();
    const int threads = n * (cols_ + static_cast<int64_t>(count)) < kWorthAThread ? 1 : num_threads();
    parallel_for((n + kRows - 1) / kRows, threads, [&](int64_t block, int) {
        for (int64_t i = block * kRows; i < std::min(n, (block + 1) * kRows); i++) {
            const float* from = dy + i * lddy;
            float* to = dx + i * lddx;
            std::memset(to, 0, size_t(cols_) * sizeof(float));
            for (size_t e = 0; e < count; e++) to[col_[e]] += values[e] * from[row_[e]];
        }
    });
}

void EntryProduct::weight_grad(const float* dy, int64_t lddy, const float* x, int64_t ldx, int64_t n, float* dvalues) const {
    // Sums of blocks in a fixed order, whatever the number of threads: the result is the same at any.
    const size_t count = row_.size();
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    std::vector<float> sums(size_t(blocks) * count, 0.0f);
    const int threads = n * static_cast<int64_t>(count) < kWorthAThread ? 1 : num_threads();
    parallel_for(blocks, threads, [&](int64_t block, int) {
        float* own = sums.data() + size_t(block) * count;
        for (int64_t i = block * kBlock; i < std::min(n, (block + 1) * kBlock); i++) {
            const float *gradient = dy + i * lddy, *from = x + i * ldx;
            for (size_t e = 0; e < count; e++) own[e] += gradient[row_[e]] * from[col_[e]];
        }
    });
    for (size_t e = 0; e < count; e++) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; block++) sum += double(sums[size_t(block) * count + e]);
        dvalues[e] = static_cast<float>(sum);
    }
}

}  // namespace sparse_engine
