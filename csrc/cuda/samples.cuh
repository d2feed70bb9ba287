// How the packed bytes of a batch are spread over threads, and how a thread reads the eight values of a byte.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"

namespace bldm::cuda {

// Blocks that are enough to fill a large GPU twice over: with more work than that, a thread takes several bytes.
constexpr int64_t kManyBlocks = 2048;
constexpr int kThreads = 256;

// A block works on `chunk` bytes of each of blockDim.y samples.
struct SampleGrid {
    int64_t batch;
    uint32_t bytes;   // of a sample; the random stream allows less than 2^32
    uint32_t chunk;   // bytes a block
    uint32_t chunks;  // blocks a sample

    SampleGrid(int64_t batch_, int64_t bytes_, int64_t many_blocks = kManyBlocks)
        : batch(batch_), bytes(uint32_t(bytes_)) {
        if (bytes_ >= int64_t(1) << 32) throw std::invalid_argument("a sample has 2^32 packed bytes or more");
        uint32_t per_thread = 1;
        while (per_thread < 16 && batch * ceil_div<int64_t>(bytes_, 2 * per_thread * kThreads) >= many_blocks)
            per_thread *= 2;
        chunk = uint32_t(std::min<int64_t>(bytes_, int64_t(per_thread) * kThreads));
        chunks = uint32_t(ceil_div<int64_t>(bytes_, chunk));
    }

    // Threads (bytes, samples): small samples share a block.
    dim3 threads() const {
        unsigned x = 1;
        while (x < kThreads && x < chunk) x *= 2;
        return dim3(x, kThreads / x);
    }
    unsigned blocks() const {
        const int64_t count = ceil_div<int64_t>(batch, threads().y) * chunks;
        if (count >= int64_t(1) << 31) throw std::invalid_argument("too many samples for one launch");
        return unsigned(count);
    }
};

// A thread's part of the work: bytes begin + threadIdx.x, begin + threadIdx.x + blockDim.x, ... of its sample.
struct Share {
    int64_t sample;
    uint32_t begin, count;

    __device__ __forceinline__ explicit Share(const SampleGrid& grid) {
        const uint32_t group = blockIdx.x / grid.chunks;
        begin = (blockIdx.x - group * grid.chunks) * grid.chunk;
        sample = int64_t(group) * blockDim.y + threadIdx.y;
        count = sample < grid.batch ? min(grid.chunk, grid.bytes - begin) : 0;
    }
};

// Bytes whose values a thread loads before it works on the first of them.
constexpr int kUnroll = 4;

// Calls f(count, i) for all of this thread's bytes of a share: i, i + blockDim.x, ..., count of them, where count is an
// integral_constant, kUnroll or in the end 1.
template <class F>
__device__ __forceinline__ void for_bytes(const Share& share, F&& f) {
    uint32_t i = threadIdx.x;
    for (; i + (kUnroll - 1) * blockDim.x < share.count; i += kUnroll * blockDim.x)
        f(std::integral_constant<int, kUnroll>{}, i);
    for (; i < share.count; i += blockDim.x) f(std::integral_constant<int, 1>{}, i);
}

// A 64-bit argument that may live on the device, so that a captured graph can be replayed with another value.
struct Scalar {
    int64_t value;
    const int64_t* pointer;

    __device__ __forceinline__ int64_t get() const { return pointer ? *pointer : value; }
};

// Computed once, here: the compiler is not to fold it into the arithmetic of every turn of a loop.
template <class T>
__device__ __forceinline__ T pinned(T value) {
    static_assert(sizeof(T) == 8);
    asm("" : "+l"(value));
    if constexpr (std::is_pointer_v<T>) __builtin_assume(__isGlobal(value));
    return value;
}

// A byte that is needed late: the load starts here, where the compiler would have moved it to the first use.
__device__ __forceinline__ uint32_t load_now(const uint8_t* pointer) {
    uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"(value) : "l"(pointer));
    return value;
}

// Relative error 2^-22; what is below 2^-126 is 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, __half>)
        return __float2half_rn(x);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __float2bfloat16_rn(x);
    else
        return x;
}

// Element j of 32-bit words that hold elements of type T.
template <class T, int kWords>
__device__ __forceinline__ float element(const uint32_t (&words)[kWords], int j) {
    if constexpr (std::is_same_v<T, float>) return __uint_as_float(words[j]);
    if constexpr (std::is_same_v<T, __half>)
        return __half2float(__ushort_as_half(uint16_t(words[j / 2] >> (16 * (j % 2)))));
    // bfloat16 is the upper half of a float.
    return __uint_as_float(j % 2 ? words[j / 2] & 0xFFFF0000u : words[j / 2] << 16);
}

// Eight elements as they lie in memory.
template <class T>
struct alignas(16) Eight {
    T item[8];
};

// Reads `count` values as eight elements in 32-bit words (the others are 0). kVector: all eight, 16-byte aligned.
template <bool kVector, class T>
__device__ __forceinline__ void read_words(const T* __restrict__ from, int count, uint32_t (&to)[2 * sizeof(T)]) {
    if constexpr (kVector) {
#pragma unroll
        for (int i = 0; i < int(sizeof(T) / 2); ++i)
            *reinterpret_cast<uint4*>(to + 4 * i) = __ldg(reinterpret_cast<const uint4*>(from) + i);
    } else {
        using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
        constexpr int kEach = 4 / sizeof(T);
#pragma unroll
        for (int i = 0; i < int(2 * sizeof(T)); ++i) {
            to[i] = 0;
#pragma unroll
            for (int j = 0; j < kEach; ++j)
                if (kEach * i + j < count)
                    to[i] |= uint32_t(reinterpret_cast<const Word*>(from)[kEach * i + j]) << (16 * j);
        }
    }
}

// The same as floats.
template <bool kVector, class T>
__device__ __forceinline__ void read(const T* __restrict__ from, int count, float (&to)[8]) {
    uint32_t words[2 * sizeof(T)];
    read_words<kVector>(from, count, words);
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = element<T>(words, j);
}

template <bool kVector, class T>
__device__ __forceinline__ void write(T* to, int count, const float (&from)[8]) {
    if constexpr (kVector) {
        Eight<T> raw;
#pragma unroll
        for (int j = 0; j < 8; ++j) raw.item[j] = from_float<T>(from[j]);
        const uint4* source = reinterpret_cast<const uint4*>(&raw);
        uint4* target = reinterpret_cast<uint4*>(to);
#pragma unroll
        for (int i = 0; i < int(sizeof(raw) / 16); ++i) target[i] = source[i];
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < count) to[j] = from_float<T>(from[j]);
    }
}

// Where the values of a packed byte lie within its sample's (R, C), and how many it has.
struct Position {
    int64_t offset;
    int count;

    template <bool kVector>
    static __device__ __forceinline__ Position of(uint32_t byte, uint32_t channels) {
        if constexpr (kVector) return {int64_t(byte) * 8, 8};  // C % 8 == 0: no padding anywhere
        const uint32_t row_bytes = (channels + 7) / 8;
        const uint32_t row = byte / row_bytes, first = (byte - row * row_bytes) * 8;
        return {int64_t(row) * channels + first, int(min(8u, channels - first))};
    }
};

// Bytes 4 chunk to 4 chunk + 3 of a row: 32 bits. Bytes beyond the row are 0. kWords: row_bytes % 4 == 0, 4-byte
// aligned.
template <bool kWords>
__device__ __forceinline__ uint32_t load_chunk(const uint8_t* row, uint32_t chunk, uint32_t row_bytes) {
    if constexpr (kWords) return __ldg(reinterpret_cast<const uint32_t*>(row) + chunk);
    uint32_t word = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b)
        if (4 * chunk + b < row_bytes) word |= uint32_t(row[4 * chunk + b]) << (8 * b);
    return word;
}

}  // namespace bldm::cuda
