// flip_step: one reverse step, packed bits in and out.
#include "cuda/half_filter.cuh"

namespace bldm::cuda {
namespace {

constexpr int kResidentThreads = 1024, kResidentBlocks = 1;  // of a block, of a processor
// A warp's turn: two bytes a lane.
constexpr uint32_t kTurnBytes = 64, kMaxTurns = 4;

struct Arguments {
    const uint8_t* x_t;
    int64_t sample_values;  // R C
    uint32_t batch, bytes, channels;
    uint32_t groups, sample_groups, turns;  // groups in all and of a sample; their turns
    const float* coefficients;
    int64_t coefficient_stride;
    Scalar seed, step, sample_offset;
    float scale;
    bool x0_prediction;
    float guidance_scale;
    const float* guidance_scale_pointer;
    const uint8_t* keep_mask;
    int64_t keep_mask_stride;
    const uint8_t* keep_bits;
    int64_t keep_bits_stride;
    int32_t* nonfinite;
    uint8_t* out;
};

// A packed byte: its index in all, its sample and its index there.
struct Place {
    uint64_t index;
    uint32_t sample, byte;

    __device__ __forceinline__ Place plus(uint32_t bytes) const { return {index + bytes, sample, byte + bytes}; }
};

// What the compiler may count on. A kernel without an option has no code for it, one with it looks at the arguments.
template <class T, bool kVector_, bool kGuided_, bool kX0_, bool kKept_>
struct Options {
    using Element = T;
    static constexpr bool kVector = kVector_, kGuided = kGuided_, kX0 = kX0_, kKept = kKept_;
};

// A byte's bits and logits as they were read.
template <class O>
struct Input {
    static constexpr int kWords = 2 * sizeof(typename O::Element);
    uint32_t x, logits[kWords], uncond_logits[O::kGuided ? kWords : 1];
};

template <class O>
struct Step {
    using T = typename O::Element;
    const T* logits;
    const T* uncond_logits;
    const Arguments& a;
    uint64_t sample_offset;
    float guidance_scale;
    Stream stream;
    uint32_t nonfinite;

    __device__ __forceinline__ Step(const T* logits_, const T* uncond_logits_, const Arguments& a_)
        : logits(logits_),
          uncond_logits(uncond_logits_),
          a(a_),
          sample_offset(uint64_t(a_.sample_offset.get())),
          guidance_scale(O::kGuided && a_.guidance_scale_pointer ? *a_.guidance_scale_pointer : a_.guidance_scale),
          stream(uint64_t(a_.seed.get()), kFlipStep, uint32_t(a_.step.get())),
          nonfinite(0) {}

    __device__ __forceinline__ Ratio ratio(uint32_t sample) const {
        return Ratio(a.coefficients + sample * a.coefficient_stride);
    }
    __device__ __forceinline__ HalfFilter filter(uint32_t sample) const {
        return HalfFilter(ratio(sample), a.scale);
    }
    __device__ __forceinline__ Position position(const Place& at) const {
        if constexpr (O::kVector) return {int64_t(at.index) * 8, 8};
        const Position within = Position::of<false>(at.byte, a.channels);
        return {at.sample * a.sample_values + within.offset, within.count};
    }
    __device__ __forceinline__ Input<O> load(const Place& at) const {
        Input<O> input;
        const Position from = position(at);
        read_words<O::kVector>(logits + from.offset, from.count, input.logits);
        if constexpr (O::kGuided)
            if (uncond_logits) read_words<O::kVector>(uncond_logits + from.offset, from.count, input.uncond_logits);
        input.x = load_now(a.x_t + at.index);
        return input;
    }
    // The guided logits.
    __device__ __forceinline__ void mix(const Input<O>& input, float (&l)[8]) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            l[j] = element<T>(input.logits, j);
            if constexpr (O::kGuided) {
                const float u = element<T>(input.uncond_logits, j);
                if (uncond_logits) l[j] = __fmaf_rn(guidance_scale, __fsub_rn(l[j], u), u);
            }
        }
    }
    // Logits of x_0 = 1 become those of x_0 != x_t.
    __device__ __forceinline__ void relate(uint32_t x, float (&l)[8]) const {
        if constexpr (O::kX0) {
            const uint32_t negated = a.x0_prediction ? x : 0;
#pragma unroll
            for (int j = 0; j < 8; ++j)
                l[j] = __uint_as_float(__float_as_uint(l[j]) ^ (negated << (31 - j) & 0x80000000u));
        }
    }
    template <class RoundKeys>
    __device__ __forceinline__ void block(const RoundKeys& keys, const Place& at, uint32_t (&words)[4]) const {
        random_block(stream.draw, keys, at.byte, sample_offset + at.sample, words, DeviceProduct{});
    }
    __device__ __forceinline__ bool decide(const HalfFilter& filter, const Input<O>& input, const uint32_t (&words)[4],
                                           uint32_t& flips) const {
        float l[8];
        mix(input, l);
        __half2 start;
        if constexpr (sizeof(T) == 2 && !O::kGuided)
            start = filter.template start_if_finite<T>(input.logits);
        else
            start = filter.start_if_finite(l);
        relate(input.x, l);
        return filter.decide(l, words, start, flips);
    }
    __device__ __forceinline__ void finish(const Place& at, uint32_t x, uint32_t flips) const {
        if constexpr (!O::kVector) flips &= (1u << position(at).count) - 1;
        uint32_t x_s = x ^ flips;
        if (O::kKept && a.keep_mask) {
            const uint32_t mask = a.keep_mask[at.sample * a.keep_mask_stride + at.byte];
            x_s = (x_s & ~mask) | (a.keep_bits[at.sample * a.keep_bits_stride + at.byte] & mask);
        }
        a.out[at.index] = uint8_t(x_s);
    }
    // A byte by the definition.
    __device__ __forceinline__ void settle(const Place& at, const Input<O>& input, const uint32_t (&words)[4]) {
        float y[8];
        mix(input, y);
        relate(input.x, y);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            nonfinite += !isfinite(y[j]);
            y[j] = __fmul_rn(y[j], a.scale);
        }
        finish(at, input.x, exact_bits(ratio(at.sample), y, words, stream, at.byte, sample_offset + at.sample));
    }
    // One atomic a warp, and only where something is wrong.
    __device__ __forceinline__ void report() const {
        if (a.nonfinite && __any_sync(~0u, nonfinite != 0)) {
            const uint32_t sum = __reduce_add_sync(~0u, nonfinite);
            if (threadIdx.x % 32 == 0) atomicAdd(a.nonfinite, int(sum));
        }
    }
};

// A warp's bytes that the filter was not sure of: they wait in shared memory until there is one for every lane.
struct Queue {
    static constexpr uint32_t kCapacity = 31 + kMaxTurns * kTurnBytes;

    uint32_t offset[kCapacity];  // from the block's first byte on
    uint32_t count;

    __device__ __forceinline__ void push(uint32_t byte_offset) { offset[atomicAdd(&count, 1)] = byte_offset; }

    // Every lane of the warp calls it. Leaves less than `enough`.
    template <class O>
    __device__ __forceinline__ void settle(Step<O>& step, const HeldKeys& keys, uint64_t first_byte, uint32_t enough) {
        __syncwarp();
        uint32_t left = count;
#pragma unroll 1
        while (left >= enough) {
            const uint32_t rest = left - min(left, 32u), mine = rest + threadIdx.x % 32;
            if (mine < left) {
                const uint64_t byte = first_byte + offset[mine];
                const uint32_t sample = uint32_t(byte / step.a.bytes);
                const Place at{byte, sample, uint32_t(byte - uint64_t(sample) * step.a.bytes)};
                const Input<O> input = step.load(at);
                uint32_t words[4];
                step.block(keys, at, words);
                step.settle(at, input, words);
            }
            left = rest;
        }
        __syncwarp();
        count = left;
        __syncwarp();
    }
};

// Many bytes, by as many warps as the device holds at once. A group of turns lies within a sample; a block has an equal
// share of the groups, and its warps take one after the other as they get done. kWhole: all turns are full.
template <class O, bool kWhole>
__global__ void __launch_bounds__(kResidentThreads, kResidentBlocks)
    many_bytes(const typename O::Element* __restrict__ logits, const typename O::Element* __restrict__ uncond_logits,
               const __grid_constant__ Arguments a) {
    __shared__ Queue queues[kResidentThreads / 32];
    __shared__ uint32_t next_group;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t first_group = uint32_t(uint64_t(a.groups) * blockIdx.x / gridDim.x),
                   end_group = uint32_t(uint64_t(a.groups) * (blockIdx.x + 1) / gridDim.x);
    const uint64_t first_byte = uint64_t(first_group / a.sample_groups) * a.bytes;
    Queue& queue = queues[threadIdx.x / 32];
    queue.count = 0;
    if (threadIdx.x == 0) next_group = first_group;
    __syncthreads();
    Step<O> step(logits, uncond_logits, a);
    step.stream = uniform_stream(a.seed, kFlipStep, a.step);
    const HeldKeys keys(step.stream);
    HalfFilter filter = step.filter(0);

#pragma unroll 1
    while (true) {
        const uint32_t group = __reduce_or_sync(~0u, lane == 0 ? atomicAdd(&next_group, 1) : 0);
        if (group >= end_group) break;
        const uint32_t sample = group / a.sample_groups;
        const uint32_t first = (group - sample * a.sample_groups) * a.turns * kTurnBytes;
        const uint32_t turns = min(a.turns, (a.bytes - first + kTurnBytes - 1) / kTurnBytes);
        if (a.coefficient_stride) filter = step.filter(sample);
        Place at{pinned(uint64_t(sample) * a.bytes + first + lane), sample, first + lane};
        Input<O> next[2];
        const auto exists = [&](const Place& place) { return kWhole || place.byte < a.bytes; };
        const auto load = [&] {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (exists(at.plus(32 * i))) next[i] = step.load(at.plus(32 * i));
        };
        load();
#pragma unroll 2
        for (uint32_t turn = 1; turn <= turns; ++turn) {
            const Input<O> input[2] = {next[0], next[1]};
            Place now = at;
            at = at.plus(turn < turns ? kTurnBytes : 0);
            load();  // of the next turn; at the end the last one's once more, which costs less than not to
            asm volatile("" : "+r"(now.byte));  // the compiler is not to move the loads behind what depends on it
            bool sure[2];
            uint32_t flips[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t words[4];
                step.block(keys, now.plus(32 * i), words);
                sure[i] = step.decide(filter, input[i], words, flips[i]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (sure[i] && exists(now.plus(32 * i))) step.finish(now.plus(32 * i), input[i].x, flips[i]);
            if (!(sure[0] && sure[1])) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (!sure[i] && exists(now.plus(32 * i))) queue.push(uint32_t(now.index - first_byte) + 32 * i);
            }
        }
        queue.settle(step, keys, first_byte, 32);
    }
    queue.settle(step, keys, first_byte, 1);
    step.report();
}

// Few bytes: one a thread, so that none has more to do than it must.
template <class O>
__global__ void __launch_bounds__(kThreads)
    few_bytes(const typename O::Element* __restrict__ logits, const typename O::Element* __restrict__ uncond_logits,
              const __grid_constant__ Arguments a) {
    const uint32_t index = blockIdx.x * kThreads + threadIdx.x, sample = index / a.bytes;
    const Place at{index, sample, index - sample * a.bytes};
    wait_for_inputs();
    Step<O> step(logits, uncond_logits, a);
    if (sample < a.batch) {
        const Input<O> input = step.load(at);
        uint32_t words[4], flips;
        step.block(Keys<uint32_t>{step.stream.key0, step.stream.key1}, at, words);
        if (step.decide(step.filter(sample), input, words, flips))
            step.finish(at, input.x, flips);
        else
            step.settle(at, input, words);
    }
    step.report();
}

// Calls f with the options: all known to the compiler where the logits can be read 16 bytes at a time.
template <class T, class F>
void with_options(bool vector, bool guided, bool x0_prediction, bool kept, F&& f) {
    if (!vector) return f(Options<T, false, true, true, true>{});
    with_flag(guided, [&](auto g) {
        with_flag(x0_prediction, [&](auto x) {
            with_flag(kept, [&](auto k) { f(Options<T, true, g.value, x.value, k.value>{}); });
        });
    });
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
    const int64_t bytes = rows * ceil_div<int64_t>(channels, 8), total = batch * bytes;
    if (bytes >= int64_t(1) << 31) throw std::invalid_argument("a sample has 2^31 packed bytes or more");
    if (batch >= int64_t(1) << 32) throw std::invalid_argument("too many samples for one launch");
    const int64_t resident = int64_t(processors(device)) * kResidentBlocks, warps = resident * (kResidentThreads / 32);
    uint32_t turns = kMaxTurns;  // fewer where there would not be a group for every warp
    while (turns > 1 && total < warps * turns * kTurnBytes) turns /= 2;
    const int64_t sample_groups = ceil_div<int64_t>(bytes, turns * kTurnBytes), groups = batch * sample_groups;
    const auto stride = [](int64_t samples, int64_t size) { return samples > 1 ? size : 0; };
    const Arguments a{x_t,
                      rows * channels,
                      uint32_t(batch),
                      uint32_t(bytes),
                      uint32_t(channels),
                      uint32_t(groups),
                      uint32_t(sample_groups),
                      turns,
                      coefficients,
                      stride(coefficient_rows, 4),
                      {seed, seed_pointer},
                      {step, step_pointer},
                      {sample_offset, sample_offset_pointer},
                      scale,
                      x0_prediction,
                      guidance_scale,
                      guidance_scale_pointer,
                      keep_mask,
                      stride(keep_mask_samples, bytes),
                      keep_bits,
                      stride(keep_bits_samples, bytes),
                      nonfinite,
                      out};
    // Few bytes, or samples that would leave most lanes idle.
    const bool few = total <= 2 * warps * kTurnBytes || (bytes < kTurnBytes / 2 && total < int64_t(1) << 31);
    const bool vector = channels % 8 == 0 && aligned(logits, 16) && aligned(uncond_logits, 16);
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        const T *l = static_cast<const T*>(logits), *u = static_cast<const T*>(uncond_logits);
        with_options<T>(vector, u != nullptr, x0_prediction, keep_mask != nullptr, [&](auto options) {
            using O = decltype(options);
            if (few) {
                const unsigned blocks = unsigned(ceil_div<int64_t>(total, kThreads));
                return launch_early(few_bytes<O>, blocks, kThreads, device, stream, l, u, a);
            }
            const unsigned blocks = unsigned(std::min(resident, groups));
            with_flag(bytes % kTurnBytes == 0, [&](auto whole) {
                many_bytes<O, whole.value><<<blocks, kResidentThreads, 0, stream>>>(l, u, a);
            });
        });
    });
    check(cudaGetLastError(), "flip_step");
}

}  // namespace bldm::cuda
