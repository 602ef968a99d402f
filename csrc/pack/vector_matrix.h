// Weights that multiply one vector at a time (batch 1), in single precision, bfloat16 or int8: the layouts that read least.
//
// Dense: rows one after the other, padded with zeros to whole blocks of the kernels.
//
// Sparse: a register as a table. Sixteen rows are the lanes of one register (a slice). Columns come in tiles of 31, which two registers
// hold with a zero in the last place; an instruction then looks up any column for each lane, where a gather would read memory once per
// lane. Per tile each lane has a list of entries, filled up to a multiple of four (a group) with the lane's zero:
//
//              lane 0  1  2 …  15
//   tile 0     4 columns each, in the bytes of a word; 4 × 16 values        group 0
//              …                                                            group 1   as many as the fullest lane needs
//   tile 1     …
//
// At 90 % sparsity 2.5 values are stored per kept weight, and one costs 0.6 of the cycles that a gather takes (bench/NOTES.md).
#pragma once

#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "pack/panel_matrix.h"

namespace sparse_engine {

enum class Precision : int { float32, bfloat16, int8 };
constexpr int kPrecisions = 3;
constexpr int64_t precision_bytes(Precision p) { return p == Precision::float32 ? 4 : p == Precision::bfloat16 ? 2 : 1; }

class LookupMatrix {
  public:
    static constexpr int kSlice = 16, kTile = 31, kGroup = 4;
    static constexpr uint32_t kZero = 31;  // the place in the table that holds zero

    // values: one per column of the pattern, in its order: float, bfloat16 as uint16_t, or int8_t. keep_positions: so that set_values
    // works.
    LookupMatrix(const CsrView& csr, const void* values, Precision precision, bool keep_positions);
    void set_values(const void* values);

    int64_t rows, cols, nnz;
    Precision precision;
    int64_t slices, tiles;
    std::vector<uint8_t> groups;                         // [slice][tile]
    std::vector<int64_t> begin;                          // [slice + 1]: its first group
    std::vector<uint32_t, SharedPages<uint32_t>> index;  // [group][lane]: four bytes, the columns within the tile
    std::vector<uint8_t, SharedPages<uint8_t>> values;   // [group][entry][lane]; bfloat16: [group][pair][lane][2]
    int64_t nbytes() const;
    int64_t stored() const { return static_cast<int64_t>(index.size()) * kGroup; }

  private:
    void put(size_t position, const void* values, int64_t i);
    std::vector<uint32_t> positions_;
};

class RowMatrix {
  public:
    static constexpr int64_t kPad = 64;  // columns: what the widest kernel takes at once
    // values: rows × cols, row-major: bfloat16 as uint16_t, or int8_t.
    RowMatrix(int64_t rows, int64_t cols, const void* values, Precision precision);

    int64_t rows, cols, pitch;  // pitch: stored columns of a row
    Precision precision;
    std::vector<uint8_t, SharedPages<uint8_t>> values;
    std::vector<int32_t> sums;  // int8: of each row
    int64_t nbytes() const { return static_cast<int64_t>(values.size() + sums.size() * 4); }
};

}  // namespace sparse_engine
