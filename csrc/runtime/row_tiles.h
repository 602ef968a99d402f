// Sparse convolutions with a stride of one by tiles of image rows.
#pragma once

#include <memory>
#include <vector>

#include "pack/row_tiles.h"
#include "runtime/linear_operator.h"
#include "runtime/plan.h"

namespace sparse_engine {

class RowTileNode : public Node {
  public:
    // Strides and dilations of one, more than one tap.
    static bool applies(const ConvGeometry& g);

    ConvGeometry geometry;
    std::shared_ptr<const RowTileMatrix> weight;
    std::shared_ptr<const std::vector<float>> bias;  // or null
    Ref x;
    int64_t stride_n = 0, stride_c = 0, stride_h = 0;
    Ref out;  // planes [channel][image][pixel]
    int64_t out_stride = 0;
    bool has_residual = false;
    Ref residual;
    int64_t residual_stride = 0;
    Epilogue epilogue;

    void run(Context& context) const override;
};

}  // namespace sparse_engine
