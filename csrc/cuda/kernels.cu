// The C functions through which everything else reaches these kernels: plain pointers, sizes and a stream. Each returns 0, the number of a
// CUDA error, or a negative number for arguments that no kernel takes (se_cuda_error says what it means). Built by nvcc into
// sparse_engine/_cuda_kernels.so; built by any C++ compiler (-x c++) into the library that the tests run on the CPU.
#include "cuda/bitmask_linear.h"
#include "cuda/block_linear.h"
#include "cuda/gather_conv.h"

#define SE_EXPORT extern "C" __attribute__((visibility("default")))

namespace se::cuda {
namespace {

constexpr int kBadType = -1;
constexpr int kBadShape = -2;
constexpr int kMisaligned = -3;

bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

unsigned tiles(int64_t count, int size) { return static_cast<unsigned>((count + size - 1) / size); }

template <Type kType>
int launch_bitmask_linear(const BitmaskLinear& p, bool decode, void* stream) {
    if (!decode) {
        const Grid grid{tiles(p.outputs, kLinearOutputs), tiles(p.tokens, kLinearTokens), 1};
        return launch(bitmask_linear<kType>, grid, kLinearThreads, bitmask_linear_shared(p.record_bytes), stream, p);
    }
    const Grid grid{tiles(p.outputs, kDecodeOutputs), 1, 1};
    if (p.tokens <= 8) {
        return launch(bitmask_decode<kType, 1>, grid, kDecodeThreads, bitmask_decode_shared<1>(p.record_bytes), stream, p);
    }
    return launch(bitmask_decode<kType, 2>, grid, kDecodeThreads, bitmask_decode_shared<2>(p.record_bytes), stream, p);
}

template <Type kType>
int launch_gather_conv(const GatherConv& p, int run, void* stream) {
    const int64_t pixels = static_cast<int64_t>(p.batch) * p.out_height * p.out_width;
    const Grid grid{tiles(pixels, kTileLeft), tiles(p.kept_out, kTileRight), 1};
    switch (run) {
        case 1: return launch(gather_conv<kType, 1>, grid, kTileThreads, kTileShared, stream, p);
        case 2: return launch(gather_conv<kType, 2>, grid, kTileThreads, kTileShared, stream, p);
        case 4: return launch(gather_conv<kType, 4>, grid, kTileThreads, kTileShared, stream, p);
        case 8: return launch(gather_conv<kType, 8>, grid, kTileThreads, kTileShared, stream, p);
        default: return kBadShape;
    }
}

}  // namespace
}  // namespace se::cuda

using namespace se::cuda;

// Raised whenever a signature below changes.
SE_EXPORT int se_cuda_version() { return 1; }

// 1 where the kernels run on a GPU, 0 where they run on the CPU for tests.
SE_EXPORT int se_cuda_on_device() {
#if defined(__CUDACC__)
    return 1;
#else
    return 0;
#endif
}

SE_EXPORT const char* se_cuda_error(int code) {
    switch (code) {
        case kBadType: return "type must be 0 (bf16) or 1 (fp16)";
        case kBadShape: return "sizes that the kernel does not take";
        case kMisaligned: return "a pointer is not aligned to 16 bytes";
        default: break;
    }
#if defined(__CUDACC__)
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return "unknown";
#endif
}

// Bytes of dynamic shared memory that a launch of a kernel asks for at most, -1 for a name it does not know. `last` is the last template
// argument where there are two.
SE_EXPORT int64_t se_cuda_shared_bytes(const char* kernel, int last) {
    if (!strcmp(kernel, "bitmask_linear")) return static_cast<int64_t>(bitmask_linear_shared(kLargestRecord));
    if (!strcmp(kernel, "bitmask_decode")) {
        return static_cast<int64_t>(last == 1 ? bitmask_decode_shared<1>(kLargestRecord) : bitmask_decode_shared<2>(kLargestRecord));
    }
    if (!strcmp(kernel, "block_linear") || !strcmp(kernel, "gather_conv")) return static_cast<int64_t>(kTileShared);
    return -1;
}

// Packs a dense [outputs, inputs] weight (host memory). start: [tiles + 1]; records: null to ask for the size only, else 16 bytes per unit.
// Returns the number of 16-byte units.
SE_EXPORT int64_t se_cuda_bitmask_pack(const uint16_t* weight, int outputs, int inputs, uint32_t* start, uint8_t* records) {
    return pack_bitmask(weight, outputs, inputs, start, records);
}

SE_EXPORT void se_cuda_bitmask_unpack(const uint32_t* start, const uint8_t* records, int outputs, int inputs, uint16_t* weight) {
    unpack_bitmask(start, records, outputs, inputs, weight);
}

// decode: 0 for any number of tokens, 1 for at most 16. largest_record in bytes.
SE_EXPORT int se_cuda_bitmask_linear(const void* x, const uint32_t* start, const uint8_t* records, const void* bias, void* out, int tokens,
                                     int outputs, int inputs, int largest_record, int type, int activation, int decode, void* stream) {
    if (type != 0 && type != 1) return kBadType;
    if (tokens < 0 || outputs < 0 || inputs <= 0 || inputs % 8 || largest_record % 16 || largest_record > kLargestRecord ||
        activation < 0 || activation > 3 || (decode && tokens > 16)) {
        return kBadShape;
    }
    if (!aligned(x, 16) || !aligned(records, 16)) return kMisaligned;
    const BitmaskLinear p{static_cast<const uint16_t*>(x),
                          start,
                          records,
                          static_cast<const uint16_t*>(bias),
                          static_cast<uint16_t*>(out),
                          tokens,
                          outputs,
                          inputs,
                          largest_record,
                          static_cast<Activation>(activation)};
    return type == 0 ? launch_bitmask_linear<Type::kBf16>(p, decode, stream) : launch_bitmask_linear<Type::kFp16>(p, decode, stream);
}

SE_EXPORT int se_cuda_block_linear(const void* x, const void* values, const int32_t* row_ptr, const int32_t* cols, const int32_t* row_order,
                                   const void* bias, void* out, int tokens, int outputs, int inputs, int block_rows, int block_cols,
                                   int type, int activation, void* stream) {
    if (type != 0 && type != 1) return kBadType;
    if (tokens < 0 || outputs < 0 || inputs <= 0 || inputs % 8 || block_rows <= 0 || block_rows % kTileRight || block_cols <= 0 ||
        block_cols % kTileInputs || activation < 0 || activation > 3) {
        return kBadShape;
    }
    if (!aligned(x, 16) || !aligned(values, 16)) return kMisaligned;
    const BlockLinear p{static_cast<const uint16_t*>(x),
                        static_cast<const uint16_t*>(values),
                        row_ptr,
                        cols,
                        row_order,
                        static_cast<const uint16_t*>(bias),
                        static_cast<uint16_t*>(out),
                        tokens,
                        outputs,
                        inputs,
                        block_rows,
                        block_cols,
                        static_cast<Activation>(activation)};
    const Grid grid{tiles(outputs, block_rows) * static_cast<unsigned>(block_rows / kTileRight), tiles(tokens, kTileLeft), 1};
    return type == 0 ? launch(block_linear<Type::kBf16>, grid, kTileThreads, kTileShared, stream, p)
                     : launch(block_linear<Type::kFp16>, grid, kTileThreads, kTileShared, stream, p);
}

// sizes: batch, height, width, channels, out height, out width, out channels, kept in, padded in, kept out, kernel height, kernel width,
// stride y, stride x, padding y, padding x, dilation y, dilation x
SE_EXPORT int se_cuda_gather_conv(const void* x, const void* weight, const int32_t* in_index, const int32_t* out_index, const void* bias,
                                  void* y, const int* sizes, int run, int type, int activation, void* stream) {
    if (type != 0 && type != 1) return kBadType;
    GatherConv p{};
    p.x = static_cast<const uint16_t*>(x);
    p.weight = static_cast<const uint16_t*>(weight);
    p.in_index = in_index, p.out_index = out_index;
    p.bias = static_cast<const uint16_t*>(bias);
    p.y = static_cast<uint16_t*>(y);
    p.batch = sizes[0], p.height = sizes[1], p.width = sizes[2], p.channels = sizes[3];
    p.out_height = sizes[4], p.out_width = sizes[5], p.out_channels = sizes[6];
    p.kept_in = sizes[7], p.padded_in = sizes[8], p.kept_out = sizes[9];
    p.kernel_height = sizes[10], p.kernel_width = sizes[11];
    p.stride_y = sizes[12], p.stride_x = sizes[13], p.pad_y = sizes[14], p.pad_x = sizes[15], p.dilation_y = sizes[16],
    p.dilation_x = sizes[17];
    p.activation = static_cast<Activation>(activation);
    if (p.padded_in % kTileInputs || p.kept_in > p.padded_in || p.kept_in < 1 || p.kept_out < 0 || p.channels % run || activation < 0 ||
        activation > 3) {
        return kBadShape;
    }
    if (!aligned(x, 16) || !aligned(weight, 16)) return kMisaligned;
    return type == 0 ? launch_gather_conv<Type::kBf16>(p, run, stream) : launch_gather_conv<Type::kFp16>(p, run, stream);
}
