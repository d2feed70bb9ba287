"""FastSampler: the promises about seeds and batches, what the denoiser is given, masks, guidance, callbacks, errors."""

import math
from collections.abc import Callable
from typing import Any

import bldm
import pytest
import torch
from targets import Target
from tiny_models import tiny_denoiser
from torch import Tensor, nn

import bldm_kernels as bk
from bldm_kernels import reference

# --- the seed ---------------------------------------------------------------------------------------------------------
GRID = (3, 2, 13)  # bits that do not fill their bytes


class Mixer(nn.Module):
    """A denoiser in exact arithmetic: the same logits in any batch, on any device."""

    def __init__(self, shape: tuple[int, ...] = GRID, num_labels: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = math.prod(shape)
        self.shape = shape
        self.null_label = num_labels
        self.register_buffer("mix", torch.randint(-2, 3, (size, size), generator=generator) / 8.0)
        self.register_buffer("drift", torch.randint(-9, 10, (num_labels + 1, size), generator=generator) / 8.0)
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((x.clone(), time, cond))
        bits = reference.unpack_bits(x, self.shape[-1]) if x.dtype == torch.uint8 else x
        logits = bits.flatten(1) @ self.mix + time[:, None] / 8
        return (logits if cond is None else logits + self.drift[cond]).view(-1, *self.shape)


def mixer_sampler(device: str = "cpu", **options: Any) -> bldm.FastSampler:
    arguments: dict[str, Any] = {"latent_shape": GRID, **options}
    return bldm.FastSampler(Mixer().to(device), bk.BernoulliSchedule("linear", 16), **arguments)


def test_same_seed_same_samples_for_any_batch_split(target: Target) -> None:
    """1 x 64, 64 x 1 and 7 + 57, with labels and guidance, and as the reference draws them."""
    cond = torch.arange(64) % 4
    steps = 4 if target.fast else 1
    options: dict[str, Any] = {"steps": steps, "seed": 2**63 + 11, "guidance_scale": 1.5}
    sampler = mixer_sampler(target.device, final="sample")
    together = sampler.sample(64, cond=cond, **options)
    assert together.shape == (64, 3, 2, 2) and together.dtype == torch.uint8
    one_by_one = sampler.sample(64, cond=cond, batch_size=1, **options)
    parts = [
        sampler.sample(7, cond=cond[:7], **options),
        sampler.sample(57, cond=cond[7:], sample_offset=7, **options),
    ]
    assert torch.equal(one_by_one, together)
    assert torch.equal(torch.cat(parts), together)
    with bk.use_backend("torch"):
        assert torch.equal(mixer_sampler(final="sample").sample(64, cond=cond, **options), together.cpu())


def test_batch_size_and_sample_offset_together() -> None:
    sampler = mixer_sampler()
    together = sampler.sample(20, 5, seed=1)
    assert torch.equal(sampler.sample(15, 5, seed=1, sample_offset=5, batch_size=4), together[5:])


def test_different_seeds_steps_and_samples_differ() -> None:
    sampler = mixer_sampler()
    first = sampler.sample(32, seed=0)
    assert torch.equal(first, sampler.sample(32, seed=0))
    bits = 32 * math.prod(GRID)
    for other in (sampler.sample(32, seed=1), sampler.sample(32, seed=0, sample_offset=32)):
        assert int(bk.hamming_distance(first, other).sum()) > bits / 5
    assert len({bytes(row.flatten().tolist()) for row in first}) == 32


def test_no_samples() -> None:
    empty = mixer_sampler().sample(0, cond=1, guidance_scale=2.0)
    assert empty.shape == (0, 3, 2, 2) and empty.dtype == torch.uint8


def test_padding_bits_stay_zero() -> None:
    assert int((mixer_sampler().sample(64)[..., -1] >> 5).sum()) == 0


# --- what the denoiser is given ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("time_label, shift", [("t", 0), ("t-1", 1)])
def test_time_labels(time_label: str, shift: int) -> None:
    sampler = mixer_sampler(time_label=time_label)
    sampler.sample(2, 4)
    times = [time for _, time, _ in sampler.denoiser.calls]
    assert all(time.dtype == torch.int64 for time in times)
    assert [time.tolist() for time in times] == [[t - shift] * 2 for t in sampler.schedule.timesteps(4)]


@pytest.mark.parametrize(
    "state, form",
    [
        ("packed", lambda x: x),
        ("bits", lambda x: bk.unpack_bits(x, 13)),
        ("signs", lambda x: 2 * bk.unpack_bits(x, 13) - 1),
    ],
)
def test_states(state: str, form: Callable[[Tensor], Tensor]) -> None:
    sampler = mixer_sampler(state=state)
    sampler.sample(3, 2, seed=4)
    given = sampler.denoiser.calls[0][0]
    expected = form(bk.random_bits(3, GRID, seed=4))
    assert given.dtype == expected.dtype and torch.equal(given, expected)


def test_explicit_timesteps() -> None:
    sampler = mixer_sampler()
    seen: list[int] = []
    sampler.sample(2, timesteps=[15, 9, 8, 2], callback=lambda info: seen.append(info.timestep))
    assert seen == [15, 9, 8, 2]
    usual = sampler.schedule.timesteps(5)
    assert torch.equal(sampler.sample(8, timesteps=torch.tensor(usual)), sampler.sample(8, 5))


def test_one_int_is_a_condition_for_all() -> None:
    sampler = mixer_sampler()
    expected = sampler.sample(5, cond=torch.full((5,), 3))
    assert torch.equal(sampler.sample(5, cond=3), expected)
    assert torch.equal(sampler.sample(5, cond=torch.tensor(3)), expected)
    assert not torch.equal(sampler.sample(5, cond=0), expected)


def test_guidance_in_one_call_is_guidance_in_two() -> None:
    sampler = mixer_sampler()
    cond = torch.tensor([0, 1, 2, 3, 0])
    got = sampler.sample(5, 4, cond=cond, guidance_scale=2.5, seed=8)
    assert [len(x) for x, _, _ in sampler.denoiser.calls] == [10] * 4
    x = bk.random_bits(5, GRID, seed=8)
    timesteps = sampler.schedule.timesteps(4)
    coefficients = sampler.schedule.coefficients(timesteps)
    for i, t in enumerate(timesteps):
        time = torch.full((5,), t)
        logits = sampler.denoiser(x, time, cond)
        uncond = sampler.denoiser(x, time, torch.full((5,), sampler.denoiser.null_label))
        guide = {"uncond_logits": uncond, "guidance_scale": 2.5}
        x = bk.flip_step(logits, x, coefficients[i], seed=8, step=i, **guide)
    assert torch.equal(got, x)


def test_guidance_scale_one_needs_no_second_half() -> None:
    sampler = mixer_sampler()
    sampler.sample(5, 3, cond=1, guidance_scale=1.0)
    assert [len(x) for x, _, _ in sampler.denoiser.calls] == [5] * 3


def test_vector_conditions_and_a_null_vector() -> None:
    """A text embedding is a condition like another; the null one is broadcast."""
    seen: list[Tensor] = []

    def denoiser(x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        seen.append(cond)
        return cond.sum(-1).view(-1, 1, 1).expand(-1, 4, 8)

    null = torch.full((6,), -1.0)
    sampler = bldm.FastSampler(denoiser, bk.BernoulliSchedule("linear", 8), latent_shape=(4, 8), null_cond=null)
    sampler.sample(3, 2, cond=torch.ones(3, 6), guidance_scale=3.0)
    assert torch.equal(seen[0], torch.cat([torch.ones(3, 6), null.expand(3, 6)]))


# --- masks, callbacks, modes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_sample", [False, True])
def test_kept_bits_are_kept_in_every_state(per_sample: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (6, *GRID) if per_sample else GRID
    mask, kept = (bk.pack_bits(torch.rand(shape, generator=generator) < 0.5) for _ in range(2))
    sampler = mixer_sampler()
    states: list[Tensor] = []
    options: dict[str, Any] = {"seed": 1, "keep_mask": mask, "keep_bits": kept}
    result = sampler.sample(6, 5, callback=lambda info: states.append(info.x), **options)
    given = [x for x, _, _ in sampler.denoiser.calls]
    for x in (*given, *states, result):
        assert torch.equal(x & mask, (kept & mask).expand_as(x))
    assert torch.equal(given[0] & ~mask, bk.random_bits(6, GRID, seed=1) & ~mask)
    assert not torch.equal(result & ~mask, given[0] & ~mask)
    assert torch.equal(sampler.sample(6, 5, batch_size=4, **options), result)


def test_callback() -> None:
    """Once a step and batch, in order, with a state that stays as it was."""
    sampler = mixer_sampler()
    infos: list[bldm.StepInfo] = []
    copies: list[Tensor] = []

    def callback(info: bldm.StepInfo) -> None:
        infos.append(info)
        copies.append(info.x.clone())

    result = sampler.sample(10, 3, batch_size=4, callback=callback)
    timesteps = sampler.schedule.timesteps(3)
    assert [(i.step, i.num_steps, i.timestep, i.first_sample, i.num_samples) for i in infos] == [
        (step, 3, timesteps[step], first, count) for first, count in ((0, 4), (4, 4), (8, 2)) for step in range(3)
    ]
    assert all(torch.equal(info.x, copy) for info, copy in zip(infos, copies, strict=True))
    assert torch.equal(torch.cat([infos[i].x for i in (2, 5, 8)]), result)
    with_shape = {tuple(info.x.shape[1:]) for info in infos}
    assert with_shape == {(3, 2, 2)}


def test_autocast() -> None:
    """The denoiser runs in the dtype asked for, and its logits are used as they come."""
    dtypes: list[torch.dtype] = []

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            logits = self.linear(x)
            dtypes.append(logits.dtype)
            return logits

    options: dict[str, Any] = {"latent_shape": (4, 8), "state": "bits"}
    for autocast in (None, torch.bfloat16):
        bldm.FastSampler(Linear(), bk.BernoulliSchedule("linear", 8), autocast=autocast, **options).sample(2, 1)
    assert dtypes == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("raises", [False, True])
def test_modes_are_restored(raises: bool) -> None:
    """Dropout is off while sampling; afterwards every part is in the mode it was in, whatever happened."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.frozen = nn.Dropout(), nn.Dropout()
            self.seen: list[bool] = []

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            self.seen.append(self.training or self.dropout.training or self.frozen.training)
            if raises:
                raise KeyError("broken")
            return torch.zeros(len(x), 4, 8)

    model = Dropping().train()
    model.frozen.eval()
    sampler = bldm.FastSampler(model, bk.BernoulliSchedule("linear", 8), latent_shape=(4, 8))
    if raises:
        with pytest.raises(KeyError):
            sampler.sample(2, 2)
    else:
        sampler.sample(2, 2)
    assert not any(model.seen)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    model.eval()
    model.dropout.train()
    model.seen.clear()
    with pytest.raises(KeyError) if raises else torch.no_grad():
        sampler.sample(2, 2)
    assert not any(model.seen) and model.dropout.training and not model.training


def test_sampling_keeps_no_graph() -> None:
    sampler = bldm.FastSampler(tiny_denoiser(), bk.BernoulliSchedule("linear", 8), latent_shape=(4, 8))
    states: list[Tensor] = []
    sampler.sample(2, 2, cond=0, callback=lambda info: states.append(info.x))
    assert not any(x.requires_grad for x in states) and torch.is_grad_enabled()


# --- errors while sampling --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_reported(target: Target, value: float) -> None:
    def broken(x: Tensor, time: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 4, 8, device=x.device)
        if int(time[0]) == 6:
            logits[0, 1, :3] = value
        return logits

    sampler = bldm.FastSampler(broken, bk.BernoulliSchedule("linear", 8), latent_shape=(4, 8), device=target.device)
    with pytest.raises(FloatingPointError, match=r"3 logits are not finite at step 1 \(timestep 6\)"):
        sampler.sample(2, timesteps=[8, 6, 1])


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (torch.zeros(2, 4, 7), ValueError, r"denoiser: expected logits of shape \(2, 4, 8\), got \(2, 4, 7\)"),
        (torch.zeros(1, 4, 8), ValueError, r"denoiser: expected logits of shape \(2, 4, 8\), got \(1, 4, 8\)"),
        (torch.zeros(2, 8, 4), ValueError, r"denoiser: expected logits of shape \(2, 4, 8\), got \(2, 8, 4\)"),
        (torch.zeros(2, 4, 8).long(), TypeError, "logits: expected dtype float32 or .*, got int64"),
        ((torch.zeros(2, 4, 8),), TypeError, "logits: expected a torch.Tensor, got tuple"),
    ],
)
def test_answers_that_are_no_logits(answer: Any, error: type[Exception], message: str) -> None:
    schedule = bk.BernoulliSchedule("linear", 8)
    sampler = bldm.FastSampler(lambda x, time: answer, schedule, latent_shape=(4, 8))
    with pytest.raises(error, match=message):
        sampler.sample(2, 2)


def test_positions_may_come_flat_and_not_contiguous() -> None:
    """A transformer answers (B, N, C) for latents (h, w, C)."""
    logits = torch.linspace(-2, 2, 3 * 2 * 13 * 5).view(13, 6, 5).permute(2, 1, 0)
    schedule = bk.BernoulliSchedule("linear", 8)
    flat = bldm.FastSampler(lambda x, time: logits, schedule, latent_shape=GRID).sample(5, 2)
    grid = bldm.FastSampler(lambda x, time: logits.reshape(5, *GRID), schedule, latent_shape=GRID).sample(5, 2)
    assert torch.equal(flat, grid)


# --- a compiled step --------------------------------------------------------------------------------------------------
def test_a_whole_step_compiles_without_graph_breaks() -> None:
    """Denoiser and flip_step in one graph; given the compiled logits, the bits are those of eager mode."""
    model = tiny_denoiser().eval()
    schedule = bk.BernoulliSchedule("linear", 16)
    coefficients = schedule.coefficients([16, 9, 1])

    def step(x: Tensor, time: Tensor, cond: Tensor, row: Tensor, seed: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x, time, cond)
        return bk.flip_step(logits, x, row, seed=seed, step=index, temperature=0.9), logits

    compiled = torch.compile(step, fullgraph=True)
    x = bk.random_bits(4, (4, 8), seed=0)
    cond, seed = torch.arange(4) % 3, torch.tensor([5])
    with torch.no_grad():
        for i, t in enumerate((16, 9, 1)):
            arguments = (x, torch.full((4,), t), cond, coefficients[i], seed, torch.tensor([i]))
            bits, logits = compiled(*arguments)
            expected = bk.flip_step(logits, x, coefficients[i], seed=5, step=i, temperature=0.9)
            assert torch.equal(bits, expected)
            assert torch.allclose(logits, step(*arguments)[1], atol=1e-4)
            x = bits
