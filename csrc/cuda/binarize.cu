// binarize: logits to packed bits, Bernoulli(sigmoid(l)) or l > 0.
#include "cuda/bernoulli.cuh"
#include "cuda/columns.cuh"

namespace bldm::cuda {
namespace {

// --- one byte --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ __half2 as_half2(uint32_t bits) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof(pair));
    return pair;
}
__device__ __forceinline__ uint32_t as_bits(__half2 pair) {
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

__device__ __forceinline__ __half2 tanh_approximate(__half2 x) {
    uint32_t y;
    asm("tanh.approx.f16x2 %0, %1;" : "=r"(y) : "r"(as_bits(x)));
    return as_half2(y);
}

// The bits of eight logits and a Philox block, two at a time in half precision; false if one of them is not sure.
//
// A bit is set when u < sigmoid(l), that is when v = 2 u - 1 < t = tanh(l / 2). The upper 11 bits k of a lane say that
// v lies within 2^-11 of (2 k + 1) 2^-11 - 1. They enter as the bits of a half, k 2^-24 (a subnormal for k < 1024).
// Outside the margin the sign of the difference of that centre and t decides. The margin is 2^-11 for v, 2^-10.987 for
// tanh.approx (PTX ISA), 0.45 2^-11 for a float32 logit rounded to half (|x tanh'(x)| <= 0.448), and 2^-18 for
// everything else (the definition's own rounding, and that of the difference).
template <bool kRounded>
__device__ __forceinline__ bool decide(const __half2 (&l)[4], const uint32_t (&words)[4], uint32_t& bits) {
    const __half2 half = __float2half2_rn(0.5f), scale = __float2half2_rn(0x1p14f);
    const __half2 first = __float2half2_rn(0x1p-11f - 1);
    const __half2 margin = __float2half2_rn(kRounded ? 0x1.4p-10f : 0x1.04p-10f);
    __half2 least = __float2half2_rn(1);
    uint32_t signs = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const __half2 t = tanh_approximate(__hmul2(l[k], half));
        const __half2 v = __hfma2(as_half2(words[k] >> 5 & 0x07FF07FFu), scale, first);
        const __half2 difference = __hsub2(v, t);
        least = __hmin2_nan(least, __habs2(difference));  // a NaN is not sure
        signs = signs >> 2 | (as_bits(difference) & 0x80008000u);
    }
    bits = (signs >> 9 & 0x55) | (signs >> 24 & 0xAA);
    return __hbgt2(least, margin);
}

template <class T>
constexpr bool kRounded = std::is_same_v<T, float>;

struct Draw {
    Stream stream;
    uint64_t sample_offset;

    // The bits of a byte by the definition.
    __device__ __forceinline__ uint32_t exact(float (&l)[8], uint32_t byte, uint64_t sample) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) l[j] = __fmul_rn(l[j], -0x1.715476p+0f);  // -log2(e)
        return exact_bits(Ratio(0.0f, 1.0f, 1.0f, 1.0f), l, stream, byte, sample_offset + sample);
    }
};

__device__ __forceinline__ uint32_t positive(const float (&l)[8]) {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) bits |= uint32_t(l[j] > 0) << j;
    return bits;
}

// Bytes of a block that `decide` left open: a few of a thousand. They are worked off together, a thread each, because
// within the main loop one of them would hold up its whole warp.
template <uint32_t kCapacity>
struct Queue {
    uint32_t size;
    uint16_t item[kCapacity];

    __device__ __forceinline__ void add(uint32_t i) {
        uint32_t end;  // in assembly, or the compiler spends thirty instructions on one atomic per warp
        asm volatile("atom.shared.add.u32 %0, [%1], 1;"
                     : "=r"(end)
                     : "r"(uint32_t(__cvta_generic_to_shared(&size)))
                     : "memory");
        item[end] = uint16_t(i);
    }
};

struct Arguments {
    int64_t sample_values;
    uint32_t sample_bytes, channels, inner;
    Scalar seed, step;
    uint64_t sample_offset;
    uint8_t* out;

    __device__ __forceinline__ Draw draw() const { return {uniform_stream(seed, kBinarize, step), sample_offset}; }
};

// --- channels last ---------------------------------------------------------------------------------------------------

// The logits of a packed byte of (R, P). kFlat: C % 8 == 0, 16-byte aligned.
template <class T, bool kFlat>
struct Row {
    uint32_t raw[kFlat ? 2 * sizeof(T) : 8];  // as they lie in memory, or as floats
    int count;

    __device__ __forceinline__ void load(const T* logits, uint32_t byte, uint32_t channels) {
        const Position at = Position::of<kFlat>(byte, channels);
        logits += at.offset, count = at.count;
        if constexpr (kFlat)
#pragma unroll
            for (int i = 0; i < int(sizeof(T) / 2); ++i) {
                const uint4 four = __ldg(reinterpret_cast<const uint4*>(logits) + i);
                raw[4 * i] = four.x, raw[4 * i + 1] = four.y, raw[4 * i + 2] = four.z, raw[4 * i + 3] = four.w;
            }
        else
#pragma unroll
            for (int j = 0; j < 8; ++j) raw[j] = j < count ? __float_as_uint(to_float(logits[j])) : 0;  // 0: not set
    }
    __device__ __forceinline__ float at(int j) const {
        if constexpr (kFlat) return element<T>(raw, j);
        return __uint_as_float(raw[j]);
    }
    __device__ __forceinline__ __half2 pair(int k) const {
        if constexpr (kFlat && std::is_same_v<T, __half>) return as_half2(raw[k]);
        return __floats2half2_rn(at(2 * k), at(2 * k + 1));
    }
};

constexpr uint32_t kRowBytes = 4096;  // of a block, at most: see SampleGrid

template <class T, bool kFlat, bool kBernoulli>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const T* __restrict__ logits, const SampleGrid grid, const __grid_constant__ Arguments a) {
    __shared__ Queue<kBernoulli ? kRowBytes : 1> queue;
    if (kBernoulli && threadIdx.x + threadIdx.y == 0) queue.size = 0;
    const Draw draw = a.draw();
    const Share share(grid);
    const T* from = logits + share.sample * a.sample_values;
    uint8_t* to = a.out + share.sample * a.sample_bytes;
    if (kBernoulli) __syncthreads();
    Row<T, kFlat> next;
    if (threadIdx.x < share.count) next.load(from, share.begin + threadIdx.x, a.channels);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x) {
        const uint32_t byte = share.begin + i;
        const Row<T, kFlat> row = next;
        if (i + blockDim.x < share.count) next.load(from, byte + blockDim.x, a.channels);
        if constexpr (kBernoulli) {
            uint32_t words[4], bits;
            philox_block(draw.stream, byte, draw.sample_offset + share.sample, words);
            __half2 l[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) l[k] = row.pair(k);
            if (decide<kRounded<T>>(l, words, bits))
                to[byte] = uint8_t(bits & ((1u << row.count) - 1));
            else
                queue.add(threadIdx.y * grid.chunk + i);
        } else {
            float l[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) l[j] = row.at(j);
            to[byte] = uint8_t(positive(l));
        }
    }
    if constexpr (kBernoulli) {
        __syncthreads();
        const int64_t first = share.sample - threadIdx.y;
#pragma unroll 1
        for (uint32_t i = threadIdx.y * blockDim.x + threadIdx.x; i < queue.size; i += kThreads) {
            const uint32_t item = queue.item[i], sample = item / grid.chunk;
            const uint32_t byte = share.begin + item - sample * grid.chunk;
            Row<T, kFlat> row;
            row.load(logits + (first + sample) * a.sample_values, byte, a.channels);
            float l[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) l[j] = row.at(j);
            const uint32_t bits = draw.exact(l, byte, uint64_t(first + sample));
            a.out[(first + sample) * a.sample_bytes + byte] = uint8_t(bits & ((1u << row.count) - 1));
        }
    }
}

// --- channels in the middle ------------------------------------------------------------------------------------------

constexpr uint32_t kTileBytes = 4096;
using LogitColumns = Columns<kTileBytes>;

// kWide: a thread takes four positions at a time (inner % 4 == 0, aligned), else one.
template <class T, bool kWide>
struct Strip {
    static constexpr int kPositions = kWide ? 4 : 1;
    using Vector = std::conditional_t<!kWide, T, std::conditional_t<sizeof(T) == 4, uint4, uint2>>;

    Vector rows[8];

    __device__ __forceinline__ void load(const T* from, uint32_t inner, int count) {
#pragma unroll
        for (int j = 0; j < 8; ++j, from += inner)
            if (j < count)
                rows[j] = *reinterpret_cast<const Vector*>(from);
            else
                rows[j] = Vector{};
    }
    __device__ __forceinline__ float at(int j, int position) const {
        if constexpr (!kWide) return to_float(rows[j]);
        uint32_t words[sizeof(T)];
        memcpy(words, &rows[j], sizeof(words));
        return element<T>(words, position);
    }
    // Channels 2 k and 2 k + 1. bfloat16 becomes half exactly but for what is too small or too large to matter.
    __device__ __forceinline__ __half2 pair(int k, int position) const {
        if constexpr (kWide && std::is_same_v<T, __half>) {
            const uint32_t low = position / 2 ? rows[2 * k].y : rows[2 * k].x;
            const uint32_t high = position / 2 ? rows[2 * k + 1].y : rows[2 * k + 1].x;
            return as_half2(__byte_perm(low, high, position % 2 ? 0x7632 : 0x5410));
        }
        return __floats2half2_rn(at(2 * k, position), at(2 * k + 1, position));
    }
};

template <class T, bool kWide, bool kBernoulli>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 5 : 4)
    columns_kernel(const T* __restrict__ logits, const __grid_constant__ LogitColumns columns,
                   const __grid_constant__ Arguments a) {
    using Strip = Strip<T, kWide>;
    constexpr uint32_t kLogStrip = kWide ? 2 : 0;
    __shared__ alignas(16) uint8_t shared[LogitColumns::kShared];
    __shared__ Queue<kBernoulli ? kTileBytes : 1> queue;
    if (threadIdx.x == 0) queue.size = 0;
    const Draw draw = a.draw();
    const Tile<kTileBytes> tile(columns);
    const uint32_t positions = a.sample_bytes / columns.row_bytes;  // of a sample
    __syncthreads();

    const uint32_t log_strips = columns.log_height - kLogStrip;
    const uint32_t strips = 1u << log_strips, width = 1u << columns.log_width;
    const uint32_t columns_at_once = max(kThreads >> log_strips, 1);
#pragma unroll 1
    for (uint32_t strip = threadIdx.x & (strips - 1); strip < strips; strip += kThreads) {
        const uint32_t row = strip << kLogStrip;
        const int64_t position = tile.position + row;
        if (position >= columns.positions) break;
        const int64_t outer = divide(position, a.inner), sample = divide(position, positions);
        const uint32_t first_byte = uint32_t(position - sample * positions) * columns.row_bytes;
        const T* from = logits + outer * a.channels * a.inner + (position - outer * a.inner);
#pragma unroll 1
        for (uint32_t column = threadIdx.x >> log_strips; column < width; column += columns_at_once) {
            const uint32_t byte = tile.byte + column;
            if (byte >= columns.row_bytes) break;
            const int count = int(min(8u, a.channels - 8 * byte));
            Strip values;
            values.load(from + int64_t(8 * byte) * a.inner, a.inner, count);
            uint8_t* to = shared + tile.place(column, row);
            uint32_t packed = 0;
#pragma unroll
            for (int i = 0; i < Strip::kPositions; ++i) {
                uint32_t bits;
                if constexpr (kBernoulli) {
                    uint32_t words[4];
                    philox_block(draw.stream, first_byte + i * columns.row_bytes + byte, draw.sample_offset + sample,
                                 words);
                    __half2 l[4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) l[k] = values.pair(k, i);
                    // At once: a loop over them afterwards leaves the warp diverged.
                    if (!decide<kRounded<T>>(l, words, bits)) queue.add((column << columns.log_height) + row + i);
                    bits &= (1u << count) - 1;
                } else {
                    float l[8];
#pragma unroll
                    for (int j = 0; j < 8; ++j) l[j] = values.at(j, i);
                    bits = positive(l);
                }
                packed |= bits << (8 * i);
            }
            if constexpr (kWide)
                *reinterpret_cast<uint32_t*>(to) = packed;
            else
                *to = uint8_t(packed);
        }
    }
    __syncthreads();
    if constexpr (kBernoulli) {
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < queue.size; i += kThreads) {
            const uint32_t item = queue.item[i], column = item >> columns.log_height, byte = tile.byte + column;
            const uint32_t row = item & ((1u << columns.log_height) - 1);
            const int64_t position = tile.position + row;
            const int64_t outer = divide(position, a.inner), sample = divide(position, positions);
            const T* from = logits + (outer * a.channels + 8 * byte) * a.inner + (position - outer * a.inner);
            const int count = int(min(8u, a.channels - 8 * byte));
            float l[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) l[j] = j < count ? to_float(from[int64_t(j) * a.inner]) : 0.0f;
            const uint32_t bits = draw.exact(
                l, uint32_t(position - sample * positions) * columns.row_bytes + byte, uint64_t(sample));
            shared[tile.place(column, row)] = uint8_t(bits & ((1u << count) - 1));
        }
        __syncthreads();
    }
    tile.store(shared, a.out);
}

}  // namespace

void binarize(const void* logits, int64_t type, int64_t batch, int64_t outer, int64_t channels, int64_t inner,
              bool bernoulli, int64_t seed, const int64_t* seed_pointer, int64_t step, const int64_t* step_pointer,
              int64_t sample_offset, uint8_t* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const SampleGrid grid(batch, outer * inner * ceil_div<int64_t>(channels, 8));
    const Arguments a{outer * channels * inner,
                      grid.bytes,
                      uint32_t(channels),
                      uint32_t(inner),
                      {seed, seed_pointer},
                      {step, step_pointer},
                      uint64_t(sample_offset),
                      out};
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        const T* from = static_cast<const T*>(logits);
        with_flag(bernoulli, [&](auto draws) {
            if (inner == 1)
                with_flag(channels % 8 == 0 && aligned(logits, 16), [&](auto flat) {
                    rows_kernel<T, flat.value, draws.value>
                        <<<grid.blocks(), grid.threads(), 0, stream>>>(from, grid, a);
                });
            else
                with_flag(inner % 4 == 0 && aligned(logits, 4 * sizeof(T)), [&](auto wide) {
                    const LogitColumns columns(batch * outer, channels, inner);
                    columns_kernel<T, wide.value, draws.value>
                        <<<columns.blocks(), kThreads, 0, stream>>>(from, columns, a);
                });
        });
    });
    check(cudaGetLastError(), "binarize");
}

}  // namespace bldm::cuda
