#include "runtime/winograd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace sparse_engine {
namespace {

constexpr int kOutputs = 4;                  // per tile
constexpr int64_t kPlaneFloats = 48 * 1024;  // of transformed input per work item: a fifth of an L2

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What becomes of a filter at each point; the other two matrices are in kernels_winograd.cpp. Rows carry powers of two that the rows of the
// input's matrix are divided by.
constexpr double kFilter3[6][3] = {{4, 0, 0},
                                   {-4.0 / 3, -4.0 / 3, -4.0 / 3},
                                   {4.0 / 3, -4.0 / 3, 4.0 / 3},
                                   {2.0 / 15, 4.0 / 15, 8.0 / 15},
                                   {-64.0 / 15, 32.0 / 15, -16.0 / 15},
                                   {0, 0, 4}};
constexpr double kFilter4[7][4] = {{4, 0, 0, 0},
                                   {-8.0 / 9, -8.0 / 9, -8.0 / 9, -8.0 / 9},
                                   {4.0 / 3, -4.0 / 3, 4.0 / 3, -4.0 / 3},
                                   {1.0 / 15, 2.0 / 15, 4.0 / 15, 8.0 / 15},
                                   {-1.0 / 9, 2.0 / 9, -4.0 / 9, 8.0 / 9},
                                   {-256.0 / 45, 128.0 / 45, -64.0 / 45, 32.0 / 45},
                                   {0, 0, 0, 8}};

double filter(int taps, int point, int tap) { return taps == 3 ? kFilter3[point][tap] : kFilter4[point][tap]; }

}  // namespace

bool WinogradWeight::applies(const ConvGeometry& g) {
    int64_t taps = g.stride_w <= 2 ? ceil_div(g.kernel_w, g.stride_w) : 0;
    return g.dilation_w == 1 && (taps == 3 || taps == 4);
}

WinogradWeight::WinogradWeight(int64_t rows_, const ConvGeometry& g, const float* given)
    : rows(rows_), channels(g.channels), kernel_h(g.kernel_h), kernel_w(g.kernel_w), stride_w(g.stride_w) {
    if (!applies(g)) throw std::invalid_argument("Winograd's method does not apply to this convolution");
    taps = static_cast<int>(ceil_div(kernel_w, stride_w)), points = taps + kOutputs - 1;
    entries = channels * stride_w * kernel_h, panel_rows = kernels().winograd_rows;
    values.assign(given, given + rows * channels * kernel_h * kernel_w);
    if (!kernels().all_below(values.data(), static_cast<int64_t>(values.size()), kLargest))
        throw std::invalid_argument("Winograd's method needs finite weights of moderate size");
    fewer = spare(stride_w - 1) ? entries / stride_w : entries;
    panel_floats = (points * entries - (entries - fewer)) * panel_rows;
    packed.assign(static_cast<size_t>(ceil_div(rows, panel_rows) * panel_floats), 0.0f);
    float* to = packed.data();
    for (int64_t row0 = 0; row0 < rows; row0 += panel_rows)
        for (int p = 0; p < points; p++)
            for (int64_t phase = 0; phase < stride_w; phase++) {
                const bool short_phase = spare(phase);
                if (short_phase && p == kWinogradSpare) continue;
                const int point = p - (short_phase && p > kWinogradSpare), phase_taps = taps_of(phase);
                for (int64_t c = 0; c < channels; c++)
                    for (int64_t y = 0; y < kernel_h; y++, to += panel_rows)
                        for (int64_t row = row0; row < std::min(rows, row0 + panel_rows); row++) {
                            const float* given_taps = values.data() + ((row * channels + c) * kernel_h + y) * kernel_w;
                            double sum = 0;
                            for (int i = 0; i < phase_taps && i * stride_w + phase < kernel_w; i++)
                                sum += filter(phase_taps, point, i) * static_cast<double>(given_taps[i * stride_w + phase]);
                            to[row - row0] = static_cast<float>(sum);
                        }
            }
}

void WinogradNode::prepare() {
    const ConvGeometry& g = geometry;
    const WinogradWeight& w = *weight;
    tiles_ = ceil_div(g.out_width(), kOutputs);
    line_ = kOutputs * w.stride_w * (tiles_ + 2);
    auto rows_behind = [&](int64_t rows) { return (rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1; };
    int64_t row_floats = w.points * g.channels * w.stride_w * tiles_, most = g.out_height();
    int64_t fitting = (kPlaneFloats / row_floats - g.dilation_h * (g.kernel_h - 1) - 1) / g.stride_h + 1;
    // Rows that only help their neighbours are transformed again in the next band: no fewer than about as many as the kernel is high.
    band_rows_ = std::min(most, std::max(fitting, g.kernel_h));
    band_rows_ = ceil_div(most, ceil_div(most, band_rows_));
    rows_in_ = rows_behind(band_rows_);
    class_stride_ = ceil_div(rows_in_, g.stride_h) * tiles_ + kRoom;
    entry_stride_ = g.stride_h * class_stride_;
    point_stride_ = g.channels * w.stride_w * entry_stride_;
    offset_.clear();
    for (int64_t phase = 0; phase < w.stride_w; phase++)
        for (int64_t c = 0; c < g.channels; c++)
            for (int64_t y = 0; y < g.kernel_h; y++) {
                int64_t row = y * g.dilation_h;
                offset_.push_back((c * w.stride_w + phase) * entry_stride_ + row % g.stride_h * class_stride_ + row / g.stride_h * tiles_);
            }
}

// The transformed input behind `rows` output rows.
void WinogradNode::transform(const float* image, int64_t first_row, int64_t rows, float* lines, float* planes) const {
    const KernelTable& k = kernels();
    const ConvGeometry& g = geometry;
    const int64_t rows_in = (rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1, stride = weight->stride_w;
    const int64_t parts = kOutputs * stride, all = rows_in * line_, first = first_row * g.stride_h - g.pad_top;
    const int64_t width = std::min(g.width, line_ - g.pad_left);
    float *from = lines, *to = lines + all + kRoom;
    for (int64_t c = 0; c < g.channels; c++) {
        std::memset(from, 0, static_cast<size_t>(all) * sizeof(float));
        for (int64_t r = std::max<int64_t>(0, -first); r < rows_in && first + r < g.height; r++)
            std::memcpy(from + r * line_ + g.pad_left, image + c * stride_c + (first + r) * stride_h,
                        static_cast<size_t>(std::max<int64_t>(0, width)) * sizeof(float));
        // Even and odd pixels apart, and again, until each part has every parts-th pixel: part b0 + 2·b1 + 4·b2 at [b0][b1][b2].
        for (int64_t cut = 1; cut < parts; cut *= 2) {
            int64_t size = all / cut, length = line_ / cut;
            for (int64_t i = 0; i < cut; i++)
                k.split(from + i * size, length, rows_in, length / 2, length / 2, to + i * size, to + i * size + size / 2, length / 2);
            std::swap(from, to);
        }
        for (int64_t phase = 0; phase < stride; phase++) {
            WinogradInputArgs a{};
            const float* quarters = from + phase * (all / stride);
            const int64_t quarter = all / parts;
            a.quarter[0] = quarters, a.quarter[1] = quarters + 2 * quarter, a.quarter[2] = quarters + quarter;
            a.quarter[3] = quarters + 3 * quarter;
            a.pitch = tiles_ + 2, a.rows = rows_in, a.tiles = tiles_;
            a.classes = g.stride_h, a.class_stride = class_stride_, a.point_stride = point_stride_;
            a.to = planes + (c * stride + phase) * entry_stride_;
            a.spare = weight->spare(phase);
            k.winograd_input[weight->taps_of(phase) - 3](a);
        }
    }
}

// One output row product by product, where the input holds numbers whose transform would spoil their neighbours: infinities, NaNs, very
// large ones.
void WinogradNode::direct(const float* image, int64_t y, float* to, const float* add) const {
    const ConvGeometry& g = geometry;
    const int64_t out_width = g.out_width();
    const float low = epilogue.low(), high = epilogue.high();
    std::vector<float> line(static_cast<size_t>(out_width));
    for (int64_t row = 0; row < weight->rows; row++) {
        std::fill(line.begin(), line.end(), bias ? (*bias)[static_cast<size_t>(row)] : 0.0f);
        for (int64_t c = 0; c < g.channels; c++)
            for (int64_t ky = 0; ky < g.kernel_h; ky++) {
                int64_t in_row = y * g.stride_h + ky * g.dilation_h - g.pad_top;
                if (in_row < 0 || in_row >= g.height) continue;
                const float* source = image + c * stride_c + in_row * stride_h;
                const float* w = weight->values.data() + ((row * g.channels + c) * g.kernel_h + ky) * g.kernel_w;
                for (int64_t kx = 0; kx < g.kernel_w; kx++) {
                    int64_t shift = kx - g.pad_left, begin = std::max<int64_t>(0, ceil_div(-shift, g.stride_w));
                    int64_t end = std::min(out_width, (g.width - shift + g.stride_w - 1) / g.stride_w);
                    for (int64_t i = begin; i < end; i++) line[static_cast<size_t>(i)] += w[kx] * source[i * g.stride_w + shift];
                }
            }
        for (int64_t i = 0; i < out_width; i++) {
            float v = line[static_cast<size_t>(i)] + (add ? add[row * residual_stride + i] : 0.0f);
            v = low > v ? low : v;
            to[row * out_stride + i] = high < v ? high : v;
        }
    }
}

// Whether what `rows` output rows read is small enough for its transform, and nothing in it infinite or NaN.
bool WinogradNode::usual(const float* image, int64_t first_row, int64_t rows) const {
    const ConvGeometry& g = geometry;
    const int64_t first = std::max<int64_t>(0, first_row * g.stride_h - g.pad_top);
    const int64_t last = std::min(g.height, (first_row + rows - 1) * g.stride_h - g.pad_top + (g.kernel_h - 1) * g.dilation_h + 1);
    for (int64_t c = 0; c < g.channels; c++)
        for (int64_t r = first; r < last; r++)
            if (!kernels().all_below(image + c * stride_c + r * stride_h, g.width, WinogradWeight::kLargest)) return false;
    return true;
}

void WinogradNode::product(const float* image, int64_t first_row, int64_t rows, float* lines, float* to, const float* add) const {
    const KernelTable& k = kernels();
    const WinogradWeight& w = *weight;
    float* planes = lines + line_floats();
    transform(image, first_row, rows, lines, planes);
    WinogradPanelArgs a{};
    a.planes = planes, a.point_stride = point_stride_, a.offset = offset_.data(), a.entries = w.entries, a.fewer = w.fewer;
    a.columns = rows * tiles_, a.tiles = tiles_, a.out_width = geometry.out_width();
    a.residual_stride = static_cast<size_t>(residual_stride), a.out_stride = static_cast<size_t>(out_stride);
    a.low = epilogue.low(), a.high = epilogue.high();
    const int64_t vectors = ceil_div(a.columns, k.lanes), chunks = ceil_div(vectors, k.winograd_vectors);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t v0 = vectors * chunk / chunks, v1 = vectors * (chunk + 1) / chunks;
        a.column0 = v0 * k.lanes;
        auto kernel = k.winograd_panel[w.taps - 3][v1 - v0 - 1];
        for (int64_t row = 0; row < w.rows; row += w.panel_rows) {
            a.weights = w.panel(row / w.panel_rows), a.rows = static_cast<int>(std::min<int64_t>(w.panel_rows, w.rows - row));
            a.bias = bias ? bias->data() + row : nullptr;
            a.out = to + row * out_stride, a.residual = add ? add + row * residual_stride : nullptr;
            kernel(a);
        }
    }
}

void WinogradNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const ConvGeometry& g = geometry;
    const int64_t out_height = g.out_height(), out_width = g.out_width();
    const float* in = context.at(x);
    float* out_data = context.at(out);
    const float* residual_data = has_residual ? context.at(residual) : nullptr;
    int64_t bands = ceil_div(out_height, band_rows_);
    if (context.threads > 1) bands = std::min(out_height, ceil_div(bands, context.threads) * context.threads);

    parallel_for(g.batch * bands, context.threads, [&](int64_t item, int slot) {
        const int64_t image = item / bands, band = item % bands;
        const int64_t row0 = out_height * band / bands, rows = out_height * (band + 1) / bands - row0;
        const float* source = in + image * stride_n;
        const int64_t pixel0 = (image * out_height + row0) * out_width;
        float* to = out_data + pixel0;
        const float* add = residual_data ? residual_data + pixel0 : nullptr;
        float* lines = context.scratch(slot, static_cast<size_t>(line_floats() + weight->points * point_stride_ + kRoom));
        // Row by row where something is unusual, so that the result does not depend on how the image is cut into bands.
        const int64_t together = usual(source, row0, rows) ? rows : 1;
        for (int64_t row = 0; row < rows; row += together) {
            float* row_to = to + row * out_width;
            const float* row_add = add ? add + row * out_width : nullptr;
            if (together > 1 || usual(source, row0 + row, 1)) {
                product(source, row0 + row, together, lines, row_to, row_add);
            } else {
                direct(source, row0 + row, row_to, row_add);
            }
        }
        if (epilogue.needs_pass())
            for (int64_t row = 0; row < weight->rows; row++)
                k.activate(epilogue.kind, epilogue.p0, epilogue.p1, to + row * out_stride, to + row * out_stride, rows * out_width);
    });
}

}  // namespace sparse_engine
