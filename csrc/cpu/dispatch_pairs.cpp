#include "core/cpu_features.h"
#include "cpu/kernels_pairs.h"

namespace sparse_engine {

namespace portable {
PairKernels make_pair_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
PairKernels make_pair_kernels();
}
namespace avx512 {
PairKernels make_pair_kernels();
}
#endif

const PairKernels& pair_kernels() {
    // Made only by the build that will be used: the functions that make it are compiled for its instruction set too.
    static const PairKernels table = [] {
#if defined(__x86_64__)
        if (active_isa() == Isa::avx512) return avx512::make_pair_kernels();
        if (active_isa() == Isa::avx2) return avx2::make_pair_kernels();
#endif
        return portable::make_pair_kernels();
    }();
    return table;
}

}  // namespace sparse_engine
