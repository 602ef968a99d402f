#include "runtime/plan.h"

#include <chrono>
#include <limits>

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

}  // namespace sparse_engine
