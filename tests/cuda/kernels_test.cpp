// Runs the CUDA kernels on the CPU against fp64 references, with lanes first to last and last to first.
//   kernels_test              all cases
//   kernels_test stuck        a kernel whose lanes do not all reach a barrier: must abort
//   kernels_test race         a kernel without a barrier it needs: the thread sanitizer must report it
//   kernels_test late         a kernel that reads before it waits for its copy: must read no number
//   kernels_test overflow     a kernel that writes past its shared memory: the address sanitizer must report it
#include "cuda/kernels.cu"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

std::mt19937 generator(7);
int failures = 0;

float normal() { return std::normal_distribution<float>()(generator); }
bool chance(double p) { return std::uniform_real_distribution<double>()(generator) < p; }

uint16_t to_bits(int type, float value) { return type == 0 ? narrow<Type::kBf16>(value) : narrow<Type::kFp16>(value); }
float from_bits(int type, uint16_t bits) { return type == 0 ? widen<Type::kBf16>(bits) : widen<Type::kFp16>(bits); }

// 16-byte aligned 16-bit numbers.
struct Numbers {
    Numbers(int type, size_t count) : type(type), memory(count + 16) { fill_poison(); }
    void fill_poison() {
        for (auto& bits : memory) bits = 0x7fff;
    }
    uint16_t* data() { return memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / 2; }
    float operator[](size_t i) { return from_bits(type, data()[i]); }
    void set(size_t i, float value) { data()[i] = to_bits(type, value); }
    int type;
    std::vector<uint16_t> memory;
};

double activated(double x, int activation) {
    switch (activation) {
        case 1: return x < 0 ? 0 : x;
        case 2: return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
        case 3: return x / (1 + std::exp(-x));
        default: return x;
    }
}

void expect(bool condition, const std::string& what) {
    if (condition) return;
    ++failures;
    std::printf("FAILED %s\n", what.c_str());
}

// Error at most one rounding of the output type plus fp32 sums.
void compare(const std::string& name, int type, Numbers& actual, const std::vector<double>& expected) {
    const double unit = type == 0 ? 1.0 / 256 : 1.0 / 2048;
    double scale = 1e-6, worst = 0;
    size_t where = 0;
    for (double value : expected) scale = std::max(scale, std::fabs(value));
    for (size_t i = 0; i < expected.size(); ++i) {
        const double error = std::fabs(actual[i] - expected[i]) - unit * std::fabs(expected[i]);
        if (!(error <= worst)) worst = error, where = i;
    }
    char text[200];
    std::snprintf(text, sizeof text, "%s: element %zu is %g, expected %g (scale %g)", name.c_str(), where,
                  expected.empty() ? 0.0 : actual[where], expected.empty() ? 0.0 : expected[where], scale);
    expect(worst <= 1e-5 * scale, text);
}

// Runs twice, in both orders of lanes; the results must be the same bits.
template <class Run>
void run_both_ways(const std::string& name, Numbers& out, Run run) {
    host::last_lane_first() = true;
    out.fill_poison();
    expect(run() == 0, name + ": launch failed");
    const std::vector<uint16_t> first = out.memory;
    host::last_lane_first() = false;
    out.fill_poison();
    expect(run() == 0, name + ": launch failed");
    expect(first == out.memory, name + ": the result depends on the order of lanes");
}

void test_bitmask(int tokens, int outputs, int inputs, double density, int type, int activation) {
    const std::string name = "bitmask " + std::to_string(tokens) + "×" + std::to_string(outputs) + "×" + std::to_string(inputs) +
                             " density " + std::to_string(density) + " type " + std::to_string(type) + " activation " +
                             std::to_string(activation);
    Numbers weight(type, static_cast<size_t>(outputs) * inputs), x(type, static_cast<size_t>(tokens) * inputs), bias(type, outputs);
    for (int i = 0; i < outputs * inputs; ++i) weight.set(i, chance(density) ? normal() : (i % 2 ? 0.0f : -0.0f));
    for (int i = 0; i < tokens * inputs; ++i) x.set(i, normal());
    for (int i = 0; i < outputs; ++i) bias.set(i, normal());
    std::vector<uint32_t> start(static_cast<size_t>(tiles_down(outputs)) * tiles_across(inputs) + 1);
    const int64_t units = se_cuda_bitmask_pack(weight.data(), outputs, inputs, start.data(), nullptr);
    Numbers records(type, static_cast<size_t>(units) * 8);
    auto* bytes = reinterpret_cast<uint8_t*>(records.data());
    expect(se_cuda_bitmask_pack(weight.data(), outputs, inputs, start.data(), bytes) == units, name + ": two sizes");
    Numbers back(type, static_cast<size_t>(outputs) * inputs);
    se_cuda_bitmask_unpack(start.data(), bytes, outputs, inputs, back.data());
    bool same = true;
    for (int i = 0; i < outputs * inputs; ++i) same &= back[i] == weight[i];
    expect(same, name + ": unpacking gives another weight");
    int largest = kMaskBytes;
    for (size_t i = 0; i + 1 < start.size(); ++i) largest = std::max(largest, static_cast<int>(start[i + 1] - start[i]) * 16);

    std::vector<double> expected(static_cast<size_t>(tokens) * outputs);
    for (int t = 0; t < tokens; ++t) {
        for (int m = 0; m < outputs; ++m) {
            double sum = bias[m];
            for (int k = 0; k < inputs; ++k)
                sum += static_cast<double>(weight[static_cast<size_t>(m) * inputs + k]) * x[static_cast<size_t>(t) * inputs + k];
            expected[static_cast<size_t>(t) * outputs + m] = activated(sum, activation);
        }
    }
    Numbers out(type, expected.size());
    for (int decode = 0; decode <= (tokens <= 16 ? 1 : 0); ++decode) {
        const std::string which = name + (decode ? " decode" : "");
        run_both_ways(which, out, [&] {
            return se_cuda_bitmask_linear(x.data(), start.data(), bytes, bias.data(), out.data(), tokens, outputs, inputs, largest, type,
                                          activation, decode, nullptr);
        });
        compare(which, type, out, expected);
    }
}

void test_block(int tokens, int outputs, int inputs, int rows, int cols, double density, int type) {
    const std::string name = "block " + std::to_string(tokens) + "×" + std::to_string(outputs) + "×" + std::to_string(inputs) + " of " +
                             std::to_string(rows) + "×" + std::to_string(cols) + " type " + std::to_string(type);
    const int down = (outputs + rows - 1) / rows, across = (inputs + cols - 1) / cols;
    std::vector<int32_t> row_ptr{0}, kept, order;
    for (int i = 0; i < down; ++i) {
        for (int j = 0; j < across; ++j) {
            if (i != 1 && chance(density)) kept.push_back(j);  // block row 1 is empty
        }
        row_ptr.push_back(static_cast<int32_t>(kept.size()));
        order.push_back(down - 1 - i);
    }
    kept.reserve(1);
    Numbers values(type, kept.size() * rows * cols), x(type, static_cast<size_t>(tokens) * inputs), bias(type, outputs);
    for (size_t i = 0; i < kept.size() * rows * cols; ++i) values.set(i, normal());
    for (int i = 0; i < tokens * inputs; ++i) x.set(i, normal());
    for (int i = 0; i < outputs; ++i) bias.set(i, normal());
    std::vector<double> expected(static_cast<size_t>(tokens) * outputs);
    for (int t = 0; t < tokens; ++t) {
        for (int m = 0; m < outputs; ++m) {
            double sum = bias[m];
            for (int b = row_ptr[m / rows]; b < row_ptr[m / rows + 1]; ++b) {
                for (int c = 0; c < cols && kept[b] * cols + c < inputs; ++c) {
                    const size_t place = (static_cast<size_t>(b) * rows + m % rows) * cols + c;
                    sum += static_cast<double>(values[place]) * x[static_cast<size_t>(t) * inputs + kept[b] * cols + c];
                }
            }
            expected[static_cast<size_t>(t) * outputs + m] = activated(sum, 2);
        }
    }
    Numbers out(type, expected.size());
    run_both_ways(name, out, [&] {
        return se_cuda_block_linear(x.data(), values.data(), row_ptr.data(), kept.data(), order.data(), bias.data(), out.data(), tokens,
                                    outputs, inputs, rows, cols, type, 2, nullptr);
    });
    compare(name, type, out, expected);
}

struct ConvCase {
    int batch, height, width, channels, outputs, kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, run;
};

void test_conv(const ConvCase& c, int type) {
    const std::string name = "conv " + std::to_string(c.height) + "×" + std::to_string(c.width) + " channels " +
                             std::to_string(c.channels) + "→" + std::to_string(c.outputs) + " kernel " + std::to_string(c.kernel_y) + "×" +
                             std::to_string(c.kernel_x) + " runs of " + std::to_string(c.run) + " type " + std::to_string(type);
    const int out_y = (c.height + 2 * c.pad_y - c.dilation_y * (c.kernel_y - 1) - 1) / c.stride_y + 1;
    const int out_x = (c.width + 2 * c.pad_x - c.dilation_x * (c.kernel_x - 1) - 1) / c.stride_x + 1;
    std::vector<int32_t> in, out_index;
    for (int start = 0; start < c.channels; start += c.run) {
        if (start && !chance(0.6)) continue;
        for (int i = 0; i < c.run; ++i) in.push_back(start + i);
    }
    for (int m = 0; m < c.outputs; ++m) {
        if (!m || chance(0.6)) out_index.push_back(m);
    }
    const int kept_in = static_cast<int>(in.size()), kept_out = static_cast<int>(out_index.size());
    const int padded = (kept_in + 63) / 64 * 64, taps = c.kernel_y * c.kernel_x;
    Numbers x(type, static_cast<size_t>(c.batch) * c.height * c.width * c.channels), bias(type, kept_out);
    Numbers weight(type, static_cast<size_t>(kept_out) * taps * padded);
    for (size_t i = 0; i < static_cast<size_t>(c.batch) * c.height * c.width * c.channels; ++i) x.set(i, normal());
    for (int i = 0; i < kept_out; ++i) bias.set(i, normal());
    for (int i = 0; i < kept_out * taps; ++i) {
        for (int k = 0; k < padded; ++k) weight.set(static_cast<size_t>(i) * padded + k, k < kept_in ? normal() : 0.0f);
    }
    const size_t size = static_cast<size_t>(c.batch) * out_y * out_x * c.outputs;
    std::vector<double> expected(size, std::numeric_limits<double>::quiet_NaN());  // pruned channels stay as they were
    for (int n = 0; n < c.batch; ++n) {
        for (int y = 0; y < out_y; ++y) {
            for (int z = 0; z < out_x; ++z) {
                for (int m = 0; m < kept_out; ++m) {
                    double sum = bias[m];
                    for (int tap = 0; tap < taps; ++tap) {
                        const int iy = y * c.stride_y - c.pad_y + tap / c.kernel_x * c.dilation_y;
                        const int ix = z * c.stride_x - c.pad_x + tap % c.kernel_x * c.dilation_x;
                        if (iy < 0 || iy >= c.height || ix < 0 || ix >= c.width) continue;
                        for (int k = 0; k < kept_in; ++k) {
                            sum += static_cast<double>(weight[(static_cast<size_t>(m) * taps + tap) * padded + k]) *
                                   x[((static_cast<size_t>(n) * c.height + iy) * c.width + ix) * c.channels + in[k]];
                        }
                    }
                    expected[((static_cast<size_t>(n) * out_y + y) * out_x + z) * c.outputs + out_index[m]] = activated(sum, 1);
                }
            }
        }
    }
    Numbers out(type, size);
    const int sizes[] = {c.batch,  c.height,   c.width,    c.channels, out_y,      out_x,   c.outputs, kept_in,      padded,
                         kept_out, c.kernel_y, c.kernel_x, c.stride_y, c.stride_x, c.pad_y, c.pad_x,   c.dilation_y, c.dilation_x};
    run_both_ways(name, out, [&] {
        return se_cuda_gather_conv(x.data(), weight.data(), in.data(), out_index.data(), bias.data(), out.data(), sizes, c.run, type, 1,
                                   nullptr);
    });
    for (size_t i = 0; i < size; ++i) {
        if (std::isnan(expected[i])) {
            expect(out.data()[i] == 0x7fff, name + ": a pruned channel was written");
            expected[i] = 0;
            out.set(i, 0.0f);
        }
    }
    compare(name, type, out, expected);
}

void test_conversions() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const auto half = static_cast<uint16_t>(bits);
        if (std::isnan(widen<Type::kFp16>(half)) || std::isnan(widen<Type::kBf16>(half))) continue;
        if (narrow<Type::kFp16>(widen<Type::kFp16>(half)) != half) return expect(false, "fp16 " + std::to_string(bits));
        if (narrow<Type::kBf16>(widen<Type::kBf16>(half)) != half) return expect(false, "bf16 " + std::to_string(bits));
    }
    expect(narrow<Type::kFp16>(1.0f + 1.0f / 2048) == 0x3c00, "fp16 ties to even");
    expect(narrow<Type::kFp16>(1.0f + 3.0f / 2048) == 0x3c02, "fp16 ties to even, up");
    expect(narrow<Type::kFp16>(65519.0f) == 0x7bff && narrow<Type::kFp16>(65520.0f) == 0x7c00, "fp16 largest");
    expect(narrow<Type::kFp16>(2.98e-8f) == 0 && narrow<Type::kFp16>(2.99e-8f) == 1, "fp16 smallest");
    expect(narrow<Type::kBf16>(1.0f + 1.0f / 256) == 0x3f80, "bf16 ties to even");
    expect(std::isnan(widen<Type::kBf16>(narrow<Type::kBf16>(NAN))) && std::isnan(widen<Type::kFp16>(narrow<Type::kFp16>(NAN))), "NaN");
}

void test_warp() {
    std::vector<int> sums(64);
    std::vector<uint32_t> ballots(64);
    launch(
        +[](int* s, uint32_t* b) {
            s[thread_index()] = exclusive_sum(thread_index() + 1);
            b[thread_index()] = ballot(thread_index() % 3 == 0);
        },
        Grid{1, 1, 1}, 64, 0, nullptr, sums.data(), ballots.data());
    for (int i = 0; i < 64; ++i) {
        int expected = 0;
        uint32_t bits = 0;
        for (int j = i / 32 * 32; j < i; ++j) expected += j + 1;
        for (int j = 0; j < 32; ++j) bits |= static_cast<uint32_t>((i / 32 * 32 + j) % 3 == 0) << j;
        expect(sums[i] == expected && ballots[i] == bits, "warp operations at lane " + std::to_string(i));
    }
}

int all_cases() {
    test_conversions();
    test_warp();
    // tokens, outputs, inputs, density
    test_bitmask(1, 16, 64, 0.5, 0, 0);
    test_bitmask(3, 40, 200, 0.2, 0, 1);
    test_bitmask(16, 130, 1032, 0.1, 1, 2);
    test_bitmask(9, 33, 72, 1.0, 0, 3);
    test_bitmask(5, 20, 136, 0.0, 1, 0);
    test_bitmask(70, 100, 328, 0.15, 0, 2);
    test_bitmask(130, 64, 64, 0.05, 1, 1);
    test_block(150, 192, 256, 64, 64, 0.6, 0);
    test_block(7, 200, 232, 64, 128, 0.6, 1);
    test_block(130, 256, 128, 128, 64, 0.5, 0);
    for (int run : {1, 2, 4, 8}) test_conv({2, 9, 7, 24, 20, 3, 3, 1, 1, 1, 1, 1, 1, run}, run % 4 == 1);
    test_conv({1, 8, 8, 128, 70, 1, 1, 1, 1, 0, 0, 1, 1, 8}, 0);
    test_conv({2, 11, 10, 12, 8, 3, 2, 2, 3, 1, 0, 1, 2, 4}, 1);
    test_conv({1, 12, 12, 3, 5, 5, 5, 2, 2, 2, 2, 1, 1, 1}, 0);
    expect(se_cuda_bitmask_linear(nullptr, nullptr, nullptr, nullptr, nullptr, 1, 16, 63, 128, 0, 0, 0, nullptr) == -2,
           "63 inputs are refused");
    expect(se_cuda_bitmask_linear(nullptr, nullptr, nullptr, nullptr, nullptr, 1, 16, 64, 128, 2, 0, 0, nullptr) == -1,
           "type 2 is refused");
    std::printf(failures ? "%d failures\n" : "all passed\n", failures);
    return failures != 0;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string what = count > 1 ? arguments[1] : "";
    std::vector<int> numbers(64, 1);
    if (what == "stuck") {
        launch(
            +[] {
                if (thread_index() < 40) sync_threads();
            },
            Grid{1, 1, 1}, 64, 0, nullptr);
        return 0;
    }
    if (what == "race") {
        launch(
            +[](int* out) {
                int* shared = reinterpret_cast<int*>(shared_memory());
                shared[thread_index()] = thread_index();
                out[thread_index()] = shared[63 - thread_index()];
            },
            Grid{1, 1, 1}, 64, 256, nullptr, numbers.data());
        return 0;
    }
    if (what == "late") {
        alignas(16) static int source[4] = {1, 2, 3, 4};
        launch(
            +[](int* out) {
                char* to = shared_memory() + 16 * thread_index();
                copy_async<16>(to, source, true);
                copy_async_commit();
                out[thread_index()] = *reinterpret_cast<int*>(to);
                copy_async_wait<0>();
            },
            Grid{1, 1, 1}, 64, 1024, nullptr, numbers.data());
        std::printf("%d\n", numbers[0]);
        return numbers[0] == -1 ? 0 : 1;
    }
    if (what == "overflow") {
        launch(+[] { shared_memory()[512 + 4 * thread_index()] = 1; }, Grid{1, 1, 1}, 64, 256, nullptr);
        return 0;
    }
    return all_cases();
}
