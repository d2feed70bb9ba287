// Every CPU kernel. Each file of this folder is compiled once per instruction set, into namespace bldm::<isa>; bindings.cpp
// chooses one table when the module is loaded.
//
// B samples, R rows a sample, C bits (channels) a row, P = ceil(C / 8) packed bytes a row; tensors are contiguous:
// logits (B, R, C), packed (B, R, P), coefficients (1 or B, 4). A null pointer is an absent argument.
#pragma once

#include <cstdint>

namespace bldm {

// The floating types of logits and weights, as Python passes them.
enum FloatType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// In the order of BLDM_KERNELS below.
struct Kernels {
    // x (outer, C, inner), items of 1, 2, 4 or 8 bytes -> out (outer, inner, P). Of a float the sign bit does not count.
    void (*pack_bits)(const void* x, int64_t item_bytes, bool is_float, int64_t outer, int64_t channels, int64_t inner,
                      uint8_t* out, int threads);
    // packed (outer, inner, P) -> out (outer, C, inner); `one` is the bit pattern of a 1 of the item type.
    void (*unpack_bits)(const uint8_t* packed, int64_t outer, int64_t channels, int64_t inner, int64_t item_bytes,
                        uint64_t one, void* out, int threads);
    void (*random_bits)(uint8_t* out, int64_t batch, int64_t rows, int64_t channels, int64_t seed, int64_t sample_offset,
                        int threads);

    // scale = -log2(e) / temperature. Adds the number of non-finite logits to *nonfinite. out may be x_t.
    // keep_mask and keep_bits have keep_mask_samples and keep_bits_samples samples, 1 or B.
    void (*flip_step)(const void* logits, int64_t type, const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels,
                      const float* coefficients, int64_t coefficient_rows, int64_t seed, int64_t step,
                      int64_t sample_offset, float scale, bool x0_prediction, const void* uncond_logits,
                      float guidance_scale, const uint8_t* keep_mask, int64_t keep_mask_samples,
                      const uint8_t* keep_bits, int64_t keep_bits_samples, int32_t* nonfinite, uint8_t* out, int threads);
    // flip_probability has `probabilities` elements, 1 or B.
    void (*add_noise)(const uint8_t* x_0, int64_t batch, int64_t rows, int64_t channels, const float* flip_probability,
                      int64_t probabilities, int64_t seed, int64_t step, int64_t sample_offset, uint8_t* out, int threads);
    // logits (B, outer, C, inner) -> out (B, outer inner, P).
    void (*binarize)(const void* logits, int64_t type, int64_t batch, int64_t outer, int64_t channels, int64_t inner,
                     bool bernoulli, int64_t seed, int64_t step, int64_t sample_offset, uint8_t* out, int threads);

    void (*flip_probability)(const void* logits, int64_t type, const uint8_t* x_t, int64_t batch, int64_t rows,
                             int64_t channels, const float* coefficients, int64_t coefficient_rows, float scale,
                             bool x0_prediction, float* out, int threads);
    void (*flip_probability_backward)(const float* grad, const void* logits, int64_t type, const uint8_t* x_t,
                                      int64_t batch, int64_t rows, int64_t channels, const float* coefficients,
                                      int64_t coefficient_rows, float scale, float temperature, bool x0_prediction,
                                      void* out, int threads);

    // As the CUDA kernels of the same names (cuda/kernels.h); a weight or set_fraction may be null.
    void (*flip_loss)(const void* logits, int64_t type, const uint8_t* x_0, const uint8_t* x_t, int64_t batch,
                      int64_t rows, int64_t channels, const float* weight, float focal_gamma, bool x0_prediction,
                      double factor, bool total, float* out, float* set_fraction, int threads);
    void (*flip_loss_backward)(const float* grad, int64_t grads, const void* logits, int64_t type, const uint8_t* x_0,
                               const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels, const float* weight,
                               const float* set_fraction, float focal_gamma, bool x0_prediction, double factor,
                               void* out, int threads);

    // packed (M, P), weight (C, D), bias (D,) or null -> out (M, D).
    void (*embed_bits)(const uint8_t* packed, const void* weight, int64_t type, const void* bias, int64_t rows,
                       int64_t channels, int64_t columns, bool is_signed, void* out, int threads);
    // grad (M, D), packed (M, P) -> out (C, D).
    void (*embed_bits_backward)(const void* grad, int64_t type, const uint8_t* packed, int64_t rows, int64_t channels,
                                int64_t columns, bool is_signed, void* out, int threads);

    // a (B, n), b (B or 1, n) -> out (B,).
    void (*hamming_distance)(const uint8_t* a, const uint8_t* b, int64_t batch, int64_t b_samples, int64_t bytes,
                             int32_t* out, int threads);
    // queries (Q, n), database (M, n) -> distances, indices (Q, k).
    void (*hamming_topk)(const uint8_t* queries, const uint8_t* database, int64_t num_queries, int64_t num_samples,
                         int64_t bytes, int64_t k, int32_t* distances, int64_t* indices, int threads);
};

#define BLDM_KERNELS(apply)                                                                                          \
    apply(pack_bits) apply(unpack_bits) apply(random_bits) apply(flip_step) apply(add_noise) apply(binarize)         \
    apply(flip_probability) apply(flip_probability_backward) apply(flip_loss) apply(flip_loss_backward)              \
    apply(embed_bits) apply(embed_bits_backward) apply(hamming_distance) apply(hamming_topk)

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace bldm
