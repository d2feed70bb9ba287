// random_bits, add_noise: draws whose probability is the same for a whole sample.
#include "cuda/bernoulli.cuh"

namespace bldm::cuda {
namespace {

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
