// The device primitives that the kernels here are written against. nvcc compiles them to the instructions they name; any other compiler
// runs them on the CPU, one thread block at a time (host_block.h), so that the same kernel source is tested where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SE_KERNEL __global__
#define SE_DEVICE __device__ __forceinline__
#define SE_BOTH __host__ __device__ inline
#define SE_UNROLL _Pragma("unroll")
#define SE_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#else
#include "host_block.h"
#define SE_KERNEL inline
#define SE_DEVICE inline
#define SE_BOTH inline
#define SE_UNROLL
#define SE_BOUNDS(threads, blocks)
#endif

namespace se::cuda {

// The two 16-bit types; numbers travel as their bits.
enum class Type : int { kBf16 = 0, kFp16 = 1 };

SE_BOTH uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

SE_BOTH float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// 16 bits → fp32, exactly.
template <Type kType>
SE_BOTH float widen(uint16_t bits) {
    if constexpr (kType == Type::kBf16) {
        return float_of(static_cast<uint32_t>(bits) << 16);
    } else {
        const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
        if (exponent == 31u) return float_of(sign | 0x7f800000u | (fraction << 13));
        if (exponent) return float_of(sign | ((exponent + 112u) << 23) | (fraction << 13));
        const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2⁻²⁴
        return sign ? -small : small;
    }
}

// fp32 → 16 bits, to nearest, ties to even.
template <Type kType>
SE_BOTH uint16_t narrow(float value) {
#if defined(__CUDA_ARCH__)
    if constexpr (kType == Type::kBf16) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(value));
    } else {
        return __half_as_ushort(__float2half_rn(value));
    }
#else
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if constexpr (kType == Type::kBf16) {
        if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fffu);
        return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    } else {
        if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fffu);
        if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above
        if (magnitude >= 0x38800000u) {
            const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
            return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
        }
        // below 2⁻¹⁴: adding 2⁻¹ leaves the rounded subnormal in the low bits
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
    }
#endif
}

// ------------------------------------------------------------------------------------------------------------ places and barriers

SE_DEVICE int thread_index() {
#if defined(__CUDACC__)
    return static_cast<int>(threadIdx.x);
#else
    return host::lane_index();
#endif
}

SE_DEVICE int block_x() {
#if defined(__CUDACC__)
    return static_cast<int>(blockIdx.x);
#else
    return static_cast<int>(host::block_index(0));
#endif
}

SE_DEVICE int block_y() {
#if defined(__CUDACC__)
    return static_cast<int>(blockIdx.y);
#else
    return static_cast<int>(host::block_index(1));
#endif
}

// Dynamic shared memory, 128-byte aligned.
SE_DEVICE char* shared_memory() {
#if defined(__CUDACC__)
    extern __shared__ __align__(128) char memory[];
    return memory;
#else
    return host::shared_memory();
#endif
}

// Every thread of the block waits for every other; shared memory written before is seen after.
SE_DEVICE void sync_threads() {
#if defined(__CUDACC__)
    __syncthreads();
#else
    host::barrier();
#endif
}

// The same for the 32 threads of a warp.
SE_DEVICE void sync_warp() {
#if defined(__CUDACC__)
    __syncwarp();
#else
    host::warp_barrier();
#endif
}

SE_BOTH int population(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

// ------------------------------------------------------------------------------------------------------------ within a warp

// The value of the lane `by` places below; a lane's own where there is none.
SE_DEVICE int shuffle_up(int value, int by) {
#if defined(__CUDACC__)
    return __shfl_up_sync(0xffffffffu, value, by);
#else
    const int lane = host::lane_index() % 32;
    host::offer("shuffle_up", static_cast<uint32_t>(value), 0, 0, 0);
    return static_cast<int>(static_cast<uint32_t>(host::offered(lane >= by ? lane - by : lane, 0)));
#endif
}

// Bit i is lane i's condition.
SE_DEVICE uint32_t ballot(bool condition) {
#if defined(__CUDACC__)
    return __ballot_sync(0xffffffffu, condition);
#else
    host::offer("ballot", condition, 0, 0, 0);
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(host::offered(i, 0)) << i;
    return bits;
#endif
}

// Sum of the lanes below this one.
SE_DEVICE int exclusive_sum(int value) {
    const int lane = thread_index() % 32;
    int total = value;
    SE_UNROLL
    for (int by = 1; by < 32; by *= 2) {
        const int below = shuffle_up(total, by);
        if (lane >= by) total += below;
    }
    return total - value;
}

// Four 8 × 8 matrices of 16-bit numbers from shared memory: lane 8·i + r names row r of matrix i (16 bytes, aligned); afterwards
// out[i] of lane 4·r + c holds numbers 2c and 2c + 1 of that row.
SE_DEVICE void load_matrices(uint32_t out[4], const void* row) {
#if defined(__CUDACC__)
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
#else
    host::offer("load_matrices", reinterpret_cast<uint64_t>(row), 0, 0, 0);
    const int lane = host::lane_index() % 32;
    for (int i = 0; i < 4; ++i) {
        const char* start = reinterpret_cast<const char*>(host::offered(8 * i + lane / 4, 0));
        std::memcpy(&out[i], start + 4 * (lane % 4), 4);
    }
#endif
}

// d += a · b on the tensor cores: a is 16 × 16 (rows, inputs), b is 16 × 8 (inputs, columns), d is 16 × 8 in fp32, with g = lane / 4, c =
// lane % 4:
//   a[0] = A[g][2c, 2c+1]   a[1] = A[g+8][2c, 2c+1]   a[2] = A[g][2c+8, 2c+9]   a[3] = A[g+8][2c+8, 2c+9]
//   b[0] = B[2c, 2c+1][g]   b[1] = B[2c+8, 2c+9][g]   d[0], d[1] = D[g][2c, 2c+1]   d[2], d[3] = D[g+8][2c, 2c+1]
template <Type kType>
SE_DEVICE void multiply_add(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#if defined(__CUDACC__)
    if constexpr (kType == Type::kBf16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#else
    const auto pair = [](uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; };
    host::offer("multiply_add", pair(a[0], a[1]), pair(a[2], a[3]), pair(b[0], b[1]), 0);
    const int lane = host::lane_index() % 32, g = lane / 4, c = lane % 4;
    float left[2][16], right[16][2];
    for (int q = 0; q < 4; ++q) {  // the four lanes that hold rows g and g + 8
        const uint64_t near = host::offered(4 * g + q, 0), far = host::offered(4 * g + q, 1);
        for (int half = 0; half < 2; ++half) {
            for (int e = 0; e < 2; ++e) {
                left[half][2 * q + e] = widen<kType>(static_cast<uint16_t>(near >> (32 * half + 16 * e)));
                left[half][2 * q + 8 + e] = widen<kType>(static_cast<uint16_t>(far >> (32 * half + 16 * e)));
            }
        }
        for (int column = 0; column < 2; ++column) {
            const uint64_t both = host::offered(4 * (2 * c + column) + q, 2);
            for (int e = 0; e < 2; ++e) {
                right[2 * q + e][column] = widen<kType>(static_cast<uint16_t>(both >> (16 * e)));
                right[2 * q + 8 + e][column] = widen<kType>(static_cast<uint16_t>(both >> (32 + 16 * e)));
            }
        }
    }
    for (int half = 0; half < 2; ++half) {
        for (int column = 0; column < 2; ++column) {
            float sum = d[2 * half + column];
            for (int k = 0; k < 16; ++k) sum += left[half][k] * right[k][column];
            d[2 * half + column] = sum;
        }
    }
#endif
}

// ------------------------------------------------------------------------------------------------------------ asynchronous copies

// Copies kBytes (4, 8 or 16, both sides aligned to it) from global to shared memory; zeros where not valid. Done when waited for, and then
// seen by this thread: others need a barrier too.
template <int kBytes>
SE_DEVICE void copy_async(void* to, const void* from, bool valid) {
#if defined(__CUDACC__)
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int bytes = valid ? kBytes : 0;
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(bytes) : "memory");
    }
#else
    host::copy_async(to, from, kBytes, valid);
#endif
}

// Closes a group of copies.
SE_DEVICE void copy_async_commit() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    host::copy_async_commit();
#endif
}

// Waits for all of this thread's groups but the newest kLeft.
template <int kLeft>
SE_DEVICE void copy_async_wait() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
    host::copy_async_wait(kLeft);
#endif
}

// ------------------------------------------------------------------------------------------------------------ launching

struct Grid {
    unsigned x = 1, y = 1, z = 1;
};

// Starts a kernel; returns 0 or the CUDA error's number. `stream` is a cudaStream_t.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, [[maybe_unused]] void* stream,
           Arguments... arguments) {
    if (!grid.x || !grid.y || !grid.z) return 0;
#if defined(__CUDACC__)
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) {
            cudaGetLastError();
            return static_cast<int>(error);
        }
    }
    kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
#else
    host::launch(grid.x, grid.y, grid.z, threads, shared_bytes, [=] { kernel(arguments...); });
    return 0;
#endif
}

}  // namespace se::cuda
