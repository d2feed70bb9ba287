// One Bernoulli bit with P = N / D, exactly as docs/random-stream.md defines it.
#pragma once

#include "cuda/samples.cuh"
#include "philox.h"

namespace bldm::cuda {

// One 64-bit product: from (uint64_t) a * b the compiler makes an addition of zero more.
struct DeviceProduct {
    __device__ __forceinline__ void operator()(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) const {
        asm("{ .reg .b64 t; mul.wide.u32 t, %2, %3; mov.b64 {%1, %0}, t; }" : "=r"(high), "=r"(low) : "r"(a), "r"(b));
    }
};

__device__ __forceinline__ void philox_block(const Stream& stream, uint32_t byte, uint64_t sample,
                                             uint32_t (&words)[4]) {
    random_block(stream, byte, sample, words, DeviceProduct{});
}

// The stream of a draw, in registers that the compiler knows to be the same for a whole warp, so that round keys do not
// take vector registers from every thread. Every thread of the warp must call it.
__device__ __forceinline__ Stream uniform_stream(const Scalar& seed, uint32_t purpose, const Scalar& step) {
    Stream stream(uint64_t(seed.get()), purpose, uint32_t(step.get()));
    stream.key0 = __reduce_or_sync(~0u, stream.key0);
    stream.key1 = __reduce_or_sync(~0u, stream.key1);
    stream.draw = __reduce_or_sync(~0u, stream.draw);
    return stream;
}

// The keys of all rounds, held in the registers that a warp shares: for loops that make many blocks.
struct HeldKeys {
    uint32_t key0, key1, all[10][2];
    int round = 0;

    // Every thread of the warp must call it.
    __device__ __forceinline__ explicit HeldKeys(const Stream& stream) {
        Keys<uint32_t> keys{stream.key0, stream.key1};
#pragma unroll
        for (int i = 0; i < 10; ++i) {
            // The reduction also hides from the compiler how simple they are: it would rather add again at every use.
            all[i][0] = __reduce_or_sync(~0u, keys.key0), all[i][1] = __reduce_or_sync(~0u, keys.key1);
            keys.next();
        }
        key0 = all[0][0], key1 = all[0][1];
    }
    __device__ __forceinline__ void next() {
        if (++round < 10) key0 = all[round][0], key1 = all[round][1];
    }
};

// 2^clamp(y): the exponential of the random stream, by fused multiply-adds only.
__device__ __forceinline__ float exp2_clamped(float y) {
    y = fminf(fmaxf(y, -64.0f), 64.0f);
    const float shifted = __fadd_rn(y, 0x1.8p23f);  // rounds to the nearest integer, which then stands in the low bits
    const float z = __fsub_rn(y, __fsub_rn(shifted, 0x1.8p23f));
    float p = 0x1.5bba14p-10f;
    p = __fmaf_rn(p, z, 0x1.3cea88p-7f);
    p = __fmaf_rn(p, z, 0x1.c6b752p-5f);
    p = __fmaf_rn(p, z, 0x1.ebf9bcp-3f);
    p = __fmaf_rn(p, z, 0x1.62e42ap-1f);
    p = __fmaf_rn(p, z, 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// P(x_s != x_t) = N / D of a step, from e = exp(-l / temperature).
struct Ratio {
    float n0, n01, d0, d01;

    __device__ __forceinline__ Ratio(const float* row) {
        n0 = row[0], n01 = __fadd_rn(row[0], row[1]);
        d0 = row[2], d01 = __fadd_rn(row[2], row[3]);
    }
    __device__ __forceinline__ Ratio(float n0_, float n01_, float d0_, float d01_)
        : n0(n0_), n01(n01_), d0(d0_), d01(d01_) {}

    __device__ __forceinline__ float numerator(float e) const { return __fmaf_rn(n0, e, n01); }
    __device__ __forceinline__ float denominator(float e) const { return __fmaf_rn(d0, e, d01); }
};

// Eight bits from the block of their byte. The block of ties is made where it matters: 0 < r < d.
__device__ __forceinline__ uint32_t exact_bits(const Ratio& ratio, const float (&y)[8], const uint32_t (&words)[4],
                                               const Stream& stream, uint32_t byte, uint64_t sample) {
    float d[8], r[8];
    bool tie = false;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float e = exp2_clamped(y[j]);
        d[j] = __fmul_rn(ratio.denominator(e), 0x1p-16f);
        r[j] = __fmaf_rn(-float(lane(words, j)), d[j], ratio.numerator(e));
        bits |= uint32_t(r[j] > 0) << j;
        tie = tie || (r[j] > 0 && r[j] <= d[j]);
    }
    if (tie) {
        uint32_t tie_words[4];
        philox_block(stream.ties(), byte, sample, tie_words);
        bits = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            bits |= uint32_t(__fmaf_rn(-float(lane(tie_words, j)), __fmul_rn(d[j], 0x1p-16f), r[j]) > 0) << j;
    }
    return bits;
}

__device__ __forceinline__ uint32_t exact_bits(const Ratio& ratio, const float (&y)[8], const Stream& stream,
                                               uint32_t byte, uint64_t sample) {
    uint32_t words[4];
    philox_block(stream, byte, sample, words);
    return exact_bits(ratio, y, words, stream, byte, sample);
}

// 0, or NaN if one of the values is not finite: 0 l is NaN then.
__device__ __forceinline__ float zero_if_finite(const float (&l)[8]) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(l[j], 0.0f, sum);
    return sum;
}

}  // namespace bldm::cuda
