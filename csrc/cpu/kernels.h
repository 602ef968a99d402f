// The kernels' interface: plain arguments and one table of functions per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pack/panel_matrix.h"
#include "pack/vector_matrix.h"

namespace sparse_engine {

enum class Activation : int {
    none,
    clamp,
    leaky_relu,
    gelu,
    gelu_tanh,
    silu,
    hardswish,
    hardsigmoid,
    sigmoid,
    tanh,
    elu,
    softplus,
    exp,
    sqrt,
    rsqrt,
    neg,
    abs,
    reciprocal,
    square,
    log,
    erf,
    count
};
enum class Binary : int { add, sub, mul, div, maximum, minimum, pow, count };

// One segment of a panel matrix times one tile of X: out[row, 0:V·lanes) (+)= sum over the segment's entries of w · x[column, 0:V·lanes).
struct SpmmArgs {
    const PanelRun* runs;
    const PanelRun* runs_end;
    const uint16_t* panel_rows;
    const uint8_t* index;
    const float* values;
    const float* x;         // first column of the part, first pixel of the tile
    size_t x_stride;        // floats from one column to the next
    float* out;             // first row of the row block, first pixel of the tile
    size_t out_stride;      // floats from one row to the next
    int rows;               // rows of the block that exist (the last panel may reach past them)
    bool first, last;       // first part: start from bias + residual; last part: clamp
    const float* bias;      // of the row block, or null
    const float* residual;  // like out, or null
    size_t residual_stride;
    float low, high;
};
using SpmmKernel = void (*)(const SpmmArgs&);

// Copies columns [col0, col1) of the virtual matrix X (channel × tap) for pixels [p0, p0 + vectors·lanes) into a contiguous tile.
struct Im2colArgs {
    const float* x;  // plane of channel 0, pixel 0
    size_t channel_stride;
    int taps;
    const int64_t* tap_offset;  // floats, may be negative
    const uint16_t* tap_mask;   // [tap][mask_stride]: valid lanes of each group of 16 pixels
    size_t mask_stride;
    const int32_t*
        gather;  // or null: [tap][gather_stride] source pixel within the channel, −1 = zero (then tap_offset, tap_mask are unused)
    size_t gather_stride;
    // Taps 3r, 3r + 1 and 3r + 2 read the pixel before, at and after the same place, and what an outer tap reads where it is valid, the
    // middle one of the neighbouring pixel reads too.
    bool rows_of_three;
    int64_t channel0;  // channel and tap of the first column
    int tap0;
    int columns;
    int64_t pixel0;
    int vectors;
    float* tile;  // [columns][vectors · lanes]
};

// One segment of a RowTileMatrix times one tile of X.
struct RowTileArgs {
    const PanelRun* runs;
    const PanelRun* runs_end;
    const uint16_t* panel_rows;
    const uint16_t* offsets;
    const float* values;
    const float* x;
    float* out;  // first row of the weight, first row and column of the tile
    size_t out_stride;
    int64_t row_stride;  // floats from one row of the image to the next
    uint32_t bits;       // where a tile ends with its image's row: the columns that exist
    // Tiles of eight columns of twice as many rows: those behind the lower halves come first, those behind the upper ones `height` rows
    // further down, of which `second` exist.
    int64_t height;
    int second;
    bool first, last;
    const float* bias;
    const float* residual;  // like out, or null
    size_t residual_stride;
    float low, high;
};
using RowTileKernel = void (*)(const RowTileArgs&);

struct RowTileFillArgs {
    const float* x;  // plane of the part's first channel
    int64_t channel_stride, channels;
    int64_t height, width, row_stride;  // of the image
    int64_t y0, x0;                     // what the tile's first row and column read for the first tap; may lie outside
    int64_t rows, pitch;                // of the tile: to be filled, and in all
    int64_t kernel_w;
    int64_t second;  // rows from the lower halves to the upper ones; 0: vectors are not halved
    float* tile;
};

struct DepthwiseArgs {
    const float* x;       // plane of one channel
    const float* weight;  // taps
    int taps;
    const int64_t* tap_offset;
    const uint16_t* tap_mask;
    size_t mask_stride;
    int64_t pixel0, pixels;
    float bias, low, high;
    const float* residual;  // like out, or null
    float* out;
    // Or null: 3×3, the taps of a row next to each other, and a plane before and one after this one. For each group of 16 pixels, whether
    // all of its pixels have a row above and one below: masks then differ by column only.
    const uint8_t* inner;
};

// One row of cross entropy and distillation; see sparse_engine/ops/kd_loss.py for the formulas.
struct KDRowArgs {
    const float* logits;
    const float* teacher;        // logits, or probabilities where soft_targets; or null
    const float* class_weights;  // or null: all ones
    double class_weight_sum;     // of class_weights
    float* gradient;             // or null
    float* probabilities;        // or null: where softmax(logits) goes, at temperature 1 only; may be the teacher's row
    float* scratch;              // kd_scratch_floats(classes), where there is a gradient or probabilities
    int64_t classes;
    int64_t label;
    bool hard, soft_targets, kl;
    bool streamed;  // whether the gradient is written past the cache
    double temperature, label_smoothing;
    float hard_scale, soft_scale;
    float hard_loss, soft_loss;  // out
};
constexpr size_t kd_scratch_floats(int64_t classes) { return static_cast<size_t>(3 * (classes + 16) + 2 * (classes / 1024 + 1)); }

// What becomes of the sums of a product with one vector: out[row] = clamp(scale[row] · sum + bias[row] + residual[row]).
struct VectorArgs {
    float* out;
    const float* scale;     // or null: 1
    const float* bias;      // or null
    const float* residual;  // or null
    float low, high;
};

// Slices of a LookupMatrix; all pointers (those of `to` too) are those of the first slice.
struct LookupArgs {
    const uint8_t* groups;
    const uint32_t* index;
    const uint8_t* values;
    int64_t rows;  // that exist, the last slice may have fewer than sixteen
    int64_t cols;
    const float* x;
    VectorArgs to;
};

// Rows [row0, row1) of a RowMatrix.
struct RowsArgs {
    const void* w;
    int64_t pitch;  // columns of a row as stored: x, as prepared for the kernel, is padded with zeros to as many
    int64_t row0, row1;
    const float* x;         // rows_bf16: in pair order; rows_int8: as it is
    const uint8_t* planes;  // rows_int8_of_bytes: [3][pitch]
    double plane_scale;
    const int32_t* sums;  // of each row of an int8 matrix
    VectorArgs to;
};

// One channel and phase of some rows of an image: see kernels_winograd.cpp.
struct WinogradInputArgs {
    const float* quarter[4];  // every fourth pixel of each row, from the first, second, third and fourth on
    int64_t pitch;            // floats from one row to the next; tiles + 2 are read, and up to a vector more
    int64_t rows, tiles;
    int64_t classes, class_stride;  // row r goes to class r % classes, there to row r / classes
    int64_t point_stride;
    bool spare;  // a phase of three taps among others of four: one point is left out
    float* to;
};
constexpr int kWinogradSpare = 4;  // that point: −2

// `rows` rows of outputs (at most winograd_rows) for the columns (row of the image, tile) from column0 on, some vectors of them.
struct WinogradPanelArgs {
    const float* weights;  // [point][entry][winograd_rows]
    const float* planes;   // transformed input of the first point
    int64_t point_stride;
    const int64_t* offset;  // of each entry's plane, for column 0
    int64_t entries;
    int64_t fewer;             // of them at kWinogradSpare, with four taps
    int64_t column0, columns;  // of `columns` in all: results past them are not stored
    int64_t tiles, out_width;
    int rows;
    const float* bias;      // or null
    const float* residual;  // like out, or null
    size_t residual_stride;
    float* out;  // first row, column 0
    size_t out_stride;
    float low, high;
};

constexpr int kMaxVectors = 8;

struct KernelTable {
    const char* name;
    int lanes;
    SpmmKernel sparse[4][kMaxVectors + 1];  // [log2 panel][vectors], null where the registers don't hold it
    SpmmKernel dense[4][kMaxVectors + 1];
    SpmmKernel sparse_half[kMaxVectors];  // panel 1: so many vectors and half a vector more; null where vectors have no halves
    int max_vectors[4];
    RowTileKernel row_tile[3][kMaxVectors + 1];  // [vectors of one row, the end of one, halves of two (or null)][rows]
    void (*row_tile_fill)(const RowTileFillArgs&);
    int winograd_rows, winograd_vectors;                        // of a panel, at most
    void (*winograd_input[2])(const WinogradInputArgs&);        // for filters of three and of four taps
    void (*winograd_panel[2][6])(const WinogradPanelArgs&);     // the same, by vectors − 1
    bool (*all_below)(const float* x, int64_t n, float bound);  // |x[i]| < bound for all i; false where there is a NaN
    void (*im2col)(const Im2colArgs&);
    void (*depthwise)(const DepthwiseArgs&);
    // tile[k][i] = x[i · ld + k] for i < n (zero up to `width`), k < columns: row-major activations into a tile of pixels along the vector.
    void (*transpose_in)(const float* x, size_t ld, int n, int columns, float* tile, int width);
    // y[i · ld + m] = tile[m][i]
    void (*transpose_out)(const float* tile, int width, int rows, int n, float* y, size_t ld);
    // out[entry] (+)= dot(dy[row], x[column]) over `width` (a multiple of lanes) for each entry of CSR rows [row0, row1), columns in [col0,
    // col1); cursor[row] walks through col/out.
    void (*sddmm)(int64_t row0, int64_t row1, const int64_t* row_end, int64_t* cursor, const int32_t* col, int32_t col0, int32_t col1,
                  const float* dy, size_t dy_stride, const float* x, size_t x_stride, int width, float* out);
    // out[r] = act(bias[r] + sum w · x[col] + residual[r]) for rows [row0, row1), CSR with 32-bit columns.
    void (*spmv)(const int64_t* row_ptr, const int32_t* col, const float* w, int64_t row0, int64_t row1, const float* x, float* out,
                 const float* bias, const float* residual, float low, float high);
    // The same with columns of 16 bits: a quarter less to read.
    void (*spmv16)(const int64_t* row_ptr, const uint16_t* col, const float* w, int64_t row0, int64_t row1, const float* x, float* out,
                   const float* bias, const float* residual, float low, float high);
    void (*gemv)(const float* w, int64_t cols, int64_t row0, int64_t row1, const float* x, float* out, const float* bias,
                 const float* residual, float low, float high);
    void (*lookup[kPrecisions])(const LookupArgs&);
    void (*rows_bf16)(const RowsArgs&);
    void (*rows_int8)(const RowsArgs&);
    // Integer arithmetic on x as bytes; null where the processor has no instruction for it. |x| · scale must stay below 2^23.
    void (*rows_int8_of_bytes)(const RowsArgs&);
    void (*pair_order)(const float* x, int64_t n, int64_t padded, float* to);
    void (*byte_planes)(const float* x, int64_t n, int64_t padded, float scale, uint8_t* to);
    void (*activate)(Activation kind, float p0, float p1, const float* x, float* y, int64_t n);
    // y[i] = op(a[i · a_step], b[i · b_step]); steps 0 or 1.
    void (*binary)(Binary kind, const float* a, int a_step, const float* b, int b_step, float* y, int64_t n);
    // y[i] = x[i] · scale + shift
    void (*scale_shift)(const float* x, float scale, float shift, float* y, int64_t n);
    void (*kd_row)(KDRowArgs&);
    // Fused multiply-adds on registers only: runs `steps` rounds, returns how many operations that were; result is only there to be used.
    int64_t (*fma_chains)(int64_t steps, float factor, float shift, float* result);
    float (*reduce_sum)(const float* x, int64_t n);
    // y[r] = sum of x[r · stride + i] over i < n
    void (*sum_rows)(const float* x, int64_t stride, int64_t rows, int64_t n, float* y);
    float (*reduce_max)(const float* x, int64_t n);
    // Along the strided axis, vectorised over `width` neighbouring columns: y = softmax_k x[k · stride + i].
    void (*softmax_columns)(const float* x, size_t x_stride, int64_t length, float* y, size_t y_stride, int64_t width);
    void (*softmax_row)(const float* x, int64_t length, float* y);
    // y[k, i] = (x[k, i] − mean_i) / sqrt(var_i + eps) · weight[k] + bias[k]
    void (*layer_norm_columns)(const float* x, size_t x_stride, int64_t length, const float* weight, const float* bias, float eps, float* y,
                               size_t y_stride, int64_t width);
    void (*layer_norm_row)(const float* x, int64_t length, const float* weight, const float* bias, float eps, float* y);
    // y[i] = x[i · step]
    void (*copy)(const float* x, int64_t step, float* y, int64_t n);
    // y[r · y_stride + i] = x[r · x_stride + i] for r < rows, i < n
    void (*copy_rows)(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows, int64_t n);
    // The same for rows that follow each other in y, which nobody reads soon: past the cache where there are instructions for that.
    void (*stream_rows)(const float* x, int64_t x_stride, float* y, int64_t rows, int64_t n);
    // even[r · out_ld + i] = x[r · ld + 2i] for i < even_n and, unless odd is null, odd[r · out_ld + i] = x[r · ld + 2i + 1] for i < odd_n.
    void (*split)(const float* x, int64_t ld, int64_t rows, int64_t even_n, int64_t odd_n, float* even, float* odd, int64_t out_ld);
    void (*add_into)(const float* x, int64_t step, float* y, int64_t n);  // y[i] += x[i · step]
    // Pooling, first down the rows and then along them: y[i] = max or sum of x[r · ld + i] over r < rows, and of x[i · step + s · dilation]
    // over s < taps. The latter may read two vectors past the last tap.
    void (*max_rows)(const float* x, int64_t ld, int rows, float* y, int64_t n);
    void (*add_rows)(const float* x, int64_t ld, int rows, float* y, int64_t n);
    void (*max_taps)(const float* x, int taps, int64_t dilation, int64_t step, float* y, int64_t n);
    void (*add_taps)(const float* x, int taps, int64_t dilation, int64_t step, float* y, int64_t n);
};

// The table of the build in use (see active_isa()).
const KernelTable& kernels();
const KernelTable& kernels_for(int isa);  // 0 portable, 1 avx2, 2 avx512; throws where this processor can't run it

}  // namespace sparse_engine
