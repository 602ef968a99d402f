#include <stdexcept>
#include <string>

#include "core/cpu_features.h"
#include "cpu/kernels.h"

namespace sparse_engine {

#define SE_BUILD(ISA)                    \
    namespace ISA {                      \
    void fill_spmm(KernelTable&);        \
    void fill_pack(KernelTable&);        \
    void fill_elementwise(KernelTable&); \
    void fill_losses(KernelTable&);      \
    void fill_peak(KernelTable&);        \
    void fill_vector(KernelTable&);      \
    void fill_winograd(KernelTable&);    \
    void fill_row_tiles(KernelTable&);   \
    }
SE_BUILD(portable)
#if defined(__x86_64__)
SE_BUILD(avx2)
SE_BUILD(avx512)
#endif

namespace {

#define SE_TABLE(ISA, LANES)                                                                                                         \
    [] {                                                                                                                             \
        KernelTable t{};                                                                                                             \
        t.name = #ISA, t.lanes = LANES;                                                                                              \
        ISA::fill_spmm(t), ISA::fill_pack(t), ISA::fill_elementwise(t), ISA::fill_losses(t), ISA::fill_peak(t), ISA::fill_vector(t), \
            ISA::fill_winograd(t), ISA::fill_row_tiles(t);                                                                           \
        return t;                                                                                                                    \
    }()

}  // namespace

const KernelTable& kernels_for(int isa) {
    if (isa > static_cast<int>(cpu_info().best_isa) || isa < 0)
        throw std::invalid_argument("this processor cannot run kernel build " + std::to_string(isa));
    // Each table is filled only where it will be used: the functions that fill it are compiled for its instruction set too.
#if defined(__x86_64__)
    if (isa == static_cast<int>(Isa::avx512)) {
        static const KernelTable avx512_table = SE_TABLE(avx512, 16);
        return avx512_table;
    }
    if (isa == static_cast<int>(Isa::avx2)) {
        static const KernelTable avx2_table = SE_TABLE(avx2, 8);
        return avx2_table;
    }
#endif
    static const KernelTable portable_table = SE_TABLE(portable, 8);
    return portable_table;
}

const KernelTable& kernels() {
    static const KernelTable& table = kernels_for(static_cast<int>(active_isa()));
    return table;
}

}  // namespace sparse_engine
