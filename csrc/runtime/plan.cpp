#include "runtime/plan.h"

#include <chrono>
#include <limits>
#include <stdexcept>

namespace sparse_engine {

float Epilogue::low() const { return kind == Activation::clamp ? p0 : -std::numeric_limits<float>::infinity(); }
float Epilogue::high() const { return kind == Activation::clamp ? p1 : std::numeric_limits<float>::infinity(); }

std::unique_ptr<Context> Plan::acquire(float* const* pointers, int threads) const {
    std::unique_ptr<Context> context;
    {
        std::lock_guard lock(mutex_);
        if (!idle_.empty()) {
            context = std::move(idle_.back());
            idle_.pop_back();
        }
    }
    if (!context) {
        context = std::make_unique<Context>();
        context->arena.reserve(static_cast<size_t>(arena_bytes()));
    }
    context->external = pointers;
    context->threads = threads > 0 ? threads : num_threads();
    return context;
}

void Plan::release(std::unique_ptr<Context> context) const {
    std::lock_guard lock(mutex_);
    idle_.push_back(std::move(context));
}

void Plan::run(float* const* pointers, int threads) const {
    auto context = acquire(pointers, threads);
    for (const auto& node : nodes_) node->run(*context);
    release(std::move(context));
}

void Plan::run_many(float* const* pointers, const int64_t* strides, int64_t count, int threads) const {
    if (threads <= 0) threads = num_threads();
    bool apart = count >= threads;
    parallel_for(count, apart ? threads : 1, [&](int64_t item, int) {
        std::vector<float*> moved(pointers, pointers + externals_);
        for (int b = 0; b < externals_; b++) moved[b] += item * strides[b];
        run(moved.data(), apart ? 1 : threads);
    });
}

std::vector<double> Plan::profile(float* const* pointers, int threads) const {
    using Clock = std::chrono::steady_clock;
    auto context = acquire(pointers, threads);
    std::vector<double> seconds;
    seconds.reserve(nodes_.size());
    auto before = Clock::now();
    for (const auto& node : nodes_) {
        node->run(*context);
        auto after = Clock::now();
        seconds.push_back(std::chrono::duration<double>(after - before).count());
        before = after;
    }
    release(std::move(context));
    return seconds;
}

std::vector<double> Plan::time_node(size_t i, float* const* pointers, int threads, int times) const {
    using Clock = std::chrono::steady_clock;
    auto context = acquire(pointers, threads);
    for (size_t n = 0; n < i; n++) nodes_[n]->run(*context);
    std::vector<double> seconds;
    for (int t = 0; t < times; t++) {
        auto before = Clock::now();
        nodes_[i]->run(*context);
        seconds.push_back(std::chrono::duration<double>(Clock::now() - before).count());
    }
    release(std::move(context));
    return seconds;
}

PartedPlan::PartedPlan(std::vector<std::shared_ptr<const Plan>> parts, std::vector<std::vector<size_t>> ends)
    : parts_(std::move(parts)), ends_(std::move(ends)) {
    if (parts_.empty() || parts_.size() > kMaxThreads || ends_.size() != parts_.size())
        throw std::invalid_argument("a parted plan needs at least one part, and the ends of its stages for each");
    for (size_t p = 0; p < parts_.size(); p++) {
        size_t before = 0;
        for (size_t end : ends_[p]) {
            if (end < before) throw std::invalid_argument("the ends of a part's stages descend");
            before = end;
        }
        if (before != parts_[p]->size() || ends_[p].size() != ends_[0].size() || parts_[p]->externals() != parts_[0]->externals() ||
            parts_[p]->externals() < static_cast<int>(parts_.size()))
            throw std::invalid_argument("the parts of a parted plan do not fit together");
    }
}

template <class RunNode>
void PartedPlan::run_stages(float* const* pointers, const RunNode& run_node) const {
    const size_t count = parts_.size(), shared = static_cast<size_t>(parts_[0]->externals()) - count;
    std::vector<std::unique_ptr<Context>> contexts;
    std::vector<float*> buffers(pointers, pointers + shared);
    for (const auto& part : parts_) contexts.push_back(part->acquire(nullptr, 1));
    for (const auto& context : contexts) buffers.push_back(context->arena.as<float>());
    for (const auto& context : contexts) context->external = buffers.data();
    for (size_t stage = 0; stage < ends_[0].size(); stage++)
        parallel_for(static_cast<int64_t>(count), static_cast<int>(count), [&](int64_t p, int) {
            for (size_t i = stage ? ends_[p][stage - 1] : 0; i < ends_[p][stage]; i++) run_node(static_cast<size_t>(p), i, *contexts[p]);
        });
    for (size_t p = 0; p < count; p++) parts_[p]->release(std::move(contexts[p]));
}

void PartedPlan::run(float* const* pointers) const {
    run_stages(pointers, [&](size_t p, size_t i, Context& context) { parts_[p]->nodes_[i]->run(context); });
}

std::vector<std::vector<double>> PartedPlan::profile(float* const* pointers) const {
    using Clock = std::chrono::steady_clock;
    std::vector<std::vector<double>> seconds;
    for (const auto& part : parts_) seconds.emplace_back(part->size());
    run_stages(pointers, [&](size_t p, size_t i, Context& context) {
        auto before = Clock::now();
        parts_[p]->nodes_[i]->run(context);
        seconds[p][i] = std::chrono::duration<double>(Clock::now() - before).count();
    });
    return seconds;
}

}  // namespace sparse_engine
