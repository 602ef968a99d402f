// A sparse weight in bfloat16 or int8 with a byte for each column: what multiplies one vector while the weight comes from memory.
//
// As in a LookupMatrix (pack/vector_matrix.h) sixteen rows are the lanes of a register (a slice), and x stands in registers as a table from
// which an instruction takes a column for each lane. Tables of bytes hold 255 columns and a zero instead of 31: the fullest of sixteen
// lanes then has 1.2 to 1.6 times the average where it has 2.5 times there (80 to 95 % sparsity), and less is read.
//
//              64 bytes of columns,  64 values        group: four entries of each lane
//   tile 0     …                                      as many as the fullest lane needs
//   tile 1     …
//
// One stream of groups, with the bytes in the order in which the kernels take them (see csrc/cpu/kernels_byte_lookup.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "pack/panel_matrix.h"
#include "pack/vector_matrix.h"

namespace sparse_engine {

class ByteLookup {
  public:
    static constexpr int kSlice = 16, kTile = 255, kGroup = 4;
    static constexpr int kZero = 255;  // the place in the table that holds zero

    // values: one per column of the pattern, in its order: bfloat16 as uint16_t, or int8_t.
    ByteLookup(const CsrView& csr, const void* values, Precision precision);

    int64_t rows, cols, nnz;
    Precision precision;
    int64_t slices, tiles;
    std::vector<uint8_t> groups;                         // [slice][tile]
    std::vector<int64_t> begin;                          // [slice + 1]: its first group
    std::vector<uint8_t, SharedPages<uint8_t>> entries;  // [group][group_bytes()]: columns, then values
    std::vector<int32_t> sums;                           // int8: of each row, and zeros up to whole slices
    bool plain = true;  // bfloat16: all values are finite, and none is so small that instructions on bfloat16 take it for zero

    static int64_t group_bytes(Precision p) { return kSlice * kGroup * (1 + precision_bytes(p)); }
    // Of entry `entry` of a lane within a group: the place of its column, and of its value counted in values.
    static int column_place(Precision p, int lane, int entry) {
        // bfloat16: two instructions put the bytes of x together, the first from the first eight of each sixteen bytes.
        return p == Precision::int8 ? 4 * lane + entry : 16 * (lane / 4) + 8 * (entry / 2) + 2 * (lane % 4) + entry % 2;
    }
    static int value_place(Precision p, int lane, int entry) {
        return p == Precision::int8 ? 4 * lane + entry : 32 * (entry / 2) + 2 * lane + entry % 2;
    }
    int64_t stored() const { return begin.back() * kSlice * kGroup; }
    int64_t nbytes() const { return static_cast<int64_t>(groups.size() + begin.size() * 8 + entries.size() + sums.size() * 4); }
};

}  // namespace sparse_engine
