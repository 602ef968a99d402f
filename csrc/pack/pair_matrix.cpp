#include "pack/pair_matrix.h"

#include "core/bfloat16.h"

namespace sparse_engine {

PairMatrix::PairMatrix(const CsrView& csr, const float* from, int part, int row_block)
    : panels(csr, from, PanelOptions{1, part, row_block, false, false}) {
    values.resize(panels.values.size());
    for (size_t i = 0; i < values.size(); i++) values[i] = to_bfloat16(panels.values[i]);
    panels.values = {};
}

}  // namespace sparse_engine
