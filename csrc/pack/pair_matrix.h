// A sparse matrix in bfloat16 for kernels that take a row's entries two at a time: a PanelMatrix of single rows whose values are halves.
#pragma once

#include <cstdint>

#include "pack/panel_matrix.h"

namespace sparse_engine {

class PairMatrix {
  public:
    // part, row_block: as in PanelOptions. Values are rounded to nearest.
    PairMatrix(const CsrView& csr, const float* values, int part, int row_block);

    int64_t nbytes() const { return panels.nbytes() + static_cast<int64_t>(values.size() * sizeof(uint16_t)); }

    PanelMatrix panels;  // without its values
    PanelMatrix::Packed<uint16_t> values;
};

}  // namespace sparse_engine
