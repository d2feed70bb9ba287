"""The ops as PyTorch operators: opcheck, gradients, torch.compile, and the choice of a backend."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from targets import TARGETS, Target
from torch import Tensor

import bldm_kernels as bk
import bldm_kernels.training.attention  # they are defined when they are imported
import bldm_kernels.training.gelu
import bldm_kernels.training.norm  # noqa: F401
from bldm_kernels import dispatch

B, R, C = 2, 3, 12
P = 2
DRAW = (5, 3, 1, None, None)


def logits(dtype: torch.dtype = torch.float32, gradient: bool = False) -> Tensor:
    x = torch.randn(B, R, C, generator=torch.Generator().manual_seed(2)).to(dtype)
    return x.requires_grad_(gradient)


def bits(seed: int = 1) -> Tensor:
    return bk.random_bits(B, (R, C), seed=seed)


def coefficients() -> Tensor:
    return bk.BernoulliSchedule("linear", 16).coefficients([12, 6, 3])[:B].contiguous()


def weight(gradient: bool = False) -> Tensor:
    return torch.randn(C, 5, generator=torch.Generator().manual_seed(3)).requires_grad_(gradient)


def step_arguments(tensors: bool) -> tuple[Any, ...]:
    draw = (0, 0, 0, torch.tensor([5]), torch.tensor([3]), torch.tensor([1])) if tensors else (*DRAW, None)
    guidance = (logits(), 1.0, torch.tensor([2.0])) if tensors else (None, 1.0, None)
    options = (*guidance, *((bits(2), bits(3)) if tensors else (None, None)))
    return (logits(), bits(), coefficients(), *draw, 0.8, tensors, *options, torch.zeros(1, dtype=torch.int32))


def training_samples() -> dict[str, list[tuple[Any, ...]]]:
    def random(*shape: int, gradient: bool = True) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(4)).requires_grad_(gradient)

    x, weight, bias = random(B, R, 8), random(24, 8), random(24)
    out, qkv, log_sums = (value.detach() for value in torch.ops.bldm.attention(x, weight, bias, 2))
    h, vectors = random(B, R, 8), [random(8) for _ in range(3)]
    total, grad, *moments = (value.detach() for value in torch.ops.bldm.add_norm(x, h, *vectors, 1e-5))
    given = (total, *moments, vectors[0].detach())
    return {
        "add_norm": [(x, h, *vectors, 1e-5), (x, h, None, *vectors[1:], 1e-5)],
        "add_norm_gradient": [(grad, total, *given), (grad, None, *given)],
        "bias_gelu": [(random(B, R, 5), random(5))],
        "bias_gelu_gradient": [(random(B, R, 5, gradient=False), random(B, R, 5, gradient=False), random(5, gradient=False))],
        "attention": [(x, weight, bias, 2)],
        "attention_gradient": [(x.detach(), x.detach(), weight.detach(), qkv, out, log_sums, 2)],
    }


def samples() -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Arguments of every operator, by name: what opcheck runs."""
    packed = {"out": torch.zeros(B, R, P, dtype=torch.uint8)}
    p = torch.tensor([0.1, 0.7])
    loss = (bits(1), bits(2), p)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "pack_bits": [(logits(), -1), (logits(), 1)],
        "unpack_bits": [(bits(), C, torch.float16, -1), (bits(), C, torch.int64, 1)],
        "flip_step": [step_arguments(False), step_arguments(True)],
        "flip_probability": [(logits(gradient=True), bits(), coefficients(), 0.8, True)],
        "flip_probability_backward": [(logits(), logits(), bits(), coefficients(), 0.8, True)],
        "add_noise": [(bits(), p, C, *DRAW), (bits(), p, C, 0, 0, 1, torch.tensor([5]), torch.tensor([3]))],
        "binarize": [(logits(), -1, True, *DRAW), (logits(), 1, False, *DRAW)],
        "straight_through": [(logits(gradient=True), bits(), 2)],
        "flip_loss": [
            (logits(gradient=True), *loss, 1.5, True, False, "mean"),
            (logits(gradient=True), *loss[:2], None, 0.0, False, True, "sample"),
        ],
        "flip_loss_backward": [
            (torch.ones(()), logits(), *loss, p, 1.5, False, "mean"),
            (torch.ones(B), logits(), *loss[:2], None, p[:0], 0.0, True, "sample"),
        ],
        "embed_bits": [(bits(), weight(True), None, True), (bits(), weight(True), torch.ones(5).requires_grad_(), False)],
        "embed_bits_backward": [(torch.randn(B, R, 5), bits(), C, True)],
        "hamming_distance": [(bits(1), bits(2))],
        "hamming_topk": [(bits(1), bits(2), 2)],
        **training_samples(),
    }
    found = {name: [(args, {}) for args in arguments] for name, arguments in calls.items()}
    found["random_bits_out"] = [((C, 5, 1, None), packed), ((C, 0, 1, torch.tensor([5])), packed)]
    found["pack_bits_out"] = [((logits(), -1), packed)]
    found["unpack_bits_out"] = [((bits(), C, torch.float32, -1), {"out": torch.zeros(B, R, C)})]
    for name in ("flip_step", "add_noise"):
        found[f"{name}_out"] = [(args, packed) for args in calls[name]]
    found["binarize_out"] = [(calls["binarize"][0], packed)]
    found["embed_bits_out"] = [((bits(), weight(), None, True), {"out": torch.zeros(B, R, 5)})]
    return found


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("bldm::") for name in names if name.startswith("bldm::")}


def test_every_operator_has_samples() -> None:
    assert registered() == set(samples())


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str) -> None:
    for args, kwargs in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.bldm, name), args, kwargs)


# --- gradients -------------------------------------------------------------------------------------------------------
def check_gradient(function: Callable[..., Tensor], *leaves: Tensor) -> None:
    assert torch.autograd.gradcheck(function, tuple(x.detach().double().requires_grad_() for x in leaves))


@pytest.mark.parametrize("prediction", ["flip", "x_0"])
@pytest.mark.parametrize("rule", ["plugin", "marginal", "renoise", "ddim", "sample"])
def test_gradient_of_flip_probability(prediction: str, rule: str) -> None:
    rows = bk.BernoulliSchedule("cosine", 16).coefficients([12, 6, 3], rule, None)[:B]
    check_gradient(lambda x: bk.flip_probability(x, bits(), rows, temperature=0.7, prediction=prediction), logits())


@pytest.mark.parametrize("prediction", ["flip", "x_0"])
@pytest.mark.parametrize("focal_gamma, balanced", [(None, False), (None, True), (0.0, None), (2.0, True), (0.5, False)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
def test_gradient_of_flip_loss(prediction: str, focal_gamma: float | None, balanced: bool | None, reduction: str) -> None:
    options: dict[str, Any] = {"focal_gamma": focal_gamma, "balanced": balanced, "weight": torch.tensor([0.3, 2.0])}
    check_gradient(lambda x: bk.flip_loss(x, bits(1), bits(2), prediction=prediction, reduction=reduction, **options), logits())


@pytest.mark.parametrize("signed", [True, False])
def test_gradient_of_embed_bits(signed: bool) -> None:
    check_gradient(lambda w: bk.embed_bits(bits(), w, signed=signed), weight())
    check_gradient(lambda w, b: bk.embed_bits(bits(), w, b, signed=signed), weight(), torch.ones(5))


def test_gradient_of_the_loss_is_that_of_binary_cross_entropy() -> None:
    x = logits(gradient=True)
    target = bk.unpack_bits(bits(1) ^ bits(2), C)
    expected = torch.autograd.grad(torch.nn.functional.binary_cross_entropy_with_logits(x, target), x)[0]
    loss = bk.flip_loss(x, bits(1), bits(2))
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_straight_through_has_the_gradient_of_the_sigmoid() -> None:
    x = logits(gradient=True)
    slope = torch.randn(B, R, C, generator=torch.Generator().manual_seed(0))
    hard = bk.binarize_straight_through(x, seed=3)
    assert torch.equal(bk.pack_bits(hard), bk.binarize(x.detach(), seed=3))
    (got,) = torch.autograd.grad((hard * slope).sum(), x)
    (expected,) = torch.autograd.grad((torch.sigmoid(x) * slope).sum(), x)
    torch.testing.assert_close(got, expected)


# --- torch.compile ---------------------------------------------------------------------------------------------------
def sampling_step(x: Tensor, table: Tensor, projection: Tensor, row: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """One whole step of a toy denoiser: embed the bits, predict, guide, flip."""
    hidden = torch.tanh(bk.embed_bits(x, table))
    noise = hidden @ projection
    return bk.flip_step(noise, x, row, seed=seed, step=step, uncond_logits=noise / 2, guidance_scale=2.0)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile_a_whole_sampling_step(backend: str) -> None:
    arguments = (bits(), weight(), weight().mT.contiguous(), coefficients(), torch.tensor([5]), torch.tensor([1]))
    expected = sampling_step(*arguments)
    torch.compiler.reset()
    compiled = torch.compile(sampling_step, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*arguments), expected)
    other = (bits(9), *arguments[1:5], torch.tensor([2]))
    assert torch.equal(compiled(*other), sampling_step(*other))


def test_compile_a_training_step() -> None:
    def loss_of(table: Tensor, projection: Tensor) -> Tensor:
        x_0 = bits()
        x_t = bk.add_noise(x_0, 0.2, seed=1, num_bits=C)
        return bk.flip_loss(torch.tanh(bk.embed_bits(x_t, table)) @ projection, x_0, x_t, focal_gamma=1.0)

    leaves = [weight(True), weight().mT.contiguous().requires_grad_()]
    expected = torch.autograd.grad(loss_of(*leaves), leaves)
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for got, reference in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(got, reference)


# --- backends --------------------------------------------------------------------------------------------------------
@pytest.fixture
def broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ backend made unavailable."""
    monkeypatch.setitem(dispatch._registry, "cpu", bk.Backend("cpu", ("cpu",), "the compiler was on strike"))


def test_backends_are_listed_in_order_of_preference() -> None:
    assert list(bk.backends()) == ["cuda", "triton", "cpu", "torch"]
    assert bk.backends()["torch"].unavailable is None
    for backend in bk.backends().values():
        assert backend.unavailable is None or len(backend.unavailable) > 0


def test_every_available_backend_has_every_op() -> None:
    expected = set(bk.backends()["torch"].kernels)
    for backend in bk.backends().values():
        if backend.unavailable is None:
            assert set(backend.kernels) == expected, backend.name


def test_forcing_a_missing_backend_names_the_reason(broken_backend: None) -> None:
    with pytest.raises(RuntimeError, match="'cpu' is not available: the compiler was on strike"):
        bk.use_backend("cpu")
    assert torch.equal(bits(), bits())  # nothing is left forced


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of cuda, triton, cpu, torch, got 'tpu'"):
        bk.use_backend("tpu")


def test_a_missing_backend_is_passed_over(broken_backend: None) -> None:
    assert dispatch.select("flip_step", torch.device("cpu")) is bk.backends()["torch"].kernels["flip_step"]


def test_use_backend_nests_and_restores() -> None:
    cpu = torch.device("cpu")
    chosen = dispatch.select("pack_bits", cpu)
    with bk.use_backend("torch"):
        reference = dispatch.select("pack_bits", cpu)
        assert reference is bk.backends()["torch"].kernels["pack_bits"]
        with bk.use_backend(None):
            assert dispatch.select("pack_bits", cpu) is chosen
        assert dispatch.select("pack_bits", cpu) is reference
        with pytest.raises(KeyError), bk.use_backend("torch"):
            raise KeyError
        assert dispatch.select("pack_bits", cpu) is reference
    assert dispatch.select("pack_bits", cpu) is chosen


def test_use_backend_as_a_function() -> None:
    bk.use_backend("torch")
    try:
        assert dispatch.select("pack_bits", torch.device("cpu")) is bk.backends()["torch"].kernels["pack_bits"]
    finally:
        bk.use_backend(None)


def test_a_forced_backend_on_the_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._registry, "cuda", bk.Backend("cuda", ("cuda",), None, {}))
    with bk.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced, but it does not run on cpu"):
        bk.pack_bits(torch.ones(8))


def test_a_forced_backend_without_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._registry, "cpu", bk.Backend("cpu", ("cpu",), None, {}))
    with bk.use_backend("cpu"), pytest.raises(RuntimeError, match="pack_bits: backend 'cpu' .* no kernel"):
        bk.pack_bits(torch.ones(8))


@pytest.mark.parametrize("backend", [t for t in TARGETS if t.backend in ("cpu", "triton")], ids=str)
def test_float64_needs_the_reference(backend: Target, request: pytest.FixtureRequest) -> None:
    if bk.backends()[backend.backend].unavailable:
        pytest.skip("covered by the backend's own failure")
    inputs = [x.to(backend.device) for x in (logits(torch.float64), bits(), bits())]
    with bk.use_backend(backend.backend), pytest.raises(TypeError, match="no float64"):
        bk.flip_loss(*inputs)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_environment_variable_forces_a_backend() -> None:
    code = "import torch, bldm_kernels as bk; from bldm_kernels import dispatch; print(dispatch._forced)"
    done = run_python(code, BLDM_BACKEND="torch")
    assert done.returncode == 0 and done.stdout.strip() == "torch", done.stderr


def test_environment_variable_with_a_missing_backend_is_an_error() -> None:
    """Without a visible GPU and without the interpreter neither `cuda` nor `triton` is there."""
    done = run_python("import bldm_kernels", BLDM_BACKEND="cuda", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.returncode != 0 and "backend 'cuda' is not available: " in done.stderr


def test_environment_variable_with_an_unknown_backend_is_an_error() -> None:
    done = run_python("import bldm_kernels", BLDM_BACKEND="tpu")
    assert done.returncode != 0 and "backend: expected one of" in done.stderr
