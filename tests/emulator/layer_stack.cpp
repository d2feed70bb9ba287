// layer_stack_kernel.cuh on the emulated machine; returns "" or what went wrong.
#include "cuda/layer_stack_kernel.cuh"

extern "C" const char* run(int blocks, unsigned seed, void* h, uint8_t* stream, uint8_t* qkv, uint8_t* mixed, uint8_t* inner,
                           float* moments, const uint8_t* weights, const float* vectors, uint32_t* counters, long rows,
                           long tokens, long layers, float eps) {
    using namespace bldm::cuda::stack;
    const Arguments a{static_cast<bf16*>(h), stream, qkv, mixed, inner, reinterpret_cast<float2*>(moments), weights, vectors,
                      counters, nullptr, int(rows), int(tokens), int(layers), int((rows + kRows - 1) / kRows),
                      int((tokens + kQueries - 1) / kQueries), int(rows / tokens * kHeads), eps};
    static std::string error;
    error.clear();
    try {
        emulator::launch(blocks, kBlockThreads, kCluster, kSharedBytes, seed, [a] { kernel(a); });
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}
