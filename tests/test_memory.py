"""A sampling step on the C++ backend allocates nothing but its output, and nothing ever unpacks a batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import bldm_kernels as bk

pytestmark = pytest.mark.usefixtures("cpu_backend")
B, R, C = 8, 64, 64
PACKED_BYTES = B * R * C // 8


def allocated(call: Callable[[], object]) -> list[int]:
    """Sizes of all blocks that PyTorch's CPU allocator hands out during the call, in bytes."""
    call()  # tables and threads of the first call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in events if e.nbytes() > 0]


def arguments() -> dict[str, object]:
    return {
        "logits": torch.randn(B, R, C),
        "x_t": bk.random_bits(B, (R, C), seed=1),
        "coefficients": bk.BernoulliSchedule("linear", 16).coefficients([12, 6])[0],
        "seed": torch.tensor([1]),
        "step": torch.tensor([2]),
        "nonfinite": torch.zeros(1, dtype=torch.int32),
    }


def test_the_measure_sees_allocations() -> None:
    assert allocated(lambda: torch.empty(1000, dtype=torch.uint8)) == [1000]


@pytest.mark.parametrize("extra", ["plain", "in place", "guided", "masked", "half"])
def test_a_step_into_given_memory_allocates_nothing(extra: str) -> None:
    inputs = arguments()
    inputs["out"] = inputs["x_t"] if extra == "in place" else torch.empty_like(inputs["x_t"])  # type: ignore[call-overload]
    if extra == "guided":
        inputs |= {"uncond_logits": torch.randn(B, R, C), "guidance_scale": 2.0}
    if extra == "masked":
        inputs |= {"keep_mask": bk.random_bits(1, (R, C), seed=3)[0], "keep_bits": bk.random_bits(1, (R, C), seed=4)[0]}
    if extra == "half":
        inputs["logits"] = torch.randn(B, R, C, dtype=torch.bfloat16)
    assert allocated(lambda: bk.flip_step(**inputs)) == []  # type: ignore[arg-type]


def test_a_step_allocates_its_output_only() -> None:
    inputs = arguments()
    assert allocated(lambda: bk.flip_step(**inputs)) == [PACKED_BYTES]  # type: ignore[arg-type]
    del inputs["nonfinite"]
    assert sorted(allocated(lambda: bk.flip_step(**inputs))) == [4, PACKED_BYTES]  # type: ignore[arg-type]  # and the counter


def outputs() -> list[tuple[str, Callable[[], Tensor], int]]:
    x = bk.random_bits(B, (R, C), seed=1)
    logits, weight = torch.randn(B, R, C), torch.randn(C, 32)
    image = torch.randn(B, C, 8, 8)
    seed = torch.tensor([1])
    return [
        ("pack_bits", lambda: bk.pack_bits(logits), PACKED_BYTES),
        ("pack_bits of an image", lambda: bk.pack_bits(image, 1), PACKED_BYTES),
        ("random_bits", lambda: bk.random_bits(B, (R, C), seed=1), PACKED_BYTES),
        ("add_noise", lambda: bk.add_noise(x, torch.tensor([0.1]), seed=seed), PACKED_BYTES),
        ("binarize", lambda: bk.binarize(logits, seed=1), PACKED_BYTES),
        ("binarize of an image", lambda: bk.binarize(image, seed=1, dim=1), PACKED_BYTES),
        ("embed_bits", lambda: bk.embed_bits(x, weight), B * R * 32 * 4),
        ("flip_loss", lambda: bk.flip_loss(logits, x, x, reduction="sample"), B * 4),
        ("hamming_distance", lambda: bk.hamming_distance(x, x), B * 4),
    ]


@pytest.mark.parametrize("index", range(9), ids=[name for name, _, _ in outputs()])
def test_ops_allocate_their_output_and_no_batch_beside_it(index: int) -> None:
    """A scalar or two may come with it (a probability, range checks)."""
    _, call, expected = outputs()[index]
    sizes = allocated(call)
    assert expected in sizes
    assert sum(sizes) - expected <= 64
