// Queries, keys and values of the residual stream behind its norm, as product_kernel.cuh makes them, and their attention, as
// attention_kernel.cuh has it, in one kernel: a head's never leave the multiprocessor that made them.
//
// A block takes heads in turn, the two blocks of a cluster neighbouring heads of the same sample, of whose rows of the stream each
// one fetches half for both. Its mixers multiply 128 rows each with the head's 192 rows of weights, write what comes out to shared
// memory, where attention reads it, and mix. One warp fetches stages of 128 bytes of k; the other three, the workers, have the rows
// behind the 256th, by products of single warps. What is left of the stages' memory is too little for keys and values: they are
// where the last stage of a head is, which is given back when they have been mixed.
//
// The columns of queries, keys and values are in the order of the weights' rows (inference/stream.py): it is the same in queries
// and keys, and of the result it makes eight columns of a row neighbours in a thread.
#pragma once

#include "cuda/attention_kernel.cuh"

namespace bldm::cuda::attend::stream {

constexpr int kCluster = 2, kParts = 3, kColumns = kParts * kHeadWidth;
constexpr int kStageDepth = 128;  // bytes of k
constexpr int kRowBytes = kMostTokens * kStageDepth, kStageBytes = kRowBytes + kColumns * kStageDepth;
constexpr int kStages = 3;           // of which a head takes a multiple, so that its last one is the third
constexpr int kBegun = kStages - 1;  // whose weights are asked for before the kernel in front of this one ends
constexpr int kWorkers = kGroup - 32, kUsers = kMixers * kGroup + kWorkers;  // threads; those that use stages
// Of those that a block starts with, 168 a thread.
constexpr int kMixerRegisters = 224, kFeederRegisters = 56;
static_assert(2 * kMixerRegisters + kFeederRegisters <= 3 * 168);
constexpr int kTiles = kTiled / 64 / kMixers;  // of 64 rows, of a mixer
static_assert(kStageBytes <= 2 * kPartBytes && kRowBytes == 2 * kBoxBytes);

struct Arguments {
    TensorMap rows, weights;  // (k, tokens, samples) in boxes of kBoxTokens, (k, 3 W) in boxes of kHeadWidth
    int tokens, heads;        // of a sample
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
    __device__ float* found() const { return bias() + kColumns; }
    // A stage is there; both blocks of the cluster may write it. A mixer may compute its exponentials.
    __device__ uint64_t* full(int slot) const { return reinterpret_cast<uint64_t*>(found() + kRestFloats<kWorkers / 32>) + slot; }
    __device__ uint64_t* empty(int slot) const { return full(kStages) + slot; }
    __device__ uint64_t* turn(int mixer) const { return empty(kStages) + mixer; }
};

constexpr int kSharedBytes = (kStages - 1) * kStageBytes + kParts * kPartBytes +
                             (kMostTokens + kColumns + kRestFloats<kWorkers / 32>) * 4 + (2 * kStages + kMixers) * 8;
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

// The blocks and what they take.
struct Place {
    int rank, cluster, clusters;
};

// A warp's place in the ring of stages.
struct RingPlace {
    uint32_t slot = 0, parity = 0;

    __device__ void advance() {
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
};

// A warp needs a stage no more.
__device__ __forceinline__ void release(const Shared& s, int slot) {
    if (threadIdx.x % 32 < kCluster) arrive_at(s.empty(slot), threadIdx.x % 32);
}

// Those who use stages: all have done so, or have written.
__device__ __forceinline__ void meet_users() { sync_part<kUsers>(3); }

// Which column of a head a place among 64 is: the weights' order, of every 32.
__device__ __forceinline__ int column_of(int place) { return place / 32 * 32 + place % 8 / 2 * 8 + place % 32 / 8 * 2 + place % 2; }

// One thread.
template <bool kLow>
__device__ inline void fetch_all(const Arguments& a, const Shared& s, const Place& at) {
    constexpr int kValues = kStageDepth / (kLow ? 1 : 2);
    const auto begin = [&](RingPlace place, int step, const Head& of) {
        wait_for(s.empty(place.slot), place.parity ^ 1);
        expect_bytes(s.full(place.slot), kStageBytes);
        for (int part = 0; part < kParts; ++part)
            copy_box(s.weights(place.slot) + part * kHeadWidth * kStageDepth, &a.weights, step * kValues,
                     (part * a.heads + of.head) * kHeadWidth, 0, s.full(place.slot));
    };
    RingPlace place, ahead;
    const int begun = min(kBegun, a.steps);
    for (int step = 0; step < begun; ++step, ahead.advance()) begin(ahead, step, Head(a, at.cluster, at.rank));
    wait_for_inputs();
    for (int unit = at.cluster; unit < a.units; unit += at.clusters) {
        const Head head(a, unit, at.rank);
        for (int step = 0; step < a.steps; ++step, place.advance()) {
            if (unit != at.cluster || step >= begun) begin(place, step, head);
            copy_box_to((1 << kCluster) - 1, s.rows(place.slot) + at.rank * kBoxBytes, &a.rows, step * kValues, at.rank * kBoxTokens,
                        head.sample, s.full(place.slot));
        }
    }
    // The other block arrives here until it has read what is shared.
    for (int i = 0; i < kStages; ++i, place.advance()) wait_for(s.empty(place.slot), place.parity ^ 1);
}

// The workers: scales and biases of a head.
template <bool kLow>
__device__ inline void prepare(const Arguments& a, const Shared& s, const Head& of, int worker, bool first) {
    for (int i = worker; i < kColumns; i += kWorkers)
        s.bias()[i] = __ldg(a.bias + (i / kHeadWidth * a.heads + of.head) * kHeadWidth + i % kHeadWidth);
    const float scale = kLow ? *a.input_scale * *a.weight_scale : 1;
    if (first) wait_for_inputs();
    for (int row = worker; row < kMostTokens; row += kWorkers) {
        float sum = 0, squares = 0;
        if (row < a.tokens)
            for (int part = 0; part < a.parts; ++part) {
                const float2 x = a.moments[(int64_t(of.sample) * a.tokens + row) * a.parts + part];
                sum += x.x, squares += x.y;
            }
        const float mean = sum / a.depth;
        s.scales()[row] = rsqrtf(fmaxf(squares / a.depth - mean * mean, 0) + a.eps) * scale;
    }
}

// Queries, keys or values of the rows behind the 256th, by the warp that has this part: rows of the products are columns of the part.
template <bool kLow, int kRest>
__device__ inline void multiply_rest(const Arguments& a, const Shared& s, RingPlace& place, int part) {
    constexpr int kBlocks = kHeadWidth / 16, kTokens = kRest / 8;  // of 16 columns; of 8 tokens
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row = lane % 8, low = lane / 8 % 2, high = lane / 16;  // of the matrices whose rows this lane has the address of
    float sums[kTokens][kBlocks][4] = {};
    for (int step = 0; step < a.steps; ++step, place.advance()) {
        wait_for(s.full(place.slot), place.parity);
        const uint32_t rows = shared_address(s.rows(place.slot));
        const uint32_t weights = shared_address(s.weights(place.slot) + part * kHeadWidth * kStageDepth);
#pragma unroll 1
        for (int k = 0; k < kStageDepth / 16; k += 4) {  // in chunks of 16 bytes, of which a product takes two
            uint32_t token[kTokens][4];
#pragma unroll
            for (int i = 0; i < kTokens; ++i) load_matrices(token[i], rows + chunk_of(kTiled + 8 * i + row, k + lane / 8));
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int block = 0; block < kBlocks; ++block) {
                    uint32_t column[4];
                    load_matrices(column, weights + chunk_of(16 * block + 8 * low + row, k + 2 * half + high));
#pragma unroll
                    for (int i = 0; i < kTokens; ++i)
                        mma_stage<kLow>(sums[i][block], column, token[i][2 * half], token[i][2 * half + 1]);
                }
        }
        __syncwarp();
        if (step + 1 < a.steps) release(s, place.slot);
    }
    meet_users();
    const uint32_t to = shared_address(s.part(part));
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int token = kTiled + 8 * i + 2 * t + j % 2, column = 16 * block + g + j / 2 * 8;
                const float y = s.scales()[token] * sums[i][block][j] + s.bias()[part * kHeadWidth + column_of(column)];
                store_half(to + chunk_of(token, column / 8) + column % 8 * 2, uint16_t(bfloat16_pair(y, 0)));
            }
    // Attention takes 16 tokens at a time, and what has no weight has to be a number.
    for (int i = lane; i < (kMostTokens - kTiled - kRest) * kTokenBytes / 4; i += 32)
        store_word(to + (kTiled + kRest) * kTokenBytes + 4 * i, 0);
}

template <bool kLow, int kRest>
__device__ inline void work(const Arguments& a, const Shared& s, const Place& at, int worker) {
    const float factor = a.out_scale ? 1 / *a.out_scale : 1;
    RingPlace place;
    for (int unit = at.cluster; unit < a.units; unit += at.clusters) {
        const Head head(a, unit, at.rank);
        prepare<kLow>(a, s, head, worker, unit == at.cluster);
        multiply_rest<kLow, kRest>(a, s, place, worker / 32);
        fence_async_shared();
        meet_users();
        const auto write = [&](int query, int column, float result, float total, float) {
            result *= __fdividef(factor, total);
            const int64_t to = head.out_offset(a, query) + column_of(column);
            if (a.out_scale)
                static_cast<uint8_t*>(a.out)[to] = uint8_t(e4m3_pair(result, 0));
            else
                static_cast<uint16_t*>(a.out)[to] = uint16_t(bfloat16_pair(result, 0));
        };
        mix_rest<kWorkers / 32>(shared_address(s.part(0)), shared_address(s.part(1)), shared_address(s.part(2)), s.found(), a.tokens,
                                worker, write);
        __syncwarp();
        release(s, kStages - 1);
    }
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
        for (int j = 0; j < kHeadWidth / 8; ++j) {
            const float* bias = s.bias() + part * kHeadWidth + j / 4 * 32 + 8 * t + j % 4 * 2;
            const float2 two = load_two_again(bias);
#pragma unroll
            for (int i = 0; i < 2 * kTiles; ++i) {
                const float* sum = sums[i / 2] + 4 * (part * kHeadWidth / 8 + j) + i % 2 * 2;
                const float by = scale[i / 2][i % 2];
                store_word(to + (i / 2 * (kMixers * 64) + i % 2 * 8) * kTokenBytes + (j ^ g) * 16,
                           bfloat16_pair(by * sum[0] + two.x, by * sum[1] + two.y));
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

template <bool kLow, int kRest>
__device__ __forceinline__ void multiply_and_mix(const Arguments& a, const Shared& s, const Place& at, int mixer) {
    const float factor = a.out_scale ? 1 / *a.out_scale : 1;
    // uniform, so that operands are named by registers that can be counted up
    const uint32_t rows = uniform(operand(s.rows(0) + mixer * 64 * kStageDepth)), weights = uniform(operand(s.weights(0)));
    const uint32_t queries = uniform(operand(s.part(0))), keys = uniform(operand(s.part(1))), values = uniform(operand(s.part(2)));
    uint32_t turns = 0;
    RingPlace place;
    if (mixer == 1 && threadIdx.x % 32 == 0) arrive(s.turn(0));
    wait_for_inputs();
    for (int unit = at.cluster; unit < a.units; unit += at.clusters) {
        {
            float sums[kTiles][kColumns / 2] = {};  // else they would have registers during attention too
            int last = 0;
            for (int step = 0; step < a.steps; ++step) {
                wait_for(s.full(place.slot), place.parity);
                const uint32_t stage = place.slot * (kStageBytes >> 4);
                begin_products();
#pragma unroll
                for (int i = 0; i < kTiles; ++i)
                    multiply_stage<kLow>(sums[i], rows + stage + i * (kMixers * 64 * kStageDepth >> 4), weights + stage, step);
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
            meet_users();
            write_parts(s, sums, mixer);
        }
        fence_async_shared();
        meet_users();
        const Head head(a, unit, at.rank);
#pragma unroll 1
        for (int tile = 0; tile < kTiles; ++tile) {
            const int first = (tile * kMixers + mixer) * kTileQueries;
            Mixed mixed;
            const auto start = [&] { wait_for(s.turn(mixer), turns++ & 1); };
            mix_tile<kRest>(mixed, queries + first * (kTokenBytes >> 4), keys, values, a.tokens, start, s.turn(1 - mixer));
            if (tile + 1 == kTiles) release(s, kStages - 1);
            write_mixed(a, head, mixed, first, factor);
        }
    }
}

template <bool kLow, int kRest>
static __global__ void __cluster_dims__(kCluster) __launch_bounds__(kBlockThreads, 1) kernel(const __grid_constant__ Arguments a) {
    const Shared s{aligned_shared()};
    const int group = int(uniform(threadIdx.x / kGroup)), in_group = threadIdx.x % kGroup;
    const Place at{int(cluster_rank()), int(blockIdx.x) / kCluster, int(gridDim.x) / kCluster};
    if (threadIdx.x == 0) {
        prefetch_map(&a.rows), prefetch_map(&a.weights);
        for (int i = 0; i < kStages; ++i) init_barrier(s.full(i), 1), init_barrier(s.empty(i), kUsers / 32 * kCluster);
        for (int i = 0; i < kMixers; ++i) init_barrier(s.turn(i), kGroup / 32);
        publish_barriers();
    }
    meet_cluster();
    let_next_start();
    if (group < kMixers) {
        take_registers<kMixerRegisters>();
        multiply_and_mix<kLow, kRest>(a, s, at, group);
    } else {
        give_registers<kFeederRegisters>();
        if (in_group == 0)
            fetch_all<kLow>(a, s, at);
        else if (in_group >= 32)
            work<kLow, kRest>(a, s, at, in_group - 32);
    }
}

}  // namespace bldm::cuda::attend::stream
