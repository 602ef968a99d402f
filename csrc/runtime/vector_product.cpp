#include "runtime/vector_product.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "cpu/kernels_byte_lookup.h"

namespace sparse_engine {
namespace {

constexpr int64_t kAlone = 16384;  // products below which a second thread costs more than it brings
constexpr int64_t kItem = 8192;    // products of one work item, at least
constexpr size_t kPlansKept = 16;

// Rows in blocks of `step`, so that every thread has a few of them.
struct Blocks {
    int64_t units, count;
    Blocks(int64_t rows, int64_t step, int64_t work, int threads)
        : units((rows + step - 1) / step),
          count(std::clamp<int64_t>(std::min<int64_t>(4 * threads, work / kItem), 1, std::max<int64_t>(1, units))) {}
    int64_t begin(int64_t block) const { return units * block / count; }
};

// What x times makes 24-bit integers of: as good as float. 0 where there is nothing that could be scaled.
float scale_of_bytes(const float* x, int64_t n) {
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; i++) {
        const float magnitude = std::fabs(x[i]);
        largest = std::max(largest, magnitude);
        finite = finite && magnitude <= FLT_MAX;
    }
    const float scale = 8388607.0f / largest;
    return finite && largest > 0 && scale <= FLT_MAX / 2 ? std::nextafter(scale, 0.0f) : 0.0f;  // the division may have rounded up
}

}  // namespace

VectorArgs VectorProductNode::destination(const Context& context, int64_t vector, int64_t row0) const {
    VectorArgs to{};
    to.out = context.at(out) + vector * out_stride + row0;
    to.scale = scale ? scale->data() + row0 : nullptr;
    to.bias = bias ? bias->data() + row0 : has_bias_ref ? context.at(bias_ref) + row0 : nullptr;
    to.residual = has_residual ? context.at(residual) + vector * residual_stride + row0 : nullptr;
    to.low = epilogue.low(), to.high = epilogue.high();
    return to;
}

void VectorProductNode::run(Context& context) const {
    if (sparse) {
        run_sparse(context);
    } else if (bytes) {
        run_bytes(context);
    } else {
        run_dense(context);
    }
}

void VectorProductNode::run_sparse(Context& context) const {
    const KernelTable& k = kernels();
    const LookupMatrix& w = *sparse;
    const int64_t work = w.stored() * count, bytes = LookupMatrix::kSlice * LookupMatrix::kGroup * precision_bytes(w.precision);
    const Blocks blocks(w.rows, LookupMatrix::kSlice, work, context.threads);
    const float* in = context.at(x);
    // Block outermost: its weights are read from memory for the first vector, and from the cache for the others.
    parallel_for(blocks.count, work < kAlone ? 1 : context.threads, [&](int64_t block, int) {
        const int64_t slice = blocks.begin(block), row0 = slice * LookupMatrix::kSlice,
                      row1 = std::min(w.rows, blocks.begin(block + 1) * LookupMatrix::kSlice), first = w.begin[static_cast<size_t>(slice)];
        for (int64_t vector = 0; vector < count; vector++) {
            LookupArgs a{};
            a.groups = w.groups.data() + slice * w.tiles;
            a.index = w.index.data() + first * LookupMatrix::kSlice, a.values = w.values.data() + first * bytes;
            a.rows = row1 - row0, a.cols = w.cols, a.x = in + vector * x_stride;
            a.to = destination(context, vector, row0);
            k.lookup[static_cast<int>(w.precision)](a);
            if (epilogue.needs_pass()) k.activate(epilogue.kind, epilogue.p0, epilogue.p1, a.to.out, a.to.out, a.rows);
        }
    });
}

void VectorProductNode::run_dense(Context& context) const {
    const KernelTable& k = kernels();
    const RowMatrix& w = *dense;
    const int64_t work = w.rows * w.pitch * count;
    const float* in = context.at(x);
    // x as the kernel wants it, once for all threads: floats in its order or three bytes for each.
    const size_t size = static_cast<size_t>(w.pitch);
    float* const prepared = context.scratch(0, static_cast<size_t>(count) * (size + sizeof(double) / sizeof(float)));
    double* const scales = reinterpret_cast<double*>(prepared + static_cast<size_t>(count) * size);  // after count * pitch floats
    for (int64_t vector = 0; vector < count; vector++) {
        const float* from = in + vector * x_stride;
        float* to = prepared + static_cast<size_t>(vector) * size;
        scales[vector] = 0;
        if (w.precision == Precision::bfloat16) {
            k.pair_order(from, w.cols, w.pitch, to);
            continue;
        }
        const float scale = k.rows_int8_of_bytes ? scale_of_bytes(from, w.cols) : 0;
        if (scale > 0) {
            scales[static_cast<size_t>(vector)] = scale;
            k.byte_planes(from, w.cols, w.pitch, scale, reinterpret_cast<uint8_t*>(to));
        } else {
            std::copy(from, from + w.cols, to);
            std::fill(to + w.cols, to + w.pitch, 0.0f);
        }
    }
    const Blocks blocks(w.rows, 4, work, context.threads);
    parallel_for(blocks.count, work < kAlone ? 1 : context.threads, [&](int64_t block, int) {
        RowsArgs a{};
        a.w = w.values.data(), a.pitch = w.pitch, a.sums = w.sums.data();
        a.row0 = 4 * blocks.begin(block), a.row1 = std::min(w.rows, 4 * blocks.begin(block + 1));
        for (int64_t vector = 0; vector < count; vector++) {
            a.x = prepared + static_cast<size_t>(vector) * size;
            a.planes = reinterpret_cast<const uint8_t*>(a.x), a.plane_scale = scales[static_cast<size_t>(vector)];
            a.to = destination(context, vector, 0);
            if (w.precision == Precision::bfloat16) {
                k.rows_bf16(a);
            } else if (a.plane_scale != 0) {
                k.rows_int8_of_bytes(a);
            } else {
                k.rows_int8(a);
            }
            if (epilogue.needs_pass())
                k.activate(epilogue.kind, epilogue.p0, epilogue.p1, a.to.out + a.row0, a.to.out + a.row0, a.row1 - a.row0);
        }
    });
}

void VectorProductNode::run_bytes(Context& context) const {
    const KernelTable& k = kernels();
    const ByteLookupKernels& own = byte_lookup_kernels();
    const ByteLookup& w = *bytes;
    const int p = static_cast<int>(w.precision);
    const float* in = context.at(x);
    // x as tables of bytes, once for all threads.
    const size_t size = static_cast<size_t>(w.tiles) * 256 * kMostPlanes, extra = 2 * sizeof(double);
    uint8_t* const tables = reinterpret_cast<uint8_t*>(context.scratch(0, static_cast<size_t>(count) * (size + extra) / sizeof(float)));
    double* const scales = reinterpret_cast<double*>(tables + static_cast<size_t>(count) * size);
    double* const planes = scales + count;
    for (int64_t vector = 0; vector < count; vector++)
        planes[vector] = own.tables[p] && w.plain ? own.make_tables[p](in + vector * x_stride, w.cols,
                                                                       tables + static_cast<size_t>(vector) * size, scales + vector)
                                                  : 0;
    const int64_t work = w.stored() * count;
    const Blocks blocks(w.rows, ByteLookup::kSlice, work, context.threads);
    parallel_for(blocks.count, work < kAlone ? 1 : context.threads, [&](int64_t block, int) {
        const int64_t slice = blocks.begin(block), row0 = slice * ByteLookup::kSlice,
                      row1 = std::min(w.rows, blocks.begin(block + 1) * ByteLookup::kSlice);
        ByteLookupArgs a{};
        a.groups = w.groups.data() + slice * w.tiles;
        a.entries = w.entries.data() + w.begin[static_cast<size_t>(slice)] * ByteLookup::group_bytes(w.precision);
        a.tiles = w.tiles, a.rows = row1 - row0, a.cols = w.cols;
        a.sums = w.sums.empty() ? nullptr : w.sums.data() + row0;
        for (int64_t vector = 0; vector < count; vector++) {
            a.x = in + vector * x_stride, a.tables = tables + static_cast<size_t>(vector) * size;
            a.planes = static_cast<int>(planes[vector]), a.plane_scale = scales[vector];
            a.to = destination(context, vector, row0);
            (a.planes ? own.tables[p] : own.any[p])(a);
            if (epilogue.needs_pass()) k.activate(epilogue.kind, epilogue.p0, epilogue.p1, a.to.out, a.to.out, a.rows);
        }
    });
}

VectorLayer::VectorLayer(std::shared_ptr<const LookupMatrix> sparse_, std::shared_ptr<const ByteLookup> bytes_,
                         std::shared_ptr<const RowMatrix> dense_, std::shared_ptr<const std::vector<float>> scale_)
    : sparse(std::move(sparse_)), bytes(std::move(bytes_)), dense(std::move(dense_)), scale(std::move(scale_)) {
    if (!!sparse + !!bytes + !!dense != 1) throw std::invalid_argument("a layer has one weight");
    if (scale && static_cast<int64_t>(scale->size()) != rows())
        throw std::invalid_argument("there are " + std::to_string(scale->size()) + " scales for " + std::to_string(rows()) + " rows");
}

std::unique_ptr<VectorProductNode> VectorLayer::node() const {
    auto node = std::make_unique<VectorProductNode>();
    node->name = "linear";
    node->sparse = sparse, node->bytes = bytes, node->dense = dense, node->scale = scale;
    return node;
}

void VectorLayer::forward(const float* x, int64_t ldx, int64_t n, float* y, int64_t ldy, const float* bias) {
    if (n == 0 || rows() == 0) return;
    std::shared_ptr<Plan> plan;
    {
        std::lock_guard lock(mutex_);
        const Key key{n, ldx, ldy, bias != nullptr};
        auto found = plans_.find(key);
        if (found == plans_.end()) {
            if (plans_.size() >= kPlansKept) plans_.erase(plans_.begin());
            auto made_node = node();
            made_node->count = n;
            made_node->x = {1, 0}, made_node->x_stride = ldx, made_node->out = {2, 0}, made_node->out_stride = ldy;
            made_node->has_bias_ref = bias != nullptr, made_node->bias_ref = {3, 0};
            auto made = std::make_shared<Plan>(16, 3);
            made->add(std::move(made_node));
            found = plans_.emplace(key, std::move(made)).first;
        }
        plan = found->second;
    }
    float* pointers[] = {const_cast<float*>(x), y, const_cast<float*>(bias)};
    plan->run(pointers, 0);
}

}  // namespace sparse_engine
