#include "pack/row_tiles.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace sparse_engine {

RowTileMatrix::RowTileMatrix(const CsrView& csr, const float* values, int64_t kernel_h_, int64_t kernel_w_, int part, int height_,
                             int lanes_)
    : kernel_h(kernel_h_), kernel_w(kernel_w_), height(height_), lanes(lanes_) {
    const int64_t taps = kernel_h * kernel_w;
    if (kernel_h < 1 || kernel_w < 1 || csr.cols % taps) throw std::invalid_argument("the weight's columns are not channels times taps");
    if (part < taps || part > 256)
        throw std::invalid_argument("a part of a weight for row tiles holds one channel or more, and 256 columns at most");
    if (height < 1 || height > 8) throw std::invalid_argument("a row tile is 1 to 8 rows high");
    channels = csr.cols / taps, part_channels = part / taps;
    if (tile_floats() / kUnit > std::numeric_limits<uint16_t>::max())
        throw std::invalid_argument("a row tile is too large for its offsets");
    if (csr.rows > std::numeric_limits<uint16_t>::max())
        throw std::invalid_argument("too many rows for row tiles: " + std::to_string(csr.rows));
    panels = PanelMatrix(csr, values, PanelOptions{1, static_cast<int>(part_channels * taps), 0, false, false});
    // Where each column of a part begins in the tile.
    std::vector<uint16_t> where;
    for (int64_t c = 0; c < part_channels; c++)
        for (int64_t r = 0; r < kernel_h; r++)
            for (int64_t s = 0; s < kernel_w; s++)
                where.push_back(static_cast<uint16_t>(((c * kernel_w + s) * tile_rows() + r) * lanes / kUnit));
    offsets.reserve(panels.index.size());
    for (uint8_t column : panels.index) offsets.push_back(where[column]);
    panels.index = {};
}

}  // namespace sparse_engine
