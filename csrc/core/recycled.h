// Large memory that is taken and given back again and again: a gradient of every step.
#pragma once

#include <cstddef>

#include "core/memory.h"

namespace sparse_engine {

// At least so many bytes of any content; throws std::bad_alloc. The block that was given back last is kept for the next one of about its
// size, since the system clears every page of a new one: for a large output that takes longer than to compute it. The system may take the
// kept block's pages when it needs memory.
class RecycledMemory {
  public:
    explicit RecycledMemory(size_t bytes);
    ~RecycledMemory();
    RecycledMemory(const RecycledMemory&) = delete;
    RecycledMemory& operator=(const RecycledMemory&) = delete;

    char* data() const { return block_.as<char>(); }
    size_t bytes() const { return bytes_; }  // asked for

  private:
    AlignedBuffer block_;
    size_t bytes_;
};

}  // namespace sparse_engine
