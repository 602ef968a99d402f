// Sparse convolutions with a stride of one by tiles of image rows.
#pragma once

#include <memory>
#include <vector>

#include "pack/row_tiles.h"
#include "runtime/linear_operator.h"
#include "runtime/plan.h"

namespace sparse_engine {

class RowTileNode : public ImageConvNode {
  public:
    // Strides and dilations of one, more than one tap.
    static bool applies(const ConvGeometry& g);

    std::shared_ptr<const RowTileMatrix> weight;

    void run(Context& context) const override;
};

}  // namespace sparse_engine
