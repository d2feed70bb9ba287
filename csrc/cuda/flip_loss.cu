// flip_loss: per bit weight q^gamma softplus(-m), m the margin and q = sigmoid(-m), summed; and its gradient.
//
// The class weights are 1 - r where the target is set and r where it is not, r the set fraction of the sample. So one
// pass over the logits sums both classes and counts; the weights come in when the sums of a sample meet. All sums are
// taken in a fixed order: the loss is the same in every run. The backward pass gets r from the forward pass.
#include "cuda/samples.cuh"

namespace bldm::cuda {
namespace {

// Blocks of a sum are few, one for every place on a large GPU: each has a reduction to pay for.
constexpr int64_t kSumBlocks = 1024;
constexpr int kFinishThreads = 1024;
constexpr float kLog2E = 0x1.715476p+0f;

struct Arguments {
    SampleGrid grid;
    const uint8_t *x_0, *x_t;
    const float* weight;  // of a sample, or null
    int64_t sample_values;
    uint32_t channels;
    float gamma, factor;  // factor: the result is factor times the sum over the bits
    bool x0_prediction;

    // The targets of a packed byte: x_0 XOR x_t, or x_0 itself for an x_0 prediction.
    __device__ __forceinline__ uint32_t targets(int64_t byte) const {
        return x0_prediction ? __ldg(x_0 + byte) : __ldg(x_0 + byte) ^ __ldg(x_t + byte);
    }
    __device__ __forceinline__ float scale(int64_t sample) const { return weight ? factor * weight[sample] : factor; }
};

// A test of one bit as one instruction: the compiler would shift first.
__device__ __forceinline__ bool is_bit_set(uint32_t bits, int j) {
    uint32_t bit;
    asm("and.b32 %0, %1, %2;" : "=r"(bit) : "r"(bits), "r"(1u << j));
    return bit;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The logits and targets of kBytes bytes. What lies beyond a row has the logit -infinity and a clear target: it adds
// nothing to a sum.
template <class T, bool kVector, int kBytes>
struct Bytes {
    uint32_t set[kBytes];
    float logits[kBytes][8];

    __device__ __forceinline__ Bytes(const T* __restrict__ from, const Arguments& a, const Share& share, uint32_t i) {
#pragma unroll
        for (int k = 0; k < kBytes; ++k) {
            const uint32_t byte = share.begin + i + k * blockDim.x;
            const Position at = Position::of<kVector>(byte, a.channels);
            read<kVector>(from + share.sample * a.sample_values + at.offset, at.count, logits[k]);
            set[k] = a.targets(share.sample * a.grid.bytes + byte);
            if constexpr (!kVector) {
                set[k] &= (1u << at.count) - 1;
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (j >= at.count) logits[k][j] = -INFINITY;
            }
        }
    }
};

// A sum of softplus(x) = max(x, 0) + log(1 + t), t = exp(-|x|): the product of many 1 + t, less 1 so that small t keep
// their digits, takes one logarithm.
struct SoftplusSum {
    float linear = 0, product = 0;

    __device__ __forceinline__ void add(float relu, float t) {
        linear += relu;
        product = fmaf(product, t, product) + t;
    }
    // Due after 64 numbers at the latest, each of which at most doubles the product.
    __device__ __forceinline__ void bound() {
        if (product > 0x1p60f) linear += log1pf(product), product = 0;
    }
    __device__ __forceinline__ float get() const { return linear + log1pf(product); }
};

// One block's sums over set and over other targets, and the number of set ones.
struct Partial {
    float set, clear, count;

    __device__ __forceinline__ void operator+=(const Partial& other) {
        set += other.set, clear += other.clear, count += other.count;
    }
    // Over `width` neighbouring lanes; every lane gets the sum. Without kBalanced there is only `set`.
    template <bool kBalanced>
    __device__ __forceinline__ void sum_lanes(int width) {
        for (int distance = width / 2; distance > 0; distance /= 2) {
            set += __shfl_xor_sync(~0u, set, distance);
            if constexpr (kBalanced) {
                clear += __shfl_xor_sync(~0u, clear, distance);
                count += __shfl_xor_sync(~0u, count, distance);
            }
        }
    }
};

// Sum over the threads of one sample (threadIdx.x); thread x = 0 has it.
template <bool kBalanced>
__device__ __forceinline__ Partial sum_block(Partial part) {
    __shared__ Partial warps[kThreads / 32];
    part.sum_lanes<kBalanced>(int(min(blockDim.x, 32u)));
    if (blockDim.x > 32) {  // then threadIdx.y has warps of its own
        const int warp = int(threadIdx.y * blockDim.x + threadIdx.x) / 32, per_sample = int(blockDim.x) / 32;
        if (threadIdx.x % 32 == 0) warps[warp] = part;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int w = 1; w < per_sample; ++w) part += warps[warp + w];
    }
    return part;
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

// Of one bit with margin m and t = exp(-|m|): softplus(-m), and q^gamma = exp(-gamma softplus(m)).
struct Focal {
    float softplus, factor;

    __device__ __forceinline__ Focal(float m, float t, float gamma) {
        const float tail = log1p_unit(t);
        softplus = tail + fmaxf(-m, 0.0f);
        factor = exp2_fast(-kLog2E * gamma * (tail + fmaxf(m, 0.0f)));
    }
};

template <class T, bool kVector, bool kBalanced, bool kFocal>
__global__ void __launch_bounds__(kThreads)
    sums(const T* __restrict__ logits, Partial* __restrict__ partials, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    Partial part{0, 0, 0};
    [[maybe_unused]] SoftplusSum set, clear;
    for_bytes(share, [&](auto count, uint32_t i) {
        const Bytes<T, kVector, count.value> bytes(logits, a, share, i);
#pragma unroll
        for (int k = 0; k < count.value; ++k) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const bool is_set = is_bit_set(bytes.set[k], j);
                const float l = bytes.logits[k][j], m = is_set ? l : -l;
                const float t = exp2_fast(-kLog2E * fabsf(l));
                if constexpr (kFocal) {
                    const Focal focal(m, t, a.gamma);
                    const float loss = focal.softplus * focal.factor;
                    if (!kBalanced || is_set)
                        part.set += loss;
                    else
                        part.clear += loss;
                } else if (!kBalanced || is_set) {
                    set.add(fmaxf(-m, 0.0f), t);
                } else {
                    clear.add(fmaxf(-m, 0.0f), t);
                }
            }
            if constexpr (kBalanced) part.count += float(__popc(bytes.set[k]));
        }
        if constexpr (!kFocal) set.bound();
        if constexpr (!kFocal && kBalanced) clear.bound();
    });
    if constexpr (!kFocal) part.set = set.get();
    if constexpr (!kFocal && kBalanced) part.clear = clear.get();
    part = sum_block<kBalanced>(part);
    if (threadIdx.x == 0 && share.count) partials[share.sample * a.grid.chunks + share.begin / a.grid.chunk] = part;
}

// The result of each sample, or with kTotal (then one block) their sum; `width` lanes a sample.
template <bool kTotal>
__global__ void __launch_bounds__(kFinishThreads)
    finish(const Partial* __restrict__ partials, float* __restrict__ out, float* __restrict__ fractions, int width,
           const __grid_constant__ Arguments a) {
    const uint32_t lane = threadIdx.x % width;
    float sum = 0;
    for (int64_t first = int64_t(blockIdx.x) * kFinishThreads; first < a.grid.batch * width;
         first += int64_t(gridDim.x) * kFinishThreads) {
        const int64_t sample = (first + threadIdx.x) / width;
        const bool exists = sample < a.grid.batch;
        Partial part{0, 0, 0};
        for (uint32_t chunk = lane; exists && chunk < a.grid.chunks; chunk += width)
            part += partials[sample * a.grid.chunks + chunk];
        part.sum_lanes<true>(width);
        if (!exists || lane) continue;
        const float r = part.count / float(a.sample_values);
        const float loss = fractions ? (1 - r) * part.set + r * part.clear : part.set;
        if (fractions) fractions[sample] = r;
        if (kTotal)
            sum += a.scale(sample) * loss;
        else
            out[sample] = a.scale(sample) * loss;
    }
    if (kTotal) {
        __shared__ float warps[kFinishThreads / 32];
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x >= 32) return;
        sum = warps[threadIdx.x];
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (threadIdx.x == 0) *out = sum;
    }
}

// d loss / d logit = -sign weight q^gamma (q + gamma (1 - q) softplus(-m)).
template <class T, bool kVector, bool kBalanced, bool kFocal>
__global__ void __launch_bounds__(kThreads)
    gradient(const float* __restrict__ grad, int grad_stride, const T* __restrict__ logits,
             const float* __restrict__ fractions, T* __restrict__ out, const __grid_constant__ Arguments a) {
    const Share share(a.grid);
    if (threadIdx.x >= share.count) return;
    const float scale = grad[share.sample * grad_stride] * a.scale(share.sample);
    const float r = kBalanced ? fractions[share.sample] : 0;
    const float set_scale = kBalanced ? (1 - r) * -scale : -scale, clear_scale = kBalanced ? r * scale : scale;
    for_bytes(share, [&](auto count, uint32_t i) {
        Bytes<T, kVector, count.value> bytes(logits, a, share, i);
#pragma unroll
        for (int k = 0; k < count.value; ++k) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const bool is_set = is_bit_set(bytes.set[k], j);
                const float l = bytes.logits[k][j], m = is_set ? l : -l;
                float slope;
                if constexpr (kFocal) {
                    const float t = exp2_fast(-kLog2E * fabsf(l));
                    const Focal focal(m, t, a.gamma);
                    const float larger = reciprocal(1.0f + t), smaller = t * larger;  // sigmoid(|m|), sigmoid(-|m|)
                    const float q = m < 0 ? larger : smaller, p = m < 0 ? smaller : larger;
                    slope = focal.factor * fmaf(a.gamma * p, focal.softplus, q);
                } else {
                    slope = reciprocal(1.0f + exp2_fast(kLog2E * m));
                }
                bytes.logits[k][j] = (is_set ? set_scale : clear_scale) * slope;
            }
            const Position at = Position::of<kVector>(share.begin + i + k * blockDim.x, a.channels);
            write<kVector>(out + share.sample * a.sample_values + at.offset, at.count, bytes.logits[k]);
        }
    });
}

// Calls f(element, is vector, is balanced, is focal), each a value of the type that says so.
template <class F>
void with_options(int64_t type, bool is_vector, bool balanced, float gamma, F&& f) {
    with_float_type(type, [&](auto item) {
        with_flag(is_vector, [&](auto vector) {
            with_flag(balanced, [&](auto is_balanced) {
                with_flag(gamma != 0, [&](auto is_focal) { f(item, vector, is_balanced, is_focal); });
            });
        });
    });
}

Arguments arguments(const uint8_t* x_0, const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels,
                    const float* weight, float focal_gamma, bool x0_prediction, float factor, int64_t many_blocks) {
    const int64_t bytes = rows * ceil_div<int64_t>(channels, 8);
    const SampleGrid grid(batch, bytes, many_blocks);
    return {grid, x_0, x_t, weight, rows * channels, uint32_t(channels), focal_gamma, factor, x0_prediction};
}

}  // namespace

int64_t flip_loss_scratch(int64_t batch, int64_t rows, int64_t channels) {
    const SampleGrid grid(batch, rows * ceil_div<int64_t>(channels, 8), kSumBlocks);
    return batch * grid.chunks * int64_t(sizeof(Partial) / sizeof(float));
}

void flip_loss(const void* logits, int64_t type, const uint8_t* x_0, const uint8_t* x_t, int64_t batch, int64_t rows,
               int64_t channels, const float* weight, float focal_gamma, bool x0_prediction, float factor, bool total,
               float* scratch, float* out, float* fractions, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const Arguments a =
        arguments(x_0, x_t, batch, rows, channels, weight, focal_gamma, x0_prediction, factor, kSumBlocks);
    Partial* partials = reinterpret_cast<Partial*>(scratch);
    with_options(type, channels % 8 == 0 && aligned(logits, 16), fractions != nullptr, focal_gamma,
                 [&](auto item, auto vector, auto balanced, auto focal) {
                     using T = decltype(item);
                     sums<T, vector.value, balanced.value, focal.value>
                         <<<a.grid.blocks(), a.grid.threads(), 0, stream>>>(static_cast<const T*>(logits), partials, a);
                 });
    check(cudaGetLastError(), "flip_loss");
    int width = 1;  // lanes a sample
    while (width < 32 && width < int64_t(a.grid.chunks)) width *= 2;
    if (total)
        finish<true><<<1, kFinishThreads, 0, stream>>>(partials, out, fractions, width, a);
    else
        finish<false><<<grid_for(batch * width, kFinishThreads), kFinishThreads, 0, stream>>>(partials, out, fractions,
                                                                                               width, a);
    check(cudaGetLastError(), "flip_loss");
}

void flip_loss_backward(const float* grad, int64_t grads, const void* logits, int64_t type, const uint8_t* x_0,
                        const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels, const float* weight,
                        const float* fractions, float focal_gamma, bool x0_prediction, float factor, void* out,
                        int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const Arguments a =
        arguments(x_0, x_t, batch, rows, channels, weight, focal_gamma, x0_prediction, factor, kManyBlocks);
    with_options(type, channels % 8 == 0 && aligned(logits, 16) && aligned(out, 16), fractions != nullptr, focal_gamma,
                 [&](auto item, auto vector, auto balanced, auto focal) {
                     using T = decltype(item);
                     gradient<T, vector.value, balanced.value, focal.value>
                         <<<a.grid.blocks(), a.grid.threads(), 0, stream>>>(
                             grad, grads > 1, static_cast<const T*>(logits), fractions, static_cast<T*>(out), a);
                 });
    check(cudaGetLastError(), "flip_loss_backward");
}

}  // namespace bldm::cuda
