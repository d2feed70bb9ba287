// flip_probability: P(x_s != x_t) of every bit, and its gradient.
#include "cuda/bernoulli.cuh"

namespace bldm::cuda {
namespace {

struct Arguments {
    SampleGrid grid;
    const uint8_t* x_t;
    int64_t sample_values;
    uint32_t channels;
    const float* coefficients;
    int64_t coefficient_stride;
    float scale, inverse_temperature;
    bool x0_prediction;
};

// e = exp(-l / temperature) of logit j of a byte, l the logit of x_0 != x_t.
__device__ __forceinline__ float odds(float l, uint32_t flips, int j, float scale) {
    const float y = __fmul_rn(l, scale);
    return isnan(y) ? y : exp2_clamped(flips >> j & 1 ? -y : y);  // the clamp would hide a NaN
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ logits, float* __restrict__ out, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    if (threadIdx.x >= share.count) return;
    const Ratio ratio(a.coefficients + share.sample * a.coefficient_stride);
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x) {
        const uint32_t byte = share.begin + i;
        const Position at = Position::of<kVector>(byte, a.channels);
        const int64_t first = share.sample * a.sample_values + at.offset;
        float l[8];
        read<kVector>(logits + first, at.count, l);
        const uint32_t flips = a.x0_prediction ? a.x_t[share.sample * a.grid.bytes + byte] : 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float e = odds(l[j], flips, j, a.scale);
            l[j] = ratio.numerator(e) / ratio.denominator(e);
        }
        write<kVector>(out + first, at.count, l);
    }
}

// dP/dl = (n1 d0 - n0 d1) / (d0 + d1 f)^2 f (1 - f) / temperature = det e / D^2 / temperature, D = d0 (1 + e) + d1.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) backward(const float* __restrict__ grad, const T* __restrict__ logits,
                                                     T* __restrict__ out, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    if (threadIdx.x >= share.count) return;
    const float* row = a.coefficients + share.sample * a.coefficient_stride;
    const Ratio ratio(row);
    const float slope = (row[1] * row[2] - row[0] * row[3]) * a.inverse_temperature;
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x) {
        const uint32_t byte = share.begin + i;
        const Position at = Position::of<kVector>(byte, a.channels);
        const int64_t first = share.sample * a.sample_values + at.offset;
        float l[8], g[8];
        read<kVector>(logits + first, at.count, l);
        read<kVector>(grad + first, at.count, g);
        const uint32_t flips = a.x0_prediction ? a.x_t[share.sample * a.grid.bytes + byte] : 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float e = odds(l[j], flips, j, a.scale);
            const float d = ratio.denominator(e);
            const float change = e / d * slope / d;  // in this order nothing overflows
            l[j] = g[j] * (flips >> j & 1 ? -change : change);
        }
        write<kVector>(out + first, at.count, l);
    }
}

Arguments arguments(const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels, const float* coefficients,
                    int64_t coefficient_rows, float scale, float temperature, bool x0_prediction) {
    return {SampleGrid(batch, rows * ceil_div<int64_t>(channels, 8)),
            x_t,
            rows * channels,
            uint32_t(channels),
            coefficients,
            coefficient_rows > 1 ? 4 : 0,
            scale,
            1 / temperature,
            x0_prediction};
}

}  // namespace

void flip_probability(const void* logits, int64_t type, const uint8_t* x_t, int64_t batch, int64_t rows,
                      int64_t channels, const float* coefficients, int64_t coefficient_rows, float scale,
                      bool x0_prediction, float* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const Arguments a =
        arguments(x_t, batch, rows, channels, coefficients, coefficient_rows, scale, 1.0f, x0_prediction);
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        with_flag(channels % 8 == 0 && aligned(logits, 16) && aligned(out, 16), [&](auto vector) {
            forward<T, vector.value>
                <<<a.grid.blocks(), a.grid.threads(), 0, stream>>>(static_cast<const T*>(logits), out, a);
        });
    });
    check(cudaGetLastError(), "flip_probability");
}

void flip_probability_backward(const float* grad, const void* logits, int64_t type, const uint8_t* x_t, int64_t batch,
                               int64_t rows, int64_t channels, const float* coefficients, int64_t coefficient_rows,
                               float scale, float temperature, bool x0_prediction, void* out, int device,
                               cudaStream_t stream) {
    const DeviceGuard guard(device);
    const Arguments a =
        arguments(x_t, batch, rows, channels, coefficients, coefficient_rows, scale, temperature, x0_prediction);
    const bool is_vector = channels % 8 == 0 && aligned(logits, 16) && aligned(grad, 16) && aligned(out, 16);
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        with_flag(is_vector, [&](auto vector) {
            backward<T, vector.value><<<a.grid.blocks(), a.grid.threads(), 0, stream>>>(
                grad, static_cast<const T*>(logits), static_cast<T*>(out), a);
        });
    });
    check(cudaGetLastError(), "flip_probability_backward");
}

}  // namespace bldm::cuda
