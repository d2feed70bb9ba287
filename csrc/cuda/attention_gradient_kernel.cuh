// The gradient of attention for heads of width 64 and 256 to 260 tokens, in the layout of the qkv product, with its sum over the
// tokens. Weights are computed again, from the logarithms of their sums, and twice: in rows of keys for the gradients of keys and
// values, in rows of queries for that of the queries. So all of it stays in registers: nothing is transposed through memory, and
// nothing is added up in an order that varies.
//
// With P the weights, O the result, G its gradient and D the sums of O G in a row of it: V' = P^T G, S' = P (G V^T - D),
// K' = S'^T Q / 8, Q' = S' K / 8 (Dao et al. 2022).
//
// Blocks stay on their multiprocessor and go through heads. Two warpgroups, the mixers, take tiles of 64 of the first 256 keys or
// queries in turn; the third brings the next head's keys and values while they work, its queries and G when they have done, and
// computes D. The few tokens behind the 256th are columns of every tile. As rows they need no scores of their own: tiles leave
// what they found of those columns in shared memory, and the mixers' warps multiply it in the end.
#pragma once

#include "cuda/attention_kernel.cuh"

namespace bldm::cuda::attend::gradient {

constexpr int kPairBytes = 2 * kPartBytes, kSlots = 3;  // keys and values, or queries and G
constexpr int kTiles = kTiled / kTileQueries, kMixerWarps = kMixers * kGroup / 32;
constexpr int kMostRest = 4, kWeightWords = kMostTokens / 2;  // tokens behind the 256th; pairs of weights of one of them
constexpr int kOutRows = 8;                                   // of a warp, on their way out
constexpr int kMixerRegisters = 208, kFeederRegisters = 88;  // with 8 fewer, products wait for one another
static_assert(kWeightWords % 32 == 8, "as first operands of a warp's product, weights are in 32 banks");

struct Arguments {
    TensorMap qkv, grad;       // (3 W, tokens, samples) and (W, tokens, samples), boxes of kBoxTokens tokens of a head
    const uint8_t* out;        // (samples, tokens, W) in bfloat16
    const float* log_sums;     // (samples, heads, tokens)
    uint8_t* result;           // (samples, tokens, 3 W) in bfloat16
    float* sums;               // (samples, 3 W)
    int tokens, heads, units;  // of a sample; heads of all
};

// Of what there is a gradient, and the operands of its products; the order of them in qkv.
enum Of { kQueries, kKeys, kValues, kParts };

struct Shared {
    uint8_t* slots;

    __device__ uint8_t* part(int slot, int which) const { return slots + slot * kPairBytes + which * kPartBytes; }
    __device__ uint8_t* out(int warp) const { return slots + kSlots * kPairBytes + warp * kOutRows * kOutStride; }
    // Of the tokens behind the 256th, pairs of what their gradients are sums of rows with: S', its transpose, P transposed.
    __device__ uint32_t* weights(int of, int token) const {
        return reinterpret_cast<uint32_t*>(out(kMixerWarps)) + (of * kMostRest + token) * kWeightWords;
    }
    // Of queries: the logarithm to base 2 of the sum of its weights, infinite where there is none; D.
    __device__ float* log_sums() const { return reinterpret_cast<float*>(weights(kParts, 0)); }
    __device__ float* sums() const { return log_sums() + kMostTokens; }
    // A slot is loaded; it may be written. The statistics are there.
    __device__ uint64_t* full(int slot) const { return reinterpret_cast<uint64_t*>(sums() + kMostTokens) + slot; }
    __device__ uint64_t* free(int slot) const { return full(kSlots) + slot; }
    __device__ uint64_t* known() const { return full(2 * kSlots); }
};

constexpr int kSharedBytes = 1024 + kSlots * kPairBytes + kMixerWarps * kOutRows * kOutStride +
                             4 * kParts * kMostRest * kWeightWords + 4 * 2 * kMostTokens + 8 * (2 * kSlots + 1);
static_assert(kSharedBytes <= 227 * 1024);
static_assert(kHeadWidth * 4 <= kOutRows * kOutStride, "a warp's sums fit where its rows were");

// The n-th load of a block: keys and values of head n / 2 of its heads (n even), or queries and G.
struct Load {
    int slot;
    uint32_t parity;

    __device__ explicit Load(int n) : slot(n % kSlots), parity(n / kSlots & 1) {}
};

__device__ __forceinline__ int64_t row_of(const Arguments& a, int unit, int token) { return int64_t(unit / a.heads) * a.tokens + token; }

// --- the mixers ------------------------------------------------------------------------------------------------------------

// From scores and G V^T, or their transposes: P and S', as the next product reads kColumns of k. Queries are columns, from `first` on,
// or rows, whose statistics are given; of keys behind the 256th, the last 16 of 80 columns, `rest` are there.
template <bool kOfKeys, int kColumns>
__device__ __forceinline__ void weigh(const Shared& s, const float (&score)[kColumns / 2], const float (&change)[kColumns / 2], int first,
                                      const float2 (&row)[2], int rest, uint32_t (&weights)[kColumns / 4],
                                      uint32_t (&changes)[kColumns / 4]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
        float2 log_sums = {}, sums = {};
        if constexpr (kOfKeys) {
            log_sums = *reinterpret_cast<const float2*>(s.log_sums() + first + 8 * j + 2 * t);
            sums = *reinterpret_cast<const float2*>(s.sums() + first + 8 * j + 2 * t);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if constexpr (!kOfKeys) log_sums = make_float2(row[r].x, row[r].x), sums = make_float2(row[r].y, row[r].y);
            const int i = 4 * j + 2 * r;
            float x = exp2_fast(score[i] * kScale - log_sums.x), y = exp2_fast(score[i + 1] * kScale - log_sums.y);
            if (!kOfKeys && j >= kTileQueries / 8) {  // where all scores are low, those of no key would be infinite
                const int key = 8 * j + 2 * t - kTileQueries;
                if (key >= rest) x = 0;
                if (key + 1 >= rest) y = 0;
            }
            weights[2 * j + r] = bfloat16_pair(x, y);
            changes[2 * j + r] = bfloat16_pair(x * (change[i] - sums.x), y * (change[i + 1] - sums.y));
        }
    }
}

// The two columns behind the 256th that a thread has, of two rows: into shared memory, as rows there.
__device__ __forceinline__ void keep_columns(const Shared& s, int of, const uint32_t (&pairs)[20], int row) {
    const int t = threadIdx.x % 4;
    if (2 * t >= kMostRest) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        reinterpret_cast<uint16_t*>(s.weights(of, 2 * t))[row + 8 * r] = uint16_t(pairs[16 + r]);
        reinterpret_cast<uint16_t*>(s.weights(of, 2 * t + 1))[row + 8 * r] = uint16_t(pairs[16 + r] >> 16);
    }
}

// The sum of a warp's 16 rows: of columns 8 (lane / 4) + 2 (lane % 4) and the next.
__device__ __forceinline__ float2 sum_of_rows(const float (&d)[32], int lane) {
    float v[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = d[i / 2 * 4 + i % 2] + d[i / 2 * 4 + i % 2 + 2];
    fold<8>(v, lane), fold<4>(v, lane), fold<2>(v, lane);
    return make_float2(v[0], v[1]);
}

__device__ __forceinline__ void add(float2& to, float2 x) { to.x += x.x, to.y += x.y; }

// Gradients of a tile of keys and values, or of queries, kRest: with tokens behind the 256th. The sum of a warp's rows of the latter
// on top of what is there.
template <bool kOfKeys, bool kRest>
__device__ inline void job(const Arguments& a, const Shared& s, int unit, int keys_slot, int queries_slot, int tile, float2& sum) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own_slot = kOfKeys ? keys_slot : queries_slot, other_slot = kOfKeys ? queries_slot : keys_slot;
    const int begin = tile * kTileQueries, first_row = begin + warp % 4 * 16;
    const uint32_t own = operand(s.part(own_slot, 0) + begin * kTokenBytes), own_second = operand(s.part(own_slot, 1) + begin * kTokenBytes);
    const uint32_t others = operand(s.part(other_slot, 0)), others_second = operand(s.part(other_slot, 1));
    float2 row[2] = {};
    if constexpr (!kOfKeys)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int query = first_row + lane / 4 + 8 * r;
            row[r] = make_float2(s.log_sums()[query], s.sums()[query]);
        }
    float of_first[32] = {}, of_second[32] = {};
    const auto take = [&](auto columns, int first) {
        constexpr int kColumns = decltype(columns)::value;
        const uint32_t at = first * kTokenBytes / 16;
        float score[kColumns / 2], change[kColumns / 2];
        uint32_t weights[kColumns / 4], changes[kColumns / 4];
        multiply_both(score, change, own, others + at, own_second, others_second + at);
        weigh<kOfKeys, kColumns>(s, score, change, first, row, a.tokens - kTiled, weights, changes);
        multiply_values(of_first, changes, others + at);
        if constexpr (kOfKeys) multiply_values(of_second, weights, others_second + at);
        if constexpr (kColumns > kTileQueries) {
            keep_columns(s, kOfKeys ? kQueries : kKeys, changes, first_row + lane / 4);
            if constexpr (!kOfKeys) keep_columns(s, kValues, weights, first_row + lane / 4);
        }
    };
#pragma unroll
    for (int chunk = 0; chunk < kTiles - kRest; ++chunk) take(std::integral_constant<int, kTileQueries>{}, chunk * kTileQueries);
    if constexpr (kRest) take(std::integral_constant<int, kTileQueries + 16>{}, kTiled - kTileQueries);
    wait_values(of_first);
    if constexpr (kOfKeys) wait_values(of_second);
    const int64_t row_bytes = 6 * int64_t(a.heads) * kHeadWidth;
    uint8_t* to = a.result + row_of(a, unit, first_row) * row_bytes + unit % a.heads * kTokenBytes;
    const int part_bytes = a.heads * kTokenBytes;
    write_rows<false, kOutRows>(of_first, 0.125f, 0.125f, s.out(warp), to + (kOfKeys ? part_bytes : 0), row_bytes, lane);
    if constexpr (kOfKeys) write_rows<false, kOutRows>(of_second, 1, 1, s.out(warp), to + 2 * part_bytes, row_bytes, lane);
    if constexpr (!kOfKeys) add(sum, sum_of_rows(of_first, lane));
}

// Eight columns a warp: the gradients of the tokens behind the 256th, and the sums over all tokens. For queries, `out` has the sums
// of every warp's rows. For keys they are zero, as no weight changes where all scores of a query change by the same. For values
// they are those of G, as a query's weights add up to one: that is another row of weights, which are all one.
template <bool kRest>
__device__ inline void finish(const Arguments& a, const Shared& s, int unit, int keys_slot, int queries_slot) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rest = a.tokens - kTiled;
#pragma unroll
    for (int of = 0; of < kParts; ++of) {
        float d[4] = {};
        if (kRest || of == kValues) {
            const uint32_t rows = shared_address(of == kQueries ? s.part(keys_slot, 0) : s.part(queries_slot, of == kValues));
            const uint32_t* weights = s.weights(of, g % kMostRest);
            const uint32_t ones = of == kValues && g == kMostRest ? 0x3F803F80u : 0;
#pragma unroll
            for (int step = 0; step < kMostTokens / 16; step += 2) {
                const bool last = step + 1 == kMostTokens / 16;
                uint32_t b[4];
                load_transposed(b, rows + chunk_of(16 * step + (last ? lane % 16 : lane), warp));
#pragma unroll
                for (int half = 0; half < (last ? 1 : 2); ++half) {
                    const int at = 8 * (step + half) + t;
                    const uint32_t x[4] = {g < rest ? weights[at] : ones, 0, g < rest ? weights[at + 4] : ones, 0};
                    mma<__nv_bfloat16>(d, x, b[2 * half], b[2 * half + 1], d);
                }
            }
        }
        const int column = 8 * warp + 2 * t, whole = (of * a.heads + unit % a.heads) * kHeadWidth + column;
        const float factor = of == kValues ? 1 : 0.125f;
        if (g < rest) {
            uint16_t* to = reinterpret_cast<uint16_t*>(a.result) + row_of(a, unit, kTiled + g) * 3 * a.heads * kHeadWidth + whole;
            *reinterpret_cast<uint32_t*>(to) = bfloat16_pair(factor * d[0], factor * d[1]);
        }
        float2 sum = {};
        if (of == kQueries) {
            sum = reinterpret_cast<const float2*>(s.out(g))[column / 2];
            if (g < rest) add(sum, make_float2(d[0], d[1]));
#pragma unroll
            for (int bit = 4; bit < 32; bit *= 2)
                add(sum, make_float2(__shfl_xor_sync(~0u, sum.x, bit), __shfl_xor_sync(~0u, sum.y, bit)));
        }
        if (of == kValues) sum = make_float2(d[0], d[1]);
        float* to = a.sums + int64_t(unit / a.heads) * 3 * a.heads * kHeadWidth + whole;
        if (g == kMostRest) *reinterpret_cast<float2*>(to) = make_float2(factor * sum.x, factor * sum.y);
    }
}

template <bool kRest>
__device__ __forceinline__ void mix(const Arguments& a, const Shared& s, int mixer) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int unit = blockIdx.x, i = 0; unit < a.units; unit += gridDim.x, ++i) {
        const Load keys(2 * i), queries(2 * i + 1);
        wait_for(s.full(keys.slot), keys.parity);
        wait_for(s.full(queries.slot), queries.parity);
        wait_for(s.known(), i & 1);
        float2 sum = {};
#pragma unroll 1
        for (int tile = mixer; tile < kTiles; tile += kMixers) job<true, kRest>(a, s, unit, keys.slot, queries.slot, tile, sum);
#pragma unroll 1
        for (int tile = mixer; tile < kTiles; tile += kMixers) job<false, kRest>(a, s, unit, keys.slot, queries.slot, tile, sum);
        __syncwarp();
        reinterpret_cast<float2*>(s.out(warp))[lane] = sum;
        sync_part<kMixers * kGroup>(2);
        finish<kRest>(a, s, unit, keys.slot, queries.slot);
        __syncwarp();
        if (lane == 0) arrive(s.free(keys.slot)), arrive(s.free(queries.slot));
    }
}

// --- the third warpgroup -----------------------------------------------------------------------------------------------------

// One thread.
__device__ inline void fetch(const Arguments& a, const Shared& s, int n) {
    const int unit = blockIdx.x + n / 2 * gridDim.x, sample = unit / a.heads, head = unit % a.heads;
    const Load load(n);
    if (n >= kSlots) wait_for(s.free(load.slot), load.parity ^ 1);
    expect_bytes(s.full(load.slot), kPairBytes);
    for (int which = 0; which < 2; ++which)
        for (int box = 0; box < 2; ++box) {
            const bool of_grad = n % 2 && which;
            const int part = of_grad || n % 2 ? 0 : 1 + which;
            copy_box(s.part(load.slot, which) + box * kBoxBytes, of_grad ? &a.grad : &a.qkv, (part * a.heads + head) * kHeadWidth,
                     box * kBoxTokens, sample, s.full(load.slot));
        }
}

__device__ inline void find_statistics(const Arguments& a, const Shared& s, int unit, const Load& queries) {
    const int tid = threadIdx.x % kGroup;
    for (int query = tid; query < kMostTokens; query += kGroup) {
        float log_sum = INFINITY, sum = 0;
        uint4 out[8];
        if (query < a.tokens) {
            const uint8_t* from = a.out + (row_of(a, unit, query) * a.heads + unit % a.heads) * kTokenBytes;
#pragma unroll
            for (int chunk = 0; chunk < 8; ++chunk) out[chunk] = __ldg(reinterpret_cast<const uint4*>(from) + chunk);
            log_sum = 1.44269504f * a.log_sums[int64_t(unit) * a.tokens + query];
        }
        if (query == tid) wait_for(s.full(queries.slot), queries.parity);
        if (query < a.tokens)
#pragma unroll
            for (int chunk = 0; chunk < 8; ++chunk) {
                float g[8], o[8];
                load_values(g, s.part(queries.slot, 1), query, chunk);
                values_of(o, out[chunk]);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum += g[j] * o[j];
            }
        s.log_sums()[query] = log_sum, s.sums()[query] = sum;
    }
}

// Where both query and key are behind the 256th, eight lanes a pair.
__device__ inline void find_corner(const Arguments& a, const Shared& s, const Load& keys, const Load& queries) {
    const int tid = threadIdx.x % kGroup, chunk = tid % 8, query = tid / 8 / kMostRest, key = tid / 8 % kMostRest;
    float score = 0, change = 0;
    for (int which = 0; which < 2; ++which) {
        float x[8], y[8];
        load_values(x, s.part(queries.slot, which), kTiled + query, chunk);
        load_values(y, s.part(keys.slot, which), kTiled + key, chunk);
#pragma unroll
        for (int j = 0; j < 8; ++j) (which ? change : score) += x[j] * y[j];
    }
#pragma unroll
    for (int bit = 1; bit < 8; bit *= 2) score += __shfl_xor_sync(~0u, score, bit), change += __shfl_xor_sync(~0u, change, bit);
    if (chunk) return;
    const bool there = kTiled + key < a.tokens;  // a query that is not there has infinite sums
    const float weight = there ? exp2_fast(score * kScale - s.log_sums()[kTiled + query]) : 0;
    const uint16_t changed = uint16_t(bfloat16_pair(weight * (change - s.sums()[kTiled + query]), 0));
    reinterpret_cast<uint16_t*>(s.weights(kQueries, query))[kTiled + key] = changed;
    reinterpret_cast<uint16_t*>(s.weights(kKeys, key))[kTiled + query] = changed;
    reinterpret_cast<uint16_t*>(s.weights(kValues, key))[kTiled + query] = uint16_t(bfloat16_pair(weight, 0));
}

template <bool kRest>
__device__ inline void feed(const Arguments& a, const Shared& s) {
    const bool fetches = threadIdx.x % kGroup == 0;
    if (fetches) fetch(a, s, 0), fetch(a, s, 1);
    for (int unit = blockIdx.x, i = 0; unit < a.units; unit += gridDim.x, ++i) {
        const bool more = unit + int(gridDim.x) < a.units;
        const Load keys(2 * i), queries(2 * i + 1);
        if (fetches && more) fetch(a, s, 2 * i + 2);
        __syncwarp();
        wait_for(s.full(keys.slot), keys.parity);  // so that no wait for the slot's next load takes this one for it
        find_statistics(a, s, unit, queries);
        if constexpr (kRest) {
            sync_part<kGroup>(3);
            find_corner(a, s, keys, queries);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(s.known()), arrive(s.free(keys.slot)), arrive(s.free(queries.slot));
        if (fetches && more) fetch(a, s, 2 * i + 3);  // when the mixers are done with this head
        __syncwarp();
    }
}

template <bool kRest>
static __global__ void __launch_bounds__(kBlockThreads, 1) kernel(const __grid_constant__ Arguments a) {
    const Shared s{aligned_shared()};
    const int group = threadIdx.x / kGroup;
    if (threadIdx.x == 0) {
        prefetch_map(&a.qkv), prefetch_map(&a.grad);
        for (int i = 0; i < kSlots; ++i) init_barrier(s.full(i), 1), init_barrier(s.free(i), kBlockThreads / 32);
        init_barrier(s.known(), kFeederWarps);
        publish_barriers();
    }
    // What stands behind the tokens that there may be is zero.
    constexpr int kBehind = kWeightWords - (kTiled + kMostRest) / 2;
    for (int i = threadIdx.x; i < kParts * kMostRest * kBehind; i += kBlockThreads)
        s.weights(0, i / kBehind)[kWeightWords - kBehind + i % kBehind] = 0;
    sync_threads<kBlockThreads>();
    if (group < kMixers) {
        take_registers<kMixerRegisters>();
        mix<kRest>(a, s, group);
    } else {
        give_registers<kFeederRegisters>();
        feed<kRest>(a, s);
    }
}

}  // namespace bldm::cuda::attend::gradient
