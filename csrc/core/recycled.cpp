#include "core/recycled.h"

#include <mutex>

namespace sparse_engine {
namespace {

struct Spare {
    std::mutex mutex;
    AlignedBuffer block;
};

Spare& spare() {
    static Spare* instance = new Spare;  // never destroyed: tensors may outlive static destruction order
    return *instance;
}

}  // namespace

RecycledMemory::RecycledMemory(size_t bytes) : bytes_(bytes) {
    {
        std::lock_guard lock(spare().mutex);
        const size_t kept = spare().block.bytes();
        if (kept >= bytes && kept / 2 <= bytes) block_ = std::move(spare().block);
    }
    block_.reserve(bytes);
}

RecycledMemory::~RecycledMemory() {
#if defined(__linux__) && defined(MADV_FREE)
    if (block_.bytes() >= AlignedBuffer::kHuge) madvise(block_.as<char>(), block_.bytes(), MADV_FREE);
#endif
    std::lock_guard lock(spare().mutex);
    spare().block = std::move(block_);  // and the one before it goes with this object
}

}  // namespace sparse_engine
