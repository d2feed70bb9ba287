// The two warps of a block that bring what the others compute with: weights, and rows.
#pragma once

#include "cuda/layer_stack.cuh"
#include "cuda/norm.cuh"

namespace bldm::cuda::stack {

// Streams all weights of this block into the ring: one thread.
__device__ inline void stream_weights(const Arguments& a, const Shared& s) {
    const int rank = blockIdx.x % kCluster, clusters = gridDim.x / kCluster;
    uint32_t stage = 0;
    for (int step = 0; step < a.layers * kPhases; ++step) {
        const int layer = step / kPhases, phase = step % kPhases;
        if (phase == kAttention) continue;
        const Product product = kProducts[phase];
        for (int item = blockIdx.x / kCluster; item < a.items(phase); item += clusters) {
            const Piece piece(product, item, rank);
            if (!piece.exists) continue;
            const int tile = product.narrow ? piece.column_tile / 2 : piece.column_tile;
            const uint8_t* from = a.weights + layer * kLayerBytes + product.first_byte +
                                  (int64_t(tile) * product.blocks() + piece.first_stage) * kStageBytes;
            if (product.narrow) from += piece.column_tile % 2 * kHalfStage;
            for (int i = 0; i < product.stages(); ++i, ++stage, from += kStageBytes) {
                const uint32_t slot = stage % kRing;
                uint8_t* to = s.ring + slot * kStageBytes;
                wait_for(s.empty(slot), (stage / kRing & 1) ^ 1);
                expect_bytes(s.full(slot), kStageBytes);
                if (product.narrow) {  // for each warpgroup its own k
                    copy_bulk(to, from, kHalfStage, s.full(slot));
                    copy_bulk(to + kHalfStage, from + kHalf * kStageBytes, kHalfStage, s.full(slot));
                } else {
                    copy_bulk(to, from, kStageBytes, s.full(slot));
                }
            }
        }
    }
}

// Fetches what the pieces of this block read into the slab: one warp.
struct Fetcher {
    const Arguments& a;
    const Shared& s;
    uint32_t begun = 0;
    // not cluster_rank(), which the compiler would not know to be the same in all lanes
    const int rank = blockIdx.x % kCluster, lane = threadIdx.x % 32;

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

    // No block of the cluster uses a slab any more. For one thread.
    __device__ void wait_for_slabs() { wait_for<true>(s.free(), (begun & 1) ^ 1); }

    // What is read is there. For one thread, which does before what it can: everything waits for the copies behind it.
    __device__ void wait_for_pieces(const uint32_t* needed, uint32_t count) {
        wait_for_count(needed, count);
        fence_async_global();
    }

    // What the rows of a phase's pieces wait for: all pieces of the phase before it, in their tile of rows or in all.
    __device__ const uint32_t* needed(int layer, int phase, int tile) const {
        if (phase == kQkv) return layer ? counter(a, layer - 1, kDown, tile) : a.counters + kCounterStride * (1 + tile);
        return counter(a, layer, phase - 1, tile);
    }
    __device__ uint32_t needed_count(int layer, int phase, int tile) const {
        if (phase == kProj) return a.heads * a.query_tiles;
        if (phase == kQkv && layer == 0) return min(kRows, a.rows - tile * kRows);
        return kProducts[phase == kQkv ? kDown : phase - 1].groups() * kCluster;
    }

    __device__ void fetch_rows(int layer, int phase, int item) {
        const Product product = kProducts[phase];
        const Piece piece(product, item, rank);
        const int first_row = piece.row_tile * kRows;
        const bool of_norm = phase == kQkv || phase == kUp;
        const float of_product = load_early(a.scalars(layer) + (phase == kQkv ? kOfQkv : kOfUp));
        if (lane == 0) {
            // of every block of k all rows; or, where all blocks of the cluster have the same rows, a quarter for all
            const uint32_t bytes = product.split ? kRowBytes : kRowBytes / kCluster, mine = product.split ? 0 : rank * bytes;
            const uint16_t blocks = product.split ? 1 << rank : (1 << kCluster) - 1;
            const uint8_t* from = phase == kProj ? a.mixed : phase == kDown ? a.inner : a.stream;
            from += (int64_t(piece.row_tile) * product.blocks() + piece.first_stage) * kRowBytes + mine;
            uint8_t* to = s.slab() + mine;
            const uint32_t* const counter = needed(layer, phase, piece.row_tile);
            const uint32_t count = needed_count(layer, phase, piece.row_tile);
            wait_for_slabs();
            for (int i = 0; i < kBlocks; ++i) expect_bytes(s.rows(i), kRowBytes);
            compute_here(from), compute_here(to);
            wait_for_pieces(counter, count);
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) copy_bulk_to(blocks, to + i * kRowBytes, from + i * kRowBytes, bytes, s.rows(i));
        }
        ++begun;
        __syncwarp();
        if (!of_norm) return;
        float4 moments[2][kParts / 2];  // of two rows: asked for at once
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            const int row = min(first_row + lane + i / (kParts / 2) * 32, a.rows - 1);
            const float2* from = a.moments + int64_t(row) * kParts;
            moments[i / (kParts / 2)][i % (kParts / 2)] = load_four_shared(from + i % (kParts / 2) * 2);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (lane + 32 * i < kRows) s.scales()[lane + 32 * i] = scale_of(moments[i], of_product);
        __syncwarp();
        if (lane == 0) arrive(s.scaled());
    }

    // r times the scale of the product, of a row's moments.
    __device__ float scale_of(const float4 (&moments)[kParts / 2], float of_product) const {
        float sum = 0, squares = 0;
#pragma unroll
        for (const float4& two : moments) sum += two.x + two.z, squares += two.y + two.w;
        return scale_behind_norm(sum / kWidth, squares / kWidth, a.eps, of_product);
    }

    // Queries and keys, then values.
    __device__ void fetch_head(int layer, int item) {
        const Queries mine(a, item, rank);
        if (lane == 0) {
            // a head's tokens; where the cluster shares them, each block brings a part to all
            const int part = (a.tokens + kCluster - 1) / kCluster, first = mine.shared ? rank * part : 0;
            const uint32_t bytes = (mine.shared ? min(part, a.tokens - first) : a.tokens) * 128;
            const uint16_t blocks = mine.shared ? (1 << kCluster) - 1 : 1 << rank;
            const int head = mine.head % kHeads, row = mine.head / kHeads * a.tokens;
            const uint32_t queries = min(kQueries, a.tokens - mine.first) * 128, keys = a.tokens * 128;
            uint8_t *to_keys = s.slab() + (kQueries + first) * 128, *to_values = to_keys + (a.tokens + 15) / 16 * 16 * 128;
            const uint8_t *from = head_rows(a, head, 0, row + mine.first), *from_keys = head_rows(a, head, 1, row + first),
                          *from_values = head_rows(a, head, 2, row + first);
            wait_for_slabs();
            if (mine.exists) expect_bytes(s.rows(0), queries + keys), expect_bytes(s.rows(1), keys);
            compute_here(from), compute_here(from_keys), compute_here(from_values);
            compute_here(to_keys), compute_here(to_values);
            wait_for_pieces(counter(a, layer, kQkv, 0), a.items(kQkv) * kCluster);
            if (mine.exists) {
                copy_bulk(s.slab(), from, queries, s.rows(0));
                copy_bulk_to(blocks, to_keys, from_keys, bytes, s.rows(0));
                copy_bulk_to(blocks, to_values, from_values, bytes, s.rows(1));
            }
        }
        ++begun;
        __syncwarp();
    }
};

}  // namespace bldm::cuda::stack
