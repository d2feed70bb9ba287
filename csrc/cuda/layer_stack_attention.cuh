// Attention inside layer_stack.cu, on half-precision tensor cores: from queries, keys and values to what proj reads.
#pragma once

#include "cuda/layer_stack_worker.cuh"

namespace bldm::cuda::stack {

// A block has 32 queries of a head, a warp 16 of them and every fourth 16 keys.
__device__ inline void attend(Worker& w, int layer, const Queries& mine) {
    const Arguments& a = w.a;
    const Shared& s = w.s;
    const int tid = w.tid, warp = w.warp, lane = w.lane;
    constexpr float kScale = 0.125f * 1.44269504f;  // 1 / sqrt(64), for powers of 2
    constexpr int kStride = kHeadWidth + 4, kMost = kKeyBlocks / 4;
    constexpr float kNoScore = -1e30f;
    const int blocks = (a.tokens + 15) / 16;
    const uint32_t queries = shared_address(s.slab()), keys = queries + kQueries * 128, values = keys + blocks * 16 * 128;
    const int first_row = mine.head / kHeads * a.tokens;
    const int part = warp % 2, split = warp / 2, g = lane / 4, t = lane % 4;
    const float to_mixed = load_early(a.scalars(layer) + kToMixed);
    // no keys and values behind the last ones: zeros, where no copy writes
    if (const int none = (blocks * 16 - a.tokens) * 8; tid < 2 * none) {
        const int chunk = tid < none ? tid : tid - none + blocks * 16 * 8;
        reinterpret_cast<uint4*>(s.slab() + (kQueries + a.tokens) * 128)[chunk] = make_uint4(0, 0, 0, 0);
    }
    float score[kMost][2][4];
#pragma unroll
    for (int i = 0; i < kMost; ++i)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                score[i][n][j] = (split + 4 * i) * 16 + n * 8 + 2 * t + j % 2 < a.tokens ? 0 : -INFINITY;
    sync_workers();
    w.wait_for_rows(0);
    mark(a, layer, kAttention, 1);
    uint32_t q[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrices(q[k], queries + chunk_of_token(part * 16 + lane % 16, 2 * k + lane / 16, first_row));
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {}, out[8][4] = {};
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        // a block that is none has another's keys, hidden by scores of -inf: without a branch all blocks are worked on at once
        const int block = min(split + 4 * i, blocks - 1);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t key[4];
            load_matrices(key, keys + chunk_of_token(block * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2, first_row));
            mma<bf16>(score[i][0], q[k], key[0], key[1], score[i][0]);
            mma<bf16>(score[i][1], q[k], key[2], key[3], score[i][1]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) most[j / 2] = fmaxf(most[j / 2], score[i][n][j]);  // rows g and g + 8
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
        most[r] = fmaxf(most[r] * kScale, kNoScore);  // of a warp without keys: its weights are 0
    }
    w.wait_for_rows(1);
    w.end_rows(2);
    mark(a, layer, kAttention, 2);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        const int block = min(split + 4 * i, blocks - 1);  // one that is none has weights of 0
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) total[j / 2] += score[i][n][j] = exp2_fast(score[i][n][j] * kScale - most[j / 2]);
        const uint32_t weights[4] = {pair(score[i][0][0], score[i][0][1]), pair(score[i][0][2], score[i][0][3]),
                                     pair(score[i][1][0], score[i][1][1]), pair(score[i][1][2], score[i][1][3])};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            uint32_t value[4];
            load_transposed(value, values + chunk_of_token(block * 16 + lane % 16, 2 * n + lane / 16, first_row));
            mma<bf16>(out[2 * n], weights, value[0], value[1], out[2 * n]);
            mma<bf16>(out[2 * n + 1], weights, value[2], value[3], out[2 * n + 1]);
        }
    }
    sync_workers();  // the slab becomes [warp][16 queries][64, then highest score and total]
    float* parts = reinterpret_cast<float*>(s.slab());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        total[i] += __shfl_xor_sync(~0u, total[i], 1);
        total[i] += __shfl_xor_sync(~0u, total[i], 2);
        float* row = parts + (warp * 16 + g + 8 * i) * kStride;
#pragma unroll
        for (int n = 0; n < 8; ++n)
            *reinterpret_cast<float2*>(row + 8 * n + 2 * t) = make_float2(out[n][2 * i], out[n][2 * i + 1]);
        if (t == 0) row[kHeadWidth] = most[i], row[kHeadWidth + 1] = total[i];
    }
    sync_workers();
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // 32 queries of 16 groups of 4 columns
        const int query = i * 16 + tid / 16, column = tid % 16 * 4;
        if (mine.first + query >= a.tokens) break;
        const float* from = parts + query * kStride;  // of split 0; the next is 32 rows on
        float highest = -INFINITY;
#pragma unroll
        for (int k = 0; k < 4; ++k) highest = fmaxf(highest, from[k * 32 * kStride + kHeadWidth]);
        float4 x = {};
        float sum = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float* split_from = from + k * 32 * kStride;
            const float weight = exp2_fast(split_from[kHeadWidth] - highest);
            const float4 y = *reinterpret_cast<const float4*>(split_from + column);
            sum += weight * split_from[kHeadWidth + 1];
            x.x += weight * y.x, x.y += weight * y.y, x.z += weight * y.z, x.w += weight * y.w;
        }
        const float scale = __fdividef(to_mixed, sum);
        const int row = first_row + mine.first + query, in_row = mine.head % kHeads * kHeadWidth + column;
        uint8_t* to = a.mixed + int64_t(row / kRows) * kBlocks * kRowBytes + chunk_of_row(row % kRows, in_row / 16) + in_row % 16;
        *reinterpret_cast<uint32_t*>(to) = e4m3_of(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
    }
}

}  // namespace bldm::cuda::stack
