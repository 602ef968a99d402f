// Convolutions and linear layers in bfloat16: weights and tiles in halves, sums in single precision. What comes in and what goes out may
// be either.
#pragma once

#include <memory>
#include <vector>

#include "pack/pair_matrix.h"
#include "runtime/linear_operator.h"
#include "runtime/plan.h"

namespace sparse_engine {

// Channel planes in single precision or, with the stride in halves, in bfloat16.
struct Planes {
    Ref ref;
    int64_t stride = 0;
    bool half = false;
};

// Halves from one plane to the next: whole lines, an odd number of them.
int64_t padded_half_pixels(int64_t pixels);

// What both kinds of convolutions have.
class PairBase : public Node {
  public:
    std::shared_ptr<const std::vector<float>> bias;  // or null
    int64_t pixels = 0;
    Planes x;
    std::shared_ptr<const TapTable> taps;  // of shifts; null: a 1×1 convolution
    int64_t x_pixels = 0;                  // of a plane of x
    Planes out;
    bool has_residual = false;
    Planes residual;
    Epilogue epilogue;
};

class PairNode : public PairBase {
  public:
    std::shared_ptr<const PairMatrix> weight;
    int lines = 2;  // per tile, at most
    void run(Context& context) const override;
};

// A depthwise convolution, two taps at a time.
class PairDepthwiseNode : public PairBase {
  public:
    std::shared_ptr<const std::vector<uint16_t>> weight;  // [channels][taps]
    int64_t channels = 0, multiplier = 1;
    void run(Context& context) const override;
};

// PhaseNode with phases in bfloat16; `phases.plane_stride` in halves.
class HalfPhaseNode : public Node {
  public:
    ConvGeometry geometry;
    PhaseLayout phases;
    Ref x;
    bool x_half = false;  // then in planes: images and rows follow each other
    int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 1;
    Ref out;
    void run(Context& context) const override;
};

}  // namespace sparse_engine
