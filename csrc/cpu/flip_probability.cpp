// flip_probability and its backward.
#include "cpu/bernoulli.h"

namespace bldm::BLDM_ISA {

void flip_probability(const void* logits, int64_t type, const uint8_t* x_t, int64_t batch, int64_t rows,
                      int64_t channels, const float* coefficients, int64_t coefficient_rows, float scale,
                      bool x0_prediction, float* out, int threads) {
    const Shape shape{batch, rows, channels};
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_groups(shape, coefficient_rows > 1, threads, [&](const Group& group, int64_t) {
            T buffer[kGroupBits];
            float out_buffer[kGroupBits];
            GroupBits x;
            x.read(x_t, group);
            const T* values = group.gather(static_cast<const T*>(logits), shape, buffer);
            float* target = group.target(out, shape, out_buffer);
            const Ratio ratio(coefficients, coefficient_rows, group.sample);
            for (int v = 0; v < 8; ++v) {
                F l = load(values + v * kLanes);
                if (x0_prediction) l = negate_where(x.get(v), l);
                const F e = exp2_clamped(l * scale);
                store(target + v * kLanes, ratio.numerator(e) / ratio.denominator(e));
            }
            group.scatter(out, shape, target);
        });
    });
}

// dP/dl = (n1 d0 - n0 d1) / (d0 + d1 f)^2 f (1 - f) / temperature; with f = 1 / (1 + e) that is
// (n1 d0 - n0 d1) e / (d0 (1 + e) + d1)^2 / temperature.
void flip_probability_backward(const float* grad, const void* logits, int64_t type, const uint8_t* x_t, int64_t batch,
                               int64_t rows, int64_t channels, const float* coefficients, int64_t coefficient_rows,
                               float scale, float temperature, bool x0_prediction, void* out, int threads) {
    const Shape shape{batch, rows, channels};
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_groups(shape, coefficient_rows > 1, threads, [&](const Group& group, int64_t) {
            T buffer[kGroupBits], out_buffer[kGroupBits];
            float grad_buffer[kGroupBits];
            GroupBits x;
            x.read(x_t, group);
            const T* values = group.gather(static_cast<const T*>(logits), shape, buffer);
            const float* grads = group.gather(grad, shape, grad_buffer);
            T* target = group.target(static_cast<T*>(out), shape, out_buffer);
            const Ratio ratio(coefficients, coefficient_rows, group.sample);
            const float* c = coefficients + (coefficient_rows > 1 ? 4 * group.sample : 0);
            const float factor = (c[1] * c[2] - c[0] * c[3]) / temperature;
            for (int v = 0; v < 8; ++v) {
                F l = load(values + v * kLanes);
                if (x0_prediction) l = negate_where(x.get(v), l);
                const F e = exp2_clamped(l * scale), denominator = ratio.denominator(e);
                F slope = load(grads + v * kLanes) * (factor / denominator * (e / denominator));
                if (x0_prediction) slope = negate_where(x.get(v), slope);
                store(target + v * kLanes, slope);
            }
            group.scatter(static_cast<T*>(out), shape, target);
        });
    });
}

}  // namespace bldm::BLDM_ISA
