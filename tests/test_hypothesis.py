"""Any shape, dimension and dtype: packing against numpy.packbits, distances against numpy, one step against the reference."""

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bldm_kernels as bk

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
SHAPES = st.lists(st.integers(0, 11), min_size=1, max_size=4).map(tuple)
# `cpu_backend` holds for all examples of a test, as it should.
quickly = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tensors(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = SHAPES) -> Tensor:
    """A tensor of any dtype and memory order with about half zeros."""
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-3, 4, shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.6)
    order = draw(st.permutations(range(len(shape))))
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    x = values.to(draw(st.sampled_from(DTYPES))).permute(*order).contiguous().permute(*inverse)
    assert x.shape == shape
    return x


def numpy_packed(x: Tensor, dim: int) -> np.ndarray:
    moved = (x != 0).movedim(dim, -1).numpy()
    return np.packbits(moved, axis=-1, bitorder="little")


def check_pack_and_unpack(x: Tensor, data: st.DataObject) -> None:
    dim = data.draw(st.integers(-x.dim(), x.dim() - 1), label="dim")
    packed = bk.pack_bits(x, dim)
    expected = numpy_packed(x, dim)
    assert packed.shape == expected.shape and packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), expected)
    back = bk.unpack_bits(packed, x.shape[dim], x.dtype, dim=dim)
    assert back.dtype == x.dtype
    assert torch.equal(back, (x != 0).to(x.dtype))


@quickly
@given(tensors(), st.data())
def test_pack_and_unpack(cpu_backend: None, x: Tensor, data: st.DataObject) -> None:
    check_pack_and_unpack(x, data)


@quickly
@given(tensors(), st.data())
def test_pack_and_unpack_on_the_reference(x: Tensor, data: st.DataObject) -> None:
    with bk.use_backend("torch"):
        check_pack_and_unpack(x, data)


PAIRS = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))


@quickly
@given(PAIRS, st.booleans())
def test_hamming(cpu_backend: None, sizes: tuple[int, int, int, int], one: bool) -> None:
    samples, rows, width, seed = sizes
    a, b = torch.randint(256, (2, samples, rows, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    b = b[:1] if one else b
    expected = np.unpackbits((a ^ b).numpy(), axis=-1).reshape(samples, -1).sum(1)
    np.testing.assert_array_equal(bk.hamming_distance(a, b).numpy(), expected)


@quickly
@given(PAIRS, st.integers(1, 50), st.data())
def test_hamming_topk(cpu_backend: None, sizes: tuple[int, int, int, int], count: int, data: st.DataObject) -> None:
    """Few distinct bytes, so that many distances are equal: ties come in order of index."""
    samples, rows, width, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(3, (samples, rows, width), generator=generator).to(torch.uint8)
    database = torch.randint(3, (count, rows, width), generator=generator).to(torch.uint8)
    k = data.draw(st.integers(1, count), label="k")
    difference = (queries[:, None] ^ database[None]).numpy().reshape(samples, count, -1)
    all_distances = np.unpackbits(difference, axis=-1).sum(-1)
    order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
    distances, indices = bk.hamming_topk(queries, database, k)
    np.testing.assert_array_equal(indices.numpy(), order)
    np.testing.assert_array_equal(distances.numpy(), np.take_along_axis(all_distances, order, axis=1))


STEPS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 20),
        "prediction": st.sampled_from(["flip", "x_0"]),
        "seed": st.integers(0, 2**64 - 1),
        "step": st.integers(0, 2**28 - 1),
        "sample_offset": st.integers(0, 2**62),
    }
)


@quickly
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 130)),
    options=STEPS,
    timesteps=st.sets(st.integers(1, 32), min_size=2, max_size=2).map(lambda s: sorted(s, reverse=True)),
    rule=st.sampled_from(["plugin", "marginal", "renoise", "ddim", "sample"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    masked=st.booleans(),
    guidance_scale=st.none() | st.floats(-2, 8),
)
def test_flip_step_agrees_with_the_reference(
    cpu_backend: None,
    shape: tuple[int, ...],
    options: dict[str, Any],
    timesteps: list[int],
    rule: str,
    dtype: torch.dtype,
    masked: bool,
    guidance_scale: float | None,
) -> None:
    generator = torch.Generator().manual_seed(options["seed"] % 2**31)
    logits = (torch.randn(shape, generator=generator) * 4).to(dtype)
    x_t, mask, kept = (bk.reference.pack_bits(torch.rand(shape, generator=generator) < 0.5) for _ in range(3))
    row = bk.BernoulliSchedule("cosine", 32).coefficients(timesteps, rule)[0]
    if masked:
        options = {**options, "keep_mask": mask, "keep_bits": kept}
    if guidance_scale is not None:
        options = {**options, "guidance_scale": guidance_scale, "uncond_logits": logits.flip(0)}
    got = bk.flip_step(logits, x_t, row, **options)
    with bk.use_backend("torch"):
        expected = bk.flip_step(logits, x_t, row, **options)
    assert torch.equal(got, expected)
