// The layout that the CPU kernels read: a sparse matrix cut into row blocks and column parts, rows jammed in panels.
//
//            columns →   part 0 (≤ 256)   part 1        …
//   row block 0          segment (0,0)    segment (0,1)
//   row block 1          segment (1,0)    …
//
// A panel is `panel` consecutive rows that share their columns (1 for unstructured weights, 4 for 4×1 blocks, 8 for dense). In each
// segment the panels are sorted by their number of entries, so that the kernel runs many panels with one trip count (a mispredicted
// loop exit costs as much as a dozen entries). Per entry: one byte (column within the part) and `panel` values, i.e. 5 bytes per
// non-zero of an unstructured fp32 weight. A dense matrix keeps no column bytes at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/memory.h"

namespace sparse_engine {

struct CsrView {
    int64_t rows = 0, cols = 0;
    const int64_t* row_ptr = nullptr;
    const int32_t* col = nullptr;
    int64_t nnz() const { return row_ptr ? row_ptr[rows] : 0; }
};

// Throws std::invalid_argument unless row_ptr is monotonic from 0 and columns are in range and strictly increasing within each row.
void check_csr(const CsrView& csr);

struct PanelOptions {
    int panel = 1;               // rows per panel: 1, 2, 4 or 8
    int part = 256;              // columns per part, at most 256
    int row_block = 0;           // rows per row block, a multiple of the panel; 0 = all rows
    bool dense = false;          // every column of every row present, no column bytes
    bool keep_positions = true;  // remember where each CSR value went, so that set_values works
};

struct PanelSegment {
    uint32_t run_begin = 0, run_end = 0;  // into runs
    size_t row_begin = 0;                 // into panel_rows
    size_t index_begin = 0;               // into index
    size_t value_begin = 0;               // into values
};

struct PanelRun {
    uint16_t entries;  // columns per panel, the same for the whole run
    uint16_t panels;
};

class PanelMatrix {
  public:
    template <class T>
    using Packed = std::vector<T, SharedPages<T>>;

    PanelMatrix() = default;
    PanelMatrix(const CsrView& csr, const float* values, const PanelOptions& options);
    // values: row-major rows × cols, dense.
    PanelMatrix(int64_t rows, int64_t cols, const float* values, const PanelOptions& options);

    void set_values(const float* csr_values);  // CSR order of the constructor; needs keep_positions

    int64_t rows = 0, cols = 0, nnz = 0;
    PanelOptions options;
    int row_blocks = 0, parts = 0;
    std::vector<PanelSegment> segments;  // [row block][part]
    Packed<PanelRun> runs;
    Packed<uint16_t> panel_rows;  // first row of each panel, relative to its row block, in units of panels
    Packed<uint8_t> index;
    Packed<float> values;

    const PanelSegment& segment(int row_block, int part) const { return segments[size_t(row_block) * parts + part]; }
    int64_t block_rows() const { return options.row_block; }
    int64_t nbytes() const;
    // Entries that the kernels multiply, padding of partly filled panels included.
    int64_t stored() const { return stored_; }

  private:
    struct Growing;  // the arrays while they grow
    void keep(const Growing& built);
    std::vector<uint32_t> positions_;
    int64_t stored_ = 0;
};

}  // namespace sparse_engine
