// Layers and plans: right in every build, the same at any number of threads, and safe to call from several threads at once.
#include <thread>

#include "check.h"
#include "core/thread_pool.h"
#include "runtime/layers.h"
#include "runtime/row_tiles.h"
#include "runtime/tensor_ops.h"
#include "runtime/winograd.h"

using namespace sparse_engine;
using check::kPoison;
using check::Random;
using check::relative_error;

namespace {

constexpr double kBound = 1e-5;

struct Weight {
    int64_t rows, cols;
    std::vector<int64_t> row_ptr{0};
    std::vector<int32_t> col;
    std::vector<float> values;
    std::vector<double> dense;
};

Weight random_weight(int64_t rows, int64_t cols, double density, uint64_t seed) {
    Random random(seed);
    Weight w{rows, cols, {0}, {}, {}, std::vector<double>(static_cast<size_t>(rows * cols), 0.0)};
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t c = 0; c < cols; c++)
            if (random.uniform() < density) {
                w.col.push_back(static_cast<int32_t>(c)), w.values.push_back(random.between(-1, 1));
                w.dense[static_cast<size_t>(row * cols + c)] = w.values.back();
            }
        w.row_ptr.push_back(static_cast<int64_t>(w.col.size()));
    }
    return w;
}

// y[n, m, :, :] = sum of weight[m, c, r, s] · x[n, c, ·, ·], and its two gradients, the slow way.
struct Convolution {
    ConvGeometry g;
    int64_t out_channels, groups;
    int64_t per_group() const { return g.channels / groups; }
    template <class F>
    void each(int64_t batch, F f) const {  // f(weight index, x index, y index)
        int64_t oh = g.out_height(), ow = g.out_width();
        for (int64_t n = 0; n < batch; n++)
            for (int64_t m = 0; m < out_channels; m++)
                for (int64_t y = 0; y < oh; y++)
                    for (int64_t x = 0; x < ow; x++)
                        for (int64_t c = 0; c < per_group(); c++)
                            for (int64_t r = 0; r < g.kernel_h; r++)
                                for (int64_t s = 0; s < g.kernel_w; s++) {
                                    int64_t iy = y * g.stride_h + r * g.dilation_h - g.pad_top,
                                            ix = x * g.stride_w + s * g.dilation_w - g.pad_left;
                                    if (iy < 0 || ix < 0 || iy >= g.height || ix >= g.width) continue;
                                    int64_t channel = m / (out_channels / groups) * per_group() + c;
                                    f(((m * per_group() + c) * g.kernel_h + r) * g.kernel_w + s,
                                      ((n * g.channels + channel) * g.height + iy) * g.width + ix,
                                      ((n * out_channels + m) * oh + y) * ow + x);
                                }
    }
};

void check_convolution(const Convolution& conv, int64_t batch, double density) {
    const ConvGeometry& g = conv.g;
    int64_t cols = conv.per_group() * g.taps();
    Weight w = random_weight(conv.out_channels, cols, density, static_cast<uint64_t>(cols + conv.out_channels));
    ConvLayer layer(w.row_ptr, w.col, conv.out_channels, conv.groups, g);
    layer.set_values(w.values.data(), static_cast<int64_t>(w.values.size()));
    size_t in = static_cast<size_t>(batch * g.channels * g.height * g.width),
           out = static_cast<size_t>(batch * conv.out_channels * g.out_height() * g.out_width());
    std::vector<float> x = Random(1).floats(in), dy = Random(2).floats(out),
                       bias = Random(3).floats(static_cast<size_t>(conv.out_channels));

    std::vector<double> y(out), dx(in, 0.0), dw(static_cast<size_t>(conv.out_channels * cols), 0.0), dv;
    for (size_t i = 0; i < out; i++)
        y[i] = bias[i / static_cast<size_t>(g.out_height() * g.out_width()) % static_cast<size_t>(conv.out_channels)];
    conv.each(batch, [&](int64_t k, int64_t i, int64_t o) {
        y[static_cast<size_t>(o)] += w.dense[static_cast<size_t>(k)] * x[static_cast<size_t>(i)];
        dx[static_cast<size_t>(i)] += w.dense[static_cast<size_t>(k)] * dy[static_cast<size_t>(o)];
        dw[static_cast<size_t>(k)] += double(x[static_cast<size_t>(i)]) * dy[static_cast<size_t>(o)];
    });
    for (int64_t row = 0; row < w.rows; row++)
        for (int64_t e = w.row_ptr[static_cast<size_t>(row)]; e < w.row_ptr[static_cast<size_t>(row) + 1]; e++)
            dv.push_back(dw[static_cast<size_t>(row * cols + w.col[static_cast<size_t>(e)])]);

    std::vector<float> got_y(out, kPoison), got_dx(in, kPoison), got_dv(dv.size(), kPoison);
    CHECK(layer.forward({x.data()}, batch, g.height, g.width, {got_y.data()}, bias.data()));
    CHECK(layer.input_grad({dy.data()}, batch, g.height, g.width, {got_dx.data()}));
    CHECK(layer.weight_grad({dy.data()}, {x.data()}, batch, g.height, g.width, got_dv.data()));
    std::ostringstream what;
    what << g.channels << " -> " << conv.out_channels << " channels, " << g.kernel_h << "x" << g.kernel_w << ", stride " << g.stride_h
         << ", batch " << batch;
    // The same with channels last, where such a batch can be taken like that.
    auto channels_last = [&](const std::vector<float>& planes, int64_t channels) {
        std::vector<float> turned(planes.size());
        int64_t pixels = static_cast<int64_t>(planes.size()) / std::max<int64_t>(1, batch * channels);
        for (int64_t n = 0; n < batch; n++)
            for (int64_t c = 0; c < channels; c++)
                for (int64_t p = 0; p < pixels; p++)
                    turned[static_cast<size_t>((n * pixels + p) * channels + c)] =
                        planes[static_cast<size_t>((n * channels + c) * pixels + p)];
        return turned;
    };
    std::vector<float> x_last = channels_last(x, g.channels), dy_last = channels_last(dy, conv.out_channels);
    std::vector<float> y_last(out, kPoison), dx_last(in, kPoison), dv_last(dv.size(), kPoison);
    if (layer.forward({x_last.data(), true}, batch, g.height, g.width, {y_last.data(), true}, bias.data()) &&
        y_last != channels_last(got_y, conv.out_channels))
        check::fail(__FILE__, __LINE__, "output with channels last of " + what.str());
    if (layer.input_grad({dy_last.data(), true}, batch, g.height, g.width, {dx_last.data(), true}) &&
        dx_last != channels_last(got_dx, g.channels))
        check::fail(__FILE__, __LINE__, "input gradient with channels last of " + what.str());
    if (layer.weight_grad({dy_last.data(), true}, {x_last.data(), true}, batch, g.height, g.width, dv_last.data()) && dv_last != got_dv)
        check::fail(__FILE__, __LINE__, "weight gradient with channels last of " + what.str());
    if (!(relative_error(got_y.data(), y.data(), out) <= kBound)) check::fail(__FILE__, __LINE__, "output of " + what.str());
    if (!(relative_error(got_dx.data(), dx.data(), in) <= kBound)) check::fail(__FILE__, __LINE__, "input gradient of " + what.str());
    if (!(relative_error(got_dv.data(), dv.data(), dv.size()) <= kBound))
        check::fail(__FILE__, __LINE__, "weight gradient of " + what.str());
}

void prepare(WinogradNode& node) { node.prepare(); }
void prepare(RowTileNode&) {}

// One convolution on `threads` threads; x is [image][channel][pixel], the result [channel][image][pixel].
template <class ConvNode, class ConvWeight>
std::vector<float> run_one(const ConvGeometry& g, int64_t rows, const std::shared_ptr<const ConvWeight>& weight,
                           const std::vector<float>& bias, std::vector<float> x, std::vector<float> residual, const Epilogue& epilogue,
                           int threads) {
    auto node = std::make_unique<ConvNode>();
    int64_t pixels = g.batch * g.out_height() * g.out_width();
    node->geometry = g, node->weight = weight, node->bias = std::make_shared<const std::vector<float>>(bias);
    node->x = {1, 0}, node->stride_n = g.channels * g.height * g.width, node->stride_c = g.height * g.width, node->stride_h = g.width;
    node->out = {2, 0}, node->out_stride = pixels, node->epilogue = epilogue;
    if (!residual.empty()) node->has_residual = true, node->residual = {3, 0}, node->residual_stride = pixels;
    prepare(*node);
    Plan plan(1, 3);
    plan.add(std::move(node));
    std::vector<float> y(static_cast<size_t>(rows * pixels) + 1, kPoison);
    float* pointers[] = {x.data(), y.data(), residual.data()};
    plan.run(pointers, threads);
    CHECK(std::memcmp(&y.back(), &kPoison, sizeof kPoison) == 0);  // nothing written past the end
    y.pop_back();
    return y;
}

// make: from the dense weight, what ConvNode takes.
template <class ConvNode, class Make>
void check_one(const std::string& method, const ConvGeometry& g, int64_t rows, double density, bool with_residual, float odd_one,
               const Make& make) {
    const int64_t cols = g.channels * g.taps(), pixels = g.out_height() * g.out_width();
    Random random(static_cast<uint64_t>(cols + rows));
    std::vector<float> w = random.floats(static_cast<size_t>(rows * cols)), bias = random.floats(static_cast<size_t>(rows));
    std::vector<float> x = random.floats(static_cast<size_t>(g.batch * g.channels * g.height * g.width));
    std::vector<float> residual = random.floats(with_residual ? static_cast<size_t>(rows * g.batch * pixels) : 0);
    if (odd_one != 0) x[x.size() / 2] = odd_one;
    if (density < 1)
        for (float& value : w)
            if (random.uniform() >= density) value = 0;
    std::vector<double> expected(static_cast<size_t>(rows * g.batch * pixels));
    auto at = [&](int64_t n, int64_t m, int64_t p) { return static_cast<size_t>((m * g.batch + n) * pixels + p); };
    for (int64_t n = 0; n < g.batch; n++)
        for (int64_t m = 0; m < rows; m++)
            for (int64_t p = 0; p < pixels; p++)
                expected[at(n, m, p)] = double(bias[static_cast<size_t>(m)]) + (with_residual ? residual[at(n, m, p)] : 0.0f);
    Convolution{g, rows, 1}.each(g.batch, [&](int64_t k, int64_t i, int64_t o) {
        if (density < 1 && w[static_cast<size_t>(k)] == 0) return;  // not stored
        expected[at(o / pixels / rows, o / pixels % rows, o % pixels)] += double(w[static_cast<size_t>(k)]) * x[static_cast<size_t>(i)];
    });
    Epilogue clamp{Activation::clamp, -4.0f, 4.0f};
    double scale = 1;
    for (double& v : expected) {
        if (std::abs(v) < 1e6) scale = std::max(scale, std::abs(v));
        v = std::isnan(v) ? v : std::min(4.0, std::max(-4.0, v));
    }
    const auto weight = make(w);
    std::vector<float> y = run_one<ConvNode>(g, rows, weight, bias, x, residual, clamp, 1);
    CHECK(y.size() == expected.size());
    bool right = true;
    for (size_t i = 0; i < y.size(); i++)
        right = right && (std::isnan(expected[i]) ? std::isnan(y[i]) : std::abs(y[i] - expected[i]) <= kBound * scale);
    std::ostringstream what;
    what << g.channels << " -> " << rows << " channels, " << g.kernel_h << "x" << g.kernel_w << ", stride " << g.stride_h << "x"
         << g.stride_w << ", image " << g.height << "x" << g.width << ", one input " << odd_one;
    if (!right) check::fail(__FILE__, __LINE__, method + ", " + what.str());
    std::vector<float> again = run_one<ConvNode>(g, rows, weight, bias, x, residual, clamp, 3);
    if (std::memcmp(y.data(), again.data(), y.size() * sizeof(float)) != 0)
        check::fail(__FILE__, __LINE__, method + " on three threads, " + what.str());
}

void check_winograd(const ConvGeometry& g, int64_t rows, bool with_residual, float odd_one) {
    check_one<WinogradNode>("Winograd", g, rows, 1, with_residual, odd_one,
                            [&](const std::vector<float>& w) { return std::make_shared<const WinogradWeight>(rows, g, w.data()); });
}

void check_row_tiles(const ConvGeometry& g, int64_t rows, double density, int part, int height, bool with_residual, float odd_one) {
    check_one<RowTileNode>("row tiles of " + std::to_string(height) + " rows", g, rows, density, with_residual, odd_one,
                           [&](const std::vector<float>& w) {
                               const int64_t cols = g.channels * g.taps();
                               std::vector<int64_t> row_ptr{0};
                               std::vector<int32_t> col;
                               std::vector<float> values;
                               for (int64_t r = 0; r < rows; r++) {
                                   for (int64_t c = 0; c < cols; c++)
                                       if (float value = w[static_cast<size_t>(r * cols + c)]; value != 0)
                                           col.push_back(static_cast<int32_t>(c)), values.push_back(value);
                                   row_ptr.push_back(static_cast<int64_t>(col.size()));
                               }
                               return std::make_shared<const RowTileMatrix>(CsrView{rows, cols, row_ptr.data(), col.data()}, values.data(),
                                                                            g.kernel_h, g.kernel_w, part, height, kernels().lanes);
                           });
}

}  // namespace

TEST(row_tiles) {
    set_num_threads(3);
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    for (float odd_one : {0.0f, infinity, nan, -0.0f})
        for (bool residual : {false, true})
            for (int height : {1, 3, 4, 8})
                for (double density : {0.0, 0.15, 0.6}) {
                    // channels, image, kernel, stride, padding (top, left, bottom, right), dilation
                    check_row_tiles({1, 5, 19, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1}, 7, density, 18, height, residual, odd_one);
                    check_row_tiles({2, 3, 17, 35, 3, 3, 1, 1, 0, 2, 2, 1, 1, 1}, 5, density, 256, height, residual, odd_one);
                    check_row_tiles({1, 2, 9, 8, 5, 3, 1, 1, 2, 1, 2, 1, 1, 1}, 4, density, 30, height, residual, odd_one);
                    check_row_tiles({1, 2, 3, 3, 3, 3, 1, 1, 2, 2, 2, 2, 1, 1}, 3, density, 9, height, residual, odd_one);
                    check_row_tiles({1, 1, 30, 24, 7, 7, 1, 1, 3, 3, 3, 3, 1, 1}, 2, density, 49, height, residual, odd_one);
                    check_row_tiles({1, 3, 12, 17, 1, 4, 1, 1, 0, 3, 0, 0, 1, 1}, 2, density, 8, height, residual, odd_one);
                }
    CHECK(!RowTileNode::applies({1, 1, 8, 8, 3, 3, 1, 2, 1, 1, 1, 1, 1, 1}));
    CHECK(!RowTileNode::applies({1, 1, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 2, 1}));
    CHECK(!RowTileNode::applies({1, 1, 8, 8, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1}));
}

TEST(winograd_along_the_rows) {
    set_num_threads(3);
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    for (float odd_one : {0.0f, infinity, -nan, 3e37f, -0.0f})
        for (bool residual : {false, true}) {
            // channels, image, kernel, stride, padding (top, left, bottom, right), dilation
            check_winograd({1, 3, 30, 45, 7, 7, 2, 2, 3, 3, 3, 3, 1, 1}, 9, residual, odd_one);    // ResNet's first, odd sizes
            check_winograd({2, 2, 16, 64, 7, 7, 2, 2, 3, 3, 2, 2, 1, 1}, 4, residual, odd_one);    // rows of whole tiles
            check_winograd({3, 5, 13, 14, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1}, 8, residual, odd_one);    // several images
            check_winograd({1, 1, 1, 3, 1, 3, 1, 1, 0, 0, 0, 0, 1, 1}, 1, residual, odd_one);      // one output
            check_winograd({1, 4, 9, 200, 3, 3, 3, 1, 0, 2, 3, 1, 2, 1}, 5, residual, odd_one);    // long rows, stride and dilation down
            check_winograd({1, 2, 11, 12, 2, 4, 1, 1, 1, 3, 0, 3, 1, 1}, 3, residual, odd_one);    // four taps
            check_winograd({1, 2, 10, 33, 5, 5, 1, 2, 2, 2, 2, 2, 1, 1}, 6, residual, odd_one);    // three and two taps
            check_winograd({1, 2, 12, 31, 8, 8, 2, 2, 0, 0, 7, 7, 1, 1}, 6, residual, odd_one);    // four and four
            check_winograd({1, 40, 60, 20, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1}, 13, residual, odd_one);  // several bands
        }
    ConvGeometry far{1, 1, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 2};
    CHECK(!WinogradWeight::applies(far));
    std::vector<float> bad(9, nan);
    CHECK_THROWS(WinogradWeight(1, (ConvGeometry{1, 1, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1}), bad.data()), std::invalid_argument, "finite");
    CHECK_THROWS(WinogradWeight(1, far, bad.data()), std::invalid_argument, "does not apply");
}

TEST(linear_layers_and_their_gradients) {
    set_num_threads(2);
    for (int64_t n : {1, 3, 16, 50})
        for (auto [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {7, 300}, {40, 33}}) {
            Weight w = random_weight(rows, cols, 0.3, static_cast<uint64_t>(n + rows));
            LinearLayer layer(w.row_ptr, w.col, rows, cols);
            layer.set_values(w.values.data(), static_cast<int64_t>(w.values.size()));
            std::vector<float> x = Random(1).floats(static_cast<size_t>(n * cols)), dy = Random(2).floats(static_cast<size_t>(n * rows));
            std::vector<float> bias = Random(3).floats(static_cast<size_t>(rows));
            std::vector<double> y, dx(static_cast<size_t>(n * cols), 0.0), dv;
            for (int64_t i = 0; i < n; i++)
                for (int64_t r = 0; r < rows; r++) {
                    double sum = bias[static_cast<size_t>(r)];
                    for (int64_t c = 0; c < cols; c++) {
                        sum += w.dense[static_cast<size_t>(r * cols + c)] * x[static_cast<size_t>(i * cols + c)];
                        dx[static_cast<size_t>(i * cols + c)] +=
                            w.dense[static_cast<size_t>(r * cols + c)] * dy[static_cast<size_t>(i * rows + r)];
                    }
                    y.push_back(sum);
                }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t e = w.row_ptr[static_cast<size_t>(r)]; e < w.row_ptr[static_cast<size_t>(r) + 1]; e++) {
                    double sum = 0;
                    for (int64_t i = 0; i < n; i++)
                        sum += double(dy[static_cast<size_t>(i * rows + r)]) *
                               x[static_cast<size_t>(i * cols + w.col[static_cast<size_t>(e)])];
                    dv.push_back(sum);
                }
            std::vector<float> got_y(y.size(), kPoison), got_dx(dx.size(), kPoison), got_dv(dv.size(), kPoison);
            layer.forward(x.data(), cols, n, got_y.data(), rows, bias.data());
            layer.input_grad(dy.data(), rows, n, got_dx.data(), cols);
            layer.weight_grad(dy.data(), rows, x.data(), cols, n, got_dv.data());
            CHECK(relative_error(got_y.data(), y.data(), y.size()) <= kBound);
            CHECK(relative_error(got_dx.data(), dx.data(), dx.size()) <= kBound);
            CHECK(relative_error(got_dv.data(), dv.data(), dv.size()) <= kBound);
        }
}

TEST(convolutions_and_their_gradients) {
    set_num_threads(2);
    auto geometry = [](int64_t channels, int64_t height, int64_t width, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
        ConvGeometry g;
        g.channels = channels, g.height = height, g.width = width, g.kernel_h = g.kernel_w = kernel, g.stride_h = g.stride_w = stride;
        g.pad_top = g.pad_left = g.pad_bottom = g.pad_right = pad, g.dilation_h = g.dilation_w = dilation;
        return g;
    };
    for (int64_t batch : {1, 3, 16, 21, 40}) {  // from a vector on, images lie along the lanes
        check_convolution({geometry(6, 7, 9, 1, 1, 0, 1), 5, 1}, batch, 0.4);
        check_convolution({geometry(6, 7, 9, 3, 1, 1, 1), 5, 1}, batch, 0.3);
        check_convolution({geometry(6, 7, 9, 3, 1, 0, 1), 5, 1}, batch, 0.3);
        check_convolution({geometry(5, 9, 8, 3, 2, 1, 1), 4, 1}, batch, 0.3);
        check_convolution({geometry(5, 9, 8, 1, 2, 0, 1), 4, 1}, batch, 0.5);
        check_convolution({geometry(3, 15, 14, 7, 2, 3, 1), 4, 1}, batch, 0.2);
        check_convolution({geometry(4, 9, 9, 3, 1, 2, 2), 4, 1}, batch, 0.4);
        check_convolution({geometry(4, 11, 10, 5, 3, 4, 1), 4, 1}, batch, 0.4);
        check_convolution({geometry(6, 7, 9, 3, 1, 1, 1), 4, 2}, batch, 0.4);
        check_convolution({geometry(6, 7, 9, 3, 2, 1, 1), 6, 6}, batch, 0.8);
        check_convolution({geometry(1, 1, 1, 1, 1, 0, 1), 1, 1}, batch, 1.0);
    }
}

TEST(the_number_of_threads_changes_no_bit) {
    Weight w = random_weight(96, 128, 0.2, 5);
    const int64_t n = 700;
    std::vector<float> x = Random(1).floats(static_cast<size_t>(n * 128)), dy = Random(2).floats(static_cast<size_t>(n * 96)), first_y,
                       first_dv;
    for (int threads : {1, 2, 3, 8}) {
        set_num_threads(threads);
        LinearLayer layer(w.row_ptr, w.col, 96, 128);
        layer.set_values(w.values.data(), static_cast<int64_t>(w.values.size()));
        std::vector<float> y(static_cast<size_t>(n * 96), kPoison), dv(w.values.size(), kPoison);
        layer.forward(x.data(), 128, n, y.data(), 96, nullptr);
        layer.weight_grad(dy.data(), 96, x.data(), 128, n, dv.data());
        if (threads == 1) first_y = y, first_dv = dv;
        CHECK(y == first_y);
        CHECK(dv == first_dv);
    }
    set_num_threads(2);
}

TEST(one_layer_called_from_several_threads) {
    set_num_threads(3);
    Weight w = random_weight(24, 60, 0.3, 6);
    LinearLayer layer(w.row_ptr, w.col, 24, 60);
    layer.set_values(w.values.data(), static_cast<int64_t>(w.values.size()));
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; caller++)
        callers.emplace_back([&, caller] {
            int64_t n = 40 + 30 * caller;  // other shapes than the neighbour's: other plans
            std::vector<float> x = Random(static_cast<uint64_t>(caller)).floats(static_cast<size_t>(n * 60)),
                               y(static_cast<size_t>(n * 24));
            std::vector<double> expected;
            for (int64_t i = 0; i < n; i++)
                for (int64_t r = 0; r < 24; r++) {
                    double sum = 0;
                    for (int64_t c = 0; c < 60; c++) sum += w.dense[static_cast<size_t>(r * 60 + c)] * x[static_cast<size_t>(i * 60 + c)];
                    expected.push_back(sum);
                }
            for (int round = 0; round < 30; round++) {
                std::fill(y.begin(), y.end(), kPoison);
                layer.forward(x.data(), 60, n, y.data(), 24, nullptr);
                if (!(relative_error(y.data(), expected.data(), y.size()) <= kBound)) wrong++;
            }
        });
    for (std::thread& caller : callers) caller.join();
    CHECK_EQUAL(wrong.load(), 0);
    set_num_threads(2);
}

TEST(one_plan_run_from_several_threads) {
    // y = x copied into the arena and back, transposed: every call needs an arena of its own.
    const int64_t rows = 50, cols = 70;
    Plan plan(rows * cols, 2);
    plan.add(std::make_unique<CopyNode>(View{{1, 0}, {rows, cols}, {cols, 1}}, View{{0, 0}, {rows, cols}, {1, rows}}));
    plan.add(std::make_unique<CopyNode>(View{{0, 0}, {cols, rows}, {rows, 1}}, View{{2, 0}, {cols, rows}, {rows, 1}}));
    set_num_threads(3);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; caller++)
        callers.emplace_back([&, caller] {
            std::vector<float> x = Random(static_cast<uint64_t>(caller)).floats(static_cast<size_t>(rows * cols)), y(x.size());
            for (int round = 0; round < 50; round++) {
                std::fill(y.begin(), y.end(), kPoison);
                float* pointers[] = {x.data(), y.data()};
                plan.run(pointers, 3);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < cols; c++)
                        if (y[static_cast<size_t>(c * rows + r)] != x[static_cast<size_t>(r * cols + c)]) wrong++;
            }
        });
    for (std::thread& caller : callers) caller.join();
    CHECK_EQUAL(wrong.load(), 0);
    set_num_threads(2);
}

TEST(values_may_change_between_calls) {
    set_num_threads(2);
    Weight w = random_weight(9, 20, 0.4, 7);
    LinearLayer layer(w.row_ptr, w.col, 9, 20);
    std::vector<float> x = Random(1).floats(20 * 5), once(9 * 5), twice(9 * 5);
    layer.set_values(w.values.data(), static_cast<int64_t>(w.values.size()));
    layer.forward(x.data(), 20, 5, once.data(), 9, nullptr);
    for (float& value : w.values) value *= 2;
    layer.set_values(w.values.data(), static_cast<int64_t>(w.values.size()));
    layer.forward(x.data(), 20, 5, twice.data(), 9, nullptr);
    for (size_t i = 0; i < once.size(); i++) CHECK_EQUAL(twice[i], 2 * once[i]);
    CHECK_THROWS(layer.set_values(w.values.data(), 1), std::invalid_argument, "got 1");
}

TEST(bad_layers_are_refused) {
    CHECK_THROWS(LinearLayer({0, 1}, {0}, 2, 3), std::invalid_argument, "rows + 1");
    CHECK_THROWS(LinearLayer({0, 1, 5}, {0, 1}, 2, 3), std::invalid_argument, "5");
    CHECK_THROWS(LinearLayer({0, 1000, 2}, {0, 1}, 2, 3), std::invalid_argument, "decreases");
    CHECK_THROWS(LinearLayer({0, 1, 2}, {0, 3}, 2, 3), std::invalid_argument, "not below 3");
}
