#include "runtime/layers.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "core/cpu_features.h"
#include "runtime/tensor_ops.h"
#include "runtime/vector_product.h"

namespace sparse_engine {
namespace {

// A handful of shapes at a time is what training and serving use; more would only hold memory.
constexpr size_t kPlansKept = 16;

// Up to so many rows of x each is multiplied by itself; from there on tiles of sixteen are faster (bench/NOTES.md).
constexpr int64_t kFewVectors = 3;

template <class Map>
void make_room(Map& plans) {
    if (plans.size() >= kPlansKept) plans.erase(plans.begin());
}

int64_t align16(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace

SparseOperator::SparseOperator(std::vector<int64_t> row_ptr, std::vector<int32_t> col, int64_t rows_, int64_t cols_)
    : rows(rows_),
      cols(cols_),
      transposed_rows(cols_),
      transposed_cols(rows_),
      row_ptr_(std::make_shared<std::vector<int64_t>>(std::move(row_ptr))),
      col_(std::make_shared<std::vector<int32_t>>(std::move(col))) {
    if (static_cast<int64_t>(row_ptr_->size()) != rows + 1) throw std::invalid_argument("row_ptr must have rows + 1 entries");
    for (int64_t r = 0; r < rows; r++)
        if ((*row_ptr_)[r + 1] < (*row_ptr_)[r]) throw std::invalid_argument("row_ptr decreases at row " + std::to_string(r));
    if (row_ptr_->back() != nnz())
        throw std::invalid_argument("row_ptr ends at " + std::to_string(row_ptr_->back()) + " but there are " + std::to_string(nnz()) +
                                    " columns");
    check_csr({rows, cols, row_ptr_->data(), col_->data()});
    values_ = std::make_shared<std::vector<float>>(nnz(), 0.0f);
}

void SparseOperator::set_values(const float* values, int64_t count) {
    if (count != nnz()) throw std::invalid_argument("expected " + std::to_string(nnz()) + " values, got " + std::to_string(count));
    std::lock_guard lock(mutex_);
    std::copy(values, values + count, values_->begin());
    uint32_t largest = 0;  // as an integer, an infinity or NaN is larger than every finite magnitude
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        largest = std::max(largest, bits & 0x7fffffffu);
    }
    finite_ = largest < 0x7f800000u;
    forward_stale_ = transposed_stale_ = lookup_stale_ = true;
    for (auto& [key, batched] : batched_) batched.stale = true;
}

int64_t SparseOperator::nbytes() const {
    int64_t bytes = static_cast<int64_t>(row_ptr_->size() * 8 + col_->size() * 8);
    if (forward_) bytes += forward_->nbytes() + nnz() * 4;
    if (transposed_) bytes += transposed_->nbytes() + nnz() * 12;
    if (lookup_) bytes += lookup_->nbytes() + nnz() * 4;
    for (const auto& [key, batched] : batched_) bytes += batched.conv->nbytes();
    return bytes;
}

std::shared_ptr<const LookupMatrix> SparseOperator::lookup_matrix() {
    std::lock_guard lock(mutex_);
    if (lookup_too_large_) return nullptr;
    if (!lookup_) {
        // It stores more than one value per kept weight, 5 bytes each: from memory, that would be what counts.
        const int64_t room = static_cast<int64_t>(cpu_info().l3_bytes ? cpu_info().l3_bytes : cpu_info().l2_bytes) / 2;
        lookup_too_large_ = nnz() * 5 > room;
        if (lookup_too_large_) return nullptr;
        lookup_ =
            std::make_shared<LookupMatrix>(CsrView{rows, cols, row_ptr_->data(), col_->data()}, values_->data(), Precision::float32, true);
        lookup_too_large_ = lookup_->nbytes() > room;
        if (lookup_too_large_) {
            lookup_ = nullptr;
            return nullptr;
        }
    } else if (lookup_stale_) {
        lookup_->set_values(values_->data());
    }
    lookup_stale_ = false;
    return lookup_;
}

std::shared_ptr<const PanelMatrix> SparseOperator::forward_matrix() {
    std::lock_guard lock(mutex_);
    if (!forward_) {
        forward_ = std::make_shared<PanelMatrix>(CsrView{rows, cols, row_ptr_->data(), col_->data()}, values_->data(),
                                                 PanelOptions{1, 128, 0, false, true});
    } else if (forward_stale_) {
        forward_->set_values(values_->data());
    }
    forward_stale_ = false;
    return forward_;
}

std::shared_ptr<const PanelMatrix> SparseOperator::transposed_matrix() {
    std::lock_guard lock(mutex_);
    if (!transposed_) {
        std::vector<int64_t> place_row(nnz()), place_col(nnz());
        std::vector<int64_t> row_ptr(transposed_rows + 1, 0);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = (*row_ptr_)[r]; i < (*row_ptr_)[r + 1]; i++) {
                auto [row, column] = transposed_place(r, (*col_)[i]);
                place_row[i] = row, place_col[i] = column;
                row_ptr[row + 1]++;
            }
        std::partial_sum(row_ptr.begin(), row_ptr.end(), row_ptr.begin());
        std::vector<int64_t> next(row_ptr.begin(), row_ptr.end() - 1);
        transposed_order_.resize(nnz());
        // Walking the rows in order fills each transposed row with growing columns, but for taps within one source row: sort those.
        for (int64_t i = 0; i < nnz(); i++) transposed_order_[next[place_row[i]]++] = i;
        for (int64_t r = 0; r < transposed_rows; r++)
            std::sort(transposed_order_.begin() + row_ptr[r], transposed_order_.begin() + row_ptr[r + 1],
                      [&](int64_t a, int64_t b) { return place_col[a] < place_col[b]; });
        std::vector<int32_t> col(nnz());
        for (int64_t i = 0; i < nnz(); i++) col[i] = static_cast<int32_t>(place_col[transposed_order_[i]]);
        transposed_ = std::make_shared<PanelMatrix>(CsrView{transposed_rows, transposed_cols, row_ptr.data(), col.data()}, nullptr,
                                                    PanelOptions{1, 128, 0, false, true});
        transposed_stale_ = true;
    }
    if (transposed_stale_) {
        std::vector<float> ordered(nnz());
        for (int64_t i = 0; i < nnz(); i++) ordered[i] = (*values_)[transposed_order_[i]];
        transposed_->set_values(ordered.data());
        transposed_stale_ = false;
    }
    return transposed_;
}

std::shared_ptr<const BatchConv> SparseOperator::batched(bool backward, const ConvGeometry& geometry, bool fresh) {
    std::lock_guard lock(mutex_);
    std::tuple key{backward, geometry.height, geometry.width};
    if (!batched_.count(key)) make_room(batched_);
    Batched& found = batched_[key];
    if (!found.conv) found.conv = std::make_shared<BatchConv>(geometry, backward, rows, *row_ptr_, *col_);
    if (!found.conv->possible()) return nullptr;
    if (fresh && found.stale) found.conv->set_values(values_->data()), found.stale = false;
    return found.conv;
}

// ---------------------------------------------------------------------------------------------------------------- linear

namespace {

// A second thread costs more than it brings below so many products: some ten microseconds of work.
constexpr int64_t kWorthAThread = int64_t(1) << 18;
constexpr int64_t kFewEntries = 16;        // of a row
constexpr int64_t kWorthLanes = 768;       // rows or columns
constexpr int64_t kLaneBytes = 640 << 10;  // of the inputs of one group of images, which should stay in the L2

bool worth_threads(int64_t nnz, int64_t n) { return nnz * n >= kWorthAThread; }
int threads_for(int64_t nnz, int64_t n) { return worth_threads(nnz, n) ? num_threads() : 1; }

}  // namespace

// A tile of the product visits every row of the weight, and where rows have few entries the visits are what costs: images
// along the lanes need half as many.
bool LinearLayer::few_entries() const {
    const int64_t longest = std::max(rows, cols);
    return longest >= kWorthLanes && nnz() <= kFewEntries * longest;
}

std::shared_ptr<const BatchConv> LinearLayer::batch(bool backward, bool fresh, int64_t ld_in, int64_t ld_out, int64_t n, int64_t* width) {
    const int64_t lanes = kernels().lanes;
    if (ld_in != cols || ld_out != rows) return nullptr;
    // Two groups of images at least where two threads share them; whether they would must not depend on how many there are.
    const int64_t groups = worth_threads(nnz(), n) ? 2 : 1;
    for (int64_t pixels : {8, 4}) {
        if (pixels > 4 && (backward ? rows : cols) * pixels * lanes * int64_t(sizeof(float)) > kLaneBytes) continue;
        if (n % (pixels * lanes) || n < groups * pixels * lanes) continue;
        ConvGeometry g;
        g.channels = cols, g.width = *width = pixels;
        return batched(backward, g, fresh);
    }
    return nullptr;
}

std::shared_ptr<Plan> LinearLayer::plan(const Key& key) {
    auto [what, n, ld_in, ld_out, has_bias] = key;
    bool backward = what == 1;
    auto lookup = what == 0 && n <= kFewVectors ? lookup_matrix() : nullptr;
    auto weight = what == 2 || lookup || (what == 0 && n == 1) ? nullptr : backward ? transposed_matrix() : forward_matrix();
    std::lock_guard lock(mutex_);
    auto& found = plans_[key];
    if (found) return found;
    plans_.erase(key);
    make_room(plans_);
    auto plan = std::make_shared<Plan>(16, 3);
    if (what == 2) {
        auto node = std::make_unique<SampledNode>();
        node->name = "weight gradient";
        node->row_ptr = row_ptr_, node->col = col_, node->rows = rows, node->cols = cols, node->pixels = n;
        node->source = Source::rows, node->x = {2, 0}, node->x_stride = ld_in;
        node->dy_rows = true, node->dy = {1, 0}, node->dy_stride = ld_out, node->out = {3, 0};
        plan->add(std::move(node));
    } else if (lookup) {
        auto node = std::make_unique<VectorProductNode>();
        node->name = "linear";
        node->sparse = lookup, node->count = n;
        node->x = {1, 0}, node->x_stride = ld_in, node->out = {2, 0}, node->out_stride = ld_out;
        node->has_bias_ref = has_bias, node->bias_ref = {3, 0};
        plan->add(std::move(node));
    } else if (what == 0 && n == 1) {
        auto node = std::make_unique<VectorNode>();
        node->name = "linear";
        node->rows = rows, node->cols = cols, node->values = values_, node->row_ptr = row_ptr_, node->col = col_;
        node->x = {1, 0}, node->out = {2, 0};
        node->has_residual = has_bias, node->residual = {3, 0};  // a bias in the caller's memory is added like a residual
        plan->add(std::move(node));
    } else {
        auto node = std::make_unique<SpmmNode>();
        node->name = backward ? "input gradient" : "linear";
        node->weight = weight, node->pixels = n, node->vectors = 4;
        node->source = Source::rows, node->x = {1, 0}, node->x_stride = ld_in;
        node->destination = Destination::rows, node->out = {2, 0}, node->out_stride = ld_out;
        node->has_bias_ref = has_bias, node->bias_ref = {3, 0};
        plan->add(std::move(node));
    }
    plans_[key] = plan;
    return plan;
}

void LinearLayer::forward(const float* x, int64_t ldx, int64_t n, float* y, int64_t ldy, const float* bias) {
    if (n == 0) return;
    if (entries_ && n > kFewVectors) return entries_->forward(values_->data(), x, ldx, n, y, ldy, bias);
    int64_t width;
    if (auto fast = few_entries() ? batch(false, true, ldx, ldy, n, &width) : nullptr)
        return fast->run({x, true}, n / width, {y, true}, bias, threads_for(nnz(), n));
    auto p = plan({0, n, ldx, ldy, bias != nullptr});
    // Brings new values in. A single row that is too large for the lookup reads the values as they are.
    if (!(n <= kFewVectors && lookup_matrix()) && n > 1) SparseOperator::forward_matrix();
    float* pointers[] = {const_cast<float*>(x), y, const_cast<float*>(bias)};
    p->run(pointers, 0);
}

void LinearLayer::input_grad(const float* dy, int64_t lddy, int64_t n, float* dx, int64_t lddx) {
    if (n == 0) return;
    if (entries_) return entries_->input_grad(values_->data(), dy, lddy, n, dx, lddx);
    int64_t width;
    if (auto fast = few_entries() ? batch(true, true, lddx, lddy, n, &width) : nullptr)
        return fast->run({dy, true}, n / width, {dx, true}, nullptr, threads_for(nnz(), n));
    auto p = plan({1, n, lddy, lddx, false});
    transposed_matrix();
    float* pointers[] = {const_cast<float*>(dy), dx, nullptr};
    p->run(pointers, 0);
}

void LinearLayer::weight_grad(const float* dy, int64_t lddy, const float* x, int64_t ldx, int64_t n, float* dvalues) {
    if (entries_) return entries_->weight_grad(dy, lddy, x, ldx, n, dvalues);
    int64_t width;
    if (auto fast = n > 0 ? batch(false, false, ldx, lddy, n, &width) : nullptr)
        return fast->weight_grad({dy, true}, {x, true}, n / width, dvalues, threads_for(nnz(), n));
    auto p = plan({2, n, ldx, lddy, false});
    float* pointers[] = {const_cast<float*>(dy), const_cast<float*>(x), dvalues};
    p->run(pointers, 0);
}

void LinearLayer::gradients(const float* dy, int64_t lddy, const float* x, int64_t ldx, int64_t n, float* dx, int64_t lddx, float* dvalues,
                            float* dbias) {
    if (dx) input_grad(dy, lddy, n, dx, lddx);
    if (dvalues) weight_grad(dy, lddy, x, ldx, n, dvalues);
    if (!dbias) return;
    // Sums of a few rows in float, of these in double: as exact for many rows as for few.
    constexpr int64_t kColumns = 256, kRows = 64;
    const int threads = n * rows < kWorthAThread ? 1 : num_threads();
    parallel_for((rows + kColumns - 1) / kColumns, threads, [&](int64_t part, int) {
        const int64_t first = part * kColumns, columns = std::min(kColumns, rows - first);
        float some[kColumns];
        double sums[kColumns] = {};
        for (int64_t row = 0; row < n; row += kRows) {
            kernels().add_rows(dy + row * lddy + first, lddy, static_cast<int>(std::min(kRows, n - row)), some, columns);
            for (int64_t i = 0; i < columns; i++) sums[i] += double(some[i]);
        }
        std::copy(sums, sums + columns, dbias + first);
    });
}

// ---------------------------------------------------------------------------------------------------------------- convolution

namespace {

std::vector<int32_t> absolute_columns(const std::vector<int64_t>& row_ptr, std::vector<int32_t> col, int64_t rows, int64_t groups,
                                      const ConvGeometry& g) {
    if (groups < 1 || g.channels % groups || rows % groups)
        throw std::invalid_argument("groups = " + std::to_string(groups) + " must divide the input channels (" +
                                    std::to_string(g.channels) + ") and the output channels (" + std::to_string(rows) + ")");
    int64_t width = g.channels / groups * g.taps();
    if (static_cast<int64_t>(row_ptr.size()) != rows + 1 || row_ptr.back() != static_cast<int64_t>(col.size()) || row_ptr.front() != 0)
        throw std::invalid_argument("row_ptr does not fit the columns");
    for (int64_t r = 0; r < rows; r++) {
        if (row_ptr[r + 1] < row_ptr[r] || row_ptr[r + 1] > static_cast<int64_t>(col.size()))
            throw std::invalid_argument("row_ptr decreases at row " + std::to_string(r));
        int64_t shift = r / (rows / groups) * width;
        for (int64_t i = row_ptr[r]; i < row_ptr[r + 1]; i++) {
            if (col[i] < 0 || col[i] >= width)
                throw std::invalid_argument("column " + std::to_string(col[i]) + " is not below " + std::to_string(width));
            col[i] = static_cast<int32_t>(col[i] + shift);
        }
    }
    return col;
}

View nchw(int buffer, int64_t n, int64_t c, int64_t pixels) { return {{buffer, 0}, {n, c, pixels}, {c * pixels, pixels, 1}}; }
// Planes that kernels write whole vectors to, also where there is a single pixel.
int64_t written_plane(int64_t pixels) { return padded_pixels(std::max<int64_t>(2, pixels)); }
View planes(int64_t offset, int64_t n, int64_t c, int64_t pixels) {
    return {{0, offset}, {n, c, pixels}, {pixels, written_plane(n * pixels), 1}};
}

}  // namespace

ConvLayer::ConvLayer(std::vector<int64_t> row_ptr, std::vector<int32_t> col, int64_t out_channels, int64_t groups,
                     const ConvGeometry& geometry)
    : SparseOperator(row_ptr, absolute_columns(row_ptr, std::move(col), out_channels, groups, geometry), out_channels,
                     geometry.channels * geometry.taps()),
      geometry_(geometry) {
    transposed_rows = geometry.channels;
    transposed_cols = out_channels * geometry.taps();
}

ConvGeometry ConvLayer::sized(int64_t n, int64_t h, int64_t w) const {
    ConvGeometry g = geometry_;
    g.batch = n, g.height = h, g.width = w;
    g.check();
    return g;
}

std::shared_ptr<Plan> ConvLayer::plan(const Key& key) {
    // Not a structured binding: lambdas below capture these, which clang before 16 refuses for bindings.
    const auto what = std::get<0>(key);
    const int64_t n = std::get<1>(key), h = std::get<2>(key), w = std::get<3>(key);
    const bool has_bias = std::get<4>(key);
    ConvGeometry g = sized(n, h, w);
    auto weight = what == 2 ? nullptr : what == 1 ? transposed_matrix() : SparseOperator::forward_matrix();
    std::lock_guard lock(mutex_);
    auto& found = plans_[key];
    if (found) return found;
    plans_.erase(key);
    make_room(plans_);

    int64_t in_pixels = h * w, out_pixels = g.out_height() * g.out_width(), channels = g.channels, lanes = kernels().lanes;
    int64_t in_plane = written_plane(n * in_pixels), out_plane = written_plane(n * out_pixels);
    PhaseLayout phases = phase_layout(g);
    bool use_phases = phases.needed && phases.possible;
    int64_t phase_floats = use_phases ? channels * int64_t(phases.phase_y.size() * phases.phase_x.size()) * phases.plane_stride : 0;

    // Arena: [input planes or phases][output planes][second input of the weight gradient]
    int64_t cursor = 0;
    auto take = [&](int64_t floats) {
        int64_t at = cursor;
        cursor = align16(cursor + floats);
        return at;
    };
    std::vector<std::unique_ptr<Node>> nodes;
    // One image is channel planes already; its last vector may be read only where that stays inside.
    auto bring_planes = [&](int buffer, int64_t c, int64_t pixels, int64_t plane, bool whole_vectors, Ref* ref, int64_t* stride) {
        if (n == 1 && (!whole_vectors || pixels % lanes == 0)) {
            *ref = {buffer, 0}, *stride = pixels;
            return;
        }
        *ref = {0, take(c * plane)}, *stride = plane;
        nodes.push_back(std::make_unique<CopyNode>(nchw(buffer, n, c, pixels), planes(ref->offset, n, c, pixels)));
    };
    struct Input {
        Source source;
        Ref ref;
        int64_t stride;
        std::shared_ptr<const TapTable> taps;
    };
    auto bring_input = [&](int buffer) {
        Input in;
        if (g.pointwise()) {
            in.source = Source::planes;
            bring_planes(buffer, channels, in_pixels, in_plane, true, &in.ref, &in.stride);
            return in;
        }
        in.source = Source::taps;
        in.taps = std::make_shared<TapTable>(forward_taps(g, phases));
        if (use_phases) {
            auto node = std::make_unique<PhaseNode>();
            node->geometry = g, node->phases = phases, node->x = {buffer, 0};
            node->stride_n = channels * in_pixels, node->stride_c = in_pixels, node->stride_h = w, node->stride_w = 1;
            node->out = in.ref = {0, take(phase_floats)};
            in.stride = int64_t(phases.phase_y.size() * phases.phase_x.size()) * phases.plane_stride;
            nodes.push_back(std::move(node));
            return in;
        }
        bring_planes(buffer, channels, in_pixels, in_plane, false, &in.ref, &in.stride);
        return in;
    };
    if (what == 2) {
        Input in = bring_input(2);
        auto node = std::make_unique<SampledNode>();
        node->row_ptr = row_ptr_, node->col = col_, node->rows = rows, node->cols = cols, node->pixels = n * out_pixels;
        node->source = in.source, node->x = in.ref, node->x_stride = in.stride, node->taps = in.taps;
        bring_planes(1, rows, out_pixels, out_plane, false, &node->dy, &node->dy_stride);
        node->out = {3, 0};
        nodes.push_back(std::move(node));
    } else {
        auto node = std::make_unique<SpmmNode>();
        node->weight = weight, node->vectors = 4;
        int64_t pixels;  // of one output image
        if (what == 0) {
            Input in = bring_input(1);
            pixels = out_pixels;
            node->source = in.source, node->x = in.ref, node->x_stride = in.stride, node->taps = in.taps;
        } else {
            pixels = in_pixels;
            bool direct = g.pointwise();
            node->source = direct ? Source::planes : Source::taps;
            if (!direct) node->taps = std::make_shared<TapTable>(backward_taps(g));
            bring_planes(1, rows, out_pixels, out_plane, direct, &node->x, &node->x_stride);
        }
        node->pixels = n * pixels;
        node->has_bias_ref = has_bias, node->bias_ref = {3, 0};
        int64_t out_channels = weight->rows, plane = written_plane(n * pixels);
        bool in_place = n == 1 && pixels % lanes == 0;
        node->out = in_place ? Ref{2, 0} : Ref{0, take(out_channels * plane)};
        node->out_stride = in_place ? pixels : plane;
        Ref out = node->out;
        nodes.push_back(std::move(node));
        if (!in_place)
            nodes.push_back(std::make_unique<CopyNode>(planes(out.offset, n, out_channels, pixels), nchw(2, n, out_channels, pixels)));
    }
    auto plan = std::make_shared<Plan>(cursor, 3);
    for (auto& node : nodes) plan->add(std::move(node));
    plans_[key] = plan;
    return plan;
}

std::shared_ptr<const BatchConv> ConvLayer::batch_conv(bool backward, int64_t n, int64_t h, int64_t w, bool fresh) {
    // Not with infinities, which it would multiply with the zeros of the padding.
    if (n < kernels().lanes || (fresh && !finite_)) return nullptr;
    return batched(backward, sized(n, h, w), fresh);
}

bool ConvLayer::forward(Input x, int64_t n, int64_t h, int64_t w, Output y, const float* bias) {
    if (n == 0) return true;
    if (auto conv = batch_conv(false, n, h, w, true)) {
        conv->run(x, n, y, bias, num_threads());
        return true;
    }
    if (x.channels_last || y.channels_last) return false;
    auto p = plan({0, n, h, w, bias != nullptr});
    SparseOperator::forward_matrix();
    float* pointers[] = {const_cast<float*>(x.data), y.data, const_cast<float*>(bias)};
    p->run(pointers, 0);
    return true;
}

bool ConvLayer::input_grad(Input dy, int64_t n, int64_t h, int64_t w, Output dx) {
    if (n == 0) return true;
    if (!finite_ && !geometry_.pointwise()) return false;
    if (auto conv = batch_conv(true, n, h, w, true)) {
        conv->run(dy, n, dx, nullptr, num_threads());
        return true;
    }
    if (dy.channels_last || dx.channels_last) return false;
    auto p = plan({1, n, h, w, false});
    transposed_matrix();
    float* pointers[] = {const_cast<float*>(dy.data), dx.data, nullptr};
    p->run(pointers, 0);
    return true;
}

bool ConvLayer::weight_grad(Input dy, Input x, int64_t n, int64_t h, int64_t w, float* dvalues) {
    if (n == 0) {
        std::fill(dvalues, dvalues + nnz(), 0.0f);
        return true;
    }
    if (auto conv = batch_conv(false, n, h, w, false)) {
        conv->weight_grad(dy, x, n, dvalues, num_threads());
        return true;
    }
    if (dy.channels_last || x.channels_last) return false;
    auto p = plan({2, n, h, w, false});
    float* pointers[] = {const_cast<float*>(dy.data), const_cast<float*>(x.data), dvalues};
    p->run(pointers, 0);
    return true;
}

}  // namespace sparse_engine
