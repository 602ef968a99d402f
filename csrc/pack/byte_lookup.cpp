#include "pack/byte_lookup.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace sparse_engine {

ByteLookup::ByteLookup(const CsrView& csr, const void* csr_values, Precision p)
    : rows(csr.rows), cols(csr.cols), nnz(csr.nnz()), precision(p) {
    if (p == Precision::float32) throw std::invalid_argument("float32 weights have layouts of their own");
    slices = (rows + kSlice - 1) / kSlice, tiles = (cols + kTile - 1) / kTile;
    groups.assign(static_cast<size_t>(slices * tiles), 0);
    // How many groups each tile needs: the fullest lane decides.
    int64_t total = 0;
    std::vector<int> filled(static_cast<size_t>(tiles) * kSlice);
    for (int64_t slice = 0; slice < slices; slice++) {
        begin.push_back(total);
        std::fill(filled.begin(), filled.end(), 0);
        for (int64_t row = slice * kSlice; row < std::min(rows, (slice + 1) * kSlice); row++)
            for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; i++)
                filled[static_cast<size_t>(csr.col[i] / kTile * kSlice + row % kSlice)]++;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int* lanes = filled.data() + tile * kSlice;
            const int needed = (*std::max_element(lanes, lanes + kSlice) + kGroup - 1) / kGroup;
            groups[static_cast<size_t>(slice * tiles + tile)] = static_cast<uint8_t>(needed);
            total += needed;
        }
    }
    begin.push_back(total);

    const int64_t step = group_bytes(p), size = precision_bytes(p);
    constexpr int kColumns = kSlice * kGroup;
    entries.assign(static_cast<size_t>(total * step), 0);
    for (int64_t group = 0; group < total; group++) std::memset(entries.data() + group * step, kZero, kColumns);
    const auto* from = static_cast<const uint8_t*>(csr_values);
    std::vector<int64_t> first(static_cast<size_t>(tiles));
    for (int64_t slice = 0; slice < slices; slice++) {
        int64_t group = begin[static_cast<size_t>(slice)];
        for (int64_t tile = 0; tile < tiles; tile++) {
            first[static_cast<size_t>(tile)] = group;
            group += groups[static_cast<size_t>(slice * tiles + tile)];
        }
        for (int64_t row = slice * kSlice; row < std::min(rows, (slice + 1) * kSlice); row++) {
            const int lane = static_cast<int>(row % kSlice);
            int64_t tile = -1, entry = 0;
            for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; i++, entry++) {
                if (csr.col[i] / kTile != tile) tile = csr.col[i] / kTile, entry = 0;
                uint8_t* at = entries.data() + (first[static_cast<size_t>(tile)] + entry / kGroup) * step;
                const int place = static_cast<int>(entry % kGroup);
                at[column_place(p, lane, place)] = static_cast<uint8_t>(csr.col[i] % kTile);
                std::memcpy(at + kColumns + value_place(p, lane, place) * size, from + i * size, static_cast<size_t>(size));
            }
        }
    }
    if (p == Precision::bfloat16) {
        for (int64_t i = 0; i < nnz; i++) {
            const int bits = static_cast<const uint16_t*>(csr_values)[i] & 0x7fff, exponent = bits >> 7;
            plain = plain && exponent != 255 && (exponent > 0 || bits == 0);
        }
        return;
    }
    sums.assign(static_cast<size_t>(slices * kSlice), 0);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; i++)
            sums[static_cast<size_t>(row)] += static_cast<const int8_t*>(csr_values)[i];
}

}  // namespace sparse_engine
