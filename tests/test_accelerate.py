"""Accelerated objects of other code bases: what stays the object's own, shapes, seeds, wrong arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any

import bldm
import pytest
import torch
from standins import berdiff, bigr, bld, multinomial, tabular


def test_everything_else_is_the_objects_own() -> None:
    model = bld.BinaryDiffusion(dataset="imagenet")
    fast = bldm.accelerate(model)
    assert fast.model is model and fast.scheduler is model.scheduler and fast.eval() is model
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = fast.nothing_of_the_kind


def test_torchs_generator_decides() -> None:
    fast = bldm.accelerate(bld.BinaryDiffusion())
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(fast.sample(sample_steps=4, b=50))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(fast.sample(sample_steps=4, b=50), draws[2])


def test_all_states_and_default_shapes() -> None:
    model = bld.BinaryDiffusion()
    states = bldm.accelerate(model).sample(sample_steps=4, b=7, return_all=True)
    assert states.shape == model.sample(sample_steps=4, b=7, return_all=True).shape == (35, 2, 3)
    assert bldm.accelerate(model).sample().shape == (5, 2, 3)  # every timestep, five samples
    head = bldm.accelerate(bigr.BinaryDiffusion())
    bits, nothing = head.sample(sample_steps=3, cond=torch.zeros(8, 4), cfg_scale=2.0, return_all=True)
    assert bits.shape == (16, 6) and nothing is None
    chain = bldm.accelerate(multinomial.MultinomialDiffusion()).sample_chain(5)
    assert chain.shape == (4, 5, 2, 3) and chain.dtype == torch.int64


def test_a_partial_made_anew_is_the_same_function() -> None:
    fast = bldm.accelerate(tabular.BinaryDiffusion1D())
    y = torch.zeros(3, 3)
    for _ in range(3):
        fast.sample(n=3, y=y, model_fn=partial(tabular.guided, scale=1.5))
    assert len(fast.samplers) == 1
    for scale in range(9):
        fast.sample(n=3, y=y, model_fn=partial(tabular.guided, scale=scale))
    assert len(fast.samplers) == fast.SAMPLERS


# --- wrong arguments ---------------------------------------------------------------------------------------------------
def unpacked() -> Any:
    return bld.BinaryDiffusion()


def medical(kind: str) -> Any:
    return bldm.accelerate(berdiff.BinomialDiffusion(berdiff.beta_table("cosine", 8), kind))


Row = tuple[Callable[[], Any], type[Exception], str]
WRONG: list[Row] = [
    (
        lambda: bldm.accelerate(torch.nn.Linear(2, 2)),
        TypeError,
        "model: Linear is no sampler of a known code base.*(?s:.)*prediction=",
    ),
    (lambda: bldm.accelerate("model.th"), TypeError, "model: str is no sampler"),
    (lambda: bldm.accelerate(unpacked()).sample(sample_steps=99), ValueError, "steps: expected 1 <= steps <= 12, got 99"),
    (lambda: bldm.accelerate(unpacked()).sample(temp=0), ValueError, "temperature: expected > 0, got 0"),
    (
        lambda: bldm.accelerate(unpacked()).sample(guidance=1.0),
        ValueError,
        "guidance: 1.0 needs a condition, but the data set 'churches'",
    ),
    (
        lambda: bldm.accelerate(unpacked()).sample(label=3),
        ValueError,
        "label: 3 needs a condition, but the data set 'churches' has none",
    ),
    (
        lambda: bldm.accelerate(bld.BinaryDiffusion(dataset="laion")).sample(guidance=1.0),
        ValueError,
        "guidance_scale: 1.0 needs a condition",
    ),
    (
        lambda: bldm.accelerate(unpacked()).sample(mask={"mask": torch.zeros(3, 3), "latent": torch.zeros(2, 3)}),
        ValueError,
        r"mask\['mask'\]: expected shape \(2, 3\), or one that expands to it, got \(3, 3\)",
    ),
    (lambda: bldm.accelerate(unpacked()).sample(mask={"mask": torch.zeros(2, 3)}), ValueError, "mask: .* got no 'latent'"),
    (
        lambda: bldm.accelerate(unpacked()).sample(mask={"mask": torch.full((2, 3), 0.5), "latent": torch.zeros(2, 3)}),
        ValueError,
        r"mask\['mask'\]: expected zeros and ones only",
    ),
    (
        lambda: bldm.accelerate(bigr.BinaryDiffusion()).sample(cfg_scale=2.0),
        ValueError,
        "cond: expected conditional and .* got None",
    ),
    (lambda: bldm.accelerate(bigr.BinaryDiffusion()).sample(cond=torch.zeros(4, 4)), ValueError, "cfg_scale: .*, got None"),
    (
        lambda: bldm.accelerate(bigr.BinaryDiffusion()).sample(cond=torch.zeros(3, 4), cfg_scale=2.0),
        ValueError,
        r"cond: expected .* as many of each, got \(3, 4\)",
    ),
    (
        lambda: medical("PREVIOUS_X").ddim_sample_loop(berdiff.Model(), (2, 1, 2, 3)),
        ValueError,
        "model_mean_type: PREVIOUS_X cannot be sampled under the rule 'ddim'",
    ),
    (
        lambda: medical("EPSILON").p_sample_loop(berdiff.Model(), (2, 1, 2, 3), noise=torch.zeros(1)),
        ValueError,
        "noise: expected shape",
    ),
    (
        lambda: bldm.accelerate(berdiff.AnomalyDiffusion(berdiff.beta_table("cosine", 8), "EPSILON")).ddim_sample_loop_anomaly(
            berdiff.Model(), (2, 1, 2, 3), torch.zeros(2, 1, 2, 3), noise_level=8
        ),
        ValueError,
        "noise_level: expected 1 <= noise_level <= 7, got 8",
    ),
    (lambda: bldm.accelerate(tabular.BinaryDiffusion1D()).sample(n=2, strategy="best"), ValueError, "strategy: expected one of"),
    (
        lambda: bldm.accelerate(tabular.BinaryDiffusion1D()).sample(n=2, threshold=1.0),
        ValueError,
        "threshold: expected between 0 and 1",
    ),
    (lambda: bldm.accelerate(multinomial.MultinomialDiffusion(3)), ValueError, "num_classes: only two classes are bits, got 3"),
]


@pytest.mark.parametrize("call, error, message", [pytest.param(*row, id=row[2][:60]) for row in WRONG])
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error
