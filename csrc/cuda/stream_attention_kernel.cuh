// Queries, keys and values of the residual stream behind its norm, as product_kernel.cuh makes them, and their attention, as
// attention_kernel.cuh has it, in one kernel: a head's never leave the multiprocessor that made them.
//
// A block takes heads in turn, the two blocks of a cluster neighbouring heads of the same sample, of whose rows of the stream each
// one fetches half for both. Its mixers multiply 128 rows each with the head's 192 rows of weights, write what comes out to shared
// memory, where attention reads it, and mix. The few rows behind the 256th are columns of small products beside theirs, whose rows
// are the weights of queries, keys or values. The third warpgroup, the feeder, fetches stages of 128 bytes of k, which must not wait
// for anything else, and mixes for the queries behind the 256th, without the tensor cores, which the mixers need. Memory is too small
// for three stages beside keys and values: these are where the last stage of a head is, which is given back when they are mixed.
//
// The columns of queries, keys and values are in the order of the weights' rows (inference/stream.py): it is the same in queries
// and keys, and of the result it makes eight columns of a row neighbours in a thread.
#pragma once

#include "cuda/attention_kernel.cuh"
#include "cuda/norm.cuh"
#include "cuda/ring.cuh"

namespace bldm::cuda::attend::stream {

constexpr int kCluster = 2, kParts = 3, kColumns = kParts * kHeadWidth;
constexpr int kStageDepth = 128;  // bytes of k
constexpr int kRowBytes = kMostTokens * kStageDepth, kStageBytes = kRowBytes + kColumns * kStageDepth;
constexpr int kStages = 3;  // of which a head takes a multiple, so that its last one is the third
constexpr int kAhead = kStages - 1;
constexpr int kRest = 8, kMost = kTiled + kRest;  // tokens behind the 256th, at most; tokens
constexpr int kTiles = kTiled / 64 / kMixers;     // of 64 rows, of a mixer
constexpr int kPreparers = kGroup - 32;           // threads
// Of those that a block starts with, 168 a thread.
constexpr int kMixerRegisters = 232, kFeederRegisters = 40;
static_assert(kMixers * kMixerRegisters + kFeederRegisters <= (kMixers + 1) * 168);
// Floats, of a query behind the 256th: weights; their largest exponent, their sum and mixed values, of every warp.
constexpr int kFound = kMostTokens + 2 * kFeederWarps + kFeederWarps * kHeadWidth;
static_assert(kStageBytes <= 2 * kPartBytes && kRowBytes == 2 * kBoxBytes);

struct Arguments {
    TensorMap rows, weights;  // (k, tokens, samples) in boxes of kBoxTokens, (k, 3 W) in boxes of kHeadWidth
    int tokens, heads;        // of a sample
    int num_rows;             // of all samples
    int steps, units;         // of k; pairs of heads of all samples
    const float *input_scale, *weight_scale;  // of e4m3
    const float* bias;
    const float2* moments;  // of the rows, in parts
    int parts, depth;
    float eps;
    void* out;
    const float* out_scale;  // null: out is bfloat16
};

struct Shared {
    uint8_t* stages;

    __device__ uint8_t* rows(int slot) const { return stages + slot * kStageBytes; }
    __device__ uint8_t* weights(int slot) const { return rows(slot) + kRowBytes; }
    // Queries, keys, values.
    __device__ uint8_t* part(int which) const { return rows(kStages - 1) + (which + 2) % kParts * kPartBytes; }
    // Of the rows r times the scale of the product; of the columns the bias, in their own order.
    __device__ float* scales() const { return reinterpret_cast<float*>(rows(kStages - 1) + kParts * kPartBytes); }
    __device__ float* bias() const { return scales() + kMostTokens; }
    __device__ float* weights_of_keys() const { return bias() + kColumns; }
    __device__ float* largest(int warp) const { return weights_of_keys() + kMostTokens + warp; }
    __device__ float* total(int warp) const { return largest(kFeederWarps) + warp; }
    __device__ float* mixed(int warp) const { return total(kFeederWarps) + warp * kHeadWidth; }
    // A stage is there; both blocks of the cluster may write it. A mixer may compute its exponentials.
    __device__ uint64_t* full(int slot) const { return reinterpret_cast<uint64_t*>(mixed(kFeederWarps)) + slot; }
    __device__ uint64_t* empty(int slot) const { return full(kStages) + slot; }
    __device__ uint64_t* turn(int mixer) const { return empty(kStages) + mixer; }
};

constexpr int kSharedBytes = (kStages - 1) * kStageBytes + kParts * kPartBytes +
                             (kMostTokens + kColumns + kFound) * 4 + (2 * kStages + kMixers) * 8;
static_assert(kSharedBytes <= 227 * 1024);

// What a block takes at a time.
struct Head {
    int sample, head;

    __device__ Head(const Arguments& a, int unit, int rank) {
        sample = unit / (a.heads / kCluster), head = unit % (a.heads / kCluster) * kCluster + rank;
    }
    __device__ int64_t out_offset(const Arguments& a, int token) const {
        return ((int64_t(sample) * a.tokens + token) * a.heads + head) * kHeadWidth;
    }
};

// A block's, among all.
struct Place {
    int rank, cluster, clusters;
};

// A warp of a mixer needs a stage no more.
__device__ __forceinline__ void release(const Shared& s, int slot) {
    if (threadIdx.x % 32 < kCluster) arrive_at(s.empty(slot), threadIdx.x % 32);
}

// All have multiplied, or have written: mixers, and the feeder, which waits for them first.
__device__ __forceinline__ void meet_feeder() {
    arrive_part<kBlockThreads>(4);
    sync_part<kBlockThreads>(3);
}
__device__ __forceinline__ void meet_mixers() {
    sync_part<kBlockThreads>(4);
    arrive_part<kBlockThreads>(3);
}

// Which column of a head a place among 64 is: the weights' order, of every 32.
__device__ __forceinline__ int column_of(int place) { return place / 32 * 32 + place % 8 / 2 * 8 + place % 32 / 8 * 2 + place % 2; }

// One thread: stages, one after the other, of all heads of this block.
template <bool kLow>
struct Fetcher {
    static constexpr int kValues = kStageDepth / (kLow ? 1 : 2);
    const Arguments& a;
    const Shared& s;
    const Place& at;
    RingPlace<kStages> place;
    int unit, step = 0;

    __device__ Fetcher(const Arguments& a, const Shared& s, const Place& at) : a(a), s(s), at(at), unit(at.cluster) {}

    __device__ void fetch_weights(int slot, int step) const {
        expect_bytes(s.full(slot), kStageBytes);
        for (int part = 0; part < kParts; ++part)
            copy_box(s.weights(slot) + part * kHeadWidth * kStageDepth, &a.weights, step * kValues,
                     (part * a.heads + Head(a, unit, at.rank).head) * kHeadWidth, 0, s.full(slot));
    }
    __device__ void fetch_rows(int slot, int step) const {
        // The next kernel but one adds to it.
        copy_box_to<kLong>((1 << kCluster) - 1, s.rows(slot) + at.rank * kBoxBytes, &a.rows, step * kValues, at.rank * kBoxTokens,
                           Head(a, unit, at.rank).sample, s.full(slot));
    }
    // The first stages of all: weights do not depend on the kernel in front of this one.
    __device__ void begin() {
        for (int i = 0; i < kAhead; ++i) fetch_weights(i, i);
        wait_for_inputs();
        for (; step < kAhead; ++step, place.advance()) fetch_rows(step, step);
        fetch();
    }
    __device__ void fetch() {
        if (step == a.steps) step = 0, unit += at.clusters;
        if (unit >= a.units) return;
        // The feeder uses the last stage for attention alone.
        if (place.slot == kStages - 1 && step >= kStages) release_by_feeder();
        wait_for(s.empty(place.slot), place.parity ^ 1);
        fetch_weights(place.slot, step);
        fetch_rows(place.slot, step);
        ++step, place.advance();
    }
    __device__ void release_by_feeder() const {
        for (int rank = 0; rank < kCluster; ++rank) arrive_at(s.empty(kStages - 1), rank);
    }
    // The other block arrives here until it has read what is shared.
    __device__ void end() {
        for (int i = 0; i < kStages; ++i, place.advance()) wait_for(s.empty(place.slot), place.parity ^ 1);
    }
};

// Biases of a head and scales of its rows, by the feeder's other warps while mixers multiply: what they ask for comes late, behind
// the stages.
__device__ __forceinline__ void prepare(const Arguments& a, const Shared& s, const Head& of, int worker, float scale) {
    constexpr int kAtOnce = 12;  // parts
    for (int i = worker; i < kColumns; i += kPreparers)
        s.bias()[i] = __ldg(a.bias + (i / kHeadWidth * a.heads + of.head) * kHeadWidth + i % kHeadWidth);
    for (int row = worker; row < a.tokens; row += kPreparers) {
        const float2* const from = a.moments + of.sample * a.tokens + row;
        float sum = 0, squares = 0;
        for (int first = 0; first < a.parts; first += kAtOnce) {
            float2 x[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                x[i] = first + i < a.parts ? from[int64_t(first + i) * a.num_rows] : make_float2(0, 0);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) sum += x[i].x, squares += x[i].y;
        }
        const float by = 1.f / a.depth;
        s.scales()[row] = scale_behind_norm(sum * by, squares * by, a.eps, scale);
    }
}

// Queries, keys or values of the rows behind the 256th: rows of the products are columns of the part.
__device__ __forceinline__ void write_rest(const Shared& s, const float (&sums)[kRest / 2], int part, int tokens) {
    const uint32_t thread = from_here_on(threadIdx.x % kGroup);
    const int g = thread % 32 / 4, t = thread % 4;
#pragma unroll
    for (int i = 0; i < kRest / 2; ++i) {
        const int token = kTiled + 2 * t + i % 2, place = thread / 32 * 16 + g + i / 2 * 8;
        const float y = token < tokens ? s.scales()[token] * sums[i] + s.bias()[part * kHeadWidth + column_of(place)] : 0;
        store_half(shared_address(s.part(part)) + chunk_of(token, place / 8) + place % 8 * 2, uint16_t(bfloat16_pair(y, 0)));
    }
}

// Attention of a query behind the 256th, by the feeder: a thread has two keys, then eight columns of 16 values. Few instructions
// read memory, as these wait in a line with the mixers' exponentials.
template <class Write>
__device__ __forceinline__ void mix_query(const Shared& s, int query, int tokens, int tid, const Write& write) {
    const int warp = tid / 32, lane = tid % 32;
    constexpr int kKeys = 3;  // of a thread, the last one behind the 256th
    const bool third = kTiled + warp * 32 < tokens;
    float score[kKeys] = {};
#pragma unroll 2
    for (int chunk = 0; chunk < kTokenBytes / 16; ++chunk) {
        float q[8], k[8];
        load_values(q, s.part(0), query, chunk);
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            if (i == 2 && !third) break;
            load_values(k, s.part(1), i < 2 ? tid + i * kGroup : min(kTiled + tid, kMost - 1), chunk);
#pragma unroll
            for (int j = 0; j < 8; ++j) score[i] += q[j] * k[j];
        }
    }
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
        score[i] = tid + i * kGroup < tokens ? kScale * score[i] : -INFINITY;
        most = fmaxf(most, score[i]);
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, bit));
    if (lane == 0) *s.largest(warp) = most;
    sync_part<kGroup>(2);
    const float4 all = *reinterpret_cast<const float4*>(s.largest(0));
    most = fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w));
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
        const float weight = exp2_fast(score[i] - most);
        if (i < 2 || tid < kRest) s.weights_of_keys()[tid + i * kGroup] = weight;
        sum += weight;
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (lane == 0) *s.total(warp) = sum;
    sync_part<kGroup>(2);
    constexpr int kShare = kTiled / (kGroup / 8);  // of keys, of eight threads
    const int first = tid / 8 * kShare, chunk = tid % 8;
    float mixed[8] = {};
    const auto add = [&](int key, float weight) {
        float v[8];
        load_values(v, s.part(2), key, chunk);
#pragma unroll
        for (int j = 0; j < 8; ++j) mixed[j] += weight * v[j];
    };
#pragma unroll 1
    for (int i = 0; i < kShare; i += 4) {
        const float4 weights = *reinterpret_cast<const float4*>(s.weights_of_keys() + first + i);
        add(first + i, weights.x), add(first + i + 1, weights.y), add(first + i + 2, weights.z), add(first + i + 3, weights.w);
    }
    if (kTiled + tid / 8 < tokens) add(kTiled + tid / 8, s.weights_of_keys()[kTiled + tid / 8]);
    __syncwarp();
    fold<4>(mixed, lane);
    float four[4] = {mixed[0], mixed[1], mixed[2], mixed[3]};
    fold<2, 16>(four, lane);
    *reinterpret_cast<float2*>(s.mixed(warp) + chunk * 8 + lane / 16 * 4 + lane / 8 % 2 * 2) = make_float2(four[0], four[1]);
    sync_part<kGroup>(2);
    if (tid < kHeadWidth) {
        const float4 totals = *reinterpret_cast<const float4*>(s.total(0));
        float result = 0;
#pragma unroll
        for (int i = 0; i < kFeederWarps; ++i) result += s.mixed(i)[tid];
        write(column_of(tid), __fdividef(result, totals.x + totals.y + totals.z + totals.w));
    }
}

template <bool kLow>
__device__ inline void feed(const Arguments& a, const Shared& s, const Place& at) {
    const int tid = threadIdx.x % kGroup;
    const float factor = a.out_scale ? 1 / *a.out_scale : 1, scale = kLow ? *a.input_scale * *a.weight_scale : 1;
    Fetcher<kLow> fetcher(a, s, at);
    if (tid == 0) fetcher.begin();
    wait_for_inputs();
    for (int unit = at.cluster; unit < a.units; unit += at.clusters) {
        const Head head(a, unit, at.rank);
        if (tid == 0)
            for (int step = unit == at.cluster; step < a.steps; ++step) fetcher.fetch();
        if (tid >= kGroup - kPreparers) prepare(a, s, head, tid - (kGroup - kPreparers), scale);
        __syncwarp();
        meet_mixers();
        // Mixers take 16 values at a time, and those that have no weight have to be numbers.
        for (int i = tid; i < (kMostTokens - kMost) * kTokenBytes / 4; i += kGroup)
            store_word(shared_address(s.part(2)) + kMost * kTokenBytes + 4 * i, 0);
        fence_async_shared();
        meet_mixers();
        for (int query = kTiled; query < a.tokens; ++query)
            mix_query(s, query, a.tokens, tid, [&](int column, float result) {
                const int64_t to = head.out_offset(a, query) + column;
                if (a.out_scale)
                    static_cast<uint8_t*>(a.out)[to] = uint8_t(e4m3_pair(result * factor, 0));
                else
                    static_cast<uint16_t*>(a.out)[to] = uint16_t(bfloat16_pair(result, 0));
            });
        sync_part<kGroup>(2);
        if (tid == 0) fetcher.release_by_feeder();
    }
    if (tid == 0) fetcher.end();
    __syncwarp();
}

// What a mixer has multiplied, to where attention reads it.
template <int kSums>
__device__ __forceinline__ void write_parts(const Shared& s, const float (&sums)[kTiles][kSums], int mixer) {
    const uint32_t thread = from_here_on(threadIdx.x % kGroup);
    const int lane = thread % 32, g = lane / 4, t = lane % 4, row = mixer * 64 + thread / 32 * 16 + g;
    float scale[kTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) scale[i / 2][i % 2] = s.scales()[row + i / 2 * (kMixers * 64) + i % 2 * 8];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        const uint32_t to = shared_address(s.part(part)) + row * kTokenBytes + 4 * t;
#pragma unroll
        for (int of_32 = 0; of_32 < kHeadWidth / 32; ++of_32) {
            const float* bias = s.bias() + part * kHeadWidth + of_32 * 32 + 8 * t;
            const float4 low = load_four_again(bias), high = load_four_again(bias + 4);
            const float of[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 2 * kTiles; ++i) {
                    const float* sum = sums[i / 2] + 4 * (part * kHeadWidth / 8 + of_32 * 4 + j) + i % 2 * 2;
                    const float by = scale[i / 2][i % 2];
                    store_word(to + (i / 2 * (kMixers * 64) + i % 2 * 8) * kTokenBytes + ((of_32 * 4 + j) ^ g) * 16,
                               bfloat16_pair(by * sum[0] + of[2 * j], by * sum[1] + of[2 * j + 1]));
                }
        }
    }
}

// A thread's two rows of 64 queries: eight neighbours of every 32 columns.
__device__ __forceinline__ void write_mixed(const Arguments& a, const Head& head, const Mixed& mixed, int first, float factor) {
    const int lane = threadIdx.x % 32, row = first + threadIdx.x % kGroup / 32 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float by = mixed.factor(r, factor);
        const int64_t to = head.out_offset(a, row + 8 * r) + lane % 4 * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const auto of = [&](int i) { return by * mixed.values[16 * half + i / 2 * 4 + 2 * r + i % 2]; };
            if (a.out_scale)
                *reinterpret_cast<uint2*>(static_cast<uint8_t*>(a.out) + to + 32 * half) =
                    make_uint2(e4m3_of(of(0), of(1), of(2), of(3)), e4m3_of(of(4), of(5), of(6), of(7)));
            else
                *reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.out) + to + 32 * half) =
                    make_uint4(bfloat16_pair(of(0), of(1)), bfloat16_pair(of(2), of(3)), bfloat16_pair(of(4), of(5)),
                               bfloat16_pair(of(6), of(7)));
        }
    }
}

template <bool kLow>
__device__ __forceinline__ void multiply_and_mix(const Arguments& a, const Shared& s, const Place& at, int mixer) {
    const float factor = a.out_scale ? 1 / *a.out_scale : 1;
    // uniform, so that operands are named by registers that can be counted up
    const uint32_t rows = uniform(operand(s.rows(0) + mixer * 64 * kStageDepth)), weights = uniform(operand(s.weights(0)));
    const uint32_t rest_rows = uniform(operand(s.rows(0) + kTiled * kStageDepth));
    const uint32_t weights_of_mine = uniform(operand(s.weights(0) + mixer * kHeadWidth * kStageDepth));
    const uint32_t weights_of_values = uniform(operand(s.weights(0) + 2 * kHeadWidth * kStageDepth));
    const uint32_t queries = uniform(operand(s.part(0))), keys = uniform(operand(s.part(1))), values = uniform(operand(s.part(2)));
    uint32_t turns = 0;
    RingPlace<kStages> place;
    if (mixer == 1 && threadIdx.x % 32 == 0) arrive(s.turn(0));
    wait_for_inputs();
    for (int unit = at.cluster; unit < a.units; unit += at.clusters) {
        const Head head(a, unit, at.rank);
        {
            // All 0, or else they would have registers during attention too. Of the rows behind the 256th, the first mixer has
            // queries and values, the second keys, and values as well: a choice here would cost it more.
            float sums[kTiles][kColumns / 2] = {}, rest[2][kRest / 2] = {};
            int last = 0;
            for (int step = 0; step < a.steps; ++step) {
                wait_for(s.full(place.slot), place.parity);
                const uint32_t stage = place.slot * (kStageBytes >> 4);
                begin_products();
#pragma unroll
                for (int i = 0; i < kTiles; ++i)
                    multiply_stage<kLow>(sums[i], rows + stage + i * (kMixers * 64 * kStageDepth >> 4), weights + stage, step);
                multiply_stage<kLow>(rest[0], weights_of_mine + stage, rest_rows + stage, step);
                multiply_stage<kLow>(rest[1], weights_of_values + stage, rest_rows + stage, step);
                commit_products();
                if (step) {
                    wait_products<1>();
                    release(s, last);
                }
                last = place.slot;
                place.advance();
            }
            wait_products<0>();
#pragma unroll
            for (int i = 0; i < kTiles; ++i) settle(sums[i]);
            settle(rest[0]), settle(rest[1]);
            meet_feeder();
            write_rest(s, rest[0], mixer, a.tokens);
            if (mixer == 0) write_rest(s, rest[1], 2, a.tokens);
            write_parts(s, sums, mixer);
        }
        fence_async_shared();
        meet_feeder();
#pragma unroll 1
        for (int tile = 0; tile < kTiles; ++tile) {
            const int first = (tile * kMixers + mixer) * kTileQueries;
            Mixed mixed;
            const auto start = [&] { wait_for(s.turn(mixer), turns++ & 1); };
            mix_tile<8>(mixed, queries + first * (kTokenBytes >> 4), keys, values, a.tokens, start, s.turn(1 - mixer));
            if (tile + 1 == kTiles) release(s, kStages - 1);
            write_mixed(a, head, mixed, first, factor);
        }
    }
}

template <bool kLow>
static __global__ void __cluster_dims__(kCluster) __launch_bounds__(kBlockThreads, 1) kernel(const __grid_constant__ Arguments a) {
    const Shared s{aligned_shared()};
    const int group = int(uniform(threadIdx.x / kGroup));
    const Place at{int(cluster_rank()), int(blockIdx.x) / kCluster, int(gridDim.x) / kCluster};
    if (threadIdx.x == 0) {
        prefetch_map(&a.rows), prefetch_map(&a.weights);
        for (int i = 0; i < kStages; ++i) {
            const int by_feeder = i == kStages - 1;
            init_barrier(s.full(i), 1), init_barrier(s.empty(i), (kMixers * kGroup / 32 + by_feeder) * kCluster);
        }
        for (int i = 0; i < kMixers; ++i) init_barrier(s.turn(i), kGroup / 32);
        publish_barriers();
    }
    meet_cluster();
    let_next_start();
    if (group < kMixers) {
        take_registers<kMixerRegisters>();
        multiply_and_mix<kLow>(a, s, at, group);
    } else {
        give_registers<kFeederRegisters>();
        feed<kLow>(a, s, at);
    }
}

}  // namespace bldm::cuda::attend::stream
