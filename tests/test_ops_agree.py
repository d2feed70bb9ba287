"""Every op on every backend against the reference, over the one table of cases.

Bits must be equal, all of them. Numbers are compared with the reference in float64 on the same (rounded) inputs; the
tolerance is that of the output's own dtype.
"""

import inspect

import pytest
import torch
from cases import BUILDERS, CASES, Case, Inputs
from targets import TARGETS, Target
from torch import Tensor

import bldm_kernels as bk

# Per element, and absolute per unit of the largest element (a sum that cancels keeps the error of its terms). float32: a few
# roundings. Half precision: sums in float32, then the result rounded, and once more where a bias is added.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2**-10, 2**-11),
    torch.bfloat16: (2**-7, 2**-8),
}
EXACT = ("pack_bits", "unpack_bits", "random_bits", "flip_step", "add_noise", "binarize", "hamming_distance", "hamming_topk")


def in_float64(inputs: Inputs) -> Inputs:
    """The same values in float64, except what is float32 by definition."""
    float32_only = ("coefficients", "out")
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in float32_only
        else value
        for name, value in inputs.items()
        if name != "out"
    }


def assert_padding_is_zero(packed: Tensor, channels: int) -> None:
    if packed.numel() and channels % 8:
        assert int((packed[..., -1] >> (channels % 8)).max()) == 0, "padding bits are not 0"


def assert_close(got: Tensor, expected: Tensor, equal_nan: bool) -> None:
    assert got.shape == expected.shape
    rtol, atol = TOLERANCE[got.dtype]
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=atol * scale, equal_nan=equal_nan)


def check(case: Case, target: Target) -> None:
    inputs = case.inputs(target.device)
    given = inputs.get("out")
    got = case.run(inputs)
    if given is not None:
        assert got[0].data_ptr() == given.data_ptr()
    with bk.use_backend("torch"):
        exact = case.op in EXACT
        expected = case.run(case.inputs(target.device) if exact else in_float64(case.inputs(target.device)))
    if exact:
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} elements differ from the reference"
        if got[0].dtype == torch.uint8 and case.op not in ("unpack_bits",):
            assert_padding_is_zero(got[0], case.channels)
        return
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, equal_nan=case.batch == 0)  # the mean loss of no samples is NaN, as in PyTorch


# Triton's interpreter gets the quick cases (so does the list of what a machine without a GPU skips), the others all.
@pytest.mark.parametrize(
    "target, case",
    [(target, case) for target in TARGETS for case in CASES if case.quick or target.fast],
    ids=str,
    indirect=["target"],
)
def test_case(target: Target, case: Case) -> None:
    check(case, target)


@pytest.mark.parametrize("channels", [24, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [target for target in TARGETS if target.fast], ids=str, indirect=True)
def test_product_of_more_rows_than_run_at_a_time(target: Target, dtype: torch.dtype, channels: int) -> None:
    """A GPU's threads go through the rows in several turns; the gradient adds up all of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (150_000 if target.device == "cuda" else 300, channels), generator=generator, dtype=torch.uint8)
    weight = torch.randn(channels, 8, generator=generator).to(target.device, dtype).requires_grad_()
    x = x.to(target.device)
    out = bk.embed_bits(bk.pack_bits(x), weight)
    grad = torch.randn(out.shape, generator=generator).to(out)
    (got,) = torch.autograd.grad(out, weight, grad)
    signs = 2 * x.double() - 1
    assert_close(out.detach(), signs @ weight.detach().double(), equal_nan=False)
    assert_close(got, signs.T @ grad.double(), equal_nan=False)


@pytest.mark.parametrize("one_for_all", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=str, indirect=True)
def test_padding_of_what_is_kept_does_not_reach_the_result(target: Target, one_for_all: bool) -> None:
    """A mask of all ones, padding too: the result is the bits to keep, and its padding is 0 as always."""
    kept = torch.full((2, 3, 2), 0xFF, dtype=torch.uint8, device=target.device)
    call = {"keep_mask": kept[0], "keep_bits": kept[0]} if one_for_all else {"keep_mask": kept, "keep_bits": kept}
    x_s = bk.flip_step(
        torch.zeros(2, 3, 12, device=target.device),
        torch.zeros_like(kept),
        torch.tensor([0.0, 1.0, 1.0, 0.0], device=target.device),
        seed=0,
        step=0,
        **call,
    )
    assert x_s[..., 0].eq(0xFF).all() and x_s[..., 1].eq(0x0F).all()
    assert kept.eq(0xFF).all()


@pytest.mark.parametrize("op", ["flip_probability", "flip_loss", "embed_bits", "binarize_straight_through"])
def test_float64_runs_on_the_reference(op: str) -> None:
    """float64 needs no forced backend: the reference takes it."""
    case = Case(op, torch.float64, 24, 3)
    output = case.run(case.inputs("cpu"))
    assert all(o.dtype == torch.float64 for o in output)


def test_float64_bits_follow_the_same_draws() -> None:
    """A float64 step differs from the float32 one only where rounding decides: never on this input."""
    case = Case("flip_step", torch.float32, 64, 5)
    inputs = case.inputs("cpu")
    with bk.use_backend("torch"):
        (single,) = case.run(inputs)
        (double,) = case.run({**inputs, "logits": inputs["logits"].double()})
    assert torch.equal(single, double)


def test_table_covers_every_public_op() -> None:
    """A new op without cases fails here."""
    functions = {name for name in bk.__all__ if inspect.isfunction(getattr(bk, name))} - {"backends", "register_backend"}
    assert functions == set(BUILDERS)
