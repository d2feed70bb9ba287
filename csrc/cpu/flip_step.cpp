// flip_step (the reverse step) and add_noise (the forward process).
#include "cpu/bernoulli.h"

namespace bldm::BLDM_ISA {

void flip_step(const void* logits, int64_t type, const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels,
               const float* coefficients, int64_t coefficient_rows, int64_t seed, int64_t step, int64_t sample_offset,
               float scale, bool x0_prediction, const void* uncond_logits, float guidance_scale,
               const uint8_t* keep_mask, int64_t keep_mask_samples, const uint8_t* keep_bits, int64_t keep_bits_samples,
               int32_t* nonfinite, uint8_t* out, int threads) {
    const Draw draw{{batch, rows, channels}, Stream(uint64_t(seed), kFlipStep, uint32_t(step)), uint64_t(sample_offset)};
    const Shape& shape = draw.shape;
    int64_t bad = 0;

    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_groups(shape, coefficient_rows > 1, threads, [&, draw](const Group& group, int64_t) {
            alignas(64) uint16_t lanes[kGroupBits];
            T buffer[kGroupBits], uncond_buffer[kGroupBits];
            GroupBits x, mask;
            draw.lanes(group, lanes);
            x.read(x_t, group);
            const T* conditional = group.gather(static_cast<const T*>(logits), shape, buffer);
            const T* unconditional =
                uncond_logits ? group.gather(static_cast<const T*>(uncond_logits), shape, uncond_buffer) : nullptr;
            const Ratio ratio(coefficients, coefficient_rows, group.sample);
            const auto logit = [&](int v) {
                const F l = load(conditional + v * kLanes);
                if (!unconditional) return l;
                const F u = load(unconditional + v * kLanes);
                return fma(splat(guidance_scale), l - u, u);
            };
            F spoiled{};  // NaN where a logit is not finite
            for (int v = 0; v < 8; ++v) {
                F l = logit(v);
                spoiled += l - l;
                if (x0_prediction) l = negate_where(x.get(v), l);
                const F e = exp2_clamped(l * scale);
                mask.put(v, draw.test(group, v, lanes, ratio.numerator(e), ratio.denominator(e)));
            }
            if (less(spoiled, splat(1.0f)) != kAllLanes) {
                int finite = 0;
                for (int v = 0; v < 8; ++v) finite += __builtin_popcount(less(logit(v) - logit(v), splat(1.0f)));
#pragma omp atomic
                bad += kGroupBits - finite;
            }
            mask.clear_padding(shape, group);
            for (int b = 0; b < kLanes; ++b) x.bytes[b] ^= mask.bytes[b];
            if (keep_mask) {
                group.for_bytes(shape, [&](int b, int64_t sample, int64_t byte) {
                    const int64_t all = sample * shape.sample_bytes() + byte;
                    const uint8_t keep = keep_mask[keep_mask_samples > 1 ? all : byte];
                    const uint8_t kept = keep_bits[keep_bits_samples > 1 ? all : byte];
                    x.bytes[b] = uint8_t((x.bytes[b] & ~keep) | (kept & keep));
                });
            }
            x.write(out, group);
        });
    });
    if (nonfinite) *nonfinite += int32_t(bad);
}

void add_noise(const uint8_t* x_0, int64_t batch, int64_t rows, int64_t channels, const float* flip_probability,
               int64_t probabilities, int64_t seed, int64_t step, int64_t sample_offset, uint8_t* out, int threads) {
    const Draw draw{{batch, rows, channels}, Stream(uint64_t(seed), kAddNoise, uint32_t(step)), uint64_t(sample_offset)};
    const Shape& shape = draw.shape;
    for_groups(shape, probabilities > 1, threads, [&, draw](const Group& group, int64_t) {
        alignas(64) uint16_t lanes[kGroupBits];
        GroupBits x, mask;
        draw.lanes(group, lanes);
        x.read(x_0, group);
        const F p = splat(flip_probability[probabilities > 1 ? group.sample : 0]);
        for (int v = 0; v < 8; ++v) mask.put(v, draw.test(group, v, lanes, p, splat(1.0f)));
        mask.clear_padding(shape, group);
        for (int b = 0; b < kLanes; ++b) x.bytes[b] ^= mask.bytes[b];
        x.write(out, group);
    });
}

}  // namespace bldm::BLDM_ISA
