#include "runtime/peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "core/thread_pool.h"
#include "cpu/kernels.h"

namespace sparse_engine {

double fma_peak(double seconds, int threads) {
    using Clock = std::chrono::steady_clock;
    if (threads <= 0) threads = num_threads();
    threads = std::min(threads, kMaxThreads);
    const KernelTable& k = kernels();
    std::vector<double> best(static_cast<size_t>(threads), 0.0);
    // One item per thread. Should one thread get two, they run one after the other at the same speed, and the sum still holds.
    parallel_for(threads, threads, [&](int64_t item, int) {
        double spent = 0;
        volatile float kept = 0;
        while (spent < seconds) {
            float result;
            auto begin = Clock::now();
            int64_t operations = k.fma_chains(4096, 1.0f, 0.0f, &result);
            double time = std::chrono::duration<double>(Clock::now() - begin).count();
            kept = result;
            spent += time;
            best[static_cast<size_t>(item)] = std::max(best[static_cast<size_t>(item)], static_cast<double>(operations) / time);
        }
        (void)kept;
    });
    double sum = 0;
    for (double rate : best) sum += rate;
    return sum;
}

}  // namespace sparse_engine
