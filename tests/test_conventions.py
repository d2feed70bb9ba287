"""The pieces that describe a code base to FastSampler, one by one, and wrong combinations of them."""

import math
from collections.abc import Callable
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from bldm.sampling import Call, Conventions, Denoised, Guidance, Output, chunk, decided_at, original, rescaled, two_class
from bldm.sampling.timesteps import SPACINGS
from torch import Tensor

import bldm_kernels as bk

SHAPE = (2, 3, 5)
SCHEDULE = bk.BernoulliSchedule("linear", 20)
GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randint(-4, 5, (30, 30), generator=GENERATOR) / 8.0


def logits_of(x: Tensor, time: Tensor) -> Tensor:
    """Exact arithmetic: the same logits however the bits come. x (B, 2, 3, 5)."""
    return (x.float().flatten(1) @ MIX + time.float()[:, None] / 8).view(-1, *SHAPE)


def plain(x: Tensor, time: Tensor) -> Tensor:
    return logits_of(x, time)


def sampler(denoiser: Callable[..., Any] = plain, **options: Any) -> bldm.FastSampler:
    arguments = {"latent_shape": SHAPE, "state": "bits", **options}
    return bldm.FastSampler(denoiser, SCHEDULE, **arguments)


def draw(denoiser: Callable[..., Any] = plain, call: dict[str, Any] | None = None, **options: Any) -> Tensor:
    return sampler(denoiser, **options).sample(6, 4, seed=3, **(call or {}))


# --- timesteps and time labels ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total", [1, 2, 50, 64])
def test_spacings_are_descending_timesteps(spacing: str, total: int) -> None:
    for steps in range(1, total + 1):
        try:
            chosen = SPACINGS[spacing](total, steps)
        except ValueError as error:
            assert spacing == "ddim-uniform" and "no stride" in str(error)
            continue
        assert all(t > s for t, s in zip(chosen, chosen[1:], strict=False)) and 1 <= min(chosen) <= max(chosen) <= total
        assert len(chosen) == steps or (spacing == "quadratic" and len(chosen) < steps)


def test_spacings_by_hand() -> None:
    assert SPACINGS["paper"](20, 1) == [1] and SPACINGS["reference"](20, 1) == [20]
    assert SPACINGS["paper"](64, 16) == (1 + (np.linspace(0, 1, 16) * 63).astype(int))[::-1].tolist()
    assert SPACINGS["ddim-uniform"](1000, 10) == [*range(901, 0, -100)]
    assert SPACINGS["quadratic"](100, 4) == [81, 36, 9, 1]


@pytest.mark.parametrize(
    "label, expected, dtype",
    [
        ("t", [20, 13, 7, 1], torch.int64),
        ("t-1", [19, 12, 6, 0], torch.int64),
        (original([3 * i for i in range(20)]), [57, 36, 18, 0], torch.int64),
        (rescaled(lambda t: t - 1, 50.0), [950.0, 600.0, 300.0, 0.0], torch.float32),
    ],
)
def test_time_labels(label: Any, expected: list[float], dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        seen.append(time)
        return logits_of(x, time)

    draw(denoiser, time_label=label)
    assert [time.tolist() for time in seen] == [[value] * 6 for value in expected]
    assert all(time.dtype == dtype for time in seen)


# --- states, layouts, calls, outputs: the same samples in another dress -------------------------------------------------
def test_layouts_and_dtypes() -> None:
    expected = draw()
    first = draw(lambda x, t: logits_of(x.movedim(1, -1), t).movedim(-1, 1), layout="channels-first")
    flat = draw(lambda x, t: logits_of(x.view(-1, *SHAPE), t).flatten(1), layout="flat")
    signs = draw(lambda x, t: logits_of((x + 1) / 2, t), state="signs")
    integers = draw(lambda x, t: logits_of(x, t) if x.dtype == torch.int64 else None, state_dtype=torch.int64)
    for other in (first, flat, signs, integers):
        assert torch.equal(other, expected)


def test_calls() -> None:
    expected = draw()
    ways: list[tuple[Callable[..., Tensor], Call]] = [
        (lambda t, x: logits_of(x, t), Call(("time", "x"))),
        (lambda x, c=None, *, when: logits_of(x, when), Call(("x", "cond"), {"when": "time"})),
        (lambda x, t, y: logits_of(x, t) if y is None else None, Call(("x", "time"), {"y": "cond"}, pass_none=True)),
    ]
    for denoiser, call in ways:
        taken = bldm.FastSampler(denoiser, SCHEDULE, latent_shape=SHAPE, state="bits", call=call)
        assert torch.equal(taken.sample(6, 4, seed=3), expected)


def test_named_conditions_are_keywords() -> None:
    image = torch.arange(6.0)

    def denoiser(x: Tensor, t: Tensor, img: Tensor, level: Tensor) -> Tensor:
        return logits_of(x, t) + (img + level).view(-1, 1, 1, 1)

    def with_sum(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return logits_of(x, t) + cond.view(-1, 1, 1, 1)

    expected = draw(with_sum, {"cond": image + 1, "guidance_scale": 2.0, "null_cond": torch.zeros(6)})
    cond, null = {"img": image, "level": torch.ones(6)}, {"img": torch.zeros(()), "level": torch.zeros(1)}
    got = sampler(denoiser).sample(6, 4, seed=3, cond=cond, guidance_scale=2.0, null_cond=null, batch_size=4)
    assert torch.equal(got, expected)


def test_outputs() -> None:
    expected = draw()
    pair = draw(lambda x, t: torch.cat([logits_of(x, t), -logits_of(x, t)], 1), output=chunk(0))
    classes = draw(lambda x, t: torch.stack([0 * logits_of(x, t), logits_of(x, t)], 1), output="two-class")
    last = draw(lambda x, t: torch.stack([0 * logits_of(x, t), logits_of(x, t)], -1), output=two_class(-1))
    for other in (pair, classes, last):
        assert torch.equal(other, expected)
    said = draw(lambda x, t: torch.sigmoid(logits_of(x, t)), output="probabilities")
    assert int(bk.hamming_distance(said, expected).sum()) <= 1  # rounding of the sigmoid


def test_certain_probabilities() -> None:
    """Exact zeros and ones stay certain; what is no probability is not finite."""
    bits = (MIX[:6] > 0).float().view(6, *SHAPE)
    got = draw(lambda x, t: bits, output="probabilities", prediction="x_0", final="sample")
    assert torch.equal(bk.unpack_bits(got, 5), bits)
    with pytest.raises(FloatingPointError, match="180 logits are not finite at step 0"):
        draw(lambda x, t: bits * 0 + 1.5, output="probabilities")


def test_outputs_that_change_with_time() -> None:
    flips, targets = Output("flip"), Output("x_0", chunk(1))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        says = logits_of(x, t)
        return torch.cat([says, torch.where(x == 1, -says, says)], 1) if int(t[0]) < 10 else says

    assert torch.equal(draw(denoiser, output_at=lambda t: targets if t < 10 else flips), draw())


def test_the_decision_threshold() -> None:
    says = torch.tensor([0.2, 0.39, 0.41, 0.6, 0.95]).logit().expand(6, *SHAPE)
    got = draw(lambda x, t: says, output=decided_at(lambda answer: answer, 0.4), prediction="x_0", rule="threshold")
    assert torch.equal(bk.unpack_bits(got, 5), torch.tensor([0.0, 0, 1, 1, 1]).expand(6, *SHAPE))


# --- guidance, start, the last step, hooks ------------------------------------------------------------------------------
def conditional(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
    return logits_of(x, t) + (0 if cond is None else (cond / 4).view(-1, 1, 1, 1))


def test_guidance_conventions_and_calls() -> None:
    call: dict[str, Any] = {"cond": torch.arange(6.0) + 1, "null_cond": torch.zeros(())}
    expected = draw(conditional, {**call, "guidance_scale": 2.5})
    assert torch.equal(draw(conditional, {**call, "guidance_scale": 1.5}, guidance=Guidance(convention="g")), expected)
    assert torch.equal(draw(conditional, {"cond": call["cond"], "guidance_scale": 2.5}, guidance=Guidance(calls=2)), expected)
    assert torch.equal(draw(conditional, {**call, "guidance_scale": [2.5] * 4}), expected)
    assert torch.equal(draw(conditional, {**call, "guidance_scale": torch.full((4,), 2.5)}), expected)
    assert not torch.equal(draw(conditional, {**call, "guidance_scale": [2.5, 2.5, 2.5, 0.0]}), expected)


def test_a_process_that_starts_elsewhere() -> None:
    states: list[Tensor] = []
    taken = sampler()
    last = taken.sample(6, timesteps=[20, 12, 5, 1], seed=3, callback=lambda info: states.append(info.x))
    assert torch.equal(taken.run(6, timesteps=[20, 12, 5, 1], seed=3, history=True).states[1:], torch.stack(states))  # type: ignore
    same_from = taken.sample(6, timesteps=[12, 5, 1], start=states[0], seed=3)
    assert same_from.shape == last.shape and not torch.equal(same_from, states[0])
    with pytest.raises(ValueError, match=r"start: expected packed bits of shape .* got \(5, 2, 3, 1\)"):
        taken.sample(6, 4, start=states[0][:5])


@pytest.mark.parametrize("prediction", ["flip", "x_0"])
def test_the_last_step_may_answer_probabilities(prediction: str) -> None:
    taken = sampler(conditional, prediction=prediction, final="probability")
    call: dict[str, Any] = {"cond": torch.arange(6.0), "null_cond": torch.zeros(()), "guidance_scale": 1.7, "temperature": 0.8}
    run = taken.run(6, 4, seed=3, **call)
    x = bk.unpack_bits(run.latents, 5)
    time = torch.ones(6)
    cond, uncond = conditional(x, time, call["cond"]), conditional(x, time)
    p = torch.sigmoid((uncond + 1.7 * (cond - uncond)) / 0.8)
    expected = p if prediction == "x_0" else torch.where(x == 1, 1 - p, p)
    assert torch.allclose(run.probability, expected, atol=1e-6)
    empty = taken.sample(0, 4)
    assert empty.shape == (0, *SHAPE) and empty.dtype == torch.float32


def test_hooks_on_x_0() -> None:
    assert int(bk.hamming_distance(draw(hook=Denoised(lambda p: p)), draw()).sum()) <= 1
    ones = draw(hook=Denoised(torch.ones_like))
    assert bool((bk.unpack_bits(ones, 5) == 1).all())
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        draw(lambda x, t: logits_of(x, t) / 0, hook=Denoised(lambda p: p))


def test_renoising_keeps_the_mask_and_draws_anew() -> None:
    mask = bk.pack_bits(torch.rand(SHAPE, generator=GENERATOR) < 0.5)
    kept = bk.random_bits(1, SHAPE, seed=9)[0] & mask
    states: list[Tensor] = []
    call = {"keep_mask": mask, "keep_bits": kept, "callback": lambda info: states.append(info.x)}
    draw(call=call, rule="threshold-renoise")
    assert all(torch.equal(x & mask, kept.expand_as(x)) for x in states)
    silent = sampler(lambda x, t: torch.full_like(x, -90.0), rule="threshold-renoise")
    states.clear()
    silent.sample(400, timesteps=[20, 10, 1], start=bk.pack_bits(torch.zeros(SHAPE)), callback=lambda info: states.append(info.x))
    rates = [float(bk.unpack_bits(x, 5).mean()) for x in states]
    error = math.sqrt(0.25 / (400 * 30))
    assert abs(rates[0] - 0.5) < 5 * error  # flips of t = 20: one half
    assert abs(rates[1] - (0.5 * 0.75 + 0.5 * 0.25)) < 5 * error
    assert rates[2] == rates[1]


# --- wrong combinations -------------------------------------------------------------------------------------------------
Row = tuple[Callable[[], Any], type[Exception], str]
WRONG: list[Row] = [
    (lambda: sampler(state="packed", layout="flat"), ValueError, "layout: 'flat' needs unpacked bits, but state is 'packed'"),
    (lambda: sampler(state="packed", state_dtype=torch.int64), ValueError, "state_dtype: torch.int64 needs .* state is 'packed'"),
    (lambda: sampler(output_at=lambda t: Output(), prediction="x_0"), ValueError, "output_at: .*prediction and output"),
    (lambda: sampler(hook=Denoised(abs), rule="threshold-renoise"), ValueError, "hook: .* rule 'threshold-renoise'"),
    (lambda: sampler(rules="plugin"), TypeError, "rules: unknown option, expected one of prediction, output, "),
    (lambda: sampler(output="softmax"), ValueError, "output: expected one of 'logits', 'probabilities', .*, got 'softmax'"),
    (lambda: sampler(spacing="cubic"), ValueError, "spacing: expected one of 'reference', .*, got 'cubic'"),
    (lambda: sampler(layout="nchw"), ValueError, "layout: expected one of 'channels-last', .*, got 'nchw'"),
    (lambda: sampler(guidance=2.0), TypeError, "guidance: expected a Guidance, got float"),
    (lambda: sampler(call="x, t"), TypeError, "call: expected a Call or a function, got str"),
    (lambda: Call(("x", "x", "time")), ValueError, "call: expected the roles 'x', 'time' .*, got .*'x', 'x', 'time'"),
    (lambda: Call(("x",)), ValueError, "call: expected the roles"),
    (lambda: Guidance(calls=3), ValueError, "guidance: calls: expected 1 <= .* <= 2, got 3"),
    (lambda: Guidance(convention="w"), ValueError, "guidance: convention: expected one of 's', 'g', got 'w'"),
    (lambda: Output("noise"), ValueError, "prediction: expected one of 'flip', 'x_0', got 'noise'"),
    (lambda: Conventions(final="mean"), ValueError, "final: expected one of 'probability', .*, got 'mean'"),
    (lambda: sampler(max_graphs=0), ValueError, "max_graphs: expected 1 <= max_graphs .*, got 0"),
    (lambda: draw(call={"guidance_scale": [2.0] * 3, "cond": 1}), ValueError, r"guidance_scale: .* one a step \(4\), got 3"),
    (lambda: draw(call={"guidance_scale": 2.0}), ValueError, "guidance_scale: 2.0 needs a condition, but cond is None"),
    (
        lambda: draw(call={"guidance_scale": 1.0, "cond": None}, guidance=Guidance(convention="g")),
        ValueError,
        "guidance_scale: 1.0 needs a condition, but cond is None",
    ),
    (
        lambda: draw(call={"guidance_scale": 2.0, "cond": torch.zeros(6, 4), "null_cond": torch.zeros(3)}),
        ValueError,
        r"null_cond: expected a shape that expands to cond's \(6, 4\), got \(3,\)",
    ),
    (
        lambda: draw(call={"guidance_scale": 2.0, "cond": {"img": torch.zeros(6)}, "null_cond": 0}),
        ValueError,
        r"null_cond: expected a mapping with the names \['img'\] like cond, got 0",
    ),
    (lambda: draw(call={"cond": {"img": torch.zeros(5)}}), ValueError, r"cond\['img'\]: expected 6 conditions, .* \(5,\)"),
    (
        lambda: draw(call={"hook_inputs": {"mask": MIX}}),
        ValueError,
        "hook_inputs: expected None, as the conventions' hook is None",
    ),
    (
        lambda: draw(call={"timesteps": [9, 3]}, rule="threshold-renoise", final="probability"),
        ValueError,
        "final: 'probability' needs timesteps that end at 1 under the rule 'threshold-renoise', got 3",
    ),
    (
        lambda: draw(lambda x, t: x[:, :1], layout="channels-first"),
        ValueError,
        r"denoiser: expected logits of shape \(6, 5, 2, 3\), got \(6, 1, 2, 3\)",
    ),
    (lambda: draw(lambda x, t: x, output="two-class"), ValueError, r"denoiser: expected logits of shape \(6, 2, 3, 5\)"),
]


@pytest.mark.parametrize("call, error, message", [pytest.param(*row, id=row[2][:60]) for row in WRONG])
def test_wrong_combinations(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error
