// attention_kernel.cuh on the emulated machine; returns "" or what went wrong.
#include "cuda/attention_kernel.cuh"

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
