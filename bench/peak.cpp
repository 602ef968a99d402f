// Fused multiply-adds on registers only, as fast as the processor goes: the peak that shares of peak refer to.
// One thread per call; `seconds` is how long, about. Returns operations per second.
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <thread>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

extern "C" double fma_peak(double seconds, float one, float zero) {
    constexpr int kChains = 12, kSteps = 4096;
    const Vector start = Vector{} + one;
    // Named one by one: an array would live in memory.
    Vector a = start, b = start, c = start, d = start, e = start, f = start, g = start, h = start, i = start, j = start, k = start,
           l = start;
    const Vector factor = Vector{} + one, add = Vector{} + zero;
    double best = 0, spent = 0;
    while (spent < seconds) {
        const auto begin = std::chrono::steady_clock::now();
        for (int step = 0; step < kSteps; step++) {
            a = a * factor + add, b = b * factor + add, c = c * factor + add, d = d * factor + add;
            e = e * factor + add, f = f * factor + add, g = g * factor + add, h = h * factor + add;
            i = i * factor + add, j = j * factor + add, k = k * factor + add, l = l * factor + add;
            asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l));
        }
        const double time = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        spent += time;
        if (2.0 * kLanes * kChains * kSteps / time > best) best = 2.0 * kLanes * kChains * kSteps / time;
    }
    return best;
}

// Nanoseconds for a word to go from one core to another, half a round trip: small where cores share a cache, large where they do not (in
// virtual machines this can change from minute to minute).
extern "C" double core_to_core_ns(int first, int second) {
    alignas(128) static std::atomic<int> word;
    constexpr int kTrips = 20000;
    const auto pin = [](int core) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(core, &set);
        pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    };
    word = 0;
    double seconds = 0;
    std::thread one([&] {
        pin(first);
        const auto begin = std::chrono::steady_clock::now();
        for (int trip = 0; trip < kTrips; trip++) {
            word.store(2 * trip + 1);
            while (word.load() != 2 * trip + 2) {
            }
        }
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    });
    std::thread other([&] {
        pin(second);
        for (int trip = 0; trip < kTrips; trip++) {
            while (word.load() != 2 * trip + 1) {
            }
            word.store(2 * trip + 2);
        }
    });
    one.join(), other.join();
    return seconds / kTrips / 2 * 1e9;
}
