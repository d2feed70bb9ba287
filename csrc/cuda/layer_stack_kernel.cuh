// layer_stack: all layers of the transformer in one kernel that stays on the device, for so few rows that starting kernels and
// waiting for the first weights would take most of the time. Products are of e4m3 values, attention and the stream bfloat16.
//
// Every block has ten warps. One streams the weights through a ring in shared memory, in the order in which the block needs
// them; nothing holds it up but a full ring, so that the next product's weights are there before its rows are. One fetches rows,
// as soon as the counters say that they are written (layer_stack_feed.cuh). The other eight compute. A product's piece is of 56
// rows, which four blocks, a cluster, share: either they have 128 columns each, and a quarter of the rows' k comes to all of
// them from each; or the same with 64 columns, where there are few, and half of k for each warpgroup; or, where k is long, a
// quarter of it each, and they add up a quarter of the rows, in the order of the blocks. It is computed as
// out^T = weight rows^T, so that the tensor cores' 64 rows are columns of the output, and their columns its few rows.
//
// What a phase costs is mostly the way from one block's results to another's products: writing, the counter, the copy. Nothing
// else is done on this way that can be done before or beside it: addresses are computed and weights looked at before the rows
// are there, and most weights are asked for when products begin, not while results are written.
//
// LayerNorm stands behind the product: the stream x (with its offset) is read as q = x / s in e4m3, and with m and r the mean and
// the reciprocal deviation of a row, W ((x - m) r) + b = r s W q + b, as the rows of W add up to 0 (inference/rounding.py).
#pragma once

#include "cuda/gelu.cuh"
#include "cuda/layer_stack_attention.cuh"
#include "cuda/layer_stack_feed.cuh"

namespace bldm::cuda::stack {

// bfloat16 plus float32
__device__ __forceinline__ float4 add(uint2 x, float4 y) {
    return make_float4(y.x + __uint_as_float(x.x << 16), y.y + __uint_as_float(x.x & 0xFFFF0000u),
                       y.z + __uint_as_float(x.y << 16), y.w + __uint_as_float(x.y & 0xFFFF0000u));
}

__device__ __forceinline__ float sum_of(float4 x) { return x.x + x.y + x.z + x.w; }
__device__ __forceinline__ float squares_of(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

// The rows of h into the stream, in e4m3 and the layout of products: a warp each.
__device__ inline void enter(const Arguments& a, const Worker& w) {
    const float inverse = __ldg(a.scalars(0) + kToStream);
    for (int row = blockIdx.x * (kWorkers / 32) + w.warp; row < a.rows; row += gridDim.x * (kWorkers / 32)) {
        const int tile = row / kRows;
        float moments[16] = {};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            const int column = i * kColumns + 4 * w.lane;
            const uint2 raw = *reinterpret_cast<const uint2*>(a.h + int64_t(row) * kWidth + column);
            const float4 x = add(raw, *reinterpret_cast<const float4*>(a.vectors + column));
            uint8_t* to = a.stream + int64_t(tile) * kBlocks * kRowBytes + chunk_of_row(row % kRows, column / 16) + column % 16;
            *reinterpret_cast<uint32_t*>(to) = e4m3_of(x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse);
            moments[2 * i] = sum_of(x), moments[2 * i + 1] = squares_of(x);
        }
        add_over_lanes<16>(moments, w.lane);
        const int part = w.lane % 16 / 2 * 2 + w.lane / 16;
        if (part < kParts) reinterpret_cast<float*>(a.moments + int64_t(row) * kParts + part)[w.lane % 2] = moments[0];
        __syncwarp();
        if (w.lane == 0) signal(a.counters + kCounterStride * (1 + tile));
    }
}

// What a phase adds to the stream: `rows` of a tile of rows from `first` on, a row for every kLanes lanes, of four columns each.
template <int kPasses, int kLanes>
struct Addition {
    static constexpr int kAtOnce = kWorkers / kLanes;
    const Arguments& a;
    const Worker& w;
    const int first_row, first, rows, column;
    uint2 old[kPasses];

    __device__ int row(int i) const { return first + i * kAtOnce + w.tid / kLanes; }  // in the tile
    __device__ bool there(int i) const { return i * kAtOnce + w.tid / kLanes < rows && first_row + row(i) < a.rows; }
    __device__ bf16* places() const { return a.h + int64_t(first_row + row(0)) * kWidth + column; }  // kAtOnce rows apart

    __device__ inline void load() {
#pragma unroll
        for (int i = 0; i < kPasses; ++i)
            old[i] = there(i) ? __ldcg(reinterpret_cast<const uint2*>(places() + i * kAtOnce * kWidth)) : make_uint2(0, 0);
    }

    // In bfloat16; and in e4m3 for the next product, with its offset and the moments for its norm, unless there is none.
    __device__ inline void store(const float4 (&sums)[kPasses], float4 offset, float inverse, bool last) {
        constexpr int kMoments = 2 * kPasses;
        float moments[kMoments];
        uint2 out[kPasses];
        uint32_t low[kPasses];
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            float4 x = add(old[i], sums[i]);
            out[i] = make_uint2(pair(x.x, x.y), pair(x.z, x.w));
            x = add(out[i], offset);
            low[i] = e4m3_of(x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse);
            moments[2 * i] = sum_of(x), moments[2 * i + 1] = squares_of(x);
        }
        bf16* to = places();
        uint8_t* stream = a.stream + int64_t(first_row / kRows) * kBlocks * kRowBytes +
                          chunk_of_row(row(0), column / 16) + column % 16;
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            if (there(i)) *reinterpret_cast<uint2*>(to + i * kAtOnce * kWidth) = out[i];
            if (there(i) && !last) *reinterpret_cast<uint32_t*>(stream + i * kAtOnce * 128) = low[i];
        }
        if (last) return;
        add_over_lanes<16>(moments, w.lane);
        constexpr int kSame = 16 / kMoments;
        const int mine = w.lane % 16 / kSame, i = mine / 2;
        if (w.lane % kSame == 0 && there(i))
            reinterpret_cast<float*>(a.moments + int64_t(first_row + row(i)) * kParts + column / 64)[mine % 2] = moments[0];
    }
};

// Weights times rows. A look at a barrier takes as long as several products of the tensor cores, which have little work in store:
// the weights, which are there before the rows, are waited for before them.
template <bool kNarrow>
struct Products {
    static constexpr int kStages = kNarrow ? kHalf : kBlocks;
    Worker& w;
    uint32_t weights, rows, first_stage, first_block;  // of k

    __device__ Products(Worker& w) : w(w) {
        w.wait_for_weights<kStages>();
        // uniform, so that operands are named by registers that can be counted up, not brought from ordinary ones every time
        weights = uniform(operand(w.s.ring + w.warp / 4 * kHalfStage));
        first_block = uniform(kNarrow ? w.warp / 4 * kHalf : 0);
        rows = uniform(operand(w.s.slab() + first_block * kRowBytes));
        first_stage = uniform(w.stage);
    }

    __device__ void wait_for_rows() { w.wait_for_rows(first_block); }

    // When the first rows are there.
    __device__ void start(float (&sum)[28]) {
        // Now is the time for the next weights to come: while pieces are written and signalled, they would be in the way.
        if (first_stage) w.release_weights(first_stage - kKept, kKept);
#pragma unroll
        for (int i = 0; i < kStages; ++i) {
            if (i > 0) w.wait_for_rows(first_block + i);
            const uint32_t slot = (first_stage + i) % kRing;
            begin_products();
#pragma unroll
            for (int k = 0; k < kDepth / 32; ++k)
                multiply_64x56(sum, weights + (slot * kStageBytes >> 4) + 2 * k, rows + (i * kRowBytes >> 4) + 2 * k);
            commit_products();
        }
        w.end_rows(kBlocks);
        if (kNarrow) return;
        wait_products<kStages - kHalf>();
        w.release_weights(first_stage, kHalf);
    }

    __device__ void finish() {
        wait_products<0>();
        w.stage += kStages;
        w.release_weights(w.stage - kHalf, kHalf - kKept);
    }
};

// Pairs of two rows' values of 16 bits, of a column, as the products' sums lie in a thread: to [row][column].
__device__ inline void put_pairs(const Worker& w, const uint32_t (&pairs)[14]) {
    const uint32_t to = shared_address(w.s.slab() + kOwn) + (w.lane / 16 * 8 + w.lane % 8) * kOutStride +
                        (2 * w.warp + w.lane / 8 % 2) * 16;
#pragma unroll
    for (int j = 0; j < 6; j += 2)
        store_transposed(to + 8 * j * kOutStride, pairs[2 * j], pairs[2 * j + 1], pairs[2 * j + 2], pairs[2 * j + 3]);
    store_transposed(to + 48 * kOutStride, pairs[12], pairs[13]);
}

// qkv, and the first product of the MLP with its GELU: norm, bias, and out through the slab.
template <Phase kPhase>
__device__ inline void write(const Worker& w, const Piece& piece, const float (&sum)[28], const float (&bias)[2], float inverse) {
    const Arguments& a = w.a;
    const int t = w.lane % 4, first_row = piece.row_tile * kRows;
    const __half2 factor = gelu_factor(inverse);
    uint32_t out[14];
#pragma unroll
    for (int j = 0; j < 7; ++j) {
        const float2 two = *reinterpret_cast<const float2*>(w.s.scales() + 8 * j + 2 * t);  // rows
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float x = two.x * sum[4 * j + 2 * half] + bias[half], y = two.y * sum[4 * j + 2 * half + 1] + bias[half];
            if constexpr (kPhase == kQkv) {
                out[2 * j + half] = pair(x, y);
            } else {
                out[2 * j + half] = scaled_gelu(x, y, factor);
            }
        }
    }
    put_pairs(w, out);
    sync_workers();
    const uint32_t own = shared_address(w.s.slab() + kOwn);
    const int chunk = w.tid % 16;
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < 3 || w.tid < 128) x[i] = load_chunk(own + (i * 16 + w.tid / 16) * kOutStride + chunk * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int in_tile = i * 16 + w.tid / 16, row = first_row + in_tile;
        if (in_tile >= kRows || row >= a.rows) continue;
        if constexpr (kPhase == kQkv) {
            uint8_t* rows = head_rows(a, piece.column_tile % kTiles * 2 + chunk / 8, piece.column_tile / kTiles, 0);
            *reinterpret_cast<uint4*>(rows + chunk_of_token(row, chunk % 8, 0)) = x[i];
        } else {
            uint8_t* tile = a.inner + (int64_t(piece.row_tile) * (kHidden / kDepth) + piece.column_tile) * kRowBytes;
            *reinterpret_cast<uint2*>(tile + chunk_of_row(in_tile, chunk / 2) + chunk % 2 * 8) =
                make_uint2(e4m3_of_halves(x[i].x, x[i].y), e4m3_of_halves(x[i].z, x[i].w));
        }
    }
}

// Where a block of the cluster has sums from another.
__device__ inline uint8_t* received(const Shared& s, int from, int to) {
    return s.slab() + kReceived + (from - (from > to)) * kShareBytes;
}

// qkv and the MLP's first product.
__device__ inline void read_stream(Worker& w, int layer, int phase, const Piece& piece) {
    if (!piece.exists) {  // but the cluster's rows come here too
        for (int i = 0; i < kBlocks; ++i) w.wait_for_rows(i);
        w.end_rows(kBlocks);
        return wait_for(w.s.scaled(), w.scaled++ & 1);
    }
    const Arguments& a = w.a;
    float bias[2];  // of two columns
    const float inverse = load_early(a.scalars(layer) + kToInner);
    const float* from = a.vectors_of(layer) + (phase == kQkv ? kQkvBias : kUpBias) + piece.column_tile * kColumns +
                        16 * w.warp + w.lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) bias[half] = load_early(from + 8 * half);
    float sum[28] = {};
    Products<false> products(w);
    products.wait_for_rows();
    mark(a, layer, phase, 1);
    products.start(sum);
    wait_for(w.s.scaled(), w.scaled++ & 1);
    products.finish();
    mark(a, layer, phase, 2);
    if (phase == kQkv)
        write<kQkv>(w, piece, sum, bias, inverse);
    else
        write<kUp>(w, piece, sum, bias, inverse);
}

// What is added to the stream: of proj, of which a warpgroup has half of k.
__device__ inline void add_up(const Worker& w, const float (&sum)[28], float scale, Addition<4, 16>& to, float4 (&added)[4]) {
    float* sums = reinterpret_cast<float*>(w.s.slab() + kOwn) + 16 * w.warp + w.lane / 4;  // [row][half of k][column]
#pragma unroll
    for (int i = 0; i < 28; ++i)
        sums[(8 * (i / 4) + 2 * (w.lane % 4) + i % 2) * kSumStride + 8 * (i / 2 % 2)] = sum[i];
    sync_workers();
    const uint32_t from = shared_address(w.s.slab() + kOwn) + 16 * (w.lane % 16);
    float4 part[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            part[i][half] = load_four(from + (min(to.row(i), kRows - 1) * kSumStride + half * kColumns / 2) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 x = part[i][0], y = part[i][1];
        added[i] = make_float4((x.x + y.x) * scale, (x.y + y.y) * scale, (x.z + y.z) * scale, (x.w + y.w) * scale);
    }
}

// Of down, of which a block has a quarter of k, and adds up a quarter of the rows; in halves, as the way between blocks is narrow.
__device__ inline void add_up(Worker& w, const float (&sum)[28], float scale, Addition<2, 32>& to, float4 (&added)[2]) {
    uint32_t pairs[14];
#pragma unroll
    for (int i = 0; i < 14; ++i) pairs[i] = halves(sum[2 * i] * scale, sum[2 * i + 1] * scale);
    put_pairs(w, pairs);
    fence_async_shared();
    sync_workers();
    uint8_t* own = w.s.slab() + kOwn;
    if (w.tid < kCluster && w.tid != w.rank)
        copy_to_block(w.tid, received(w.s, w.rank, w.tid), own + w.tid * kShareBytes, kShareBytes, w.s.ready());
    if (w.tid == 0) expect_bytes(w.s.ready(), (kCluster - 1) * kShareBytes);
    wait_for(w.s.ready(), w.readied++ & 1);
    uint2 part[2][kCluster];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < kCluster; ++r) {
            const uint8_t* from = r == w.rank ? own + w.rank * kShareBytes : received(w.s, r, w.rank);
            part[i][r] = load_pair(shared_address(from) + (8 * i + w.warp) * kOutStride + 8 * w.lane);
        }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        added[i] = {};
#pragma unroll
        for (int r = 0; r < kCluster; ++r) {
            const float2 x = of_halves(part[i][r].x), y = of_halves(part[i][r].y);
            added[i] = make_float4(added[i].x + x.x, added[i].y + x.y, added[i].z + y.x, added[i].w + y.y);
        }
    }
}

// The products that add to the stream.
template <Phase kPhase>
__device__ inline void add_to_stream(Worker& w, int layer, const Piece& piece) {
    constexpr bool kSplit = kPhase == kDown;
    constexpr int kLanes = kSplit ? 32 : 16, kPasses = kSplit ? 2 : 4;
    const Arguments& a = w.a;
    const bool last = kSplit && layer + 1 == a.layers;
    const int next = layer + (kSplit && !last);
    const int column = (piece.column_tile * kLanes + w.lane % kLanes) * 4;
    Addition<kPasses, kLanes> to{a, w, piece.row_tile * kRows, kSplit ? w.rank * kShare : 0, kSplit ? kShare : kRows, column};
    const float4 offset = load_four_early(a.vectors_of(next) + (kSplit ? 0 : kUpOffset) + column);
    const float scale = load_early(a.scalars(layer) + (kSplit ? kOfDown : kOfProj));
    const float inverse = load_early(a.scalars(next) + (kSplit ? kToStream : kToStreamOfUp));
    float sum[28] = {};
    Products<!kSplit> products(w);
    products.wait_for_rows();
    mark(a, layer, kPhase, 1);
    to.load();
    products.start(sum);
    products.finish();
    mark(a, layer, kPhase, 2);
    float4 added[kPasses];
    add_up(w, sum, scale, to, added);
    to.store(added, offset, inverse, last);
}

__device__ inline void compute(Worker& w) {
    const Arguments& a = w.a;
    enter(a, w);
    for (int step = 0; step < a.layers * kPhases; ++step) {
        const int layer = step / kPhases, phase = step % kPhases;
        for (int item = w.cluster; item < a.items(phase); item += w.clusters) {
            mark(a, layer, phase, 0);
            uint32_t* made = nullptr;
            if (phase == kAttention) {
                const Queries mine(a, item, w.rank);
                if (mine.exists) {
                    made = counter(a, layer, phase, 0);
                    attend(w, layer, mine);
                }
            } else {
                const Piece piece(kProducts[phase], item, w.rank);
                made = counter(a, layer, phase, piece.row_tile);
                if (phase == kProj)
                    add_to_stream<kProj>(w, layer, piece);
                else if (phase == kDown)
                    add_to_stream<kDown>(w, layer, piece);
                else
                    read_stream(w, layer, phase, piece);
            }
            mark(a, layer, phase, 3);
            w.end(made);
            mark(a, layer, phase, 4);
        }
    }
}

static __global__ void __cluster_dims__(kCluster) __launch_bounds__(kBlockThreads, 1) kernel(const __grid_constant__ Arguments a) {
    const Shared s{aligned_shared()};
    if (threadIdx.x == 0) {
        for (int i = 0; i < kRing; ++i) init_barrier(s.full(i), 1), init_barrier(s.empty(i), kWorkers / 32);
        for (int i = 0; i < kBlocks; ++i) init_barrier(s.rows(i), 1);
        init_barrier(s.scaled(), 1);
        init_barrier(s.ready(), 1), init_barrier(s.free(), kCluster);
        publish_barriers();
    }
    sync_cluster();
    if (threadIdx.x < kWorkers) {
        Worker worker(a, s);
        compute(worker);
        // The last block leaves the counters as it found them.
        if (threadIdx.x < 32) {
            uint32_t before = 0;
            if (threadIdx.x == 0) __threadfence(), before = atomicAdd(a.counters, 1);
            const int count = 1 + a.tiles + a.layers * (2 + 3 * a.tiles);
            if (__shfl_sync(~0u, before, 0) == gridDim.x - 1)
                for (int i = threadIdx.x; i < count; i += 32) a.counters[i * kCounterStride] = 0;
        }
    } else if (threadIdx.x < kWorkers + 32) {
        Fetcher(a, s).run();
    } else {
        if (threadIdx.x == kWorkers + 32) stream_weights(a, s);
        __syncwarp();
    }
    sync_cluster();  // nobody leaves while others may reach into its memory
}

}  // namespace bldm::cuda::stack
