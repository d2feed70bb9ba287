// Channels in the middle: (outer, C, inner) values against (outer inner, P) packed bytes.
//
// In memory the values of a channel follow one another by position, the packed bytes of a position by byte. A block
// works on a tile of a few bytes of many positions, which shared memory holds with the positions next to each other.
#pragma once

#include "cuda/samples.cuh"

namespace bldm::cuda {

// a / b for b below 2^32: 64-bit division is slow, and hardly ever needed.
__device__ __forceinline__ int64_t divide(int64_t a, uint32_t b) {
    return uint64_t(a) < uint64_t(1) << 32 ? uint32_t(a) / b : a / b;
}

// Tiles of `bytes` packed bytes: 2^log_width of a position (1, 2, 4 or 8), of 2^log_height positions.
template <uint32_t kBytes>
struct Columns {
    // With room between the columns that keeps vectors aligned and banks apart.
    static constexpr uint32_t kPadding = 16, kShared = kBytes + 8 * kPadding;

    int64_t positions;  // outer inner
    uint32_t channels, inner, row_bytes, log_width, log_height, tiles_across;

    Columns(int64_t outer, int64_t channels_, int64_t inner_)
        : positions(outer * inner_), channels(uint32_t(channels_)), inner(uint32_t(inner_)) {
        row_bytes = ceil_div(channels, 8u);
        log_width = log_height = 0;
        while (log_width < 3 && 1u << log_width < row_bytes) ++log_width;
        while (kBytes >> log_width >> log_height > 1) ++log_height;
        tiles_across = ceil_div(row_bytes, 1u << log_width);
    }
    unsigned blocks() const {
        const int64_t count = ceil_div<int64_t>(positions, int64_t(1) << log_height) * tiles_across;
        if (count >= int64_t(1) << 31) throw std::invalid_argument("too many positions for one launch");
        return unsigned(count);
    }
};

// The tile of a block.
template <uint32_t kBytes>
struct Tile {
    const Columns<kBytes>& of;
    int64_t position;  // the first one
    uint32_t byte;     // of a row, the first one

    __device__ __forceinline__ explicit Tile(const Columns<kBytes>& columns) : of(columns) {
        const uint32_t down = blockIdx.x / of.tiles_across;
        position = int64_t(down) << of.log_height;
        byte = (blockIdx.x - down * of.tiles_across) << of.log_width;
    }
    __device__ __forceinline__ uint32_t place(uint32_t column, uint32_t row) const {
        return column * ((1u << of.log_height) + of.kPadding) + row;
    }

    // The places of the i-th group of 2^kLog bytes of the tile; false if there is none.
    template <uint32_t kLog>
    __device__ __forceinline__ bool find(uint32_t i, uint32_t& in_shared, int64_t& in_global) const {
        const uint32_t row = i >> (of.log_width - kLog);
        const uint32_t column = (i & ((1u << of.log_width >> kLog) - 1)) << kLog;
        in_shared = place(column, row);
        in_global = (position + row) * of.row_bytes + byte + column;
        return i < kBytes >> kLog && position + row < of.positions && byte + column < of.row_bytes;
    }
    // Four bytes of a position at a time can be moved as a word.
    __device__ __forceinline__ bool words(const void* packed) const {
        return of.row_bytes % 4 == 0 && reinterpret_cast<uintptr_t>(packed) % 4 == 0;
    }

    __device__ __forceinline__ void load(const uint8_t* __restrict__ packed, uint8_t* shared) const {
        const uint32_t column = place(1, 0);
        int64_t from;
        if (words(packed)) {
            constexpr int kTurns = kBytes / 4 < kThreads ? 1 : kBytes / 4 / kThreads;
            uint32_t loaded[kTurns], to[kTurns];
            bool there[kTurns];
#pragma unroll
            for (int t = 0; t < kTurns; ++t) {  // all loads before the first use
                there[t] = find<2>(threadIdx.x + t * kThreads, to[t], from);
                if (there[t]) loaded[t] = __ldg(reinterpret_cast<const uint32_t*>(packed + from));
            }
#pragma unroll
            for (int t = 0; t < kTurns; ++t)
                if (there[t])
#pragma unroll
                    for (int k = 0; k < 4; ++k) shared[to[t] + k * column] = uint8_t(loaded[t] >> (8 * k));
        } else {
            uint32_t to;
            for (uint32_t i = threadIdx.x; i < kBytes; i += kThreads)
                if (find<0>(i, to, from)) shared[to] = packed[from];
        }
    }
    __device__ __forceinline__ void store(const uint8_t* shared, uint8_t* packed) const {
        const uint32_t column = place(1, 0);
        uint32_t from;
        int64_t to;
        if (words(packed)) {
#pragma unroll 4
            for (uint32_t i = threadIdx.x; i < kBytes / 4; i += kThreads) {
                if (!find<2>(i, from, to)) continue;
                uint32_t word = 0;
#pragma unroll
                for (int k = 0; k < 4; ++k) word |= uint32_t(shared[from + k * column]) << (8 * k);
                *reinterpret_cast<uint32_t*>(packed + to) = word;
            }
        } else {
            for (uint32_t i = threadIdx.x; i < kBytes; i += kThreads)
                if (find<0>(i, from, to)) packed[to] = shared[from];
        }
    }
};

}  // namespace bldm::cuda
