// Convolutions of large batches, as training runs them: images along the lanes, forward, input gradient and weight gradient. Very sparse
// linear layers too, some rows of x being the pixels of an image.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/linear_operator.h"

namespace sparse_engine {

// One direction along one axis. Output positions fall into classes (one, or as many as the stride for an input gradient): position
// first + i · step reads source position i · source_step + shift[k] for tap[k].
struct BatchAxis {
    struct Class {
        int64_t first, step, count, source_step;
        std::vector<int64_t> shift;  // ascending
        std::vector<int> tap;
    };
    std::vector<Class> classes;
    int64_t size = 0, source_size = 0;
    const Class& of(int64_t position) const { return classes[position % static_cast<int64_t>(classes.size())]; }
};

class BatchConv {
  public:
    // Either direction of a convolution of images of one size; rows, row_ptr, col: of the forward matrix (columns channel · taps + tap).
    BatchConv(const ConvGeometry& geometry, bool backward, int64_t rows, const std::vector<int64_t>& row_ptr,
              const std::vector<int32_t>& col);
    // False where the layout does not fit the offsets or the images are too large to keep a few rows of them in the cache.
    bool possible() const { return possible_; }

    // In memory: [image][channel][row][column], or [image][row][column][channel] where `channels_last`.
    template <class T>
    struct Images {
        T* data;
        bool channels_last = false;
    };
    // values: in the order of the pattern.
    void set_values(const float* values);
    void run(Images<const float> x, int64_t images, Images<float> y, const float* bias, int threads) const;
    // Forward direction only: dvalues[entry], in the order of the pattern.
    void weight_grad(Images<const float> dy, Images<const float> x, int64_t images, float* dvalues, int threads) const;
    int64_t nbytes() const;

  private:
    struct Window;
    size_t start_of(int64_t row, size_t y_class, size_t x_class) const {
        return ((size_t(row) * vertical_.classes.size() + y_class) * horizontal_.classes.size() + x_class) * (taps_most_ + 1);
    }
    int64_t rows_per_chunk() const;
    int64_t window_rows(int64_t chunk) const;
    void first_and_last(int64_t y0, int64_t y1, int64_t* from, int64_t* to) const;

    bool possible_ = true;
    BatchAxis vertical_, horizontal_;
    int64_t rows_ = 0, channels_ = 0, left_ = 0, padded_ = 0;  // padded_: columns of a source row
    size_t taps_most_ = 0;
    std::vector<uint32_t> start_;  // [row][vertical class][horizontal class][tap row + 1]: first entry
    std::vector<uint16_t> offset_;
    std::vector<uint32_t> order_;  // of each entry in the pattern
    std::vector<float> values_;
};

}  // namespace sparse_engine
