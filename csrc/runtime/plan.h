// A plan: a flat list of nodes over one arena, with every buffer, stride and offset fixed. It runs in one call, from any number of threads
// at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "cpu/kernels.h"

namespace sparse_engine {

// A place: buffer 0 is the arena, buffer i > 0 the i-th pointer given to run(); offset in floats.
struct Ref {
    int buffer = 0;
    int64_t offset = 0;
};

// A strided tensor at a place.
struct View {
    Ref ref;
    std::vector<int64_t> sizes, strides;
    int64_t numel() const {
        int64_t n = 1;
        for (int64_t s : sizes) n *= s;
        return n;
    }
};

class Context {
  public:
    float* at(const Ref& ref) const { return (ref.buffer == 0 ? arena.as<float>() : external[ref.buffer - 1]) + ref.offset; }
    // Scratch of the thread that runs with `slot`; the content is lost between calls.
    float* scratch(int slot, size_t floats) {
        // On a huge page: kernels stream through it, and the prefetcher stops at the end of a small one.
        scratch_[slot].reserve(std::max(floats * sizeof(float), AlignedBuffer::kHuge));
        return scratch_[slot].as<float>();
    }
    // Gives the scratch of every thread the size of the largest, or `bytes` where that is more, so that later calls allocate nothing
    // whichever thread takes which work. Returns that size.
    size_t level_scratch(size_t bytes);
    AlignedBuffer arena;
    float* const* external = nullptr;
    int threads = 1;

  private:
    AlignedBuffer scratch_[kMaxThreads];
};

class Node {
  public:
    virtual ~Node() = default;
    virtual void run(Context& context) const = 0;
    std::string name;
};

// Activations after the sum: `clamp` happens in the kernel's last store, the others in a second pass over the tile.
struct Epilogue {
    Activation kind = Activation::none;
    float p0 = 0, p1 = 0;
    float low() const;
    float high() const;
    bool needs_pass() const { return kind != Activation::none && kind != Activation::clamp; }
};

class Plan {
  public:
    Plan(int64_t arena_floats, int externals) : arena_floats_(arena_floats), externals_(externals) {}
    void add(std::unique_ptr<Node> node) { nodes_.push_back(std::move(node)); }
    size_t size() const { return nodes_.size(); }
    int64_t arena_bytes() const { return (arena_floats_ + kSlack) * int64_t(sizeof(float)); }
    int externals() const { return externals_; }
    const Node& node(size_t i) const { return *nodes_[i]; }

    // pointers: one per external buffer. Thread-safe: every concurrent call works in an arena of its own.
    void run(float* const* pointers, int threads) const;
    // Runs the plan `count` times, item i with pointer b moved by i · strides[b] floats. With at least one item per thread each thread runs
    // whole items by itself: no barriers, and its activations stay in its own cache.
    void run_many(float* const* pointers, const int64_t* strides, int64_t count, int threads) const;
    // The same as run(), timed: seconds per node.
    std::vector<double> profile(float* const* pointers, int threads) const;
    // Runs only node i, `times` times, after everything before it has run once; the seconds of each time.
    std::vector<double> time_node(size_t i, float* const* pointers, int threads, int times) const;

  private:
    friend class PartedPlan;
    // Kernels read whole vectors: room for one past the end.
    static constexpr int64_t kSlack = 64;
    std::unique_ptr<Context> acquire(float* const* pointers, int threads) const;
    void release(std::unique_ptr<Context> context) const;
    std::unique_ptr<Context> make_context() const;
    void run_node(size_t i, Context& context) const;

    std::vector<std::unique_ptr<Node>> nodes_;
    int64_t arena_floats_;
    int externals_;
    // What a call works in is kept for the calls after it: only the first one allocates.
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Context>> idle_;
    mutable size_t contexts_ = 0;       // idle or in use
    mutable size_t scratch_bytes_ = 0;  // of each thread, the most that any call needed
};

// Plans that work on one part of the image each, in step: part p runs its nodes [ends[p][s-1], ends[p][s]) in stage s, and no part enters a
// stage before all have left the one before. Each part's thread keeps to its own arena, so hardly a cache line ever changes hands; what a
// part needs of its neighbours (the rows next to its own) it copies from their arenas at the beginning of a stage. The arenas are the last
// external buffers of every part, in the order of the parts.
class PartedPlan {
  public:
    // Throws std::invalid_argument unless every part has the same number of stages and its ends ascend to its number of nodes.
    PartedPlan(std::vector<std::shared_ptr<const Plan>> parts, std::vector<std::vector<size_t>> ends);
    // pointers: the external buffers but for the arenas.
    void run(float* const* pointers) const;
    // The same, timed: seconds of each node of each part.
    std::vector<std::vector<double>> profile(float* const* pointers) const;
    const Plan& part(size_t i) const { return *parts_[i]; }
    size_t parts() const { return parts_.size(); }

  private:
    struct Call {
        std::vector<std::unique_ptr<Context>> contexts;
        std::vector<float*> buffers;  // of every part: what was given, then all arenas
    };
    std::unique_ptr<Call> acquire() const;
    template <class RunNode>
    void run_stages(float* const* pointers, const RunNode& run_node) const;

    std::vector<std::shared_ptr<const Plan>> parts_;
    std::vector<std::vector<size_t>> ends_;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Call>> idle_;
    mutable size_t calls_ = 0;  // idle or in use
};

}  // namespace sparse_engine
