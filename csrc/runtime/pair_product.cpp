#include "runtime/pair_product.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu/kernels_pairs.h"

namespace sparse_engine {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint16_t* halves(float* p) { return reinterpret_cast<uint16_t*>(p); }
const uint16_t* halves(const float* p) { return reinterpret_cast<const uint16_t*>(p); }

// How many pixels around a tile its taps reach.
std::pair<int64_t, int64_t> reach_of(const TapTable& taps) {
    int64_t before = 0, after = 0;
    for (int64_t offset : taps.offset) before = std::max(before, -offset), after = std::max(after, offset);
    return {before, after};
}

// Columns of X for one tile after the other, as the kernel wants them: in bfloat16.
struct PairSource {
    const PairKernels& k;
    const PairNode& node;
    const float* x;
    int64_t before = 0, after = 0;  // pixels around a tile that its taps reach

    // In halves. What a part of `columns` needs: the tile, and the pixels it is made of where they have to be rounded first.
    static constexpr int64_t kRoom = kLinePixels;
    int64_t tile_size(int64_t columns, int64_t width) const {
        if (!node.taps) return node.x.half ? 0 : columns * width;
        return columns * width + (node.x.half ? 0 : channels(columns) * window(width));
    }
    int64_t channels(int64_t columns) const { return std::min<int64_t>(columns, (columns - 1) / node.taps->taps + 2); }
    int64_t window(int64_t width) const { return ceil_div(before + width + after, kLinePixels) * kLinePixels + kRoom; }

    const uint16_t* part(int64_t column0, int64_t columns, int64_t pixel0, int lines, uint16_t* scratch, size_t* stride) const {
        const int64_t width = int64_t{lines} * kLinePixels;
        const int64_t step = node.x.stride;
        *stride = static_cast<size_t>(width);
        if (!node.taps) {
            if (node.x.half) {
                *stride = static_cast<size_t>(step);
                return halves(x) + column0 * step + pixel0;
            }
            const int64_t count = std::min(width, node.pixels - pixel0);
            for (int64_t c = 0; c < columns; c++) k.narrow(x + (column0 + c) * step + pixel0, count, scratch + c * width);
            return scratch;
        }
        const TapTable& taps = *node.taps;
        PairTapArgs a{};
        const int64_t channel = column0 / taps.taps;
        a.taps = taps.taps, a.tap0 = static_cast<int>(column0 % taps.taps), a.columns = static_cast<int>(columns), a.lines = lines;
        a.tap_offset = taps.offset.data(), a.tap_mask = taps.mask.data() + (pixel0 >> 4), a.mask_stride = taps.mask_stride;
        a.tile = scratch;
        if (node.x.half) {
            a.x = halves(x) + channel * step + pixel0, a.channel_stride = static_cast<size_t>(step);
        } else {
            // Each pixel is rounded once, not once for each tap that reads it.
            const int64_t count = (a.tap0 + columns - 1) / taps.taps + 1, size = window(width);
            uint16_t* strip = scratch + columns * width;
            const int64_t low = std::max<int64_t>(0, pixel0 - before), high = std::min(node.x_pixels, pixel0 + width + after);
            for (int64_t c = 0; c < count && low < high; c++)
                k.narrow(x + (channel + c) * step + low, high - low, strip + c * size + (low - (pixel0 - before)));
            a.x = strip + before, a.channel_stride = static_cast<size_t>(size);
        }
        k.taps(a);
        return scratch;
    }
};

}  // namespace

int64_t padded_half_pixels(int64_t pixels) { return (ceil_div(pixels, kLinePixels) | 1) * kLinePixels; }

void PairNode::run(Context& context) const {
    const KernelTable& floats = kernels();
    const PairKernels& k = pair_kernels();
    const PanelMatrix& w = weight->panels;
    if (pixels == 0 || w.rows == 0) return;
    const Tiles tiles(ceil_div(pixels, kLinePixels), lines, kMaxLines, context.threads);
    PairSource source{k, *this, context.at(x.ref)};
    if (taps) std::tie(source.before, source.after) = reach_of(*taps);
    const float* bias_data = bias ? bias->data() : nullptr;
    float* out_data = context.at(out.ref);
    const float* residual_data = has_residual ? context.at(residual.ref) : nullptr;
    const bool pass = epilogue.needs_pass();
    const int64_t block_rows = w.block_rows(), blocks = w.row_blocks;

    parallel_for(tiles.count * blocks, context.threads, [&](int64_t item, int slot) {
        const int64_t tile = item / blocks, block = item % blocks, first_line = tiles.begin(tile);
        const int tile_lines = static_cast<int>(tiles.begin(tile + 1) - first_line);
        const int64_t width = int64_t{tile_lines} * kLinePixels, pixel0 = first_line * kLinePixels;
        const int64_t row0 = block * block_rows, rows = std::min(block_rows, w.rows - row0);
        const int64_t tile_floats = ceil_div(source.tile_size(std::min<int64_t>(w.options.part, w.cols), width), 2 * 16) * 16;
        const int64_t sum_floats = w.parts > 1 || pass ? rows * width : 0;
        float* scratch = tile_floats + sum_floats ? context.scratch(slot, static_cast<size_t>(tile_floats + sum_floats)) : nullptr;

        PairArgs a{};
        a.sums = sum_floats ? scratch + tile_floats : nullptr, a.sums_stride = static_cast<size_t>(width);
        // Pixels of whole vectors: there is room for them behind the last one.
        a.groups = static_cast<int>(std::min<int64_t>(2 * tile_lines, ceil_div(pixels - pixel0, 16)));
        const int64_t place = row0 * out.stride + pixel0;
        if (pass) {
            a.out = a.sums, a.out_stride = a.sums_stride;
        } else if (out.half) {
            a.out16 = halves(out_data) + place, a.out_stride = static_cast<size_t>(out.stride);
        } else {
            a.out = out_data + place, a.out_stride = static_cast<size_t>(out.stride);
        }
        a.bias = bias_data ? bias_data + row0 : nullptr;
        if (residual_data) {
            const int64_t at = row0 * residual.stride + pixel0;
            if (residual.half) {
                a.residual16 = halves(residual_data) + at;
            } else {
                a.residual = residual_data + at;
            }
            a.residual_stride = static_cast<size_t>(residual.stride);
        }
        a.low = epilogue.low(), a.high = epilogue.high();
        for (int part = 0; part < w.parts; part++) {
            const int64_t column0 = int64_t(part) * w.options.part, columns = std::min<int64_t>(w.options.part, w.cols - column0);
            const PanelSegment& segment = w.segment(static_cast<int>(block), part);
            a.first = part == 0, a.last = part == w.parts - 1;
            a.runs = w.runs.data() + segment.run_begin, a.runs_end = w.runs.data() + segment.run_end;
            if (a.runs == a.runs_end) continue;
            a.x = source.part(column0, columns, pixel0, tile_lines, halves(scratch), &a.x_stride);
            a.panel_rows = w.panel_rows.data() + segment.row_begin;
            a.index = w.index.data() + segment.index_begin;
            a.values = weight->values.data() + segment.value_begin;
            k.product[tile_lines](a);
        }
        if (!pass) return;
        const int64_t count = int64_t{a.groups} * 16;
        for (int64_t r = 0; r < rows; r++) {
            float* row = a.out + r * width;
            if (out.half) {
                floats.activate(epilogue.kind, epilogue.p0, epilogue.p1, row, row, count);
                k.narrow(row, count, halves(out_data) + place + r * out.stride);
            } else {
                floats.activate(epilogue.kind, epilogue.p0, epilogue.p1, row, out_data + place + r * out.stride, count);
            }
        }
    });
}

void PairDepthwiseNode::run(Context& context) const {
    const KernelTable& floats = kernels();
    const PairKernels& k = pair_kernels();
    if (pixels == 0 || channels == 0) return;
    const float* in = context.at(x.ref);
    float* to = context.at(out.ref);
    const float* add = has_residual ? context.at(residual.ref) : nullptr;
    const bool pass = epilogue.needs_pass();
    const auto [before, after] = reach_of(*taps);
    const int64_t lead = ceil_div(before, kLinePixels) * kLinePixels;
    // Pixels outermost: a thread then works on the pixels that it also has in the pointwise layers before and after.
    const int64_t lines = ceil_div(pixels, kLinePixels), chunk = std::clamp<int64_t>(ceil_div(lines, 4 * context.threads), 2, 128);
    const int64_t chunks = ceil_div(lines, chunk), width = chunk * kLinePixels;
    const int64_t group = std::clamp<int64_t>(65536 / (width * taps->taps), 1, channels), groups = ceil_div(channels, group);
    const int64_t window = x.half ? 0 : ceil_div(lead + width + after, 2 * 16) * 16;  // floats
    parallel_for(groups * chunks, context.threads, [&, before = before, after = after](int64_t item, int slot) {
        const int64_t line0 = item / groups * chunk, first = line0 * kLinePixels, channel0 = item % groups * group;
        float* scratch = window || pass ? context.scratch(slot, static_cast<size_t>(window + (pass ? width : 0))) : nullptr;
        PairDepthwiseArgs a{};
        a.taps = taps->taps, a.tap_offset = taps->offset.data(), a.mask_stride = taps->mask_stride;
        a.tap_mask = taps->mask.data() + (first >> 4);
        a.lines = std::min(chunk, lines - line0);
        a.groups = std::min(2 * a.lines, ceil_div(pixels - first, 16));
        a.low = epilogue.low(), a.high = epilogue.high();
        for (int64_t c = channel0; c < std::min(channels, channel0 + group); c++) {
            const int64_t plane = c / multiplier * x.stride;
            if (x.half) {
                a.x = halves(in) + plane + first;
            } else {
                const int64_t low = std::max<int64_t>(0, first - before), high = std::min(x_pixels, first + width + after);
                uint16_t* strip = halves(scratch) + lead;
                if (low < high) k.narrow(in + plane + low, high - low, strip + (low - first));
                a.x = strip;
            }
            a.weight = weight->data() + c * taps->taps, a.bias = bias ? (*bias)[c] : 0.0f;
            if (add) {
                const int64_t at = c * residual.stride + first;
                a.residual = residual.half ? nullptr : add + at, a.residual16 = residual.half ? halves(add) + at : nullptr;
            }
            const int64_t place = c * out.stride + first;
            a.out = pass ? scratch + window : out.half ? nullptr : to + place;
            a.out16 = pass || !out.half ? nullptr : halves(to) + place;
            k.depthwise(a);
            if (!pass) continue;
            float* target = out.half ? a.out : to + place;
            floats.activate(epilogue.kind, epilogue.p0, epilogue.p1, a.out, target, 16 * a.groups);
            if (out.half) k.narrow(a.out, 16 * a.groups, halves(to) + place);
        }
    });
}

void HalfPhaseNode::run(Context& context) const {
    const PairKernels& k = pair_kernels();
    const ConvGeometry& g = geometry;
    const float* in = context.at(x);
    uint16_t* to = halves(context.at(out));
    const int64_t columns = static_cast<int64_t>(phases.phase_x.size()), count = static_cast<int64_t>(phases.phase_y.size()) * columns;
    const int64_t grid_w = phases.grid_w, grid = phases.grid_h * grid_w, planes = g.channels * g.batch;
    const int64_t group = std::clamp<int64_t>(65536 / (count * grid), 1, planes), groups = ceil_div(planes, group);
    auto columns_of = [&](int64_t px) { return std::min(grid_w, g.width > px ? ceil_div(g.width - px, g.stride_w) : 0); };
    const bool pairs = g.stride_w == 2 && phases.phase_x[0] == 0 && columns <= 2;
    parallel_for(groups, context.threads, [&](int64_t item, int slot) {
        uint16_t* rounded = x_half ? nullptr : halves(context.scratch(slot, static_cast<size_t>(phases.grid_h * g.width / 2 + 1)));
        for (int64_t index = item * group; index < std::min(planes, (item + 1) * group); index++) {
            const int64_t c = index % g.channels, n = index / g.channels;
            for (int64_t row = 0; row < static_cast<int64_t>(phases.phase_y.size()); row++) {
                const int64_t py = phases.phase_y[static_cast<size_t>(row)];
                const int64_t rows = std::min(phases.grid_h, g.height > py ? ceil_div(g.height - py, g.stride_h) : 0);
                const int64_t at = n * stride_n + c * stride_c + py * stride_h;
                const uint16_t* source = halves(in) + at;
                int64_t pitch = g.stride_h * stride_h;
                if (!x_half) {
                    for (int64_t i = 0; i < rows; i++) {
                        const float* from = in + at + i * pitch;
                        if (stride_w == 1) {
                            k.narrow(from, g.width, rounded + i * g.width);
                        } else {
                            for (int64_t j = 0; j < g.width; j++) k.narrow(from + j * stride_w, 1, rounded + i * g.width + j);
                        }
                    }
                    source = rounded, pitch = g.width;
                }
                uint16_t* first = to + (c * count + row * columns) * phases.plane_stride + n * grid;
                for (int64_t column = 0; column < columns; column++) {
                    const int64_t px = phases.phase_x[static_cast<size_t>(column)], wide = columns_of(px);
                    uint16_t* plane = first + column * phases.plane_stride;
                    if (!pairs) {
                        for (int64_t i = 0; i < rows; i++) k.every(source + i * pitch + px, g.stride_w, wide, plane + i * grid_w);
                    } else if (column == 0) {  // both in one pass
                        k.split(source, pitch, rows, wide, columns_of(1), plane, columns == 2 ? plane + phases.plane_stride : nullptr,
                                grid_w);
                    }
                    // Pixels off the input are masked by the taps, but must not be traps: keep them finite.
                    for (int64_t i = 0; i < rows && wide < grid_w; i++)
                        std::memset(plane + i * grid_w + wide, 0, static_cast<size_t>(grid_w - wide) * sizeof(uint16_t));
                    if (rows < phases.grid_h)
                        std::memset(plane + rows * grid_w, 0, static_cast<size_t>((phases.grid_h - rows) * grid_w) * sizeof(uint16_t));
                }
            }
        }
    });
}

}  // namespace sparse_engine
