"""Engines whose products hand the residual stream on: everywhere by the plain functions, and by the kernels on a GPU that has
them. The float32 model says what comes out."""

from typing import Any

import native_stream
import pytest
import torch
from bldm.engine.stream import LinkedStream, StreamKernels
from test_engine import BATCH, CONFIGS, PRECISIONS, conditions, distance, latents, model_of, sampler
from test_inference_stream import stream_kernels

import bldm_kernels as bk
from bldm_kernels.inference import stream

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["stream_kernels"]  # a fixture
LINKED = ["plain", "classes", "text token", "cross attention", "wide", "fast"]


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> list[LinkedStream]:
    """Every stream is handed on, whatever runs its products; the list is of those that there were."""
    made = list[LinkedStream]()
    begin = LinkedStream.__init__

    def noted(self: LinkedStream, *arguments: Any) -> None:
        made.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(LinkedStream, "__init__", noted)
    monkeypatch.setattr(StreamKernels, "supports", lambda self, h: True)
    return made


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", LINKED)
@torch.no_grad()
def test_logits_are_close_to_those_of_the_model(config: str, precision: str, linked: list[LinkedStream]) -> None:
    model = model_of(config)
    engine = model.optimize(precision)
    linked.clear()
    x_t, t = latents(model), torch.tensor([1, 2, 7, 20, 31, 32])
    for count, cond in enumerate(conditions(model), 1):
        assert distance(engine(x_t, t, cond), model(x_t, t, cond)) < PRECISIONS[precision]
        assert len(linked) == count


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", ["classes", "cross attention"])
@torch.no_grad()
def test_refresh_is_followed_in_place(config: str, precision: str, linked: list[LinkedStream]) -> None:
    model, other = model_of(config), model_of(config)
    for parameter in other.parameters():
        parameter.mul_(-1.2)
    engine, cond = model.optimize(precision), conditions(model)[-1]
    x_t, t = latents(model), torch.full((BATCH,), 9)
    before = engine(x_t, t, cond)
    layouts = [x for stage in engine.kernels._made or [] for x in (*stage.reader, *stage.adder) if isinstance(x, torch.Tensor)]
    copies = [x.clone() for x in layouts]
    engine.refresh(other)
    after = engine(x_t, t, cond)
    assert torch.equal(after, other.optimize(precision)(x_t, t, cond)) and not torch.equal(after, before)
    assert any(not torch.equal(x, copy) for x, copy in zip(layouts, copies, strict=True))
    engine.refresh(model)
    assert torch.equal(engine(x_t, t, cond), before)
    assert all(torch.equal(x.view(torch.uint8), copy.view(torch.uint8)) for x, copy in zip(layouts, copies, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("config", ["classes", "cross attention"])
@torch.no_grad()
def test_the_kernels_are_told_what_they_need(
    config: str, precision: str, linked: list[LinkedStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(config)
    engine, cond, x_t, t = model.optimize(precision), conditions(model)[-1], latents(model), torch.full((BATCH,), 9)
    plain = engine(x_t, t, cond)
    calls = native_stream.stand_in(monkeypatch)
    assert torch.equal(engine(x_t, t, cond), plain)
    stages = len(engine.kernels.stages)
    assert calls == ["read_stream", "moments_parts", "add_to_stream"] * (stages - 1) + ["read_stream", "add_to_stream"]


WITH_WHOLE_HEADS = {"width": 384, "num_heads": 6, "num_positions": 256}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@torch.no_grad()
def test_heads_in_one_kernel(precision: str, linked: list[LinkedStream], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "plain", WITH_WHOLE_HEADS)
    model = model_of("plain")
    engine, x_t, t = model.optimize(precision), latents(model, 2), torch.tensor([3, 30])
    plain = engine(x_t, t)
    assert distance(plain, model(x_t, t)) < PRECISIONS[precision]
    calls = native_stream.stand_in(monkeypatch)
    monkeypatch.setattr(stream, "supports_heads", stream.takes_heads)
    assert torch.equal(engine(x_t, t), plain)
    assert calls == ["attend_to_stream", "moments_parts", "add_to_stream", "read_stream", "moments_parts", "add_to_stream"] + [
        *("attend_to_stream", "moments_parts", "add_to_stream", "read_stream", "add_to_stream")
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@torch.no_grad()
def test_heads_in_one_kernel_on_a_gpu(precision: str, stream_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "plain", WITH_WHOLE_HEADS)
    model = model_of("plain", "cuda")
    engine, x_t, t = model.optimize(precision), latents(model, 20), torch.arange(1, 21, device="cuda")
    calls = list[tuple[Any, ...]]()
    monkeypatch.setattr(stream, "supports_heads", lambda *arguments: calls.append(arguments) or stream.takes_heads(*arguments))
    found = engine(x_t, t)
    assert len(calls) == 2 and all(stream.takes_heads(*arguments) for arguments in calls)
    assert distance(found, model(x_t, t)) < PRECISIONS[precision] and torch.equal(found, engine(x_t, t))


@torch.no_grad()
def test_a_run_and_guidance(linked: list[LinkedStream]) -> None:
    model = model_of("cross attention")
    engine, cond = model.optimize("float32"), conditions(model)[-1]
    options: dict[str, Any] = {"seed": 3, "cond": cond, "guidance_scale": 2.5}
    expected = sampler(model, model).sample(BATCH, 8, **options)
    assert bk.hamming_distance(sampler(engine, model).sample(BATCH, 8, **options), expected).ne(0).sum() <= 1
    assert len(linked) == 8


def test_what_the_kernels_do_not_take_has_its_norms() -> None:
    for config, fits in (("plain", True), ("narrow", False)):
        engine = model_of(config).optimize("bf16")
        assert engine.kernels.takes_all == fits and not engine.kernels.supports(torch.zeros(64, 64, 32).bfloat16())
    assert not model_of("plain").optimize("float32").kernels.takes_all


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("config", ["plain", "classes", "text token", "cross attention"])
@torch.no_grad()
def test_a_large_batch_by_the_kernels(config: str, precision: str, stream_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, config, {**CONFIGS[config], "width": 64, "num_heads": 2, "num_positions": 256})
    monkeypatch.setattr(stream, "MANY_ROWS", 1)
    model, other = model_of(config, "cuda"), model_of(config, "cuda")
    engine, x_t = model.optimize(precision), latents(model)
    t = torch.tensor([1, 2, 7, 20, 31, 32], device="cuda")
    assert engine.kernels.supports(torch.zeros(len(x_t), 257, 64, dtype=torch.bfloat16, device="cuda"))
    assert "products and norms of a large batch" in {part.name for part in engine.report()}
    for cond in conditions(model):
        logits = engine(x_t, t, cond)
        assert distance(logits, model(x_t, t, cond)) < PRECISIONS[precision]
        assert torch.equal(engine(x_t, t, cond), logits)
        with bk.use_backend("torch"):
            assert distance(engine(x_t, t, cond), logits) < PRECISIONS[precision]
    cond = conditions(model)[-1]
    options: dict[str, Any] = {"seed": 3, "cond": cond, "guidance_scale": 1.0 if cond is None else 2.5}
    fast = sampler(engine, model)
    samples = fast.sample(BATCH, 4, **options)
    assert torch.equal(sampler(engine, model, graph=False).sample(BATCH, 4, **options), samples)
    for parameter in other.parameters():
        parameter.mul_(-1.2)
    engine.refresh(other)
    assert torch.equal(fast.sample(BATCH, 4, **options), sampler(other.optimize(precision), other).sample(BATCH, 4, **options))
    engine.refresh(model)
    assert torch.equal(fast.sample(BATCH, 4, **options), samples)
