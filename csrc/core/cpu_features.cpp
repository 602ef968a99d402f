#include "core/cpu_features.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define SE_X86 1
#else
#define SE_X86 0
#endif

#if defined(__linux__)
#include <sched.h>
#endif

namespace sparse_engine {
namespace {

#if SE_X86

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zeros where the processor does not know the leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
    Registers r;
    const std::uint32_t highest = __get_cpuid_max(leaf & 0x80000000u, nullptr);
    if (highest != 0 && highest >= leaf) __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
    return r;
}

bool bit(std::uint32_t word, int position) { return (word >> position) & 1u; }

// Which registers the operating system saves on a context switch. Written as bytes because the intrinsic needs -mxsave.
std::uint64_t xgetbv0() {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
}

void detect_instructions(CpuInfo& info) {
    const Registers leaf1 = cpuid(1);
    const Registers leaf7 = cpuid(7);
    const Registers leaf7_1 = cpuid(7, 1);
    const bool osxsave = bit(leaf1.ecx, 27);
    const std::uint64_t saved = osxsave ? xgetbv0() : 0;
    const bool saves_ymm = (saved & 0x6) == 0x6;    // xmm, upper half of ymm
    const bool saves_zmm = (saved & 0xe6) == 0xe6;  // those and the mask registers, upper half of zmm, zmm16-31

    info.avx = saves_ymm && bit(leaf1.ecx, 28);
    info.fma = info.avx && bit(leaf1.ecx, 12);
    info.f16c = info.avx && bit(leaf1.ecx, 29);
    info.avx2 = info.avx && bit(leaf7.ebx, 5);
    info.avx512f = saves_zmm && bit(leaf7.ebx, 16);
    info.avx512dq = info.avx512f && bit(leaf7.ebx, 17);
    info.avx512bw = info.avx512f && bit(leaf7.ebx, 30);
    info.avx512vl = info.avx512f && bit(leaf7.ebx, 31);
    info.avx512_vnni = info.avx512f && bit(leaf7.ecx, 11);
    info.avx512_vbmi = info.avx512f && bit(leaf7.ecx, 1);
    info.avx512_bf16 = info.avx512f && bit(leaf7_1.eax, 5);

    // Exactly what the kernels are compiled with: see the flags in CMakeLists.txt.
    if (info.avx2 && info.fma && info.f16c) info.best_isa = Isa::avx2;
    if (info.best_isa == Isa::avx2 && info.avx512f && info.avx512dq && info.avx512bw && info.avx512vl) info.best_isa = Isa::avx512;
}

void detect_names(CpuInfo& info) {
    const Registers leaf0 = cpuid(0);
    char vendor[12];
    std::memcpy(vendor, &leaf0.ebx, 4);
    std::memcpy(vendor + 4, &leaf0.edx, 4);
    std::memcpy(vendor + 8, &leaf0.ecx, 4);
    info.vendor.assign(vendor, vendor + 12);
    info.slow_gather = info.vendor == "AuthenticAMD";

    if (cpuid(0x80000000u).eax < 0x80000004u) return;
    char name[48];
    for (std::uint32_t i = 0; i < 3; ++i) {
        const Registers r = cpuid(0x80000002u + i);
        std::memcpy(name + 16 * i, &r.eax, 4);
        std::memcpy(name + 16 * i + 4, &r.ebx, 4);
        std::memcpy(name + 16 * i + 8, &r.ecx, 4);
        std::memcpy(name + 16 * i + 12, &r.edx, 4);
    }
    std::string text(name, name + 48);
    text.resize(std::min(text.find('\0'), text.size()));
    const auto first = text.find_first_not_of(' ');
    const auto last = text.find_last_not_of(' ');
    if (first != std::string::npos) info.model = text.substr(first, last - first + 1);
}

// Intel's leaf 4 and AMD's leaf 0x8000001D have one layout. Used where the operating system does not list the caches.
void detect_caches_by_cpuid(CpuInfo& info) {
    const std::uint32_t leaf = info.vendor == "AuthenticAMD" ? 0x8000001Du : 4u;
    for (std::uint32_t i = 0; i < 16; ++i) {
        const Registers r = cpuid(leaf, i);
        const std::uint32_t type = r.eax & 31u;  // 1 data, 2 instructions, 3 unified
        if (type == 0) break;
        if (type == 2) continue;
        const std::size_t ways = (r.ebx >> 22) + 1, partitions = ((r.ebx >> 12) & 1023u) + 1, line = (r.ebx & 4095u) + 1;
        const std::size_t bytes = ways * partitions * line * (static_cast<std::size_t>(r.ecx) + 1);
        info.cache_line_bytes = line;
        switch ((r.eax >> 5) & 7u) {
            case 1: info.l1d_bytes = bytes; break;
            case 2: info.l2_bytes = bytes; break;
            case 3: info.l3_bytes = bytes; break;
            default: break;
        }
    }
}

#endif  // SE_X86

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

// "32K" or "8M" as sysfs writes sizes; 0 where it is neither.
std::size_t parse_size(const std::string& text) {
    char* end = nullptr;
    const unsigned long long number = std::strtoull(text.c_str(), &end, 10);
    if (end == text.c_str()) return 0;
    const std::size_t unit = *end == 'K' ? 1024 : *end == 'M' ? 1024 * 1024 : 1;
    return static_cast<std::size_t>(number) * unit;
}

void detect_caches_by_sysfs(CpuInfo& info) {
    for (int i = 0; i < 16; ++i) {
        const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
        const std::string level = first_line(folder + "level");
        if (level.empty()) break;
        if (first_line(folder + "type") == "Instruction") continue;
        const std::size_t bytes = parse_size(first_line(folder + "size"));
        if (level == "1") info.l1d_bytes = bytes;
        if (level == "2") info.l2_bytes = bytes;
        if (level == "3") info.l3_bytes = bytes;
        const std::size_t line = parse_size(first_line(folder + "coherency_line_size"));
        if (line != 0) info.cache_line_bytes = line;
    }
}

// The container's share of the machine in whole processors, rounded up; 0 where there is no limit.
int quota_cpus() {
    std::istringstream v2(first_line("/sys/fs/cgroup/cpu.max"));
    std::string quota;
    double period = 0;
    if (v2 >> quota >> period && quota != "max" && period > 0) {
        return std::max(1, static_cast<int>((std::strtod(quota.c_str(), nullptr) + period - 1) / period));
    }
    const double v1_quota = std::strtod(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str(), nullptr);
    const double v1_period = std::strtod(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str(), nullptr);
    if (v1_quota > 0 && v1_period > 0) return std::max(1, static_cast<int>((v1_quota + v1_period - 1) / v1_period));
    return 0;
}

void detect_processors(CpuInfo& info) {
    info.logical_cpus = std::max(1u, std::thread::hardware_concurrency());
    info.available_cpus = info.logical_cpus;
    info.physical_cores = info.logical_cpus;
#if defined(__linux__)
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
        info.available_cpus = std::max(1, CPU_COUNT(&allowed));
        std::set<std::pair<std::string, std::string>> cores;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
            const std::string core = first_line(folder + "core_id");
            // A machine that does not describe its topology: count every logical processor as a core.
            cores.emplace(first_line(folder + "physical_package_id"), core.empty() ? "cpu" + std::to_string(cpu) : core);
        }
        info.physical_cores = std::max(1, static_cast<int>(cores.size()));
    }
    const int quota = quota_cpus();
    if (quota > 0) info.available_cpus = std::min(info.available_cpus, quota);
#endif
}

CpuInfo detect() {
    CpuInfo info;
    info.model = "unknown";
#if SE_X86
    detect_names(info);
    detect_instructions(info);
    detect_caches_by_cpuid(info);
#endif
    detect_caches_by_sysfs(info);
    detect_processors(info);
    return info;
}

}  // namespace

const CpuInfo& cpu_info() {
    static const CpuInfo info = detect();
    return info;
}

Isa choose_isa(const char* requested, Isa best) {
    if (requested == nullptr || *requested == '\0') return best;
    const std::string name(requested);
    Isa isa;
    if (name == "avx512") {
        isa = Isa::avx512;
    } else if (name == "avx2") {
        isa = Isa::avx2;
    } else if (name == "portable") {
        isa = Isa::portable;
    } else {
        throw std::invalid_argument("SPARSE_ENGINE_ISA is '" + name + "'; it must be avx512, avx2 or portable, or not be set");
    }
    if (isa > best) {
        throw std::invalid_argument("SPARSE_ENGINE_ISA is '" + name +
                                    "', but this processor or operating system does not support it; the best here is '" + to_string(best) +
                                    "'");
    }
    return isa;
}

Isa active_isa() {
    static const Isa isa = choose_isa(std::getenv("SPARSE_ENGINE_ISA"), cpu_info().best_isa);
    return isa;
}

std::string to_string(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::portable: break;
    }
    return "portable";
}

}  // namespace sparse_engine
