// flip_loss: the mean over a sample's bits of weight q^gamma softplus(-m), m the margin and q = sigmoid(-m), and its
// gradient.
//
// The class weights are 1 - r where the target is set and r where it is not, r the set fraction of the sample. So one
// pass over the logits sums both classes and counts; the weights come in when the sums of a sample meet. All sums are
// taken in a fixed order: the loss is the same in every run.
#include "cuda/samples.cuh"

namespace bldm::cuda {
namespace {

struct Arguments {
    SampleGrid grid;
    const uint8_t *x_0, *x_t;
    int64_t sample_values;
    uint32_t channels;
    float gamma;  // times log2(e)
    bool balanced, x0_prediction;

    // The targets of a packed byte: x_0 XOR x_t, or x_0 itself for an x_0 prediction.
    __device__ __forceinline__ uint32_t targets(int64_t byte) const {
        return x0_prediction ? x_0[byte] : x_0[byte] ^ x_t[byte];
    }
};

constexpr float kLog2E = 0x1.715476p+0f;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log(1 + t) for 0 <= t <= 1, relative error 6e-8.
__device__ __forceinline__ float log1p_unit(float t) {
    float p = 0x1.4ff1bap-8f;
    p = fmaf(p, t, -0x1.dc5978p-6f);
    p = fmaf(p, t, 0x1.3d8182p-4f);
    p = fmaf(p, t, -0x1.1692f4p-3f);
    p = fmaf(p, t, 0x1.86b1ccp-3f);
    p = fmaf(p, t, -0x1.fca104p-3f);
    p = fmaf(p, t, 0x1.552d74p-2f);
    p = fmaf(p, t, -0x1.fffe8cp-2f);
    p = fmaf(p, t, 0x1.fffffep-1f);
    return p * t;
}

// Of one bit with margin m: softplus(-m), and q^gamma = exp(-gamma softplus(m)).
struct Bit {
    float t, softplus, focal;

    __device__ __forceinline__ Bit(float m, float gamma) {
        t = exp2_fast(-kLog2E * fabsf(m));
        softplus = log1p_unit(t) + fmaxf(-m, 0.0f);
        focal = exp2_fast(-gamma * (softplus + m));
        if (isnan(m)) softplus = m;  // fmax would hide it
    }
};

// One block's sums over set and over other targets, and the number of set ones.
struct Partial {
    float set, clear, count;

    __device__ __forceinline__ void operator+=(const Partial& other) {
        set += other.set, clear += other.clear, count += other.count;
    }
    // Over `width` neighbouring lanes; every lane gets the sum.
    __device__ __forceinline__ void sum_lanes(int width) {
        for (int distance = width / 2; distance > 0; distance /= 2)
            *this += Partial{__shfl_xor_sync(~0u, set, distance), __shfl_xor_sync(~0u, clear, distance),
                             __shfl_xor_sync(~0u, count, distance)};
    }
};

// Sum over the threads of one sample (threadIdx.x); thread x = 0 has it.
__device__ __forceinline__ Partial sum_block(Partial part) {
    __shared__ Partial warps[kThreads / 32];
    part.sum_lanes(int(min(blockDim.x, 32u)));
    if (blockDim.x > 32) {  // then threadIdx.y has warps of its own
        const int warp = int(threadIdx.y * blockDim.x + threadIdx.x) / 32, per_sample = int(blockDim.x) / 32;
        if (threadIdx.x % 32 == 0) warps[warp] = part;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int w = 1; w < per_sample; ++w) part += warps[warp + w];
    }
    return part;
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    sums(const T* __restrict__ logits, Partial* __restrict__ partials, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    Partial part{0, 0, 0};
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x) {
        const uint32_t byte = share.begin + i;
        const Position at = Position::of<kVector>(byte, a.channels);
        float l[8];
        read<kVector>(logits + share.sample * a.sample_values + at.offset, at.count, l);
        const uint32_t set = a.targets(share.sample * a.grid.bytes + byte);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const bool is_set = set >> j & 1;
            const Bit bit(is_set ? l[j] : -l[j], a.gamma);
            const float loss = kVector || j < at.count ? bit.softplus * bit.focal : 0.0f;
            part.set += is_set ? loss : 0.0f;
            part.clear += is_set ? 0.0f : loss;
        }
        part.count += float(__popc(set));
    }
    part = sum_block(part);
    if (threadIdx.x == 0 && share.count) partials[share.sample * a.grid.chunks + share.begin / a.grid.chunk] = part;
}

// One warp a sample.
__global__ void __launch_bounds__(kThreads)
    finish(const Partial* __restrict__ partials, float* __restrict__ out, const __grid_constant__ Arguments a) {
    const int64_t sample = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (sample >= a.grid.batch) return;
    Partial part{0, 0, 0};
    for (uint32_t chunk = threadIdx.x % 32; chunk < a.grid.chunks; chunk += 32)
        part += partials[sample * a.grid.chunks + chunk];
    part.sum_lanes(32);
    const float values = float(a.sample_values), r = part.count / values;
    const float loss = a.balanced ? (1 - r) * part.set + r * part.clear : part.set + part.clear;
    if (threadIdx.x % 32 == 0) out[sample] = loss / values;
}

// The set fraction of every sample: one block each.
__global__ void __launch_bounds__(kThreads)
    set_fractions(float* __restrict__ out, const __grid_constant__ Arguments a) {
    const int64_t first = int64_t(blockIdx.x) * a.grid.bytes;
    float count = 0;
    for (uint32_t i = threadIdx.x; i < a.grid.bytes; i += kThreads) count += float(__popc(a.targets(first + i)));
    const Partial part = sum_block({0, 0, count});
    if (threadIdx.x == 0) out[blockIdx.x] = part.count / float(a.sample_values);
}

// d flip_loss / d logit = -sign weight q^gamma (q + gamma (1 - q) softplus(-m)) / (R C).
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    gradient(const float* __restrict__ grad, const T* __restrict__ logits, const float* __restrict__ fractions,
             T* __restrict__ out, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    if (threadIdx.x >= share.count) return;
    const float scale = grad[share.sample] / float(a.sample_values), gamma = a.gamma / kLog2E;
    const float r = a.balanced ? fractions[share.sample] : 0;
    const float set_scale = a.balanced ? (1 - r) * -scale : -scale, clear_scale = a.balanced ? r * scale : scale;
    for (uint32_t i = threadIdx.x; i < share.count; i += blockDim.x) {
        const uint32_t byte = share.begin + i;
        const Position at = Position::of<kVector>(byte, a.channels);
        const int64_t first = share.sample * a.sample_values + at.offset;
        float l[8];
        read<kVector>(logits + first, at.count, l);
        const uint32_t set = a.targets(share.sample * a.grid.bytes + byte);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const bool is_set = set >> j & 1;
            const float m = is_set ? l[j] : -l[j];
            const Bit bit(m, a.gamma);
            const float larger = __fdividef(1.0f, 1.0f + bit.t),
                        smaller = bit.t * larger;  // sigmoid(|m|), sigmoid(-|m|)
            const float q = m < 0 ? larger : smaller, p = m < 0 ? smaller : larger;
            l[j] = (is_set ? set_scale : clear_scale) * bit.focal * fmaf(gamma * p, bit.softplus, q);
        }
        write<kVector>(out + first, at.count, l);
    }
}

Arguments arguments(const uint8_t* x_0, const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels,
                    float focal_gamma, bool balanced, bool x0_prediction) {
    const int64_t bytes = rows * ceil_div<int64_t>(channels, 8);
    return {SampleGrid(batch, bytes), x_0,      x_t,          rows * channels, uint32_t(channels),
            focal_gamma * kLog2E,     balanced, x0_prediction};
}

}  // namespace

int64_t flip_loss_scratch(int64_t batch, int64_t rows, int64_t channels) {
    const SampleGrid grid(batch, rows * ceil_div<int64_t>(channels, 8));
    return batch * grid.chunks * int64_t(sizeof(Partial) / sizeof(float));
}

void flip_loss(const void* logits, int64_t type, const uint8_t* x_0, const uint8_t* x_t, int64_t batch, int64_t rows,
               int64_t channels, float focal_gamma, bool balanced, bool x0_prediction, float* scratch, float* out,
               int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const Arguments a = arguments(x_0, x_t, batch, rows, channels, focal_gamma, balanced, x0_prediction);
    Partial* partials = reinterpret_cast<Partial*>(scratch);
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        with_flag(channels % 8 == 0 && aligned(logits, 16), [&](auto vector) {
            sums<T, vector.value>
                <<<a.grid.blocks(), a.grid.threads(), 0, stream>>>(static_cast<const T*>(logits), partials, a);
        });
    });
    check(cudaGetLastError(), "flip_loss");
    finish<<<unsigned(ceil_div<int64_t>(batch, kThreads / 32)), kThreads, 0, stream>>>(partials, out, a);
    check(cudaGetLastError(), "flip_loss");
}

void flip_loss_backward(const float* grad, const void* logits, int64_t type, const uint8_t* x_0, const uint8_t* x_t,
                        int64_t batch, int64_t rows, int64_t channels, float focal_gamma, bool balanced,
                        bool x0_prediction, float* scratch, void* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const Arguments a = arguments(x_0, x_t, batch, rows, channels, focal_gamma, balanced, x0_prediction);
    if (balanced) {
        set_fractions<<<unsigned(batch), kThreads, 0, stream>>>(scratch, a);
        check(cudaGetLastError(), "flip_loss_backward");
    }
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        with_flag(channels % 8 == 0 && aligned(logits, 16) && aligned(out, 16), [&](auto vector) {
            gradient<T, vector.value><<<a.grid.blocks(), a.grid.threads(), 0, stream>>>(
                grad, static_cast<const T*>(logits), scratch, static_cast<T*>(out), a);
        });
    });
    check(cudaGetLastError(), "flip_loss_backward");
}

}  // namespace bldm::cuda
