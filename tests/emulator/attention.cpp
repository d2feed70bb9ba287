// The kernels of attention on the emulated machine; return "" or what went wrong.
#include "cuda/attention_gradient_kernel.cuh"

extern "C" const char* run(int blocks, unsigned seed, const uint16_t* qkv, void* out, const float* out_scale, float* log_sums,
                           long samples, long tokens, long heads, long split) {
    using namespace bldm::cuda;
    using namespace bldm::cuda::attend;
    const TensorMap map{qkv, {int(3 * heads * kHeadWidth), int(tokens), int(samples)}, kBoxTokens};
    const Arguments a{map, out, out_scale, log_sums, int(tokens), int(heads), int(split), int(samples * heads) << split};
    static std::string error;
    error.clear();
    try {
        emulator::launch(blocks, kBlockThreads, 1, kSharedBytes, seed, [a, tokens] {
            tokens <= kTiled + 8 ? kernel<8>(a) : kernel<16>(a);
        });
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}

extern "C" const char* run_gradient(int blocks, unsigned seed, const uint16_t* qkv, const uint16_t* grad, const uint8_t* out,
                                    const float* log_sums, uint8_t* result, float* sums, long samples, long tokens, long heads) {
    using namespace bldm::cuda;
    using namespace bldm::cuda::attend;
    const TensorMap map{qkv, {int(3 * heads * kHeadWidth), int(tokens), int(samples)}, kBoxTokens};
    const TensorMap of_grad{grad, {int(heads * kHeadWidth), int(tokens), int(samples)}, kBoxTokens};
    const gradient::Arguments a{map, of_grad, out, log_sums, result, sums, int(tokens), int(heads), int(samples * heads)};
    static std::string error;
    error.clear();
    try {
        emulator::launch(blocks, kBlockThreads, 1, gradient::kSharedBytes, seed, [a] {
            a.tokens > kTiled ? gradient::kernel<true>(a) : gradient::kernel<false>(a);
        });
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}
