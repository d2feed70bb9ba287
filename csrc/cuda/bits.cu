// pack_bits, unpack_bits, random_bits, add_noise.
#include "cuda/bernoulli.cuh"

namespace bldm::cuda {
namespace {

// Items of 1, 2, 4 or 8 bytes, told apart only by what is not zero.
template <class F>
void with_item_type(int64_t item_bytes, F&& f) {
    switch (item_bytes) {
        case 1:
            return f(uint8_t{});
        case 2:
            return f(uint16_t{});
        case 4:
            return f(uint32_t{});
        case 8:
            return f(uint64_t{});
        default:
            throw std::invalid_argument("items must have 1, 2, 4 or 8 bytes");
    }
}

// a / b for b below 2^32: 64-bit division is slow, and hardly ever needed.
__device__ __forceinline__ int64_t divide(int64_t a, uint32_t b) {
    return uint64_t(a) < uint64_t(1) << 32 ? uint32_t(a) / b : a / b;
}

// Where packed byte `index` of (outer, inner, P) is found in (outer, C, inner): threads run along the inner dimension,
// so that neighbours read neighbours.
struct Place {
    int64_t packed, item;  // of the byte, and of its first channel
    int count;             // channels in the byte

    __device__ __forceinline__ Place(int64_t index, uint32_t channels, uint32_t inner) {
        const uint32_t row_bytes = (channels + 7) / 8;
        const int64_t row = divide(index, inner);  // of (outer, P)
        const int64_t outer = divide(row, row_bytes);
        const uint32_t within = uint32_t(index - row * inner), byte = uint32_t(row - outer * row_bytes);
        packed = (outer * inner + within) * row_bytes + byte;
        item = (outer * channels + 8 * byte) * inner + within;
        count = int(min(8u, channels - 8 * byte));
    }
};

// The eight items of one packed byte.
template <class U>
struct alignas(sizeof(U) == 1 ? 8 : 16) Group {
    U item[8];
};
template <class U>
struct alignas(sizeof(U) == 1 ? 8 : 16) Words {
    uint32_t word[2 * sizeof(U)];
};

// Bits 7, 15, 23 and 31 next to each other: the product moves them to bits 28 to 31, and nothing else gets there.
__device__ __forceinline__ uint32_t gather(uint32_t bits) { return (bits & 0x80808080u) * 0x00204081u >> 28; }

// Bit j: item j is not zero. Of every word, or of the upper word of 8-byte items, only the bits of `mask` count.
template <class U>
__device__ __forceinline__ uint32_t nonzero(const Words<U>& items, uint32_t mask) {
    uint32_t bits = 0;
    if constexpr (sizeof(U) == 1) {
        // Adding 0x7F to a byte without its upper bit sets that bit unless the byte was 0, and never overflows into the
        // next.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t w = items.word[i];
            bits |= gather(((w & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | w) << (4 * i);
        }
    } else if constexpr (sizeof(U) == 2) {
        uint32_t upper[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t w = items.word[i];
            upper[i] = ((w & 0x7FFF7FFFu) + 0x7FFF7FFFu) | (w & mask);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) bits |= gather(__byte_perm(upper[2 * i], upper[2 * i + 1], 0x7531)) << (4 * i);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const uint32_t w =
                sizeof(U) == 4 ? items.word[j] & mask : items.word[2 * j] | (items.word[2 * j + 1] & mask);
            bits |= uint32_t(w != 0) << j;
        }
    }
    return bits;
}

// C % 8 == 0 and inner == 1: byte i is made of items 8 i to 8 i + 7, whatever the shape.
template <class U>
__global__ void __launch_bounds__(kThreads)
    pack_flat(const Words<U>* __restrict__ x, uint32_t mask, int64_t bytes, uint8_t* __restrict__ out) {
    constexpr int kTurns = sizeof(U) == 8 ? 2 : 4;  // loads in flight
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x; first < bytes; first += kTurns * stride) {
        Words<U> items[kTurns];
#pragma unroll
        for (int t = 0; t < kTurns; ++t)
            if (first + t * stride < bytes) items[t] = x[first + t * stride];
#pragma unroll
        for (int t = 0; t < kTurns; ++t)
            if (first + t * stride < bytes) out[first + t * stride] = uint8_t(nonzero(items[t], mask));
    }
}

template <class U>
__global__ void __launch_bounds__(kThreads) pack_any(const U* __restrict__ x, U value_mask, int64_t bytes,
                                                     uint32_t channels, uint32_t inner, uint8_t* __restrict__ out) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += stride) {
        const Place place(i, channels, inner);
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < place.count) bits |= uint32_t((x[place.item + int64_t(j) * inner] & value_mask) != 0) << j;
        out[place.packed] = uint8_t(bits);
    }
}

template <class U>
__global__ void __launch_bounds__(kThreads)
    unpack_flat(const uint8_t* __restrict__ packed, U one, int64_t bytes, Group<U>* __restrict__ out) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += stride) {
        const uint32_t bits = packed[i];
        Group<U> group;
#pragma unroll
        for (int j = 0; j < 8; ++j) group.item[j] = bits >> j & 1 ? one : U(0);
        out[i] = group;
    }
}

template <class U>
__global__ void __launch_bounds__(kThreads) unpack_any(const uint8_t* __restrict__ packed, U one, int64_t bytes,
                                                       uint32_t channels, uint32_t inner, U* __restrict__ out) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += stride) {
        const Place place(i, channels, inner);
        const uint32_t bits = packed[place.packed];
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < place.count) out[place.item + int64_t(j) * inner] = bits >> j & 1 ? one : U(0);
    }
}

// Bits of the last byte of a row that are not padding.
__device__ __forceinline__ uint32_t padding_mask(uint32_t byte, uint32_t channels) {
    if (channels % 8 == 0) return 0xFF;
    const uint32_t row_bytes = (channels + 7) / 8;
    return byte % row_bytes == row_bytes - 1 ? (1u << channels % 8) - 1 : 0xFF;
}

__global__ void __launch_bounds__(kThreads)
    random_bits_kernel(const SampleGrid grid, uint32_t channels, Scalar seed, uint64_t sample_offset, uint8_t* out) {
    const Stream stream = uniform_stream(seed, kRandomBits, {0, nullptr});
    const Share share(grid);
    out += share.sample * grid.bytes;
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x) {
        const uint32_t byte = share.begin + i;
        uint32_t words[4], bits = 0;
        philox_block(stream, byte, sample_offset + share.sample, words);
        // P = 1/2: a bit is set when its lane is below 2^15.
#pragma unroll
        for (int k = 0; k < 4; ++k) bits |= (words[k] >> 15 & 1) << (2 * k) | words[k] >> 31 << (2 * k + 1);
        out[byte] = uint8_t(~bits & padding_mask(byte, channels));
    }
}

__global__ void __launch_bounds__(kThreads)
    add_noise_kernel(const SampleGrid grid, const uint8_t* x_0, uint32_t channels, const float* flip_probability,
                     uint32_t probability_stride, Scalar seed, Scalar step, uint64_t sample_offset, uint8_t* out) {
    const Stream stream = uniform_stream(seed, kAddNoise, step);
    const Share share(grid);
    if (threadIdx.x >= share.count) return;
    const uint64_t sample = sample_offset + share.sample;
    x_0 += share.sample * grid.bytes, out += share.sample * grid.bytes;
    // A bit is set when h 2^16 + g < ceil(P 2^32): the lane alone decides unless it is the threshold's upper half.
    const float p = __saturatef(flip_probability[share.sample * probability_stride]);
    const uint64_t threshold = uint64_t(ceilf(p * 0x1p32f));
    const uint32_t upper = uint32_t(threshold >> 16), lower = uint32_t(threshold) & 0xFFFF;
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x) {
        const uint32_t byte = share.begin + i, x = load_now(x_0 + byte);
        uint32_t words[4], bits = 0;
        philox_block(stream, byte, sample, words);
        bool tie = false;
#pragma unroll
        for (int j = 7; j >= 0; --j) {
            const uint32_t difference = lane(words, j) - upper;
            tie = tie || difference == 0;
            bits = __funnelshift_l(difference, bits, 1);  // its sign: h < upper
        }
        if (tie && lower) {
            uint32_t tie_words[4];
            philox_block(stream.ties(), byte, sample, tie_words);
#pragma unroll
            for (int j = 0; j < 8; ++j) bits |= uint32_t(lane(words, j) == upper && lane(tie_words, j) < lower) << j;
        }
        out[byte] = uint8_t(x ^ (bits & padding_mask(byte, channels)));
    }
}

}  // namespace

void pack_bits(const void* x, int64_t item_bytes, bool is_float, int64_t outer, int64_t channels, int64_t inner,
               uint8_t* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const int64_t bytes = outer * inner * ceil_div<int64_t>(channels, 8);
    with_item_type(item_bytes, [&](auto item) {
        using U = decltype(item);
        const U mask = is_float ? U(U(~U(0)) >> 1) : U(~U(0));  // -0.0 is zero
        const uint32_t word_mask = !is_float ? ~0u : item_bytes == 2 ? 0x7FFF7FFFu : 0x7FFFFFFFu;
        if (channels % 8 == 0 && inner == 1 && aligned(x, alignof(Words<U>)))
            pack_flat<U><<<grid_for(ceil_div<int64_t>(bytes, 4), kThreads), kThreads, 0, stream>>>(
                static_cast<const Words<U>*>(x), word_mask, bytes, out);
        else
            pack_any<U><<<grid_for(bytes, kThreads), kThreads, 0, stream>>>(static_cast<const U*>(x), mask, bytes,
                                                                            uint32_t(channels), uint32_t(inner), out);
    });
    check(cudaGetLastError(), "pack_bits");
}

void unpack_bits(const uint8_t* packed, int64_t outer, int64_t channels, int64_t inner, int64_t item_bytes,
                 uint64_t one, void* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const int64_t bytes = outer * inner * ceil_div<int64_t>(channels, 8);
    with_item_type(item_bytes, [&](auto item) {
        using U = decltype(item);
        if (channels % 8 == 0 && inner == 1 && aligned(out, alignof(Group<U>)))
            unpack_flat<U><<<grid_for(bytes, kThreads), kThreads, 0, stream>>>(packed, U(one), bytes,
                                                                               static_cast<Group<U>*>(out));
        else
            unpack_any<U><<<grid_for(bytes, kThreads), kThreads, 0, stream>>>(packed, U(one), bytes, uint32_t(channels),
                                                                              uint32_t(inner), static_cast<U*>(out));
    });
    check(cudaGetLastError(), "unpack_bits");
}

void random_bits(uint8_t* out, int64_t batch, int64_t rows, int64_t channels, int64_t seed, const int64_t* seed_pointer,
                 int64_t sample_offset, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const SampleGrid grid(batch, rows * ceil_div<int64_t>(channels, 8));
    random_bits_kernel<<<grid.blocks(), grid.threads(), 0, stream>>>(grid, uint32_t(channels), {seed, seed_pointer},
                                                                     uint64_t(sample_offset), out);
    check(cudaGetLastError(), "random_bits");
}

void add_noise(const uint8_t* x_0, int64_t batch, int64_t rows, int64_t channels, const float* flip_probability,
               int64_t probabilities, int64_t seed, const int64_t* seed_pointer, int64_t step,
               const int64_t* step_pointer, int64_t sample_offset, uint8_t* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const SampleGrid grid(batch, rows * ceil_div<int64_t>(channels, 8));
    add_noise_kernel<<<grid.blocks(), grid.threads(), 0, stream>>>(grid, x_0, uint32_t(channels), flip_probability,
                                                                   probabilities > 1, {seed, seed_pointer},
                                                                   {step, step_pointer}, uint64_t(sample_offset), out);
    check(cudaGetLastError(), "add_noise");
}

}  // namespace bldm::cuda
