// binarize: Bernoulli(sigmoid(l)) or l > 0, from logits in either layout.
#include "cpu/bernoulli.h"

namespace bldm::BLDM_ISA {

void binarize(const void* logits, int64_t type, int64_t batch, int64_t outer, int64_t channels, int64_t inner,
              bool bernoulli, int64_t seed, int64_t step, int64_t sample_offset, uint8_t* out, int threads) {
    const Draw draw{{batch, outer * inner, channels, inner}, Stream(uint64_t(seed), kBinarize, uint32_t(step)),
                    uint64_t(sample_offset)};
    const float scale = -0x1.715476p+0f;  // -log2(e)
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_groups(draw.shape, false, threads, [&, draw](const Group& group, int64_t) {
            alignas(64) uint16_t lanes[kGroupBits];
            T buffer[kGroupBits];
            GroupBits x;
            if (bernoulli) draw.lanes(group, lanes);
            const T* values = group.gather(static_cast<const T*>(logits), draw.shape, buffer);
            for (int v = 0; v < 8; ++v) {
                const F l = load(values + v * kLanes);
                if (bernoulli)
                    x.put(v, draw.test(group, v, lanes, splat(1.0f), exp2_clamped(l * scale) + 1.0f));
                else
                    x.put(v, less(F{}, l));
            }
            x.clear_padding(draw.shape, group);
            x.write(out, group);
        });
    });
}

}  // namespace bldm::BLDM_ISA
