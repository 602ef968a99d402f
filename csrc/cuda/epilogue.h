// Bias and activation on fp32 sums.
#pragma once

#include "cuda/device.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace se::cuda {

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

SE_DEVICE float activate(float x, Activation activation) {
    switch (activation) {
        case Activation::kRelu: return x < 0.0f ? 0.0f : x;  // NaN stays NaN
        case Activation::kGelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case Activation::kSilu: return x / (1.0f + expf(-x));
        default: return x;
    }
}

}  // namespace se::cuda
