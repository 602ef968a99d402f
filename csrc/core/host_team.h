// The threads that the host program's OpenMP keeps for the calling thread, where it has any (PyTorch's kernels run on them).
//
// After each parallel region they look out for the next one for some milliseconds before they sleep. Threads of our own would share the
// cores with them meanwhile and get half. Those that spin take a job at once instead; those that sleep are left asleep.
#pragma once

#include <cstdint>

namespace sparse_engine {

// Marks its thread as the caller of a job for as long as it lives.
class Caller {
  public:
    Caller();
    ~Caller();
    Caller(const Caller&) = delete;
    Caller& operator=(const Caller&) = delete;
    bool alone() const { return before_ == 0; }  // nobody else had a job when this one began

  private:
    int before_;
};

// Whether a job of so many threads can run on threads that are awake: not where several threads call in turns, where the program's teams
// have another size than our jobs, inside a parallel region, in a process that was forked, or where SPARSE_ENGINE_OPENMP=0. To be asked at
// each job; the answer of the last 200 µs counts again.
bool host_team_spins(int threads);
// Never again in this process: in a child that was forked with PyTorch loaded, a team may exist whose threads do not.
void leave_host_team();

// body(data, member) on each member of the team, the caller as number 0; it must not throw. There may be fewer members than
// `host_team_spins` was asked for. Returns when all have; late(thread) is called for those that keep the caller waiting, by the system's
// numbers.
void run_on_host_team(void (*body)(void* data, int member), void* data, void (*late)(int thread));

// How many jobs of this process have.
int64_t jobs_on_host_team();

// Processor time that a thread of this process has used, in nanoseconds; -1 where that is not known.
long long processor_time(int thread);
// The system's number of the calling thread; 0 where that is not known.
int thread_id();

}  // namespace sparse_engine
