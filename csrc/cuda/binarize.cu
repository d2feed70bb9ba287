// binarize: logits to packed bits, Bernoulli(sigmoid(l)) or l > 0.
#include "cuda/bernoulli.cuh"

namespace bldm::cuda {
namespace {

struct Arguments {
    SampleGrid grid;
    int64_t sample_values;
    uint32_t channels, inner;
    Scalar seed, step;
    uint64_t sample_offset;
    uint8_t* out;
};

// The values of a packed byte of (outer inner, P), read from (outer, C, inner). kFlat: C % 8 == 0, inner == 1, aligned.
template <bool kFlat, class T>
__device__ __forceinline__ int load(const T* logits, uint32_t byte, const Arguments& a, float (&l)[8]) {
    if constexpr (kFlat) {
        read<true>(logits + int64_t(byte) * 8, 8, l);
        return 8;
    }
    const uint32_t row_bytes = (a.channels + 7) / 8;
    const uint32_t position = byte / row_bytes, channel = 8 * (byte - position * row_bytes);
    const uint32_t outer = position / a.inner, within = position - outer * a.inner;
    const T* from = logits + (int64_t(outer) * a.channels + channel) * a.inner + within;
    const int count = int(min(8u, a.channels - channel));
#pragma unroll
    for (int j = 0; j < 8; ++j) l[j] = j < count ? to_float(from[int64_t(j) * a.inner]) : 0.0f;
    return count;
}

// Threads take bytes in the order of memory. Where the channels are not last (inner > 1) they take the positions of a
// row one after the other instead, so that neighbours read neighbours: turn i of the sample becomes byte (i %
// positions, i / positions).
__device__ __forceinline__ uint32_t byte_of_turn(uint32_t turn, const Arguments& a) {
    if (a.inner == 1) return turn;
    const uint32_t row_bytes = (a.channels + 7) / 8, positions = a.grid.bytes / row_bytes;
    const uint32_t byte = turn / positions;
    return (turn - byte * positions) * row_bytes + byte;
}

template <class T, bool kFlat>
__global__ void __launch_bounds__(kThreads)
    bernoulli_kernel(const T* __restrict__ logits, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    const Stream stream = uniform_stream(a.seed, kBinarize, a.step);
    if (threadIdx.x >= share.count) return;
    const Ratio ratio(0.0f, 1.0f, 1.0f, 1.0f);
    const Filter filter(ratio);
    const uint64_t sample = a.sample_offset + share.sample;
    logits += share.sample * a.sample_values;
    uint8_t* out = a.out + share.sample * a.grid.bytes;
    uint32_t open = 0, turn = 1;  // bit i of open: the filter was not sure of byte i of this thread
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x, turn <<= 1) {
        const uint32_t byte = kFlat ? share.begin + i : byte_of_turn(share.begin + i, a);
        float y[8];
        const int count = load<kFlat>(logits, byte, a, y);
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] = __fmul_rn(y[j], -0x1.715476p+0f);  // -log2(e)
        uint32_t words[4], bits;
        philox_block(stream, byte, sample, words);
        if (filter.decide(y, words, bits))
            out[byte] = uint8_t(bits & ((1u << count) - 1));
        else
            open |= turn;
    }
#pragma unroll 1
    for (; open; open &= open - 1) {
        const uint32_t i = share.begin + threadIdx.x + (__ffs(int(open)) - 1) * blockDim.x;
        const uint32_t byte = kFlat ? i : byte_of_turn(i, a);
        float y[8];
        const int count = load<kFlat>(logits, byte, a, y);
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] = __fmul_rn(y[j], -0x1.715476p+0f);
        out[byte] = uint8_t(exact_bits(ratio, y, stream, byte, sample) & ((1u << count) - 1));
    }
}

template <class T, bool kFlat>
__global__ void __launch_bounds__(kThreads)
    threshold_kernel(const T* __restrict__ logits, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    logits += share.sample * a.sample_values;
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x) {
        const uint32_t byte = kFlat ? share.begin + i : byte_of_turn(share.begin + i, a);
        float l[8];
        load<kFlat>(logits, byte, a, l);  // 0 where there is no channel: not set
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) bits |= uint32_t(l[j] > 0) << j;
        a.out[share.sample * a.grid.bytes + byte] = uint8_t(bits);
    }
}

}  // namespace

void binarize(const void* logits, int64_t type, int64_t batch, int64_t outer, int64_t channels, int64_t inner,
              bool bernoulli, int64_t seed, const int64_t* seed_pointer, int64_t step, const int64_t* step_pointer,
              int64_t sample_offset, uint8_t* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const Arguments a{SampleGrid(batch, outer * inner * ceil_div<int64_t>(channels, 8)),
                      outer * channels * inner,
                      uint32_t(channels),
                      uint32_t(inner),
                      {seed, seed_pointer},
                      {step, step_pointer},
                      uint64_t(sample_offset),
                      out};
    const bool flat = channels % 8 == 0 && inner == 1 && aligned(logits, 16);
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        with_flag(flat, [&](auto is_flat) {
            const auto kernel = bernoulli ? bernoulli_kernel<T, is_flat.value> : threshold_kernel<T, is_flat.value>;
            kernel<<<a.grid.blocks(), a.grid.threads(), 0, stream>>>(static_cast<const T*>(logits), a);
        });
    });
    check(cudaGetLastError(), "binarize");
}

}  // namespace bldm::cuda
