// Submodule `cuda`: the launchers of kernels.h; a pointer or stream arrives as an integer.
#include "binding.h"
#include "build_info.h"  // written by setup.py
#include "cuda/kernels.h"

void register_cuda(pybind11::module_& m) {
    using namespace bldm;
    bind(m, "compute_capability", cuda::compute_capability);
    bind(m, "pack_bits", cuda::pack_bits);
    bind(m, "unpack_bits", cuda::unpack_bits);
    bind(m, "random_bits", cuda::random_bits);
    bind(m, "flip_step", cuda::flip_step);
    bind(m, "add_noise", cuda::add_noise);
    bind(m, "binarize", cuda::binarize);
    bind(m, "flip_probability", cuda::flip_probability);
    bind(m, "flip_probability_backward", cuda::flip_probability_backward);
    bind(m, "flip_loss_scratch", cuda::flip_loss_scratch);
    bind(m, "flip_loss", cuda::flip_loss);
    bind(m, "flip_loss_backward", cuda::flip_loss_backward);
    bind(m, "embed_bits", cuda::embed_bits);
    bind(m, "embed_bits_backward_scratch", cuda::embed_bits_backward_scratch);
    bind(m, "embed_bits_backward", cuda::embed_bits_backward);
    bind(m, "hamming_distance", cuda::hamming_distance);
    bind(m, "hamming_keys", cuda::hamming_keys);
    bind(m, "hamming_candidates", cuda::hamming_candidates);
    bind(m, "hamming_select", cuda::hamming_select);
#if BLDM_SM90
    bind(m, "layer_stack_counters", cuda::layer_stack_counters);
    bind(m, "layer_stack", cuda::layer_stack);
    bind(m, "attention", cuda::attention);
    bind(m, "attention_gradient", cuda::attention_gradient);
    bind(m, "read_stream", cuda::read_stream);
    bind(m, "add_to_stream", cuda::add_to_stream);
    bind(m, "attend_to_stream", cuda::attend_to_stream);
    bind(m, "moments_parts", cuda::moments_parts);
#endif
}
