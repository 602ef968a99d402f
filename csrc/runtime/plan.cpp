#include "runtime/plan.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>

#include "core/trace.h"

namespace sparse_engine {

float Epilogue::low() const { return kind == Activation::clamp ? p0 : -std::numeric_limits<float>::infinity(); }
float Epilogue::high() const { return kind == Activation::clamp ? p1 : std::numeric_limits<float>::infinity(); }

size_t Context::level_scratch(size_t bytes) {
    for (int slot = 0; slot < threads; slot++) bytes = std::max(bytes, scratch_[slot].bytes());
    for (int slot = 0; slot < threads; slot++) scratch_[slot].reserve(bytes);
    return bytes;
}

std::unique_ptr<Context> Plan::acquire(float* const* pointers, int threads) const {
    std::unique_ptr<Context> context;
    {
        std::lock_guard lock(mutex_);
        if (!idle_.empty()) {
            context = std::move(idle_.back());
            idle_.pop_back();
        } else {
            contexts_++;
            idle_.reserve(contexts_);
        }
    }
    if (!context) context = make_context();
    context->external = pointers;
    context->threads = std::min(threads > 0 ? threads : num_threads(), kMaxThreads);
    return context;
}

std::unique_ptr<Context> Plan::make_context() const {
    auto context = std::make_unique<Context>();
    context->arena.reserve(static_cast<size_t>(arena_bytes()));
    return context;
}

void Plan::release(std::unique_ptr<Context> context) const {
    std::lock_guard lock(mutex_);
    scratch_bytes_ = context->level_scratch(scratch_bytes_);
    idle_.push_back(std::move(context));
}

void Plan::run(float* const* pointers, int threads) const {
    auto context = acquire(pointers, threads);
    for (size_t i = 0; i < nodes_.size(); i++) run_node(i, *context);
    release(std::move(context));
}

void Plan::run_node(size_t i, Context& context) const {
    if (trace_position.begins_nodes()) [[unlikely]] {
        TracedNode traced(nodes_[i]->name);
        nodes_[i]->run(context);
    } else {
        nodes_[i]->run(context);
    }
}

void Plan::run_many(float* const* pointers, const int64_t* strides, int64_t count, int threads) const {
    if (threads <= 0) threads = num_threads();
    bool apart = count >= threads;
    if (apart) {  // which thread is how early must not decide when memory is allocated
        std::lock_guard lock(mutex_);
        for (; contexts_ < static_cast<size_t>(std::min(threads, kMaxThreads)); contexts_++) {
            idle_.reserve(contexts_ + 1);
            idle_.push_back(make_context());
        }
    }
    parallel_for(count, apart ? threads : 1, [&](int64_t item, int) {
        TraceScope scope({trace_position.trace, trace_position.node, trace_position.band, item});
        constexpr int kFew = 32;
        float* few[kFew];
        std::vector<float*> many(externals_ > kFew ? externals_ : 0);
        float** moved = externals_ > kFew ? many.data() : few;
        for (int b = 0; b < externals_; b++) moved[b] = pointers[b] + item * strides[b];
        run(moved, apart ? 1 : threads);
    });
    std::lock_guard lock(mutex_);
    for (const auto& context : idle_) context->level_scratch(scratch_bytes_);
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
    auto call = acquire();
    auto& [contexts, buffers] = *call;
    std::copy(pointers, pointers + shared, buffers.begin());
    for (size_t p = 0; p < count; p++) {
        contexts[p] = parts_[p]->acquire(buffers.data(), 1);
        buffers[shared + p] = contexts[p]->arena.as<float>();
    }
    for (size_t stage = 0; stage < ends_[0].size(); stage++)
        parallel_for(static_cast<int64_t>(count), static_cast<int>(count), [&](int64_t p, int) {
            TraceScope scope({trace_position.trace, trace_position.node, static_cast<int>(p), trace_position.pass});
            for (size_t i = stage ? ends_[p][stage - 1] : 0; i < ends_[p][stage]; i++) run_node(static_cast<size_t>(p), i, *contexts[p]);
        });
    for (size_t p = 0; p < count; p++) parts_[p]->release(std::move(contexts[p]));
    std::lock_guard lock(mutex_);
    idle_.push_back(std::move(call));
}

std::unique_ptr<PartedPlan::Call> PartedPlan::acquire() const {
    std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
        auto call = std::move(idle_.back());
        idle_.pop_back();
        return call;
    }
    idle_.reserve(++calls_);
    auto call = std::make_unique<Call>();
    call->contexts.resize(parts_.size());
    call->buffers.resize(static_cast<size_t>(parts_[0]->externals()));
    return call;
}

void PartedPlan::run(float* const* pointers) const {
    run_stages(pointers, [&](size_t p, size_t i, Context& context) { parts_[p]->run_node(i, context); });
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
