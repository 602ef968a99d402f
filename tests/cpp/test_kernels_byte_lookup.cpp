// Products of a ByteLookup with a vector, in both precisions and by every kernel of the build in use, against double precision.
#include "check.h"
#include "cpu/kernels_byte_lookup.h"

using namespace sparse_engine;
using check::kPoison;
using check::Random;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Case {
    int64_t rows, cols;
    Precision precision;
    std::vector<int64_t> row_ptr{0};
    std::vector<int32_t> col;
    std::vector<uint8_t> bytes;
    std::vector<double> meant;

    Case(int64_t rows_, int64_t cols_, double density, Precision p) : rows(rows_), cols(cols_), precision(p) {
        Random random(static_cast<uint64_t>(rows * 1000 + cols));
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t c = 0; c < cols; c++)
                if (random.uniform() < (row % 6 == 4 ? 0.0 : density)) keep(c, random.between(-1, 1));
            row_ptr.push_back(static_cast<int64_t>(col.size()));
        }
    }
    void keep(int64_t c, float value) {
        col.push_back(static_cast<int32_t>(c));
        if (precision == Precision::int8) {
            const auto level = static_cast<int8_t>(std::lround(value * 127));
            bytes.push_back(static_cast<uint8_t>(level)), meant.push_back(level);
            return;
        }
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0xffff0000u;
        bytes.push_back(static_cast<uint8_t>(bits >> 16)), bytes.push_back(static_cast<uint8_t>(bits >> 24));
        float rounded;
        std::memcpy(&rounded, &bits, 4);
        meant.push_back(rounded);
    }
    CsrView csr() const { return {rows, cols, row_ptr.data(), col.data()}; }
    double sum(int64_t row, const std::vector<float>& x) const {
        double s = 0;
        for (int64_t i = row_ptr[static_cast<size_t>(row)]; i < row_ptr[static_cast<size_t>(row) + 1]; i++)
            s += meant[static_cast<size_t>(i)] * x[static_cast<size_t>(col[static_cast<size_t>(i)])];
        return s;
    }
    // Root of the sum of the terms' squares.
    double spread(int64_t row, const std::vector<float>& x) const {
        double s = 0;
        for (int64_t i = row_ptr[static_cast<size_t>(row)]; i < row_ptr[static_cast<size_t>(row) + 1]; i++) {
            const double term = meant[static_cast<size_t>(i)] * x[static_cast<size_t>(col[static_cast<size_t>(i)])];
            s += term * term;
        }
        return std::sqrt(s);
    }
};

// The product by `any` or by tables (false where x or the processor does not allow them).
bool multiply(const ByteLookup& w, const std::vector<float>& x, bool by_tables, const VectorArgs& to) {
    const ByteLookupKernels& k = byte_lookup_kernels();
    const int p = static_cast<int>(w.precision);
    std::vector<uint8_t> tables(static_cast<size_t>(w.tiles) * 256 * kMostPlanes + 64, 0xee);
    ByteLookupArgs a{};
    a.groups = w.groups.data(), a.entries = w.entries.data(), a.tiles = w.tiles, a.rows = w.rows, a.cols = w.cols, a.x = x.data();
    a.sums = w.sums.data(), a.to = to;
    if (!by_tables) {
        k.any[p](a);
        return true;
    }
    if (!k.tables[p]) return false;
    a.planes = k.make_tables[p](x.data(), w.cols, tables.data(), &a.plane_scale);
    for (size_t i = tables.size() - 64; i < tables.size(); i++) CHECK_EQUAL(static_cast<int>(tables[i]), 0xee);
    if (a.planes == 0) return false;
    a.tables = tables.data();
    k.tables[p](a);
    return true;
}

}  // namespace

TEST(products_in_both_precisions) {
    for (Precision p : {Precision::bfloat16, Precision::int8})
        for (int64_t rows : {1, 15, 16, 17, 40})
            for (int64_t cols : {0, 1, 16, 254, 255, 256, 510, 511, 40000})
                for (double density : {0.0, 0.1, 1.0})
                    for (bool epilogue : {false, true})
                        for (bool halves : {false, true}) {
                            if (cols == 40000 && (density == 0.1) == (rows == 40)) continue;  // one of the two is enough
                            Case c(rows, cols, density, p);
                            ByteLookup w(c.csr(), c.bytes.data(), p);
                            Random random(3);
                            std::vector<float> x = random.floats(static_cast<size_t>(cols)),
                                               scale = random.floats(static_cast<size_t>(rows), 0.5f, 2.0f);
                            if (halves)  // bfloat16 already: one number is enough
                                for (float& v : x) v = std::round(v * 128) / 128;
                            std::vector<float> bias = random.floats(static_cast<size_t>(rows)),
                                               residual = random.floats(static_cast<size_t>(rows));
                            for (bool by_tables : {false, true}) {
                                std::vector<float> out(static_cast<size_t>(rows) + 5, kPoison);
                                VectorArgs to{};
                                to.out = out.data(), to.low = -kInfinity, to.high = kInfinity;
                                if (epilogue)
                                    to.scale = scale.data(), to.bias = bias.data(), to.residual = residual.data(), to.low = -0.5f,
                                    to.high = 3.0f;
                                if (!multiply(w, x, by_tables, to)) continue;
                                std::vector<double> expected;
                                for (int64_t r = 0; r < rows; r++) {
                                    const auto i = static_cast<size_t>(r);
                                    const double factor = epilogue ? scale[i] : 1.0;
                                    double sum = c.sum(r, x) * factor;
                                    if (epilogue) sum += bias[i] + residual[i];
                                    expected.push_back(std::fmin(std::fmax(sum, to.low), to.high));
                                    // Each term is off by 2^-17 of itself at most, in either direction.
                                    const double error = std::fabs(out[i] - expected[i]), bound = 2e-5 * factor * c.spread(r, x) + 1e-6;
                                    if (!(error <= bound))
                                        check::fail(__FILE__, __LINE__,
                                                    std::to_string(rows) + "x" + std::to_string(cols) + (by_tables ? " by tables" : "") +
                                                        ": error " + std::to_string(error) + ", bound " + std::to_string(bound));
                                }
                                for (size_t i = expected.size(); i < out.size(); i++) CHECK(std::isnan(out[i]));
                            }
                        }
}

TEST(infinities_stay_out_of_rows_that_lack_their_column) {
    for (Precision p : {Precision::bfloat16, Precision::int8}) {
        Case c(0, 300, 0.0, p);
        c.rows = 2;
        c.keep(1, 1.0f), c.row_ptr.push_back(1);
        c.keep(0, 1.0f), c.row_ptr.push_back(2);
        ByteLookup w(c.csr(), c.bytes.data(), p);
        std::vector<float> x(300, kPoison), out(2, kPoison);
        x[0] = kInfinity, x[1] = 5;
        VectorArgs to{};
        to.out = out.data(), to.low = -kInfinity, to.high = kInfinity;
        CHECK(!multiply(w, x, true, to));
        CHECK(multiply(w, x, false, to));
        CHECK_EQUAL(out[0], static_cast<float>(5 * c.meant[0]));
        CHECK_EQUAL(out[1], kInfinity);
    }
}

TEST(values_that_instructions_on_bfloat16_take_for_others_are_seen) {
    for (uint16_t odd : {uint16_t{0x7f80}, uint16_t{0xffc0}, uint16_t{0x0001}}) {
        const std::vector<int64_t> row_ptr = {0, 2};
        const std::vector<int32_t> col = {0, 3};
        const std::vector<uint16_t> plain = {0x3f80, 0x8000}, special = {0x3f80, odd};
        CHECK(ByteLookup({1, 4, row_ptr.data(), col.data()}, plain.data(), Precision::bfloat16).plain);
        CHECK(!ByteLookup({1, 4, row_ptr.data(), col.data()}, special.data(), Precision::bfloat16).plain);
    }
}
