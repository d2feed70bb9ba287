// The launches of stream_attention_kernel.cuh.
#include "cuda/stream_attention_kernel.cuh"
#include "cuda/tensor_map.cuh"

namespace bldm::cuda {

void attend_to_stream(const void* stream, const void* weights, bool low, int64_t samples, int64_t tokens, int64_t heads,
                      int64_t depth, const float* stream_scale, const float* weight_scale, const float* bias, const float* moments,
                      int64_t parts, float eps, const float* out_scale, void* out, bool early, int device,
                      cudaStream_t cuda_stream) {
    using namespace attend::stream;
    const int64_t bytes = depth * (low ? 1 : 2);
    if (tokens < attend::kTiled || tokens > kMost || heads < 2 || heads % kCluster || samples < 1 ||
        samples * tokens > 1 << 26 || bytes < 1 || bytes % (kStages * kStageDepth))
        throw std::invalid_argument(
            "attend_to_stream: expected 256 to 264 tokens, an even number of heads, and k of multiples of 384 bytes");
    for (const void* tensor : {stream, weights, static_cast<const void*>(out)})
        if (!aligned(tensor, 16)) throw std::invalid_argument("attend_to_stream: expected memory at multiples of 16 bytes");
    const DeviceGuard guard(device);
    Arguments a{};
    a.rows = map_of(stream, low, samples, tokens, depth, attend::kBoxTokens);
    a.weights = map_of(weights, low, 1, 3 * heads * attend::kHeadWidth, depth, attend::kHeadWidth);
    a.tokens = int(tokens), a.heads = int(heads), a.num_rows = int(samples * tokens);
    a.steps = int(bytes / kStageDepth), a.units = int(samples * heads / kCluster);
    a.input_scale = stream_scale, a.weight_scale = weight_scale, a.bias = bias;
    a.moments = reinterpret_cast<const float2*>(moments), a.parts = int(parts), a.depth = int(depth), a.eps = eps;
    a.out = out, a.out_scale = out_scale;
    const auto chosen = low ? kernel<true> : kernel<false>;
    check(cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kCluster * std::min(a.units, processors(device) / kCluster));
    config.blockDim = dim3(attend::kBlockThreads);
    config.dynamicSmemBytes = kSharedBytes, config.stream = cuda_stream;
    config.attrs = &attribute, config.numAttrs = early;
    check(cudaLaunchKernelEx(&config, chosen, a), "attend_to_stream");
}

}  // namespace bldm::cuda
