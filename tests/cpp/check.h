// A small test framework: TEST(name) { CHECK(…); } in any number of files, one program each.
//
//   program            runs every test of the file
//   program --isa X    with the kernels built for X (avx512, avx2, portable); answers 77 where this processor cannot run them
//   program NAME…      only these tests
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_features.h"

namespace check {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline int& failures() {
    static int count = 0;
    return count;
}

struct Registration {
    Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline void fail(const char* file, int line, const std::string& message) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
    if (++failures() > 20) {
        std::fprintf(stderr, "too many failures\n");
        std::exit(1);
    }
}

// The same numbers on every machine and compiler.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t bits() {
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
        return state_;
    }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    float between(float low, float high) { return low + (high - low) * static_cast<float>(uniform()); }
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
    std::vector<float> floats(size_t n, float low = -1, float high = 1) {
        std::vector<float> out(n);
        for (float& x : out) x = between(low, high);
        return out;
    }

  private:
    uint64_t state_;
};

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

// Largest |actual - expected|, over the largest |expected|: the project's measure of error.
inline double relative_error(const float* actual, const double* expected, size_t n) {
    double worst = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        double error = std::fabs(static_cast<double>(actual[i]) - expected[i]);
        if (!(error <= worst)) worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
        scale = std::fmax(scale, std::fabs(expected[i]));
    }
    return scale == 0 ? worst : worst / scale;
}

inline int run(int argc, char** argv) {
    std::vector<std::string> chosen;
    for (int i = 1; i < argc; i++) {
        if (std::strcmp(argv[i], "--isa") == 0 && i + 1 < argc) {
            const char* isa = argv[++i];
            try {
                sparse_engine::choose_isa(isa, sparse_engine::cpu_info().best_isa);
            } catch (const std::invalid_argument& error) {
                std::fprintf(stderr, "skipped: %s\n", error.what());
                return 77;
            }
            setenv("SPARSE_ENGINE_ISA", isa, 1);
        } else {
            chosen.emplace_back(argv[i]);
        }
    }
    int ran = 0;
    for (const Test& test : tests()) {
        bool wanted = chosen.empty();
        for (const std::string& name : chosen) wanted = wanted || name == test.name;
        if (!wanted) continue;
        int before = failures();
        try {
            test.body();
        } catch (const std::exception& error) {
            fail(test.name, 0, std::string("unexpected exception: ") + error.what());
        }
        std::printf("%s %s\n", failures() == before ? "ok  " : "FAIL", test.name);
        ran++;
    }
    if (ran == 0) {
        std::fprintf(stderr, "no test was run\n");
        return 1;
    }
    return failures() == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(NAME)                                                      \
    static void test_##NAME();                                          \
    static check::Registration registration_##NAME(#NAME, test_##NAME); \
    static void test_##NAME()

#define CHECK(CONDITION)                                                            \
    do {                                                                            \
        if (!(CONDITION)) check::fail(__FILE__, __LINE__, "not true: " #CONDITION); \
    } while (0)

#define CHECK_EQUAL(ACTUAL, EXPECTED)                                    \
    do {                                                                 \
        const auto actual_ = (ACTUAL);                                   \
        const auto expected_ = (EXPECTED);                               \
        if (!(actual_ == expected_)) {                                   \
            std::ostringstream text_;                                    \
            text_ << #ACTUAL " is " << actual_ << ", not " << expected_; \
            check::fail(__FILE__, __LINE__, text_.str());                \
        }                                                                \
    } while (0)

// The statement throws E, and its message contains TEXT.
#define CHECK_THROWS(STATEMENT, E, TEXT)                                                                                     \
    do {                                                                                                                     \
        try {                                                                                                                \
            STATEMENT;                                                                                                       \
            check::fail(__FILE__, __LINE__, #STATEMENT " did not throw");                                                    \
        } catch (const E& error_) {                                                                                          \
            if (std::string(error_.what()).find(TEXT) == std::string::npos)                                                  \
                check::fail(__FILE__, __LINE__, std::string("the message does not say '") + (TEXT) + "': " + error_.what()); \
        }                                                                                                                    \
    } while (0)

int main(int argc, char** argv) { return check::run(argc, argv); }
