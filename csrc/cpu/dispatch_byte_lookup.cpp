#include "core/cpu_features.h"
#include "cpu/kernels_byte_lookup.h"

namespace sparse_engine {

namespace portable {
ByteLookupKernels make_byte_lookup_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
ByteLookupKernels make_byte_lookup_kernels();
}
namespace avx512 {
ByteLookupKernels make_byte_lookup_kernels();
}
#endif

const ByteLookupKernels& byte_lookup_kernels() {
    // Made only by the build that will be used: the functions that make it are compiled for its instruction set too.
    static const ByteLookupKernels table = [] {
#if defined(__x86_64__)
        if (active_isa() == Isa::avx512) return avx512::make_byte_lookup_kernels();
        if (active_isa() == Isa::avx2) return avx2::make_byte_lookup_kernels();
#endif
        return portable::make_byte_lookup_kernels();
    }();
    return table;
}

}  // namespace sparse_engine
