#include "runtime/linear_operator.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace sparse_engine {
namespace {

constexpr int64_t kItemWork = 65536;  // multiplications of one work item of a cheap operator: some microseconds

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int log2_of(int panel) { return panel == 8 ? 3 : panel == 4 ? 2 : panel == 2 ? 1 : 0; }

const float* data_or_null(const std::shared_ptr<const std::vector<float>>& v) { return v ? v->data() : nullptr; }

void set_masks(TapTable& table, int64_t batch, int64_t out_h, int64_t out_w, const std::vector<std::pair<int64_t, int64_t>>& valid_y,
               const std::vector<std::pair<int64_t, int64_t>>& valid_x) {
    int64_t pixels = batch * out_h * out_w;
    table.mask_stride = static_cast<size_t>(ceil_div(pixels, 16) + 1);
    table.mask.assign(table.mask_stride * table.taps, 0);
    for (int tap = 0; tap < table.taps; tap++) {
        uint16_t* bits = table.mask.data() + tap * table.mask_stride;
        auto [y0, y1] = valid_y[tap];
        auto [x0, x1] = valid_x[tap];
        for (int64_t n = 0; n < batch; n++)
            for (int64_t y = std::max<int64_t>(0, y0); y < std::min(out_h, y1); y++)
                for (int64_t x = std::max<int64_t>(0, x0); x < std::min(out_w, x1); x++) {
                    int64_t p = (n * out_h + y) * out_w + x;
                    bits[p >> 4] = static_cast<uint16_t>(bits[p >> 4] | (1u << (p & 15)));
                }
    }
}

// Whether the taps of each row of a kernel three wide can be had from one load of every vector: see Im2colArgs.
bool in_rows_of_three(const TapTable& table, int64_t kernel_w, int64_t pixels) {
    if (kernel_w != 3) return false;
    auto valid = [&](int tap, int64_t p) {
        return p >= 0 && p < pixels && (table.mask[tap * table.mask_stride + static_cast<size_t>(p >> 4)] >> (p & 15) & 1);
    };
    for (int tap = 1; tap < table.taps; tap += 3) {
        const int64_t* offset = table.offset.data() + tap;
        if (offset[-1] != offset[0] - 1 || offset[1] != offset[0] + 1) return false;
        for (int64_t p = 0; p < pixels; p++)
            if ((valid(tap - 1, p) && !valid(tap, p - 1)) || (valid(tap + 1, p) && !valid(tap, p + 1))) return false;
    }
    return true;
}

}  // namespace

Tiles::Tiles(int64_t vectors, int64_t wanted, int64_t most, int threads) : total(vectors) {
    wanted = std::max<int64_t>(1, std::min(wanted, most));
    count = std::max<int64_t>({1, (vectors + wanted / 2) / wanted, ceil_div(vectors, most)});
    const int64_t even = ceil_div(count, threads) * threads;
    if (even <= total) count = even;
}

int64_t padded_pixels(int64_t pixels) {
    if (pixels <= 1) return pixels;
    // An odd number of cache lines: planes then spread over all sets of the L1.
    int64_t lines = ceil_div(pixels, 16);
    return (lines % 2 == 0 ? lines + 1 : lines) * 16;
}

bool ConvGeometry::pointwise() const {
    return kernel_h == 1 && kernel_w == 1 && stride_h == 1 && stride_w == 1 && !pad_top && !pad_left && !pad_bottom && !pad_right;
}

void ConvGeometry::check() const {
    if (batch < 0 || channels < 1 || height < 1 || width < 1 || kernel_h < 1 || kernel_w < 1 || stride_h < 1 || stride_w < 1 ||
        dilation_h < 1 || dilation_w < 1 || pad_top < 0 || pad_left < 0 || pad_bottom < 0 || pad_right < 0)
        throw std::invalid_argument("convolution geometry out of range");
    if (height + pad_top + pad_bottom < dilation_h * (kernel_h - 1) + 1 || width + pad_left + pad_right < dilation_w * (kernel_w - 1) + 1)
        throw std::invalid_argument("the kernel (" + std::to_string(kernel_h) + "x" + std::to_string(kernel_w) +
                                    ") is larger than the padded input (" + std::to_string(height + pad_top + pad_bottom) + "x" +
                                    std::to_string(width + pad_left + pad_right) + ")");
}

PhaseLayout phase_layout(const ConvGeometry& g) {
    PhaseLayout layout;
    int64_t out_h = g.out_height(), out_w = g.out_width();
    // Rows of one width: every tap is then a shift of the whole plane already (of one image's, where the heights differ).
    layout.needed = !(g.stride_h == 1 && g.stride_w == 1 && out_w == g.width && (out_h == g.height || g.batch == 1));
    if (!layout.needed) return layout;
    auto phases_of = [](int64_t kernel, int64_t dilation, int64_t pad, int64_t stride) {
        std::vector<int64_t> used;
        for (int64_t r = 0; r < kernel; r++) {
            int64_t shift = r * dilation - pad, phase = shift - floor_div(shift, stride) * stride;
            if (std::find(used.begin(), used.end(), phase) == used.end()) used.push_back(phase);
        }
        std::sort(used.begin(), used.end());
        return used;
    };
    layout.phase_y = phases_of(g.kernel_h, g.dilation_h, g.pad_top, g.stride_h);
    layout.phase_x = phases_of(g.kernel_w, g.dilation_w, g.pad_left, g.stride_w);
    // Rows (or columns) of a phase that outputs read.
    auto reach = [](int64_t kernel, int64_t dilation, int64_t pad, int64_t stride, int64_t size, int64_t out) {
        int64_t most = out;
        for (int64_t r = 0; r < kernel; r++) {
            int64_t shift = r * dilation - pad, q = floor_div(shift, stride), phase = shift - q * stride;
            int64_t existing = size > phase ? ceil_div(size - phase, stride) : 0;
            most = std::max(most, std::min(existing, out + q));
        }
        return most;
    };
    // A phase must have the output's width, so that its rows follow each other as the output's do, and in a batch its height too.
    layout.grid_h = reach(g.kernel_h, g.dilation_h, g.pad_top, g.stride_h, g.height, out_h);
    layout.grid_w = reach(g.kernel_w, g.dilation_w, g.pad_left, g.stride_w, g.width, out_w);
    layout.possible = layout.grid_w == out_w && (layout.grid_h == out_h || g.batch == 1);
    layout.plane_stride = padded_pixels(g.batch * layout.grid_h * layout.grid_w);
    return layout;
}

TapTable forward_taps(const ConvGeometry& g, const PhaseLayout& phases) {
    TapTable table;
    table.taps = static_cast<int>(g.taps());
    int64_t out_h = g.out_height(), out_w = g.out_width();
    if (phases.needed && !phases.possible) {
        table.affine = false;
        int64_t pixels = g.batch * out_h * out_w;
        table.gather_stride = static_cast<size_t>(ceil_div(pixels, 16) * 16 + kMaxVectors * 16);
        table.gather.assign(table.gather_stride * table.taps, -1);
        for (int64_t r = 0; r < g.kernel_h; r++)
            for (int64_t s = 0; s < g.kernel_w; s++)
                for (int64_t n = 0; n < g.batch; n++)
                    for (int64_t y = 0; y < out_h; y++)
                        for (int64_t x = 0; x < out_w; x++) {
                            int64_t iy = y * g.stride_h + r * g.dilation_h - g.pad_top, ix = x * g.stride_w + s * g.dilation_w - g.pad_left;
                            if (iy < 0 || iy >= g.height || ix < 0 || ix >= g.width) continue;
                            table.gather[(r * g.kernel_w + s) * table.gather_stride + (n * out_h + y) * out_w + x] =
                                static_cast<int32_t>((n * g.height + iy) * g.width + ix);
                        }
        return table;
    }
    std::vector<std::pair<int64_t, int64_t>> valid_y, valid_x;
    for (int64_t r = 0; r < g.kernel_h; r++)
        for (int64_t s = 0; s < g.kernel_w; s++) {
            int64_t dy = r * g.dilation_h - g.pad_top, dx = s * g.dilation_w - g.pad_left;
            if (!phases.needed) {
                table.offset.push_back(dy * g.width + dx);
                valid_y.push_back({-dy, g.height - dy});
                valid_x.push_back({-dx, g.width - dx});
                continue;
            }
            int64_t qy = floor_div(dy, g.stride_h), qx = floor_div(dx, g.stride_w), py = dy - qy * g.stride_h, px = dx - qx * g.stride_w;
            int64_t row = std::find(phases.phase_y.begin(), phases.phase_y.end(), py) - phases.phase_y.begin();
            int64_t column = std::find(phases.phase_x.begin(), phases.phase_x.end(), px) - phases.phase_x.begin();
            int64_t plane = row * static_cast<int64_t>(phases.phase_x.size()) + column;
            table.offset.push_back(plane * phases.plane_stride + qy * phases.grid_w + qx);
            int64_t rows = g.height > py ? ceil_div(g.height - py, g.stride_h) : 0,
                    columns = g.width > px ? ceil_div(g.width - px, g.stride_w) : 0;
            valid_y.push_back({-qy, rows - qy});
            valid_x.push_back({-qx, columns - qx});
        }
    set_masks(table, g.batch, out_h, out_w, valid_y, valid_x);
    table.rows_of_three = in_rows_of_three(table, g.kernel_w, g.batch * out_h * out_w);
    bool rows_of_three = g.kernel_h == 3 && g.kernel_w == 3;
    for (int64_t tap = 1; tap < table.taps && rows_of_three; tap++)
        rows_of_three = tap % 3 == 0 || table.offset[static_cast<size_t>(tap)] == table.offset[static_cast<size_t>(tap - 1)] + 1;
    if (rows_of_three) {
        table.inner.resize(table.mask_stride);
        for (size_t i = 0; i < table.mask_stride; i++) {
            auto mask = [&](size_t tap) { return table.mask[tap * table.mask_stride + i]; };
            table.inner[i] = (mask(1) & mask(4) & mask(7)) == 0xffff;
        }
    }
    return table;
}

TapTable backward_taps(const ConvGeometry& g) {
    TapTable table;
    table.taps = static_cast<int>(g.taps());
    int64_t out_h = g.out_height(), out_w = g.out_width();
    if (g.stride_h == 1 && g.stride_w == 1 && out_h == g.height && out_w == g.width) {
        std::vector<std::pair<int64_t, int64_t>> valid_y, valid_x;
        for (int64_t r = 0; r < g.kernel_h; r++)
            for (int64_t s = 0; s < g.kernel_w; s++) {
                int64_t dy = g.pad_top - r * g.dilation_h, dx = g.pad_left - s * g.dilation_w;
                table.offset.push_back(dy * out_w + dx);
                valid_y.push_back({-dy, out_h - dy});
                valid_x.push_back({-dx, out_w - dx});
            }
        set_masks(table, g.batch, g.height, g.width, valid_y, valid_x);
        return table;
    }
    table.affine = false;
    int64_t pixels = g.batch * g.height * g.width;
    table.gather_stride = static_cast<size_t>(ceil_div(pixels, 16) * 16 + kMaxVectors * 16);
    table.gather.assign(table.gather_stride * table.taps, -1);
    for (int64_t r = 0; r < g.kernel_h; r++)
        for (int64_t s = 0; s < g.kernel_w; s++)
            for (int64_t n = 0; n < g.batch; n++)
                for (int64_t y = 0; y < g.height; y++)
                    for (int64_t x = 0; x < g.width; x++) {
                        int64_t oy = y + g.pad_top - r * g.dilation_h, ox = x + g.pad_left - s * g.dilation_w;
                        if (oy < 0 || ox < 0 || oy % g.stride_h || ox % g.stride_w) continue;
                        oy /= g.stride_h, ox /= g.stride_w;
                        if (oy >= out_h || ox >= out_w) continue;
                        table.gather[(r * g.kernel_w + s) * table.gather_stride + (n * g.height + y) * g.width + x] =
                            static_cast<int32_t>((n * out_h + oy) * out_w + ox);
                    }
    return table;
}

namespace {

// Fills one tile of X (part of its columns) and says where it is.
struct TileSource {
    const KernelTable& k;
    Source source;
    const float* x;
    int64_t x_stride;
    const TapTable* taps;
    int64_t pixels;

    // scratch: room for columns × vectors × lanes floats, unless the source is planes.
    const float* part(int64_t column0, int64_t columns, int64_t pixel0, int vectors, float* scratch, size_t* stride) const {
        int width = vectors * k.lanes;
        if (source == Source::planes) {
            *stride = static_cast<size_t>(x_stride);
            return x + column0 * x_stride + pixel0;
        }
        *stride = static_cast<size_t>(width);
        if (source == Source::rows) {
            k.transpose_in(x + pixel0 * x_stride + column0, static_cast<size_t>(x_stride),
                           static_cast<int>(std::min<int64_t>(width, pixels - pixel0)), static_cast<int>(columns), scratch, width);
            return scratch;
        }
        Im2colArgs a{};
        a.x = x, a.channel_stride = static_cast<size_t>(x_stride), a.taps = taps->taps;
        a.tap_offset = taps->offset.data(), a.tap_mask = taps->mask.data(), a.mask_stride = taps->mask_stride;
        a.gather = taps->affine ? nullptr : taps->gather.data(), a.gather_stride = taps->gather_stride;
        a.rows_of_three = taps->rows_of_three;
        a.channel0 = column0 / taps->taps, a.tap0 = static_cast<int>(column0 % taps->taps);
        a.columns = static_cast<int>(columns), a.pixel0 = pixel0, a.vectors = vectors, a.tile = scratch;
        k.im2col(a);
        return scratch;
    }
};

}  // namespace

void SpmmNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const PanelMatrix& w = *weight;
    const int lanes = k.lanes, log = log2_of(w.options.panel);
    const SpmmKernel* table = w.options.dense ? k.dense[log] : k.sparse[log];
    Tiles tiles(ceil_div(pixels, lanes), vectors, k.max_vectors[log], context.threads);
    if (pixels == 0 || w.rows == 0) return;
    const TileSource tile_source{k, source, context.at(x), x_stride, taps.get(), pixels};
    const float* bias_data = has_bias_ref ? context.at(bias_ref) : data_or_null(bias);
    float* out_data = context.at(out);
    const float* residual_data = has_residual ? context.at(residual) : nullptr;
    const int64_t block_rows = w.block_rows();
    // All parts of a row-major tile are transposed at once per item, so one item takes all its row blocks.
    const int64_t blocks = w.row_blocks;

    parallel_for(tiles.count * blocks, context.threads, [&](int64_t item, int slot) {
        // Tiles outermost: a thread's share is then a range of pixels, the same one in every layer.
        int64_t tile = item / blocks, block = item % blocks;
        int64_t v0 = tiles.begin(tile);
        int tile_vectors = static_cast<int>(tiles.begin(tile + 1) - v0), width = tile_vectors * lanes;
        int64_t pixel0 = v0 * lanes, row0 = block * block_rows, rows = std::min(block_rows, w.rows - row0);
        size_t in_floats = source == Source::planes ? 0 : size_t(w.options.part) * width;
        size_t out_floats = destination == Destination::rows ? size_t(rows) * width : 0;
        float* scratch = in_floats + out_floats ? context.scratch(slot, in_floats + out_floats) : nullptr;

        SpmmArgs a{};
        a.rows = static_cast<int>(rows);
        if (destination == Destination::planes) {
            a.out = out_data + row0 * out_stride + pixel0, a.out_stride = static_cast<size_t>(out_stride);
        } else {
            a.out = scratch + in_floats, a.out_stride = static_cast<size_t>(width);
        }
        a.bias = bias_data ? bias_data + row0 : nullptr;
        if (residual_data)
            a.residual = residual_data + row0 * residual_stride + pixel0, a.residual_stride = static_cast<size_t>(residual_stride);
        a.low = epilogue.low(), a.high = epilogue.high();
        // Half of the last vector is enough where the image ends there.
        bool half = table == k.sparse[0] && k.sparse_half[0] && destination == Destination::planes && pixels - pixel0 <= width - lanes / 2;
        SpmmKernel kernel = half ? k.sparse_half[tile_vectors - 1] : table[tile_vectors];
        for (int part = 0; part < w.parts; part++) {
            int64_t column0 = int64_t(part) * w.options.part, columns = std::min<int64_t>(w.options.part, w.cols - column0);
            const PanelSegment& segment = w.segment(static_cast<int>(block), part);
            a.first = part == 0, a.last = part == w.parts - 1;
            a.runs = w.runs.data() + segment.run_begin, a.runs_end = w.runs.data() + segment.run_end;
            if (a.runs == a.runs_end) continue;
            a.x = tile_source.part(column0, columns, pixel0, tile_vectors, scratch, &a.x_stride);
            a.panel_rows = w.panel_rows.data() + segment.row_begin;
            a.index = w.index.data() + segment.index_begin;
            a.values = w.values.data() + segment.value_begin;
            kernel(a);
        }
        if (epilogue.needs_pass())
            for (int64_t r = 0; r < rows; r++) {
                float* row = a.out + r * a.out_stride;
                k.activate(epilogue.kind, epilogue.p0, epilogue.p1, row, row, width);
            }
        if (destination == Destination::rows)
            k.transpose_out(a.out, width, static_cast<int>(rows), static_cast<int>(std::min<int64_t>(width, pixels - pixel0)),
                            out_data + pixel0 * out_stride + row0, static_cast<size_t>(out_stride));
    });
}

void PhaseNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const ConvGeometry& g = geometry;
    const float* in = context.at(x);
    float* to = context.at(out);
    int64_t columns = static_cast<int64_t>(phases.phase_x.size()), count = static_cast<int64_t>(phases.phase_y.size()) * columns;
    int64_t grid = phases.grid_h * phases.grid_w;
    // Bands of rows outermost, so that threads keep their pixels.
    int64_t bands = context.threads > 1 && g.batch == 1 ? std::min<int64_t>(phases.grid_h, 2 * context.threads) : 1;
    int64_t planes = g.channels * g.batch;
    auto columns_of = [&](int64_t px) { return std::min(phases.grid_w, g.width > px ? ceil_div(g.width - px, g.stride_w) : 0); };
    int64_t group = std::clamp<int64_t>(kItemWork * bands / (4 * count * grid), 1, planes), groups = ceil_div(planes, group);
    parallel_for(bands * groups, context.threads, [&](int64_t item, int) {
        int64_t band = item / groups, plane0 = item % groups * group;
        int64_t row0 = phases.grid_h * band / bands, row1 = phases.grid_h * (band + 1) / bands;
        for (int64_t index = plane0; index < std::min(planes, plane0 + group); index++) {
            int64_t c = index % g.channels, n = index / g.channels;
            const float* source = in + n * stride_n + c * stride_c;
            // For the usual stride of two both columns of phases come from one pass over the rows.
            bool pairs = g.stride_w == 2 && stride_w == 1 && phases.phase_x[0] == 0 && columns <= 2;
            for (int64_t phase = 0; phase < count; phase += pairs ? columns : 1) {
                int64_t py = phases.phase_y[phase / columns], px = phases.phase_x[phase % columns];
                float* plane = to + (c * count + phase) * phases.plane_stride + n * grid;
                int64_t rows = std::min(phases.grid_h, g.height > py ? ceil_div(g.height - py, g.stride_h) : 0);
                int64_t wide = columns_of(px), last = std::min(rows, row1);
                float* second = pairs && columns == 2 ? plane + phases.plane_stride : nullptr;
                if (pairs && row0 < last) {
                    k.split(source + (row0 * g.stride_h + py) * stride_h, g.stride_h * stride_h, last - row0, wide,
                            second ? columns_of(1) : 0, plane + row0 * phases.grid_w, second ? second + row0 * phases.grid_w : nullptr,
                            phases.grid_w);
                } else {
                    for (int64_t i = row0; i < last; i++)
                        k.copy(source + (i * g.stride_h + py) * stride_h + px * stride_w, g.stride_w * stride_w, plane + i * phases.grid_w,
                               wide);
                }
                // Pixels off the input are masked by the taps, but must not be traps: keep them finite.
                auto clear = [&](float* at, int64_t filled) {
                    if (filled < phases.grid_w)
                        for (int64_t i = row0; i < last; i++)
                            std::memset(at + i * phases.grid_w + filled, 0, size_t(phases.grid_w - filled) * sizeof(float));
                    int64_t empty = std::max(rows, row0);
                    if (empty < row1) std::memset(at + empty * phases.grid_w, 0, size_t((row1 - empty) * phases.grid_w) * sizeof(float));
                };
                clear(plane, wide);
                if (second) clear(second, columns_of(1));
            }
        }
    });
}

void DepthwiseNode::run(Context& context) const {
    const KernelTable& k = kernels();
    if (pixels == 0) return;
    const float* in = context.at(x);
    float* to = context.at(out);
    const float* add = has_residual ? context.at(residual) : nullptr;
    // Pixels outermost: a thread then works on the pixels that it also has in the pointwise layers before and after.
    int64_t chunk = std::clamp<int64_t>(ceil_div(pixels, 16 * 4 * context.threads) * 16, 64, 4096), chunks = ceil_div(pixels, chunk);
    // Channels per item: handing out an item costs up to a microsecond when the cores are far apart.
    int64_t group = std::clamp<int64_t>(kItemWork / (chunk * taps->taps), 1, channels), groups = ceil_div(channels, group);
    parallel_for(groups * chunks, context.threads, [&](int64_t item, int) {
        int64_t first = item / groups * chunk, channel0 = item % groups * group;
        for (int64_t c = channel0; c < std::min(channels, channel0 + group); c++) {
            DepthwiseArgs a{};
            a.x = in + c / multiplier * x_stride;
            a.weight = weight->data() + c * taps->taps, a.taps = taps->taps;
            a.tap_offset = taps->offset.data(), a.tap_mask = taps->mask.data(), a.mask_stride = taps->mask_stride;
            a.pixel0 = first, a.pixels = std::min(chunk, ceil_div(pixels, 16) * 16 - first);
            a.bias = bias ? (*bias)[c] : 0.0f;
            a.low = epilogue.low(), a.high = epilogue.high();
            a.out = to + c * out_stride;
            a.residual = add ? add + c * residual_stride : nullptr;
            const int64_t source = c / multiplier, sources = channels / multiplier;
            a.inner = !taps->inner.empty() && source > 0 && source + 1 < sources && x_stride >= 64 ? taps->inner.data() : nullptr;
            k.depthwise(a);
            if (epilogue.needs_pass())
                k.activate(epilogue.kind, epilogue.p0, epilogue.p1, a.out + first, a.out + first, std::min(chunk, pixels - first));
        }
    });
}

void VectorNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float* in = context.at(x);
    float* to = context.at(out);
    const float* add = has_residual ? context.at(residual) : nullptr;
    const float* start = data_or_null(bias);
    int64_t work = row_ptr ? row_ptr->back() : rows * cols;
    // Below some ten thousand products a second thread costs more than it brings.
    int64_t blocks = std::min<int64_t>(rows, std::max<int64_t>(1, std::min<int64_t>(4 * context.threads, work / 8192)));
    int threads = work < 16384 ? 1 : context.threads;
    parallel_for(blocks, threads, [&](int64_t item, int) {
        int64_t row0 = rows * item / blocks, row1 = rows * (item + 1) / blocks;
        if (col16) {
            const float none = std::numeric_limits<float>::infinity();
            for (int64_t block = 0; block * kBlockColumns < cols; block++) {
                const bool first = block == 0, last = (block + 1) * kBlockColumns >= cols;
                k.spmv16(row_ptr->data() + block * rows, col16->data(), values->data(), row0, row1, in + block * kBlockColumns, to,
                         first ? start : nullptr, first ? add : to, last ? epilogue.low() : -none, last ? epilogue.high() : none);
            }
        } else if (row_ptr) {
            k.spmv(row_ptr->data(), col->data(), values->data(), row0, row1, in, to, start, add, epilogue.low(), epilogue.high());
        } else {
            k.gemv(values->data(), cols, row0, row1, in, to, start, add, epilogue.low(), epilogue.high());
        }
        if (epilogue.needs_pass()) k.activate(epilogue.kind, epilogue.p0, epilogue.p1, to + row0, to + row0, row1 - row0);
    });
}

void SampledNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const int lanes = k.lanes;
    float* to = context.at(out);
    int64_t nnz = row_ptr->back();
    if (nnz == 0) return;
    std::memset(to, 0, size_t(nnz) * sizeof(float));
    if (pixels == 0) return;
    const TileSource tile_source{k, source, context.at(x), x_stride, taps.get(), pixels};
    const float* gradient = context.at(dy);
    constexpr int kPart = 256, kVectors = 8;
    Tiles tiles(ceil_div(pixels, lanes), kVectors, kVectors, 1);
    // A fixed number of partial sums, added in a fixed order: the result does not depend on the number of threads.
    int64_t chunks = std::min<int64_t>(tiles.count, 8);
    std::vector<float> partial(size_t(chunks) * nnz, 0.0f);
    parallel_for(chunks, context.threads, [&](int64_t chunk, int slot) {
        float* sums = partial.data() + chunk * nnz;
        size_t width_most = size_t(kVectors) * lanes, in_floats = kPart * width_most, dy_floats = size_t(rows) * width_most;
        float* scratch = context.scratch(slot, in_floats * 2 + dy_floats);
        std::vector<int64_t> cursor(rows);
        for (int64_t tile = tiles.count * chunk / chunks; tile < tiles.count * (chunk + 1) / chunks; tile++) {
            int64_t v0 = tiles.begin(tile), pixel0 = v0 * lanes;
            int tile_vectors = static_cast<int>(tiles.begin(tile + 1) - v0), width = tile_vectors * lanes;
            int64_t valid = std::min<int64_t>(width, pixels - pixel0);
            std::copy(row_ptr->begin(), row_ptr->end() - 1, cursor.begin());
            const float* dy_tile = gradient + pixel0;
            size_t dy_tile_stride = static_cast<size_t>(dy_stride);
            if (dy_rows || valid < width) {  // lanes past the end must count as zero on both sides
                float* copy = scratch + 2 * in_floats;
                if (dy_rows) {
                    k.transpose_in(gradient + pixel0 * dy_stride, static_cast<size_t>(dy_stride), static_cast<int>(valid),
                                   static_cast<int>(rows), copy, width);
                } else {
                    for (int64_t r = 0; r < rows; r++) {
                        std::memcpy(copy + r * width, gradient + r * dy_stride + pixel0, size_t(valid) * sizeof(float));
                        std::memset(copy + r * width + valid, 0, size_t(width - valid) * sizeof(float));
                    }
                }
                dy_tile = copy, dy_tile_stride = static_cast<size_t>(width);
            }
            for (int64_t column0 = 0; column0 < cols; column0 += kPart) {
                int64_t columns = std::min<int64_t>(kPart, cols - column0);
                size_t stride;
                const float* part = tile_source.part(column0, columns, pixel0, tile_vectors, scratch, &stride);
                if (source == Source::planes && valid < width) {
                    for (int64_t c = 0; c < columns; c++) {
                        std::memcpy(scratch + in_floats + c * width, part + c * stride, size_t(valid) * sizeof(float));
                        std::memset(scratch + in_floats + c * width + valid, 0, size_t(width - valid) * sizeof(float));
                    }
                    part = scratch + in_floats, stride = static_cast<size_t>(width);
                }
                k.sddmm(0, rows, row_ptr->data() + 1, cursor.data(), col->data(), static_cast<int32_t>(column0),
                        static_cast<int32_t>(column0 + columns), dy_tile, dy_tile_stride, part, stride, width, sums);
            }
        }
    });
    int64_t step = 4096, pieces = ceil_div(nnz, step);
    parallel_for(pieces, nnz < 65536 ? 1 : context.threads, [&](int64_t piece, int) {
        int64_t from = piece * step, to_end = std::min(nnz, from + step);
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t i = from; i < to_end; i++) to[i] += partial[chunk * nnz + i];
    });
}

}  // namespace sparse_engine
