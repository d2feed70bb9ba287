"""Backend `triton`: kernels compiled just in time on a GPU, or interpreted on a CPU under TRITON_INTERPRET=1."""

import torch

from ...dispatch import Backend


def load() -> Backend:
    try:
        import triton
    except ImportError as error:
        return Backend("triton", ("cuda",), f"triton cannot be imported ({error})")
    interpreted = triton.knobs.runtime.interpret
    if not interpreted and not torch.cuda.is_available():
        return Backend("triton", ("cuda",), "no GPU (TRITON_INTERPRET=1 interprets the kernels on a CPU)")

    from . import binarize, bits, embed, flip_step, hamming, loss, probability

    functions = (
        bits.pack_bits,
        bits.unpack_bits,
        bits.random_bits,
        flip_step.flip_step,
        flip_step.add_noise,
        binarize.binarize,
        probability.flip_probability,
        probability.flip_probability_backward,
        loss.flip_loss,
        loss.flip_loss_backward,
        embed.embed_bits,
        embed.embed_bits_backward,
        hamming.hamming_distance,
        hamming.hamming_topk,
    )
    how = "interpreted (TRITON_INTERPRET=1)" if interpreted else "compiled just in time"
    devices = ("cpu", "cuda") if interpreted else ("cuda",)
    return Backend("triton", devices, None, {f.__name__: f for f in functions}, f"Triton {triton.__version__}, {how}")
