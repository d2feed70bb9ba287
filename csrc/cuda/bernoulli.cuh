// One Bernoulli bit with P = N / D, exactly as docs/random-stream.md defines it, and a cheap test that decides nearly
// all bits.
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

__device__ __forceinline__ float exp2_approximate(float y) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
    return e;
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

// Decides bits by a quick estimate of u D - N, and says when the estimate is too close to zero to be sure.
//
// In units of d = D 2^-16, one lane: by definition a bit is set for sure if N >= (h + 1 + 2^-20) d and clear for sure
// if N <= h d. The estimate is s = (h + 1/2) d - N = h d - N' with N' = N - d / 2, both one fma in e; outside |s| <=
// (1/2 + error) d its sign decides. Errors, in units of d:
//   0.04 + 0.02 |P|     d rounded, times h; N' rounded, and its coefficients; N and D of the definition rounded; 2^-20
//   2^-5 det / (d0 d01) e: ex2.approx (2^-22) against the definition's exponential (1.1e-7), together taken as 2^-19;
//                       |dP / d log e| <= det / (4 d0 d01)
//   2^-48 det / d01^2   e below 2^-64, where the definition's stops
// with det = |n1 d0 - n0 d1|. Where |P| > 2 the terms in |P| are far below |s| itself. So the margin 1/2 + error is
// 0.625 + the terms in det. Coefficients of another kind give an infinite margin: never sure.
//
// The lane enters as the bits of a float: a subnormal, h 2^-149, which saves its conversion. So d carries a factor
// 2^149, and all of s a factor 2^-72 that keeps d finite for e up to 2^64 and d0 up to 4. An overflow gives a NaN or
// infinity: not sure. (These kernels must not be built with -ftz=true.)
struct Filter {
    float d0, d01, n0, n01, limit0, limit01;

    __device__ __forceinline__ explicit Filter(const Ratio& r) {
        d0 = r.d0 * 0x1p61f;  // 2^-16 2^149 2^-72
        d01 = r.d01 * 0x1p61f;
        n0 = fmaf(-0x1p-17f, r.d0, r.n0) * 0x1p-72f;
        n01 = fmaf(-0x1p-17f, r.d01, r.n01) * 0x1p-72f;
        const float det = fabsf(r.n01 * r.d0 - r.n0 * r.d01);
        const bool regular = r.d0 > 0x1p-30f && r.d01 > 0x1p-30f;  // s stays far from the smallest floats
        const float error = __fdividef(det, r.d01) * (__fdividef(0x1.1p-5f, r.d0) + __fdividef(0x1.1p-48f, r.d01));
        const float margin = regular ? 0.625f + error : INFINITY;
        limit0 = margin * r.d0 * 0x1p-88f;
        limit01 = margin * r.d01 * 0x1p-88f;
    }

    // The bits of eight values y = -l log2(e) / temperature and a Philox block; false if one of them is not sure.
    __device__ __forceinline__ bool decide(const float (&y)[8], const uint32_t (&words)[4], uint32_t& bits) const {
        bool sure = true;
        bits = 0;
#pragma unroll
        for (int j = 7; j >= 0; --j) {
            const float e = exp2_approximate(fminf(y[j], 64.0f));
            const float d = fmaf(d0, e, d01);
            const float s = fmaf(__uint_as_float(lane(words, j)), d, -fmaf(n0, e, n01));
            sure = sure && fabsf(s) > fmaf(limit0, e, limit01);   // false for a NaN too
            bits = __funnelshift_l(__float_as_uint(s), bits, 1);  // the sign is the bit
        }
        return sure;
    }
};

// The same bits by the definition, from the block of the byte. The block of ties is made where it matters: 0 < r < d.
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
