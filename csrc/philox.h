// The random stream of docs/random-stream.md for C++ and CUDA: Philox4x32-10, the counter layout, the lanes.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BLDM_INLINE __host__ __device__ __forceinline__
#else
#define BLDM_INLINE inline __attribute__((always_inline))
#endif

namespace bldm {

// What a draw is for; the tie block of a purpose is the next number.
enum Purpose : uint32_t { kRandomBits = 0, kFlipStep = 2, kAddNoise = 4, kBinarize = 6 };

constexpr int kStepBits = 28;

// One draw of one seed: the key, and word 1 of the counter.
struct Stream {
    uint32_t key0, key1, draw;

    BLDM_INLINE Stream(uint64_t seed, uint32_t purpose, uint32_t step)
        : key0(uint32_t(seed)), key1(uint32_t(seed >> 32)), draw((purpose << kStepBits) + step) {}

    // The stream of the tie blocks.
    BLDM_INLINE Stream ties() const {
        Stream next = *this;
        next.draw += 1u << kStepBits;
        return next;
    }
};

// High and low 32 bits of a * b. A Word may also be a SIMD vector of uint32, with a product of its own.
struct WideProduct {
    BLDM_INLINE void operator()(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) const {
        const uint64_t product = uint64_t(a) * b;
        high = uint32_t(product >> 32);
        low = uint32_t(product);
    }
};

// The keys of a round, and of the next.
template <class Word>
struct Keys {
    Word key0, key1;

    BLDM_INLINE void next() {
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
};

// Philox4x32-10 (Salmon et al. 2011): replaces the counter c by its random words.
template <class Word, class RoundKeys, class Product = WideProduct>
BLDM_INLINE void philox_4x32_10(Word (&c)[4], RoundKeys keys, Product product = {}) {
    for (int round = 0; round < 10; ++round) {
        Word high0, low0, high1, low1;
        product(0xD2511F53u, c[0], high0, low0);
        product(0xCD9E8D57u, c[2], high1, low1);
        c[0] = high1 ^ c[1] ^ keys.key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ keys.key1;
        c[3] = low0;
        keys.next();
    }
}

// The block of one packed byte: its index within the sample, and the 64-bit sample index.
template <class RoundKeys, class Product = WideProduct>
BLDM_INLINE void random_block(uint32_t draw, const RoundKeys& keys, uint32_t byte, uint64_t sample,
                              uint32_t (&words)[4], Product product = {}) {
    words[0] = byte;
    words[1] = draw;
    words[2] = uint32_t(sample);
    words[3] = uint32_t(sample >> 32);
    philox_4x32_10(words, keys, product);
}
template <class Product = WideProduct>
BLDM_INLINE void random_block(const Stream& stream, uint32_t byte, uint64_t sample, uint32_t (&words)[4],
                              Product product = {}) {
    random_block(stream.draw, Keys<uint32_t>{stream.key0, stream.key1}, byte, sample, words, product);
}

// Lane j of a block, 16 bits: it decides bit j of the byte.
BLDM_INLINE uint32_t lane(const uint32_t (&words)[4], int j) {
    return (words[j >> 1] >> (16 * (j & 1))) & 0xFFFFu;
}

}  // namespace bldm
