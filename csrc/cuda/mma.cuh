// The tensor cores' m16n8k16 product for half-precision types, and how bits become its operands.
//
// In a fragment, thread 4 g + t of the warp holds of A rows g and g + 8, of B column g, of both the k = 2t, 2t + 1, 2t
// + 8, 2t + 9; of the result rows g and g + 8, columns 2t and 2t + 1. The order of k is free as long as A and B agree,
// and so is the naming of columns: the kernels choose them so that bits cost little to expand and memory is read 16
// bytes at a time.
#pragma once

#include "cuda/samples.cuh"

namespace bldm::cuda {

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
            "%2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
            "%1, %2, "
            "%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Bits 15 and 31 of `bits` as a pair of values: 1 and -1, or 1 and 0.
template <class T, bool kSigned>
__device__ __forceinline__ uint32_t expand(uint32_t bits) {
    constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3C00 : 0x3F80;
    if constexpr (kSigned) return (bits & 0x80008000u) ^ (0x80008000u | kOne << 16 | kOne);
    return (bits >> 15 & 0x00010001u) * kOne;
}

}  // namespace bldm::cuda
