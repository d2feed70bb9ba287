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
    const float y = flips >> j & 1 ? -l * scale : l * scale;
    return isnan(y) ? y : exp2_fast(fminf(fmaxf(y, -64.0f), 64.0f));  // the clamp would hide a NaN
}

// The logits of kBytes bytes, where they lie, and the bits whose logit changes its sign.
template <class T, bool kVector, int kBytes>
struct Inputs {
    Position at[kBytes];
    float logits[kBytes][8];
    uint32_t flips[kBytes];

    __device__ __forceinline__ Inputs(const T* __restrict__ from, const Arguments& a, const Share& share, uint32_t i) {
#pragma unroll
        for (int k = 0; k < kBytes; ++k) {
            const uint32_t byte = share.begin + i + k * blockDim.x;
            at[k] = Position::of<kVector>(byte, a.channels);
            at[k].offset += share.sample * a.sample_values;
            read<kVector>(from + at[k].offset, at[k].count, logits[k]);
            flips[k] = a.x0_prediction ? a.x_t[share.sample * a.grid.bytes + byte] : 0;
        }
    }
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ logits, float* __restrict__ out, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    if (threadIdx.x >= share.count) return;
    const Ratio ratio(a.coefficients + share.sample * a.coefficient_stride);
    for_bytes(share, [&](auto count, uint32_t i) {
        const Inputs<T, kVector, count.value> x(logits, a, share, i);
#pragma unroll
        for (int k = 0; k < count.value; ++k) {
            float p[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float e = odds(x.logits[k][j], x.flips[k], j, a.scale);
                p[j] = __fdividef(ratio.numerator(e), ratio.denominator(e));
            }
            write<kVector>(out + x.at[k].offset, x.at[k].count, p);
        }
    });
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
    for_bytes(share, [&](auto count, uint32_t i) {
        const Inputs<T, kVector, count.value> x(logits, a, share, i);
        float g[count.value][8];
#pragma unroll
        for (int k = 0; k < count.value; ++k) read<kVector>(grad + x.at[k].offset, x.at[k].count, g[k]);
#pragma unroll
        for (int k = 0; k < count.value; ++k) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float e = odds(x.logits[k][j], x.flips[k], j, a.scale);
                const float d = ratio.denominator(e);
                const float change = __fdividef(e, d) * __fdividef(slope, d);  // in this order nothing overflows
                g[k][j] *= x.flips[k] >> j & 1 ? -change : change;
            }
            write<kVector>(out + x.at[k].offset, x.at[k].count, g[k]);
        }
    });
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
