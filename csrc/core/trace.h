// Which thread worked on which node when. The calls of a thread are recorded while it has a Trace; all others pay one test of a pointer per
// node and per job.
//
//   calling thread   |conv1 ........|  |conv2 ......|    |      a TracedNode around each node; a gap is waiting
//   worker 1            |conv1 ...|     |conv2 .......|  |      reported by the pool, when a thread has no more items
//
// Jobs that are no node's (a batch in passes, an image in bands) hand the position on to the threads that take part, so that the nodes they
// run are recorded on them.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace sparse_engine {

class Trace;
class TracedNode;

// Where a thread is in a traced call.
struct TracePosition {
    Trace* trace = nullptr;
    TracedNode* node = nullptr;  // the one that is running; nothing inside it is recorded for itself
    int band = -1;               // of the image, or -1
    int64_t pass = -1;           // over the plan, where a batch runs in several, or -1
    bool begins_nodes() const { return trace && !node; }
};

inline constinit thread_local TracePosition trace_position;
// 0 on every thread that is not the pool's.
inline constinit thread_local int pool_worker = 0;

// Sets the thread's position for a while.
class TraceScope {
  public:
    explicit TraceScope(const TracePosition& position) : before_(trace_position) { trace_position = position; }
    ~TraceScope() { trace_position = before_; }
    TraceScope(const TraceScope&) = delete;
    TraceScope& operator=(const TraceScope&) = delete;

  private:
    TracePosition before_;
};

class Trace {
  public:
    using Clock = std::chrono::steady_clock;
    using Time = Clock::time_point;

    // What one thread did for one node, once.
    struct Span {
        std::string name;
        int thread;  // 0 = the thread that made the call, else the worker's number in the pool
        int band;
        int64_t pass;
        double start_us, duration_us;  // since the trace began
        double busy_us;                // of the duration: without waiting for other threads
        int64_t items;                 // of work that was handed out; 0 where the node has one thread
    };

    Trace() : began_(Clock::now()), scope_(TracePosition{this, nullptr, -1, -1}) {}
    Trace(const Trace&) = delete;
    Trace& operator=(const Trace&) = delete;

    // In the order of their beginnings; what runs now is not in it.
    std::vector<Span> spans() const;
    double microseconds_since_begin() const { return microseconds(Clock::now() - began_); }
    static double microseconds(Clock::duration d) { return std::chrono::duration<double, std::micro>(d).count(); }

  private:
    friend class TracedNode;
    mutable std::mutex mutex_;
    std::vector<Span> spans_;
    Time began_;
    TraceScope scope_;
};

// Around the run of a node, on the thread that runs the plan; only where trace_position.begins_nodes().
class TracedNode {
  public:
    explicit TracedNode(const std::string& name);
    ~TracedNode();
    TracedNode(const TracedNode&) = delete;
    TracedNode& operator=(const TracedNode&) = delete;

    // By the pool: a thread took part in a job of this node. Before the job counts as done.
    void worked(Trace::Time from, Trace::Time to, int64_t items);
    // By the pool, on the thread that runs the plan: all threads are done with the job.
    void joined(Trace::Time at);

  private:
    struct Piece {
        int thread;
        Trace::Time from, to;
        Trace::Clock::duration busy;
        int64_t items;
    };
    Piece* piece_of(int thread);  // with the trace's mutex held

    const std::string& name_;
    Trace& trace_;
    Trace::Time from_, joined_;
    Trace::Clock::duration waited_{0};
    std::vector<Piece> pieces_;
};

}  // namespace sparse_engine
