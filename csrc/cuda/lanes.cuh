// Sums over the lanes of a warp.
#pragma once

#include "cuda/cluster.cuh"

namespace bldm::cuda {

// Half of the lanes keep the first kLeft of twice as many values, the others the second, each with the share of another lane; of
// every kLanes lanes.
template <int kLeft, int kLanes = 32, int kCount>
__device__ __forceinline__ void fold(float (&v)[kCount], int lane) {
    constexpr int kBit = kLanes * kLeft / kCount;
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
        const float kept = upper ? v[i + kLeft] : v[i], sent = upper ? v[i] : v[i + kLeft];
        v[i] = kept + __shfl_xor_sync(~0u, sent, kBit);
    }
}

// The sums of v[0] to v[kCount - 1] over kLanes lanes: on return, lanes kLanes / kCount * i and following of them have that of
// v[i] in v[0].
template <int kLanes, int kCount, int kLeft = kCount / 2>
__device__ __forceinline__ void add_over_lanes(float (&v)[kCount], int lane) {
    if constexpr (kLeft > 0) {
        fold<kLeft, kLanes>(v, lane);
        add_over_lanes<kLanes, kCount, kLeft / 2>(v, lane);
    } else {
#pragma unroll
        for (int rest = kLanes / 2 / kCount; rest; rest /= 2) v[0] += __shfl_xor_sync(~0u, v[0], rest);
    }
}

}  // namespace bldm::cuda
