// What the parts of product_kernel.cuh share: the arguments, the tiles and their shared memory, and what becomes of the sums.
#pragma once

#include "cuda/gelu.cuh"
#include "cuda/warpgroup.cuh"

namespace bldm::cuda::products {

using cuda::gelu;  // beside the one of halves

constexpr int kGroup = 128, kCluster = 2;
constexpr int kStageDepth = 128;         // bytes of k
constexpr int kNeighbours = 8;           // columns of a thread, of 32
constexpr int kPreparers = kGroup - 32;  // threads that prepare what is needed behind the product
constexpr int kVectors = 3;              // of columns

enum Kind { kRead, kReadGelu, kAdd };

struct Arguments {
    TensorMap rows, weights;           // boxes of a tile, or of a block's share of it
    int num_rows, num_columns, steps;  // steps of k
    int column_tiles, share_weights;
    const float *input_scale, *weight_scale;  // of e4m3
    // Read: of the columns W 1, the bias and W times what the rows lack, or null; of the rows their moments, in parts
    const float *by_one, *bias, *by_offset;
    const float2* moments;
    int parts, depth;
    float eps;
    void* out;  // in bfloat16, or behind GELU in e4m3, divided by out_scale
    const float* out_scale;
    // Add: to h; null, if nobody reads it: what h lacks where it is read next, and moments (rows, parts) of the sum with it;
    // for products in e4m3 what it is divided by, and the copy.
    __nv_bfloat16* h;
    const float *offset, *stream_scale;
    float2* new_moments;
    uint8_t* stream;
    int units;  // the tiles of all clusters, of which one takes kCluster at a time
};

// The tile of a block. A cluster's are neighbours, of which one may lie behind the last row or column.
struct Tile {
    int row_tile, column_tile;

    __device__ Tile(const Arguments& a, int unit, int rank) {
        const int groups = (a.column_tiles + kCluster - 1) / kCluster;
        if (a.share_weights)
            row_tile = unit / a.column_tiles * kCluster + rank, column_tile = unit % a.column_tiles;
        else
            row_tile = unit / groups, column_tile = unit % groups * kCluster + rank;
    }
};

// A tile's warpgroups stand in rows and columns and have kBlocks times 64 rows and kWidth columns each. kAhead: as many times 32
// columns of the stream does a thread ask for before its products end.
template <int kRowGroups_, int kColumnGroups_, int kBlocks_, int kWidth_, int kStages_, int kAhead_>
struct Shape {
    static constexpr int kRowGroups = kRowGroups_, kColumnGroups = kColumnGroups_, kBlocks = kBlocks_, kWidth = kWidth_;
    static constexpr int kStages = kStages_, kAhead = kAhead_;
    static constexpr int kGroups = kRowGroups * kColumnGroups, kBlockThreads = (kGroups + 1) * kGroup;
    static constexpr int kRows = kRowGroups * kBlocks * 64, kColumns = kColumnGroups * kWidth;
    // Of a thread: at the start, then of the last warpgroup and of the others; in multiples of 8, 65536 in all.
    static constexpr int kFirstRegisters = 512 / (kGroups + 1) / 8 * 8, kFetcherRegisters = kGroups == 3 ? 32 : 40;
    static constexpr int kRegisters = ((kGroups + 1) * kFirstRegisters - kFetcherRegisters) / kGroups / 8 * 8;
    static_assert(kRowGroups == 1 || kBlocks == 1);
};
using Large = Shape<1, 2, 3, 128, 3, 6>;   // 192 x 256
using Middle = Shape<3, 1, 1, 192, 4, 2>;  // 192 x 192
using Narrow = Shape<3, 1, 1, 64, 6, 2>;   // 192 x 64

template <class S>
struct Shared {
    static constexpr int kRowBytes = S::kRows * kStageDepth, kStageBytes = kRowBytes + S::kColumns * kStageDepth;
    static constexpr int kAheadBytes = S::kAhead * 2 * 16 * S::kGroups * kGroup;
    static constexpr int kBytes =
        S::kStages * kStageBytes + kAheadBytes + S::kRows * 8 + kVectors * S::kColumns * 4 + (2 * S::kStages + 2) * 8;
    static_assert(kBytes <= 227 * 1024);

    uint8_t* stages;

    __device__ uint8_t* rows(int slot) const { return stages + slot * kStageBytes; }
    __device__ uint8_t* weights(int slot) const { return rows(slot) + kRowBytes; }
    // What a thread has of the stream, in two rows: 16 bytes each, of all threads behind each other.
    __device__ uint4* ahead(int i, int row) const {
        return reinterpret_cast<uint4*>(stages + S::kStages * kStageBytes) + (2 * i + row) * S::kGroups * kGroup + threadIdx.x;
    }
    // Of a tile's rows: r times the scale of the product, -m r. Of its columns: W 1, the bias, W times the offset; or the offset.
    __device__ float2* scales() const { return reinterpret_cast<float2*>(stages + S::kStages * kStageBytes + kAheadBytes); }
    __device__ float* vector(int which) const { return reinterpret_cast<float*>(scales() + S::kRows) + which * S::kColumns; }
    // A stage is there; both blocks of the cluster may write it; scales and vectors are there; they may be written.
    __device__ uint64_t* full(int slot) const { return reinterpret_cast<uint64_t*>(vector(kVectors)) + slot; }
    __device__ uint64_t* empty(int slot) const { return full(S::kStages) + slot; }
    __device__ uint64_t* prepared() const { return empty(S::kStages); }
    __device__ uint64_t* used() const { return empty(S::kStages) + 1; }
};

// A warp's place in the ring of stages.
template <int kStages>
struct RingPlace {
    uint32_t slot = 0, parity = 0;

    __device__ void advance() {
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
};

__device__ __forceinline__ uint32_t as_word(__half2 x) { return reinterpret_cast<const uint32_t&>(x); }

// GELU times a factor, of two halves at once: for what then becomes e4m3.
__device__ __forceinline__ __half2 gelu(float x, float y, __half2 half_factor) {
    // below -8 it is 0, where the largest halves would give infinity times 0
    const __half2 both = __hmax2(__floats2half2_rn(x, y), __float2half2_rn(-8)), half = __hmul2(both, half_factor);
    const __half2 slope = __hfma2(__hmul2(both, both), __float2half2_rn(0.0356774081f), __float2half2_rn(0.7978845608f));
    return __hfma2(half, tanh_fast(__hmul2(both, slope)), half);
}

__device__ __forceinline__ void load_values(float (&to)[4], const float* from) {
    const float4 x = load_four_again(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// Two words of bfloat16.
__device__ __forceinline__ void values_of(float (&to)[4], uint32_t low, uint32_t high) {
    to[0] = __uint_as_float(low << 16), to[1] = __uint_as_float(low & 0xFFFF0000u);
    to[2] = __uint_as_float(high << 16), to[3] = __uint_as_float(high & 0xFFFF0000u);
}

// A thread's part of a tile: of every 64 rows two, 8 apart, and of 32 columns eight, which it takes in two halves: with all sums
// in registers there is no room for more.
template <class S>
struct Part {
    static constexpr int kUnits = S::kBlocks * S::kWidth / 32;  // of 32 columns and two rows
    using Sums = float[S::kBlocks][S::kWidth / 2];
    const Arguments& a;
    const Shared<S>& s;
    const Tile tile;
    const int row_in_tile, column_in_tile;

    __device__ Part(const Arguments& a, const Shared<S>& s, Tile tile, int first_row, int first_column)
        : a(a),
          s(s),
          tile(tile),
          row_in_tile(first_row + threadIdx.x % kGroup / 32 * 16 + threadIdx.x % 32 / 4),
          column_in_tile(first_column + threadIdx.x % 4 * kNeighbours) {}

    // Where its columns begin in the rows of a block.
    struct Place {
        int row, columns;  // the upper one; as many from the first one on
        int64_t offset, below;

        __device__ Place(const Part& part, int block) {
            row = part.tile.row_tile * S::kRows + part.row_in_tile + 64 * block;
            const int column = part.tile.column_tile * S::kColumns + part.column_in_tile;
            columns = part.a.num_columns - column;
            offset = int64_t(row) * part.a.num_columns + column, below = 8 * int64_t(part.a.num_columns);
        }
        __device__ int64_t at(int of_32, int r) const { return offset + (r ? below : 0) + 32 * of_32; }
        __device__ bool there(const Part& part, int of_32, int r) const { return row + 8 * r < part.a.num_rows && 32 * of_32 < columns; }
    };

    // Four sums, of half of its columns of 32.
    static __device__ __forceinline__ void take(float (&to)[4], const Sums& sums, int block, int of_32, int r, int half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = sums[block][16 * of_32 + 8 * half + 4 * (i / 2) + 2 * r + i % 2];
    }

    // What a product makes of the stream: behind the norm, with bias and GELU.
    template <Kind kKind, bool kLow>
    __device__ __forceinline__ void write(const Sums& sums) const {
        const __half2 half_inverse = __float2half2_rn(kKind == kReadGelu && kLow ? fminf(0.5f / *a.out_scale, 8e3f) : 0);
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) {
            const float2 scale[2] = {s.scales()[row_in_tile + 64 * block], s.scales()[row_in_tile + 64 * block + 8]};
            const Place place(*this, block);
#pragma unroll
            for (int of_32 = 0; of_32 < S::kWidth / 32; ++of_32) {
                uint32_t out[2][4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float by_one[4], bias[4], by_offset[4], y[4];
                    const int at = column_in_tile + 32 * of_32 + 4 * half;
                    load_values(by_one, s.vector(0) + at), load_values(bias, s.vector(1) + at);
                    if constexpr (!kLow) load_values(by_offset, s.vector(2) + at);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        take(y, sums, block, of_32, r, half);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            if constexpr (!kLow) y[i] += by_offset[i];
                            y[i] = scale[r].x * y[i] + (scale[r].y * by_one[i] + bias[i]);
                            if constexpr (kKind == kReadGelu && !kLow) y[i] = gelu(y[i]);
                        }
                        if constexpr (kKind == kReadGelu && kLow)
                            out[r][half] = e4m3_of_halves(as_word(gelu(y[0], y[1], half_inverse)), as_word(gelu(y[2], y[3], half_inverse)));
                        else
                            out[r][2 * half] = bfloat16_pair(y[0], y[1]), out[r][2 * half + 1] = bfloat16_pair(y[2], y[3]);
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const bool there = place.there(*this, of_32, r);
                    if constexpr (kKind == kReadGelu && kLow)
                        store_if(there, static_cast<uint8_t*>(a.out) + place.at(of_32, r), make_uint2(out[r][0], out[r][1]));
                    else
                        store_if(there, static_cast<__nv_bfloat16*>(a.out) + place.at(of_32, r),
                                 make_uint4(out[r][0], out[r][1], out[r][2], out[r][3]));
                }
            }
        }
    }

    // The stream where the unit's sums will be added to it; a group of copies for every unit, so that they can be waited for by count.
    __device__ __forceinline__ void ask_for(int unit) const {
        const int of_32 = unit % (S::kWidth / 32);
        if (unit < kUnits) {
            const Place place(*this, unit / (S::kWidth / 32));
#pragma unroll
            for (int r = 0; r < 2; ++r)
                copy_async(s.ahead(unit % S::kAhead, r), a.h + place.at(of_32, r), place.there(*this, of_32, r) ? 16 : 0);
        }
        commit_async();
    }
    __device__ __forceinline__ void ask_for_stream() const {
#pragma unroll
        for (int unit = 0; unit < S::kAhead; ++unit) ask_for(unit);
    }

    // The sums, to the stream, and what its next reader needs.
    template <bool kLow>
    __device__ __forceinline__ void add(const Sums& sums) const {
        const float scale = kLow ? *a.input_scale * *a.weight_scale : 1;
        const float inverse = kLow && a.stream ? 1 / *a.stream_scale : 1;
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) {
            const Place place(*this, block);
            float moments[2][2] = {};
#pragma unroll
            for (int of_32 = 0; of_32 < S::kWidth / 32; ++of_32) {
                const int unit = block * (S::kWidth / 32) + of_32;
                wait_async<S::kAhead - 1>();
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (!place.there(*this, of_32, r)) continue;
                    const uint4 old = load_chunk(shared_address(s.ahead(unit % S::kAhead, r)));
                    uint32_t words[4] = {old.x, old.y, old.z, old.w}, copy[2];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float offset[4], y[4], before[4];
                        load_values(offset, s.vector(0) + column_in_tile + 32 * of_32 + 4 * half);
                        take(y, sums, block, of_32, r, half), values_of(before, words[2 * half], words[2 * half + 1]);
#pragma unroll
                        for (int i = 0; i < 4; ++i) y[i] = scale * y[i] + before[i];
                        words[2 * half] = bfloat16_pair(y[0], y[1]), words[2 * half + 1] = bfloat16_pair(y[2], y[3]);
                        values_of(y, words[2 * half], words[2 * half + 1]);
#pragma unroll
                        for (int i = 0; i < 4; ++i) y[i] += offset[i];
                        moments[r][0] += (y[0] + y[1]) + (y[2] + y[3]);
                        moments[r][1] += (y[0] * y[0] + y[1] * y[1]) + (y[2] * y[2] + y[3] * y[3]);
                        if constexpr (kLow) copy[half] = e4m3_of(y[0] * inverse, y[1] * inverse, y[2] * inverse, y[3] * inverse);
                    }
                    *reinterpret_cast<uint4*>(a.h + place.at(of_32, r)) = make_uint4(words[0], words[1], words[2], words[3]);
                    if constexpr (kLow)
                        if (a.stream) *reinterpret_cast<uint2*>(a.stream + place.at(of_32, r)) = make_uint2(copy[0], copy[1]);
                }
                ask_for(unit + S::kAhead);
            }
            leave(moments, place.row);
        }
    }

    // The moments of a thread's columns and its neighbours'.
    __device__ __forceinline__ void leave(float (&moments)[2][2], int row) const {
        const int parts = a.column_tiles * S::kColumnGroups;
        const int part = tile.column_tile * S::kColumnGroups + column_in_tile / S::kWidth;
        if (!a.offset) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                moments[r][i] += __shfl_xor_sync(~0u, moments[r][i], 1);
                moments[r][i] += __shfl_xor_sync(~0u, moments[r][i], 2);
            }
            if (threadIdx.x % 4 == 0 && row + 8 * r < a.num_rows && part < parts)
                a.new_moments[int64_t(row + 8 * r) * parts + part] = make_float2(moments[r][0], moments[r][1]);
        }
    }
};

}  // namespace bldm::cuda::products
