// Counts what a process allocates, by who asks for it: built and preloaded by `python -m bench.runtime memory` (glibc only).
//
// malloc and its relatives and operator new are replaced by the same with a counter in front; a call belongs to the library that it returns
// to, so that the core's own allocations stand apart from those of PyTorch and Python.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);
}

namespace {

std::atomic<bool> counting{false};
std::atomic<int64_t> of_core{0}, of_others{0};

void note(const void* caller) {
    if (!counting.load(std::memory_order_relaxed)) return;
    Dl_info where;
    const bool core = dladdr(caller, &where) && where.dli_fname && std::strstr(where.dli_fname, "sparse_engine/_C");
    (core ? of_core : of_others)++;
}

}  // namespace

#define NOTE() note(__builtin_return_address(0))

extern "C" {
void* malloc(size_t n) { return NOTE(), __libc_malloc(n); }
void* calloc(size_t n, size_t size) { return NOTE(), __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { return NOTE(), __libc_realloc(p, n); }
void* memalign(size_t alignment, size_t n) { return NOTE(), __libc_memalign(alignment, n); }
void* aligned_alloc(size_t alignment, size_t n) { return NOTE(), __libc_memalign(alignment, n); }
int posix_memalign(void** p, size_t alignment, size_t n) { return NOTE(), (*p = __libc_memalign(alignment, n)) ? 0 : 12; }

void allocations_begin() { of_core = 0, of_others = 0, counting = true; }
void allocations_end(int64_t* core, int64_t* others) { counting = false, *core = of_core, *others = of_others; }
}

void* operator new(size_t n) {
    NOTE();
    void* p = __libc_malloc(n ? n : 1);
    if (!p) throw std::bad_alloc();
    return p;
}
void* operator new[](size_t n) {
    NOTE();
    void* p = __libc_malloc(n ? n : 1);
    if (!p) throw std::bad_alloc();
    return p;
}
void operator delete(void* p) noexcept { __libc_free(p); }
void operator delete[](void* p) noexcept { __libc_free(p); }
void operator delete(void* p, size_t) noexcept { __libc_free(p); }
void operator delete[](void* p, size_t) noexcept { __libc_free(p); }
