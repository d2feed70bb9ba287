// attention_kernel.cuh on the emulated machine; returns "" or what went wrong.
#include "cuda/attention_kernel.cuh"

extern "C" const char* attention(int blocks, unsigned seed, const uint8_t* qkv, void* out, const float* scale, int samples, int tokens,
                                 int heads, int parts) {
    using namespace bldm::cuda;
    const attend::Arguments a{out, scale, tokens, heads, samples, parts};
    const TileMap map{qkv, {3 * heads * attend::kDim, tokens, samples}, attend::kBox};
    static std::string error;
    error.clear();
    try {
        emulator::launch(blocks, attend::kThreads, 1, attend::kSharedBytes, seed, [a, map] {
            if (a.scale)
                attend::kernel<true>(a, map);
            else
                attend::kernel<false>(a, map);
        });
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}
