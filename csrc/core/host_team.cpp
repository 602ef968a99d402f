#include "core/host_team.h"

#ifdef __linux__
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "core/thread_pool.h"

namespace sparse_engine {
namespace {

std::atomic<int> callers{0};

}  // namespace

Caller::Caller() : before_(callers.fetch_add(1, std::memory_order_relaxed)) {}
Caller::~Caller() { callers.fetch_sub(1, std::memory_order_relaxed); }

#ifdef __linux__

int thread_id() {
    static thread_local const int id = static_cast<int>(syscall(SYS_gettid));
    return id;
}

long long processor_time(int thread) {
    timespec used;
    const auto clock = static_cast<clockid_t>((~static_cast<unsigned>(thread) << 3) | 6);  // as pthread_getcpuclockid makes it
    if (thread > 0 && clock_gettime(clock, &used) == 0) return used.tv_sec * 1000000000LL + used.tv_nsec;
    return -1;
}

namespace {

// What GCC's OpenMP runtime offers, and others beside their own: a compiler calls the first for `#pragma omp parallel`.
struct OpenMP {
    void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
    int (*thread_number)() = nullptr;
    int (*team_size)() = nullptr;

    // Not linked: only what the program itself has brought, so that there are no two runtimes.
    OpenMP() {
        const char* wish = std::getenv("SPARSE_ENGINE_OPENMP");
        if (wish && std::strcmp(wish, "0") == 0) return;
        const auto find = [](auto& function, const char* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
            return function != nullptr;
        };
        if (!find(max_threads, "omp_get_max_threads") || !find(in_parallel, "omp_in_parallel") ||
            !find(thread_number, "omp_get_thread_num") || !find(team_size, "omp_get_num_threads") || !find(parallel, "GOMP_parallel"))
            parallel = nullptr;
    }
};

// A team does not survive a fork, though its leader thinks so. Registered when the module is loaded: the team may be PyTorch's.
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

const OpenMP& openmp() {
    static const OpenMP found;
    return found;
}

using Clock = std::chrono::steady_clock;
constexpr auto kLasts = std::chrono::microseconds(200);  // an answer
constexpr auto kShared = std::chrono::milliseconds(10);  // several threads count as callers for so long after one took turns with another

// Jobs keep the team awake by themselves. Where hardly any time passes between them, nobody else does, and it is let go for a while: our
// own threads sleep sooner, and do not wait for one that a busy neighbour holds up.
constexpr auto kWatched = std::chrono::milliseconds(50);
constexpr auto kLetGo = std::chrono::milliseconds(20);
constexpr int kHardlyAny = 25;  // one part of so many

// The team that the calling thread leads.
struct Team {
    int size = 0;
    std::array<std::atomic<int>, kMaxThreads> threads = {};  // the system's numbers
    Clock::time_point asked{};
    bool spins = false;
    Clock::time_point watched_from{}, job_ended{}, let_go_until{};
    Clock::duration between{};  // jobs, since then

    void job_begins(Clock::time_point now) {
        if (now - watched_from > 2 * kWatched) {  // after a pause
            watched_from = now, between = {};
            return;
        }
        between += now - job_ended;
        if (now - watched_from <= kWatched) return;
        if (between < (now - watched_from) / kHardlyAny) let_go_until = now + kLetGo;
        watched_from = now, between = {};
    }

    void meet(int wanted, Clock::time_point now) {
        size = wanted;
        asked = now, spins = false, let_go_until = now + kLetGo;  // by then those sleep again that only this has woken
        for (auto& thread : threads) thread.store(0, std::memory_order_relaxed);
        openmp().parallel(
            [](void* team) {
                const int number = openmp().thread_number();
                if (number < kMaxThreads) static_cast<Team*>(team)->threads[static_cast<size_t>(number)].store(thread_id());
            },
            this, static_cast<unsigned>(wanted), 0);
    }
    // Whether its second thread has used processor time between two looks: between regions it can only be looking for the next one.
    bool look() const {
        const int thread = threads[1].load(std::memory_order_relaxed);
        const long long before = processor_time(thread);
        return before >= 0 && processor_time(thread) > before;
    }
};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

constexpr int kPatience = 2000;  // looks at members that are not done yet, some tens of microseconds
thread_local Team team;
std::atomic<int64_t> jobs{0};
std::atomic<int> last_caller{0};
std::atomic<int64_t> shared_until{INT64_MIN};

// Teams of several callers would stand in each other's way, and each waits for all its members.
bool is_only_caller(Clock::time_point now) {
    const int64_t time = now.time_since_epoch().count();
    const int before = last_caller.exchange(thread_id(), std::memory_order_relaxed);
    if (before && before != thread_id())
        shared_until.store(time + std::chrono::duration_cast<Clock::duration>(kShared).count(), std::memory_order_relaxed);
    return time >= shared_until.load(std::memory_order_relaxed);
}

}  // namespace

bool host_team_spins(int threads) {
    const OpenMP& omp = openmp();
    if (!omp.parallel || forked.load(std::memory_order_relaxed)) return false;
    const Clock::time_point now = Clock::now();
    if (!is_only_caller(now)) return false;
    const int size = omp.max_threads();
    if (size < threads || size != num_threads() || omp.in_parallel()) return false;
    if (size != team.size) {
        team.meet(size, now);
    } else if (now - team.asked > kLasts) {
        team.spins = now >= team.let_go_until && team.look(), team.asked = now;
    }
    return team.spins;
}

void leave_host_team() { forked.store(true, std::memory_order_relaxed); }

void run_on_host_team(void (*body)(void* data, int member), void* data, void (*late)(int thread)) {
    struct Call {
        void (*body)(void*, int);
        void* data;
        void (*late)(int);
        Team* team;
        std::array<std::atomic<bool>, kMaxThreads> done = {};

        bool all_done(int members) const {
            return std::all_of(done.begin() + 1, done.begin() + members, [](const auto& d) { return d.load(std::memory_order_acquire); });
        }
        // A member that the system has stopped would be waited for where nobody can help it.
        void wait() {
            const int members = std::min(team->size, openmp().team_size());
            for (int spin = 0; spin < kPatience && !all_done(members); spin++) pause();
            for (size_t i = 1; i < static_cast<size_t>(members); i++)
                if (!done[i].load(std::memory_order_acquire)) late(team->threads[i].load(std::memory_order_relaxed));
        }
    } call{body, data, late, &team};
    jobs.fetch_add(1, std::memory_order_relaxed);
    team.job_begins(Clock::now());
    openmp().parallel(
        [](void* given) {
            Call& mine = *static_cast<Call*>(given);
            const int number = openmp().thread_number();
            mine.body(mine.data, number);
            mine.done[static_cast<size_t>(number)].store(true, std::memory_order_release);
            if (number == 0) mine.wait();
        },
        &call, static_cast<unsigned>(team.size), 0);
    team.job_ended = Clock::now();
}

int64_t jobs_on_host_team() { return jobs.load(std::memory_order_relaxed); }

#else

int64_t jobs_on_host_team() { return 0; }
int thread_id() { return 0; }
long long processor_time(int) { return -1; }
bool host_team_spins(int) { return false; }
void leave_host_team() {}
void run_on_host_team(void (*body)(void* data, int member), void* data, void (*)(int)) { body(data, 0); }

#endif

}  // namespace sparse_engine
