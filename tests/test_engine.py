"""Engines: close to their float32 model in every configuration, the same bits on every run, whole steps in the sampler."""

from typing import Any

import bldm
import numpy as np
import pytest
import torch
from bldm.engine.denoiser import Run
from bldm.sampling.call import Call
from bldm.sampling.hooks import Denoised
from conftest import require_backend, require_gpu
from targets import HAS_GPU
from test_models import PICTURES
from tiny_models import tiny_model
from torch import Tensor

import bldm_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")
PRECISIONS = {"float32": 1e-5, "bf16": 2e-2, "fp8": 8e-2}
POSITIONS, BITS, STEPS, TEXT, BATCH = 16, 13, 32, 12, 6
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "classes": {"num_classes": 5},
    "no null class": {"num_classes": 5, "null_class": False},
    "text token": {"text_width": TEXT},
    "cross attention": {"text_width": TEXT, "cross_attention": True},
    "wide": {"width": 64, "depth": 3, "num_heads": 1, "mlp_ratio": 2, "num_positions": 25, "num_bits": 64},
    "narrow": {"width": 12, "num_heads": 3, "num_positions": 7, "num_bits": 1, "time_embedding": "reference"},
    "dropout": {"dropout": 0.5},
    "fast": {"width": 64, "num_heads": 2, "num_positions": 9, "num_bits": 24, "num_classes": 3, "null_class": False, "depth": 1},
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        require_gpu()
    return request.param


def model_of(config: str, device: str = "cpu") -> bldm.BinaryDenoiser:
    """Random weights, of which none is zero, one or negligible."""
    torch.manual_seed(0)
    shape = {"num_positions": POSITIONS, "num_bits": BITS, "num_steps": STEPS, "width": 32, "depth": 2, "num_heads": 4}
    model = bldm.BinaryDenoiser(**{**shape, **CONFIGS[config]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.copy_(1 + torch.rand_like(parameter))
            elif parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.head.weight.normal_()
    return model.to(device).eval()


def latents(model: bldm.BinaryDenoiser, batch: int = BATCH) -> Tensor:
    return bk.random_bits(batch, (model.num_positions, model.num_bits), seed=1, device=model.positions.device)


def conditions(model: bldm.BinaryDenoiser, batch: int = BATCH) -> list[Tensor | None]:
    """None, and conditions of which the third is none."""
    device, generator = model.positions.device, torch.Generator().manual_seed(2)
    if model.num_classes is not None:
        labels = torch.arange(batch) % model.num_classes
        labels[2 % batch] = model.null_label
        return [None, labels.to(device)]
    if model.text_width is not None:
        lengths = (3,) if model.cross_attention else ()
        text = torch.randn(batch, *lengths, model.text_width, generator=generator)
        text[2 % batch] = 0
        if model.cross_attention:
            text[3 % batch, 2:] = 0
        return [None, text.to(device)]
    return [None]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def sampler(denoiser: Any, model: bldm.BinaryDenoiser, **options: Any) -> bldm.FastSampler:
    schedule = bk.BernoulliSchedule("linear", STEPS)
    return bldm.FastSampler(denoiser, schedule, latent_shape=(model.num_positions, model.num_bits), **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_logits_are_close_to_those_of_the_model(config: str, precision: str, device: str) -> None:
    model = model_of(config, device)
    engine = model.optimize(precision)
    x_t, t = latents(model), torch.tensor([1, 2, 7, 20, 31, 32], device=device)
    for cond in conditions(model):
        expected = model(x_t, t, cond)
        logits = engine(x_t, t, cond)
        assert logits.shape == expected.shape and logits.dtype == torch.float32 and not logits.requires_grad
        assert distance(logits, expected) < PRECISIONS[precision]
        if cond is not None:  # it matters, more than rounding
            assert distance(model(x_t, t), expected) > 1e-2


@pytest.mark.parametrize("config", CONFIGS)
def test_a_float32_engine_samples_what_its_model_samples(config: str, device: str) -> None:
    model = model_of(config, device)
    engine = model.optimize("float32")
    cond = conditions(model)[-1]
    options: dict[str, Any] = {"seed": 3, "cond": cond, "guidance_scale": 1.0 if cond is None else 2.5, "temperature": 0.8}
    expected = sampler(model, model).sample(BATCH, 8, **options)
    # another order of the same sums: a bit at the very edge may differ, and what follows from it
    assert bk.hamming_distance(sampler(engine, model).sample(BATCH, 8, **options), expected).ne(0).sum() <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_runs_give_the_same_bits_and_samples_do_not_depend_on_the_batch(precision: str, device: str) -> None:
    model = model_of("classes", device)
    engine = model.optimize(precision)
    cond = conditions(model)[-1]
    assert cond is not None
    fast = sampler(engine, model)
    first = fast.sample(BATCH, 8, seed=5, cond=cond, guidance_scale=2.0)
    assert torch.equal(fast.sample(BATCH, 8, seed=5, cond=cond, guidance_scale=2.0), first)
    again = sampler(model_of("classes", device).optimize(precision), model)
    assert torch.equal(again.sample(BATCH, 8, seed=5, cond=cond, guidance_scale=2.0), first)
    x_t, t = latents(model), torch.full((BATCH,), 9, device=device)
    alone = torch.cat([engine(x_t[i : i + 1], t[:1], cond[i : i + 1]) for i in range(BATCH)])
    assert distance(alone, engine(x_t, t, cond)) < PRECISIONS[precision] / 2


class Count:
    """Counts the calls of a `Run`'s methods."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.flip = self.logits = 0
        for name in ("flip", "logits"):
            monkeypatch.setattr(Run, name, self.counted(name, getattr(Run, name)))

    def counted(self, name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            setattr(self, name, getattr(self, name) + 1)
            return method(*args, **kwargs)

        return call


def test_guidance_inpainting_history_and_callbacks_go_through_whole_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("no null class", device)
    engine, cond = model.optimize("float32"), conditions(model)[-1]
    mask, kept = (bk.random_bits(BATCH, (POSITIONS, BITS), seed=seed, device=device) for seed in (8, 9))
    options = {"cond": cond, "guidance_scale": [3.0, 1.0, 0.5, 2.0], "keep_mask": mask, "keep_bits": kept, "history": True}
    expected = sampler(model, model).run(BATCH, 4, **options)
    counts, seen = Count(monkeypatch), []
    found = sampler(engine, model).run(BATCH, 4, callback=lambda info: seen.append(info.x), **options)
    assert (counts.flip, counts.logits, len(seen)) == (4, 0, 4)
    assert found.states is not None and expected.states is not None and torch.equal(found.states[1:], torch.stack(seen))
    assert bk.hamming_distance(found.states, expected.states).ne(0).sum() <= 1
    assert torch.equal(found.latents & mask, kept & mask)


@pytest.mark.parametrize(
    ("pieces", "whole"),
    [
        ({"final": "probability"}, 3),
        ({"rule": "threshold-renoise", "final": None}, 1),
        ({"hook": Denoised(lambda x_0: x_0.clamp(0.1, 0.9))}, 0),
        ({"output": lambda answer: 2 * answer}, 0),
        ({"prediction": "x_0", "rule": "marginal"}, 4),
    ],
)
def test_what_needs_logits_gets_them(pieces: dict[str, Any], whole: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("classes", device)
    engine, cond = model.optimize("float32"), conditions(model)[-1]
    options: dict[str, Any] = {"cond": cond, "guidance_scale": 2.0, "temperature": 0.7, "seed": 4}
    expected = sampler(model, model, **pieces).sample(BATCH, 4, **options)
    counts = Count(monkeypatch)
    found = sampler(engine, model, graph=False, **pieces).sample(BATCH, 4, **options)
    assert (counts.flip, counts.logits) == (whole, 4 - whole)
    if pieces.get("final") == "probability":
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert bk.hamming_distance(found, expected).ne(0).sum() <= 1


def test_conventions_of_others_call_the_engine_like_any_denoiser(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("classes", device)
    engine, cond = model.optimize("float32"), conditions(model)[-1]
    call = Call(("x",), {"t": "time", "label": "cond"})
    counts = Count(monkeypatch)
    found = sampler(engine, model, call=call).sample(BATCH, 4, cond=cond)
    assert (counts.flip, counts.logits) == (0, 0)
    assert bk.hamming_distance(found, sampler(model, model).sample(BATCH, 4, cond=cond)).ne(0).sum() <= 1


def test_logits_that_are_not_finite_are_found() -> None:
    model = model_of("plain")
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    with pytest.raises(FloatingPointError, match="step 0"):
        sampler(model.optimize(), model).sample(BATCH, 4)


def test_weights_are_followed_by_refresh_only(device: str) -> None:
    model, other = model_of("classes", device), model_of("classes", device)
    x_t, t = latents(model), torch.full((BATCH,), 9, device=device)
    for precision in PRECISIONS:
        engine = model.optimize(precision)
        fast = sampler(engine, model)
        before, samples = engine(x_t, t), fast.sample(BATCH, 4)
        addresses = [buffer.data_ptr() for buffer in engine.buffers()]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(-1.5)
        engine.refresh(other)
        assert torch.equal(engine(x_t, t), other.optimize(precision)(x_t, t)) and not torch.equal(engine(x_t, t), before)
        assert [buffer.data_ptr() for buffer in engine.buffers()] == addresses
        assert torch.equal(fast.sample(BATCH, 4), sampler(other.optimize(precision), model).sample(BATCH, 4))
        assert not torch.equal(fast.sample(BATCH, 4), samples)
        engine.refresh(model)
        assert torch.equal(fast.sample(BATCH, 4), samples)
    with pytest.raises(ValueError, match="model"):
        engine.refresh(model_of("plain", device))


@pytest.mark.parametrize("config", ["classes", "text token", "cross attention"])
def test_calibration_takes_given_latents(config: str, device: str) -> None:
    model = model_of(config, device)
    x_0, cond = latents(model, 12), conditions(model, 12)[-1]
    engine = model.optimize("fp8", calibration=x_0, calibration_cond=cond)
    other = model.optimize("fp8")
    x_t, t = latents(model), torch.full((BATCH,), 9, device=device)
    assert engine.blocks[0].proj.input_scale.item() != other.blocks[0].proj.input_scale.item()
    for label in conditions(model):
        with torch.no_grad():
            assert distance(engine(x_t, t, label), model(x_t, t, label)) < PRECISIONS["fp8"]


@torch.no_grad()
def test_fp8_leaves_in_the_mean_what_a_trained_model_and_its_classes_say(device: str) -> None:
    """Logits, and what a class changes in them, relative to the model's: without corrections 0.988 and 0.979 in the mean."""
    whole = bldm.BinaryLatentDiffusion.from_pretrained(bldm.bundled_model(), map_location=device).eval()
    model, schedule = whole.denoiser, whole.schedule
    engine = model.optimize("fp8", schedule=schedule, prediction=whole.prediction)
    pictures = np.load(PICTURES)
    x_0 = whole.encode(torch.from_numpy(pictures["images"])[:, None].to(device).float() / 127.5 - 1)
    labels = torch.from_numpy(pictures["labels"]).to(device).long()

    def left(found: Tensor, expected: Tensor) -> float:
        return ((found.double() * expected).sum() / expected.double().square().sum()).item()

    of_logits, of_classes = [], []
    for t in (230, 200, 150, 100):
        x_t = bk.add_noise(x_0, float(schedule.flip[t]), seed=t, num_bits=model.num_bits)
        times = torch.full_like(labels, t)
        found, expected = engine(x_t, times, labels), model(x_t, times, labels)
        of_logits.append(left(found, expected))
        of_classes.append(left(found - engine(x_t, times), expected - model(x_t, times)))
    assert abs(sum(of_logits) / 4 - 1) < 7e-3 and abs(sum(of_classes) / 4 - 1) < 1.3e-2


def test_the_engine_leaves_the_model_alone() -> None:
    model = model_of("classes").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = model.optimize("fp8")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    mine = {tensor.untyped_storage().data_ptr() for tensor in (*engine.buffers(), *engine.parameters())}
    assert not mine & {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not engine.training and not any(parameter.requires_grad for parameter in engine.parameters())


def test_errors_name_the_argument() -> None:
    model = model_of("classes")
    engine = model.optimize()
    x_t, t = latents(model), torch.full((BATCH,), 9)
    for name, wrong in {
        "precision": lambda: model.optimize("int4"),
        "prediction": lambda: model.optimize(prediction="noise"),
        "calibration": lambda: model.optimize("fp8", calibration=x_t.float()),
        "x_t": lambda: engine(x_t[:, 1:], t),
        "t:": lambda: engine(x_t, t[1:]),
        "label": lambda: engine(x_t, t, torch.zeros(BATCH)),
        "times": lambda: engine.begin(t.float(), None, BATCH),
    }.items():
        with pytest.raises((TypeError, ValueError), match=name):
            wrong()
    with pytest.raises(ValueError, match="label"):
        model_of("plain").optimize()(x_t, t, t)


def test_a_whole_model_paints_like_itself(device: str) -> None:
    model = tiny_model().to(device)
    labels = torch.tensor([0, 1, 2, 1], device=device)
    options: dict[str, Any] = {"labels": labels, "guidance_scale": 2.0, "seed": 3}
    engine = model.optimize("float32")
    latents = engine.sampler().sample(4, 8, cond=labels, guidance_scale=2.0, seed=3)
    assert bk.hamming_distance(latents, model.sampler().sample(4, 8, cond=labels, guidance_scale=2.0, seed=3)).sum() <= 1
    images = model.optimize("bf16").sample(4, 8, **options)
    assert images.shape == (4, 1, 28, 28) and images.dtype == torch.float32
    bf16 = model.optimize("bf16")
    assert torch.equal(bf16.sample(4, 8, **options), images) and torch.equal(bf16.sample(4, 8, **options), images)
    assert (bf16.decode(latents) - model.decode(latents)).abs().mean() < 2 / 255
    assert bf16.latent_shape == model.latent_shape and bf16.class_names == model.class_names
    names = {part.name.split("/")[0] for part in bf16.report()}
    assert {"embed", "blocks", "head", "decoder", "encoder"} <= names and engine.report() == engine.denoiser.report()
    with pytest.raises(ValueError, match="labels"):
        engine.sample(2, 4, labels=7)
    with pytest.raises(ValueError, match="precision"):
        model.optimize("int8")


def test_a_whole_model_is_refreshed() -> None:
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.2)
    engine = model.optimize("fp8")
    before, decoder = engine.sample(3, 4, labels=1), engine.autoencoder
    engine.refresh(other)
    assert torch.equal(engine.sample(3, 4, labels=1), other.optimize("fp8").sample(3, 4, labels=1))
    engine.refresh(model)
    assert torch.equal(engine.sample(3, 4, labels=1), before) and engine.autoencoder is decoder
    with torch.no_grad():
        other.autoencoder.embedding.mul_(1e6)  # no room in float16
    engine.refresh(other)
    assert torch.equal(engine.sample(3, 4, labels=1), other.optimize("fp8").sample(3, 4, labels=1))
    assert decoder.precision == "fp16" and engine.autoencoder.precision == "bf16"


def test_the_report_names_what_runs_and_fallbacks_are_warned_of(device: str) -> None:
    model = model_of("cross attention", device)
    for precision in PRECISIONS:
        parts = {part.name: part for part in model.optimize(precision).report()}
        assert {"embed", "blocks/qkv", "blocks/norm of qkv", "blocks/attention", "blocks/mlp down", "head"} <= set(parts)
        assert parts["blocks/attention"].shape == (POSITIONS + 1, 3 * 32) and parts["embed"].shape == (POSITIONS, BITS)
        assert parts["blocks/cross attention"].runs == "scaled_dot_product_attention"
        if device == "cpu" or precision == "float32":
            assert {part.runs for part in parts.values()} == {"PyTorch", "scaled_dot_product_attention"}
        if device == "cpu" and HAS_GPU:  # the interpreter is for machines without a GPU
            continue
        with bk.use_backend("triton"):
            forced = {part.name: part.runs for part in model.optimize(precision).report()}
        assert forced["embed"] == ("kernel" if precision != "float32" else "PyTorch")
    if device == "cuda":
        with pytest.warns(UserWarning, match="blocks/attention.*PyTorch"):
            model_of("narrow", device).optimize()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@torch.no_grad()
def test_kernels_and_plain_functions_make_the_same_logits(precision: str) -> None:
    require_backend("triton")
    model = model_of("fast").to("cuda" if HAS_GPU else "cpu")
    engine, cond = model.optimize(precision), conditions(model, 2)[-1]
    x_t, t = latents(model, 2), torch.tensor([5, 31], device=model.positions.device)
    with bk.use_backend("torch"):
        plain = engine(x_t, t, cond)
    with bk.use_backend("triton"):
        assert all(part.runs == "kernel" for part in engine.report())
        logits = engine(x_t, t, cond)
        assert torch.equal(engine(x_t, t, cond), logits)
        samples = sampler(engine, model).sample(2, 1, cond=cond, guidance_scale=2.0)
        assert torch.equal(sampler(engine, model, graph=False).sample(2, 1, cond=cond, guidance_scale=2.0), samples)
    assert distance(logits, model(x_t, t, cond)) < PRECISIONS[precision]
    assert distance(plain, model(x_t, t, cond)) < PRECISIONS[precision]
    assert distance(logits, plain) < PRECISIONS[precision] / 2
