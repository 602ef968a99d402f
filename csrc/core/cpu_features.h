// What this machine's processor can do, found at run time, and which build of the kernels to use on it.
#pragma once

#include <cstddef>
#include <string>

namespace sparse_engine {

// One build of the kernels. Ordered: a processor that runs one runs all the ones before it.
enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

struct CpuInfo {
    std::string vendor;  // "GenuineIntel", "AuthenticAMD", or "" where unknown
    std::string model;   // the marketing name, or "unknown"

    // True only where the processor has the instructions and the operating system saves the registers they use.
    bool avx = false;
    bool avx2 = false;
    bool fma = false;
    bool f16c = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512dq = false;
    bool avx512vl = false;
    bool avx512_vnni = false;
    bool avx512_bf16 = false;
    bool avx512_vbmi = false;
    // Gather instructions are slower than as many loads: AMD, measured up to Zen 4.
    bool slow_gather = false;

    // Bytes, of one instance of the data or unified cache that the first core sees; 0 where unknown.
    std::size_t l1d_bytes = 0;
    std::size_t l2_bytes = 0;
    std::size_t l3_bytes = 0;
    std::size_t cache_line_bytes = 64;

    int logical_cpus = 1;    // that the machine has
    int physical_cores = 1;  // among the ones this process may use
    int available_cpus = 1;  // that this process may use at once: affinity and container quota, rounded up

    Isa best_isa = Isa::portable;
};

// Detected once; the same object for the life of the process.
const CpuInfo& cpu_info();

// The build of the kernels in use: the best that the processor runs, or what SPARSE_ENGINE_ISA names (avx512, avx2, portable).
// Throws std::invalid_argument where the variable names an unknown instruction set or one that this processor lacks. Read once.
Isa active_isa();

// What active_isa() answers for `requested` (nullptr or "" for no request) on a processor whose best is `best`.
Isa choose_isa(const char* requested, Isa best);

std::string to_string(Isa isa);

}  // namespace sparse_engine
