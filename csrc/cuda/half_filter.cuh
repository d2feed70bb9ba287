// A test in half precision that decides most bits of a step, two at a time.
#pragma once

#include "cuda/bernoulli.cuh"

namespace bldm::cuda {

__device__ __forceinline__ float tanh_approximate(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The sign bits of two pairs of halves as four bytes of 0 or -1.
__device__ __forceinline__ int signs(__half2 low, __half2 high) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, 0xFDB9;"
        : "=r"(bytes)
        : "r"(*reinterpret_cast<uint32_t*>(&low)), "r"(*reinterpret_cast<uint32_t*>(&high)));
    return int(bytes);
}

// Decides bits by the sign of u - P, where P = N / D = middle + half_range tanh(l / (2 temperature) - ln(d0 / d01) / 2)
// and u is the lane's upper 11 bits: they are a half as they stand (a subnormal or of the smallest exponent: 2^-24
// each), so no conversion is needed.
//
// All is scaled by a power of two, so that |middle| and |half_range| are at most 1 (a threshold step has huge ones).
// Errors, in units of 2^-12: 1 u (half of its last bit, scaled); 2 half_range (tanh.approx, 2^-11 relative) + 1 half_range
// (tanh rounded) + 1 half_range (the factor rounded) + 1 middle (rounded) + 1 (half_range + middle) (the sum rounded).
// The sum with u is exact where it matters, next to zero; the rounding of N and D and the definition's clamp at 2^64 are
// below 2^-20. The margin takes 3% more. Coefficients of another kind give an infinite margin: never sure.
struct HalfFilter {
    float slope, shift;
    __half2 lane_unit, minus_half_range, minus_middle, margin;

    __device__ __forceinline__ HalfFilter(const Ratio& r, float scale) {
        const float at_zero = __fdividef(r.n01, r.d01), at_infinity = __fdividef(r.n0, r.d0);  // P at e = 0 and infinity
        float middle = 0.5f * (at_zero + at_infinity), half_range = 0.5f * (at_zero - at_infinity);
        const float logs = __log2f(r.d0) - __log2f(r.d01);
        slope = scale * (-0.5f * 0.693147181f);
        shift = logs * (-0.5f * 0.693147181f);
        const float size = fmaxf(fabsf(middle), fabsf(half_range));
        // 2^-exponent, exact; a step's probabilities are at most 1, where nothing is scaled.
        const float unit = size <= 1 ? 1.0f : __uint_as_float(0x7F000000u - (__float_as_uint(2 * size) & 0x7F800000u));
        middle *= unit, half_range *= unit;
        const bool regular = r.d0 > 0x1p-30f && r.d01 > 0x1p-30f && fabsf(logs) < 32 && size < 0x1p60f;
        const float error = unit + 5 * fabsf(half_range) + 2 * fabsf(middle);
        lane_unit = __float2half2_rn(unit * 0x1p13f);
        minus_half_range = __float2half2_rn(-half_range);
        minus_middle = __float2half2_rn(fmaf(unit, 0x1p-12f, -middle));
        margin = __half2half2(regular ? __float2half_ru(error * 0x1.08p-12f) : __ushort_as_half(0x7C00));
    }

    // The bits of eight logits of x_0 != x_t and a Philox block; false if one of them is not sure. `start` is what
    // `start_if_finite` made of the logits as they were read.
    __device__ __forceinline__ bool decide(const float (&l)[8], const uint32_t (&words)[4], __half2 start,
                                           uint32_t& bits) const {
        __half2 s[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const __half2 t = __floats2half2_rn(tanh_approximate(fmaf(l[2 * k], slope, shift)),
                                                tanh_approximate(fmaf(l[2 * k + 1], slope, shift)));
            const uint32_t lanes = words[k] >> 5 & 0x07FF07FFu;
            s[k] = __hfma2(*reinterpret_cast<const __half2*>(&lanes), lane_unit,
                           __hfma2(t, minus_half_range, k == 0 ? start : minus_middle));
        }
        bits = __dp4a(signs(s[0], s[1]), int(0xF8FCFEFF), __dp4a(signs(s[2], s[3]), int(0x80C0E0F0), 0));
        // NaN is not sure either.
        const __half2 least = __hmin2_nan(__hmin2_nan(__habs2(s[0]), __habs2(s[1])),
                                          __hmin2_nan(__habs2(s[2]), __habs2(s[3])));
        return __hbgt2(least, margin);
    }

    // minus_middle if the eight elements are finite, otherwise NaN in one half at least: where the sum of `decide`
    // starts, so that looking for them costs four instructions. 0 x is NaN where x is not finite, and a NaN of bfloat16
    // is one of half too.
    template <class T>
    __device__ __forceinline__ __half2 start_if_finite(const uint32_t (&raw)[2 * sizeof(T)]) const {
        using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        Pair sum = *reinterpret_cast<const Pair*>(&minus_middle);
        const Pair zero{from_float<T>(0.0f), from_float<T>(0.0f)};
#pragma unroll
        for (int k = 0; k < 4; ++k) sum = __hfma2(*reinterpret_cast<const Pair*>(raw + k), zero, sum);
        return *reinterpret_cast<const __half2*>(&sum);
    }
    __device__ __forceinline__ __half2 start_if_finite(const float (&l)[8]) const {
        return __hadd2(minus_middle, __float2half2_rn(zero_if_finite(l)));
    }
};

}  // namespace bldm::cuda
