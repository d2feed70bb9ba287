// stream_attention_kernel.cuh on the emulated machine; `run` returns "" or what went wrong.
#include "cuda/stream_attention_kernel.cuh"

extern "C" const char* run(int clusters, unsigned seed, long low, const void* rows, const void* weights, const float* input_scale,
                           const float* weight_scale, const float* bias, const float* moments, const float* out_scale, void* out,
                           long samples, long tokens, long heads, long depth, long parts, float eps) {
    using namespace bldm::cuda;
    using namespace bldm::cuda::attend::stream;
    const int bytes = low ? 1 : 2;
    Arguments a{};
    a.rows = {rows, {int(depth), int(tokens), int(samples)}, attend::kBoxTokens, bytes};
    a.weights = {weights, {int(depth), int(3 * heads * attend::kHeadWidth), 1}, attend::kHeadWidth, bytes};
    a.tokens = int(tokens), a.heads = int(heads), a.num_rows = int(samples * tokens), a.steps = int(depth * bytes / kStageDepth), a.units = int(samples * heads / kCluster);
    a.input_scale = input_scale, a.weight_scale = weight_scale, a.bias = bias;
    a.moments = reinterpret_cast<const float2*>(moments), a.parts = int(parts), a.depth = int(depth), a.eps = eps;
    a.out = out, a.out_scale = out_scale;
    static std::string error;
    error.clear();
    try {
        emulator::launch(kCluster * std::min(clusters, a.units), attend::kBlockThreads, kCluster, kSharedBytes, seed, [a, low] {
            low ? kernel<true>(a) : kernel<false>(a);
        });
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}
