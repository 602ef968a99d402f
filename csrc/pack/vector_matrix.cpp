#include "pack/vector_matrix.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sparse_engine {

LookupMatrix::LookupMatrix(const CsrView& csr, const void* csr_values, Precision p, bool keep_positions)
    : rows(csr.rows), cols(csr.cols), nnz(csr.nnz()), precision(p) {
    slices = (rows + kSlice - 1) / kSlice, tiles = (cols + kTile - 1) / kTile;
    if (nnz > UINT32_MAX / 64) throw std::invalid_argument("too many non-zeros: " + std::to_string(nnz));
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
            int needed = (*std::max_element(lanes, lanes + kSlice) + kGroup - 1) / kGroup;
            groups[static_cast<size_t>(slice * tiles + tile)] = static_cast<uint8_t>(needed);
            total += needed;
        }
    }
    begin.push_back(total);
    index.assign(static_cast<size_t>(total) * kSlice, kZero * 0x01010101u);
    values.assign(static_cast<size_t>(total * kSlice * kGroup * precision_bytes(p)), 0);
    if (keep_positions) positions_.resize(static_cast<size_t>(nnz));

    std::vector<size_t> first(static_cast<size_t>(tiles));
    for (int64_t slice = 0; slice < slices; slice++) {
        size_t group = static_cast<size_t>(begin[static_cast<size_t>(slice)]);
        for (int64_t tile = 0; tile < tiles; tile++) {
            first[static_cast<size_t>(tile)] = group;
            group += groups[static_cast<size_t>(slice * tiles + tile)];
        }
        for (int64_t row = slice * kSlice; row < std::min(rows, (slice + 1) * kSlice); row++) {
            const size_t lane = static_cast<size_t>(row % kSlice);
            int64_t tile = -1;
            size_t entry = 0;
            for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; i++, entry++) {
                if (csr.col[i] / kTile != tile) tile = csr.col[i] / kTile, entry = 0;
                const size_t at = first[static_cast<size_t>(tile)] + entry / kGroup, place = entry % kGroup;
                uint32_t& word = index[at * kSlice + lane];
                word &= ~(255u << (8 * place));
                word |= static_cast<uint32_t>(csr.col[i] % kTile) << (8 * place);
                const size_t position = (at * kGroup + place) * kSlice + lane;
                if (keep_positions) positions_[static_cast<size_t>(i)] = static_cast<uint32_t>(position);
                if (csr_values) put(position, csr_values, i);
            }
        }
    }
}

void LookupMatrix::put(size_t position, const void* from, int64_t i) {
    if (precision == Precision::float32) {
        std::memcpy(values.data() + position * 4, static_cast<const float*>(from) + i, 4);
    } else if (precision == Precision::bfloat16) {
        // Two entries share a word per lane, so that a shift and a mask bring them out.
        const size_t group = position / (kSlice * kGroup), place = position / kSlice % kGroup, lane = position % kSlice;
        const size_t at = ((group * 2 + place / 2) * kSlice + lane) * 2 + place % 2;
        std::memcpy(values.data() + at * 2, static_cast<const uint16_t*>(from) + i, 2);
    } else {
        values[position] = static_cast<const uint8_t*>(from)[i];
    }
}

void LookupMatrix::set_values(const void* from) {
    if (positions_.size() != static_cast<size_t>(nnz))
        throw std::logic_error("this matrix was packed without positions: its values are fixed");
    for (int64_t i = 0; i < nnz; i++) put(positions_[static_cast<size_t>(i)], from, i);
}

int64_t LookupMatrix::nbytes() const { return static_cast<int64_t>(groups.size() + begin.size() * 8 + index.size() * 4 + values.size()); }

RowMatrix::RowMatrix(int64_t rows_, int64_t cols_, const void* from, Precision p)
    : rows(rows_), cols(cols_), pitch((cols_ + kPad - 1) / kPad * kPad), precision(p) {
    if (p == Precision::float32) throw std::invalid_argument("dense float32 weights have a layout of their own");
    const size_t size = static_cast<size_t>(precision_bytes(p));
    values.assign(static_cast<size_t>(rows * pitch) * size, 0);
    for (int64_t r = 0; r < rows; r++)
        std::memcpy(values.data() + static_cast<size_t>(r * pitch) * size,
                    static_cast<const uint8_t*>(from) + static_cast<size_t>(r * cols) * size, static_cast<size_t>(cols) * size);
    if (p != Precision::int8) return;
    for (int64_t r = 0; r < rows; r++) {
        const auto* row = static_cast<const int8_t*>(from) + r * cols;
        int32_t sum = 0;
        for (int64_t c = 0; c < cols; c++) sum += row[c];
        sums.push_back(sum);
    }
}

}  // namespace sparse_engine
