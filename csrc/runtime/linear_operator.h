// Everything linear: convolutions and linear layers as one panel matrix times a virtual matrix X of (channel, tap) rows and pixel columns.
#pragma once

#include <memory>
#include <vector>

#include "pack/panel_matrix.h"
#include "runtime/plan.h"

namespace sparse_engine {

struct ConvGeometry {
    int64_t batch = 1, channels = 1, height = 1, width = 1;  // input
    int64_t kernel_h = 1, kernel_w = 1;
    int64_t stride_h = 1, stride_w = 1;
    int64_t pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
    int64_t dilation_h = 1, dilation_w = 1;

    int64_t out_height() const { return (height + pad_top + pad_bottom - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
    int64_t out_width() const { return (width + pad_left + pad_right - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
    int64_t taps() const { return kernel_h * kernel_w; }
    bool pointwise() const;  // 1×1, stride 1, no padding: X is the input itself
    void check() const;      // throws std::invalid_argument
};

// Where each tap finds its pixel. Affine: source pixel = output pixel + offset[tap] wherever the mask bit is set.
struct TapTable {
    int taps = 1;
    bool affine = true;
    std::vector<int64_t> offset;
    std::vector<uint16_t> mask;
    size_t mask_stride = 0;
    std::vector<int32_t> gather;
    size_t gather_stride = 0;
    std::vector<uint8_t> inner;  // see DepthwiseArgs; empty unless affine, 3×3, the taps of a row next to each other
    bool rows_of_three = false;  // see Im2colArgs
};

// A strided or cropped convolution reads its input through phases: for stride 2, four planes of every second pixel, on the output's grid;
// then each tap is a shift again.
struct PhaseLayout {
    bool needed = false, possible = false;
    std::vector<int64_t> phase_y, phase_x;  // the phases in use
    int64_t grid_h = 0, grid_w = 0;
    int64_t plane_stride = 0;  // floats from one phase plane to the next
};

// Cuts `total` vectors into tiles of about `wanted`, never above `most`, whose sizes differ by at most one: short tiles leave the FMA units
// idle, long ones fall out of the L1. Several threads get the same number of tiles each where there are enough vectors, so that every layer
// cuts its pixels between them at the same place.
struct Tiles {
    int64_t total, count;
    Tiles(int64_t vectors, int64_t wanted, int64_t most, int threads);
    int64_t begin(int64_t i) const { return total * i / count; }
};

PhaseLayout phase_layout(const ConvGeometry& g);
TapTable forward_taps(const ConvGeometry& g, const PhaseLayout& phases);
TapTable backward_taps(const ConvGeometry& g);  // input gradient: output grid = the input's pixels, source = the gradient's pixels
int64_t padded_pixels(int64_t pixels);          // stride of a plane of that many pixels

enum class Source { planes, taps, rows };
enum class Destination { planes, rows };

class SpmmNode : public Node {
  public:
    std::shared_ptr<const PanelMatrix> weight;
    std::shared_ptr<const std::vector<float>> bias;  // or null
    Ref bias_ref;                                    // used when has_bias_ref: a bias in an external buffer
    bool has_bias_ref = false;
    int64_t pixels = 0;
    int vectors = 4;  // per tile, at most

    Source source = Source::planes;
    Ref x;
    int64_t x_stride = 0;  // planes, taps: floats between channels; rows: floats between rows
    std::shared_ptr<const TapTable> taps;

    Destination destination = Destination::planes;
    Ref out;
    int64_t out_stride = 0;
    bool has_residual = false;
    Ref residual;
    int64_t residual_stride = 0;
    Epilogue epilogue;

    void run(Context& context) const override;
};

// A convolution that reads the rows of its images where they are, without phases or masks.
class ImageConvNode : public Node {
  public:
    ConvGeometry geometry;
    std::shared_ptr<const std::vector<float>> bias;  // or null
    Ref x;
    int64_t stride_n = 0, stride_c = 0, stride_h = 0;
    Ref out;  // planes [channel][image][pixel]
    int64_t out_stride = 0;
    bool has_residual = false;
    Ref residual;
    int64_t residual_stride = 0;
    Epilogue epilogue;
};

class PhaseNode : public Node {
  public:
    ConvGeometry geometry;
    PhaseLayout phases;
    Ref x;
    int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 1;
    Ref out;  // [channel][phase][batch][grid_h][grid_w], planes `plane_stride` apart
    void run(Context& context) const override;
};

class DepthwiseNode : public Node {
  public:
    std::shared_ptr<const std::vector<float>> weight;  // [channels][taps]
    std::shared_ptr<const std::vector<float>> bias;
    std::shared_ptr<const TapTable> taps;
    int64_t channels = 0, pixels = 0, multiplier = 1;
    Ref x;
    int64_t x_stride = 0;
    Ref out;
    int64_t out_stride = 0;
    bool has_residual = false;
    Ref residual;
    int64_t residual_stride = 0;
    Epilogue epilogue;
    void run(Context& context) const override;
};

// One row of X only (batch 1): y = W x, from dense rows, CSR rows, or CSR rows in blocks of columns.
class VectorNode : public Node {
  public:
    static constexpr int64_t kBlockColumns =
        4096;  // so many floats of x stay in the L1: of a long x each entry would bring a line from the L2
    int64_t rows = 0, cols = 0;
    std::shared_ptr<const std::vector<float>> values;
    std::shared_ptr<const std::vector<int64_t>> row_ptr;  // with col16 [block][row], and the end; null = dense
    std::shared_ptr<const std::vector<int32_t>> col;
    std::shared_ptr<const std::vector<uint16_t>> col16;  // instead of col: in blocks, counted from a block's first column
    std::shared_ptr<const std::vector<float>> bias;
    Ref x, out;
    bool has_residual = false;
    Ref residual;
    Epilogue epilogue;
    void run(Context& context) const override;
};

// dvalues[i] = sum over pixels of dy[row(i), p] · X[col(i), p]
class SampledNode : public Node {
  public:
    std::shared_ptr<const std::vector<int64_t>> row_ptr;
    std::shared_ptr<const std::vector<int32_t>> col;
    int64_t rows = 0, cols = 0, pixels = 0;
    Source source = Source::planes;
    Ref x;
    int64_t x_stride = 0;
    std::shared_ptr<const TapTable> taps;
    bool dy_rows = false;  // dy is row-major [pixel][row] instead of planes
    Ref dy;
    int64_t dy_stride = 0;
    Ref out;
    void run(Context& context) const override;
};

}  // namespace sparse_engine
