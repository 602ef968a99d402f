// A sparse convolution's weight for tiles of image rows: V output rows × one vector of columns at a time.
//
//   tile of X:  [channel][tap column s][row 0 … V + kernel_h − 2][lanes]
//
// A tap (r, s) of a channel reads V neighbouring vectors from row r of its column s on. Taps above each other share the same copy of
// the input, so a 3×3 kernel needs 3 · (V + 2) vectors where im2col writes 9 · V. An entry is where in the tile it reads (two bytes) and a
// value. Parts are whole channels; rows are sorted by their number of entries as in PanelMatrix.
#pragma once

#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "pack/panel_matrix.h"

namespace sparse_engine {

class RowTileMatrix {
  public:
    // csr: [rows][channels · kernel_h · kernel_w]. part: channels of a part times taps, at most 256 columns. height: V, the output rows of
    // a tile. lanes: floats of a vector. Throws std::invalid_argument where these do not fit.
    RowTileMatrix(const CsrView& csr, const float* values, int64_t kernel_h, int64_t kernel_w, int part, int height, int lanes);

    int64_t nbytes() const { return panels.nbytes() + static_cast<int64_t>(offsets.size() * sizeof(uint16_t)); }
    int64_t tile_rows() const { return height + kernel_h - 1; }  // of the input
    int64_t tile_floats() const { return part_channels * kernel_w * tile_rows() * lanes; }
    const uint16_t* segment_offsets(const PanelSegment& segment) const { return offsets.data() + segment.index_begin; }

    int64_t kernel_h, kernel_w, channels, part_channels;
    int height, lanes;
    PanelMatrix panels;  // without its indices
    PanelMatrix::Packed<uint16_t> offsets;

    static constexpr int kUnit = 2;  // floats that an offset counts
};

}  // namespace sparse_engine
