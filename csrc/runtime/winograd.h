// Dense convolutions by Winograd's method along the rows of the image: about half the multiplications of a 3×3, 7/16 of a 7×7 with
// stride 2.
#pragma once

#include <memory>
#include <vector>

#include "core/memory.h"
#include "runtime/linear_operator.h"
#include "runtime/plan.h"

namespace sparse_engine {

// A dense weight [rows][channels · taps], transformed and packed for the kernels of the build in use.
class WinogradWeight {
  public:
    // Where the method applies: columns next to each other (dilation 1), three or four taps per phase of a stride of 1 or 2.
    static bool applies(const ConvGeometry& g);
    // Throws std::invalid_argument where it does not apply or a value is not finite or beyond kLargest.
    WinogradWeight(int64_t rows, const ConvGeometry& g, const float* values);

    int64_t nbytes() const { return static_cast<int64_t>((packed.size() + values.size()) * sizeof(float)); }
    const float* panel(int64_t i) const { return packed.data() + i * panel_floats; }
    // Of a phase with one tap fewer than the first: three taps among four need one point fewer.
    bool spare(int64_t phase) const { return taps == 4 && kernel_w - phase <= 3 * stride_w; }
    int taps_of(int64_t phase) const { return spare(phase) ? 3 : taps; }

    int64_t rows = 0, channels = 0, kernel_h = 0, kernel_w = 0, stride_w = 1;
    int taps = 0;         // per phase
    int points = 0;       // taps + 3
    int64_t entries = 0;  // channels · stride_w · kernel_h
    int64_t fewer = 0;    // entries at kWinogradSpare
    int panel_rows = 0;
    int64_t panel_floats = 0;
    std::vector<float, SharedPages<float>> packed;  // [panel][point][entry][panel_rows]; entries by phase, channel, row of the kernel
    std::vector<float> values;                      // as given: what is used next to numbers that are not finite
    static constexpr float kLargest = 1e18f;        // of weights and inputs: sums of their transforms stay finite
};

class WinogradNode : public ImageConvNode {
  public:
    std::shared_ptr<const WinogradWeight> weight;

    void prepare();  // after the members above are set
    void run(Context& context) const override;

  private:
    void transform(const float* image, int64_t first_row, int64_t rows, float* lines, float* planes) const;
    bool usual(const float* image, int64_t first_row, int64_t rows) const;
    void product(const float* image, int64_t first_row, int64_t rows, float* lines, float* to, const float* add) const;
    void direct(const float* image, int64_t y, float* to, const float* add) const;
    int64_t line_floats() const { return (2 * (rows_in_ * line_ + kRoom) + 15) / 16 * 16; }

    static constexpr int64_t kRoom = 64;  // kernels read and write whole vectors: floats past the end

    int64_t tiles_ = 0;      // of four outputs, per row
    int64_t band_rows_ = 0;  // output rows per work item, at most
    int64_t rows_in_ = 0;    // input rows behind them
    int64_t class_stride_ = 0, entry_stride_ = 0, point_stride_ = 0, line_ = 0;
    std::vector<int64_t> offset_;  // of each entry
};

}  // namespace sparse_engine
