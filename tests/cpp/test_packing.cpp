#include "check.h"
#include "pack/panel_matrix.h"

using namespace sparse_engine;

namespace {

struct Csr {
    int64_t rows, cols;
    std::vector<int64_t> row_ptr;
    std::vector<int32_t> col;
    std::vector<float> values;
    CsrView view() const { return {rows, cols, row_ptr.data(), col.data()}; }
};

Csr random_csr(int64_t rows, int64_t cols, double density, uint64_t seed) {
    check::Random random(seed);
    Csr csr{rows, cols, {0}, {}, {}};
    for (int64_t row = 0; row < rows; row++) {
        double wanted = row % 5 == 3 ? 0.0 : density;  // some rows are empty
        for (int64_t col = 0; col < cols; col++) {
            if (random.uniform() >= wanted) continue;
            csr.col.push_back(static_cast<int32_t>(col));
            csr.values.push_back(random.between(0.5f, 1.5f));
        }
        csr.row_ptr.push_back(static_cast<int64_t>(csr.col.size()));
    }
    return csr;
}

std::vector<float> dense_of(const Csr& csr) {
    std::vector<float> dense(static_cast<size_t>(csr.rows * csr.cols), 0.0f);
    for (int64_t row = 0; row < csr.rows; row++)
        for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; i++)
            dense[static_cast<size_t>(row * csr.cols + csr.col[i])] = csr.values[i];
    return dense;
}

// Reads a packed matrix back the way a kernel does: runs of panels, an index byte and `panel` values per entry.
std::vector<float> unpack(const PanelMatrix& m) {
    std::vector<float> dense(static_cast<size_t>(m.rows * m.cols), 0.0f);
    const int panel = m.options.panel;
    for (int block = 0; block < m.row_blocks; block++) {
        for (int part = 0; part < m.parts; part++) {
            const PanelSegment& segment = m.segment(block, part);
            size_t row_at = segment.row_begin, index_at = segment.index_begin, value_at = segment.value_begin;
            for (uint32_t r = segment.run_begin; r < segment.run_end; r++) {
                for (int p = 0; p < m.runs[r].panels; p++) {
                    int64_t row0 = block * m.block_rows() + int64_t(m.panel_rows[row_at++]) * panel;
                    for (int e = 0; e < m.runs[r].entries; e++) {
                        int64_t col = int64_t(part) * m.options.part + (m.options.dense ? e : m.index[index_at++]);
                        CHECK(col < m.cols);
                        for (int i = 0; i < panel; i++, value_at++)
                            if (row0 + i < m.rows && m.values[value_at] != 0.0f)
                                dense[static_cast<size_t>((row0 + i) * m.cols + col)] = m.values[value_at];
                    }
                }
            }
        }
    }
    return dense;
}

}  // namespace

TEST(packing_loses_nothing) {
    uint64_t seed = 1;
    for (int panel : {1, 2, 4, 8})
        for (int64_t rows : {1, 3, 7, 16, 37})
            for (int64_t cols : {1, 5, 256, 257, 600})
                for (int row_block : {0, 8, 16})
                    for (double density : {0.0, 0.1, 1.0}) {
                        Csr csr = random_csr(rows, cols, density, seed++);
                        PanelMatrix packed(csr.view(), csr.values.data(), {.panel = panel, .row_block = row_block});
                        CHECK_EQUAL(packed.nnz, csr.row_ptr.back());
                        CHECK(unpack(packed) == dense_of(csr));
                        CHECK(packed.stored() >= packed.nnz);
                        if (panel == 1) CHECK_EQUAL(packed.stored(), packed.nnz);
                    }
}

TEST(dense_packing_loses_nothing) {
    for (int panel : {1, 2, 4, 8})
        for (int64_t rows : {1, 5, 16, 33})
            for (int64_t cols : {1, 100, 256, 300}) {
                std::vector<float> dense =
                    check::Random(static_cast<uint64_t>(rows * cols)).floats(static_cast<size_t>(rows * cols), 0.5f, 1.5f);
                PanelMatrix packed(rows, cols, dense.data(), PanelOptions{.panel = panel});
                CHECK(packed.options.dense);
                CHECK(packed.index.empty());
                CHECK(unpack(packed) == dense);
            }
}

TEST(values_can_be_replaced_over_the_same_pattern) {
    for (int panel : {1, 4}) {
        Csr csr = random_csr(20, 300, 0.1, 77);
        PanelMatrix packed(csr.view(), nullptr, {.panel = panel});
        for (float& value : csr.values) value = -2 * value;
        packed.set_values(csr.values.data());
        CHECK(unpack(packed) == dense_of(csr));
        PanelMatrix fixed(csr.view(), csr.values.data(), {.panel = panel, .keep_positions = false});
        if (fixed.nnz > 0) CHECK_THROWS(fixed.set_values(csr.values.data()), std::logic_error, "positions");
    }
}

TEST(runs_are_sorted_by_length) {
    Csr csr = random_csr(64, 256, 0.1, 5);
    PanelMatrix packed(csr.view(), csr.values.data(), {});
    for (size_t r = 1; r < packed.runs.size(); r++) CHECK(packed.runs[r].entries < packed.runs[r - 1].entries);
}

TEST(bytes_are_five_per_entry_and_a_little) {
    Csr csr = random_csr(512, 512, 0.1, 6);
    PanelMatrix packed(csr.view(), csr.values.data(), {});
    CHECK(packed.nbytes() >= 5 * packed.nnz);
    CHECK(packed.nbytes() <= 5 * packed.nnz + 512 * 2 * packed.parts + 8192);
}

TEST(bad_patterns_are_refused) {
    std::vector<int32_t> good{0, 2, 1}, unsorted{2, 0, 1}, twice{0, 0, 1}, beyond{0, 3, 1}, negative{-1, 2, 1};
    std::vector<int64_t> rows{0, 2, 3}, decreasing{0, 3, 2}, late{1, 2, 3};
    check_csr({2, 3, rows.data(), good.data()});
    CHECK_THROWS(check_csr({2, 3, rows.data(), unsorted.data()}), std::invalid_argument, "out of order");
    CHECK_THROWS(check_csr({2, 3, rows.data(), twice.data()}), std::invalid_argument, "out of order");
    CHECK_THROWS(check_csr({2, 3, rows.data(), beyond.data()}), std::invalid_argument, "not below 3");
    CHECK_THROWS(check_csr({2, 3, rows.data(), negative.data()}), std::invalid_argument, "-1");
    CHECK_THROWS(check_csr({2, 3, decreasing.data(), good.data()}), std::invalid_argument, "decreases at row 1");
    CHECK_THROWS(check_csr({2, 3, late.data(), good.data()}), std::invalid_argument, "start at 0");
    CHECK_THROWS(PanelMatrix(CsrView{2, 3, rows.data(), good.data()}, nullptr, {.panel = 3}), std::invalid_argument, "1, 2, 4 or 8");
    CHECK_THROWS(PanelMatrix(CsrView{2, 3, rows.data(), good.data()}, nullptr, {.part = 257}), std::invalid_argument, "257");
}
