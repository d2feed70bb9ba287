"""flip_step on more bytes than a GPU holds threads for: kernels go over the bytes in turns there, which small cases never do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import require_backend, require_gpu
from torch import Tensor

import bldm_kernels as bk

# Samples of whole turns (64 bytes), of whole bytes only, and with padding bits; the last are many and tiny.
SHAPES = [(96, 1000, 64), (100, 900, 72), (100, 900, 70), (300_000, 1, 24)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "x_0": {"prediction": "x_0", "temperature": 0.7},
    "guided": {"guided": True},
    "per sample": {"per_sample": True, "rule": "marginal"},
    "threshold": {"rule": "threshold"},
    "kept": {"kept": True},
    "all": {"prediction": "x_0", "guided": True, "per_sample": True, "kept": True},
}


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    require_gpu()
    require_backend(request.param)
    yield request.param


def arguments(shape: tuple[int, int, int], dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(5)
    batch, rows, channels = shape

    def logits() -> Tensor:
        return (torch.randn(shape, device="cuda", generator=generator) * 3).to(dtype)

    def bits(samples: int) -> Tensor:
        values = torch.rand((samples, rows, channels), device="cuda", generator=generator) < 0.5
        return bk.reference.pack_bits(values)

    schedule = bk.BernoulliSchedule("cosine", 64)
    rows_of_four = schedule.coefficients([40, 12, 3], options.get("rule", "plugin"), options.get("rule", "plugin"))
    index = torch.arange(batch) % 3 if options.get("per_sample") else torch.tensor([0])
    found: dict[str, Any] = {"logits": logits(), "x_t": bits(batch), "coefficients": rows_of_four[index].cuda()}
    found |= {"seed": torch.tensor([7], device="cuda"), "step": 3, "sample_offset": 2**33}
    found |= {name: options[name] for name in ("prediction", "temperature") if name in options}
    if options.get("guided"):
        found |= {"uncond_logits": logits(), "guidance_scale": 1.5}
    if options.get("kept"):
        found |= {"keep_mask": bits(1)[0], "keep_bits": bits(batch)}
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(backend: str, shape: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
    given = arguments(shape, dtype, OPTIONS[name])
    with bk.use_backend(backend):
        got = bk.flip_step(**given)
        in_place = bk.flip_step(**{**given, "x_t": (x := given["x_t"].clone())}, out=x)
    with bk.use_backend("torch"):
        expected = bk.flip_step(**given)
    assert torch.equal(got, expected), f"{int((got != expected).sum())} of {got.numel()} bytes differ"
    assert torch.equal(in_place, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nonfinite_logits_are_counted(backend: str, shape: tuple[int, int, int], guided: bool, dtype: torch.dtype) -> None:
    given = arguments(shape, dtype, {"guided": guided})
    flat = given["logits"].view(-1)
    places = torch.randperm(flat.numel(), device="cuda")[:1000]
    flat[places] = torch.tensor([torch.nan, torch.inf, -torch.inf], device="cuda").repeat(334)[:1000].to(dtype)
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    with bk.use_backend(backend):
        bk.flip_step(**given, nonfinite=counter)
    assert int(counter) == 1000
