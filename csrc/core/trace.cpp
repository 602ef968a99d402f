#include "core/trace.h"

#include <algorithm>

namespace sparse_engine {
namespace {

// After its last job a node only returns; what takes longer is work of its own.
constexpr auto kReturning = std::chrono::microseconds(1);

}  // namespace

std::vector<Trace::Span> Trace::spans() const {
    std::lock_guard lock(mutex_);
    std::vector<Span> sorted = spans_;
    std::stable_sort(sorted.begin(), sorted.end(), [](const Span& a, const Span& b) { return a.start_us < b.start_us; });
    return sorted;
}

TracedNode::TracedNode(const std::string& name) : name_(name), trace_(*trace_position.trace) {
    trace_position.node = this;
    from_ = joined_ = Trace::Clock::now();
}

TracedNode::~TracedNode() {
    const Trace::Time end = Trace::Clock::now();
    trace_position.node = nullptr;
    std::lock_guard lock(trace_.mutex_);
    auto add = [&](int thread, Trace::Time from, Trace::Time to, Trace::Clock::duration busy, int64_t items) {
        trace_.spans_.push_back({name_, thread, trace_position.band, trace_position.pass, Trace::microseconds(from - trace_.began_),
                                 Trace::microseconds(to - from), Trace::microseconds(busy), items});
    };
    // This thread's span ends with its own last work: for the rest it waited.
    const Piece* own = piece_of(pool_worker);
    const Trace::Time to = own && end - joined_ <= kReturning ? own->to : end;
    add(pool_worker, from_, to, std::min(to - from_, end - from_ - waited_), own ? own->items : 0);
    for (const Piece& piece : pieces_)
        if (&piece != own) add(piece.thread, piece.from, piece.to, piece.busy, piece.items);
}

TracedNode::Piece* TracedNode::piece_of(int thread) {
    auto found = std::find_if(pieces_.begin(), pieces_.end(), [&](const Piece& piece) { return piece.thread == thread; });
    return found == pieces_.end() ? nullptr : &*found;
}

void TracedNode::worked(Trace::Time from, Trace::Time to, int64_t items) {
    std::lock_guard lock(trace_.mutex_);
    if (Piece* piece = piece_of(pool_worker)) {  // another job of this node
        piece->to = to, piece->busy += to - from, piece->items += items;
    } else {
        pieces_.push_back({pool_worker, from, to, to - from, items});
    }
}

void TracedNode::joined(Trace::Time at) {
    std::lock_guard lock(trace_.mutex_);
    if (const Piece* own = piece_of(pool_worker)) waited_ += at - own->to;
    joined_ = at;
}

}  // namespace sparse_engine
