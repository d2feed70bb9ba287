// The arithmetic of docs/random-stream.md, kLanes bits at a time: every operation rounded once, in the order given there.
#pragma once

#include "cpu/groups.h"

namespace bldm::BLDM_ISA {

// 2^clamp(y), y = -l log2(e) / temperature.
BLDM_INLINE F exp2_clamped(F y) {
    y = clamp(y, 64.0f);
    const F shifted = y + 0x1.8p23f;  // rounds to the nearest integer, which then stands in the low bits
    const F z = y - (shifted - 0x1.8p23f);
    F p = splat(0x1.5bba14p-10f);
    p = fma(p, z, splat(0x1.3cea88p-7f));
    p = fma(p, z, splat(0x1.c6b752p-5f));
    p = fma(p, z, splat(0x1.ebf9bcp-3f));
    p = fma(p, z, splat(0x1.62e42ap-1f));
    p = fma(p, z, splat(1.0f));
    return F(U(p) + (U(shifted) << 23));
}

// P(x_s != x_t) = N / D of a step, from e = exp(-l / temperature).
struct Ratio {
    F n0, n01, d0, d01;

    // Row `sample` of the coefficients (n0, n1, d0, d1), or the only one.
    BLDM_INLINE Ratio(const float* coefficients, int64_t coefficient_rows, int64_t sample) {
        const float* c = coefficients + (coefficient_rows > 1 ? 4 * sample : 0);
        n0 = splat(c[0]), n01 = splat(c[0] + c[1]), d0 = splat(c[2]), d01 = splat(c[2] + c[3]);
    }
    BLDM_INLINE F numerator(F e) const { return fma(n0, e, n01); }
    BLDM_INLINE F denominator(F e) const { return fma(d0, e, d01); }
};

// The random lanes of a draw, and the test they decide.
struct Draw {
    Shape shape;
    Stream stream;
    uint64_t sample_offset;

    // lanes[8 b + j] is lane j of byte b of the group.
    BLDM_INLINE void lanes(const Group& group, uint16_t* lanes) const {
        // Position i of the vectors is this byte of the group: after the transposition below all lie in order.
        constexpr int kQuarters = kLanes / 4;
        const U order = iota() % 4u * uint32_t(kQuarters) + iota() / 4u;
        U words[4];
        if (group.byte + kLanes <= shape.sample_bytes()) {
            const uint64_t sample = sample_offset + uint64_t(group.sample);
            words[0] = order + uint32_t(group.byte);
            words[2] = U{} + uint32_t(sample);
            words[3] = U{} + uint32_t(sample >> 32);
        } else {
            words[0] = words[2] = words[3] = U{};
            group.for_bytes(shape, [&](int b, int64_t sample, int64_t byte) {
                const int i = b % kQuarters * 4 + b / kQuarters;
                words[0][i] = uint32_t(byte);
                words[2][i] = uint32_t(sample_offset + uint64_t(sample));
                words[3][i] = uint32_t((sample_offset + uint64_t(sample)) >> 32);
            });
        }
        words[1] = U{} + stream.draw;
        philox_4x32_10(words, Keys<U>{U{} + stream.key0, U{} + stream.key1}, VectorProduct());
        // Within every four positions: words 0..3 of position 0, then of position 1, ...
        const U low01 = interleave<0>(words[0], words[1]), high01 = interleave<2>(words[0], words[1]);
        const U low23 = interleave<0>(words[2], words[3]), high23 = interleave<2>(words[2], words[3]);
        const U64 blocks[4] = {pairs<0>(low01, low23), pairs<1>(low01, low23), pairs<0>(high01, high23),
                               pairs<1>(high01, high23)};
        std::memcpy(lanes, blocks, sizeof blocks);
    }

    // Vector v of the group's bits: set with probability numerator / denominator.
    BLDM_INLINE uint32_t test(const Group& group, int v, const uint16_t* lanes, F numerator, F denominator) const {
        const F scaled = denominator * 0x1p-16f;
        const F h = load_uint16(lanes + v * kLanes);
        const F remainder = fma(-h, scaled, numerator);
        const uint32_t positive = less(F{}, remainder), below = less(remainder, scaled);
        if (__builtin_expect(positive & below, 0)) return (positive & ~below) | ties(group, v, positive & below, remainder, scaled);
        return positive & ~below;
    }

private:
    // Element i of the result: a and b alternately, from element `From` of every four.
    template <int From>
    static BLDM_INLINE U interleave(U a, U b) {
        const U i = iota();
        return __builtin_shuffle(a, b, i / 4u * 4u + i % 4u / 2u + uint32_t(From) + i % 2u * uint32_t(kLanes));
    }
    // The 64-bit halves `Which` of a and b alternately.
    template <int Which>
    static BLDM_INLINE U64 pairs(U a, U b) {
        U64 i;
        for (int k = 0; k < kLanes / 2; ++k) i[k] = uint64_t(k / 2 * 2 + Which + k % 2 * (kLanes / 2));
        return __builtin_shuffle(U64(a), U64(b), i);
    }

    // The lane tied with the threshold's upper half: the lane of the tie block decides.
    __attribute__((noinline, cold)) uint32_t ties(const Group& group, int v, uint32_t tied, F remainder, F scaled) const {
        uint32_t set = 0;
        for (; tied; tied &= tied - 1) {
            const int i = __builtin_ctz(tied), bit = v * kLanes + i;
            int64_t sample = group.sample, byte = group.byte + bit / 8;
            while (byte >= shape.sample_bytes()) byte -= shape.sample_bytes(), ++sample;
            uint32_t words[4];
            random_block(stream.ties(), uint32_t(byte), sample_offset + uint64_t(sample), words);
            const float g = float(lane(words, bit % 8));
            set |= uint32_t(std::fma(-g, scaled[i] * 0x1p-16f, remainder[i]) > 0) << i;
        }
        return set;
    }
};

}  // namespace bldm::BLDM_ISA
