// One process-wide pool of workers that hand out work dynamically, spin briefly and then park.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace sparse_engine {

// A borrowed callable `void(int64_t item, int slot)`; `slot` is < the number of threads and unique among the threads of one job.
class WorkFunction {
  public:
    template <class F>
    WorkFunction(const F& f)  // NOLINT: implicit on purpose, so that a lambda can be passed
        : object_(&f), call_([](const void* o, int64_t item, int slot) { (*static_cast<const F*>(o))(item, slot); }) {}
    void operator()(int64_t item, int slot) const { call_(object_, item, slot); }

  private:
    const void* object_;
    void (*call_)(const void*, int64_t, int);
};

// How many threads (the caller included) one job may use. At least 1.
int num_threads();
// Sets the number of threads for jobs that start from now on; starts workers as needed. n <= 0 means one per available core.
void set_num_threads(int n);
// Upper bound of `slot` + 1 over every job that may run: size of per-thread scratch tables.
constexpr int kMaxThreads = 64;

// Runs body(item, slot) for item = 0 … items-1, on the caller and on idle workers. Returns when all items are done.
// Each thread starts on its own contiguous share of the items (thread t of n on the t-th of n parts), one item at a time, and then helps
// the others from the back: neighbouring items stay on one core from job to job, and a worker that the system has descheduled holds up at
// most one item (on the host's team, core/host_team.h, it is fetched, but waited for). Safe to call from several threads at once: each
// caller always works on its own job, idle workers help wherever work is left.
void parallel_for(int64_t items, int threads, const WorkFunction& body);

// A job follows in a moment: workers that sleep wake up now, and look out for it longer than usual (some 200 µs). To wake one takes 20 to
// 50 µs, which a caller that has things to prepare need not wait for.
void expect_job();

}  // namespace sparse_engine
