// flip_loss and its backward: per bit weight q^gamma softplus(-m), m the margin and q = sigmoid(-m), never stored.
#include <vector>

#include "cpu/bernoulli.h"

namespace bldm::BLDM_ISA {

namespace {

constexpr float kLog2e = 0x1.715476p+0f;

// log(1 + e) for 0 <= e <= 1 with a small relative error: 2 artanh(s), s = e / (2 + e) <= 1/3.
BLDM_INLINE F log1p(F e) {
    const F s = e / (e + 2.0f), q = s * s;
    F p = splat(1.0f / 15);
    for (const float c : {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f}) p = fma(p, q, splat(c));
    return 2.0f * s * p;
}

// What the loss is made of, from the margin m.
struct Terms {
    F softplus;  // softplus(-m) = -log(1 - q)
    F q;         // sigmoid(-m)
    F focal;     // q^gamma

    BLDM_INLINE Terms(F m, float gamma) {
        const F magnitude = F(U(m) & 0x7FFFFFFFu);
        const F e = exp2_clamped(magnitude * -kLog2e), log_sum = log1p(e);
        const I positive = m > F{};
        softplus = positive ? log_sum : magnitude + log_sum;
        q = (positive ? e : splat(1.0f)) / (e + 1.0f);
        // log q = -softplus(m)
        focal = gamma == 0 ? splat(1.0f) : exp2_clamped((positive ? magnitude + log_sum : log_sum) * (-gamma * kLog2e));
    }
};

// The targets of a group: x_0 XOR x_t, or x_0 itself for an x_0 prediction.
BLDM_INLINE GroupBits targets(const uint8_t* x_0, const uint8_t* x_t, bool x0_prediction, const Group& group) {
    GroupBits target, x;
    target.read(x_0, group);
    x.read(x_t, group);
    if (!x0_prediction)
        for (int b = 0; b < kLanes; ++b) target.bytes[b] ^= x.bytes[b];
    return target;
}

// The fraction of set targets of every sample.
void count_set(const Shape& shape, const uint8_t* x_0, const uint8_t* x_t, bool x0_prediction, float* set_fraction,
               int threads) {
    const Tasks tasks(shape, true);
    std::vector<int64_t> counts(size_t(tasks.count), 0);
    for_groups(shape, true, threads, [&](const Group& group, int64_t task) {
        GroupBits target = targets(x_0, x_t, x0_prediction, group);
        target.clear_padding(shape, group);
        for (int b = 0; b < group.count; ++b) counts[size_t(task)] += __builtin_popcount(target.bytes[b]);
    });
    for (int64_t sample = 0; sample < shape.batch; ++sample) {
        int64_t set = 0;
        for (int64_t chunk = 0; chunk < tasks.chunks; ++chunk) set += counts[size_t(sample * tasks.chunks + chunk)];
        set_fraction[sample] = float(double(set) / double(shape.rows * shape.channels));
    }
}

// Weights of the set and of the other targets of a sample: 1 - r and r, r the set fraction; or 1 and 1.
BLDM_INLINE float of_set(const float* set_fraction, int64_t sample) { return set_fraction ? 1 - set_fraction[sample] : 1; }
BLDM_INLINE float of_others(const float* set_fraction, int64_t sample) { return set_fraction ? set_fraction[sample] : 1; }

}  // namespace

void flip_loss(const void* logits, int64_t type, const uint8_t* x_0, const uint8_t* x_t, int64_t batch, int64_t rows,
               int64_t channels, const float* weight, float focal_gamma, bool x0_prediction, double factor, bool total,
               float* out, float* set_fraction, int threads) {
    const Shape shape{batch, rows, channels};
    if (set_fraction) count_set(shape, x_0, x_t, x0_prediction, set_fraction, threads);
    const Tasks tasks(shape, true);
    std::vector<double> sums(size_t(tasks.count), 0.0);  // one a task, added up in order: the same for any thread count
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_groups(shape, true, threads, [&](const Group& group, int64_t task) {
            T buffer[kGroupBits];
            const GroupBits target = targets(x_0, x_t, x0_prediction, group);
            const T* values = group.gather(static_cast<const T*>(logits), shape, buffer);
            GroupBits present;
            for (int b = 0; b < kLanes; ++b) present.bytes[b] = b < group.count ? 0xFF : 0;
            present.clear_padding(shape, group);
            const F set_weight = splat(of_set(set_fraction, group.sample));
            const F other_weight = splat(of_others(set_fraction, group.sample));
            F group_sum{};
            for (int v = 0; v < 8; ++v) {
                const I set = lanes_of(target.get(v));
                const F l = load(values + v * kLanes);
                const Terms terms(set ? l : -l, focal_gamma);
                const F loss = terms.softplus * terms.focal * (set ? set_weight : other_weight);
                group_sum += F(U(loss) & U(lanes_of(present.get(v))));
            }
            sums[size_t(task)] += double(sum(group_sum));
        });
    });
    double result = 0;
    for (int64_t sample = 0; sample < batch; ++sample) {
        double loss = 0;
        for (int64_t chunk = 0; chunk < tasks.chunks; ++chunk) loss += sums[size_t(sample * tasks.chunks + chunk)];
        loss *= factor * (weight ? double(weight[sample]) : 1.0);
        if (!total) out[sample] = float(loss);
        result += loss;
    }
    if (total) *out = float(result);
}

// d / dl = -sign weight q^gamma (q + gamma (1 - q) softplus(-m)) grad
void flip_loss_backward(const float* grad, int64_t grads, const void* logits, int64_t type, const uint8_t* x_0,
                        const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels, const float* weight,
                        const float* set_fraction, float focal_gamma, bool x0_prediction, double factor, void* out,
                        int threads) {
    const Shape shape{batch, rows, channels};
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_groups(shape, true, threads, [&](const Group& group, int64_t) {
            T buffer[kGroupBits], out_buffer[kGroupBits];
            const GroupBits target = targets(x_0, x_t, x0_prediction, group);
            const T* values = group.gather(static_cast<const T*>(logits), shape, buffer);
            T* result = group.target(static_cast<T*>(out), shape, out_buffer);
            const float scale = float(factor) * grad[grads > 1 ? group.sample : 0] * (weight ? weight[group.sample] : 1);
            const F set_scale = splat(-scale * of_set(set_fraction, group.sample));
            const F other_scale = splat(scale * of_others(set_fraction, group.sample));
            for (int v = 0; v < 8; ++v) {
                const I set = lanes_of(target.get(v));
                const F l = load(values + v * kLanes);
                const Terms terms(set ? l : -l, focal_gamma);
                const F slope = terms.focal * (terms.q + focal_gamma * (1.0f - terms.q) * terms.softplus);
                store(result + v * kLanes, slope * (set ? set_scale : other_scale));
            }
            group.scatter(static_cast<T*>(out), shape, result);
        });
    });
}

}  // namespace bldm::BLDM_ISA
