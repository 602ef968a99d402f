#include "pack/panel_matrix.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

namespace sparse_engine {
namespace {

constexpr size_t kReadAhead = 16;  // kernels load groups of four indices and values: room behind the last one

PanelOptions checked(PanelOptions options, int64_t rows, int64_t cols) {
    if (options.panel != 1 && options.panel != 2 && options.panel != 4 && options.panel != 8)
        throw std::invalid_argument("panel must be 1, 2, 4 or 8, not " + std::to_string(options.panel));
    if (options.part < 1 || options.part > 256)
        throw std::invalid_argument("part must be 1 to 256 columns, not " + std::to_string(options.part));
    int64_t padded = (rows + options.panel - 1) / options.panel * options.panel;
    int64_t largest = int64_t(65535) * options.panel;
    int64_t block = options.row_block > 0 ? options.row_block : padded;
    block = std::min({(block + options.panel - 1) / options.panel * options.panel, std::max<int64_t>(padded, options.panel), largest});
    options.row_block = static_cast<int>(block);
    if (cols > INT32_MAX) throw std::invalid_argument("too many columns: " + std::to_string(cols));
    return options;
}

}  // namespace

void check_csr(const CsrView& csr) {
    if (csr.rows < 0 || csr.cols < 0) throw std::invalid_argument("negative matrix size");
    if (csr.row_ptr[0] != 0) throw std::invalid_argument("row_ptr must start at 0");
    // All of row_ptr first: once it is monotonic, no row reaches past the nnz columns that the caller has checked are there.
    for (int64_t row = 0; row < csr.rows; row++)
        if (csr.row_ptr[row + 1] < csr.row_ptr[row]) throw std::invalid_argument("row_ptr decreases at row " + std::to_string(row));
    for (int64_t row = 0; row < csr.rows; row++) {
        int64_t last = -1;
        for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; i++) {
            if (csr.col[i] <= last || csr.col[i] >= csr.cols)
                throw std::invalid_argument("row " + std::to_string(row) + ": column " + std::to_string(csr.col[i]) +
                                            " is out of order or not below " + std::to_string(csr.cols));
            last = csr.col[i];
        }
    }
}

struct PanelMatrix::Growing {
    std::vector<PanelRun> runs;
    std::vector<uint16_t> panel_rows;
    std::vector<uint8_t> index;
    std::vector<float> values;
};

void PanelMatrix::keep(const Growing& built) {
    runs.assign(built.runs.begin(), built.runs.end());
    panel_rows.assign(built.panel_rows.begin(), built.panel_rows.end());
    index.assign(built.index.begin(), built.index.end());
    values.assign(built.values.begin(), built.values.end());
}

PanelMatrix::PanelMatrix(const CsrView& csr, const float* csr_values, const PanelOptions& wanted)
    : rows(csr.rows), cols(csr.cols), nnz(csr.nnz()), options(checked(wanted, csr.rows, csr.cols)) {
    const int panel = options.panel;
    options.dense = false;
    parts = std::max<int>(1, static_cast<int>((cols + options.part - 1) / options.part));
    row_blocks = static_cast<int>((rows + options.row_block - 1) / options.row_block);
    if (nnz > UINT32_MAX / 8) throw std::invalid_argument("too many non-zeros: " + std::to_string(nnz));
    if (options.keep_positions) positions_.resize(nnz);
    segments.reserve(size_t(row_blocks) * parts);
    Growing built;
    auto& [runs, panel_rows, index, values] = built;  // in place of the members, which take exact copies in the end
    index.reserve(nnz + kReadAhead);
    values.reserve(nnz * panel + kReadAhead);

    std::vector<int64_t> cursor(csr.row_ptr, csr.row_ptr + rows), begin(rows), end(rows);
    std::vector<std::vector<uint8_t>> columns;  // per panel of the current segment, panel > 1 only
    std::vector<uint32_t> entries, order;
    for (int block = 0; block < row_blocks; block++) {
        int64_t row0 = int64_t(block) * options.row_block, row1 = std::min<int64_t>(rows, row0 + options.row_block);
        int64_t panels = (row1 - row0 + panel - 1) / panel;
        for (int part = 0; part < parts; part++) {
            int64_t col0 = int64_t(part) * options.part, col1 = std::min<int64_t>(cols, col0 + options.part);
            for (int64_t row = row0; row < row1; row++) {
                begin[row] = cursor[row];
                while (cursor[row] < csr.row_ptr[row + 1] && csr.col[cursor[row]] < col1) cursor[row]++;
                end[row] = cursor[row];
            }
            entries.assign(panels, 0);
            if (panel == 1) {
                for (int64_t p = 0; p < panels; p++) entries[p] = static_cast<uint32_t>(end[row0 + p] - begin[row0 + p]);
            } else {
                columns.assign(panels, {});
                for (int64_t p = 0; p < panels; p++) {
                    bool present[256] = {};
                    for (int64_t row = row0 + p * panel; row < std::min(row1, row0 + (p + 1) * panel); row++)
                        for (int64_t i = begin[row]; i < end[row]; i++) present[csr.col[i] - col0] = true;
                    for (int c = 0; c < col1 - col0; c++)
                        if (present[c]) columns[p].push_back(static_cast<uint8_t>(c));
                    entries[p] = static_cast<uint32_t>(columns[p].size());
                }
            }
            order.resize(panels);
            std::iota(order.begin(), order.end(), 0u);
            std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return entries[a] > entries[b]; });
            // Panels without entries matter only where rows are started (first part) or finished (last part).
            if (part != 0 && part != parts - 1)
                while (!order.empty() && entries[order.back()] == 0) order.pop_back();

            PanelSegment segment;
            segment.run_begin = static_cast<uint32_t>(runs.size());
            segment.row_begin = panel_rows.size();
            segment.index_begin = index.size();
            segment.value_begin = values.size();
            for (uint32_t p : order) {
                if (runs.size() == segment.run_begin || runs.back().entries != entries[p] || runs.back().panels == 65535)
                    runs.push_back({static_cast<uint16_t>(entries[p]), 0});
                runs.back().panels++;
                panel_rows.push_back(static_cast<uint16_t>(p));
                stored_ += int64_t(entries[p]) * panel;
                if (panel == 1) {
                    int64_t row = row0 + p;
                    for (int64_t i = begin[row]; i < end[row]; i++) {
                        if (options.keep_positions) positions_[i] = static_cast<uint32_t>(values.size());
                        index.push_back(static_cast<uint8_t>(csr.col[i] - col0));
                        values.push_back(csr_values ? csr_values[i] : 0.0f);
                    }
                    continue;
                }
                int slot[256];
                for (size_t e = 0; e < columns[p].size(); e++) {
                    slot[columns[p][e]] = static_cast<int>(e);
                    index.push_back(columns[p][e]);
                }
                size_t base = values.size();
                values.resize(base + columns[p].size() * panel, 0.0f);
                for (int64_t row = row0 + int64_t(p) * panel; row < std::min(row1, row0 + int64_t(p + 1) * panel); row++)
                    for (int64_t i = begin[row]; i < end[row]; i++) {
                        size_t position = base + size_t(slot[csr.col[i] - col0]) * panel + size_t(row - row0 - int64_t(p) * panel);
                        if (options.keep_positions) positions_[i] = static_cast<uint32_t>(position);
                        values[position] = csr_values ? csr_values[i] : 0.0f;
                    }
            }
            segment.run_end = static_cast<uint32_t>(runs.size());
            segments.push_back(segment);
        }
    }
    index.resize(index.size() + kReadAhead, 0);
    values.resize(values.size() + kReadAhead, 0.0f);
    keep(built);
}

PanelMatrix::PanelMatrix(int64_t rows_, int64_t cols_, const float* dense, const PanelOptions& wanted)
    : rows(rows_), cols(cols_), nnz(rows_ * cols_), options(checked(wanted, rows_, cols_)) {
    const int panel = options.panel;
    options.dense = true;
    options.keep_positions = false;
    parts = std::max<int>(1, static_cast<int>((cols + options.part - 1) / options.part));
    row_blocks = static_cast<int>((rows + options.row_block - 1) / options.row_block);
    Growing built;
    auto& [runs, panel_rows, index, values] = built;
    (void)index;
    values.reserve(size_t(row_blocks) * ((options.row_block + panel - 1) / panel * panel) * cols + kReadAhead);
    for (int block = 0; block < row_blocks; block++) {
        int64_t row0 = int64_t(block) * options.row_block, row1 = std::min<int64_t>(rows, row0 + options.row_block);
        int64_t panels = (row1 - row0 + panel - 1) / panel;
        for (int part = 0; part < parts; part++) {
            int64_t col0 = int64_t(part) * options.part, col1 = std::min<int64_t>(cols, col0 + options.part);
            PanelSegment segment;
            segment.run_begin = static_cast<uint32_t>(runs.size());
            segment.row_begin = panel_rows.size();
            segment.value_begin = values.size();
            for (int64_t p = 0; p < panels; p++) {
                if (p % 65535 == 0) runs.push_back({static_cast<uint16_t>(col1 - col0), 0});
                runs.back().panels++;
                panel_rows.push_back(static_cast<uint16_t>(p));
                for (int64_t col = col0; col < col1; col++)
                    for (int r = 0; r < panel; r++) {
                        int64_t row = row0 + p * panel + r;
                        values.push_back(row < row1 ? dense[row * cols + col] : 0.0f);
                    }
            }
            segment.run_end = static_cast<uint32_t>(runs.size());
            segments.push_back(segment);
        }
    }
    stored_ = static_cast<int64_t>(values.size());
    values.resize(values.size() + kReadAhead, 0.0f);
    keep(built);
}

void PanelMatrix::set_values(const float* csr_values) {
    if (positions_.size() != size_t(nnz)) throw std::logic_error("this matrix was packed without positions: its values are fixed");
    for (int64_t i = 0; i < nnz; i++) values[positions_[i]] = csr_values[i];
}

int64_t PanelMatrix::nbytes() const {
    return static_cast<int64_t>(segments.size() * sizeof(PanelSegment) + runs.size() * sizeof(PanelRun) + panel_rows.size() * 2 +
                                index.size() + values.size() * 4);
}

}  // namespace sparse_engine
