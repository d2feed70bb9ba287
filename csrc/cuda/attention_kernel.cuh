// attention: softmax(q k^T / 8) v for heads of width 64 and 256 to 272 tokens, which are few enough for all keys and values of a
// head to be in shared memory, and all scores of 64 queries in the registers of a warpgroup.
//
// Blocks stay on the device and go through heads. Of a block's three warpgroups two compute, 64 queries at a time; one has the next
// head brought while they do, and computes the queries beyond the 256th on its own, without tensor cores: there are few.
#pragma once

#include "cuda/warpgroup.cuh"

namespace bldm::cuda::attend {

constexpr int kDim = 64, kMain = 256, kMost = 272;                   // of a head; tokens
constexpr int kGroup = 128, kThreads = 3 * kGroup, kQueries = 64;    // of a job
constexpr int kBox = kMost / 2, kBoxBytes = kBox * 128;              // rows of a copy
constexpr int kPartBytes = kMost * 128, kStageBytes = 3 * kPartBytes;  // queries, keys, values
constexpr int kStages = 2;
constexpr float kScale = 0.125f * 1.44269504f;  // 1 / sqrt(64), for powers of 2
// Sums of what the third warpgroup's warps have; weights of a query.
constexpr int kScratchFloats = kMost + 4 * kDim + 8;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kScratchFloats * 4 + 2 * kStages * 8;

struct Arguments {
    void* out;           // (samples, tokens, heads, 64) in bfloat16 or e4m3
    const float* scale;  // what e4m3 is divided by
    int tokens, heads, samples, parts;  // 2: a block has half of a head's queries

    __device__ int items() const { return samples * heads * parts; }
};

struct Shared {
    uint8_t* stages;

    __device__ uint8_t* part(int stage, int which) const { return stages + stage * kStageBytes + which * kPartBytes; }
    __device__ float* scratch() const { return reinterpret_cast<float*>(stages + kStages * kStageBytes); }
    __device__ uint64_t* full(int stage) const { return reinterpret_cast<uint64_t*>(scratch() + kScratchFloats) + stage; }
    __device__ uint64_t* empty(int stage) const { return full(kStages + stage); }
};

// Where the 16-byte chunk of a row is.
__device__ __forceinline__ uint32_t chunk_of(int row, int chunk) { return uint32_t(row * 128 + (chunk ^ row % 8) * 16); }

__device__ __forceinline__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ float low_half(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(uint32_t x) { return __uint_as_float(x & 0xFFFF0000u); }

// A head's stage of the ring.
struct Turn {
    int head, part, stage;
    uint32_t parity;

    __device__ Turn(const Arguments& a, int item, uint32_t count)
        : head(item / a.parts), part(item % a.parts), stage(count % kStages), parity(count / kStages & 1) {}
};

__device__ inline void fetch(const Arguments& a, const Shared& s, const TileMap& map, int item, uint32_t count) {
    const Turn turn(a, item, count);
    wait_for(s.empty(turn.stage), turn.parity ^ 1);
    expect_bytes(s.full(turn.stage), kStageBytes);
#pragma unroll
    for (int which = 0; which < 3; ++which)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            copy_tile(s.part(turn.stage, which) + half * kBoxBytes, map, (which * a.heads + turn.head % a.heads) * kDim,
                      half * kBox, turn.head / a.heads, s.full(turn.stage));
}

// --- 64 queries, by a warpgroup -------------------------------------------------------------------------------------------

// The scores of the last keys that are there; others weigh nothing.
__device__ inline void hide_missing(const Arguments& a, float (&last)[8], int t) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (kMain + i / 4 * 8 + 2 * t + i % 2 >= a.tokens) last[i] = -INFINITY;
}

// Scores become weights relative to the largest, 2^(kScale (score - most)), in bfloat16 as the next product reads 16 keys.
template <int kCount>
__device__ __forceinline__ void weigh(float (&scores)[kCount], int first, const float (&most)[2], float (&total)[2], uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float& x = scores[first + i];
        x = exp2_fast(kScale * x - most[i / 2 % 2]);
        total[i / 2 % 2] += x;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = pair(scores[first + 2 * i], scores[first + 2 * i + 1]);
}

// A row of 64 columns: two of every eight in each of four threads, through the 16 rows of a warp in shared memory to memory.
template <bool kLow>
__device__ inline void write(const Arguments& a, uint32_t rows, const float (&sum)[32], const float (&factor)[2], int head, int first) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float inverse = kLow ? __fdividef(1.0f, __ldg(a.scale)) : 1.0f;
    const float by[2] = {factor[0] * inverse, factor[1] * inverse};
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float x = sum[4 * j + 2 * i] * by[i], y = sum[4 * j + 2 * i + 1] * by[i];
            const int row = g + 8 * i;
            if constexpr (kLow)
                store_half(rows + chunk_of(row, j / 2) + j % 2 * 8 + 2 * t, uint16_t(e4m3_of(x, y, 0, 0)));
            else
                store_word(rows + chunk_of(row, j) + 4 * t, pair(x, y));
        }
    __syncwarp();
    constexpr int kChunks = kLow ? 4 : 8, kBytes = kChunks * 16;  // of a row
    uint8_t* out = static_cast<uint8_t*>(a.out) + ((int64_t(head / a.heads) * a.tokens + first) * a.heads + head % a.heads) * kBytes;
#pragma unroll
    for (int i = 0; i < 16 * kChunks / 32; ++i) {
        const int row = (i * 32 + lane) / kChunks, chunk = lane % kChunks;
        *reinterpret_cast<uint4*>(out + int64_t(row) * a.heads * kBytes + chunk * 16) = load_chunk(rows + chunk_of(row, chunk));
    }
}

template <bool kLow>
__device__ inline void job(const Arguments& a, const Shared& s, const Turn& turn, int tile) {
    const int t = threadIdx.x % 4;
    uint8_t* own = s.part(turn.stage, 0) + tile * kQueries * 128;
    const uint32_t queries = uniform(operand(own)), keys = uniform(operand(s.part(turn.stage, 1)));
    const uint32_t values = uniform(operand(s.part(turn.stage, 2)));
    const uint32_t last_keys = keys + (kMain * 128 >> 4);
    float scores[128], last[8];
    begin_products();
    multiply_64x256<false>(scores, queries, keys);
#pragma unroll
    for (int k = 1; k < kDim / 16; ++k) multiply_64x256<true>(scores, queries + 2 * k, keys + 2 * k);
    multiply_64x16<false>(last, queries, last_keys);
#pragma unroll
    for (int k = 1; k < kDim / 16; ++k) multiply_64x16<true>(last, queries + 2 * k, last_keys + 2 * k);
    commit_products();
    wait_products<0>();
    hide_missing(a, last, t);
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {}, sum[32] = {};
#pragma unroll
    for (int i = 0; i < 128; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], scores[i]);
#pragma unroll
    for (int i = 0; i < 8; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], last[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = kScale * fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // the tensor cores work on one while the next is weighed
        uint32_t weights[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) weigh(scores, 8 * (4 * part + i), most, total, weights[i]);
        begin_products();
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply_transposed_64x64(sum, weights[i], values + (4 * part + i) * (16 * 128 >> 4));
        commit_products();
    }
    uint32_t weights[4];
    weigh(last, 0, most, total, weights);
    begin_products();
    multiply_transposed_64x64(sum, weights, values + (kMain * 128 >> 4));
    commit_products();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(~0u, total[r], 1);
        total[r] += __shfl_xor_sync(~0u, total[r], 2);
        total[r] = __fdividef(1.0f, total[r]);
    }
    wait_products<0>();
    const int warp_row = threadIdx.x / 32 % 4 * 16;
    write<kLow>(a, shared_address(own + warp_row * 128), sum, total, turn.head, tile * kQueries + warp_row);
}

// --- the other queries, by the third warpgroup ------------------------------------------------------------------------------

__device__ __forceinline__ void sync_group() { sync_threads<kGroup>(); }

// The product of two rows.
__device__ inline float product_of(uint32_t a, int a_row, uint32_t b, int b_row) {
    float sum = 0;
#pragma unroll
    for (int chunk = 0; chunk < 8; ++chunk) {
        const uint4 x = load_chunk(a + chunk_of(a_row, chunk)), y = load_chunk(b + chunk_of(b_row, chunk));
        sum += low_half(x.x) * low_half(y.x) + high_half(x.x) * high_half(y.x);
        sum += low_half(x.y) * low_half(y.y) + high_half(x.y) * high_half(y.y);
        sum += low_half(x.z) * low_half(y.z) + high_half(x.z) * high_half(y.z);
        sum += low_half(x.w) * low_half(y.w) + high_half(x.w) * high_half(y.w);
    }
    return sum;
}

template <bool kLow>
__device__ inline void one_query(const Arguments& a, const Shared& s, const Turn& turn, int query) {
    const int tid = threadIdx.x % kGroup, warp = tid / 32, lane = tid % 32;
    const uint32_t queries = shared_address(s.part(turn.stage, 0)), keys = shared_address(s.part(turn.stage, 1));
    const uint32_t values = shared_address(s.part(turn.stage, 2));
    float *weights = s.scratch(), *sums = weights + kMost, *of_warps = sums + 4 * kDim;
    float score[3], most = -INFINITY;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const int key = i * kGroup + tid;
        score[i] = key < a.tokens ? kScale * product_of(queries, query, keys, key) : -INFINITY;
        most = fmaxf(most, score[i]);
    }
#pragma unroll
    for (int bit = 16; bit; bit /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, bit));
    if (lane == 0) of_warps[warp] = most;
    sync_group();
    most = fmaxf(fmaxf(of_warps[0], of_warps[1]), fmaxf(of_warps[2], of_warps[3]));
    float total = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const int key = i * kGroup + tid;
        const float weight = exp2_fast(score[i] - most);
        if (key < kMost) weights[key] = weight;
        total += weight;
    }
#pragma unroll
    for (int bit = 16; bit; bit /= 2) total += __shfl_xor_sync(~0u, total, bit);
    if (lane == 0) of_warps[4 + warp] = total;
    sync_group();
    float sum[8] = {};  // of eight columns, over every 16th key
    const int chunk = tid % 8;
#pragma unroll
    for (int i = 0; i < kMost / 16; ++i) {
        const int key = 16 * i + tid / 8;
        const uint4 x = load_chunk(values + chunk_of(key, chunk));
        const float weight = weights[key];
        sum[0] += weight * low_half(x.x), sum[1] += weight * high_half(x.x);
        sum[2] += weight * low_half(x.y), sum[3] += weight * high_half(x.y);
        sum[4] += weight * low_half(x.z), sum[5] += weight * high_half(x.z);
        sum[6] += weight * low_half(x.w), sum[7] += weight * high_half(x.w);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], 8);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 16);
        if (lane < 8) sums[warp * kDim + 8 * chunk + i] = sum[i];
    }
    sync_group();
    if (tid < kDim) {
        const float all = of_warps[4] + of_warps[5] + of_warps[6] + of_warps[7];
        const float x = __fdividef(sums[tid] + sums[kDim + tid] + sums[2 * kDim + tid] + sums[3 * kDim + tid], all);
        const int64_t place = ((int64_t(turn.head / a.heads) * a.tokens + query) * a.heads + turn.head % a.heads) * kDim + tid;
        if constexpr (kLow)
            static_cast<uint8_t*>(a.out)[place] = uint8_t(e4m3_of(x * __fdividef(1.0f, __ldg(a.scale)), 0, 0, 0));
        else
            static_cast<__nv_bfloat16*>(a.out)[place] = __float2bfloat16_rn(x);
    }
    sync_group();  // before the next query uses the sums
}

// --- the kernel -------------------------------------------------------------------------------------------------------------

// Behind the last use of a stage by a warp.
__device__ __forceinline__ void release(const Shared& s, int stage) {
    fence_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(s.empty(stage));
}

template <bool kLow>
__device__ inline void compute(const Arguments& a, const Shared& s) {
    const int group = threadIdx.x / kGroup;
    uint32_t count = 0;
    for (int item = blockIdx.x; item < a.items(); item += gridDim.x, ++count) {
        const Turn turn(a, item, count);
        wait_for(s.full(turn.stage), turn.parity);
        for (int i = turn.part; i < kMain / kQueries / 2; i += a.parts) job<kLow>(a, s, turn, 2 * i + group);
        release(s, turn.stage);
    }
}

template <bool kLow>
__device__ inline void fetch_and_compute_rest(const Arguments& a, const Shared& s, const TileMap& map) {
    uint32_t count = 0;
    const bool fetches = threadIdx.x == 2 * kGroup;
    if (fetches && blockIdx.x < a.items()) fetch(a, s, map, blockIdx.x, 0);
    for (int item = blockIdx.x; item < a.items(); item += gridDim.x, ++count) {
        const int next = item + gridDim.x;
        if (fetches && next < a.items()) fetch(a, s, map, next, count + 1);
        __syncwarp();
        const Turn turn(a, item, count);
        wait_for(s.full(turn.stage), turn.parity);
        if (turn.part == 0)
            for (int query = kMain; query < a.tokens; ++query) one_query<kLow>(a, s, turn, query);
        release(s, turn.stage);
    }
}

template <bool kLow>
static __global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ Arguments a, const __grid_constant__ TileMap map) {
    const Shared s{aligned_shared()};
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) init_barrier(s.full(i), 1), init_barrier(s.empty(i), kThreads / 32);
        publish_barriers();
    }
    __syncthreads();
    wait_for_inputs();
    let_next_start();
    if (threadIdx.x < 2 * kGroup) {
        take_registers<216>();
        compute<kLow>(a, s);
    } else {
        give_registers<72>();
        fetch_and_compute_rest<kLow>(a, s, map);
    }
}

}  // namespace bldm::cuda::attend
