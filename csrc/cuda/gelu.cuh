// GELU in the kernels of inference, by its tanh form.
#pragma once

#include "cuda/cluster.cuh"

namespace bldm::cuda {

// Of twice this value: whoever can leave out a factor 2 saves a product.
__device__ __forceinline__ float gelu_of_half(float half) {
    return half + half * tanh_fast(half * (2 * 0.7978845608f + 8 * 0.0356774081f * (half * half)));
}

// Half of what GELU is multiplied by, which the next function takes: finite.
__device__ __forceinline__ __half2 gelu_factor(float factor) { return __float2half2_rn(fminf(0.5f * factor, 32752)); }

// Of two values, times a factor, for e4m3: halves are enough. With infinities it would be infinity times 0.
__device__ __forceinline__ uint32_t scaled_gelu(float x, float y, __half2 half_factor) {
    const __half2 both = finite_halves(x, y);
    const __half2 slope = __hfma2(__hmul2(both, both), __float2half2_rn(0.0356774081f), __float2half2_rn(0.7978845608f));
    const __half2 scaled = __hmul2(both, __hfma2(tanh_fast(__hmul2(both, slope)), half_factor, half_factor));
    return reinterpret_cast<const uint32_t&>(scaled);
}

}  // namespace bldm::cuda
