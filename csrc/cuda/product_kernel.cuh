// The products of a transformer's layers with the residual stream, in bfloat16 or e4m3: those that read the stream behind a norm
// and those that add to it. Rows are tokens, columns what the layer makes of them, both operands have k along their rows.
//
// LayerNorm stands behind the product, as in layer_stack: with m and r the mean and the reciprocal deviation of a row of the
// stream x, W ((x - m) r) + b = r W x + b, as the rows of W add up to 0 (inference/rounding.py). So whoever adds to the stream
// leaves the moments of what it wrote, a part for each tile of columns, and, for products in e4m3, a copy of it in e4m3; no pass of
// its own is left to a norm.
//
// A block stays on its multiprocessor and takes tiles in turn. One thread of the last warpgroup brings stages of 128 bytes of k,
// ahead of the others by as many as there is room for, whatever tile they belong to; its other warps prepare what is needed
// behind the product. The other warpgroups share the tile and go at their own pace, so that one multiplies while another writes.
// The two blocks of a cluster have tiles with the same rows or the same columns: each one fetches half of what they share for both.
//
// The weights' rows come in an order (inference/stream.py) in which eight neighbouring columns of a row are one thread's.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/product_tiles.cuh"

namespace bldm::cuda::products {

// One operand of a block's stages: all of its rows for this block, or, where the cluster shares them, half of them for both.
template <int kTileRows, Keep kKeep = kAsUsual>
struct Operand {
    static constexpr int kPart = kTileRows / kCluster;
    const TensorMap* map;
    bool shared;
    int rank, first_row;

    __device__ void fetch(uint8_t* to, int x, uint64_t* barrier) const {
        if (shared)
            copy_box_to<kKeep>((1 << kCluster) - 1, to + rank * kPart * kStageDepth, map, x, first_row + rank * kPart, 0, barrier);
        else
            copy_box<kKeep>(to, map, x, first_row, 0, barrier);
    }
};

// One thread. Weights do not depend on the kernel before this one, so some are asked for before it ends: those of more stages would
// only be in the way of the first rows.
constexpr int kBegun = 2;
template <Kind kKind, bool kLow, class S>
__device__ inline void fetch_all(const Arguments& a, const Shared<S>& s, int rank, int cluster, int clusters) {
    constexpr int kValues = kStageDepth / (kLow ? 1 : 2);
    // What is multiplied for the stream is read nowhere else.
    Operand<S::kRows, kKind == kAdd ? kBriefly : kAsUsual> rows{&a.rows, !a.share_weights, rank, 0};
    Operand<S::kColumns> weights{&a.weights, bool(a.share_weights), rank, 0};
    const auto begin = [&](RingPlace<S::kStages> place, int step) {
        wait_for(s.empty(place.slot), place.parity ^ 1);
        expect_bytes(s.full(place.slot), Shared<S>::kStageBytes);
        weights.fetch(s.weights(place.slot), step * kValues, s.full(place.slot));
    };
    const auto move_to = [&](const Tile& tile) {
        rows.first_row = tile.row_tile * S::kRows, weights.first_row = tile.column_tile * S::kColumns;
    };
    RingPlace<S::kStages> place, ahead;
    move_to(Tile(a, cluster, rank));
    const int begun = min(kBegun, a.steps);
    for (int step = 0; step < begun; ++step, ahead.advance()) begin(ahead, step);
    wait_for_inputs();
    for (int unit = cluster; unit < a.units; unit += clusters) {
        if (unit != cluster) move_to(Tile(a, unit, rank));
        for (int step = 0; step < a.steps; ++step, place.advance()) {
            if (unit != cluster || step >= begun) begin(place, step);
            rows.fetch(s.rows(place.slot), step * kValues, s.full(place.slot));
        }
    }
    // The other block arrives here until it has read what is shared.
    for (int i = 0; i < S::kStages; ++i, place.advance()) wait_for(s.empty(place.slot), place.parity ^ 1);
}

// The rest of the last warpgroup: what the others need behind the product. Only the stream and its moments depend on the kernel
// before this one.
template <Kind kKind, bool kLow, class S>
__device__ inline void prepare(const Arguments& a, const Shared<S>& s, int rank, int cluster, int clusters) {
    const int i = threadIdx.x - (S::kBlockThreads - kPreparers);
    const float of_all = halved<kKind, kLow> ? 0.5f : 1, scale = kLow ? *a.input_scale * *a.weight_scale : of_all;
    if (i == 0) {
        s.factors()[0] = scale;
        if (kKind == kAdd) s.factors()[1] = a.stream ? 1 / *a.stream_scale : 1;
        if (kKind == kReadGelu) s.factors()[1] = a.out_scale ? 1 / *a.out_scale : 0;
    }
    for (int unit = cluster; unit < a.units; unit += clusters) {
        const Tile tile(a, unit, rank);
        const int first_row = tile.row_tile * S::kRows, first_column = tile.column_tile * S::kColumns;
        if (unit != cluster) sync_part<kPreparers + S::kGroups * kGroup>(kUsed);
        for (int column = i; column < S::kColumns; column += kPreparers)
            s.bias()[column] = first_column + column < a.num_columns ? __ldg(a.bias + first_column + column) * of_all : 0;
        if (unit == cluster) wait_for_inputs();
        if constexpr (kKind == kAdd) {
            // The stream, so that it is near when all blocks at once add to it, if threads do not ask for all of it themselves.
            const int columns = Part<S>::kUnits > S::kAhead ? min(S::kColumns, a.num_columns - first_column) : 0;
            for (int row = first_row + i; columns > 0 && row < min(first_row + S::kRows, a.num_rows); row += kPreparers)
                prefetch_bulk(a.h + int64_t(row) * a.num_columns + first_column, uint32_t(2 * columns));
        } else {
            for (int row = i; row < S::kRows; row += kPreparers) {
                float sum = 0, squares = 0;
                if (first_row + row < a.num_rows)
                    for (int part = 0; part < a.parts; ++part) {
                        const float2 x = a.moments[int64_t(part) * a.num_rows + first_row + row];
                        sum += x.x, squares += x.y;
                    }
                s.scales()[row] = scale_behind_norm(sum / a.depth, squares / a.depth, a.eps, scale);
            }
        }
        __syncwarp();
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) arrive_part<kPreparers + kGroup>(kPrepared + group);
    }
}

// A warpgroup's part of the tiles.
template <Kind kKind, bool kLow, class S>
__device__ __forceinline__ void multiply(const Arguments& a, const Shared<S>& s, int group, int rank, int cluster, int clusters) {
    const int lane = threadIdx.x % 32;
    const int first_row = group / S::kColumnGroups * 64, first_column = group % S::kColumnGroups * S::kWidth;
    // uniform, so that operands are named by registers that can be counted up
    const uint32_t rows = uniform(operand(s.rows(0) + first_row * kStageDepth));
    const uint32_t weights = uniform(operand(s.weights(0) + first_column * kStageDepth));
    const auto release = [&](int slot) {
        if (lane < kCluster) arrive_at(s.empty(slot), lane);
    };
    wait_for_inputs();
    RingPlace<S::kStages> place;
    for (int unit = cluster; unit < a.units; unit += clusters) {
        const Part<S> part(a, s, Tile(a, unit, rank), first_row, first_column);
        if constexpr (kKind == kAdd) part.ask_for_stream();
        float sums[S::kBlocks][S::kWidth / 2];
        int last = 0;
        for (int step = 0; step < a.steps; ++step) {
            wait_for(s.full(place.slot), place.parity);
            const uint32_t at = place.slot * (Shared<S>::kStageBytes >> 4);
            begin_products();
#pragma unroll
            for (int block = 0; block < S::kBlocks; ++block)
                multiply_stage<kLow>(sums[block], rows + at + block * (64 * kStageDepth >> 4), weights + at, step);
            commit_products();
            if (step) {
                wait_products<1>();
                release(last);
            }
            last = place.slot;
            place.advance();
        }
        wait_products<0>();
        release(last);
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) settle(sums[block]);
        sync_part<kPreparers + kGroup>(kPrepared + group);
        if constexpr (kKind == kAdd)
            part.template add<kLow>(sums);
        else
            part.template write<kKind, kLow>(sums);
        __syncwarp();
        if (unit + clusters < a.units) arrive_part<kPreparers + S::kGroups * kGroup>(kUsed);
    }
}

template <Kind kKind, bool kLow, class S>
static __global__ void __cluster_dims__(kCluster) __launch_bounds__(S::kBlockThreads, 1)
    kernel(const __grid_constant__ Arguments a) {
    const Shared<S> s{aligned_shared()};
    const int group = int(uniform(threadIdx.x / kGroup)), rank = int(cluster_rank());
    const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    if (threadIdx.x == 0) {
        prefetch_map(&a.rows), prefetch_map(&a.weights);
        for (int i = 0; i < S::kStages; ++i) init_barrier(s.full(i), 1), init_barrier(s.empty(i), S::kGroups * 4 * kCluster);
        publish_barriers();
    }
    meet_cluster();
    let_next_start();
    if (group < S::kGroups) {
        take_registers<S::kRegisters>();
        multiply<kKind, kLow>(a, s, group, rank, cluster, clusters);
    } else {
        give_registers<S::kFetcherRegisters>();
        if (threadIdx.x % kGroup == 0)
            fetch_all<kKind, kLow>(a, s, rank, cluster, clusters);
        else if (threadIdx.x % kGroup >= 32)
            prepare<kKind, kLow>(a, s, rank, cluster, clusters);
    }
}

}  // namespace bldm::cuda::products
