// The threads that the host program's OpenMP keeps for the calling thread, where it has any (PyTorch's kernels run on them).
//
// After each parallel region they look out for the next one for some milliseconds before they sleep. Threads of our own would share the
// cores with them meanwhile and get half. Those that spin take a job at once instead; those that sleep are left asleep.
#pragma once

#include <cstdint>

namespace sparse_engine {

// Whether a job of so many threads can run on threads that are awake: not where several threads call in turns, inside a parallel region, in
// a process that was forked, or where SPARSE_ENGINE_OPENMP=0. To be asked at each job; the answer of the last 200 µs counts again.
bool host_team_spins(int threads);

// body(data, member) on each member of the team, the caller as number 0. There may be fewer members than `host_team_spins` was asked for.
// Returns when all have.
void run_on_host_team(void (*body)(void* data, int member), void* data);

// How many jobs of this process have.
int64_t jobs_on_host_team();

// Processor time that a thread of this process has used, in nanoseconds; -1 where that is not known.
long long processor_time(int thread);
// The system's number of the calling thread; 0 where that is not known.
int thread_id();

}  // namespace sparse_engine
