// Vectors of kLanes 32-bit numbers: GCC's vector extension (operators work lane by lane), and the few operations it lacks.
// Everything here is inlined, since the same code exists once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "philox.h"

namespace bldm::BLDM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint64_t U64 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

BLDM_INLINE F splat(float x) {
    F v;
    for (int i = 0; i < kLanes; ++i) v[i] = x;
    return v;
}

template <class V, class T>
BLDM_INLINE V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Lane numbers 0, 1, 2, ...
BLDM_INLINE U iota() {
    U v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

// a * b + c, rounded once.
BLDM_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    for (int i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
#endif
}

// Bit i: a[i] < b[i]; false where one is NaN.
BLDM_INLINE uint32_t less(F a, F b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
#elif defined(__SSE2__)
    return uint32_t(_mm_movemask_ps(_mm_cmplt_ps(a, b)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t(a[i] < b[i]) << i;
    return bits;
#endif
}

// kLanes numbers of 16 bits.
BLDM_INLINE F load_uint16(const uint16_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(load_as<__m256i>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(load_as<__m128i>(p)));
#else
    return __builtin_convertvector(__builtin_convertvector(load_as<U16>(p), I), F);
#endif
}

// min(max(x, -limit), limit); NaN stays NaN.
BLDM_INLINE F clamp(F x, float limit) {
#if defined(__AVX512F__)
    return _mm512_min_ps(splat(limit), _mm512_max_ps(splat(-limit), x));
#elif defined(__AVX2__)
    return _mm256_min_ps(splat(limit), _mm256_max_ps(splat(-limit), x));
#else
    x = x < splat(-limit) ? splat(-limit) : x;
    return x > splat(limit) ? splat(limit) : x;
#endif
}

// All ones in lane i where bit i is set.
BLDM_INLINE I lanes_of(uint32_t bits) {
    const U bit = (U{} + 1u) << iota();
    return I((bit & bits) == bit);
}

BLDM_INLINE F negate_where(uint32_t bits, F x) { return F(U(x) ^ (U(lanes_of(bits)) & 0x80000000u)); }

BLDM_INLINE float sum(F x) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += x[i];
    return total;
}

// High and low halves of the 64-bit products, for Philox.
struct VectorProduct {
    static BLDM_INLINE U64 even(U a, U b) {
#if defined(__AVX512F__)
        return U64(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
        return U64(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
        return U64(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
        return (U64(a) & 0xFFFFFFFFu) * (U64(b) & 0xFFFFFFFFu);
#endif
    }

    BLDM_INLINE void operator()(uint32_t a, U b, U& high, U& low) const {
        const U factor = U{} + a;
        const U64 evens = even(b, factor), odds = even(U(U64(b) >> 32), factor);
#if defined(__AVX512F__)
        high = U(_mm512_mask_shuffle_epi32(__m512i(odds), 0x5555, __m512i(evens), _MM_PERM_CDAB));
#elif defined(__AVX2__)
        high = U(_mm256_blend_epi32(__m256i(evens >> 32), __m256i(odds), 0xAA));
#else
        high = U((evens >> 32) | (odds & 0xFFFFFFFF00000000u));
#endif
        low = b * a;
    }
};

// --- floating types ------------------------------------------------------------------------------------------------------
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

BLDM_INLINE F load(const float* p) { return load_as<F>(p); }

BLDM_INLINE F load(const BFloat* p) { return F(__builtin_convertvector(load_as<U16>(p), U) << 16); }

BLDM_INLINE F load(const Half* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(load_as<__m128i>(p));
#else
    const U half = __builtin_convertvector(load_as<U16>(p), U);
    const F magnitude = F((half & 0x7FFFu) << 13) * 0x1p112f;  // moves the exponent's bias; subnormals come out right
    const U special = U(magnitude >= splat(0x1p16f)) & 0x7F800000u;
    return F(U(magnitude) | special | (half & 0x8000u) << 16);
#endif
}

BLDM_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }

// Rounded to nearest even; NaN stays NaN.
BLDM_INLINE void store(BFloat* p, F x) {
    const U rounded = (U(x) + 0x7FFFu + ((U(x) >> 16) & 1u)) >> 16;
    const U bits = x == x ? rounded : U{} + 0x7FC0u;
    const U16 narrow = __builtin_convertvector(bits, U16);
    std::memcpy(p, &narrow, sizeof narrow);
}

BLDM_INLINE void store(Half* p, F x) {
#if defined(__AVX512F__)
    const __m256i narrow = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    const __m128i narrow = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const U sign = U(x) & 0x80000000u, magnitude = U(x) ^ sign;
    // Below 2^-14 the result is a multiple of 2^-24: adding 1/2 aligns it there, and the addition rounds.
    const U subnormal = U(F(magnitude) + 0.5f) - 0x3F000000u;
    const U normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    U bits = I(magnitude) < I(U{} + 0x38800000u) ? subnormal : normal;
    bits = I(magnitude) >= I(U{} + 0x477FF000u) ? U{} + 0x7C00u : bits;
    bits = x == x ? bits : U{} + 0x7E00u;
    const U16 narrow = __builtin_convertvector(bits | sign >> 16, U16);
#endif
    std::memcpy(p, &narrow, sizeof narrow);
}

// Calls body with a value of the C++ type that `type` (FloatType) means.
template <class Body>
void with_type(int64_t type, Body body) {
    if (type == 0)
        body(float());
    else if (type == 1)
        body(Half());
    else
        body(BFloat());
}

}  // namespace bldm::BLDM_ISA
