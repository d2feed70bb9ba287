// The tensor cores' m16n8k16 product for half-precision types, and how bits become its operands.
//
// In a fragment, thread 4 g + t of the warp holds of A rows g and g + 8, of B column g, of both the k = 2t, 2t + 1, 2t
// + 8, 2t + 9; of the result rows g and g + 8, columns 2t and 2t + 1. The order of k is free as long as A and B agree,
// and so is the naming of rows and columns: the kernels choose them so that bits cost little to expand and memory is
// accessed 16 bytes at a time.
#pragma once

#include "cuda/samples.cuh"

namespace bldm::cuda {

// What the tensor cores multiply: float32 goes there in three bfloat16 parts.
template <class T>
using Half = std::conditional_t<std::is_same_v<T, __half>, __half, __nv_bfloat16>;
template <class T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;

// Neighbouring columns of a thread: 16 bytes.
template <class T>
constexpr int kPer = 16 / sizeof(T);

// d = a b + c
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float (&c)[4]) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, "
            "%11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, "
            "%11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// What a set and an unset bit stand for, twice: 1 and -1, or 1 and 0.
struct BitValues {
    uint32_t set, unset;

    template <class T>
    static BitValues of(bool is_signed) {
        const uint32_t one = std::is_same_v<T, __half> ? 0x3C003C00u : 0x3F803F80u;
        return {one, is_signed ? one | 0x80008000u : 0};
    }
};

// The highest bits of two bytes as a pair of values; bytes 0 to 3 are those of x, 4 to 7 those of y.
template <int kLow, int kHigh>
__device__ __forceinline__ uint32_t expand(uint32_t x, uint32_t y, const BitValues& values) {
    constexpr uint32_t kRepeatSign = 0x8888 | kLow * 0x11 | kHigh * 0x1100;
    uint32_t mask;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(mask) : "r"(x), "r"(y), "n"(kRepeatSign));
    return (mask & values.set) | (~mask & values.unset);
}

// Takes the upper half of x, a bfloat16 (the lower 16 bits of the result are 0), and leaves the rest, which is exact: a
// float32 is the sum of three such parts.
__device__ __forceinline__ uint32_t take_upper_half(uint32_t& x) {
    const uint32_t upper = x & 0xFFFF0000u;
    const float value = __uint_as_float(x), rest = value - __uint_as_float(upper);
    x = isinf(value) ? 0 : __float_as_uint(rest);
    return upper;
}

// Copies to shared memory that run on while the thread goes on: `bytes` of 16, the others become 0.
__device__ __forceinline__ void copy_async(uint4* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kLeft groups of this thread's copies run.
template <int kLeft>
__device__ __forceinline__ void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace bldm::cuda
