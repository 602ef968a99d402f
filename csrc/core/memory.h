// Memory that kernels like: 64-byte aligned, on huge pages where the system has them (a tile touches one page per channel plane).
#pragma once

#include <cstddef>
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
    ~AlignedBuffer() { std::free(data_); }

    // Keeps the old block when it is large enough. The content is not kept.
    void reserve(size_t bytes) {
        if (bytes > bytes_) *this = AlignedBuffer(bytes);
    }
    template <class T = float>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    size_t bytes() const { return bytes_; }

  private:
    void allocate(size_t bytes) {
        constexpr size_t kHuge = size_t(2) << 20;
        size_t alignment = bytes >= kHuge ? kHuge : 64;
        bytes_ = (bytes + alignment - 1) / alignment * alignment;
        if (bytes_ == 0) return;
        data_ = static_cast<char*>(std::aligned_alloc(alignment, bytes_));
        if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (alignment == kHuge) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    }
    char* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace sparse_engine
