// GELU in the kernels of inference.
#pragma once

#include "cuda/cluster.cuh"

namespace bldm::cuda {

// By its tanh form.
__device__ __forceinline__ float gelu(float x) {
    const float half = 0.5f * x;
    return half + half * tanh_fast(x * (0.7978845608f + 0.0356774081f * x * x));
}

}  // namespace bldm::cuda
