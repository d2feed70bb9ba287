// Sums over the lanes of a warp.
#pragma once

#include "cuda/cluster.cuh"

namespace bldm::cuda {

// Half of the lanes keep the first kLeft of twice as many values, the others the second, each with the share of another lane.
template <int kLeft, int kCount>
__device__ __forceinline__ void fold(float (&v)[kCount], int lane) {
    constexpr int kBit = 32 * kLeft / kCount;
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
        const float kept = upper ? v[i + kLeft] : v[i], sent = upper ? v[i] : v[i + kLeft];
        v[i] = kept + __shfl_xor_sync(~0u, sent, kBit);
    }
}

// All lanes' sums of v[0] to v[kCount - 1]: on return, lanes 32 / kCount * i and following have that of v[i] in v[0].
template <int kLeft, int kCount>
__device__ __forceinline__ void add_over_lanes(float (&v)[kCount], int lane) {
    if constexpr (kLeft > 0) {
        fold<kLeft>(v, lane);
        add_over_lanes<kLeft / 2, kCount>(v, lane);
    } else {
#pragma unroll
        for (int rest = 16 / kCount; rest; rest /= 2) v[0] += __shfl_xor_sync(~0u, v[0], rest);
    }
}
template <int kCount>
__device__ __forceinline__ void add_over_lanes(float (&v)[kCount], int lane) {
    add_over_lanes<kCount / 2, kCount>(v, lane);
}

}  // namespace bldm::cuda
