// Memory that kernels like: 64-byte aligned, on huge pages where the system has them (a tile touches one page per channel plane).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sparse_engine {

class AlignedBuffer {
  public:
    AlignedBuffer() = default;
    explicit AlignedBuffer(size_t bytes) { allocate(bytes); }
    AlignedBuffer(AlignedBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;
    ~AlignedBuffer() {
        if (data_) free();
    }

    // Keeps the old block when it is large enough. The content is not kept.
    void reserve(size_t bytes) {
        if (bytes > bytes_) *this = AlignedBuffer(bytes);
    }
    template <class T = float>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    size_t bytes() const { return bytes_; }

    static constexpr size_t kHuge = size_t(2) << 20;  // from this size on, huge pages
    // Of the whole process so far, for tests: operator new knows nothing of these.
    inline static std::atomic<int64_t> allocations{0};

  private:
    void allocate(size_t bytes) {
        size_t alignment = bytes >= kHuge ? kHuge : 64;
        bytes_ = (bytes + alignment - 1) / alignment * alignment;
        if (bytes_ == 0) return;
        allocations.fetch_add(1, std::memory_order_relaxed);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (alignment == kHuge) {
            // Straight from the system: what malloc hands out may have been touched before, and pages are huge only from their first touch.
            void* all = mmap(nullptr, bytes_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (all == MAP_FAILED) throw std::bad_alloc();
            size_t before = (kHuge - reinterpret_cast<size_t>(all) % kHuge) % kHuge;
            if (before) munmap(all, before);
            data_ = static_cast<char*>(all) + before;
            if (before < kHuge) munmap(data_ + bytes_, kHuge - before);
            madvise(data_, bytes_, MADV_HUGEPAGE);
            return;
        }
#endif
        data_ = static_cast<char*>(std::aligned_alloc(alignment, bytes_));
        if (!data_) throw std::bad_alloc();
    }
    void free() {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (bytes_ >= kHuge) {
            munmap(data_, bytes_);
            return;
        }
#endif
        std::free(data_);
    }
    char* data_ = nullptr;
    size_t bytes_ = 0;
};

// A piece of memory that many small packed arrays share, so that together they lie on huge pages: a network's weights are read once per
// call, from thousands of ordinary pages, and each of those would cost a page walk.
void* shared_pages_allocate(size_t bytes);  // 64-byte aligned; throws std::bad_alloc
void shared_pages_free(void* p, size_t bytes) noexcept;

template <class T>
struct SharedPages {
    using value_type = T;
    SharedPages() = default;
    template <class U>
    SharedPages(const SharedPages<U>&) {}  // NOLINT: what std::allocator_traits asks for
    T* allocate(size_t n) { return static_cast<T*>(shared_pages_allocate(n * sizeof(T))); }
    void deallocate(T* p, size_t n) noexcept { shared_pages_free(p, n * sizeof(T)); }
    bool operator==(const SharedPages&) const { return true; }
    bool operator!=(const SharedPages&) const { return false; }
};

}  // namespace sparse_engine
