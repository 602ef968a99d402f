// No allocation per call after the first: plans on one thread and several, batches in passes, an image in bands.
#include <atomic>
#include <new>

#include "check.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "runtime/linear_operator.h"
#include "runtime/plan.h"
#include "runtime/tensor_ops.h"
#include "runtime/vector_product.h"

using namespace sparse_engine;
using check::Random;

namespace {

std::atomic<int64_t> news{0};

void* counted(size_t bytes, size_t alignment) {
    news++;
    void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (!p) throw std::bad_alloc();
    return p;
}

}  // namespace

void* operator new(size_t bytes) { return counted(bytes ? bytes : 1, alignof(std::max_align_t)); }
void* operator new(size_t bytes, std::align_val_t alignment) { return counted(bytes ? bytes : 1, static_cast<size_t>(alignment)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

int64_t allocations() { return news.load() + AlignedBuffer::allocations.load(); }

View view(int buffer, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset = 0) {
    return {{buffer, offset}, std::move(sizes), std::move(strides)};
}

// From buffer 1 (64 × 96 floats) through everything that keeps something aside, into buffer 2 (the same size).
constexpr int64_t kRows = 64, kCols = 96, kSize = kRows * kCols;
std::unique_ptr<Plan> make_plan() {
    auto plan = std::make_unique<Plan>(4 * kSize, 2);
    const std::vector<int64_t> across{kCols, 1}, down{1, kRows};
    plan->add(std::make_unique<CopyNode>(view(1, {kRows, kCols}, across), view(0, {kRows, kCols}, down)));
    // One line at a time, not contiguous.
    plan->add(std::make_unique<SoftmaxNode>(view(0, {kRows, kCols}, {2, 2 * kRows}), view(0, {kRows, kCols}, {2, 2 * kRows}), 1));
    plan->add(std::make_unique<LayerNormNode>(view(0, {kRows, kCols}, {2, 2 * kRows}), view(0, {kRows, kCols}, {2, 2 * kRows}), 1,
                                              std::vector<float>(), std::vector<float>(), 1e-5f));
    plan->add(std::make_unique<GroupNormNode>(view(0, {1, 4, kSize / 4}, {kSize, kSize / 4, 1}),
                                              view(0, {1, 4, kSize / 4}, {kSize, kSize / 4, 1}, kSize), 2, std::vector<float>(4, 1.0f),
                                              std::vector<float>(4, 0.5f), 1e-5f));
    plan->add(std::make_unique<MatmulNode>(view(0, {32, kCols}, across), view(0, {kCols, kRows}, {kRows, 1}, kSize),
                                           view(0, {32, kRows}, {kRows, 1}, 2 * kSize)));
    plan->add(std::make_unique<AttentionNode>(view(0, {4, 40, 16}, {640, 1, 40}), view(0, {4, 40, 16}, {640, 1, 40}, kSize),
                                              view(0, {4, 40, 16}, {640, 1, 40}, kSize), view(0, {4, 40, 16}, {640, 1, 40}, 3 * kSize),
                                              0.25f, false, false, View{}));
    for (Precision precision : {Precision::bfloat16, Precision::int8}) {
        std::vector<uint16_t> values(64 * 96, 0x0101);
        auto product = std::make_unique<VectorProductNode>();
        product->dense = std::make_shared<const RowMatrix>(64, 96, values.data(), precision);
        product->count = 2, product->x = {1, 0}, product->x_stride = 96, product->out = {0, 3 * kSize}, product->out_stride = 64;
        plan->add(std::move(product));
    }
    plan->add(std::make_unique<CopyNode>(view(0, {kRows, kCols}, across, 2 * kSize), view(2, {kRows, kCols}, across)));
    return plan;
}

}  // namespace

TEST(the_counter_counts) {
    const int64_t before = allocations();
    auto some = std::make_unique<std::vector<float>>(100);
    AlignedBuffer buffer(1000);
    CHECK_EQUAL(allocations() - before, int64_t(3));
}

TEST(a_plan_allocates_in_its_first_call_only) {
    for (int threads : {1, 3}) {
        set_num_threads(threads);
        auto plan = make_plan();
        std::vector<float> x = Random(2).floats(size_t(kSize)), y(x.size());
        float* pointers[] = {x.data(), y.data()};
        plan->run(pointers, threads);
        const int64_t before = allocations();
        for (int call = 0; call < 200; call++) plan->run(pointers, threads);
        CHECK_EQUAL(allocations() - before, int64_t(0));
    }
}

TEST(a_batch_in_passes_allocates_in_its_first_call_only) {
    for (int threads : {1, 3})
        for (int64_t count : {2, 16}) {
            set_num_threads(threads);
            auto plan = make_plan();
            std::vector<float> x = Random(3).floats(size_t(count * kSize)), y(x.size());
            float* pointers[] = {x.data(), y.data()};
            const int64_t strides[] = {kSize, kSize};
            plan->run_many(pointers, strides, count, threads);
            const int64_t before = allocations();
            for (int call = 0; call < 100; call++) plan->run_many(pointers, strides, count, threads);
            CHECK_EQUAL(allocations() - before, int64_t(0));
        }
}

TEST(an_image_in_bands_allocates_in_its_first_call_only) {
    // Two parts that copy their half in, then the other's half out of its arena.
    const int parts = 2;
    const int64_t half = kSize / parts;
    set_num_threads(parts);
    std::vector<std::shared_ptr<const Plan>> plans;
    for (int p = 0; p < parts; p++) {
        auto plan = std::make_shared<Plan>(half, 2 + parts);
        plan->add(std::make_unique<CopyNode>(view(1, {half}, {1}, p * half), view(0, {half}, {1})));
        plan->add(std::make_unique<CopyNode>(view(3 + (1 - p), {half}, {1}), view(2, {half}, {1}, (1 - p) * half)));
        plans.push_back(plan);
    }
    PartedPlan parted(plans, {{1, 2}, {1, 2}});
    std::vector<float> x = Random(4).floats(size_t(kSize)), y(x.size(), check::kPoison);
    float* pointers[] = {x.data(), y.data()};
    parted.run(pointers);
    CHECK(x == y);
    const int64_t before = allocations();
    for (int call = 0; call < 200; call++) parted.run(pointers);
    CHECK_EQUAL(allocations() - before, int64_t(0));
}
