"""Wrong arguments of every public function: each gives an error that names the argument, before anything is launched.

A row is (keyword arguments that replace good ones, exception, what the message must hold). Every message starts with the name of
the argument, so "seed:" says which one was wrong.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from targets import Target
from torch import Tensor

import bldm_kernels as bk

B, R, C, P = 2, 3, 12, 2
META = "meta"  # stands for any other device

Row = tuple[dict[str, Any], type[Exception], str]


def logits(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape or (B, R, C), dtype=dtype, device=device)


def packed(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape or (B, R, P), dtype=dtype, device=device)


def row_of_four(*shape: int, **kwargs: Any) -> Tensor:
    return torch.tensor([0.0, 1.0, 1.0, 0.0], **kwargs).expand(*shape, 4)


GOOD: dict[str, dict[str, Any]] = {
    "pack_bits": {"x": logits()},
    "unpack_bits": {"packed": packed(), "num_bits": C},
    "random_bits": {"num_samples": B, "shape": (R, C), "seed": 1},
    "flip_step": {"logits": logits(), "x_t": packed(), "coefficients": row_of_four(), "seed": 1, "step": 0},
    "flip_probability": {"logits": logits(), "x_t": packed(), "coefficients": row_of_four()},
    "add_noise": {"x_0": packed(), "flip_probability": 0.1, "seed": 1},
    "flip_loss": {"logits": logits(), "x_0": packed(), "x_t": packed()},
    "binarize": {"logits": logits()},
    "binarize_straight_through": {"logits": logits()},
    "embed_bits": {"packed": packed(), "weight": torch.zeros(C, 5)},
    "hamming_distance": {"a": packed(), "b": packed()},
    "hamming_topk": {"queries": packed(), "database": packed(7, R, P), "k": 3},
}

SEEDS: list[Row] = [
    ({"seed": 2**64}, ValueError, "seed: expected"),
    ({"seed": -(2**63) - 1}, ValueError, "seed: expected"),
    ({"seed": 1.5}, TypeError, "seed: expected an int, got float"),
    ({"seed": True}, TypeError, "seed: expected an int, got bool"),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed: expected dtype int64"),
    ({"seed": torch.tensor([1, 2])}, ValueError, "seed: expected one element"),
    ({"seed": torch.zeros(1, dtype=torch.int64, device=META)}, ValueError, "seed: expected on cpu"),
    ({"sample_offset": -1}, ValueError, "sample_offset: expected 0 <="),
    ({"sample_offset": 2**62 + 1}, ValueError, "sample_offset: expected"),
    ({"sample_offset": 0.0}, TypeError, "sample_offset: expected an int"),
]
DRAWS: list[Row] = [
    *SEEDS,
    ({"step": -1}, ValueError, "step: expected 0 <= step"),
    ({"step": 2**28}, ValueError, "step: expected 0 <= step"),
    ({"step": "1"}, TypeError, "step: expected an int, got str"),
    ({"step": torch.tensor([1], dtype=torch.int32)}, TypeError, "step: expected dtype int64, got int32"),
    ({"step": torch.zeros(1, dtype=torch.int64, device=META)}, ValueError, "step: expected on cpu"),
]
OUT: list[Row] = [
    ({"out": packed(dtype=torch.int8)}, TypeError, "out: expected dtype uint8, got int8"),
    ({"out": packed(B, R, P + 1)}, ValueError, "out: expected shape (2, 3, 2)"),
    ({"out": packed(R, B, P).transpose(0, 1)}, ValueError, "out: expected a contiguous tensor"),
    ({"out": packed(device=META)}, ValueError, "out: expected on cpu"),
    ({"out": [0]}, TypeError, "out: expected a torch.Tensor, got list"),
]
LOGITS: list[Row] = [
    ({"logits": [[0.0]]}, TypeError, "logits: expected a torch.Tensor, got list"),
    ({"logits": logits(dtype=torch.int32)}, TypeError, "logits: expected dtype float32"),
    ({"logits": logits(C)}, ValueError, "logits: expected at least 2 dimensions, got shape (12,)"),
]


def like_logits(name: str) -> list[Row]:
    """What is wrong for a packed tensor of bits shaped like the logits."""
    return [
        ({name: packed(dtype=torch.int32)}, TypeError, f"{name}: expected dtype uint8, got int32"),
        ({name: packed(B, R, P + 1)}, ValueError, f"{name}: expected shape (2, 3, 2)"),
        ({name: packed(B + 1, R, P)}, ValueError, f"{name}: expected shape (2, 3, 2)"),
        ({name: logits()}, TypeError, f"{name}: expected dtype uint8, got float32"),
        ({name: packed(device=META)}, ValueError, f"{name}: expected on cpu like logits, got meta"),
    ]


STEP: list[Row] = [
    *LOGITS,
    *like_logits("x_t"),
    ({"coefficients": row_of_four(B + 1)}, ValueError, "coefficients: expected shape (4,) or (2, 4)"),
    ({"coefficients": torch.zeros(3)}, ValueError, "coefficients: expected shape (4,) or (2, 4)"),
    ({"coefficients": row_of_four(dtype=torch.float64)}, TypeError, "coefficients: expected dtype float32, got float64"),
    ({"coefficients": row_of_four(device=META)}, ValueError, "coefficients: expected on cpu"),
    ({"coefficients": [0, 1, 1, 0]}, TypeError, "coefficients: expected a torch.Tensor, got list"),
    ({"temperature": 0}, ValueError, "temperature: expected > 0, got 0"),
    ({"temperature": -1.0}, ValueError, "temperature: expected > 0, got -1"),
    ({"temperature": math.nan}, ValueError, "temperature: expected a finite number, got nan"),
    ({"temperature": math.inf}, ValueError, "temperature: expected a finite number, got inf"),
    ({"temperature": "hot"}, TypeError, "temperature: expected a number, got str"),
    ({"prediction": "x0"}, ValueError, "prediction: expected one of 'flip', 'x_0', got 'x0'"),
]

BAD: dict[str, list[Row]] = {
    "pack_bits": [
        ({"x": [1, 0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": logits(dtype=torch.complex64)}, TypeError, "x: expected dtype"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least 1 dimensions, got shape ()"),
        ({"dim": 3}, ValueError, "dim: expected -3 <= dim <= 2, got 3"),
        ({"dim": 1.0}, TypeError, "dim: expected an int"),
        *OUT,
    ],
    "unpack_bits": [
        ({"packed": packed(dtype=torch.int32)}, TypeError, "packed: expected dtype uint8, got int32"),
        ({"num_bits": 17}, ValueError, "num_bits: 17 bits take 3 bytes"),
        ({"num_bits": 8}, ValueError, "num_bits: 8 bits take 1 bytes"),
        ({"num_bits": -1}, ValueError, "num_bits: expected 0 <="),
        ({"num_bits": 12.0}, TypeError, "num_bits: expected an int"),
        ({"dtype": torch.complex64}, TypeError, "dtype: expected"),
        ({"dim": -4}, ValueError, "dim: expected -3 <= dim <= 2"),
        ({"out": logits(dtype=torch.float16)}, TypeError, "out: expected dtype float32, got float16"),
        ({"out": logits(B, R, C + 1)}, ValueError, "out: expected shape (2, 3, 12)"),
    ],
    "random_bits": [
        *SEEDS,
        *[row for row in OUT if "on cpu" not in row[2]],  # without a device, it is that of out
        ({"num_samples": -1}, ValueError, "num_samples: expected 0 <="),
        ({"num_samples": 2.0}, TypeError, "num_samples: expected an int"),
        ({"shape": ()}, ValueError, "shape: expected at least the number of channels"),
        ({"shape": (R, -1)}, ValueError, "shape: expected 0 <="),
        ({"shape": (2**20, 2**16)}, ValueError, "shape: expected less than 2^32 packed bytes"),
        ({"out": packed(), "device": META}, ValueError, "device: expected cpu like out, got meta"),
    ],
    "flip_step": [
        *STEP,
        *DRAWS,
        *OUT,
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale: 2.0 needs uncond_logits, got None"),
        ({"guidance_scale": math.inf, "uncond_logits": logits()}, ValueError, "guidance_scale: expected a finite number"),
        ({"guidance_scale": None}, TypeError, "guidance_scale: expected a number"),
        ({"guidance_scale": torch.tensor(2)}, TypeError, "guidance_scale: expected dtype float32, got int64"),
        ({"guidance_scale": torch.ones(2)}, ValueError, "guidance_scale: expected one element"),
        ({"guidance_scale": torch.ones(1)}, ValueError, "guidance_scale: a tensor needs uncond_logits, got None"),
        ({"sample_offset": torch.tensor([1.0])}, TypeError, "sample_offset: expected dtype int64"),
        ({"uncond_logits": logits(B, R, C + 1)}, ValueError, "uncond_logits: expected shape (2, 3, 12)"),
        ({"uncond_logits": logits(dtype=torch.float16)}, TypeError, "uncond_logits: expected dtype float32, got float16"),
        ({"uncond_logits": logits(device=META)}, ValueError, "uncond_logits: expected on cpu"),
        ({"keep_mask": packed()}, ValueError, "keep_bits: expected together with keep_mask"),
        ({"keep_bits": packed()}, ValueError, "keep_mask: expected together with keep_bits"),
        ({"keep_mask": packed(R, P + 1), "keep_bits": packed()}, ValueError, "keep_mask: expected packed bits of shape"),
        ({"keep_mask": packed(), "keep_bits": packed(B + 1, R, P)}, ValueError, "keep_bits: expected packed bits of shape"),
        ({"keep_mask": logits(), "keep_bits": packed()}, TypeError, "keep_mask: expected dtype uint8, got float32"),
        ({"keep_mask": packed(), "keep_bits": packed(device=META)}, ValueError, "keep_bits: expected on cpu"),
        ({"nonfinite": torch.zeros(1)}, TypeError, "nonfinite: expected dtype int32"),
        ({"nonfinite": torch.zeros(2, dtype=torch.int32)}, ValueError, "nonfinite: expected shape (1,)"),
        ({"nonfinite": torch.zeros(1, dtype=torch.int32, device=META)}, ValueError, "nonfinite: expected on cpu"),
    ],
    "flip_probability": STEP,
    "add_noise": [
        *DRAWS,
        *OUT,
        ({"x_0": logits()}, TypeError, "x_0: expected dtype uint8, got float32"),
        ({"x_0": packed(P)}, ValueError, "x_0: expected at least 2 dimensions"),
        ({"flip_probability": -0.1}, ValueError, "flip_probability: expected a value in [0, 1], got -0.1"),
        ({"flip_probability": 1.1}, ValueError, "flip_probability: expected a value in [0, 1], got 1.1"),
        ({"flip_probability": math.nan}, ValueError, "flip_probability: expected a finite number, got nan"),
        ({"flip_probability": torch.tensor([0.1, 1.5])}, ValueError, "flip_probability: expected values in [0, 1]"),
        ({"flip_probability": torch.tensor([0.1, math.nan])}, ValueError, "flip_probability: expected values in [0, 1]"),
        ({"flip_probability": torch.zeros(B + 1)}, ValueError, "flip_probability: expected one element or shape (2,)"),
        ({"flip_probability": torch.zeros(B).double()}, TypeError, "flip_probability: expected dtype float32"),
        ({"flip_probability": torch.zeros(B, device=META)}, ValueError, "flip_probability: expected on cpu"),
        ({"num_bits": 17}, ValueError, "num_bits: 17 bits take 3 bytes"),
        ({"num_bits": 3}, ValueError, "num_bits: 3 bits take 1 bytes"),
    ],
    "flip_loss": [
        *LOGITS,
        *like_logits("x_0"),
        *like_logits("x_t"),
        ({"weight": torch.zeros(B + 1)}, ValueError, "weight: expected shape (2,)"),
        ({"weight": torch.zeros(B, dtype=torch.int64)}, TypeError, "weight: expected dtype float32"),
        ({"weight": torch.zeros(B, device=META)}, ValueError, "weight: expected on cpu"),
        ({"focal_gamma": -1.0}, ValueError, "focal_gamma: expected >= 0 or None, got -1"),
        ({"focal_gamma": math.nan}, ValueError, "focal_gamma: expected a finite number"),
        ({"prediction": "noise"}, ValueError, "prediction: expected one of"),
        ({"reduction": "none"}, ValueError, "reduction: expected one of 'mean', 'sum', 'sample', got 'none'"),
    ],
    "binarize": [
        *LOGITS,
        *DRAWS,
        *OUT,
        ({"mode": "bernoulli"}, ValueError, "seed: mode 'bernoulli' needs a seed, got None"),
        ({"mode": "round"}, ValueError, "mode: expected one of 'bernoulli', 'threshold', got 'round'"),
        ({"dim": 0}, ValueError, "dim: expected a channel dimension, got 0"),
        ({"dim": -3}, ValueError, "dim: expected a channel dimension, got 0"),
        ({"dim": 3}, ValueError, "dim: expected -3 <= dim <= 2, got 3"),
    ],
    "binarize_straight_through": [
        *LOGITS,
        *DRAWS,
        ({"mode": "bernoulli"}, ValueError, "seed: mode 'bernoulli' needs a seed"),
        ({"dim": 0}, ValueError, "dim: expected a channel dimension"),
    ],
    "embed_bits": [
        ({"packed": logits()}, TypeError, "packed: expected dtype uint8, got float32"),
        ({"weight": torch.zeros(17, 5)}, ValueError, "weight: expected (C, D) with ceil(C / 8) = 2"),
        ({"weight": torch.zeros(C)}, ValueError, "weight: expected (C, D)"),
        ({"weight": torch.zeros(C, 5, dtype=torch.int32)}, TypeError, "weight: expected dtype float32"),
        ({"weight": torch.zeros(C, 5, device=META)}, ValueError, "weight: expected on cpu like packed, got meta"),
        ({"bias": torch.zeros(C)}, ValueError, "bias: expected shape (5,)"),
        ({"bias": torch.zeros(5).double()}, TypeError, "bias: expected dtype float32, got float64"),
        ({"bias": torch.zeros(5, device=META)}, ValueError, "bias: expected on cpu"),
        ({"out": torch.zeros(B, R, 6)}, ValueError, "out: expected shape (2, 3, 5)"),
        ({"out": torch.zeros(B, R, 5).half()}, TypeError, "out: expected dtype float32, got float16"),
    ],
    "hamming_distance": [
        ({"a": logits()}, TypeError, "a: expected dtype uint8, got float32"),
        ({"b": packed(B, R, P + 1)}, ValueError, "b: expected shape (2, 3, 2) like a"),
        ({"b": packed(B + 1, R, P)}, ValueError, "b: expected shape (2, 3, 2) like a"),
        ({"b": packed(device=META)}, ValueError, "b: expected on cpu like a, got meta"),
    ],
    "hamming_topk": [
        ({"queries": logits()}, TypeError, "queries: expected dtype uint8"),
        ({"database": packed(7, R, P + 1)}, ValueError, "database: expected shape (7, 3, 2)"),
        ({"database": packed(7, R, P, device=META)}, ValueError, "database: expected on cpu"),
        ({"k": 0}, ValueError, "k: expected 1 <= k <= 7, got 0"),
        ({"k": 8}, ValueError, "k: expected 1 <= k <= 7, got 8"),
        ({"k": 2.0}, TypeError, "k: expected an int, got float"),
        ({"database": packed(0, R, P)}, ValueError, "k: expected 1 <= k <= 0"),
    ],
}
ROWS = [(name, *row) for name, rows in BAD.items() for row in rows]


def check(function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    assert str(caught.value).startswith(message), str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_good_arguments_are_good(name: str) -> None:
    """So that a bad one below is the only thing wrong."""
    getattr(bk, name)(**GOOD[name])


def test_every_function_has_bad_arguments() -> None:
    assert set(BAD) == set(GOOD)


@pytest.mark.parametrize("name, replaced, error, message", ROWS, ids=[f"{r[0]}-{r[3]}" for r in ROWS])
def test_bad_argument(name: str, replaced: dict[str, Any], error: type[Exception], message: str) -> None:
    check(getattr(bk, name), {**GOOD[name], **replaced}, error, message)


# --- values that only the data can tell ------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nonfinite_logits_raise(dtype: torch.dtype, bad: float) -> None:
    """On a CPU, without a counter."""
    x = logits(dtype=dtype)
    x[1, 2, 11] = x[0, 0, 0] = bad
    arguments = {**GOOD["flip_step"], "logits": x, "step": 7}
    check(bk.flip_step, arguments, FloatingPointError, "logits: 2 of 72 are not finite at step 7")
    check(bk.flip_step, {**arguments, "out": packed()}, FloatingPointError, "logits: 2 of 72 are not finite")
    guided = {**arguments, "logits": logits(dtype=dtype), "uncond_logits": x, "guidance_scale": 2.0}
    check(bk.flip_step, guided, FloatingPointError, "logits: 2 of 72 are not finite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nonfinite_logits_are_counted(target: Target, dtype: torch.dtype) -> None:
    """Every backend adds to the counter and raises nothing; the other bits are those of finite logits."""
    x = torch.randn(3, 40, C, generator=torch.Generator().manual_seed(0)).to(target.device, dtype)
    x_t = bk.random_bits(3, (40, C), seed=1, device=target.device)
    counter = torch.full((1,), 10, dtype=torch.int32, device=target.device)
    arguments = {"x_t": x_t, "coefficients": row_of_four().to(target.device), "seed": 1, "step": 0}
    clean = bk.flip_step(x, nonfinite=counter, **arguments)
    assert int(counter) == 10
    x[:, 0, 3], x[1, 39, 11], x[2, 20, 0] = math.nan, math.inf, -math.inf
    got = bk.flip_step(x, nonfinite=counter, **arguments)
    assert int(counter) == 15
    differs = bk.reference.unpack_bits(got ^ clean, C, torch.bool)
    assert not bool((differs & torch.isfinite(x)).any())


# --- schedules -------------------------------------------------------------------------------------------------------
LINEAR = bk.BernoulliSchedule("linear", 16)
SCHEDULES: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (bk.BernoulliSchedule, {"kind": "cubic"}, ValueError, "kind: expected one of 'linear', 'cosine', 'sigmoid', got 'cubic'"),
    (bk.BernoulliSchedule, {"num_steps": 0}, ValueError, "num_steps: expected 1 <= num_steps"),
    (bk.BernoulliSchedule, {"num_steps": 16.0}, TypeError, "num_steps: expected an int, got float"),
    (bk.BernoulliSchedule.from_keep, {"k": [1.0]}, ValueError, "k: expected T + 1 >= 2 values"),
    (bk.BernoulliSchedule.from_keep, {"k": [[1.0, 0.5]]}, ValueError, "k: expected T + 1 >= 2 values in one dimension"),
    (bk.BernoulliSchedule.from_keep, {"k": [1.1, 0.5]}, ValueError, "k: expected values in [0, 1]"),
    (bk.BernoulliSchedule.from_keep, {"k": [1.0, -0.1]}, ValueError, "k: expected values in [0, 1]"),
    (bk.BernoulliSchedule.from_keep, {"k": [1.0, math.nan]}, ValueError, "k: expected values in [0, 1]"),
    (bk.BernoulliSchedule.from_keep, {"k": [0.5, 0.6]}, ValueError, "k: expected values that do not increase"),
    (
        LINEAR.timesteps,
        {"num_sampling_steps": 17},
        ValueError,
        "num_sampling_steps: expected 1 <= num_sampling_steps <= 16, got 17",
    ),
    (LINEAR.timesteps, {"num_sampling_steps": 0}, ValueError, "num_sampling_steps: expected 1 <="),
    (LINEAR.coefficients, {"timesteps": []}, ValueError, "timesteps: expected at least one"),
    (LINEAR.coefficients, {"timesteps": [3, 9]}, ValueError, "timesteps: expected strictly descending"),
    (LINEAR.coefficients, {"timesteps": [9, 9]}, ValueError, "timesteps: expected strictly descending"),
    (LINEAR.coefficients, {"timesteps": [17, 3]}, ValueError, "timesteps: expected 1 <= timesteps <= 16, got 17"),
    (LINEAR.coefficients, {"timesteps": [9, 0]}, ValueError, "timesteps: expected 1 <= timesteps <= 16, got 0"),
    (LINEAR.coefficients, {"timesteps": [9.5, 3]}, TypeError, "timesteps: expected an int, got float"),
    (LINEAR.coefficients, {"timesteps": [9], "rule": "bayes"}, ValueError, "rule: expected one of 'plugin'"),
    (LINEAR.coefficients, {"timesteps": [9], "final": "round"}, ValueError, "final: expected one of 'plugin'"),
    (LINEAR.coefficients, {"timesteps": [9], "sigma": 0.5}, ValueError, "sigma: only the rule 'ddim' takes one"),
    (LINEAR.coefficients, {"timesteps": [9], "rule": "ddim", "sigma": 1.5}, ValueError, "sigma: expected within [0, 1], got 1.5"),
    (LINEAR.coefficients, {"timesteps": [9], "rule": "ddim", "sigma": math.nan}, ValueError, "sigma: expected a finite number"),
]


@pytest.mark.parametrize("function, arguments, error, message", SCHEDULES, ids=[row[3] for row in SCHEDULES])
def test_bad_schedule(function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    check(function, arguments, error, message)
