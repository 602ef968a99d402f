#include "runtime/row_tiles.h"

#include <algorithm>

namespace sparse_engine {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool RowTileNode::applies(const ConvGeometry& g) {
    return g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1 && g.taps() > 1 && g.taps() <= 256;
}

void RowTileNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const RowTileMatrix& w = *weight;
    const ConvGeometry& g = geometry;
    const int64_t rows = g.out_height(), width = g.out_width(), lanes = w.lanes;
    const int64_t whole = width / lanes, over = width % lanes;
    if (w.panels.rows == 0 || g.batch * rows * width == 0) return;
    // The last columns of two rows share a vector where they fill half of one.
    const bool halves = over == lanes / 2 && k.row_tile[2][1];
    const int64_t most = halves ? 2 * w.height : w.height, blocks = ceil_div(rows, most);
    const float* in = context.at(x);
    float* to = context.at(out);
    const float* add = has_residual ? context.at(residual) : nullptr;

    parallel_for(g.batch * blocks, context.threads, [&](int64_t item, int slot) {
        const int64_t image = item / blocks, block = item % blocks;
        const int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
        float* tile = context.scratch(slot, static_cast<size_t>(w.tile_floats()));
        const float* image_in = in + image * stride_n;
        const int64_t image_out = image * rows * width;

        // Rows [y, y + height) of the columns from `column` on; `second` rows that follow them are in the upper halves.
        auto run_tile = [&](int kind, int64_t y, int64_t height, int64_t column, int64_t second) {
            RowTileFillArgs f{};
            f.channel_stride = stride_c, f.height = g.height, f.width = g.width, f.row_stride = stride_h;
            f.y0 = y - g.pad_top, f.x0 = column - g.pad_left;
            f.rows = height + w.kernel_h - 1, f.pitch = w.tile_rows(), f.kernel_w = w.kernel_w;
            f.second = second ? height : 0, f.tile = tile;
            RowTileArgs a{};
            const int64_t place = image_out + y * width + column;
            a.x = tile, a.out = to + place, a.out_stride = static_cast<size_t>(out_stride), a.row_stride = width;
            a.bits = static_cast<uint32_t>((uint64_t{1} << over) - 1), a.height = height, a.second = static_cast<int>(second);
            a.bias = bias ? bias->data() : nullptr;
            if (add) a.residual = add + place, a.residual_stride = static_cast<size_t>(residual_stride);
            a.low = epilogue.low(), a.high = epilogue.high();
            for (int part = 0; part < w.panels.parts; part++) {
                const PanelSegment& segment = w.panels.segment(0, part);
                a.runs = w.panels.runs.data() + segment.run_begin, a.runs_end = w.panels.runs.data() + segment.run_end;
                if (a.runs == a.runs_end) continue;
                const int64_t channel = part * w.part_channels;
                f.x = image_in + channel * stride_c, f.channels = std::min(w.part_channels, w.channels - channel);
                k.row_tile_fill(f);
                a.first = part == 0, a.last = part == w.panels.parts - 1;
                a.panel_rows = w.panels.panel_rows.data() + segment.row_begin;
                a.offsets = w.segment_offsets(segment), a.values = w.panels.values.data() + segment.value_begin;
                k.row_tile[kind][height](a);
            }
        };

        const int64_t upper = halves ? ceil_div(end - begin, 2) : end - begin, lower = end - begin - upper;
        for (int64_t column = 0; column < whole * lanes; column += lanes) {
            run_tile(0, begin, upper, column, 0);
            if (lower) run_tile(0, begin + upper, lower, column, 0);
        }
        if (halves && lower) {
            run_tile(2, begin, upper, whole * lanes, lower);
        } else if (over) {
            run_tile(1, begin, upper, whole * lanes, 0);
            if (lower) run_tile(1, begin + upper, lower, whole * lanes, 0);
        }
        if (epilogue.needs_pass())
            for (int64_t row = 0; row < w.panels.rows; row++) {
                float* at = to + row * out_stride + image_out + begin * width;
                k.activate(epilogue.kind, epilogue.p0, epilogue.p1, at, at, (end - begin) * width);
            }
    });
}

}  // namespace sparse_engine
