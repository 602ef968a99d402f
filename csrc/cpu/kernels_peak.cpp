// What the processor's multiply-add units can do at most: the peak that every share of peak refers to.
//
// Twelve chains of multiply-adds on registers, nothing else: enough to hide a latency of four to five cycles on two units. Compilers may
// not shorten a chain, because each sum is rounded.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sparse_engine {
namespace SE_ISA {
namespace {

constexpr int kChains = 12;

int64_t fma_chains(int64_t steps, float factor, float shift, float* result) {
    Vec sums[kChains];
    for (int c = 0; c < kChains; c++) sums[c] = splat(factor);
    const Vec f = splat(factor), s = splat(shift);
    for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 12
        for (int c = 0; c < kChains; c++) sums[c] = fma(sums[c], f, s);
    float total = 0;
    for (int c = 0; c < kChains; c++) total += sum(sums[c]);
    *result = total;
    return 2 * kChains * kLanes * steps;
}

}  // namespace

void fill_peak(KernelTable& t) { t.fma_chains = fma_chains; }

}  // namespace SE_ISA
}  // namespace sparse_engine
