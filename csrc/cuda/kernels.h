// Every CUDA kernel, as its host launcher. The launchers allocate nothing, never synchronise and throw
// std::runtime_error when a launch fails, so all of them can be captured in a graph.
//
// B samples, R rows a sample, C bits (channels) a row, P = ceil(C / 8) packed bytes a row; tensors are contiguous:
// logits (B, R, C), packed (B, R, P), coefficients (1 or B, 4). A null pointer is an absent argument. Where there is a
// pair (seed, seed_pointer), the device value counts if there is one.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as in the CUDA headers, which the bindings do without

namespace bldm::cuda {

// 10 major + minor of a device; makes no context there.
int64_t compute_capability(int device);

// The floating types of logits and weights, as Python passes them.
enum FloatType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// x (outer, C, inner), items of 1, 2, 4 or 8 bytes -> out (outer, inner, P). Of a float the sign bit does not count.
void pack_bits(const void* x, int64_t item_bytes, bool is_float, int64_t outer, int64_t channels, int64_t inner,
               uint8_t* out, int device, cudaStream_t stream);
// packed (outer, inner, P) -> out (outer, C, inner); `one` is the bit pattern of a 1 of the item type.
void unpack_bits(const uint8_t* packed, int64_t outer, int64_t channels, int64_t inner, int64_t item_bytes,
                 uint64_t one, void* out, int device, cudaStream_t stream);
void random_bits(uint8_t* out, int64_t batch, int64_t rows, int64_t channels, int64_t seed, const int64_t* seed_pointer,
                 int64_t sample_offset, int device, cudaStream_t stream);

// scale = -log2(e) / temperature. Adds the number of non-finite logits to *nonfinite. out may be x_t.
// keep_mask and keep_bits have keep_mask_samples and keep_bits_samples samples, 1 or B.
void flip_step(const void* logits, int64_t type, const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels,
               const float* coefficients, int64_t coefficient_rows, int64_t seed, const int64_t* seed_pointer,
               int64_t step, const int64_t* step_pointer, int64_t sample_offset, const int64_t* sample_offset_pointer,
               float scale, bool x0_prediction, const void* uncond_logits, float guidance_scale,
               const float* guidance_scale_pointer, const uint8_t* keep_mask, int64_t keep_mask_samples,
               const uint8_t* keep_bits, int64_t keep_bits_samples, int32_t* nonfinite, uint8_t* out, int device,
               cudaStream_t stream);
// flip_probability has `probabilities` elements, 1 or B.
void add_noise(const uint8_t* x_0, int64_t batch, int64_t rows, int64_t channels, const float* flip_probability,
               int64_t probabilities, int64_t seed, const int64_t* seed_pointer, int64_t step,
               const int64_t* step_pointer, int64_t sample_offset, uint8_t* out, int device, cudaStream_t stream);
// logits (B, outer, C, inner) -> out (B, outer inner, P).
void binarize(const void* logits, int64_t type, int64_t batch, int64_t outer, int64_t channels, int64_t inner,
              bool bernoulli, int64_t seed, const int64_t* seed_pointer, int64_t step, const int64_t* step_pointer,
              int64_t sample_offset, uint8_t* out, int device, cudaStream_t stream);

void flip_probability(const void* logits, int64_t type, const uint8_t* x_t, int64_t batch, int64_t rows,
                      int64_t channels, const float* coefficients, int64_t coefficient_rows, float scale,
                      bool x0_prediction, float* out, int device, cudaStream_t stream);
void flip_probability_backward(const float* grad, const void* logits, int64_t type, const uint8_t* x_t, int64_t batch,
                               int64_t rows, int64_t channels, const float* coefficients, int64_t coefficient_rows,
                               float scale, float temperature, bool x0_prediction, void* out, int device,
                               cudaStream_t stream);

// Floats of scratch memory that flip_loss needs.
int64_t flip_loss_scratch(int64_t batch, int64_t rows, int64_t channels);
// The sum over a sample's bits times factor and, unless it is null, weight (B,): out (B,), or with `total` the sum of
// these, out (1,). Class-balanced if set_fraction (B,) is given, which receives the fraction of set targets.
void flip_loss(const void* logits, int64_t type, const uint8_t* x_0, const uint8_t* x_t, int64_t batch, int64_t rows,
               int64_t channels, const float* weight, float focal_gamma, bool x0_prediction, float factor, bool total,
               float* scratch, float* out, float* set_fraction, int device, cudaStream_t stream);
// grad has `grads` elements, 1 or B; set_fraction as flip_loss left it.
void flip_loss_backward(const float* grad, int64_t grads, const void* logits, int64_t type, const uint8_t* x_0,
                        const uint8_t* x_t, int64_t batch, int64_t rows, int64_t channels, const float* weight,
                        const float* set_fraction, float focal_gamma, bool x0_prediction, float factor, void* out,
                        int device, cudaStream_t stream);

// packed (M, P), weight (C, D), bias (D,) or null -> out (M, D).
void embed_bits(const uint8_t* packed, const void* weight, int64_t type, const void* bias, int64_t rows,
                int64_t channels, int64_t columns, bool is_signed, void* out, int device, cudaStream_t stream);
// Floats of scratch memory that embed_bits_backward needs.
int64_t embed_bits_backward_scratch(int64_t rows, int64_t channels, int64_t columns);
// grad (M, D), packed (M, P) -> out (C, D).
void embed_bits_backward(const void* grad, int64_t type, const uint8_t* packed, int64_t rows, int64_t channels,
                         int64_t columns, bool is_signed, float* scratch, void* out, int device, cudaStream_t stream);

// a (B, n), b (B or 1, n) -> out (B,).
void hamming_distance(const uint8_t* a, const uint8_t* b, int64_t batch, int64_t b_samples, int64_t bytes, int32_t* out,
                      int device, cudaStream_t stream);
// Few queries (Q, n), database (M, n) -> keys (Q, M): distance 2^32 + index, which order as (distance, index) do.
void hamming_keys(const uint8_t* queries, const uint8_t* database, int64_t num_queries, int64_t num_samples,
                  int64_t bytes, int64_t* keys, int device, cudaStream_t stream);

// The search of backends/search.py: rows (M, n), query_bits (Q,) the set bits of queries (Q, n), keys (Q, capacity),
// counts and limits (Q,). Rows begin and end at multiples of 16 bytes.
void hamming_candidates(const uint8_t* queries, const uint8_t* rows, const uint32_t* query_bits,
                        int64_t num_queries, int64_t num_rows, int64_t bytes, int64_t first_row, int64_t* keys,
                        int64_t capacity, uint32_t* counts, const uint32_t* limits, int device, cudaStream_t stream);
void hamming_select(int64_t* keys, int64_t num_queries, int64_t capacity, int64_t k, int64_t max_distance,
                    uint32_t* counts, uint32_t* limits, int device, cudaStream_t stream);

// 32-bit counters that layer_stack needs; 0 at first, and 0 again behind every launch.
int64_t layer_stack_counters(int64_t rows, int64_t layers);
// All layers of a transformer of width 768 with 12 heads, on the residual stream h, bfloat16 (rows, 768), in place. stream,
// qkv, mixed and inner are scratch memory of 768, 4608, 768 and 3072 bytes a row, for rows rounded up to a multiple of 56,
// and moments of 24 float32 a row. Weights (e4m3) and vectors as inference/layer_stack.py lays them out. rows are whole samples of
// `tokens`, 320 at most. times: clocks of a block, (layers, 5, 5), or null. Only for compute capability 9.0.
void layer_stack(void* h, uint8_t* stream, uint8_t* qkv, uint8_t* mixed, uint8_t* inner, float* moments,
                 const uint8_t* weights, const float* vectors, uint32_t* counters, int64_t rows, int64_t tokens,
                 int64_t layers, float eps, int64_t* times, int device, cudaStream_t cuda_stream);

// The products of layers with the residual stream h, bfloat16 (rows, width), weights (columns, depth) with rows as
// inference/stream.py orders them; both operands bfloat16, or (low) e4m3. Columns are a multiple of 32; bias (columns,) is
// float32. early: as in `attention`, but weights, vectors and scales are read before. Only for compute capability 9.0.
//
// out = LayerNorm(h) W^T + bias, or GELU of it, from the stream as it is: h, or (low) h / stream_scale. moments: of h, float32 (parts,
// rows, 2), parts of the sum and the sum of squares. The rows of W add up to 0. out is bfloat16, or behind GELU and low e4m3, divided by
// out_scale.
void read_stream(const void* stream, const void* weights, bool low, int64_t rows, int64_t columns, int64_t depth,
                 const float* stream_scale, const float* weight_scale, const float* bias, const float* moments, int64_t parts,
                 float eps, bool gelu, const float* out_scale, void* out, bool early, int device,
                 cudaStream_t cuda_stream);
// h += x W^T + bias, and what the next one reads, unless moments is null: moments (moments_parts, rows, 2) of the new h, and (low)
// that divided by stream_scale, in e4m3.
void add_to_stream(const void* x, const void* weights, bool low, int64_t rows, int64_t columns, int64_t depth,
                   const float* input_scale, const float* weight_scale, const float* bias, void* h, const float* stream_scale,
                   float* moments, uint8_t* stream, bool early, int device, cudaStream_t cuda_stream);
// The attention of heads of width 64 of (samples, tokens) rows of the stream, read as read_stream reads it with weights (3 heads 64,
// depth) and their bias: out (samples, tokens, heads 64) as `attention` writes it of that. 256 to 264 tokens, an even number of heads,
// k of multiples of 384 bytes.
void attend_to_stream(const void* stream, const void* weights, bool low, int64_t samples, int64_t tokens, int64_t heads,
                      int64_t depth, const float* stream_scale, const float* weight_scale, const float* bias, const float* moments,
                      int64_t parts, float eps, const float* out_scale, void* out, bool early, int device,
                      cudaStream_t cuda_stream);
// In how many parts those moments come.
int64_t moments_parts(int64_t rows, int64_t columns, int64_t depth, bool low, int device);

// softmax(q k^T / 8) v of all heads of width 64: qkv (samples, tokens, 3 heads 64) in bfloat16, 256 to 272 tokens -> out (samples,
// tokens, heads 64) in bfloat16, or with out_scale, one float32, e4m3 of the result divided by it. log_sums: float32 (samples, heads,
// tokens), logarithms of the sums of exponentials, or null. early: it may start before the kernel in front of it ends.
// Only for compute capability 9.0.
void attention(const void* qkv, int64_t samples, int64_t tokens, int64_t heads, const float* out_scale, void* out, float* log_sums,
               bool early, int device, cudaStream_t stream);

// Its gradient: of `grad`, by out, and the log_sums that came with it, in the layout of qkv, and of every sample its sum over the
// tokens, which are 256 to 260; all of them contiguous.
void attention_gradient(const void* qkv, const void* grad, const void* out, const float* log_sums, int64_t samples, int64_t tokens,
                        int64_t heads, void* result, float* sums, int device, cudaStream_t stream);

}  // namespace bldm::cuda
