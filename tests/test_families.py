"""`bldm.accelerate`: every accelerated sampler draws from the distribution of the object's own sampler.

The objects are the stand-ins of tests/standins, around fixed logits. Per-bit means (of bits, or of the probabilities that some
return) over 10^6 draws agree within five standard errors.
"""

import functools
from collections.abc import Callable
from typing import Any

import bldm
import pytest
import torch
from standins import berdiff, bigr, bld, multinomial, tabular
from torch import Tensor

NUM_DRAWS = 10**6
BITS = (2, 3)
Draw = Callable[[Any], Tensor]

MASK = {"mask": torch.tensor([[1, 0, 0], [0, 1, 0]]), "latent": torch.tensor([[1, 0, 1], [1, 0, 1]])}
FLAT_MASK = {name: value.flatten() for name, value in MASK.items()}


def paper(model: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Draw]:
    arguments = {"sample_steps": 4, "b": NUM_DRAWS, **options}
    return bld.BinaryDiffusion(**(model or {})), lambda sampler: sampler.sample(**arguments)


def head(num_timesteps: int = 12, p_flip: bool = True, **options: Any) -> tuple[Any, Draw]:
    features = torch.tensor([[0.5, -1, 0.3, 1], [0, 0.2, 0.1, -0.4]]).repeat_interleave(NUM_DRAWS, 0)
    arguments = {"sample_steps": 4, "cond": features, "cfg_scale": 2.5, "return_logits": True, **options}
    return bigr.BinaryDiffusion(p_flip, num_timesteps), lambda sampler: sampler.sample(**arguments)


def medical(kind: str, method: str, schedule: str = "cosine", steps: int = 4, **options: Any) -> tuple[Any, Draw]:
    uses = {name: options.pop(name) for name in ("rescale", "use_timesteps") if name in options}
    diffusion = berdiff.BinomialDiffusion(berdiff.beta_table(schedule, steps), kind, **uses)
    model = berdiff.Model()
    return diffusion, lambda sampler: getattr(sampler, method)(model, (NUM_DRAWS, 1, *BITS), **options)


def anomaly(kind: str = "EPSILON", level: int = 4, **options: Any) -> tuple[Any, Draw]:
    diffusion = berdiff.AnomalyDiffusion(berdiff.beta_table("cosine2", 6), kind)
    model = berdiff.Model()
    image = torch.tensor([[[1.0, 0, 1], [0, 0, 1]]]).expand(NUM_DRAWS, 1, *BITS)

    def draw(sampler: Any) -> Tensor:
        arguments = {"img": image, "noise_level": level, "prob_threshold": 0.6, **options}
        sample, mask = sampler.ddim_sample_loop_anomaly(model, (NUM_DRAWS, 1, *BITS), **arguments)
        return torch.stack([sample, mask], 1)

    return diffusion, draw


def table(target: str = "two_way", schedule: str = "linear", **options: Any) -> tuple[Any, Draw]:
    return tabular.BinaryDiffusion1D(target, schedule), lambda sampler: sampler.sample(n=NUM_DRAWS, **options)


def classes(shape: tuple[int, ...] = BITS, parametrization: str = "x0") -> tuple[Any, Draw]:
    diffusion = multinomial.MultinomialDiffusion(2, shape, parametrization=parametrization)
    return diffusion, lambda sampler: sampler.sample(NUM_DRAWS)


ONE_HOT = torch.tensor([0.0, 1, 0]).expand(NUM_DRAWS, 3)
IMAGE = torch.tensor([[[2.0, -1, 0], [0, 1, 1]]]).expand(NUM_DRAWS, 1, *BITS)
CASES: dict[str, Callable[[], tuple[Any, Draw]]] = {
    "bld": paper,
    "bld every step": lambda: paper({"num_timesteps": 6}, sample_steps=6),
    "bld one step": lambda: paper(sample_steps=1),
    "bld cosine": lambda: paper({"kind": "cos"}, sample_steps=5),
    "bld sigmoid": lambda: paper({"kind": "sigmoid"}, sample_steps=5),
    "bld x_0": lambda: paper({"p_flip": False}, temp=1.6),
    "bld temperature": lambda: paper(temp=0.7),
    "bld label": lambda: paper({"dataset": "imagenet"}, label=100),
    "bld own labels": lambda: paper({"dataset": "imagenet"}),
    "bld guidance": lambda: paper({"dataset": "imagenet"}, label=200, guidance=1.5, temp=0.9),
    "bld laion": lambda: paper({"dataset": "laion"}, label=torch.full((NUM_DRAWS,), 100), guidance=0.5),
    "bld mask": lambda: paper(mask=MASK),
    "bld mask x_0": lambda: paper({"p_flip": False, "dataset": "imagenet"}, mask=MASK, label=0, guidance=0.5),
    "bigr": head,
    "bigr every step": lambda: head(6, sample_steps=6),
    "bigr x_0": lambda: head(p_flip=False, temp=1.3),
    "bigr bits": lambda: head(return_logits=False, cfg_scale=1.0),
    "bigr mask": lambda: head(mask=FLAT_MASK, temp=0.8),
    "berdiff x_0": lambda: medical("START_X", "p_sample_loop"),
    "berdiff flips": lambda: medical("EPSILON", "p_sample_loop", "cosine2"),
    "berdiff previous": lambda: medical("PREVIOUS_X", "p_sample_loop"),
    "berdiff ddim": lambda: medical("EPSILON", "ddim_sample_loop", "alpha_bar_linear"),
    "berdiff ddim x_0": lambda: medical("START_X", "ddim_sample_loop", "cosine2"),
    "berdiff image": lambda: medical("EPSILON", "ddim_sample_loop", model_kwargs={"img": IMAGE}),
    "berdiff respaced": lambda: medical("EPSILON", "p_sample_loop", "linear", 24, use_timesteps=range(0, 24, 6)),
    "berdiff rescaled": lambda: medical("EPSILON", "ddim_sample_loop", "linear", 24, use_timesteps=(0, 3, 11, 19), rescale=True),
    "berdiff noise": lambda: medical("START_X", "p_sample_loop", noise=(IMAGE > 0).float()),
    "berdiff denoised": lambda: medical("START_X", "p_sample_loop", denoised_fn=lambda p: p.clamp(0.3, 1.0)),
    "anomaly": anomaly,
    "anomaly x_0": lambda: anomaly("START_X", 5, prob_threshold=0.8),
    "anomaly mask": lambda: anomaly(mask=(IMAGE > 1).float()),
    "tabular target": table,
    "tabular mask": lambda: table(strategy="mask"),
    "tabular half": lambda: table(strategy="half-half"),
    "tabular one target": lambda: table("target", "quad"),
    "tabular one mask": lambda: table("mask", "sigmoid", threshold=0.4),
    "tabular stride": lambda: table(timesteps=range(0, 5, 2), threshold=0.6, strategy="mask"),
    "tabular label": lambda: table(y=ONE_HOT),
    "tabular guidance": lambda: table(y=ONE_HOT, model_fn=functools.partial(tabular.guided, scale=1.8)),
    "multinomial": classes,
    "multinomial direct": lambda: classes(parametrization="direct"),
    "multinomial flat": lambda: classes((6,)),
}


@pytest.mark.parametrize("name", CASES)
def test_marginals_are_those_of_the_objects_own_sampler(name: str) -> None:
    original, draw = CASES[name]()
    torch.manual_seed(1)
    expected = draw(original)
    torch.manual_seed(2)
    got = draw(bldm.accelerate(original))
    assert got.shape == expected.shape and got.dtype == expected.dtype
    expected, got = expected.flatten(1).double(), got.flatten(1).double()
    error = ((expected.var(0) + got.var(0)) / NUM_DRAWS).sqrt()
    assert ((expected.mean(0) - got.mean(0)).abs() <= 5 * error + 1e-6).all(), (expected.mean(0), got.mean(0), error)
    assert ((got.mean(0) > 0.001) & (got.mean(0) < 0.999)).any(), "a test of certain bits tests nothing"
