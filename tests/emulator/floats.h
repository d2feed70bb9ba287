// The number formats of the tensor cores, and vectors, as CUDA has them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { uint16_t x, y; };
struct alignas(4) [[gnu::may_alias]] __half2 { uint16_t x, y; };

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }

inline float from_bfloat16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
inline uint16_t to_bfloat16(float x) {
    if (std::isnan(x)) return 0x7FFF;
    const uint32_t bits = __float_as_uint(x);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float from_half(uint16_t x) { return float(same_bits<_Float16>(x)); }
inline uint16_t to_half(float x) { return same_bits<uint16_t>(_Float16(x)); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {to_bfloat16(x), to_bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {to_half(x), to_half(y)}; }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
inline __half2 __hmul2(__half2 x, __half2 y) {
    return __floats2half2_rn(from_half(x.x) * from_half(y.x), from_half(x.y) * from_half(y.y));
}
inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
    const auto of = [](uint16_t x, uint16_t y, uint16_t z) {
        return same_bits<uint16_t>(_Float16(double(from_half(x)) * from_half(y) + from_half(z)));
    };
    return {of(x.x, y.x, z.x), of(x.y, y.y, z.y)};
}
inline float2 __half22float2(__half2 x) { return {from_half(x.x), from_half(x.y)}; }

// 4 bits of exponent, 3 of mantissa, no infinity: 0x7F is NaN, 0x7E 448.
struct E4m3Values {
    float of[256];
    E4m3Values() {
        for (int x = 0; x < 256; ++x) {
            const int exponent = x >> 3 & 15, mantissa = x & 7;
            const float size = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
            of[x] = (x & 0x7F) == 0x7F ? NAN : x & 0x80 ? -size : size;
        }
    }
};
inline const E4m3Values e4m3_values;
inline float from_e4m3(uint8_t x) { return e4m3_values.of[x]; }
inline uint8_t to_e4m3(float x) {  // saturated
    if (std::isnan(x)) return 0x7F;
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    const float size = std::fabs(x);
    if (size == 0) return sign;
    if (size >= 448) return sign | 0x7E;
    int exponent;
    std::frexp(size, &exponent);
    const int unit = exponent - 4 < -9 ? -9 : exponent - 4;  // of the last of 4 significant bits
    const int count = int(std::nearbyint(std::ldexp(size, -unit)));
    return sign | uint8_t(count + (unit + 9) * 8);  // 16 units are 8 of the next exponent
}
