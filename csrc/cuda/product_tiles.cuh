// What the parts of product_kernel.cuh share: the arguments, the tiles and their shared memory, and what becomes of the sums.
#pragma once

#include "cuda/gelu.cuh"
#include "cuda/ring.cuh"
#include "cuda/warpgroup.cuh"

namespace bldm::cuda::products {

constexpr int kGroup = 128, kCluster = 2;
constexpr int kStageDepth = 128;         // bytes of k
constexpr int kNeighbours = 8;           // columns of a thread, of 32
constexpr int kPreparers = kGroup - 32;  // threads that prepare what is needed behind the product
constexpr int kUsed = 2, kPrepared = 3;  // barriers: scales and biases may be written; they are there, for every warpgroup

enum Kind { kRead, kReadGelu, kAdd };

// Whether sums become half of what GELU is of.
template <Kind kKind, bool kLow>
constexpr bool halved = kKind == kReadGelu && !kLow;

struct Arguments {
    TensorMap rows, weights;           // boxes of a tile, or of a block's share of it
    int num_rows, num_columns, steps;  // steps of k
    int column_tiles, share_weights;
    int row_groups, column_groups;              // of tiles, of which a cluster has one at a time
    int rows_first, backwards;                  // their order
    const float *input_scale, *weight_scale;    // of e4m3
    const float* bias;
    // Read: of the rows their moments, in parts
    const float2* moments;
    int parts, depth;
    float eps;
    void* out;  // in bfloat16, or behind GELU in e4m3, divided by out_scale
    const float* out_scale;
    // Add: to h; null, if nobody reads it: its moments (rows, parts); for products in e4m3 what it is divided by, and the copy.
    __nv_bfloat16* h;
    const float* stream_scale;
    float2* new_moments;
    uint8_t* stream;
    int units;  // the tiles of all clusters, of which one takes kCluster at a time
};

// The tile of a block. A cluster's are neighbours, of which one may lie behind the last row or column.
struct Tile {
    int row_tile, column_tile;

    __device__ Tile(const Arguments& a, int unit, int rank) {
        if (a.backwards) unit = a.units - 1 - unit;
        row_tile = a.rows_first ? unit % a.row_groups : unit / a.column_groups;
        column_tile = a.rows_first ? unit / a.row_groups : unit % a.column_groups;
        if (a.share_weights)
            row_tile = row_tile * kCluster + rank;
        else
            column_tile = column_tile * kCluster + rank;
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
        S::kStages * kStageBytes + kAheadBytes + S::kRows * 4 + 16 + S::kColumns * 4 + 2 * S::kStages * 8;
    static_assert(kBytes <= 227 * 1024);

    uint8_t* stages;

    __device__ uint8_t* rows(int slot) const { return stages + slot * kStageBytes; }
    __device__ uint8_t* weights(int slot) const { return rows(slot) + kRowBytes; }
    // What a thread has of the stream, in two rows: 16 bytes each, of all threads behind each other.
    __device__ uint4* ahead(int i, int row) const {
        return reinterpret_cast<uint4*>(stages + S::kStages * kStageBytes) + (2 * i + row) * S::kGroups * kGroup + threadIdx.x;
    }
    // Of a tile's rows: r times the scale of the product.
    __device__ float* scales() const { return reinterpret_cast<float*>(stages + S::kStages * kStageBytes + kAheadBytes); }
    // Of all tiles: what sums are multiplied by, and the copy in e4m3, or GELU in e4m3.
    __device__ float* factors() const { return scales() + S::kRows; }
    __device__ float* bias() const { return factors() + 4; }  // of a tile's columns
    // A stage is there; both blocks of the cluster may write it.
    __device__ uint64_t* full(int slot) const { return reinterpret_cast<uint64_t*>(bias() + S::kColumns) + slot; }
    __device__ uint64_t* empty(int slot) const { return full(S::kStages) + slot; }
};

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

    // Where its columns begin in two rows of a block, 8 apart.
    struct Place {
        int row, columns;  // the upper one; as many from the first one on
        int64_t offset, below;

        __device__ Place(const Part& part, int block) {
            row = part.tile.row_tile * S::kRows + part.row_in_tile + 64 * block;
            const int column = part.tile.column_tile * S::kColumns + part.column_in_tile;
            columns = part.a.num_columns - column;
            offset = int64_t(row) * part.a.num_columns + column, below = 8 * int64_t(part.a.num_columns);
        }
        // In a tensor of values of so many bytes; and whether a thread's eight of 32 columns there are in the tensor.
        template <class T>
        __device__ uint8_t* in(T* tensor, int r, int bytes) const {
            return reinterpret_cast<uint8_t*>(tensor) + (offset + (r ? below : 0)) * bytes;
        }
        __device__ bool there(const Part& part, int of_32, int r) const {
            return row + 8 * r < part.a.num_rows && 32 * of_32 < columns;
        }
    };

    // Four sums, of half of its columns of 32.
    static __device__ __forceinline__ void take(float (&to)[4], const Sums& sums, int block, int of_32, int r, int half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = sums[block][16 * of_32 + 8 * half + 4 * (i / 2) + 2 * r + i % 2];
    }

    // What a product makes of the stream: behind the norm, with bias and GELU.
    template <Kind kKind, bool kLow>
    __device__ __forceinline__ void write(const Sums& sums) const {
        constexpr bool kToLow = kKind == kReadGelu && kLow;
        const __half2 factor = gelu_factor(s.factors()[1]);
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) {
            const float scale[2] = {s.scales()[row_in_tile + 64 * block], s.scales()[row_in_tile + 64 * block + 8]};
            const Place place(*this, block);
            uint8_t* const to[2] = {place.in(a.out, 0, kToLow ? 1 : 2), place.in(a.out, 1, kToLow ? 1 : 2)};
#pragma unroll
            for (int of_32 = 0; of_32 < S::kWidth / 32; ++of_32) {
                uint32_t out[2][4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float bias[4], y[4];
                    load_values(bias, s.bias() + column_in_tile + 32 * of_32 + 4 * half);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        take(y, sums, block, of_32, r, half);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            y[i] = scale[r] * y[i] + bias[i];
                            if constexpr (halved<kKind, kLow>) y[i] = gelu_of_half(y[i]);
                        }
                        if constexpr (kToLow)
                            out[r][half] = e4m3_of_halves(scaled_gelu(y[0], y[1], factor), scaled_gelu(y[2], y[3], factor));
                        else
                            out[r][2 * half] = bfloat16_pair(y[0], y[1]), out[r][2 * half + 1] = bfloat16_pair(y[2], y[3]);
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const bool there = place.there(*this, of_32, r);
                    if constexpr (kToLow)
                        store_if(there, to[r] + 32 * of_32, make_uint2(out[r][0], out[r][1]));
                    else
                        store_if(there, to[r] + 64 * of_32, make_uint4(out[r][0], out[r][1], out[r][2], out[r][3]));
                }
            }
        }
    }

    // The stream where the unit's sums will be added to it; a group of copies for every unit, so that they can be waited for by
    // count.
    __device__ __forceinline__ void ask_for(int unit) const {
        const int of_32 = unit % (S::kWidth / 32);
        if (unit < kUnits) {
            const Place place(*this, unit / (S::kWidth / 32));
#pragma unroll
            for (int r = 0; r < 2; ++r)
                copy_async(s.ahead(unit % S::kAhead, r), place.in(a.h, r, 2) + 64 * of_32, place.there(*this, of_32, r) ? 16 : 0);
        }
        commit_async();
    }
    __device__ __forceinline__ void ask_for_stream() const {
#pragma unroll
        for (int unit = 0; unit < S::kAhead; ++unit) ask_for(unit);
    }

    // The sums, to the stream, and what its next reader needs: of what is added before it is rounded.
    template <bool kLow>
    __device__ __forceinline__ void add(const Sums& sums) const {
        const float scale = s.factors()[0], inverse = s.factors()[1];
        const bool copies = kLow && a.stream;
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
                    const uint4 old = load_chunk(shared_address(s.ahead(unit % S::kAhead, r)));
                    uint32_t words[4] = {old.x, old.y, old.z, old.w}, copy[2];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float bias[4], y[4], before[4];
                        load_values(bias, s.bias() + column_in_tile + 32 * of_32 + 4 * half);
                        take(y, sums, block, of_32, r, half), values_of(before, words[2 * half], words[2 * half + 1]);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            y[i] = (kLow ? scale * y[i] : y[i]) + (before[i] + bias[i]);
                            moments[r][0] += y[i], moments[r][1] += y[i] * y[i];  // behind the last column all are 0
                        }
                        words[2 * half] = bfloat16_pair(y[0], y[1]), words[2 * half + 1] = bfloat16_pair(y[2], y[3]);
                        if constexpr (kLow) copy[half] = e4m3_of(y[0] * inverse, y[1] * inverse, y[2] * inverse, y[3] * inverse);
                    }
                    added_up_here(moments[r]);
                    store_if(place.there(*this, of_32, r), place.in(a.h, r, 2) + 64 * of_32,
                             make_uint4(words[0], words[1], words[2], words[3]));
                    if constexpr (kLow)
                        store_if(copies && place.there(*this, of_32, r), place.in(a.stream, r, 1) + 32 * of_32,
                                 make_uint2(copy[0], copy[1]));
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
        if (!a.new_moments) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                moments[r][i] += __shfl_xor_sync(~0u, moments[r][i], 1);
                moments[r][i] += __shfl_xor_sync(~0u, moments[r][i], 2);
            }
            if (threadIdx.x % 4 == 0 && row + 8 * r < a.num_rows && part < parts)
                a.new_moments[int64_t(part) * a.num_rows + row + 8 * r] = make_float2(moments[r][0], moments[r][1]);
        }
    }
};

}  // namespace bldm::cuda::products
