// The two warps of a block that bring what the others compute with: weights, and rows.
#pragma once

#include "cuda/layer_stack.cuh"

namespace bldm::cuda::stack {

// Streams all weights of this block into the ring: one thread.
__device__ inline void stream_weights(const Arguments& a, const Shared& s) {
    const int rank = cluster_rank(), clusters = gridDim.x / kCluster;
    uint32_t stage = 0;
    for (int step = 0; step < a.layers * kPhases; ++step) {
        const int layer = step / kPhases, phase = step % kPhases;
        if (phase == kAttention) continue;
        const Product product = kProducts[phase];
        for (int item = blockIdx.x / kCluster; item < a.items(phase); item += clusters) {
            const Piece piece(product, item, rank);
            if (!piece.exists) continue;
            const uint8_t* from = a.weights + layer * kLayerBytes + product.first_byte +
                                  (int64_t(piece.column_tile) * product.blocks() + piece.first_stage) * kStageBytes;
            for (int i = 0; i < kBlocks; ++i, ++stage) {
                const uint32_t slot = stage % kRing;
                wait_for(s.empty(slot), (stage / kRing & 1) ^ 1);
                expect_bytes(s.full(slot), kStageBytes);
                copy_bulk(s.ring + slot * kStageBytes, from + int64_t(i) * kStageBytes, kStageBytes, s.full(slot));
            }
        }
    }
}

// Fetches what the pieces of this block read into the slab: one warp.
struct Fetcher {
    const Arguments& a;
    const Shared& s;
    uint32_t begun = 0;
    const int rank = int(cluster_rank()), lane = threadIdx.x % 32;

    __device__ Fetcher(const Arguments& a, const Shared& s) : a(a), s(s) {}

    __device__ void run() {
        for (int step = 0; step < a.layers * kPhases; ++step) {
            const int layer = step / kPhases, phase = step % kPhases, clusters = gridDim.x / kCluster;
            for (int item = blockIdx.x / kCluster; item < a.items(phase); item += clusters)
                if (phase == kAttention)
                    fetch_head(layer, item);
                else
                    fetch_rows(layer, phase, item);
        }
    }

    // What is read is there, and no block of the cluster uses a slab any more. For one thread.
    __device__ void begin(const uint32_t* needed, uint32_t count) {
        wait_for<true>(s.free(), (begun & 1) ^ 1);
        fence_async_proxy();  // of what used the slabs; here it costs nothing, there is still time
        wait_for_count(needed, count);
        fence_async_global();
    }

    // What the rows of a phase's pieces wait for: all pieces of the phase before it, in their tile of rows or in all.
    __device__ void begin_rows(int layer, int phase, int tile) {
        if (phase == kQkv && layer == 0)
            begin(a.counters + kCounterStride * (1 + tile), min(kRows, a.rows - tile * kRows));
        else if (phase == kProj)
            begin(counter(a, layer, kAttention, 0), a.heads * a.query_tiles);
        else {
            const int before = phase == kQkv ? kDown : phase - 1;
            begin(counter(a, layer - (phase == kQkv), before, tile), kProducts[before].groups() * kCluster);
        }
    }

    __device__ void fetch_rows(int layer, int phase, int item) {
        const Product product = kProducts[phase];
        const Piece piece(product, item, rank);
        const int first_row = piece.row_tile * kRows;
        const bool of_norm = phase == kQkv || phase == kUp;
        const float of_product = load_early(a.scalars(layer) + (phase == kQkv ? kOfQkv : kOfUp));
        if (lane == 0) begin_rows(layer, phase, piece.row_tile);
        ++begun;
        __syncwarp();
        float4 moments[2][kTiles / 2];  // of two rows: asked for at once, and before the rows, which take long to come
        if (of_norm)
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const int row = min(first_row + lane + i / (kTiles / 2) * 32, a.rows - 1);
                const float2* from = a.moments + int64_t(row) * kTiles;
                moments[i / (kTiles / 2)][i % (kTiles / 2)] = load_four_shared(from + i % (kTiles / 2) * 2);
            }
        if (lane == 0) {
            const uint8_t* from = phase == kProj ? a.mixed : phase == kDown ? a.inner : a.stream;
            from += (int64_t(piece.row_tile) * product.blocks() + piece.first_stage) * kRowBytes;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                constexpr int kQuarter = kHalfBytes / kCluster;
                const int first = half * kHalfBytes, mine = first + rank * kQuarter;
                expect_bytes(s.rows(half), kHalfBytes);
                if (product.split)
                    copy_bulk(s.slab() + first, from + first, kHalfBytes, s.rows(half));
                else  // the same rows for all blocks of the cluster, each brings a part
                    copy_bulk_to((1 << kCluster) - 1, s.slab() + mine, from + mine, kQuarter, s.rows(half));
            }
        }
        __syncwarp();
        if (!of_norm) return;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (lane + 32 * i < kRows) s.scales()[lane + 32 * i] = scale_of(moments[i], of_product);
        __syncwarp();
        if (lane == 0) arrive(s.scaled());
    }

    // r times the scale of the product, and -m r, of a row's moments.
    __device__ float2 scale_of(const float4 (&moments)[kTiles / 2], float of_product) const {
        float sum = 0, squares = 0;
#pragma unroll
        for (const float4& two : moments) sum += two.x + two.z, squares += two.y + two.w;
        const float mean = sum / kWidth, scale = rsqrtf(fmaxf(squares / kWidth - mean * mean, 0) + a.eps);
        return make_float2(scale * of_product, -mean * scale);
    }

    // Queries and keys, then values.
    __device__ void fetch_head(int layer, int item) {
        const Queries mine(a, item, rank);
        if (lane == 0) {
            begin(counter(a, layer, kQkv, 0), a.items(kQkv) * kCluster);
            if (mine.exists) {
                const int head = mine.head % kHeads, row = mine.head / kHeads * a.tokens;
                const uint32_t queries = min(kQueries, a.tokens - mine.first) * 128, keys = a.tokens * 128;
                uint8_t *to_keys = s.slab() + kQueries * 128, *to_values = to_keys + (a.tokens + 15) / 16 * 16 * 128;
                expect_bytes(s.rows(0), queries + keys);
                copy_bulk(s.slab(), head_rows(a, head, 0, row + mine.first), queries, s.rows(0));
                copy_tokens(to_keys, head_rows(a, head, 1, row), mine.shared, s.rows(0));
                expect_bytes(s.rows(1), keys);
                copy_tokens(to_values, head_rows(a, head, 2, row), mine.shared, s.rows(1));
            }
        }
        ++begun;
        __syncwarp();
    }

    // A head's tokens; where the cluster shares them, each block brings a part to all.
    __device__ void copy_tokens(uint8_t* to, const uint8_t* from, bool shared, uint64_t* barrier) {
        if (!shared) return copy_bulk(to, from, a.tokens * 128, barrier);
        const int part = (a.tokens + kCluster - 1) / kCluster, first = rank * part, count = min(part, a.tokens - first);
        copy_bulk_to((1 << kCluster) - 1, to + first * 128, from + first * 128, count * 128, barrier);
    }
};

}  // namespace bldm::cuda::stack
