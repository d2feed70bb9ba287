"""BernoulliScheduler: the conventions of diffusers' own scheduler tests, and every step against the op."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from conftest import require_gpu, require_package
from targets import HAS_GPU
from torch import Tensor

import bldm_kernels as bk

require_package("diffusers")
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402

ROOT = Path(__file__).parent.parent
DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "cosine, x_0": {"schedule": "cosine", "num_train_timesteps": 20, "prediction_type": "x_0"},
    "sigmoid, marginal": {"schedule": "sigmoid", "rule": "marginal", "final": None, "temperature": 0.5},
    "renoise": {"rule": "renoise", "final": "sample", "time_label": "t"},
    "ddim": {"rule": "ddim", "sigma": 0.25, "final": "sample"},
    "one step": {"num_train_timesteps": 1},
    "betas": {"trained_betas": [0.1, 0.3, 0.5]},
    "table": {"keep": [0.98, 0.5, 0.1, 0.02]},
}


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def random_state(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator(seed)).float()


def make(name: str) -> Any:
    return bldm.BernoulliScheduler(**CONFIGS[name])


def middle(scheduler: Any) -> Tensor:
    return scheduler.timesteps[len(scheduler.timesteps) // 2]


# --- diffusers' conventions -------------------------------------------------------------------------------------------
def test_the_interface() -> None:
    scheduler = bldm.BernoulliScheduler()
    assert isinstance(scheduler, SchedulerMixin) and isinstance(scheduler, ConfigMixin)
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 256)
    assert scheduler.timesteps.tolist() == list(range(255, -1, -1)) and scheduler.num_inference_steps is None
    assert scheduler.compatibles == [bldm.BernoulliScheduler]


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    scheduler = make(name)
    scheduler.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert stored["_class_name"] == "BernoulliScheduler" and stored["num_train_timesteps"] == len(scheduler)
    loaded = bldm.BernoulliScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in scheduler.config.items() if k != "_use_default_values"} == dict(loaded.config)
    assert loaded.schedule == scheduler.schedule and torch.equal(loaded.timesteps, scheduler.timesteps)
    logits, x_t = torch.randn(4, 3, 8, 8), random_state(4, 3, 8, 8)
    for t in (scheduler.timesteps[0], middle(scheduler), scheduler.timesteps[-1]):
        ours, theirs = (s.step(logits, t, x_t, generator=generator()).prev_sample for s in (scheduler, loaded))
        assert torch.equal(ours, theirs)


def test_from_config_with_changes() -> None:
    scheduler = bldm.BernoulliScheduler.from_config(make("cosine, x_0").config, temperature=0.9, rule="marginal")
    assert (scheduler.config.temperature, scheduler.config.rule) == (0.9, "marginal")
    assert scheduler.schedule == bk.BernoulliSchedule("cosine", 20)


@pytest.mark.parametrize("betas", [np.array([0.1, 0.3]), [0.1, 0.3], torch.tensor([0.1, 0.3])], ids=["numpy", "list", "torch"])
def test_trained_betas(betas: Any, tmp_path: Path) -> None:
    scheduler = bldm.BernoulliScheduler(num_train_timesteps=1000, trained_betas=betas)
    scheduler.save_pretrained(tmp_path)
    loaded = bldm.BernoulliScheduler.from_pretrained(tmp_path)
    assert scheduler.betas.tolist() == loaded.betas.tolist() == pytest.approx([0.1, 0.3])
    assert scheduler.schedule.keep.tolist() == pytest.approx([1, 0.9, 0.63])
    assert len(scheduler) == loaded.config.num_train_timesteps == 2


def test_betas_of_a_schedule_that_ends_in_pure_noise() -> None:
    scheduler = bldm.BernoulliScheduler(4)
    assert scheduler.betas.tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])


@pytest.mark.parametrize("steps", [1, 2, 5, 100, 256])
def test_set_timesteps(steps: int) -> None:
    scheduler, labelled = bldm.BernoulliScheduler(), bldm.BernoulliScheduler(time_label="t")
    expected = bk.BernoulliSchedule("linear", 256).timesteps(steps)
    for one in (scheduler, labelled):
        one.set_timesteps(steps, device="cpu")
        assert one.timesteps.dtype == torch.int64 and one.num_inference_steps == steps
    assert labelled.timesteps.tolist() == expected
    assert scheduler.timesteps.tolist() == [t - 1 for t in expected]
    scheduler.set_timesteps(timesteps=[200, 7, 0])
    assert scheduler.timesteps.tolist() == [200, 7, 0] and scheduler.num_inference_steps == 3


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 16, 12), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_step_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scheduler = bldm.BernoulliScheduler()
    scheduler.set_timesteps(10)
    x_t = random_state(*shape).to(dtype)
    for t in scheduler.timesteps[:2]:
        x_s = scheduler.step(torch.randn(shape), t, x_t).prev_sample
        assert x_s.shape == x_t.shape and x_s.dtype == dtype
        assert set(x_s.float().unique().tolist()) <= {0.0, 1.0}


def test_tuple_output_is_the_same() -> None:
    scheduler, logits, x_t = bldm.BernoulliScheduler(), torch.randn(4, 3, 8, 8), random_state(4, 3, 8, 8)
    output = scheduler.step(logits, 100, x_t, generator=generator())
    pair = scheduler.step(logits, 100, x_t, generator=generator(), return_dict=False)
    assert isinstance(pair, tuple) and len(pair) == 1 and torch.equal(pair[0], output.prev_sample)
    assert torch.equal(output[0], output.prev_sample)


def test_default_generator_is_torchs() -> None:
    scheduler, logits, x_t = bldm.BernoulliScheduler(), torch.zeros(4, 64, 64), random_state(4, 64, 64)
    torch.manual_seed(5)
    first, second = (scheduler.step(logits, 100, x_t).prev_sample for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(scheduler.step(logits, 100, x_t).prev_sample, first) and not torch.equal(first, second)


def test_a_state_of_gaussian_noise_is_fair_coin_flips() -> None:
    scheduler, noise = bldm.BernoulliScheduler(), torch.randn(2, 3, 8, 8)
    bits = scheduler.scale_model_input(noise, 255)
    assert torch.equal(bits, (noise > 0).float())
    assert torch.equal(scheduler.scale_model_input(bits, 255), bits)
    packed = bk.pack_bits(bits)
    assert torch.equal(scheduler.scale_model_input(packed), packed)
    logits = torch.randn(2, 3, 8, 8)
    steps = [scheduler.step(logits, 255, x, generator=generator()).prev_sample for x in (noise, bits)]
    assert torch.equal(*steps)


# --- the steps are the op's -------------------------------------------------------------------------------------------
def seed_of(source: torch.Generator) -> int:
    return int(torch.randint(-(2**63), 2**63 - 1, (1,), generator=source))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_bits", [16, 13])
def test_every_step_of_a_loop(name: str, num_bits: int) -> None:
    """Packed, unpacked and the op itself, from the initial state to the end."""
    scheduler = make(name)
    config, schedule = scheduler.config, scheduler.schedule
    scheduler.set_timesteps(min(3, len(scheduler)))
    chosen = [int(t) + (config.time_label == "t-1") for t in scheduler.timesteps]
    coefficients = schedule.coefficients(chosen, config.rule, config.final, sigma=config.sigma)
    ours, packed, plain = generator(1), generator(1), generator(1)
    x = scheduler.initial_sample((3, 5, num_bits), ours)
    x_packed = scheduler.initial_sample((3, 5, num_bits), packed, dtype=torch.uint8)
    expected = bk.random_bits(3, (5, num_bits), seed=seed_of(plain))
    for i, t in enumerate(scheduler.timesteps):
        logits = 3 * torch.randn(3, 5, num_bits, generator=generator(i))
        x = scheduler.step(logits, t, x, generator=ours).prev_sample
        x_packed = scheduler.step(logits, int(t), x_packed, generator=packed).prev_sample
        options = {"temperature": config.temperature, "prediction": config.prediction_type}
        expected = bk.flip_step(logits, expected, coefficients[i], seed=seed_of(plain), step=0, **options)
        assert torch.equal(x_packed, expected)
        assert torch.equal(x, bk.unpack_bits(expected, num_bits))


@pytest.mark.parametrize("time_label", ["t", "t-1"])
def test_a_loop_finds_what_the_model_believes(time_label: str) -> None:
    scheduler = bldm.BernoulliScheduler(64, prediction_type="x_0", time_label=time_label)
    scheduler.set_timesteps(8)
    target = random_state(4, 3, 8, 8, seed=7)
    x = torch.randn(4, 3, 8, 8) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(x, t)
        x = scheduler.step(30 * (2 * target - 1), t, x, generator=generator()).prev_sample
    assert torch.equal(x, target)


def test_one_generator_a_sample() -> None:
    """What a sample becomes depends on its own generator, not on the batch."""
    scheduler, logits = bldm.BernoulliScheduler(), torch.randn(3, 64, 8)
    x_t = scheduler.initial_sample((3, 64, 8), [generator(s) for s in (4, 5, 6)])
    batch = scheduler.step(logits, 200, x_t, generator=[generator(s) for s in (1, 2, 3)]).prev_sample
    assert torch.equal(scheduler.initial_sample((1, 64, 8), [generator(5)])[0], x_t[1])
    assert torch.equal(scheduler.step(logits[1:2], 200, x_t[1:2], generator=generator(2)).prev_sample, batch[1:2])


def test_a_loop_on_a_gpu_waits_for_nothing_and_is_the_one_on_a_cpu() -> None:
    """With the generator on the GPU no step synchronises; with one on the CPU the bits are those of the CPU."""
    require_gpu()
    states = {}
    for device in ("cpu", "cuda"):
        scheduler, source = bldm.BernoulliScheduler(), generator(2)
        scheduler.set_timesteps(4, device=device)
        x = scheduler.initial_sample((2, 16, 13), source, device=device)
        for i, t in enumerate(scheduler.timesteps):
            logits = torch.randn(2, 16, 13, generator=generator(i)).to(device)
            x = scheduler.step(logits, t, x, generator=source).prev_sample
        states[device] = x.cpu()
    assert torch.equal(states["cpu"], states["cuda"])
    source, logits = generator(2, "cuda"), torch.randn(2, 16, 13, device="cuda")
    for state in (x, bk.pack_bits(x)):
        x = state
        scheduler.step(logits, scheduler.timesteps[0], x, generator=source)  # the table goes to the GPU, kernels are made
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in scheduler.timesteps:
                x = scheduler.step(logits, t, scheduler.scale_model_input(x, t), generator=source).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- noise ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["unpacked", "packed"])
@pytest.mark.parametrize("source", ["gaussian", "generator", "generators"])
def test_add_noise_flips_as_often_as_it_should(form: str, source: str) -> None:
    scheduler = bldm.BernoulliScheduler()
    x_0, t = random_state(4, 1000, 13), torch.tensor([0, 50, 150, 255])
    noise: Any = {
        "gaussian": torch.randn(x_0.shape, generator=generator(1)),
        "generator": generator(1),
        "generators": [generator(s) for s in range(4)],
    }[source]
    state = bk.pack_bits(x_0) if form == "packed" else x_0
    x_t = scheduler.add_noise(state, noise, t, **({"num_bits": 13} if form == "packed" else {}))
    assert x_t.shape == state.shape and x_t.dtype == state.dtype
    bits = bk.unpack_bits(x_t, 13) if form == "packed" else x_t
    assert torch.equal(bk.pack_bits(bits), bk.pack_bits(x_t) if form == "unpacked" else x_t)  # padding bits stay 0
    rate, expected = (bits != x_0).double().mean((1, 2)), scheduler.schedule.flip[t + 1]
    assert (rate - expected).abs().max() < 5 * (expected * (1 - expected) / 13000).sqrt().max()


def test_add_noise_keeps_and_forgets_everything_at_the_ends() -> None:
    scheduler = bldm.BernoulliScheduler(keep=[1.0, 1.0, 0.0])
    x_0, noise = random_state(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    assert torch.equal(scheduler.add_noise(x_0, noise, torch.tensor([0])), x_0)
    assert torch.equal(scheduler.add_noise(x_0, noise, torch.tensor([1, 1])), (x_0 != (noise < 0)).float())
    more = bldm.BernoulliScheduler()
    early, late = (more.add_noise(x_0, noise, torch.tensor(t)) != x_0 for t in (100, 200))
    assert bool((early <= late).all()) and bool((early != late).any())


# --- in a pipeline ----------------------------------------------------------------------------------------------------
class Denoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 4 * self.conv(x) * (1 + t / 256)


class Pipeline(DiffusionPipeline):
    def __init__(self, denoiser: Denoiser, scheduler: Any):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, batch_size: int, steps: int, source: torch.Generator | list[torch.Generator]) -> Tensor:
        shape = (batch_size, self.denoiser.config.channels, 8, 8)
        latents = self.scheduler.initial_sample(shape, source, device=self.device)
        self.scheduler.set_timesteps(steps, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            logits = self.denoiser(self.scheduler.scale_model_input(latents, t), t)
            latents = self.scheduler.step(logits, t, latents, generator=source).prev_sample
        return latents


@pytest.mark.parametrize("device", DEVICES)
def test_in_a_pipeline_saved_and_loaded(tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    pipeline = Pipeline(Denoiser(), bldm.BernoulliScheduler(schedule="cosine", rule="marginal")).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "bldm.integrations.diffusers",
        "BernoulliScheduler",
    ]
    loaded = Pipeline.from_pretrained(tmp_path).to(device)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.config.rule == "marginal" and loaded.scheduler.schedule == bk.BernoulliSchedule("cosine", 256)
    images = pipeline(3, 4, generator(3, device))
    assert images.shape == (3, 8, 8, 8) and 0.05 < float(images.mean()) < 0.95
    assert torch.equal(loaded(3, 4, generator(3, device)), images)
    each = pipeline(3, 4, [generator(s) for s in (1, 2, 3)])
    assert torch.equal(pipeline(1, 4, [generator(2)])[0], each[1])


# --- wrong arguments --------------------------------------------------------------------------------------------------
LOGITS, BITS, PACKED = torch.zeros(2, 4, 12), torch.zeros(2, 4, 12), torch.zeros(2, 4, 2, dtype=torch.uint8)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "prediction": (lambda s: type(s)(prediction_type="epsilon"), ValueError, "prediction_type: expected one of 'flip', 'x_0'"),
    "rule": (lambda s: type(s)(rule="ddpm"), ValueError, "rule: expected one of"),
    "final": (lambda s: type(s)(final="argmax"), ValueError, "rule|final: expected one of"),
    "sigma": (lambda s: type(s)(sigma=0.5), ValueError, "sigma: only the rule 'ddim' takes one"),
    "schedule": (lambda s: type(s)(schedule="scaled_linear"), ValueError, "kind: expected one of"),
    "temperature": (lambda s: type(s)(temperature=0), ValueError, "temperature: expected > 0"),
    "label": (lambda s: type(s)(time_label="s"), ValueError, "time_label: expected one of"),
    "both tables": (lambda s: type(s)(trained_betas=[0.1], keep=[1, 0]), ValueError, "trained_betas, keep: expected at most one"),
    "betas": (lambda s: type(s)(trained_betas=[1.5]), ValueError, "trained_betas: expected probabilities"),
    "keep": (lambda s: type(s)(keep=[0.5, 1.0]), ValueError, "k: expected values that do not increase"),
    "no steps": (lambda s: s.set_timesteps(), ValueError, "num_inference_steps, timesteps: expected exactly one"),
    "two kinds of steps": (lambda s: s.set_timesteps(3, timesteps=[1]), ValueError, "expected exactly one of the two"),
    "many steps": (lambda s: s.set_timesteps(257), ValueError, "num_inference_steps: expected 1 <= .* <= 256, got 257"),
    "ascending": (lambda s: s.set_timesteps(timesteps=[1, 2]), ValueError, r"timesteps: .*strictly descending, got \[1, 2\]"),
    "none": (lambda s: s.set_timesteps(timesteps=[]), ValueError, "timesteps: expected at least one"),
    "beyond T": (lambda s: s.set_timesteps(timesteps=[256]), ValueError, "timesteps: expected 0 <= timesteps <= 255, got 256"),
    "not chosen": (lambda s: s.step(LOGITS, 17, BITS), ValueError, "timestep: 17 is none of the 2 chosen"),
    "negative": (lambda s: s.step(LOGITS, -1, BITS), ValueError, "timestep: expected 0 <= timestep <= 255, got -1"),
    "half": (lambda s: s.step(LOGITS, 0.5, BITS), TypeError, "timestep: expected an int, got float"),
    "timesteps": (lambda s: s.step(LOGITS, torch.tensor([0, 0]), BITS), ValueError, "timestep: expected one for the whole batch"),
    "logits": (lambda s: s.step(LOGITS.long(), 0, BITS), TypeError, "model_output: expected dtype"),
    "unpacked": (lambda s: s.step(LOGITS, 0, BITS[..., :8]), ValueError, "sample: expected shape .*like model_output"),
    "packed": (lambda s: s.step(LOGITS, 0, PACKED[..., :1]), ValueError, "sample: expected shape .*packed bits of model_output"),
    "generator": (
        lambda s: s.step(LOGITS, 0, BITS, generator=["a", "b"]),
        TypeError,
        "generator: expected a torch.Generator, got",
    ),
    "generators": (
        lambda s: s.step(LOGITS, 0, BITS, generator=[generator()]),
        ValueError,
        "generator: .*of the 2 samples, got 1",
    ),
    "nan": (lambda s: s.step(LOGITS / 0, 0, BITS), FloatingPointError, "logits: 96 of 96 are not finite"),
    "shape": (lambda s: s.initial_sample((3,)), ValueError, "shape: expected the batch and the bits"),
    "noise": (lambda s: s.add_noise(BITS, LOGITS[..., :8], torch.tensor(1)), ValueError, "noise: expected shape"),
    "packed noise": (
        lambda s: s.add_noise(PACKED, BITS[..., :8], torch.tensor(1)),
        ValueError,
        "original_samples: expected shape",
    ),
    "float time": (lambda s: s.add_noise(BITS, LOGITS, torch.tensor(1.0)), TypeError, "timesteps: expected dtype int64"),
    "late": (lambda s: s.add_noise(BITS, LOGITS, torch.tensor([256])), ValueError, "timesteps: expected 0 <= timesteps <= 255"),
    "times": (
        lambda s: s.add_noise(BITS, LOGITS, torch.tensor([1, 2, 3])),
        ValueError,
        "timesteps: expected one element or shape",
    ),
}


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    scheduler = bldm.BernoulliScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(error, match=message):
        call(scheduler)


def test_the_documented_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(), re.DOTALL)
    exec(snippet, {})
    assert "torch.Size([2, 64, 16, 16])" in capsys.readouterr().out


def test_without_diffusers() -> None:
    """`import bldm` needs no diffusers and does not import it; asking for the scheduler names the extra."""
    code = """
import sys
import bldm
assert "diffusers" not in sys.modules
sys.modules["diffusers"] = None  # as if it were not installed
try:
    bldm.BernoulliScheduler
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "bldm.BernoulliScheduler needs diffusers: pip install 'bldm-kernels[diffusers]'"
    with pytest.raises(AttributeError, match="module 'bldm' has no attribute 'NoSuchThing'"):
        _ = bldm.NoSuchThing
