// Runs a thread block on the CPU: every CUDA thread ("lane") is a fiber, and fibers meet at barriers and warp operations as the hardware's
// threads do. For tests only; device.h includes it when nvcc is not the compiler.
//
// What it checks that a GPU would not: a barrier or warp operation that not every lane reaches (reported, with the lanes' states), reads of
// shared memory before an asynchronous copy was waited for (the target is filled with 0xff bytes until then), accesses outside shared
// memory (address sanitizer), and lanes, of one block or of two, that touch the same memory without a barrier between them (thread
// sanitizer: each lane is a thread to it, and only barriers order them). Lanes can also be run last first, to see whether results depend on
// it.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SE_ASAN 1
#else
#define SE_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SE_TSAN 1
#define SE_UNWATCHED __attribute__((no_sanitize_thread, noinline))
#else
#define SE_TSAN 0
#define SE_UNWATCHED
#endif

namespace se::cuda::host {

constexpr int kWarp = 32;
constexpr int kMostLanes = 1024;
constexpr int kMostCopies = 256;
constexpr size_t kStackBytes = 128 * 1024;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

// An asynchronous copy that was issued and not yet waited for.
struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
    int group;
};

struct Lane {
    ucontext_t context;
    void* stack = nullptr;
    State state = State::kDone;
    const char* operation = "";
    uint64_t slot[2][4];  // what this lane offers to its warp; two, so that a fast lane's next operation cannot overwrite this one's
    int turn = 0;
    Copy copies[kMostCopies];
    int copy_count = 0;
    int group = 0;
    void* fake_stack = nullptr;
    void* fiber = nullptr;
};

struct Launch {
    unsigned grid[3];
    unsigned block[3];
    int threads;
    char* shared;
    int lane;
    Lane* lanes;
    ucontext_t scheduler;
    void* scheduler_fiber;
    void* scheduler_fake_stack;
    const void* scheduler_stack;
    size_t scheduler_stack_size;
    void (*body)(void*);
    void* argument;
    char start_token, end_token, barrier_token;
    char warp_token[kMostLanes / kWarp];
};

inline Launch*& current() {
    static Launch* launch = nullptr;
    return launch;
}

// Whether lanes run from the last to the first; results must not change.
inline bool& last_lane_first() {
    static bool reversed = false;
    return reversed;
}

SE_UNWATCHED inline void to_scheduler(Launch* launch) {
    Lane& lane = launch->lanes[launch->lane];
#if SE_ASAN
    __sanitizer_start_switch_fiber(&lane.fake_stack, launch->scheduler_stack, launch->scheduler_stack_size);
#endif
#if SE_TSAN
    __tsan_switch_to_fiber(launch->scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&lane.context, &launch->scheduler);
#if SE_ASAN
    __sanitizer_finish_switch_fiber(lane.fake_stack, &launch->scheduler_stack, &launch->scheduler_stack_size);
#endif
}

SE_UNWATCHED inline void to_lane(Launch* launch, int index) {
    launch->lane = index;
    Lane& lane = launch->lanes[index];
#if SE_ASAN
    __sanitizer_start_switch_fiber(&launch->scheduler_fake_stack, lane.stack, kStackBytes);
#endif
#if SE_TSAN
    __tsan_switch_to_fiber(lane.fiber, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&launch->scheduler, &lane.context);
#if SE_ASAN
    __sanitizer_finish_switch_fiber(launch->scheduler_fake_stack, nullptr, nullptr);
#endif
}

SE_UNWATCHED inline void wait_as(State state, const char* operation) {
    Launch* launch = current();
    Lane& lane = launch->lanes[launch->lane];
    lane.state = state;
    lane.operation = operation;
    to_scheduler(launch);
}

inline void ordered_after([[maybe_unused]] void* token) {
#if SE_TSAN
    __tsan_acquire(token);
#endif
}

inline void ordered_before([[maybe_unused]] void* token) {
#if SE_TSAN
    __tsan_release(token);
#endif
}

SE_UNWATCHED inline int lane_index() { return current()->lane; }
SE_UNWATCHED inline unsigned block_index(int axis) { return current()->block[axis]; }
SE_UNWATCHED inline unsigned grid_size(int axis) { return current()->grid[axis]; }
SE_UNWATCHED inline char* shared_memory() { return current()->shared; }
SE_UNWATCHED inline void* barrier_token() { return &current()->barrier_token; }
SE_UNWATCHED inline void* warp_token() { return &current()->warp_token[current()->lane / kWarp]; }
SE_UNWATCHED inline void* start_token() { return &current()->start_token; }
SE_UNWATCHED inline void* end_token() { return &current()->end_token; }

inline void barrier() {
    ordered_before(barrier_token());
    wait_as(State::kAtBarrier, "sync_threads");
    ordered_after(barrier_token());
}

inline void warp_barrier() {
    ordered_before(warp_token());
    wait_as(State::kAtWarp, "sync_warp");
    ordered_after(warp_token());
}

// Offers four numbers to the warp; after it, `offered` reads any lane's. Orders no memory, like a shuffle.
SE_UNWATCHED inline void offer(const char* operation, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    Launch* launch = current();
    Lane& lane = launch->lanes[launch->lane];
    lane.turn ^= 1;
    lane.slot[lane.turn][0] = a;
    lane.slot[lane.turn][1] = b;
    lane.slot[lane.turn][2] = c;
    lane.slot[lane.turn][3] = d;
    wait_as(State::kAtWarp, operation);
}

SE_UNWATCHED inline uint64_t offered(int lane_in_warp, int which) {
    Launch* launch = current();
    const Lane& own = launch->lanes[launch->lane];
    return launch->lanes[launch->lane / kWarp * kWarp + lane_in_warp].slot[own.turn][which];
}

SE_UNWATCHED inline Copy* next_copy() {
    Lane& lane = current()->lanes[current()->lane];
    if (lane.copy_count == kMostCopies) {
        std::fprintf(stderr, "host_block: more than %d asynchronous copies of one lane in flight\n", kMostCopies);
        std::abort();
    }
    Copy* copy = &lane.copies[lane.copy_count++];
    copy->group = lane.group;
    return copy;
}

// The copy happens as late as it may, when it is waited for; until then its target holds no number.
inline void copy_async(void* to, const void* from, int bytes, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes)) {
        std::fprintf(stderr, "host_block: asynchronous copy of %d bytes is not aligned (%p to %p)\n", bytes, from, to);
        std::abort();
    }
    Copy* copy = next_copy();
    const int group = copy->group;
    *copy = Copy{to, from, bytes, valid, group};
    std::memset(to, 0xff, bytes);
}

inline void copy_async_commit() { ++current()->lanes[lane_index()].group; }

inline void copy_async_wait(int newest_left) {
    Lane& lane = current()->lanes[lane_index()];
    int left = 0;
    for (int i = 0; i < lane.copy_count; ++i) {
        const Copy copy = lane.copies[i];
        if (copy.group < lane.group - newest_left) {
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, copy.bytes);
            } else {
                std::memset(copy.to, 0, copy.bytes);
            }
        } else {
            lane.copies[left++] = copy;
        }
    }
    lane.copy_count = left;
}

[[noreturn]] inline void report_stuck(const Launch* launch) {
    std::fprintf(stderr, "host_block: block (%u, %u, %u) is stuck:", launch->block[0], launch->block[1], launch->block[2]);
    for (int i = 0; i < launch->threads; ++i) {
        const Lane& lane = launch->lanes[i];
        if (i && lane.state == launch->lanes[i - 1].state && lane.operation == launch->lanes[i - 1].operation) continue;
        std::fprintf(stderr, " from lane %d %s;", i, lane.state == State::kDone ? "finished" : lane.operation);
    }
    std::fprintf(stderr, "\n");
    std::abort();
}

// Lets those go on who all wait for each other; returns whether anyone did.
SE_UNWATCHED inline bool release(Launch* launch) {
    bool any = false, all = true;
    for (int first = 0; first < launch->threads; first += kWarp) {
        bool together = true;
        for (int i = first; i < first + kWarp; ++i) {
            const Lane& lane = launch->lanes[i];
            all &= lane.state == State::kAtBarrier;
            together &= lane.state == State::kAtWarp && std::strcmp(lane.operation, launch->lanes[first].operation) == 0;
        }
        if (together) {
            for (int i = first; i < first + kWarp; ++i) launch->lanes[i].state = State::kReady;
            any = true;
        }
    }
    if (all) {
        for (int i = 0; i < launch->threads; ++i) launch->lanes[i].state = State::kReady;
    }
    return any || all;
}

SE_UNWATCHED inline void run_block(Launch* launch) {
    for (int i = 0; i < launch->threads; ++i) launch->lanes[i].state = State::kReady;
    for (;;) {
        bool ran = false, done = true;
        for (int n = 0; n < launch->threads; ++n) {
            const int i = last_lane_first() ? launch->threads - 1 - n : n;
            if (launch->lanes[i].state == State::kReady) {
                to_lane(launch, i);
                ran = true;
            }
            done &= launch->lanes[i].state == State::kDone;
        }
        if (done) return;
        if (!release(launch) && !ran) report_stuck(launch);
    }
}

inline void lane_main() {
    Launch* launch = current();
#if SE_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &launch->scheduler_stack, &launch->scheduler_stack_size);
#endif
    for (;;) {
        ordered_after(start_token());
        launch->body(launch->argument);
        Lane& lane = launch->lanes[lane_index()];
        if (lane.copy_count) {
            std::fprintf(stderr, "host_block: lane %d ended with %d copies never waited for\n", lane_index(), lane.copy_count);
            std::abort();
        }
        ordered_before(end_token());
        wait_as(State::kDone, "");
    }
}

// Runs `body` once per lane and block, blocks one after another. The contents of shared memory are 0xff bytes at first.
template <class Body>
void launch(unsigned grid_x, unsigned grid_y, unsigned grid_z, int threads, size_t shared_bytes, Body body) {
    if (threads % kWarp || threads > kMostLanes || !threads) {
        std::fprintf(stderr, "host_block: %d threads per block\n", threads);
        std::abort();
    }
    Launch* run = new Launch();
    run->grid[0] = grid_x, run->grid[1] = grid_y, run->grid[2] = grid_z;
    run->threads = threads;
    run->lanes = new Lane[threads];
    run->body = [](void* argument) { (*static_cast<Body*>(argument))(); };
    run->argument = &body;
    current() = run;
#if SE_TSAN
    run->scheduler_fiber = __tsan_get_current_fiber();
#endif
    const size_t stacks = static_cast<size_t>(threads) * kStackBytes;
    char* stack = static_cast<char*>(mmap(nullptr, stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (int i = 0; i < threads; ++i) {
        Lane& lane = run->lanes[i];
        lane.stack = stack + i * kStackBytes;
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack;
        lane.context.uc_stack.ss_size = kStackBytes;
        lane.context.uc_link = nullptr;
        makecontext(&lane.context, lane_main, 0);
#if SE_TSAN
        lane.fiber = __tsan_create_fiber(0);
#endif
    }
    const size_t blocks = static_cast<size_t>(grid_x) * grid_y * grid_z;
    char** memories = new char*[blocks];
    size_t made = 0;
    for (unsigned z = 0; z < grid_z; ++z) {
        for (unsigned y = 0; y < grid_y; ++y) {
            for (unsigned x = 0; x < grid_x; ++x) {
                // memory of its own for each block: blocks must not be ordered by sharing it
                char* shared = static_cast<char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128 + 128));
                std::memset(shared, 0xff, shared_bytes);
                memories[made++] = shared;
                run->shared = shared;
                run->block[0] = x, run->block[1] = y, run->block[2] = z;
                ordered_before(&run->start_token);
                run_block(run);
            }
        }
    }
    ordered_after(&run->end_token);
    for (size_t i = 0; i < made; ++i) std::free(memories[i]);
    delete[] memories;
#if SE_TSAN
    for (int i = 0; i < threads; ++i) __tsan_destroy_fiber(run->lanes[i].fiber);
#endif
    munmap(stack, stacks);
    delete[] run->lanes;
    delete run;
    current() = nullptr;
}

}  // namespace se::cuda::host
