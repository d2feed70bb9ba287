// What the parts of layer_stack.cu share: sizes, phases, which block has which piece, and where things are in memory.
#pragma once

#include "cuda/cluster.cuh"

namespace bldm::cuda::stack {

using bf16 = __nv_bfloat16;

constexpr int kWidth = 768, kHidden = 4 * kWidth, kHeads = 12, kHeadWidth = 64;
constexpr int kCluster = 4, kWorkers = 256, kBlockThreads = kWorkers + 64;
constexpr int kRows = 56, kColumns = 128, kDepth = 128;  // of a piece; of k in a stage, e4m3 a byte each
constexpr int kStageBytes = kColumns * kDepth, kHalfStage = kStageBytes / 2;  // weights
constexpr int kRing = 8;                                 // stages
constexpr int kRowBytes = kRows * kDepth;                // rows of as many k, as the tensor cores read them
constexpr int kBlocks = kWidth / kDepth;                 // of k: the stages of a piece
constexpr int kHalf = kBlocks / 2;                       // those of a warpgroup, where each has half of k
constexpr int kKept = kRing - kBlocks;                   // stages that are given back when the next piece begins
constexpr int kQueries = 32, kKeyBlocks = 20;            // a block's; of 16 keys
constexpr int kSumStride = kColumns + 4;                 // floats a row of sums
constexpr int kOutStride = 2 * kColumns + 16;            // bytes a row of what is written, in halves
constexpr int kShare = kRows / kCluster;                 // rows
constexpr int kShareBytes = kShare * kOutStride;         // of sums, which another block adds up
constexpr int kTiles = kWidth / kColumns;                // of columns of the stream
constexpr int kParts = 2 * kTiles;                       // of a row's moments, of 64 columns each
constexpr int kCounterStride = 8;                        // 32 bytes each
// The slab: a product's rows, the sums of other blocks, which may come while this one still multiplies, and its own sums or
// what it writes; or queries, keys and values, and then the attention's sums.
constexpr int kReceived = kBlocks * kRowBytes, kOwn = kReceived + (kCluster - 1) * kShareBytes;
constexpr int kSlabBytes = (kQueries + 2 * 16 * kKeyBlocks) * 128;
static_assert(kRows * kOutStride <= kRows * kSumStride * 4 && kOwn + kRows * kSumStride * 4 <= kSlabBytes);

enum Phase { kQkv, kAttention, kProj, kUp, kDown, kPhases };

struct Product {
    int tiles;       // of columns
    bool split;      // the blocks of a cluster have a quarter of k each
    bool narrow;     // tiles of 64 columns, of which a warpgroup has half of k: for a product that gives few blocks work
    int first_byte;  // of the layer's weights

    __device__ int groups() const { return split ? tiles : (tiles + kCluster - 1) / kCluster; }  // of tiles, a cluster each
    __device__ int stages() const { return narrow ? kHalf : kBlocks; }  // of a piece
    __device__ int blocks() const { return split ? kBlocks * kCluster : kBlocks; }  // of k
};

constexpr int kSquare = kWidth * kWidth;
constexpr int64_t kLayerBytes = 12 * kSquare;
__constant__ Product kProducts[kPhases] = {{3 * kTiles, false, false, 0},
                                           {},
                                           {2 * kTiles, false, true, 3 * kSquare},
                                           {kHidden / kColumns, false, false, 4 * kSquare},
                                           {kTiles, true, false, 8 * kSquare}};

// float32 values of a layer: the offsets of qkv and of the MLP's first product, their biases, and scalars.
constexpr int kUpOffset = kWidth, kQkvBias = 2 * kWidth, kUpBias = kQkvBias + 3 * kWidth, kScalars = kUpBias + kHidden,
              kVectors = kScalars + 8;
// What e4m3 values are multiplied by when they are written, and what the products of them are.
enum Scalar { kToStream, kToStreamOfUp, kOfQkv, kOfProj, kOfUp, kOfDown, kToMixed, kToInner };

struct Arguments {
    bf16* h;
    uint8_t *stream, *qkv, *mixed, *inner;
    float2* moments;  // of every row's parts: sum, sum of squares
    const uint8_t* weights;
    const float* vectors;
    uint32_t* counters;
    int64_t* times;
    int rows, tokens, layers, tiles, query_tiles, heads;  // tiles of rows; those of the queries of a head; heads of all samples
    float eps;

    // Of a phase, a cluster each. In the attention, four tiles of a head's queries; tiles left over are put together.
    __device__ int items(int phase) const {
        return phase == kAttention ? shared_items() + (heads * (query_tiles % kCluster) + kCluster - 1) / kCluster
                                   : tiles * kProducts[phase].groups();
    }
    __device__ int shared_items() const { return heads * (query_tiles / kCluster); }
    __device__ const float* vectors_of(int layer) const { return vectors + int64_t(layer) * kVectors; }
    __device__ const float* scalars(int layer) const { return vectors_of(layer) + kScalars; }
};

// Counters: the blocks that have ended, and the rows of every tile that are in the stream; then for every layer pieces of qkv,
// of the attention, and, for every tile of rows, of proj, up and down.
__device__ __forceinline__ uint32_t* counter(const Arguments& a, int layer, int phase, int tile) {
    const int place = phase < kProj ? phase : 2 + (phase - kProj) * a.tiles + tile;
    return a.counters + kCounterStride * (1 + a.tiles + layer * (2 + 3 * a.tiles) + place);
}

// The piece of a block.
struct Piece {
    int row_tile, column_tile, first_stage;
    bool exists;

    __device__ Piece(const Product& product, int item, int rank) {
        const int groups = product.groups(), group = item % groups;
        row_tile = item / groups;
        column_tile = product.split ? group : group * kCluster + rank;
        first_stage = product.split ? rank * kBlocks : 0;
        exists = column_tile < product.tiles;
    }
};

// The queries of a block, and whether its cluster has others of the same head, and so the same keys and values.
struct Queries {
    int head, first;
    bool exists = true, shared;

    __device__ Queries(const Arguments& a, int item, int rank) : shared(item < a.shared_items()) {
        if (shared) {
            const int of_head = a.query_tiles / kCluster;
            head = item / of_head, first = (item % of_head * kCluster + rank) * kQueries;
        } else {
            const int of_head = a.query_tiles % kCluster, left = (item - a.shared_items()) * kCluster + rank;
            head = left / of_head, first = (a.query_tiles - of_head + left % of_head) * kQueries;
            exists = head < a.heads;
        }
    }
};

// Shared memory, the same in all blocks of a cluster.
struct Shared {
    uint8_t* ring;  // of stages of weights

    __device__ uint8_t* slab() const { return ring + kRing * kStageBytes; }
    // of rows: r times the product's scale
    __device__ float* scales() const { return reinterpret_cast<float*>(slab() + kSlabBytes); }
    // A stage of weights is there, or may be written; rows of a block of k are, their scales are; the sums of the
    // other blocks of the cluster are; all its blocks need their slabs no more.
    __device__ uint64_t* full(int slot) const { return reinterpret_cast<uint64_t*>(scales() + kRows) + slot; }
    __device__ uint64_t* empty(int slot) const { return full(kRing) + slot; }
    __device__ uint64_t* rows(int block) const { return empty(kRing) + block; }
    __device__ uint64_t* scaled() const { return rows(kBlocks); }
    __device__ uint64_t* ready() const { return scaled() + 1; }
    __device__ uint64_t* free() const { return scaled() + 2; }
};

constexpr int kBarriers = 2 * kRing + kBlocks + 3;
constexpr int kSharedBytes = 1024 + kRing * kStageBytes + kSlabBytes + kRows * 4 + kBarriers * 8;

// Where the 16-byte chunk of a row is, in a tile of rows.
__device__ __forceinline__ uint32_t chunk_of_row(int row, int chunk) {
    return uint32_t(chunk) / 8 * kRowBytes + row * 128 + uint32_t(chunk ^ row) % 8 * 16;
}

// The same for queries, keys or values of a head, 128 bytes a row; `from` is the row that the address is to count from.
__device__ __forceinline__ uint32_t chunk_of_token(int token, int chunk, int from) {
    return token * 128 + (uint32_t(chunk) ^ uint32_t(from + token) % 8) * 16;
}

// Queries, keys or values of a head in the order of the rows.
__device__ __forceinline__ uint8_t* head_rows(const Arguments& a, int head, int part, int row) {
    return a.qkv + (int64_t(part * kHeads + head) * a.rows + row) * 128;
}

__device__ __forceinline__ void sync_workers() { sync_threads<kWorkers>(); }

// The clock of the first block, for whoever asks where the time goes.
__device__ __forceinline__ void mark(const Arguments& a, int layer, int phase, int event) {
    if (a.times && blockIdx.x == 0 && threadIdx.x == 0) a.times[(layer * kPhases + phase) * 5 + event] = clock64();
}

__device__ __forceinline__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t halves(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ float2 of_halves(uint32_t both) { return __half22float2(*reinterpret_cast<const __half2*>(&both)); }

}  // namespace bldm::cuda::stack
