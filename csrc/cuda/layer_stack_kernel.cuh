// layer_stack: all layers of the transformer in one kernel that stays on the device, for so few rows that starting kernels and
// waiting for the first weights would take most of the time. Products are of e4m3 values, attention and the stream bfloat16.
//
// Every block has ten warps. One streams the weights through a ring in shared memory, in the order in which the block needs
// them; nothing holds it up but a full ring, so that the next product's weights are there before its rows are. One fetches rows,
// as soon as the counters say that they are written (layer_stack_feed.cuh). The other eight compute. A product's piece is of 56
// rows, which four blocks, a cluster, share: either they have 128 columns each, and a quarter of the rows' k comes to all of
// them from each, or, where k is long, they have a quarter of it each, and add up a quarter of the rows, in the order of the
// blocks. It is computed as out^T = weight rows^T, so that the tensor cores' 64 rows are columns of the output, and their
// columns its few rows.
//
// LayerNorm stands behind the product: the stream x (with its offset) is read as q = x / s in e4m3, and with m and r the mean and
// the reciprocal deviation of a row, W ((x - m) r) + b = r (s W q - m W 1) + b.
#pragma once

#include "cuda/layer_stack_attention.cuh"
#include "cuda/layer_stack_feed.cuh"

namespace bldm::cuda::stack {

// By its tanh form.
__device__ __forceinline__ float gelu(float x) {
    const float half = 0.5f * x;
    return half + half * tanh_fast(x * (0.7978845608f + 0.0356774081f * x * x));
}

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
        float moments[2 * kTiles + 4] = {};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            const int column = i * kColumns + 4 * w.lane;
            const uint2 raw = *reinterpret_cast<const uint2*>(a.h + int64_t(row) * kWidth + column);
            const float4 x = add(raw, *reinterpret_cast<const float4*>(a.vectors + column));
            uint8_t* to = a.stream + int64_t(tile) * kBlocks * kRowBytes + chunk_of_row(row % kRows, column / 16) + column % 16;
            *reinterpret_cast<uint32_t*>(to) = e4m3_of(x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse);
            moments[2 * i] = sum_of(x), moments[2 * i + 1] = squares_of(x);
        }
        add_over_lanes(moments, w.lane);
        if (w.lane % 2 == 0 && w.lane / 2 < 2 * kTiles)
            reinterpret_cast<float*>(a.moments + int64_t(row) * kTiles)[w.lane / 2] = moments[0];
        __syncwarp();
        if (w.lane == 0) signal(a.counters + kCounterStride * (1 + tile));
    }
}

// What a phase adds to the stream: `kPasses` rows a warp, `rows` of each tile of rows from `first` on, four columns a lane.
template <int kPasses>
struct Addition {
    const Arguments& a;
    const Worker& w;
    const int first_row, first, rows, column;
    uint2 old[kPasses];

    __device__ int row(int i) const { return first + i * 8 + w.warp; }  // in the tile
    __device__ bool there(int i) const { return i * 8 + w.warp < rows && first_row + row(i) < a.rows; }
    __device__ bf16* places() const { return a.h + int64_t(first_row + row(0)) * kWidth + column; }  // 8 rows apart

    __device__ inline void load() {
#pragma unroll
        for (int i = 0; i < kPasses; ++i)
            old[i] = there(i) ? __ldcg(reinterpret_cast<const uint2*>(places() + i * 8 * kWidth)) : make_uint2(0, 0);
    }

    // In bfloat16; and in e4m3 for the next product, with its offset and the moments for its norm, unless there is none.
    __device__ inline void store(const float4 (&sums)[kPasses], float scale, float4 offset, float inverse, bool last) {
        constexpr int kMoments = kPasses > 2 ? 16 : 4;
        static_assert(2 * kPasses <= kMoments);
        float moments[kMoments] = {};
        uint2 out[kPasses];
        uint32_t low[kPasses];
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            float4 x = sums[i];
            x = add(old[i], make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale));
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
            if (there(i)) *reinterpret_cast<uint2*>(to + i * 8 * kWidth) = out[i];
            if (there(i) && !last) *reinterpret_cast<uint32_t*>(stream + i * 8 * 128) = low[i];
        }
        if (last) return;
        add_over_lanes(moments, w.lane);
        constexpr int kSame = 32 / kMoments;
        const int mine = w.lane / kSame, i = mine / 2;
        if (w.lane % kSame == 0 && i < kPasses && there(i))
            reinterpret_cast<float*>(a.moments + int64_t(first_row + row(i)) * kTiles + column / kColumns)[mine % 2] = moments[0];
    }
};

// Weights times rows, of which the first half is there. The tensor cores have little work in store: what is waited for between
// two products is lost, so that half of the stages are waited for at once.
__device__ inline void multiply(Worker& w, bool exists, float (&sum)[28]) {
    const Shared& s = w.s;
    // uniform, so that operands are named by registers that can be counted up, without a way from ordinary ones for each product
    const uint32_t weights = uniform(operand(s.ring + w.warp / 4 * (kStageBytes / 2))), rows = uniform(operand(s.slab()));
    const uint32_t first = uniform(w.stage);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half > 0) w.wait_for_rows(half);
        if (!exists) continue;
        w.wait_for_weights();
        begin_products();
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const uint32_t slot = (first + half * kHalf + i) % kRing;
#pragma unroll
            for (int k = 0; k < kDepth / 32; ++k)
                multiply_64x56(sum, weights + (slot * kStageBytes >> 4) + 2 * k,
                               rows + ((half * kHalfBytes + i * kRowBytes) >> 4) + 2 * k);
        }
        commit_products();
        w.stage += kHalf;
        if (half > 0) {
            wait_products<1>();
            w.release_weights(w.stage - kBlocks);
        }
    }
    wait_products<0>();
    if (exists) w.release_weights(w.stage - kHalf);
}

// qkv, and the first product of the MLP with its GELU: norm, bias, and out through the slab.
template <Phase kPhase>
__device__ inline void write(const Worker& w, const Piece& piece, const float (&sum)[28], const float (&by)[2][2], float inverse) {
    const Arguments& a = w.a;
    const int t = w.lane % 4, first_row = piece.row_tile * kRows;
    uint32_t out[14];
#pragma unroll
    for (int j = 0; j < 7; ++j) {
        const float4 two = *reinterpret_cast<const float4*>(w.s.scales() + 8 * j + 2 * t);  // rows
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float x = two.x * sum[4 * j + 2 * half] + (two.y * by[half][0] + by[half][1]);
            const float y = two.z * sum[4 * j + 2 * half + 1] + (two.w * by[half][0] + by[half][1]);
            if constexpr (kPhase == kQkv) {
                out[2 * j + half] = pair(x, y);
            } else {
                const __half2 both = __floats2half2_rn(gelu(x) * inverse, gelu(y) * inverse);
                out[2 * j + half] = *reinterpret_cast<const uint32_t*>(&both);
            }
        }
    }
    // to rows of 16-byte chunks, of 8 columns each
    const uint32_t own = shared_address(w.s.slab() + kOwn);
    const uint32_t to = own + (w.lane / 16 * 8 + w.lane % 8) * kOutStride + (2 * w.warp + w.lane / 8 % 2) * 16;
#pragma unroll
    for (int j = 0; j < 6; j += 2)
        store_transposed(to + 8 * j * kOutStride, out[2 * j], out[2 * j + 1], out[2 * j + 2], out[2 * j + 3]);
    store_transposed(to + 48 * kOutStride, out[12], out[13]);
    sync_workers();
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

// As float32 [row][column].
__device__ inline void put_sums(const Worker& w, const float (&sum)[28]) {
    float* sums = reinterpret_cast<float*>(w.s.slab() + kOwn) + 16 * w.warp + w.lane / 4;
#pragma unroll
    for (int i = 0; i < 28; ++i)
        sums[(8 * (i / 4) + 2 * (w.lane % 4) + i % 2) * kSumStride + 8 * (i / 2 % 2)] = sum[i];
}

// Where a block of the cluster has sums from another.
__device__ inline uint8_t* received(const Shared& s, int from, int to) {
    return s.slab() + kReceived + (from - (from > to)) * kShareBytes;
}

// qkv and the MLP's first product.
__device__ inline void read_stream(Worker& w, int layer, int phase, const Piece& piece) {
    const Arguments& a = w.a;
    const Product product = kProducts[phase];
    float by[2][2] = {}, inverse = 1;  // of two columns: W 1, the bias
    if (piece.exists) {
        inverse = load_early(a.scalars(layer) + kToInner);
        const float* from = a.vectors_of(layer) + (phase == kQkv ? kQkvVectors : kUpVectors) + piece.column_tile * kColumns +
                            16 * w.warp + w.lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i) by[half][i] = load_early(from + 8 * half + i * product.tiles * kColumns);
    }
    float sum[28] = {};
    w.wait_for_rows(0);
    mark(a, layer, phase, 1);
    multiply(w, piece.exists, sum);
    mark(a, layer, phase, 2);
    wait_for(w.s.scaled(), w.scaled++ & 1);
    if (!piece.exists) return;
    if (phase == kQkv)
        write<kQkv>(w, piece, sum, by, inverse);
    else
        write<kUp>(w, piece, sum, by, inverse);
}

// The products that add to the stream: all of k in a block, or a quarter of it, and then a quarter of the rows.
template <bool kSplit>
__device__ inline void add_to_stream(Worker& w, int layer, int phase, const Piece& piece) {
    constexpr int kPasses = kSplit ? (kShare + 7) / 8 : kRows / 8, kParts = kSplit ? kCluster : 1;
    const Arguments& a = w.a;
    const bool last = phase == kDown && layer + 1 == a.layers;
    const int next = layer + (phase == kDown && !last);
    const int column = piece.column_tile * kColumns + 4 * w.lane;
    Addition<kPasses> to{a, w, piece.row_tile * kRows, kSplit ? w.rank * kShare : 0, kSplit ? kShare : kRows, column};
    float4 offset = {};
    if (piece.exists) offset = load_four_early(a.vectors_of(next) + (phase == kProj ? kUpOffset : 0) + column);
    const float scale = load_early(a.scalars(layer) + (phase == kProj ? kOfProj : kOfDown));
    const float inverse = load_early(a.scalars(next) + (phase == kProj ? kToStreamOfUp : kToStream));
    float sum[28] = {};
    w.wait_for_rows(0);
    mark(a, layer, phase, 1);
    if (piece.exists) to.load();
    multiply(w, piece.exists, sum);
    mark(a, layer, phase, 2);
    if (!piece.exists) return;
    put_sums(w, sum);
    if constexpr (kSplit) fence_async_shared();
    sync_workers();
    if constexpr (kSplit) {  // to every block what it adds up
        if (w.tid < kCluster && w.tid != w.rank)
            copy_to_block(w.tid, received(w.s, w.rank, w.tid), w.s.slab() + kOwn + w.tid * kShareBytes, kShareBytes, w.s.ready());
        if (w.tid == 0) expect_bytes(w.s.ready(), (kCluster - 1) * kShareBytes);
        wait_for(w.s.ready(), w.readied++ & 1);
    }
    float4 part[kPasses][kParts];
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
#pragma unroll
        for (int r = 0; r < kParts; ++r) {
            const uint8_t* from = !kSplit || r == w.rank ? w.s.slab() + kOwn + to.first * kSumStride * 4 : received(w.s, r, w.rank);
            part[i][r] = load_four(shared_address(from) + ((to.row(i) - to.first) * kSumStride + 4 * w.lane) * 4);
        }
    float4 added[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        added[i] = part[i][0];
#pragma unroll
        for (int r = 1; r < kParts; ++r) {
            const float4 x = part[i][r];
            added[i] = make_float4(added[i].x + x.x, added[i].y + x.y, added[i].z + x.z, added[i].w + x.w);
        }
    }
    to.store(added, scale, offset, inverse, last);
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
                    add_to_stream<false>(w, layer, phase, piece);
                else if (phase == kDown)
                    add_to_stream<true>(w, layer, phase, piece);
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
        for (int i = 0; i < 2; ++i) init_barrier(s.rows(i), 1);
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
