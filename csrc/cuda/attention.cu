// The launch of attention_kernel.cuh.
#include "cuda/attention_kernel.cuh"

namespace bldm::cuda {

namespace {

// Tiles of 136 tokens of 64 columns of (samples, tokens, columns) in bfloat16, in the order of the 128-byte swizzle.
TileMap tiles_of(const void* qkv, int64_t samples, int64_t tokens, int64_t columns) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
              "cudaGetDriverEntryPointByVersion");
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("attention: the driver has no tensor maps");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    TileMap map;
    const cuuint64_t sizes[3] = {cuuint64_t(columns), cuuint64_t(tokens), cuuint64_t(samples)};
    const cuuint64_t strides[2] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};  // bytes
    const cuuint32_t box[3] = {attend::kDim, attend::kBox, 1}, steps[3] = {1, 1, 1};
    const CUresult error = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(qkv), sizes, strides, box, steps,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) throw std::runtime_error("attention: cuTensorMapEncodeTiled: " + std::to_string(int(error)));
    return map;
}

}  // namespace

void attention(const void* qkv, int64_t samples, int64_t tokens, int64_t heads, const float* out_scale, void* out, bool early,
               int device, cudaStream_t stream) {
    using namespace attend;
    if (tokens < kMain || tokens > kMost || !aligned(qkv, 16) || !aligned(out, 16))
        throw std::invalid_argument("attention: expected 256 to 272 tokens, and memory aligned to 16 bytes");
    if (samples * heads == 0) return;
    const DeviceGuard guard(device);
    const int blocks = processors(device);
    const int parts = 2 * samples * heads <= blocks ? 2 : 1;
    const Arguments a{out, out_scale, int(tokens), int(heads), int(samples), parts};
    const TileMap map = tiles_of(qkv, samples, tokens, 3 * heads * kDim);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min<int64_t>(blocks, samples * heads * parts))), config.blockDim = dim3(attend::kThreads);
    config.dynamicSmemBytes = kSharedBytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early;
    with_flag(out_scale != nullptr, [&](auto low) {
        const auto chosen = attend::kernel<decltype(low)::value>;
        check(cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "cudaFuncSetAttribute");
        check(cudaLaunchKernelEx(&config, chosen, a, map), "attention");
    });
}

}  // namespace bldm::cuda
