// Attention for heads of width 64 and 256 to 272 tokens, where a warpgroup has the scores of 64 queries to all keys in its
// registers at once: no running maximum, no rescaling.
//
// A block stays on its multiprocessor and takes heads (or halves of them) in turn. Two of its warpgroups, the mixers, have 64 of
// the first 256 queries at a time. The third brings the next head's queries, keys and values while the others work on this one,
// and computes the few queries behind the 256th, on which a tile of 64 would be spent, by products of single warps. The tensor
// cores and the units of exponentials need about as long as one another for a head, so the mixers take turns with the
// exponentials: meanwhile the other one multiplies.
#pragma once

#include "cuda/lanes.cuh"
#include "cuda/warpgroup.cuh"

namespace bldm::cuda::attend {

constexpr int kHeadWidth = 64, kTokenBytes = 2 * kHeadWidth;
constexpr int kTiled = 256, kMostTokens = 272;  // tokens whose queries mixers have; tokens
constexpr int kBoxTokens = kMostTokens / 2, kBoxBytes = kBoxTokens * kTokenBytes;  // of a copy
constexpr int kPartBytes = 2 * kBoxBytes, kStageBytes = 3 * kPartBytes;            // queries, keys, values; the three of a head
constexpr int kStages = 2;
constexpr int kGroup = 128, kMixers = 2, kBlockThreads = (kMixers + 1) * kGroup;
constexpr int kTileQueries = 64, kPairs = 2;  // of tiles, one for each mixer
constexpr int kFeederWarps = kGroup / 32, kRound = 2;
// Of 65536 registers; a block starts with 168 a thread.
constexpr int kMixerRegisters = 192, kFeederRegisters = 112;
// Bytes of a row on its way out: in bfloat16, in e4m3. Neighbouring rows begin in other banks.
constexpr int kOutStride = 2 * kHeadWidth + 16, kLowOutStride = kHeadWidth + 16;
constexpr float kScale = 0.125f * 1.44269504f;  // 1 / sqrt(64), for powers of 2
static_assert(kPairs * kMixers * kTileQueries == kTiled);
static_assert(kBoxBytes % 1024 == 0, "the swizzle repeats every 1024 bytes");

struct Arguments {
    TensorMap qkv;  // (3 W, tokens, samples), boxes of kBoxTokens tokens of a head
    void* out;
    const float* out_scale;  // null: out is bfloat16
    float* log_sums;         // (samples, heads, tokens) of the logarithms of the sums of exponentials, or null
    int tokens, heads;       // of a sample
    int split, units;        // whether a unit is half a head (1) or a head (0); of all heads
};

// What a block takes at a time: a head, or half of its queries.
struct Unit {
    int sample, head, first_pair, end_pair;
    bool has_rest;  // the queries behind the 256th

    __device__ Unit(const Arguments& a, int i) {
        const int all = i >> a.split, part = i & a.split;
        sample = all / a.heads, head = all % a.heads;
        first_pair = part, end_pair = a.split ? part + 1 : kPairs;
        has_rest = part == a.split;
    }
    __device__ int64_t sums_offset(const Arguments& a, int token) const {
        return (int64_t(sample) * a.heads + head) * a.tokens + token;
    }
    __device__ int64_t out_offset(const Arguments& a, int token) const {
        return (int64_t(sample) * a.tokens + token) * a.heads * kHeadWidth + head * kHeadWidth;
    }
};

struct Shared {
    uint8_t* stages;

    __device__ uint8_t* part(int stage, int which) const { return stages + stage * kStageBytes + which * kPartBytes; }
    __device__ uint8_t* out(int warp) const { return stages + kStages * kStageBytes + warp * 16 * kOutStride; }
    // What the feeder's warps have found of eight of the queries behind the 256th: of each one the largest score and the sum of
    // the weights, and of kRound at a time the mixed values.
    __device__ float* found(int warp) const { return reinterpret_cast<float*>(out(kMixers * kGroup / 32)) + warp * 8 * 2; }
    __device__ float* part_of(int warp) const { return found(kFeederWarps) + warp * kRound * kHeadWidth; }
    // What results are multiplied by besides the reciprocal of the sum.
    __device__ float* out_factor() const { return part_of(kFeederWarps); }
    // Queries and keys of a stage are there; its values are; it may be written. A mixer may compute its exponentials.
    __device__ uint64_t* keys_there(int stage) const { return reinterpret_cast<uint64_t*>(out_factor() + 2) + stage; }
    __device__ uint64_t* values_there(int stage) const { return keys_there(kStages) + stage; }
    __device__ uint64_t* free(int stage) const { return values_there(kStages) + stage; }
    __device__ uint64_t* turn(int mixer) const { return free(kStages) + mixer; }
};

constexpr int kFoundFloats = kFeederWarps * (8 * 2 + kRound * kHeadWidth) + 2;
constexpr int kBarriers = 3 * kStages + kMixers;
constexpr int kSharedBytes =
    1024 + kStages * kStageBytes + kMixers * kGroup / 32 * 16 * kOutStride + kFoundFloats * 4 + kBarriers * 8;
static_assert(kSharedBytes <= 227 * 1024);

// The stage of a block's i-th unit, and the parity of its barriers' phase.
__device__ __forceinline__ int stage_of(int i) { return i % kStages; }
__device__ __forceinline__ uint32_t parity_of(int i) { return i / kStages & 1; }

// The 16 queries of a warp, of which a thread has columns 8 j + 2 t and the next one in rows g and g + 8: through shared memory,
// kRows at a time, so that the warp writes whole rows, 16 bytes a thread.
template <bool kLow, int kRows = 16>
__device__ __forceinline__ void write_rows(const float (&mixed)[32], float upper_factor, float lower_factor, uint8_t* staged,
                                           uint8_t* to, int64_t row_bytes, int lane) {
    constexpr int kBytes = kLow ? 1 : 2, kStride = kLow ? kLowOutStride : kOutStride, kChunks = kHeadWidth * kBytes / 16;
    static_assert(kRows == 8 || kRows == 16);
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int first = 0; first < 16; first += kRows) {
        __syncwarp();  // the rows before these have been read
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int below = i % 2 * 8 - first;
            if (below < 0 || below >= kRows) continue;
            const float factor = i % 2 ? lower_factor : upper_factor;
            const float x = mixed[2 * i] * factor, y = mixed[2 * i + 1] * factor;
            uint8_t* at = staged + (g + below) * kStride + (i / 2 * 8 + 2 * t) * kBytes;
            if constexpr (kLow)
                *reinterpret_cast<uint16_t*>(at) = e4m3_pair(x, y);
            else
                *reinterpret_cast<uint32_t*>(at) = bfloat16_pair(x, y);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kRows * kChunks / 32; ++i) {
            const int row = i * (32 / kChunks) + lane / kChunks, byte = lane % kChunks * 16;
            const uint4 x = *reinterpret_cast<const uint4*>(staged + row * kStride + byte);
            *reinterpret_cast<uint4*>(to + (first + row) * row_bytes + byte) = x;
        }
    }
}

// Of a sum of powers of 2 that -offset was taken off, as a natural logarithm.
__device__ __forceinline__ float log_sum(float sum, float offset) { return 0.69314718f * (log2_fast(sum) - offset); }

// Of 64 queries, of which a thread has two rows.
struct Mixed {
    float values[32], sum[2] = {}, offset[2];  // of weights, which are powers of 2 that -offset was taken off

    // What the values have to be multiplied by.
    __device__ float factor(int r, float by) const { return __fdividef(by, sum[r]); }
};

// 64 queries, kRest keys behind the 256th in tiles of 8 or 16. `start` waits for the values and for the turn to compute weights,
// which is then the `next` one's.
template <int kRest, class Start>
__device__ __forceinline__ void mix_tile(Mixed& to, uint32_t queries, uint32_t keys, uint32_t values, int tokens, const Start& start,
                                         uint64_t* next) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    float score[kTiled / 2], rest[kRest / 2];  // score[4 j + 2 r + c]: row g + 8 r, key 8 j + 2 t + c
    multiply_scores(score, rest, queries, keys);
#pragma unroll
    for (int j = 0; j < kRest / 2; ++j)
        if (kTiled + j / 4 * 8 + 2 * t + j % 2 >= tokens) rest[j] = -INFINITY;
    // Two chains of comparisons a row, so that one need not wait for itself.
    float most[4] = {score[0], score[1], score[2], score[3]};
#pragma unroll
    for (int j = 4; j < kTiled / 2; ++j) most[j % 4] = fmaxf(most[j % 4], score[j]);
#pragma unroll
    for (int j = 0; j < kRest / 2; ++j) most[j % 4] = fmaxf(most[j % 4], rest[j]);
    float(&offset)[2] = to.offset, (&sum)[2] = to.sum, (&mixed)[32] = to.values;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float x = fmaxf(most[2 * r], most[2 * r + 1]);
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        offset[r] = -x * kScale;
    }
    const auto weigh = [&](float x, float y, int r) {
        x = exp2_fast(x * kScale + offset[r]), y = exp2_fast(y * kScale + offset[r]);
        sum[r] += x + y;
        return bfloat16_pair(x, y);
    };
    start();
#pragma unroll
    for (int i = 0; i < 32; ++i) mixed[i] = 0;
#pragma unroll
    for (int block = 0; block < 4; ++block) {  // of 64 keys, whose product runs during the next one's exponentials
        uint32_t weights[16];
        // No change, but the compiler has to add up what there is first. Left to itself it does so at the end, with
        // all the exponentials in registers, of which there are not enough.
        if (block) offset[0] = fmaf(sum[0], 0.f, offset[0]), offset[1] = fmaf(sum[1], 0.f, offset[1]);
#pragma unroll
        for (int j = 0; j < 16; ++j) weights[j] = weigh(score[32 * block + 2 * j], score[32 * block + 2 * j + 1], j % 2);
        multiply_values(mixed, weights, values + block * (64 * kTokenBytes / 16));
        // The last block's is left to the time when the other mixer already has its first.
        if (block == 2 && lane == 0) arrive(next);
    }
    uint32_t weights[4] = {};
#pragma unroll
    for (int j = 0; j < kRest / 4; ++j) weights[j] = weigh(rest[2 * j], rest[2 * j + 1], j % 2);
    multiply_values(mixed, weights, values + kTiled * kTokenBytes / 16);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
    wait_values(mixed);
}

// Queries of a mixer.
template <int kRest>
__device__ __forceinline__ void mix(const Arguments& a, const Shared& s, int mixer) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    uint32_t turns = 0;
    if (mixer == 1 && lane == 0) arrive(s.turn(0));
    for (int u = blockIdx.x, i = 0; u < a.units; u += gridDim.x, ++i) {
        const Unit unit(a, u);
        const int stage = stage_of(i);
        const uint32_t values = operand(s.part(stage, 2));
        wait_for(s.keys_there(stage), parity_of(i));
        for (int pair = unit.first_pair; pair < unit.end_pair; ++pair) {
            const int first = (pair * kMixers + mixer) * kTileQueries;
            Mixed mixed;
            const auto start = [&] {
                wait_for(s.values_there(stage), parity_of(i));
                wait_for(s.turn(mixer), turns++ & 1);
            };
            mix_tile<kRest>(mixed, operand(s.part(stage, 0) + first * kTokenBytes), operand(s.part(stage, 1)), values, a.tokens, start,
                            s.turn(1 - mixer));
            if (pair + 1 == unit.end_pair && lane == 0) arrive(s.free(stage));
            const float upper = mixed.factor(0, *s.out_factor()), lower = mixed.factor(1, *s.out_factor());
            if (a.log_sums && t == 0)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    a.log_sums[unit.sums_offset(a, first + warp % 4 * 16 + lane / 4 + 8 * r)] =
                        log_sum(mixed.sum[r], mixed.offset[r]);
            const int64_t row_values = a.heads * kHeadWidth, at = unit.out_offset(a, first + warp % 4 * 16);
            if (a.out_scale)
                write_rows<true>(mixed.values, upper, lower, s.out(warp), static_cast<uint8_t*>(a.out) + at, row_values, lane);
            else
                write_rows<false>(mixed.values, upper, lower, s.out(warp), static_cast<uint8_t*>(a.out) + 2 * at, 2 * row_values, lane);
        }
    }
}

// Where the 16-byte chunk of a token's row is.
__device__ __forceinline__ uint32_t chunk_of(int token, int chunk) { return uint32_t(token * kTokenBytes + (chunk ^ token % 8) * 16); }

// 16 bytes as eight values.
__device__ __forceinline__ void values_of(float (&to)[8], uint4 x) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
}

// Those of a token's row.
__device__ __forceinline__ void load_values(float (&to)[8], const uint8_t* part, int token, int chunk) {
    values_of(to, *reinterpret_cast<const uint4*>(part + chunk_of(token, chunk)));
}

// The queries behind the 256th, eight at a time: every warp has a share of the keys, and what they found is put together. A warp's
// products wait for those of the warpgroups, so there are few of them, and many that do not wait for one another. Keys are rows
// of the scores, and columns rows of what is mixed, as the queries are hardly worth a tile's eight columns.
__device__ inline void mix_rest(const Arguments& a, const Shared& s, const Unit& unit, int stage) {
    constexpr int kBlocks = kMostTokens / 16, kShare = (kBlocks + kFeederWarps - 1) / kFeederWarps;  // of 16 keys; of a warp
    const int tid = threadIdx.x % kGroup, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int row = lane % 8, low = lane / 8 % 2, high = lane / 16;  // of the matrices whose rows this lane has the address of
    const uint32_t queries = shared_address(s.part(stage, 0)), keys = shared_address(s.part(stage, 1));
    const uint32_t values = shared_address(s.part(stage, 2));
    for (int group = 0; group < a.tokens - kTiled; group += 8) {
        float score[kShare][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {}, mixed[kHeadWidth / 16][4] = {};
#pragma unroll
        for (int k = 0; k < kHeadWidth / 16; k += 2) {
            uint32_t query[4];
            load_matrices(query, queries + chunk_of(kTiled + group + row, 2 * k + lane / 8));
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < kShare; ++i) {
                    const int block = warp + kFeederWarps * i;
                    if (block >= kBlocks) continue;
                    uint32_t key[4];
                    load_matrices(key, keys + chunk_of(16 * block + 8 * low + row, 2 * (k + half) + high));
                    mma<__nv_bfloat16>(score[i], key, query[2 * half], query[2 * half + 1], score[i]);
                }
        }
#pragma unroll
        for (int i = 0; i < kShare; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int key = 16 * (warp + kFeederWarps * i) + g + j / 2 * 8;
                score[i][j] = key < a.tokens ? kScale * score[i][j] : -INFINITY;
                most[j % 2] = fmaxf(most[j % 2], score[i][j]);
            }
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2)
#pragma unroll
            for (int r = 0; r < 2; ++r) most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], bit));
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            uint32_t weights[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float x = exp2_fast(score[i][2 * half] - most[0]), y = exp2_fast(score[i][2 * half + 1] - most[1]);
                sum[0] += x, sum[1] += y;
                weights[half] = transposed(bfloat16_pair(x, y));
            }
            const int block = warp + kFeederWarps * i;
            if (block >= kBlocks) continue;
#pragma unroll
            for (int n = 0; n < kHeadWidth / 16; ++n) {
                uint32_t value[4];
                load_transposed(value, values + chunk_of(16 * block + 8 * high + row, 2 * n + low));
                mma<__nv_bfloat16>(mixed[n], value, weights[0], weights[1], mixed[n]);
            }
        }
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2)
#pragma unroll
            for (int r = 0; r < 2; ++r) sum[r] += __shfl_xor_sync(~0u, sum[r], bit);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (g == 0) s.found(warp)[2 * (2 * t + r)] = most[r], s.found(warp)[2 * (2 * t + r) + 1] = sum[r];
        for (int begin = group; begin < min(a.tokens - kTiled, group + 8); begin += kRound) {
            if (t == begin % 8 / kRound)
#pragma unroll
                for (int n = 0; n < kHeadWidth / 16; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) s.part_of(warp)[i % 2 * kHeadWidth + 16 * n + i / 2 * 8 + g] = mixed[n][i];
            sync_part<kGroup>(2);
            const int of_round = tid / kHeadWidth, query = begin + of_round, column = tid % kHeadWidth;
            if (query < a.tokens - kTiled) {
                float all = -INFINITY, total = 0, result = 0;
#pragma unroll
                for (int i = 0; i < kFeederWarps; ++i) all = fmaxf(all, s.found(i)[2 * (query % 8)]);
#pragma unroll
                for (int i = 0; i < kFeederWarps; ++i) {
                    const float factor = exp2_fast(s.found(i)[2 * (query % 8)] - all);
                    total += factor * s.found(i)[2 * (query % 8) + 1];
                    result += factor * s.part_of(i)[of_round * kHeadWidth + column];
                }
                result *= __fdividef(*s.out_factor(), total);
                const int64_t at = unit.out_offset(a, kTiled + query) + column;
                if (a.out_scale)
                    static_cast<uint8_t*>(a.out)[at] = uint8_t(e4m3_pair(result, 0));
                else
                    static_cast<uint16_t*>(a.out)[at] = uint16_t(bfloat16_pair(result, 0));
                if (a.log_sums && column == 0) a.log_sums[unit.sums_offset(a, kTiled + query)] = log_sum(total, -all);
            }
            sync_part<kGroup>(2);  // before the next queries are written
        }
    }
}

// One thread: the i-th unit of this block into its stage.
__device__ inline void fetch(const Arguments& a, const Shared& s, int i) {
    const Unit unit(a, blockIdx.x + i * gridDim.x);
    const int stage = stage_of(i);
    if (i >= kStages) wait_for(s.free(stage), parity_of(i) ^ 1);
    for (int part = 0; part < 3; ++part) {
        uint64_t* there = part < 2 ? s.keys_there(stage) : s.values_there(stage);
        if (part != 1) expect_bytes(there, part ? kPartBytes : 2 * kPartBytes);
        for (int box = 0; box < 2; ++box)
            copy_box(s.part(stage, part) + box * kBoxBytes, &a.qkv, (part * a.heads + unit.head) * kHeadWidth, box * kBoxTokens,
                     unit.sample, there);
    }
}

// The third warpgroup.
__device__ inline void feed(const Arguments& a, const Shared& s) {
    const bool fetches = threadIdx.x % kGroup == 0;
    if (fetches) fetch(a, s, 0);
    for (int u = blockIdx.x, i = 0; u < a.units; u += gridDim.x, ++i) {
        const Unit unit(a, u);
        const int stage = stage_of(i);
        if (fetches && u + int(gridDim.x) < a.units) fetch(a, s, i + 1);
        __syncwarp();
        wait_for(s.keys_there(stage), parity_of(i));
        wait_for(s.values_there(stage), parity_of(i));
        if (unit.has_rest) mix_rest(a, s, unit, stage);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(s.free(stage));
    }
}

template <int kRest>
static __global__ void __launch_bounds__(kBlockThreads, 1) kernel(const __grid_constant__ Arguments a) {
    const Shared s{aligned_shared()};
    const int group = threadIdx.x / kGroup;
    if (threadIdx.x == 0) {
        prefetch_map(&a.qkv);
        for (int i = 0; i < kStages; ++i)
            init_barrier(s.keys_there(i), 1), init_barrier(s.values_there(i), 1), init_barrier(s.free(i), kBlockThreads / 32);
        for (int i = 0; i < kMixers; ++i) init_barrier(s.turn(i), kGroup / 32);
        publish_barriers();
    }
    wait_for_inputs();
    let_next_start();
    if (threadIdx.x == 0) *s.out_factor() = a.out_scale ? 1 / *a.out_scale : 1;
    sync_threads<kBlockThreads>();
    if (group < kMixers) {
        take_registers<kMixerRegisters>();
        mix<kRest>(a, s, group);
    } else {
        give_registers<kFeederRegisters>();
        feed(a, s);
    }
}

}  // namespace bldm::cuda::attend
