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

    __device__ void wait_for_rows(int block) { wait_for(s.rows(block), row_phases >> block & 1); }
    // Behind a phase's waits; rows of so many blocks have come.
    __device__ void end_rows(int blocks) { row_phases ^= (1u << blocks) - 1; }

    // Those of the next piece, looked at together: one look takes as long as a product.
    template <int kStages>
    __device__ void wait_for_weights() {
        bool there = true;
#pragma unroll
        for (int i = 0; i < kStages; ++i) there &= has_ended(s.full((stage + i) % kRing), (stage + i) / kRing & 1);
        if (there) return;
        for (int i = 0; i < kStages; ++i) wait_for(s.full((stage + i) % kRing), (stage + i) / kRing & 1);
    }

    // So many stages from `first` on.
    __device__ void release_weights(uint32_t first, int count) {
        if (lane < count) arrive(s.empty((first + lane) % kRing));
    }

    // Behind a piece: what it wrote is there for whoever sees the counter, and the slab may be written.
    __device__ void end(uint32_t* made) {
        sync_workers();
        if (made && tid == 0) signal(made);
        if (warp == 1 && lane < kCluster) {
            fence_async_shared();  // the slabs' next rows are written by copies
            arrive_at(s.free(), lane);
        }
    }
};

}  // namespace bldm::cuda::stack
