#include "check.h"
#include "core/cpu_features.h"

using namespace sparse_engine;

TEST(the_machine_is_described) {
    const CpuInfo& info = cpu_info();
    CHECK(!info.model.empty());
    CHECK(info.logical_cpus >= 1);
    CHECK(info.available_cpus >= 1 && info.available_cpus <= info.logical_cpus);
    CHECK(info.physical_cores >= 1 && info.physical_cores <= info.logical_cpus);
    CHECK(info.cache_line_bytes >= 16 && (info.cache_line_bytes & (info.cache_line_bytes - 1)) == 0);
    CHECK(info.l2_bytes == 0 || info.l2_bytes >= info.l1d_bytes);
    CHECK(&info == &cpu_info());
}

TEST(the_best_build_has_every_instruction_it_is_compiled_with) {
    const CpuInfo& info = cpu_info();
    if (info.best_isa >= Isa::avx2) CHECK(info.avx && info.avx2 && info.fma && info.f16c);
    if (info.best_isa >= Isa::avx512) CHECK(info.avx512f && info.avx512bw && info.avx512dq && info.avx512vl);
#if defined(__x86_64__) && defined(__GNUC__)
    // The compiler's own detection, which looks at the operating system too.
    __builtin_cpu_init();
    CHECK_EQUAL(info.avx2, __builtin_cpu_supports("avx2") != 0);
    CHECK_EQUAL(info.fma, __builtin_cpu_supports("fma") != 0);
    CHECK_EQUAL(info.avx512f, __builtin_cpu_supports("avx512f") != 0);
    CHECK_EQUAL(info.avx512bw, __builtin_cpu_supports("avx512bw") != 0);
#endif
}

TEST(the_variable_chooses_among_what_the_processor_has) {
    CHECK(choose_isa(nullptr, Isa::avx512) == Isa::avx512);
    CHECK(choose_isa("", Isa::avx2) == Isa::avx2);
    CHECK(choose_isa("portable", Isa::avx512) == Isa::portable);
    CHECK(choose_isa("avx2", Isa::avx512) == Isa::avx2);
    CHECK(choose_isa("avx512", Isa::avx512) == Isa::avx512);
}

TEST(an_instruction_set_that_is_missing_or_unknown_is_refused) {
    CHECK_THROWS(choose_isa("avx512", Isa::avx2), std::invalid_argument, "the best here is 'avx2'");
    CHECK_THROWS(choose_isa("avx2", Isa::portable), std::invalid_argument, "does not support");
    CHECK_THROWS(choose_isa("sse9", Isa::avx512), std::invalid_argument, "avx512, avx2 or portable");
    CHECK_THROWS(choose_isa("AVX2", Isa::avx512), std::invalid_argument, "'AVX2'");
}

TEST(names_come_back) {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) CHECK(choose_isa(to_string(isa).c_str(), Isa::avx512) == isa);
}
