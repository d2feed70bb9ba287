// One of the 256 threads of a block that compute, as the phases of layer_stack.cu see it.
#pragma once

#include "cuda/layer_stack.cuh"

namespace bldm::cuda::stack {

struct Worker {
    const Arguments& a;
    const Shared& s;
    uint32_t stage = 0, readied = 0, scaled = 0, row_phases = 0;  // a bit for every barrier of s.rows
    const int rank = int(cluster_rank()), cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;

    __device__ Worker(const Arguments& a, const Shared& s) : a(a), s(s) {}

    __device__ void wait_for_rows(int half) {
        wait_for(s.rows(half), row_phases >> half & 1);
        row_phases ^= 1u << half;
    }

    // Those of the next half of the stages, looked at together: one look takes as long as a product.
    __device__ void wait_for_weights() {
        bool there = true;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) there &= has_ended(s.full((stage + i) % kRing), (stage + i) / kRing & 1);
        if (there) return;
        for (int i = 0; i < kHalf; ++i) wait_for(s.full((stage + i) % kRing), (stage + i) / kRing & 1);
    }

    // Of half of the stages from `first` on.
    __device__ void release_weights(uint32_t first) {
        if (lane < kHalf) arrive(s.empty((first + lane) % kRing));
    }

    // Behind a piece: what it wrote is there for whoever sees the counter, and the slab may be written.
    __device__ void end(uint32_t* made) {
        sync_workers();
        if (made && tid == 0) signal(made);
        if (warp == 1 && lane < kCluster) arrive_at(s.free(), lane);
    }
};

// All lanes' sums of v[0] to v[kCount - 1]: on return, lanes 32 / kCount * i and following have that of v[i] in v[0].
template <int kLeft, int kCount>
__device__ __forceinline__ void add_over_lanes(float (&v)[kCount], int lane) {
    if constexpr (kLeft > 0) {
        constexpr int kBit = 32 * kLeft / kCount;
        const bool upper = lane & kBit;
#pragma unroll
        for (int i = 0; i < kLeft; ++i) {
            const float kept = upper ? v[i + kLeft] : v[i], sent = upper ? v[i] : v[i + kLeft];
            v[i] = kept + __shfl_xor_sync(~0u, sent, kBit);
        }
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

}  // namespace bldm::cuda::stack
