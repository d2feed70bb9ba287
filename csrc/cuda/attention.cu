// The launches of attention_kernel.cuh and attention_gradient_kernel.cuh.
#include "cuda/attention_gradient_kernel.cuh"

#include "cuda/tensor_map.cuh"

namespace bldm::cuda {

namespace {

// Of a tensor (samples, tokens, columns) in bfloat16.
TensorMap map_of_heads(const void* tensor, int64_t samples, int64_t tokens, int64_t heads) {
    return map_of(tensor, false, samples, tokens, heads * attend::kHeadWidth, attend::kBoxTokens);
}

void check_sizes(int64_t samples, int64_t tokens, int64_t most, int64_t heads) {
    if (tokens < attend::kTiled || tokens > most)
        throw std::invalid_argument("attention: expected 256 to " + std::to_string(most) + " tokens, got " + std::to_string(tokens));
    if (samples < 1 || heads < 1 || samples * heads > 1 << 24) throw std::invalid_argument("attention: no heads, or too many");
}

}  // namespace

void attention(const void* qkv, int64_t samples, int64_t tokens, int64_t heads, const float* out_scale, void* out, float* log_sums,
               bool early, int device, cudaStream_t stream) {
    using namespace attend;
    check_sizes(samples, tokens, kMostTokens, heads);
    if (!aligned(qkv, 16) || !aligned(out, 16)) throw std::invalid_argument("attention: expected memory at multiples of 16 bytes");
    const DeviceGuard guard(device);
    const int blocks = processors(device), all = int(samples * heads);
    const int split = 2 * all <= blocks;  // so few that there is a multiprocessor for every half
    const Arguments a{map_of_heads(qkv, samples, tokens, 3 * heads), out, out_scale, log_sums, int(tokens), int(heads), split, all << split};
    const auto chosen = tokens <= kTiled + 8 ? kernel<8> : kernel<16>;
    check(cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(std::min(blocks, a.units)), config.blockDim = dim3(kBlockThreads);
    config.dynamicSmemBytes = kSharedBytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early;
    check(cudaLaunchKernelEx(&config, chosen, a), "attention");
}

void attention_gradient(const void* qkv, const void* grad, const void* out, const float* log_sums, int64_t samples, int64_t tokens,
                        int64_t heads, void* result, float* sums, int device, cudaStream_t stream) {
    using namespace attend;
    check_sizes(samples, tokens, kTiled + gradient::kMostRest, heads);
    for (const void* tensor : {qkv, grad, out, static_cast<const void*>(result), static_cast<const void*>(sums)})
        if (!aligned(tensor, 16)) throw std::invalid_argument("attention_gradient: expected memory at multiples of 16 bytes");
    const DeviceGuard guard(device);
    const gradient::Arguments a{map_of_heads(qkv, samples, tokens, 3 * heads), map_of_heads(grad, samples, tokens, heads),
                                static_cast<const uint8_t*>(out), log_sums, static_cast<uint8_t*>(result),
                                sums, int(tokens), int(heads), int(samples * heads)};
    const auto chosen = tokens > kTiled ? gradient::kernel<true> : gradient::kernel<false>;
    check(cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize, gradient::kSharedBytes), "cudaFuncSetAttribute");
    chosen<<<std::min(processors(device), a.units), kBlockThreads, gradient::kSharedBytes, stream>>>(a);
    check(cudaGetLastError(), "attention_gradient");
}

}  // namespace bldm::cuda
