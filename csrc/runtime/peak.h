// What this machine can do at most, measured.
#pragma once

namespace sparse_engine {

// Single-precision operations per second of fused multiply-adds on registers, with the kernels' instruction set, all threads together.
// Takes about `seconds`. threads <= 0: as many as a job may use.
double fma_peak(double seconds, int threads);

}  // namespace sparse_engine
