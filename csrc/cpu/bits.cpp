// pack_bits, unpack_bits, random_bits.
#include "cpu/bernoulli.h"

namespace bldm::BLDM_ISA {

namespace {

constexpr int64_t kBlock = 64;  // positions of a channels-first tensor handled together

template <class T>
struct EightOf {
    typedef T type __attribute__((vector_size(8 * sizeof(T))));
};
template <class T>
using Eight = typename EightOf<T>::type;

// Bit j: item j of eight is not zero (significant: all bits, or all but a float's sign).
template <class T>
BLDM_INLINE uint8_t pack_eight(const T* items, T significant) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        const __m256i zero = _mm256_cmpeq_epi32(__m256i(load_as<Eight<T>>(items) & significant), __m256i{});
        return uint8_t(~_mm256_movemask_ps(__m256(zero)));
    }
#endif
    typedef int8_t Bytes __attribute__((vector_size(8)));
    const auto set = (load_as<Eight<T>>(items) & significant) != T(0);
    const uint64_t selected = uint64_t(__builtin_convertvector(set, Bytes)) & 0x8040201008040201u;
    return uint8_t((selected * 0x0101010101010101u) >> 56);
}

template <class T>
BLDM_INLINE uint8_t pack_few(const T* items, int64_t count, T significant) {
    uint8_t byte = 0;
    for (int64_t j = 0; j < count; ++j) byte |= uint8_t(((items[j] & significant) != 0) << j);
    return byte;
}

#if defined(__AVX2__)
BLDM_INLINE void pack_four(const uint8_t* items, uint8_t* out) {
    const uint32_t bits = ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(load_as<__m256i>(items), __m256i{})));
    std::memcpy(out, &bits, 4);
}
#endif

// Channels last: `bytes` bytes of one row of C channels, starting with byte `first`.
template <class T>
void pack_row(const T* x, int64_t channels, int64_t first, int64_t end, T significant, uint8_t* out) {
    int64_t i = first;
    const int64_t whole = std::min(end, channels / 8);
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 1)
        for (; i + 4 <= whole; i += 4) pack_four(x + 8 * i, out + i);
#endif
    for (; i < whole; ++i) out[i] = pack_eight(x + 8 * i, significant);
    if (i < end) out[i] = pack_few(x + 8 * i, channels - 8 * i, significant);
}

// Channels first: positions begin..end of one sample, x (C, inner), out (inner, P).
template <class T>
void pack_positions(const T* x, int64_t channels, int64_t inner, int64_t begin, int64_t end, T significant, uint8_t* out) {
    const int64_t row_bytes = (channels + 7) / 8;
    for (int64_t byte = 0; byte < row_bytes; ++byte) {
        uint8_t bits[kBlock] = {};
        for (int64_t c = 8 * byte; c < std::min(channels, 8 * byte + 8); ++c)
            for (int64_t i = begin; i < end; ++i)
                bits[i - begin] |= uint8_t(((x[c * inner + i] & significant) != 0) << c % 8);
        for (int64_t i = begin; i < end; ++i) out[i * row_bytes + byte] = bits[i - begin];
    }
}

template <class T>
void pack(const T* x, T significant, int64_t outer, int64_t channels, int64_t inner, uint8_t* out, int threads) {
    const int64_t row_bytes = (channels + 7) / 8;
    const bool parallel = outer * inner * row_bytes > kSerialBytes;
    if (inner == 1 && channels % 8 == 0) channels *= outer, outer = 1;  // no padding: one long row
    if (inner == 1) {
        const int64_t bytes = (channels + 7) / 8, chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
#pragma omp parallel for collapse(2) num_threads(threads) if (parallel)
        for (int64_t row = 0; row < outer; ++row)
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t first = chunk * kChunkBytes, end = std::min(bytes, first + kChunkBytes);
                pack_row(x + row * channels, channels, first, end, significant, out + row * bytes);
            }
        return;
    }
#pragma omp parallel for collapse(2) num_threads(threads) if (parallel)
    for (int64_t o = 0; o < outer; ++o)
        for (int64_t begin = 0; begin < inner; begin += kBlock)
            pack_positions(x + o * channels * inner, channels, inner, begin, std::min(inner, begin + kBlock), significant,
                           out + o * inner * row_bytes);
}

// Bytes first..end of one row of C channels.
template <class T>
void unpack_row(const uint8_t* packed, int64_t channels, int64_t first, int64_t end, T one, T* out) {
    const Eight<T> bit = {T(1), T(2), T(4), T(8), T(16), T(32), T(64), T(-128)};
    for (int64_t i = first; i < end; ++i) {
        const Eight<T> items = Eight<T>(((Eight<T>{} + T(packed[i])) & bit) != T(0)) & one;
        std::memcpy(out + 8 * i, &items, sizeof(T) * size_t(std::min<int64_t>(8, channels - 8 * i)));
    }
}

// Positions begin..end of one sample: packed (inner, P) -> out (C, inner).
template <class T>
void unpack_positions(const uint8_t* packed, int64_t channels, int64_t inner, int64_t begin, int64_t end, T one, T* out) {
    const int64_t row_bytes = (channels + 7) / 8;
    for (int64_t byte = 0; byte < row_bytes; ++byte) {
        uint8_t bits[kBlock];
        for (int64_t i = begin; i < end; ++i) bits[i - begin] = packed[i * row_bytes + byte];
        for (int64_t c = 8 * byte; c < std::min(channels, 8 * byte + 8); ++c)
            for (int64_t i = begin; i < end; ++i)
                out[c * inner + i] = T(T(0) - T((bits[i - begin] >> c % 8) & 1)) & one;
    }
}

template <class T>
void unpack(const uint8_t* packed, int64_t outer, int64_t channels, int64_t inner, T one, T* out, int threads) {
    const int64_t row_bytes = (channels + 7) / 8;
    const bool parallel = outer * inner * row_bytes > kSerialBytes;
    if (inner == 1 && channels % 8 == 0) channels *= outer, outer = 1;
    if (inner == 1) {
        const int64_t bytes = (channels + 7) / 8, chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
#pragma omp parallel for collapse(2) num_threads(threads) if (parallel)
        for (int64_t row = 0; row < outer; ++row)
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t first = chunk * kChunkBytes, end = std::min(bytes, first + kChunkBytes);
                unpack_row(packed + row * bytes, channels, first, end, one, out + row * channels);
            }
        return;
    }
#pragma omp parallel for collapse(2) num_threads(threads) if (parallel)
    for (int64_t o = 0; o < outer; ++o)
        for (int64_t begin = 0; begin < inner; begin += kBlock)
            unpack_positions(packed + o * inner * row_bytes, channels, inner, begin, std::min(inner, begin + kBlock), one,
                             out + o * channels * inner);
}

// Calls body with a zero of the unsigned type of that size.
template <class Body>
void with_item(int64_t bytes, Body body) {
    if (bytes == 1)
        body(uint8_t());
    else if (bytes == 2)
        body(uint16_t());
    else if (bytes == 4)
        body(uint32_t());
    else
        body(uint64_t());
}

}  // namespace

void pack_bits(const void* x, int64_t item_bytes, bool is_float, int64_t outer, int64_t channels, int64_t inner,
               uint8_t* out, int threads) {
    with_item(item_bytes, [&](auto zero) {
        using T = decltype(zero);
        const T all = T(~T(0));
        pack(static_cast<const T*>(x), is_float ? T(all >> 1) : all, outer, channels, inner, out, threads);
    });
}

void unpack_bits(const uint8_t* packed, int64_t outer, int64_t channels, int64_t inner, int64_t item_bytes, uint64_t one,
                 void* out, int threads) {
    with_item(item_bytes, [&](auto zero) {
        using T = decltype(zero);
        unpack(packed, outer, channels, inner, T(one), static_cast<T*>(out), threads);
    });
}

void random_bits(uint8_t* out, int64_t batch, int64_t rows, int64_t channels, int64_t seed, int64_t sample_offset,
                 int threads) {
    const Draw draw{{batch, rows, channels}, Stream(uint64_t(seed), kRandomBits, 0), uint64_t(sample_offset)};
    for_groups(draw.shape, false, threads, [&, draw](const Group& group, int64_t) {
        alignas(64) uint16_t lanes[kGroupBits];
        GroupBits x;
        draw.lanes(group, lanes);
        for (int v = 0; v < 8; ++v) x.put(v, draw.test(group, v, lanes, splat(0.5f), splat(1.0f)));
        x.clear_padding(draw.shape, group);
        x.write(out, group);
    });
}

}  // namespace bldm::BLDM_ISA
