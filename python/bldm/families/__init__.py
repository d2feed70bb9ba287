"""`bldm.accelerate`: live objects of other code bases, sampled fast. One file a code base."""

from collections.abc import Mapping
from typing import Any

import torch

from .anomaly_berdiff import AcceleratedAnomalyBerDiff
from .base import Accelerated
from .berdiff import AcceleratedBerDiff
from .bigr import AcceleratedBiGR
from .bld import AcceleratedBLD
from .multinomial import AcceleratedMultinomial
from .tabular import AcceleratedTabular

# The more particular first: the first that recognises an object takes it.
FAMILIES: tuple[Any, ...] = (
    AcceleratedBLD,
    AcceleratedBiGR,
    AcceleratedAnomalyBerDiff,
    AcceleratedBerDiff,
    AcceleratedTabular,
    AcceleratedMultinomial,
)


def accelerate(
    model: object,
    *,
    autocast: torch.dtype | None = None,
    compile: bool | Mapping[str, Any] = False,
    graph: bool = True,
    max_graphs: int = 8,
) -> Any:
    """An object like `model`, of another code base, whose sampling methods draw from the same distribution, faster.

    The model is recognised by its attributes and its method's parameters, and is neither changed nor copied. The sampling methods
    keep their signatures and return values; every other attribute is the model's own.

    Args:
        model: a live object: the samplers of ZeWang95/BinaryLatentDiffusion, haoosz/BiGR, takimailto/BerDiff,
            JuliaWolleb/Anomaly_berdiff, vkinakh/binary-diffusion-tabular, ehoogeboom/multinomial_diffusion (two classes).
        autocast, compile, graph, max_graphs: as in `FastSampler`.

    Raises: TypeError, saying what to give `FastSampler` instead, for an object that none of them is.
    """
    for family in FAMILIES:
        if family.recognises(model):
            return family(model, autocast=autocast, compile=compile, graph=graph, max_graphs=max_graphs)
    raise TypeError(
        f"model: {type(model).__name__} is no sampler of a known code base. Describe it to FastSampler instead:\n"
        "    bldm.FastSampler(denoiser, schedule, latent_shape=..., ...).sample(num_samples, steps)\n"
        "  denoiser      the network, or a function; `call=` says which argument goes where\n"
        "  schedule      bldm_kernels.BernoulliSchedule(kind, T), or .from_keep(table of k_0..k_T)\n"
        "  latent_shape  bits of one sample, for example (256, 64)\n"
        "  prediction=   'flip' or 'x_0': what its logits are of; `output=` if it answers something else\n"
        "  time_label=   't', 't-1' or a function: what it is told of the time\n"
        "  state=        'bits', 'signs' or 'packed': what it is given; `layout=` the order of dimensions\n"
        "  rule=, final= the reverse step and the last one\n"
        "See docs/sampling.md; python/bldm/families/ holds six examples of about fifty lines."
    )


__all__ = ["FAMILIES", "Accelerated", "accelerate"]
