// Every kernel of the table in use against the same sums in double precision. Outputs are poisoned before, and what lies behind them is
// checked after.
#include "check.h"
#include "cpu/kernels.h"

using namespace sparse_engine;
using check::kPoison;
using check::Random;
using check::relative_error;

namespace {

constexpr double kBound = 1e-5;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
const int kPanels[] = {1, 2, 4, 8};

struct Product {
    int64_t rows, cols;
    std::vector<int64_t> row_ptr{0};
    std::vector<int32_t> col;
    std::vector<float> values, dense;
};

Product random_product(int64_t rows, int64_t cols, double density, uint64_t seed) {
    Random random(seed);
    Product p{rows, cols, {0}, {}, {}, std::vector<float>(static_cast<size_t>(rows * cols), 0.0f)};
    for (int64_t row = 0; row < rows; row++) {
        double wanted = row % 6 == 4 ? 0.0 : density;
        for (int64_t col = 0; col < cols; col++)
            if (random.uniform() < wanted) {
                float value = random.between(-1, 1);
                p.col.push_back(static_cast<int32_t>(col)), p.values.push_back(value);
                p.dense[static_cast<size_t>(row * cols + col)] = value;
            }
        p.row_ptr.push_back(static_cast<int64_t>(p.col.size()));
    }
    return p;
}

// out = clamp(bias + W X + residual) over a tile of `vectors` vectors, with the table's kernel for that shape.
void check_spmm(const Product& p, int panel, bool dense, int vectors, int row_block, bool with_bias, bool with_residual, float low,
                float high) {
    const KernelTable& k = kernels();
    const int log = panel == 8 ? 3 : panel == 4 ? 2 : panel == 2 ? 1 : 0, width = vectors * k.lanes, ld = width + 3;
    SpmmKernel kernel = dense ? k.dense[log][vectors] : k.sparse[log][vectors];
    CHECK(kernel != nullptr);
    if (!kernel) return;
    CsrView csr{p.rows, p.cols, p.row_ptr.data(), p.col.data()};
    PanelOptions options{.panel = panel, .row_block = row_block};
    PanelMatrix w = dense ? PanelMatrix(p.rows, p.cols, p.dense.data(), options) : PanelMatrix(csr, p.values.data(), options);

    Random random(7);
    std::vector<float> x = random.floats(static_cast<size_t>(p.cols * ld)), bias = random.floats(static_cast<size_t>(p.rows));
    std::vector<float> residual = random.floats(static_cast<size_t>(p.rows * ld)), out(static_cast<size_t>(p.rows * ld), kPoison);
    std::vector<double> expected(out.size());
    for (int64_t row = 0; row < p.rows; row++)
        for (int i = 0; i < width; i++) {
            double sum = with_bias ? bias[static_cast<size_t>(row)] : 0.0;
            if (with_residual) sum += residual[static_cast<size_t>(row * ld + i)];
            for (int64_t c = 0; c < p.cols; c++)
                sum += double(p.dense[static_cast<size_t>(row * p.cols + c)]) * x[static_cast<size_t>(c * ld + i)];
            expected[static_cast<size_t>(row * ld + i)] = std::fmin(std::fmax(sum, low), high);
        }
    for (int block = 0; block < w.row_blocks; block++) {
        int64_t row0 = block * w.block_rows();
        for (int part = 0; part < w.parts; part++) {
            const PanelSegment& segment = w.segment(block, part);
            SpmmArgs a{};
            a.runs = w.runs.data() + segment.run_begin, a.runs_end = w.runs.data() + segment.run_end;
            a.panel_rows = w.panel_rows.data() + segment.row_begin;
            a.index = w.index.data() + segment.index_begin, a.values = w.values.data() + segment.value_begin;
            a.x = x.data() + int64_t(part) * w.options.part * ld, a.x_stride = static_cast<size_t>(ld);
            a.out = out.data() + row0 * ld, a.out_stride = static_cast<size_t>(ld);
            a.rows = static_cast<int>(std::min<int64_t>(w.block_rows(), p.rows - row0));
            a.first = part == 0, a.last = part == w.parts - 1;
            a.bias = with_bias ? bias.data() + row0 : nullptr;
            a.residual = with_residual ? residual.data() + row0 * ld : nullptr, a.residual_stride = static_cast<size_t>(ld);
            a.low = low, a.high = high;
            kernel(a);
        }
    }
    for (int64_t row = 0; row < p.rows; row++) {
        double error = relative_error(out.data() + row * ld, expected.data() + row * ld, static_cast<size_t>(width));
        if (!(error <= kBound * 10)) {  // a row may be all small; the whole is held to the bound below
            std::ostringstream text;
            text << "row " << row << " of " << p.rows << "x" << p.cols << ", panel " << panel << (dense ? " dense" : "") << ", " << vectors
                 << " vectors: relative error " << error;
            check::fail(__FILE__, __LINE__, text.str());
        }
        for (int i = width; i < ld; i++) CHECK(std::isnan(out[static_cast<size_t>(row * ld + i)]));  // nothing behind the tile is touched
        for (int i = width; i < ld; i++) out[static_cast<size_t>(row * ld + i)] = 0;
    }
    CHECK(relative_error(out.data(), expected.data(), out.size()) <= kBound);
}

void check_map(Activation kind, float p0, float p1, double (*reference)(double, double, double), float low, float high,
               double bound = kBound) {
    Random random(static_cast<uint64_t>(kind) + 1);
    for (int64_t n : {0, 1, 7, 8, 9, 15, 16, 17, 31, 100, 1000}) {
        std::vector<float> x = random.floats(static_cast<size_t>(n), low, high), y(static_cast<size_t>(n) + 4, kPoison);
        std::vector<double> expected;
        for (float value : x) expected.push_back(reference(value, p0, p1));
        kernels().activate(kind, p0, p1, x.data(), y.data(), n);
        double error = relative_error(y.data(), expected.data(), static_cast<size_t>(n));
        if (!(error <= bound))
            check::fail(__FILE__, __LINE__, "activation " + std::to_string(int(kind)) + ": relative error " + std::to_string(error));
        for (int i = 0; i < 4; i++) CHECK(std::isnan(y[static_cast<size_t>(n + i)]));
        kernels().activate(kind, p0, p1, x.data(), x.data(), n);  // in place
        y.resize(static_cast<size_t>(n));
        CHECK(x == y);
    }
}

}  // namespace

TEST(the_table_is_the_one_asked_for) {
    CHECK_EQUAL(std::string(kernels().name), to_string(active_isa()));
    CHECK(kernels().lanes == 8 || kernels().lanes == 16);
    for (int log = 0; log < 4; log++) {
        CHECK(kernels().max_vectors[log] >= 1 && kernels().max_vectors[log] <= kMaxVectors);
        for (int vectors = 1; vectors <= kernels().max_vectors[log]; vectors++)
            CHECK(kernels().sparse[log][vectors] && kernels().dense[log][vectors]);
    }
}

TEST(sparse_products) {
    for (int log = 0; log < 4; log++)
        for (int vectors = 1; vectors <= kernels().max_vectors[log]; vectors++)
            for (double density : {0.0, 0.02, 0.1, 0.5, 1.0})
                check_spmm(random_product(37, 300, density, 3), kPanels[log], false, vectors, 16, true, true, -kInfinity, kInfinity);
}

TEST(dense_products) {
    for (int log = 0; log < 4; log++)
        for (int vectors = 1; vectors <= kernels().max_vectors[log]; vectors++)
            check_spmm(random_product(29, 261, 1.0, 4), kPanels[log], true, vectors, 0, true, true, -kInfinity, kInfinity);
}

TEST(products_with_every_epilogue) {
    for (int panel : kPanels)
        for (bool dense : {false, true})
            for (bool bias : {false, true})
                for (bool residual : {false, true})
                    for (float low : {-kInfinity, 0.0f})
                        check_spmm(random_product(13, 70, 0.3, 5), panel, dense, 1, 0, bias, residual, low, low == 0 ? 0.5f : kInfinity);
}

TEST(products_of_odd_shapes) {
    for (int panel : kPanels)
        for (int64_t rows : {1, 2, 3, 9})
            for (int64_t cols : {1, 2, 3, 4, 5, 255, 256, 257, 513})
                check_spmm(random_product(rows, cols, 0.4, static_cast<uint64_t>(rows * cols)), panel, false, 1, 0, true, false, -kInfinity,
                           kInfinity);
}

TEST(nan_and_infinity_pass_through_the_clamp) {
    Product p = random_product(1, 1, 1.0, 1);
    p.values[0] = 1.0f;
    PanelMatrix w(CsrView{1, 1, p.row_ptr.data(), p.col.data()}, p.values.data(), {});
    const int lanes = kernels().lanes;
    std::vector<float> x(static_cast<size_t>(lanes), kPoison), out(static_cast<size_t>(lanes), 0.0f);
    x[1] = kInfinity, x[2] = -kInfinity;
    SpmmArgs a{};
    a.runs = w.runs.data(), a.runs_end = w.runs.data() + w.runs.size(), a.panel_rows = w.panel_rows.data(), a.index = w.index.data(),
    a.values = w.values.data();
    a.x = x.data(), a.x_stride = static_cast<size_t>(lanes), a.out = out.data(), a.out_stride = static_cast<size_t>(lanes), a.rows = 1,
    a.first = a.last = true;
    a.low = 0, a.high = 6;
    kernels().sparse[0][1](a);
    CHECK(std::isnan(out[0]));
    CHECK_EQUAL(out[1], 6.0f);
    CHECK_EQUAL(out[2], 0.0f);
}

TEST(transposes_there_and_back) {
    const KernelTable& k = kernels();
    for (int n : {1, 5, 16, 17, 40})
        for (int columns : {1, 3, 16, 33}) {
            int width = (n + k.lanes - 1) / k.lanes * k.lanes;
            size_t ld = static_cast<size_t>(columns) + 2;
            std::vector<float> x = Random(static_cast<uint64_t>(n * columns)).floats(static_cast<size_t>(n) * ld);
            std::vector<float> tile(static_cast<size_t>(columns * width), kPoison), back(static_cast<size_t>(n) * ld, kPoison);
            k.transpose_in(x.data(), ld, n, columns, tile.data(), width);
            for (int c = 0; c < columns; c++)
                for (int i = 0; i < width; i++)
                    CHECK_EQUAL(tile[static_cast<size_t>(c * width + i)],
                                i < n ? x[static_cast<size_t>(i) * ld + static_cast<size_t>(c)] : 0.0f);
            k.transpose_out(tile.data(), width, columns, n, back.data(), ld);
            for (int i = 0; i < n; i++)
                for (size_t c = 0; c < ld; c++) {
                    float value = back[static_cast<size_t>(i) * ld + c];
                    CHECK(c < static_cast<size_t>(columns) ? value == x[static_cast<size_t>(i) * ld + c] : std::isnan(value));
                }
        }
}

TEST(im2col_by_shifts_and_by_gathering) {
    const KernelTable& k = kernels();
    // A 3×3 convolution with padding 1 on a plane of 7×9 pixels, three channels.
    const int height = 7, width = 9, pixels = height * width, channels = 3, taps = 9, groups = (pixels + 15) / 16 + 1;
    const size_t channel_stride = 96;
    std::vector<float> storage = Random(3).floats(channel_stride * (channels + 2));
    const float* x = storage.data() + channel_stride;
    std::vector<int64_t> offset;
    std::vector<uint16_t> mask(static_cast<size_t>(taps * groups), 0);
    std::vector<int32_t> gather(static_cast<size_t>(taps * 256), -1);
    for (int tap = 0; tap < taps; tap++) {
        int dy = tap / 3 - 1, dx = tap % 3 - 1;
        offset.push_back(dy * width + dx);
        for (int p = 0; p < pixels; p++) {
            int y = p / width + dy, z = p % width + dx;
            if (y < 0 || y >= height || z < 0 || z >= width) continue;
            mask[static_cast<size_t>(tap * groups + p / 16)] =
                static_cast<uint16_t>(mask[static_cast<size_t>(tap * groups + p / 16)] | 1u << (p % 16));
            gather[static_cast<size_t>(tap * 256 + p)] = y * width + z;
        }
    }
    enum { shifts, rows, gathers };
    for (int way : {shifts, rows, gathers})
        for (int vectors = 1; vectors <= 64 / k.lanes && vectors <= kMaxVectors; vectors++)
            for (int first : {0, 4, 20}) {
                int columns = channels * taps - first, across = vectors * k.lanes;
                std::vector<float> tile(static_cast<size_t>(columns * across), kPoison);
                Im2colArgs a{};
                a.x = x, a.channel_stride = channel_stride, a.taps = taps, a.tap_offset = offset.data(), a.tap_mask = mask.data(),
                a.mask_stride = groups;
                a.rows_of_three = way == rows;
                a.gather = way == gathers ? gather.data() : nullptr, a.gather_stride = 256;
                a.channel0 = first / taps, a.tap0 = first % taps, a.columns = columns, a.pixel0 = 0, a.vectors = vectors,
                a.tile = tile.data();
                k.im2col(a);
                for (int c = 0; c < columns; c++)
                    for (int i = 0; i < across; i++) {
                        int channel = (first + c) / taps, source = gather[static_cast<size_t>((first + c) % taps * 256 + i)];
                        float expected = source < 0 ? 0.0f : x[static_cast<size_t>(channel) * channel_stride + static_cast<size_t>(source)];
                        CHECK_EQUAL(tile[static_cast<size_t>(c * across + i)], expected);
                    }
            }
}

TEST(matrix_times_vector) {
    for (double density : {0.0, 0.1, 1.0})
        for (int64_t cols : {1, 15, 16, 17, 100}) {
            Product p = random_product(11, cols, density, static_cast<uint64_t>(cols));
            Random random(9);
            std::vector<float> x = random.floats(static_cast<size_t>(cols)), bias = random.floats(11), residual = random.floats(11);
            std::vector<double> expected;
            for (int64_t row = 0; row < 11; row++) {
                double sum = double(bias[static_cast<size_t>(row)]) + residual[static_cast<size_t>(row)];
                for (int64_t c = 0; c < cols; c++) sum += double(p.dense[static_cast<size_t>(row * cols + c)]) * x[static_cast<size_t>(c)];
                expected.push_back(std::fmin(std::fmax(sum, -0.25), 0.75));
            }
            std::vector<float> sparse(12, kPoison), dense(12, kPoison);
            // In two calls, as two threads would.
            for (auto [from, to] : {std::pair<int64_t, int64_t>{0, 5}, {5, 11}}) {
                kernels().spmv(p.row_ptr.data(), p.col.data(), p.values.data(), from, to, x.data(), sparse.data(), bias.data(),
                               residual.data(), -0.25f, 0.75f);
                kernels().gemv(p.dense.data(), cols, from, to, x.data(), dense.data(), bias.data(), residual.data(), -0.25f, 0.75f);
            }
            CHECK(relative_error(sparse.data(), expected.data(), 11) <= kBound);
            CHECK(relative_error(dense.data(), expected.data(), 11) <= kBound);
            CHECK(std::isnan(sparse[11]) && std::isnan(dense[11]));
        }
}

TEST(products_sampled_at_a_pattern) {
    const int width = 5 * kernels().lanes;
    Product p = random_product(9, 40, 0.2, 8);
    std::vector<float> dy = Random(1).floats(static_cast<size_t>(9 * width)), x = Random(2).floats(static_cast<size_t>(40 * width));
    std::vector<float> out(p.col.size(), 0.5f);  // it adds
    std::vector<int64_t> cursor(p.row_ptr.begin(), p.row_ptr.end() - 1);
    // Two parts of the columns, the way a caller goes through x tile by tile.
    for (auto [from, to] : {std::pair<int32_t, int32_t>{0, 25}, {25, 40}})
        kernels().sddmm(0, 9, p.row_ptr.data() + 1, cursor.data(), p.col.data(), from, to, dy.data(), static_cast<size_t>(width),
                        x.data() + from * width, static_cast<size_t>(width), width, out.data());
    std::vector<double> expected;
    for (int64_t row = 0; row < 9; row++)
        for (int64_t e = p.row_ptr[static_cast<size_t>(row)]; e < p.row_ptr[static_cast<size_t>(row) + 1]; e++) {
            double sum = 0.5;
            for (int i = 0; i < width; i++)
                sum += double(dy[static_cast<size_t>(row * width + i)]) * x[static_cast<size_t>(p.col[static_cast<size_t>(e)] * width + i)];
            expected.push_back(sum);
        }
    CHECK(relative_error(out.data(), expected.data(), out.size()) <= kBound);
    for (size_t row = 0; row < 9; row++) CHECK_EQUAL(cursor[row], p.row_ptr[row + 1]);
}

TEST(activations) {
    using D = double;
    check_map(Activation::none, 0, 0, [](D x, D, D) { return x; }, -5, 5, 0);
    check_map(Activation::clamp, -1, 2, [](D x, D a, D b) { return std::fmin(std::fmax(x, a), b); }, -5, 5, 0);
    check_map(Activation::leaky_relu, 0.01f, 0, [](D x, D a, D) { return x > 0 ? x : a * x; }, -5, 5);
    check_map(Activation::gelu, 0, 0, [](D x, D, D) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }, -6, 6);
    check_map(
        Activation::gelu_tanh, 0, 0,
        [](D x, D, D) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x))); }, -6, 6);
    check_map(Activation::silu, 0, 0, [](D x, D, D) { return x / (1 + std::exp(-x)); }, -10, 10);
    check_map(Activation::hardswish, 0, 0, [](D x, D, D) { return x * std::fmin(std::fmax(x + 3, 0.0), 6.0) / 6; }, -5, 5);
    check_map(Activation::hardsigmoid, 0, 0, [](D x, D, D) { return std::fmin(std::fmax(x + 3, 0.0), 6.0) / 6; }, -5, 5);
    check_map(Activation::sigmoid, 0, 0, [](D x, D, D) { return 1 / (1 + std::exp(-x)); }, -30, 30);
    check_map(Activation::tanh, 0, 0, [](D x, D, D) { return std::tanh(x); }, -10, 10);
    check_map(Activation::elu, 1.5f, 0, [](D x, D a, D) { return x > 0 ? x : a * std::expm1(x); }, -5, 5);
    check_map(Activation::softplus, 2, 20, [](D x, D b, D t) { return x * b > t ? x : std::log1p(std::exp(x * b)) / b; }, -15, 15);
    check_map(Activation::exp, 0, 0, [](D x, D, D) { return std::exp(x); }, -20, 20);
    check_map(Activation::exp, 0, 0, [](D x, D, D) { return std::exp(x); }, 80, 88);
    check_map(Activation::sqrt, 0, 0, [](D x, D, D) { return std::sqrt(x); }, 0, 5);
    check_map(Activation::rsqrt, 0, 0, [](D x, D, D) { return 1 / std::sqrt(x); }, 0.01f, 5);
    check_map(Activation::neg, 0, 0, [](D x, D, D) { return -x; }, -5, 5, 0);
    check_map(Activation::abs, 0, 0, [](D x, D, D) { return std::fabs(x); }, -5, 5, 0);
    check_map(Activation::reciprocal, 0, 0, [](D x, D, D) { return 1 / x; }, 0.1f, 5);
    check_map(Activation::square, 0, 0, [](D x, D, D) { return x * x; }, -5, 5);
    check_map(Activation::log, 0, 0, [](D x, D, D) { return std::log(x); }, 0.01f, 50);
    check_map(Activation::erf, 0, 0, [](D x, D, D) { return std::erf(x); }, -4, 4);
}

// Element by element, from the smallest normal number up: what is tiny keeps its digits.
void check_relative(Activation kind, double (*reference)(double), float high, double bound) {
    std::vector<float> x;
    for (double magnitude = 1.2e-38; magnitude < high; magnitude *= 1.0137)
        for (float sign : {1.0f, -1.0f}) x.push_back(sign * static_cast<float>(magnitude));
    std::vector<float> y(x.size(), kPoison);
    kernels().activate(kind, 1, 0, x.data(), y.data(), static_cast<int64_t>(x.size()));
    double worst = 0, at = 0;
    for (size_t i = 0; i < x.size(); i++) {
        double expected = reference(x[i]), error = std::fabs(y[i] - expected) / std::fabs(expected);
        if (!(error <= worst)) worst = error, at = x[i];
    }
    if (!(worst <= bound)) {
        std::ostringstream text;
        text << "activation " << int(kind) << " at " << at << ": relative error " << worst;
        check::fail(__FILE__, __LINE__, text.str());
    }
}

TEST(tiny_arguments_keep_their_digits) {
    check_relative(Activation::tanh, [](double x) { return std::tanh(x); }, 20, 5e-7);
    check_relative(Activation::erf, [](double x) { return std::erf(x); }, 10, 5e-7);
    check_relative(Activation::elu, [](double x) { return x > 0 ? x : std::expm1(x); }, 100, 5e-7);
    check_relative(Activation::gelu, [](double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }, 0.5f, 5e-7);
    check_relative(Activation::silu, [](double x) { return x / (1 + std::exp(-x)); }, 50, 5e-7);
}

TEST(activations_at_the_edges) {
    auto one = [](Activation kind, float x) {
        float y = kPoison;
        kernels().activate(kind, 1, 20, &x, &y, 1);
        return y;
    };
    CHECK_EQUAL(one(Activation::exp, -kInfinity), 0.0f);
    CHECK_EQUAL(one(Activation::exp, kInfinity), kInfinity);
    CHECK_EQUAL(one(Activation::exp, 0.0f), 1.0f);
    CHECK_EQUAL(one(Activation::sigmoid, -kInfinity), 0.0f);
    CHECK_EQUAL(one(Activation::sigmoid, 200.0f), 1.0f);
    CHECK_EQUAL(one(Activation::tanh, kInfinity), 1.0f);
    CHECK_EQUAL(one(Activation::tanh, -kInfinity), -1.0f);
    CHECK_EQUAL(one(Activation::gelu, 50.0f), 50.0f);
    CHECK_EQUAL(one(Activation::gelu, 0.0f), 0.0f);
    CHECK_EQUAL(one(Activation::erf, 0.0f), 0.0f);
    CHECK_EQUAL(one(Activation::erf, kInfinity), 1.0f);
    CHECK_EQUAL(one(Activation::erf, -kInfinity), -1.0f);
    CHECK_EQUAL(one(Activation::tanh, 0.0f), 0.0f);
    CHECK_EQUAL(one(Activation::elu, -kInfinity), -1.0f);
    CHECK_EQUAL(one(Activation::elu, kInfinity), kInfinity);
    for (Activation kind :
         {Activation::clamp, Activation::gelu, Activation::silu, Activation::sigmoid, Activation::tanh, Activation::exp,
          Activation::hardswish, Activation::elu, Activation::leaky_relu, Activation::square, Activation::erf, Activation::softplus})
        CHECK(std::isnan(one(kind, kPoison)));
}

TEST(two_operands) {
    for (int kind = 0; kind < static_cast<int>(Binary::count); kind++)
        for (int a_step : {0, 1})
            for (int b_step : {0, 1})
                for (int64_t n : {1, 8, 13, 16, 35}) {
                    std::vector<float> a = Random(1).floats(static_cast<size_t>(n), 0.5f, 2),
                                       b = Random(2).floats(static_cast<size_t>(n), 0.5f, 2);
                    std::vector<float> y(static_cast<size_t>(n) + 1, kPoison);
                    std::vector<double> expected;
                    for (int64_t i = 0; i < n; i++) {
                        double u = a[static_cast<size_t>(i * a_step)], v = b[static_cast<size_t>(i * b_step)];
                        const double results[] = {u + v, u - v, u * v, u / v, std::fmax(u, v), std::fmin(u, v), std::pow(u, v)};
                        expected.push_back(results[kind]);
                    }
                    kernels().binary(static_cast<Binary>(kind), a.data(), a_step, b.data(), b_step, y.data(), n);
                    CHECK(relative_error(y.data(), expected.data(), static_cast<size_t>(n)) <= kBound);
                    CHECK(std::isnan(y[static_cast<size_t>(n)]));
                }
    for (Binary kind : {Binary::maximum, Binary::minimum}) {  // as in PyTorch, NaN on either side wins
        float one = 1, nan = kPoison, y = 0;
        kernels().binary(kind, &one, 1, &nan, 1, &y, 1);
        CHECK(std::isnan(y));
        y = 0;
        kernels().binary(kind, &nan, 1, &one, 1, &y, 1);
        CHECK(std::isnan(y));
    }
}

TEST(reductions) {
    for (int64_t n : {1, 7, 16, 63, 64, 65, 1000}) {
        std::vector<float> x = Random(static_cast<uint64_t>(n)).floats(static_cast<size_t>(n), 0.1f, 1);
        double sum = 0, largest = x[0];
        for (float value : x) sum += value, largest = std::fmax(largest, value);
        CHECK(std::fabs(kernels().reduce_sum(x.data(), n) - sum) <= kBound * sum);
        CHECK_EQUAL(kernels().reduce_max(x.data(), n), static_cast<float>(largest));
        x[static_cast<size_t>(n / 2)] = kPoison;
        CHECK(std::isnan(kernels().reduce_max(x.data(), n)));
        CHECK(std::isnan(kernels().reduce_sum(x.data(), n)));
    }
}

TEST(sums_of_many_rows) {
    for (int64_t n : {1, 7, 16, 49, 64, 196, 256, 257, 1000})
        for (int64_t rows : {0, 1, 15, 16, 17, 40}) {
            const int64_t stride = n + 3;
            std::vector<float> x = Random(static_cast<uint64_t>(n)).floats(static_cast<size_t>((rows + 1) * stride), 0.1f, 1);
            if (rows == 17) x[static_cast<size_t>(5 * stride + n - 1)] = kPoison;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = n; i < stride; i++) x[static_cast<size_t>(r * stride + i)] = kPoison;  // between rows
            std::vector<float> y(static_cast<size_t>(rows + 1), kPoison);
            kernels().sum_rows(x.data(), stride, rows, n, y.data());
            for (int64_t r = 0; r < rows; r++) {
                double sum = 0;
                for (int64_t i = 0; i < n; i++) sum += x[static_cast<size_t>(r * stride + i)];
                const float found = y[static_cast<size_t>(r)];
                CHECK(std::isnan(sum) ? std::isnan(found) : std::fabs(found - sum) <= kBound * sum);
            }
            CHECK(std::isnan(y[static_cast<size_t>(rows)]));
        }
}

TEST(rows_copied) {
    for (int64_t n : {0, 1, 7, 15, 16, 17, 31, 32, 63, 64, 65, 200})
        for (int64_t rows : {0, 1, 5}) {
            const int64_t from = n + 2, to = n + 1;
            std::vector<float> x = Random(7).floats(static_cast<size_t>((rows + 1) * from)),
                               y(static_cast<size_t>((rows + 1) * to), kPoison);
            kernels().copy_rows(x.data(), from, y.data(), to, rows, n);
            for (int64_t r = 0; r <= rows; r++)
                for (int64_t i = 0; i < to; i++) {
                    const float found = y[static_cast<size_t>(r * to + i)];
                    CHECK(r < rows && i < n ? found == x[static_cast<size_t>(r * from + i)] : std::isnan(found));
                }
        }
}

TEST(rows_streamed) {
    for (int64_t n : {1, 7, 15, 16, 17, 31, 49, 64, 196, 200})
        for (int64_t rows : {0, 1, 2, 9, 40})
            for (int64_t offset : {0, 1, 4, 15}) {  // of the target, in its line
                const int64_t from = n + 3, total = rows * n;
                std::vector<float> x = Random(7).floats(static_cast<size_t>((rows + 1) * from)),
                                   memory(static_cast<size_t>(total + 48), kPoison);
                const auto at = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % 16;
                float* y = memory.data() + (16 - at) % 16 + offset;
                kernels().stream_rows(x.data(), from, y, rows, n);
                for (float* p = memory.data(); p != memory.data() + memory.size(); p++) {
                    const int64_t i = p - y;
                    CHECK(i >= 0 && i < total ? *p == x[static_cast<size_t>(i / n * from + i % n)] : std::isnan(*p));
                }
            }
}

TEST(softmax_by_row_and_by_column) {
    const int64_t length = 19, width = 21, stride = 24;
    std::vector<float> x = Random(5).floats(static_cast<size_t>(length * stride), -30, 30),
                       y(static_cast<size_t>(length * stride), kPoison);
    for (int64_t k = 0; k < length; k++) x[static_cast<size_t>(k * stride + 3)] += 500;  // large values must not overflow
    kernels().softmax_columns(x.data(), stride, length, y.data(), stride, width);
    for (int64_t i = 0; i < width; i++) {
        std::vector<float> row, column_result, row_result(static_cast<size_t>(length), kPoison);
        std::vector<double> expected;
        double top = -1e30, total = 0;
        for (int64_t k = 0; k < length; k++) row.push_back(x[static_cast<size_t>(k * stride + i)]), top = std::fmax(top, row.back());
        for (float value : row) expected.push_back(std::exp(value - top)), total += expected.back();
        for (double& value : expected) value /= total;
        for (int64_t k = 0; k < length; k++) column_result.push_back(y[static_cast<size_t>(k * stride + i)]);
        kernels().softmax_row(row.data(), length, row_result.data());
        CHECK(relative_error(column_result.data(), expected.data(), static_cast<size_t>(length)) <= kBound);
        CHECK(relative_error(row_result.data(), expected.data(), static_cast<size_t>(length)) <= kBound);
    }
    for (int64_t k = 0; k < length; k++)
        for (int64_t i = width; i < stride; i++) CHECK(std::isnan(y[static_cast<size_t>(k * stride + i)]));
    // Some entries masked with -infinity: they get exactly 0.
    std::vector<float> masked{1.0f, -kInfinity, 2.0f}, out(3, kPoison);
    kernels().softmax_row(masked.data(), 3, out.data());
    CHECK_EQUAL(out[1], 0.0f);
    CHECK(std::fabs(out[0] + out[2] - 1) < 1e-6f);
}

TEST(layer_norm_by_row_and_by_column) {
    const int64_t length = 37, width = 19, stride = 21;
    std::vector<float> x = Random(6).floats(static_cast<size_t>(length * stride), 2, 5), weight = Random(7).floats(length),
                       bias = Random(8).floats(length);
    for (bool affine : {false, true}) {
        std::vector<float> y(static_cast<size_t>(length * stride), kPoison);
        const float *w = affine ? weight.data() : nullptr, *b = affine ? bias.data() : nullptr;
        kernels().layer_norm_columns(x.data(), stride, length, w, b, 1e-5f, y.data(), stride, width);
        for (int64_t i = 0; i < width; i++) {
            std::vector<float> row, column_result, row_result(static_cast<size_t>(length), kPoison);
            std::vector<double> expected;
            double mean = 0, variance = 0;
            for (int64_t k = 0; k < length; k++) row.push_back(x[static_cast<size_t>(k * stride + i)]), mean += row.back();
            mean /= length;
            for (float value : row) variance += (value - mean) * (value - mean) / length;
            for (int64_t k = 0; k < length; k++) {
                expected.push_back((row[static_cast<size_t>(k)] - mean) / std::sqrt(variance + 1e-5));
                if (affine) expected.back() = expected.back() * weight[static_cast<size_t>(k)] + bias[static_cast<size_t>(k)];
                column_result.push_back(y[static_cast<size_t>(k * stride + i)]);
            }
            kernels().layer_norm_row(row.data(), length, w, b, 1e-5f, row_result.data());
            CHECK(relative_error(column_result.data(), expected.data(), static_cast<size_t>(length)) <= kBound);
            CHECK(relative_error(row_result.data(), expected.data(), static_cast<size_t>(length)) <= kBound);
        }
    }
}

TEST(strided_rows_of_pooling) {
    for (int64_t step : {1, 2, 3})
        for (int64_t n : {1, 7, 16, 17, 33}) {
            std::vector<float> x = Random(1).floats(static_cast<size_t>((n - 1) * step + 1)),
                               start = Random(2).floats(static_cast<size_t>(n) + 1);
            std::vector<float> copied(static_cast<size_t>(n) + 1, kPoison), sum = start;
            kernels().copy(x.data(), step, copied.data(), n);
            kernels().add_into(x.data(), step, sum.data(), n);
            for (int64_t i = 0; i < n; i++) {
                size_t at = static_cast<size_t>(i);
                float value = x[static_cast<size_t>(i * step)];
                CHECK_EQUAL(copied[at], value);
                CHECK_EQUAL(sum[at], start[at] + value);
            }
            CHECK(std::isnan(copied[static_cast<size_t>(n)]));
            CHECK_EQUAL(sum[static_cast<size_t>(n)], start[static_cast<size_t>(n)]);
        }
}

TEST(rows_split_into_even_and_odd) {
    for (int64_t even_n : {1, 7, 14, 16, 28, 33})
        for (int64_t odd_n : {int64_t(0), even_n - 1, even_n}) {
            const int64_t rows = 3, ld = 2 * even_n + 5, out_ld = even_n + 2;
            size_t needed = static_cast<size_t>((rows - 1) * ld + std::max(2 * even_n - 1, 2 * odd_n));
            std::vector<float> x = Random(1).floats(needed), even(static_cast<size_t>(rows * out_ld), kPoison), odd = even;
            kernels().split(x.data(), ld, rows, even_n, odd_n, even.data(), odd_n ? odd.data() : nullptr, out_ld);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < out_ld; i++) {
                    size_t at = static_cast<size_t>(r * out_ld + i), from = static_cast<size_t>(r * ld + 2 * i);
                    if (i < even_n) {
                        CHECK_EQUAL(even[at], x[from]);
                    } else {
                        CHECK(std::isnan(even[at]));
                    }
                    if (i < odd_n) {
                        CHECK_EQUAL(odd[at], x[from + 1]);
                    } else {
                        CHECK(std::isnan(odd[at]));
                    }
                }
        }
}

TEST(windows_of_pooling) {
    for (int rows : {1, 2, 3, 5})
        for (int64_t n : {1, 7, 16, 17, 33}) {
            int64_t ld = n + 3;
            std::vector<float> x = Random(1).floats(static_cast<size_t>(rows * ld)), largest(static_cast<size_t>(n) + 1, kPoison),
                               sum = largest;
            kernels().max_rows(x.data(), ld, rows, largest.data(), n);
            kernels().add_rows(x.data(), ld, rows, sum.data(), n);
            for (int64_t i = 0; i < n; i++) {
                float most = x[static_cast<size_t>(i)], total = most;
                for (int r = 1; r < rows; r++) {
                    float value = x[static_cast<size_t>(r * ld + i)];
                    most = std::fmax(most, value), total += value;
                }
                CHECK_EQUAL(largest[static_cast<size_t>(i)], most);
                CHECK_EQUAL(sum[static_cast<size_t>(i)], total);
            }
            CHECK(std::isnan(largest[static_cast<size_t>(n)]));
            CHECK(std::isnan(sum[static_cast<size_t>(n)]));
        }
    for (int64_t step : {1, 2, 3})
        for (int taps : {1, 2, 3, 5})
            for (int64_t dilation : {1, 2})
                for (int64_t n : {1, 7, 16, 17, 33}) {
                    size_t needed = static_cast<size_t>((n - 1) * step + (taps - 1) * dilation + 1);
                    std::vector<float> x = Random(1).floats(needed), largest(static_cast<size_t>(n) + 1, kPoison), sum = largest;
                    x.resize(needed + 64, kPoison);  // may be read, must not show
                    kernels().max_taps(x.data(), taps, dilation, step, largest.data(), n);
                    kernels().add_taps(x.data(), taps, dilation, step, sum.data(), n);
                    for (int64_t i = 0; i < n; i++) {
                        float most = x[static_cast<size_t>(i * step)], total = most;
                        for (int s = 1; s < taps; s++) {
                            float value = x[static_cast<size_t>(i * step + s * dilation)];
                            most = std::fmax(most, value), total += value;
                        }
                        CHECK_EQUAL(largest[static_cast<size_t>(i)], most);
                        CHECK_EQUAL(sum[static_cast<size_t>(i)], total);
                    }
                    CHECK(std::isnan(largest[static_cast<size_t>(n)]));
                    CHECK(std::isnan(sum[static_cast<size_t>(n)]));
                }
    for (bool nan_first : {true, false}) {
        std::vector<float> x(32, 1.0f), y(16, 0.0f);
        std::fill_n(x.begin() + (nan_first ? 0 : 16), 16, kPoison);
        kernels().max_rows(x.data(), 16, 2, y.data(), 16);
        for (float value : y) CHECK(std::isnan(value));
    }
}

TEST(scale_and_shift) {
    std::vector<float> x = Random(4).floats(45), y(46, kPoison);
    std::vector<double> expected;
    for (float value : x) expected.push_back(double(value) * 1.5 - 0.25);
    kernels().scale_shift(x.data(), 1.5f, -0.25f, y.data(), 45);
    CHECK(relative_error(y.data(), expected.data(), 45) <= kBound);
    CHECK(std::isnan(y[45]));
}

TEST(chains_of_multiply_adds) {
    float result = 0;
    int64_t operations = kernels().fma_chains(10, 1.0f, 0.5f, &result);
    CHECK_EQUAL(operations, 2 * 12 * int64_t(kernels().lanes) * 10);
    CHECK_EQUAL(result, 12.0f * static_cast<float>(kernels().lanes) * 6.0f);  // each lane: 1 + 10 · 0.5
}

namespace {

uint16_t bf16_bits(float value) {  // towards zero: enough for a test
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(bits >> 16);
}

float bf16_value(uint16_t half) {
    uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A product's values in one precision, and as the numbers they stand for.
struct Rounded {
    Precision precision;
    std::vector<uint8_t> bytes;
    std::vector<double> meant;
};

Rounded rounded(const std::vector<float>& values, Precision precision) {
    Rounded r{precision, std::vector<uint8_t>(values.size() * size_t(precision_bytes(precision))), {}};
    for (size_t i = 0; i < values.size(); i++) {
        if (precision == Precision::float32) {
            std::memcpy(r.bytes.data() + 4 * i, &values[i], 4);
            r.meant.push_back(values[i]);
        } else if (precision == Precision::bfloat16) {
            uint16_t half = bf16_bits(values[i]);
            std::memcpy(r.bytes.data() + 2 * i, &half, 2);
            r.meant.push_back(bf16_value(half));
        } else {
            auto level = static_cast<int8_t>(std::lround(values[i] * 127));
            r.bytes[i] = static_cast<uint8_t>(level);
            r.meant.push_back(level);
        }
    }
    return r;
}

struct VectorCase {
    std::vector<float> x, scale, bias, residual, out;
    VectorArgs to{};
    VectorCase(int64_t rows, int64_t cols, bool epilogue) {
        Random random(static_cast<uint64_t>(rows * 1000 + cols));
        x = random.floats(static_cast<size_t>(cols)), scale = random.floats(static_cast<size_t>(rows), 0.5f, 2.0f);
        bias = random.floats(static_cast<size_t>(rows)), residual = random.floats(static_cast<size_t>(rows));
        out.assign(static_cast<size_t>(rows) + 5, kPoison);
        to.out = out.data(), to.low = -kInfinity, to.high = kInfinity;
        if (epilogue) to.scale = scale.data(), to.bias = bias.data(), to.residual = residual.data(), to.low = -0.5f, to.high = 3.0f;
    }
    void check(std::vector<double> sums, const std::string& what) {
        for (size_t r = 0; r < sums.size(); r++) {
            if (to.scale) sums[r] = sums[r] * scale[r] + bias[r] + residual[r];
            sums[r] = std::fmin(std::fmax(sums[r], to.low), to.high);
        }
        double error = relative_error(out.data(), sums.data(), sums.size());
        if (!(error <= kBound)) check::fail(__FILE__, __LINE__, what + ": relative error " + std::to_string(error));
        for (size_t i = sums.size(); i < out.size(); i++) CHECK(std::isnan(out[i]));
    }
};

}  // namespace

TEST(lookups_in_every_precision) {
    for (int p = 0; p < kPrecisions; p++)
        for (int64_t rows : {1, 7, 16, 17, 40})
            for (int64_t cols : {0, 1, 15, 16, 17, 30, 31, 32, 47, 62, 63, 200})
                for (double density : {0.0, 0.1, 1.0})
                    for (bool epilogue : {false, true}) {
                        Product w = random_product(rows, cols, density, static_cast<uint64_t>(rows + cols));
                        Rounded values = rounded(w.values, static_cast<Precision>(p));
                        CsrView csr{rows, cols, w.row_ptr.data(), w.col.data()};
                        LookupMatrix matrix(csr, nullptr, values.precision, true);
                        matrix.set_values(values.bytes.data());
                        LookupMatrix again(csr, values.bytes.data(), values.precision, false);
                        CHECK(matrix.values == again.values && matrix.index == again.index);
                        VectorCase c(rows, cols, epilogue);
                        LookupArgs a{};
                        a.groups = matrix.groups.data(), a.index = matrix.index.data(), a.values = matrix.values.data();
                        a.rows = rows, a.cols = cols, a.x = c.x.data(), a.to = c.to;
                        kernels().lookup[p](a);
                        std::vector<double> sums;
                        for (int64_t r = 0; r < rows; r++) {
                            double sum = 0;
                            for (int64_t i = w.row_ptr[static_cast<size_t>(r)]; i < w.row_ptr[static_cast<size_t>(r) + 1]; i++)
                                sum += values.meant[static_cast<size_t>(i)] * c.x[static_cast<size_t>(w.col[static_cast<size_t>(i)])];
                            sums.push_back(sum);
                        }
                        c.check(sums,
                                "lookup in precision " + std::to_string(p) + ", " + std::to_string(rows) + "x" + std::to_string(cols));
                    }
}

TEST(an_infinity_in_a_column_that_a_row_lacks_stays_out_of_it) {
    // Two rows, columns 0 and 1: the first keeps only column 1, its free places must not read column 0.
    std::vector<int64_t> row_ptr = {0, 1, 2};
    std::vector<int32_t> col = {1, 0};
    std::vector<float> values = {2, 3};
    LookupMatrix w(CsrView{2, 40, row_ptr.data(), col.data()}, values.data(), Precision::float32, false);
    std::vector<float> x(40, kPoison), out(2, kPoison);
    x[0] = kInfinity, x[1] = 5;
    LookupArgs a{};
    a.groups = w.groups.data(), a.index = w.index.data(), a.values = w.values.data(), a.rows = 2, a.cols = 40, a.x = x.data();
    a.to.out = out.data(), a.to.low = -kInfinity, a.to.high = kInfinity;
    kernels().lookup[0](a);
    CHECK_EQUAL(out[0], 10.0f);
    CHECK_EQUAL(out[1], kInfinity);
}

TEST(dense_rows_in_low_precision) {
    const KernelTable& k = kernels();
    for (Precision precision : {Precision::bfloat16, Precision::int8})
        for (int64_t rows : {1, 3, 4, 5, 18})
            for (int64_t cols : {1, 7, 16, 31, 64, 65, 130, 40000})
                for (bool epilogue : {false, true}) {
                    Product w = random_product(rows, cols, 1.0, static_cast<uint64_t>(rows + cols));
                    Rounded values = rounded(w.dense, precision);
                    RowMatrix matrix(rows, cols, values.bytes.data(), precision);
                    const auto pitch = static_cast<size_t>(matrix.pitch);
                    std::vector<double> sums;
                    VectorCase c(rows, cols, epilogue);
                    for (int64_t r = 0; r < rows; r++) {
                        double sum = 0;
                        for (int64_t i = 0; i < cols; i++)
                            sum += values.meant[static_cast<size_t>(r * cols + i)] * c.x[static_cast<size_t>(i)];
                        sums.push_back(sum);
                    }
                    RowsArgs a{};
                    a.w = matrix.values.data(), a.pitch = matrix.pitch, a.sums = matrix.sums.data(), a.row0 = 0, a.row1 = rows;
                    a.to = c.to;
                    std::vector<float> padded(pitch, kPoison);
                    if (precision == Precision::bfloat16) {
                        k.pair_order(c.x.data(), cols, matrix.pitch, padded.data());
                        a.x = padded.data();
                        k.rows_bf16(a);
                        c.check(sums, "bfloat16 rows");
                        continue;
                    }
                    std::fill(padded.begin(), padded.end(), 0.0f);
                    std::copy(c.x.begin(), c.x.end(), padded.begin());
                    a.x = padded.data();
                    k.rows_int8(a);
                    c.check(sums, "int8 rows");
                    if (!k.rows_int8_of_bytes) continue;
                    float largest = 0;
                    for (float v : c.x) largest = std::fmax(largest, std::fabs(v));
                    std::vector<uint8_t> planes(3 * pitch, 0xee);
                    a.plane_scale = 8388600.0f / largest, a.planes = planes.data();
                    k.byte_planes(c.x.data(), cols, matrix.pitch, static_cast<float>(a.plane_scale), planes.data());
                    std::fill(c.out.begin(), c.out.end(), kPoison);
                    k.rows_int8_of_bytes(a);
                    c.check(sums, "int8 rows in integers");
                }
}
