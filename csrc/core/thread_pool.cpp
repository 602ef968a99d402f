#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/cpu_features.h"
#include "core/host_team.h"
#include "core/trace.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define SE_PAUSE() _mm_pause()
#else
#define SE_PAUSE() std::this_thread::yield()
#endif

namespace sparse_engine {
namespace {

// Spinning covers the gap between two nodes of one plan; anything longer parks, so an idle process uses no CPU.
constexpr int kSpins = 2000;
// The same for a job that was announced.
constexpr int kExpectingSpins = 16000;
// How long a thread is watched before it counts as stopped: about ten microseconds.
constexpr int kLook = 500;

// Items [begin, end), both in one word so that its owner (from the front) and thieves (from the back) take them without a lock.
struct alignas(64) Range {
    std::atomic<uint64_t> word{0};
    static uint64_t pack(uint64_t begin, uint64_t end) { return begin << 32 | end; }
    bool take(bool from_front, int64_t* item) {
        uint64_t old = word.load(std::memory_order_relaxed);
        for (;;) {
            uint64_t begin = old >> 32, end = old & 0xffffffff;
            if (begin >= end) return false;
            uint64_t next = from_front ? pack(begin + 1, end) : pack(begin, end - 1);
            if (word.compare_exchange_weak(old, next, std::memory_order_relaxed)) {
                *item = static_cast<int64_t>(from_front ? begin : end - 1);
                return true;
            }
        }
    }
    int64_t left() const {
        uint64_t now = word.load(std::memory_order_relaxed);
        uint64_t begin = now >> 32, end = now & 0xffffffff;
        return begin < end ? static_cast<int64_t>(end - begin) : 0;
    }
};

struct alignas(64) Job {
    const WorkFunction* body = nullptr;
    int threads = 0;
    int max_helpers = 0;
    int caller_core = -1;
    TracePosition position;  // of the caller, where its call is traced
    // One range per thread: successive jobs over the same pixels then find them in the same core's cache.
    Range ranges[kMaxThreads];
    std::atomic<int> threads_at[kMaxThreads] = {};  // the system's number of the thread that works with a slot, 0 where none does
    alignas(64) std::atomic<int64_t> unfinished{0};
    std::atomic<int> next_slot{1};
    int helpers = 0;  // guarded by Pool::mutex_: workers that hold a pointer to this job
};

int available_cores() {
    cpu_set_t set;
    // cpu_info() knows the container's quota too: more threads than that would be stopped in the middle of their work.
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, std::min(CPU_COUNT(&set), cpu_info().available_cpus));
    return std::max(1u, std::thread::hardware_concurrency());
}

int current_core() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

// On a busy machine the system wakes a worker where its waker runs, and the two then take turns on one core. Such a worker moves away by
// itself.
void leave_core(int core) {
#ifdef __linux__
    cpu_set_t all, others;
    if (sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) < 2) return;
    others = all;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) == CPU_COUNT(&all)) return;
    if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof all, &all);
#else
    (void)core;
#endif
}

// A thread that this one waits for, or is about to leave alone, may have been stopped: beside a busy neighbour it stands in its core's
// queue for milliseconds. If it does not run, it comes to this core, which has nothing else to do.
void fetch_if_stopped(int thread) {
#ifdef __linux__
    const int64_t before = processor_time(thread);
    if (before < 0) return;
    for (int spin = 0; spin < kLook; spin++) SE_PAUSE();
    if (processor_time(thread) != before) return;
    cpu_set_t allowed, here;
    const int core = sched_getcpu();
    if (core < 0 || sched_getaffinity(thread, sizeof allowed, &allowed) != 0 || !CPU_ISSET(core, &allowed)) return;
    CPU_ZERO(&here);
    CPU_SET(core, &here);
    if (sched_setaffinity(thread, sizeof here, &here) == 0) sched_setaffinity(thread, sizeof allowed, &allowed);
#else
    (void)thread;
#endif
}

class Pool {
  public:
    Pool() : threads_(std::min(available_cores(), kMaxThreads)) {}

    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
            version_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return threads_.load(std::memory_order_relaxed); }
    void set_threads(int n) { threads_ = n <= 0 ? std::min(available_cores(), kMaxThreads) : std::min(n, kMaxThreads); }

    void run(int64_t items, int threads, const WorkFunction& body) {
        threads = static_cast<int>(std::min<int64_t>(std::min(threads, kMaxThreads), items));
        if (threads <= 1) {
            for (int64_t i = 0; i < items; i++) body(i, 0);
            return;
        }
        const Caller caller;
        Job job;
        job.body = &body;
        job.threads = threads;
        for (int t = 0; t < threads; t++)
            job.ranges[t].word.store(Range::pack(items * t / threads, items * (t + 1) / threads), std::memory_order_relaxed);
        job.unfinished.store(items, std::memory_order_relaxed);
        job.max_helpers = threads - 1;
        job.caller_core = current_core();
        job.position = trace_position;
        if (caller.alone() && host_team_spins(threads)) return run_on_team(job);
        bool someone_parked;
        {
            std::lock_guard lock(mutex_);
            while (static_cast<int>(workers_.size()) < threads - 1) start_worker();
            jobs_.push_back(&job);
            version_.fetch_add(1, std::memory_order_release);
            someone_parked = parked_ > 0 && may_help();
        }
        if (someone_parked) {
            if (threads == 2) {
                wake_.notify_one();
            } else {
                wake_.notify_all();
            }
        }
        drain(job, 0);
        {
            std::lock_guard lock(mutex_);
            jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        }
        // No worker can join any more. Wait for those that did: for their items, and until they have let go of the job.
        wait_for_items(job);
        std::unique_lock lock(mutex_);
        done_.wait(lock, [&] { return job.unfinished.load(std::memory_order_acquire) == 0 && job.helpers == 0; });
        if (job.position.node) [[unlikely]]
            job.position.node->joined(Trace::Clock::now());
    }

    void expect_job() {
        if (threads() > 1 && host_team_spins(threads())) return;
        bool someone_parked;
        {
            std::lock_guard lock(mutex_);
            if (workers_.empty()) return;
            expecting_ = true;
            version_.fetch_add(1, std::memory_order_release);
            someone_parked = parked_ > 0;
        }
        if (someone_parked) wake_.notify_all();
    }

  private:
    static void run_on_team(Job& job) {
        struct Task {
            Job& job;
            std::exception_ptr error;  // of the caller; as on a worker, there is nobody to tell of another thread's
        } task{job, nullptr};
        run_on_host_team(
            [](void* given, int member) {
                Task& mine = *static_cast<Task*>(given);
                if (member >= mine.job.threads) return;
                const int number = std::exchange(pool_worker, member);
                try {
                    drain(mine.job, member);
                } catch (...) {
                    if (member) std::terminate();
                    mine.error = std::current_exception();
                }
                pool_worker = number;
            },
            &task, [](int thread) { fetch_if_stopped(thread); });
        if (task.error) std::rethrow_exception(task.error);
        if (job.position.node) [[unlikely]]
            job.position.node->joined(Trace::Clock::now());
    }

    // The caller has no more items to take: waits for those that others have taken, for a while.
    static void wait_for_items(const Job& job) {
        for (int spin = 0; spin < kSpins && job.unfinished.load(std::memory_order_acquire) != 0; spin++) SE_PAUSE();
        for (int slot = 1; slot < job.threads && job.unfinished.load(std::memory_order_acquire) != 0; slot++)
            if (int thread = job.threads_at[slot].load(std::memory_order_relaxed)) fetch_if_stopped(thread);
    }

    void start_worker() {  // with mutex_ held
        const int number = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, number] {
            pool_worker = number;
            work();
        });
    }

    static void drain(Job& job, int slot) {
        job.threads_at[slot].store(thread_id(), std::memory_order_relaxed);
        const int64_t finished = job.position.trace ? drain_traced(job, slot) : drain_items(job, slot);
        job.threads_at[slot].store(0, std::memory_order_relaxed);
        if (finished) job.unfinished.fetch_sub(finished, std::memory_order_acq_rel);
    }

    static int64_t drain_traced(Job& job, int slot) {
        if (!job.position.node) {  // the items are whole plans, whose nodes are recorded
            TraceScope scope(job.position);
            return drain_items(job, slot);
        }
        TraceScope scope{TracePosition()};
        const Trace::Time from = Trace::Clock::now();
        const int64_t finished = drain_items(job, slot);
        if (finished || slot == 0) job.position.node->worked(from, Trace::Clock::now(), finished);
        return finished;
    }

    static int64_t drain_items(Job& job, int slot) {
        int64_t finished = 0, item;
        while (job.ranges[slot].take(true, &item)) {
            (*job.body)(item, slot);
            finished++;
        }
        for (;;) {  // help where most is left
            int most = -1;
            for (int t = 0; t < job.threads; t++)
                if (job.ranges[t].left() > (most < 0 ? 0 : job.ranges[most].left())) most = t;
            if (most < 0) break;
            if (!job.ranges[most].take(false, &item)) continue;
            (*job.body)(item, slot);
            finished++;
        }
        return finished;
    }

    static bool has_work(const Job& job) {
        for (int t = 0; t < job.threads; t++)
            if (job.ranges[t].left() > 0) return true;
        return false;
    }

    // With as many callers at work as there are threads, one more would only take turns with them. With mutex_ held.
    bool may_help() const { return static_cast<int>(jobs_.size()) < std::max(2, threads()); }

    Job* pick() {  // with mutex_ held
        Job* best = nullptr;
        if (!may_help()) return best;
        for (Job* job : jobs_)
            if (job->helpers < job->max_helpers && has_work(*job) && (!best || job->helpers < best->helpers)) best = job;
        return best;
    }

    // A caller at work for so long without a new job may have been stopped, while this thread has nothing to do.
    void fetch_stopped_caller() {
        int caller = 0;
        {
            std::lock_guard lock(mutex_);
            for (const Job* job : jobs_)
                if (int thread = job->threads_at[0].load(std::memory_order_relaxed)) caller = thread;
        }
        if (caller) fetch_if_stopped(caller);
    }

    void work() {
        for (;;) {
            uint64_t seen = version_.load(std::memory_order_acquire);
            Job* job = nullptr;
            int spins = kSpins;
            {
                std::unique_lock lock(mutex_);
                if (stop_) return;
                job = pick();
                if (job) {
                    job->helpers++;
                    expecting_ = false;
                } else if (expecting_) {
                    spins = kExpectingSpins;
                }
            }
            if (job) {
                if (job->caller_core >= 0 && current_core() == job->caller_core) leave_core(job->caller_core);
                drain(*job, job->next_slot.fetch_add(1, std::memory_order_relaxed));
                std::lock_guard lock(mutex_);
                job->helpers--;
                // A slot is used once per job and worker visit; a worker never visits a drained job again.
                done_.notify_all();
                continue;
            }
            bool changed = false;
            for (int spin = 0; spin < spins && !changed; spin++) {
                SE_PAUSE();
                changed = version_.load(std::memory_order_acquire) != seen;
            }
            if (changed) continue;
            fetch_stopped_caller();
            std::unique_lock lock(mutex_);
            expecting_ = false;
            parked_++;
            wake_.wait(lock, [&] { return stop_ || version_.load(std::memory_order_relaxed) != seen; });
            parked_--;
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::vector<Job*> jobs_;
    std::atomic<uint64_t> version_{0};
    std::atomic<int> threads_;
    int parked_ = 0;
    bool expecting_ = false;
    bool stop_ = false;
};

Pool& pool() {
    static Pool* instance = new Pool;  // never destroyed: workers may outlive static destruction order
    return *instance;
}

}  // namespace

int num_threads() { return pool().threads(); }
void set_num_threads(int n) { pool().set_threads(n); }
void expect_job() { pool().expect_job(); }
void parallel_for(int64_t items, int threads, const WorkFunction& body) {
    constexpr int64_t kMost = INT32_MAX;  // of one job: a range is two 32-bit numbers
    for (int64_t first = 0; first < items; first += kMost) {
        if (items <= kMost) {
            pool().run(items, threads, body);
        } else {
            pool().run(std::min(kMost, items - first), threads, [&](int64_t item, int slot) { body(first + item, slot); });
        }
    }
}

}  // namespace sparse_engine
