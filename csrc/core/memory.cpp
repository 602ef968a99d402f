#include "core/memory.h"

#include <algorithm>
#include <cstdint>
#include <list>
#include <mutex>

namespace sparse_engine {
namespace {

constexpr size_t kChunk = size_t(4) << 20;

struct Chunk {
    AlignedBuffer memory;
    size_t used = 0;    // bytes handed out so far; they are not handed out again before the chunk is empty
    size_t pieces = 0;  // not yet given back
    bool holds(const void* p) const {
        auto first = reinterpret_cast<uintptr_t>(memory.as<char>()), at = reinterpret_cast<uintptr_t>(p);
        return at >= first && at < first + memory.bytes();
    }
};

struct Chunks {
    std::mutex mutex;
    std::list<Chunk> all;  // the newest in front
};

Chunks& chunks() {
    static Chunks* instance = new Chunks;  // never destroyed: arrays may outlive static destruction order
    return *instance;
}

size_t rounded(size_t bytes) { return (std::max<size_t>(bytes, 1) + 63) / 64 * 64; }

}  // namespace

void* shared_pages_allocate(size_t bytes) {
    bytes = rounded(bytes);
    Chunks& c = chunks();
    std::lock_guard lock(c.mutex);
    if (c.all.empty() || c.all.front().used + bytes > c.all.front().memory.bytes()) {
        Chunk chunk{AlignedBuffer(std::max(bytes, kChunk))};
        // What is larger than a chunk gets one of its own; the one in use stays in front.
        bool whole = bytes >= kChunk && !c.all.empty();
        auto where = c.all.insert(whole ? std::next(c.all.begin()) : c.all.begin(), std::move(chunk));
        where->used = bytes, where->pieces = 1;
        return where->memory.as<char>();
    }
    Chunk& chunk = c.all.front();
    void* p = chunk.memory.as<char>() + chunk.used;
    chunk.used += bytes, chunk.pieces++;
    return p;
}

void shared_pages_free(void* p, size_t) noexcept {
    Chunks& c = chunks();
    std::lock_guard lock(c.mutex);
    auto chunk = std::find_if(c.all.begin(), c.all.end(), [&](const Chunk& one) { return one.holds(p); });
    if (chunk != c.all.end() && --chunk->pieces == 0) c.all.erase(chunk);
}

}  // namespace sparse_engine
