// The launch of layer_stack_kernel.cuh.
#include "cuda/layer_stack_kernel.cuh"

namespace bldm::cuda {

int64_t layer_stack_counters(int64_t rows, int64_t layers) {
    const int64_t tiles = ceil_div<int64_t>(rows, stack::kRows);
    return stack::kCounterStride * (1 + tiles + layers * (2 + 3 * tiles));
}

void layer_stack(void* h, uint8_t* stream, uint8_t* qkv, uint8_t* mixed, uint8_t* inner, float* moments,
                 const uint8_t* weights, const float* vectors, uint32_t* counters, int64_t rows, int64_t tokens,
                 int64_t layers, float eps, int64_t* times, int device, cudaStream_t cuda_stream) {
    using namespace stack;
    if (tokens < 1 || tokens > 16 * kKeyBlocks || rows % tokens)
        throw std::invalid_argument("layer_stack: expected whole samples of 1 to " + std::to_string(16 * kKeyBlocks) +
                                    " tokens");
    const DeviceGuard guard(device);
    const Arguments a{static_cast<bf16*>(h),
                      stream,
                      qkv,
                      mixed,
                      inner,
                      reinterpret_cast<float2*>(moments),
                      weights,
                      vectors,
                      counters,
                      times,
                      int(rows),
                      int(tokens),
                      int(layers),
                      int(ceil_div<int64_t>(rows, kRows)),
                      int(ceil_div<int64_t>(tokens, kQueries)),
                      int(rows / tokens * kHeads),
                      eps};
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;  // blocks wait for each other: all or none
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(processors(device) / kCluster * kCluster), config.blockDim = dim3(kBlockThreads);
    config.dynamicSmemBytes = kSharedBytes, config.stream = cuda_stream;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
    if (clusters < 1) throw std::runtime_error("layer_stack: no cluster of 4 blocks fits on this device");
    config.gridDim = dim3(std::min(clusters * kCluster, int(config.gridDim.x)));
    config.attrs = &attribute, config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, a), "layer_stack");
}

}  // namespace bldm::cuda
