// One of the 256 threads of a block that compute, as the phases of layer_stack.cu see it.
#pragma once

#include "cuda/lanes.cuh"
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

}  // namespace bldm::cuda::stack
