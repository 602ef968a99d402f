#include "core/cpu_features.h"
#include "cpu/kernels_batch.h"

namespace sparse_engine {

namespace portable {
BatchKernels make_batch_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
BatchKernels make_batch_kernels();
}
namespace avx512 {
BatchKernels make_batch_kernels();
}
#endif

const BatchKernels& batch_kernels() {
    // Made only by the build that will be used: the functions that make it are compiled for its instruction set too.
    static const BatchKernels table = [] {
#if defined(__x86_64__)
        if (active_isa() == Isa::avx512) return avx512::make_batch_kernels();
        if (active_isa() == Isa::avx2) return avx2::make_batch_kernels();
#endif
        return portable::make_batch_kernels();
    }();
    return table;
}

}  // namespace sparse_engine
