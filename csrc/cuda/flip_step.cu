// flip_step: one reverse step, packed bits in and out.
#include "cuda/bernoulli.cuh"

namespace bldm::cuda {
namespace {

struct Arguments {
    SampleGrid grid;
    const uint8_t* x_t;
    int64_t sample_values;  // R C
    uint32_t channels;
    const float* coefficients;
    int64_t coefficient_stride;
    Scalar seed, step;
    Scalar sample_offset;
    float scale, guidance_scale;
    const float* guidance_scale_pointer;
    const uint8_t* keep_mask;
    int64_t keep_mask_stride;
    const uint8_t* keep_bits;
    int64_t keep_bits_stride;
    int32_t* nonfinite;
    uint8_t* out;
};

// Where a thread's logits come from, and what they become: y = -l log2(e) / temperature, l the logit of x_0 != x_t.
template <class T, bool kVector, bool kGuided, bool kX0>
struct Values {
    const T* logits;  // of the thread's sample
    const T* uncond_logits;
    uint32_t channels;
    float scale, guidance_scale;

    // The guided logits of a packed byte.
    __device__ __forceinline__ void load(const Position& at, float (&l)[8]) const {
        read<kVector>(logits + at.offset, at.count, l);
        if constexpr (kGuided) {
            float u[8];
            read<kVector>(uncond_logits + at.offset, at.count, u);
#pragma unroll
            for (int j = 0; j < 8; ++j) l[j] = __fmaf_rn(guidance_scale, __fsub_rn(l[j], u[j]), u[j]);
        }
    }
    __device__ __forceinline__ void to_exponents(uint32_t x, float (&l)[8]) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            l[j] = __fmul_rn(l[j], scale);
            if constexpr (kX0) l[j] = __uint_as_float(__float_as_uint(l[j]) ^ (x << (31 - j) & 0x80000000u));
        }
    }
};

template <class T, bool kVector, bool kGuided, bool kX0>
__global__ void __launch_bounds__(kThreads, 4)
    kernel(const T* __restrict__ logits, const T* __restrict__ uncond_logits, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    const Stream stream = uniform_stream(a.seed, kFlipStep, a.step);
    uint32_t nonfinite = 0;
    if (threadIdx.x < share.count) {
        const float* coefficients = a.coefficients + share.sample * a.coefficient_stride;
        const int64_t values_before = share.sample * a.sample_values, bytes_before = share.sample * a.grid.bytes;
        const Values<T, kVector, kGuided, kX0> values{pinned(logits + values_before),
                                                      kGuided ? pinned(uncond_logits + values_before) : nullptr,
                                                      a.channels, a.scale,
                                                      a.guidance_scale_pointer ? *a.guidance_scale_pointer
                                                                               : a.guidance_scale};
        const uint8_t* x_t = pinned(a.x_t + bytes_before);
        uint8_t* out = pinned(a.out + bytes_before);
        const uint64_t sample = pinned(uint64_t(a.sample_offset.get()) + share.sample);
        const auto finish = [&](uint32_t byte, const Position& at, uint32_t x, uint32_t flips) {
            if constexpr (!kVector) flips &= (1u << at.count) - 1;
            uint32_t x_s = x ^ flips;
            if (a.keep_mask) {
                const uint32_t mask = a.keep_mask[share.sample * a.keep_mask_stride + byte];
                x_s = (x_s & ~mask) | (a.keep_bits[share.sample * a.keep_bits_stride + byte] & mask);
            }
            out[byte] = uint8_t(x_s);
        };

        uint32_t open = 0;  // bit i: the filter was not sure of byte i of this thread, or it is to be searched for
                            // non-finite logits
        uint32_t turn = 1;
        const Filter filter{Ratio(coefficients)};
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x, turn <<= 1) {
            const uint32_t byte = share.begin + i;
            const Position at = Position::of<kVector>(byte, a.channels);
            float y[8];
            values.load(at, y);
            const uint32_t x = load_now(x_t + byte);
            const bool finite = !a.nonfinite || all_finite(y);
            values.to_exponents(x, y);
            uint32_t words[4], flips;
            philox_block(stream, byte, sample, words);
            if (filter.decide(y, words, flips) && finite)
                finish(byte, at, x, flips);
            else
                open |= turn;
        }
        // The few open bytes by the definition, apart from the loop above, which has no registers to spare for it.
#pragma unroll 1
        for (; open; open &= open - 1) {
            const uint32_t byte = share.begin + threadIdx.x + (__ffs(int(open)) - 1) * blockDim.x;
            const Position at = Position::of<kVector>(byte, a.channels);
            float y[8];
            values.load(at, y);
#pragma unroll
            for (int j = 0; j < 8; ++j) nonfinite += !isfinite(y[j]);
            const uint32_t x = x_t[byte];
            values.to_exponents(x, y);
            finish(byte, at, x, exact_bits(Ratio(coefficients), y, stream, byte, sample));
        }
    }
    // One atomic a warp, and only where something is wrong.
    if (a.nonfinite && __any_sync(~0u, nonfinite != 0)) {
        nonfinite = __reduce_add_sync(~0u, nonfinite);
        if ((threadIdx.y * blockDim.x + threadIdx.x) % 32 == 0) atomicAdd(a.nonfinite, int(nonfinite));
    }
}

}  // namespace

void flip_step(const void* logits, int64_t type, const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels,
               const float* coefficients, int64_t coefficient_rows, int64_t seed, const int64_t* seed_pointer,
               int64_t step, const int64_t* step_pointer, int64_t sample_offset, const int64_t* sample_offset_pointer,
               float scale, bool x0_prediction, const void* uncond_logits, float guidance_scale,
               const float* guidance_scale_pointer, const uint8_t* keep_mask, int64_t keep_mask_samples,
               const uint8_t* keep_bits, int64_t keep_bits_samples, int32_t* nonfinite, uint8_t* out, int device,
               cudaStream_t stream) {
    const DeviceGuard guard(device);
    const int64_t bytes = rows * ceil_div<int64_t>(channels, 8);
    const auto stride = [](int64_t samples, int64_t size) { return samples > 1 ? size : 0; };
    const Arguments a{SampleGrid(batch, bytes),
                      x_t,
                      rows * channels,
                      uint32_t(channels),
                      coefficients,
                      stride(coefficient_rows, 4),
                      {seed, seed_pointer},
                      {step, step_pointer},
                      {sample_offset, sample_offset_pointer},
                      scale,
                      guidance_scale,
                      guidance_scale_pointer,
                      keep_mask,
                      stride(keep_mask_samples, bytes),
                      keep_bits,
                      stride(keep_bits_samples, bytes),
                      nonfinite,
                      out};
    const bool vector = channels % 8 == 0 && aligned(logits, 16) && aligned(uncond_logits, 16);
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        with_flag(vector, [&](auto is_vector) {
            with_flag(uncond_logits != nullptr, [&](auto guided) {
                with_flag(x0_prediction, [&](auto x0) {
                    kernel<T, is_vector.value, guided.value, x0.value>
                        <<<a.grid.blocks(), a.grid.threads(), 0, stream>>>(static_cast<const T*>(logits),
                                                                           static_cast<const T*>(uncond_logits), a);
                });
            });
        });
    });
    check(cudaGetLastError(), "flip_step");
}

}  // namespace bldm::cuda
