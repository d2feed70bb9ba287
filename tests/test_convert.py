"""Checkpoints of the paper's own code: converted models compute what the originals do; damaged and hostile files are refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.cli import app
from bldm.convert import Checkpoint, convert_autoencoder, convert_denoiser, convert_diffusion, convert_schedule
from paper_models import PaperAutoencoder, PaperDiffusion, randomised
from torch import Tensor
from typer.testing import CliRunner

import bldm_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")
State = dict[str, Any]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def read(path: Path, state: State) -> Checkpoint:
    torch.save(state, path / "file.th")
    return Checkpoint.read(path / "file.th")


def paper_autoencoder(**config: Any) -> PaperAutoencoder:
    torch.manual_seed(0)
    return randomised(PaperAutoencoder(**config))


def paper_diffusion(**config: Any) -> PaperDiffusion:
    torch.manual_seed(0)
    return randomised(PaperDiffusion(**config))


# --- autoencoder ------------------------------------------------------------------------------------------------------
AUTOENCODERS: list[dict[str, Any]] = [
    {},
    {"norm_first": False},
    {"tanh": True},
    {"norm_first": False, "tanh": True, "num_bits": 9},
    {"res_blocks": 2, "gen_mul": 1.5, "attention": (0, 1)},
    {"ch_mult": (1, 1, 2), "attention": (2,), "channels": 1, "emb_dim": 64},
    {"ch_mult": (2, 3), "attention": (), "num_bits": 24},
    {"ch_mult": (1,), "attention": (), "gen_mul": 3},
]


@pytest.mark.parametrize("config", AUTOENCODERS, ids=str)
@torch.no_grad()
def test_autoencoder(config: dict[str, Any], tmp_path: Path) -> None:
    theirs = paper_autoencoder(**config)
    size = 8 * 2 ** (len(config.get("ch_mult", (1, 2))) - 1)
    checkpoint = read(tmp_path, theirs.checkpoint())
    tanh = config.get("tanh", False)
    ours = convert_autoencoder(checkpoint, image_size=size, tanh=tanh)
    images = torch.rand(3, config.get("channels", 3), size, size) * 2 - 1
    probability = theirs.probability(images)
    logits = ours.encode_logits(images)
    assert difference(logits, probability.logit()) < 1e-5
    bits = (probability > 0.5).float()
    latents = ours.encode(images)
    assert torch.equal(latents, bk.pack_bits(bits, dim=1))
    divide = not config.get("norm_first", True)
    assert difference(ours.decode(latents), theirs.decode(bits, divide=divide)) < 1e-5
    ours = convert_autoencoder(checkpoint, image_size=size, tanh=tanh, divide_code=not divide)
    assert difference(ours.decode(latents), theirs.decode(bits, divide=not divide)) < 1e-5
    ours.mode = "threshold"
    assert difference(ours(images)[0], ours.decode(latents)) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    loaded = bldm.BinaryAutoencoder.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded.decode(latents), ours.decode(latents))
    # In float64 nothing is left of the rounding, and so nothing else may be.
    ours = convert_autoencoder(checkpoint, image_size=size, tanh=tanh, divide_code=False).double()
    assert difference(ours.decode(latents), theirs.double().decode(bits.double())) < 1e-12
    assert difference(ours.encode_logits(images.double()).sigmoid(), theirs.probability(images.double())) < 1e-12


# --- denoiser ---------------------------------------------------------------------------------------------------------
def labels_of(condition: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(2)
    if condition == "none":
        return None
    if condition == "class":
        return torch.tensor([0, 4, 2])
    return torch.randn(3, 20, generator=generator) if condition == "text" else torch.randn(3, 6, 12, generator=generator)


@pytest.mark.parametrize("schedule, num_steps", [("linear", 16), ("cosine", 100), ("sigmoid", 7), ("linear", 1000)])
@pytest.mark.parametrize("condition", ["none", "class", "text", "cross"])
@torch.no_grad()
def test_denoiser(condition: str, schedule: str, num_steps: int, tmp_path: Path) -> None:
    theirs = paper_diffusion(condition=condition, schedule=schedule, num_steps=num_steps, num_bits=13)
    prefix = "module." if num_steps == 16 else ""
    checkpoint = read(tmp_path, {prefix + name: value for name, value in theirs.state_dict().items()})
    converted = convert_denoiser(checkpoint, num_steps=num_steps, num_heads=4)
    converted.save_pretrained(tmp_path / "ours")
    ours = bldm.BinaryDenoiser.from_pretrained(tmp_path / "ours")
    assert convert_schedule(checkpoint) == bk.BernoulliSchedule(schedule, num_steps)
    bits = torch.randint(0, 2, (3, 16, 13)).float()
    packed, label = bk.pack_bits(bits), labels_of(condition)
    for t in {1, 2, num_steps // 2, num_steps}:
        time = torch.tensor([t, max(t - 1, 1), t])
        uncond = theirs._denoise_fn(bits, time_steps=time - 1)
        assert difference(ours(packed, time), uncond) < 1e-5
        assert difference(ours(packed.view(3, 4, 4, 2), time), uncond.view(3, 4, 4, 13)) < 1e-5
        if label is None:
            continue
        cond = theirs._denoise_fn(bits, label, time_steps=time - 1)
        assert difference(cond, uncond) > 1e-3
        assert difference(ours(packed, time, label), cond) < 1e-5
        # One batch of both, though without a condition the reference has a token fewer.
        null = torch.full_like(label, ours.null_label)
        both = ours(torch.cat([packed, packed]), torch.cat([time, time]), torch.cat([label, null]))
        assert difference(both, torch.cat([cond, uncond])) < 1e-5
        assert difference(both[3:] + 3 * (both[:3] - both[3:]), 3 * cond - 2 * uncond) < 1e-5


@torch.no_grad()
def test_texts_of_several_lengths_in_one_batch(tmp_path: Path) -> None:
    theirs = paper_diffusion(condition="cross")
    ours = convert_denoiser(read(tmp_path, theirs.state_dict()), num_steps=16, num_heads=4)
    bits, text, time = torch.randint(0, 2, (3, 16, 12)).float(), torch.randn(3, 6, 12), torch.tensor([3, 9, 16])
    padded = text.clone()
    padded[1, 2:] = 0
    padded[2] = 0
    logits = ours(bk.pack_bits(bits), time, padded)
    for i, alone in enumerate((text[:1], text[1:2, :2], None)):
        assert difference(logits[i : i + 1], theirs._denoise_fn(bits[i : i + 1], alone, time_steps=time[i : i + 1] - 1)) < 1e-5


@torch.no_grad()
def test_time_is_told_in_training_steps(tmp_path: Path) -> None:
    """The reference divides the time by --sample_steps; a model trained with another value than T keeps it, too."""
    theirs = paper_diffusion(num_steps=16, sample_steps=64)
    checkpoint = read(tmp_path, theirs.state_dict())
    right, wrong = (convert_denoiser(checkpoint, num_steps=steps, num_heads=4) for steps in (64, 16))
    bits, time = torch.randint(0, 2, (3, 16, 12)).float(), torch.tensor([3, 9, 16])
    logits = theirs._denoise_fn(bits, time_steps=time - 1)
    assert difference(right(bk.pack_bits(bits), time), logits) < 1e-5
    assert difference(wrong(bk.pack_bits(bits), time), logits) > 1e-3


@pytest.mark.parametrize("condition", ["class", "text", "cross"])
def test_denoisers_compile_and_train(condition: str, tmp_path: Path) -> None:
    theirs = paper_diffusion(condition=condition)
    ours = convert_denoiser(read(tmp_path, theirs.state_dict()), num_steps=16, num_heads=4)
    label = labels_of(condition)
    assert label is not None
    label[1] = ours.null_label
    x, t = bk.random_bits(3, (16, 12), seed=0), torch.tensor([1, 8, 16])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, label), ours(x, t, label))
    ours(x, t, label).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) and bool(p.grad.isfinite().all()) for p in ours.parameters())


# --- the command ------------------------------------------------------------------------------------------------------
OPTIONS = ("--training-steps", 16, "--prediction", "flip", "--heads", 4)


def convert(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refuse(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert not Path("ours").exists() and not Path("converted").exists()
    return result.stderr


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PaperAutoencoder, PaperDiffusion]:
    """binaryae_ema_5.th and bld_ema_9.th in the working folder, and what they were saved from."""
    monkeypatch.chdir(tmp_path)
    autoencoder = paper_autoencoder()
    diffusion = paper_diffusion(condition="class", embedding=autoencoder.quantize.embed.weight.detach())
    torch.save(autoencoder.checkpoint(), "binaryae_ema_5.th")
    torch.save(diffusion.state_dict(), "bld_ema_9.th")
    return autoencoder, diffusion


BOTH = ("--autoencoder", "binaryae_ema_5.th", "--denoiser", "bld_ema_9.th", "--out", "ours")


@pytest.mark.parametrize("prediction", ["flip", "x_0"])
@torch.no_grad()
def test_both(files: tuple[PaperAutoencoder, PaperDiffusion], prediction: str) -> None:
    output = convert(*BOTH, *OPTIONS, "--prediction", prediction)
    assert output.startswith("ours: BinaryLatentDiffusion, ") and "latents of (4, 4, 12) bits, linear schedule of 16" in output
    model = bldm.BinaryLatentDiffusion.from_pretrained("ours")
    config = json.loads(Path("ours/config.json").read_text())
    assert (config["prediction"], config["schedule"], config["num_steps"]) == (prediction, "linear", 16)
    assert model.autoencoder.image_size == 8 and model.denoiser.num_classes == 5
    autoencoder, diffusion = files

    def original(x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """The original's own two calls, of which the sampler sees one."""
        if label is None:
            return diffusion._denoise_fn(x, time_steps=time)
        logits = diffusion._denoise_fn(x, label % 5, time_steps=time)
        return torch.where((label == 5)[:, None, None], diffusion._denoise_fn(x, time_steps=time), logits)

    theirs = bldm.FastSampler(
        original,
        model.schedule,
        latent_shape=(16, 12),
        prediction=prediction,
        state="bits",
        time_label="t-1",
        null_cond=5,
    )
    for options in ({}, {"cond": torch.arange(6) % 5}, {"cond": torch.arange(6) % 5, "guidance_scale": 3.0}):
        expected = theirs.sample(6, 5, seed=3, **options)  # type: ignore[arg-type]
        latents = model.sampler().sample(6, 5, seed=3, **options)  # type: ignore[arg-type]
        assert torch.equal(latents.flatten(1, 2), expected)
    images = model.sample(6, 5, seed=3, labels=torch.arange(6) % 5, guidance_scale=3.0)
    bits = bk.unpack_bits(expected, 12).view(6, 4, 4, 12).permute(0, 3, 1, 2)
    assert difference(images, autoencoder.decode(bits)) < 1e-5


@torch.no_grad()
def test_text(files: tuple[PaperAutoencoder, PaperDiffusion]) -> None:
    """A model conditioned on text samples from features given as labels."""
    diffusion = paper_diffusion(condition="text", embedding=files[0].quantize.embed.weight.detach())
    torch.save(diffusion.state_dict(), "bld_ema_9.th")
    convert(*BOTH, *OPTIONS)
    model = bldm.BinaryLatentDiffusion.from_pretrained("ours")
    text = torch.randn(3, 20)
    images = model.sample(3, 4, labels=text, guidance_scale=2.0)
    assert images.shape == (3, 3, 8, 8) and not torch.equal(images, model.sample(3, 4, labels=-text, guidance_scale=2.0))
    with pytest.raises(ValueError, match=r"label: expected shape \(6, 20\) \(text features, one a sample\), got \(6, 19\)"):
        model.sample(3, 4, labels=text[:, :19].contiguous(), guidance_scale=2.0)


def test_one_file(files: tuple[PaperAutoencoder, PaperDiffusion]) -> None:
    convert(*BOTH[:2], "--image-size", 16, "--out", "ours")
    assert bldm.BinaryAutoencoder.from_pretrained("ours").latent_shape == (8, 8, 12)
    output = convert(*BOTH[2:], "--training-steps", 64, "--heads", 4)
    assert "linear schedule of 16 steps, time told as a share of 64" in output
    assert bldm.BinaryDenoiser.from_pretrained("ours").num_steps == 64


def test_what_the_files_do_not_hold_is_asked_for(files: tuple[PaperAutoencoder, PaperDiffusion]) -> None:
    assert "expected one of them at least" in refuse()
    assert "training-steps, heads: the checkpoint does not hold this" in refuse(*BOTH)
    assert "error: prediction: the checkpoint does not hold this" in refuse(*BOTH, *OPTIONS[:2], *OPTIONS[4:])
    assert "error: image-size: the checkpoint does not hold this" in refuse(*BOTH[:2])
    assert "prediction: expected one of 'flip', 'x_0', got 'epsilon'" in refuse(*BOTH, *OPTIONS, "--prediction", "epsilon")
    assert "num_heads" in refuse(*BOTH, *OPTIONS, "--heads", 5)
    assert "autoencoder, denoiser: expected the same latents, got 8 x 8 x 12" in refuse(*BOTH, *OPTIONS, "--image-size", 16)
    assert "no file nowhere.th" in refuse("--denoiser", "nowhere.th", *OPTIONS)
    # One in the place of the other.
    assert "has no ae.quantize.embed.weight" in refuse("--autoencoder", "bld_ema_9.th", "--image-size", 8)
    assert "has no _denoise_fn.tok_emb.weight" in refuse("--denoiser", "binaryae_ema_5.th", *OPTIONS)


def test_a_denoiser_of_another_autoencoder(files: tuple[PaperAutoencoder, PaperDiffusion]) -> None:
    state = files[1].state_dict()
    torch.save(state | {"embedding_weight": state["embedding_weight"].half()}, "bld_ema_9.th")
    convert(*BOTH, *OPTIONS)  # as good as equal
    for wrong in (state["embedding_weight"].flip(0), torch.zeros(12, 33)):
        torch.save(state | {"embedding_weight": wrong}, "bld_ema_9.th")
        with pytest.raises(
            ValueError, match="bld_ema_9.th was trained on the bits of another autoencoder than binaryae_ema_5.th"
        ):
            files_read = [Checkpoint.read(name) for name in ("binaryae_ema_5.th", "bld_ema_9.th")]
            convert_diffusion(*files_read, num_steps=16, num_heads=4, prediction="flip")
    del state["embedding_weight"]  # some do not hold it
    torch.save(state, "bld_ema_9.th")
    convert(*BOTH, *OPTIONS)


# --- damage -----------------------------------------------------------------------------------------------------------
AE, BLD = "ae.encoder.blocks", "_denoise_fn.blocks"


def reshape(name: str, *shape: int) -> Callable[[State], Any]:
    return lambda state: state.update({name: torch.zeros(*shape)})


def fill(name: str, value: float) -> Callable[[State], Any]:
    return lambda state: state.update({name: state[name].clone().fill_(value)})


def drop(*names: str) -> Callable[[State], Any]:
    return lambda state: [state.pop(name) for name in names]


AUTOENCODER_DAMAGE: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (drop(f"{AE}.1.conv1.weight"), rf"whole model: missing \['{AE}.1.conv1.weight'\]$"),
    "missing width": (drop(f"{AE}.1.norm2.weight"), rf"whole model: missing \['{AE}.1.norm2.weight'\]$"),
    "missing unused": (drop(f"{AE}.1.conv_out.bias"), rf"whole model: missing \['{AE}.1.conv_out.bias'\]$"),
    "missing projection": (drop("ae.quantize.proj.0.bias"), r"missing \['ae.quantize.proj.0.bias'\]$"),
    "missing block": (
        lambda s: [s.pop(n) for n in list(s) if n.startswith(f"{AE}.2.")],
        r"encoder.blocks are not those of the reference: got CR\?RARARNC",
    ),
    "missing decoder": (
        lambda s: [s.pop(n) for n in list(s) if n.startswith("ae.generator")],
        "ae.generator.blocks are not those of the reference: got  ",
    ),
    "extra": (lambda s: s.update({"ae.more": torch.zeros(1)}), r"unexpected \['ae.more'\]$"),
    "extra block": (lambda s: s.update({f"{AE}.9.conv.weight": torch.zeros(1)}), "not those of the reference: got CRSRARARNS "),
    "wrong shape": (
        reshape(f"{AE}.3.norm2.weight", 7),
        rf"wrong shape \['{AE}.3.norm2.weight: expected \(64,\), got \(7,\)'\]$",
    ),
    "wrong embedding": (
        reshape("ae.quantize.embed.weight", 12, 64),
        r"wrong shape \[.*'ae.quantize.proj.0.weight: expected \(12, 64, 1, 1\), got \(12, 32, 1, 1\)'\]$",
    ),
    "embedding of no matrix": (
        reshape("ae.quantize.embed.weight", 12),
        r"embed.weight: expected 2 dimensions, got shape \(12,\)",
    ),
    "not finite": (fill("ae.quantize.proj.0.bias", float("nan")), r"not finite floating numbers \['ae.quantize.proj.0.bias'\]$"),
    "integers": (
        lambda s: s.update({"ae.quantize.proj.0.bias": torch.zeros(12, dtype=torch.int64)}),
        r"not finite floating numbers \['ae.quantize.proj.0.bias'\]$",
    ),
    "everything at once": (
        lambda s: (
            drop(f"{AE}.1.conv1.bias", f"{AE}.4.q.bias")(s),
            s.update({"more": torch.zeros(1)}),
            reshape(f"{AE}.1.conv2.bias", 3)(s),
            fill(f"{AE}.0.bias", float("inf"))(s),
        ),
        rf"missing \['{AE}.1.conv1.bias', '{AE}.4.q.bias'\]; unexpected \['more'\]; wrong shape \['{AE}.1.conv2.bias: "
        rf"expected \(32,\), got \(3,\)'\]; not finite floating numbers \['{AE}.0.bias'\]$",
    ),
}
DENOISER_DAMAGE: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (drop(f"{BLD}.1.attn.qkv.bias"), rf"whole model: missing \['{BLD}.1.attn.qkv.bias'\]$"),
    "missing text bias": (drop("_denoise_fn.cls_embedding.bias"), r"missing \['_denoise_fn.cls_embedding.bias'\]$"),
    "missing positions": (drop("_denoise_fn.pos_emb"), "has no _denoise_fn.pos_emb, without which"),
    "missing table": (drop("scheduler.beta"), r"missing \['scheduler.beta'\]$"),
    "missing tables": (drop("scheduler.k_final"), "has no scheduler.k_final"),
    "block in the middle": (
        lambda s: [s.pop(n) for n in list(s) if n.startswith(f"{BLD}.0.")],
        rf"missing \['{BLD}.0.attn.proj.bias'.*unexpected \['{BLD}.1.attn",
    ),
    "extra": (lambda s: s.update({f"{BLD}.0.more": torch.zeros(1)}), rf"unexpected \['{BLD}.0.more'\]$"),
    "prefix of some": (
        lambda s: s.update({"module._denoise_fn.pos_emb2": torch.zeros(1)}),
        r"unexpected \['module._denoise_fn.pos_emb2'\]$",
    ),
    "wrong shape": (
        reshape("_denoise_fn.head.weight", 13, 32),
        r"wrong shape \['_denoise_fn.head.weight: expected \(12, 32\), got \(13, 32\)'\]$",
    ),
    "wrong bits": (
        reshape("embedding_weight", 13, 32),
        r"wrong shape \['embedding_weight: expected \(12, 32\), got \(13, 32\)'\]$",
    ),
    "short table": (reshape("scheduler.beta", 16), r"wrong shape \['scheduler.beta: expected \(17,\), got \(16,\)'\]$"),
    "another table": (
        lambda s: s.update({"scheduler.k_final": s["scheduler.k_final"] ** 2}),
        r"no known schedule of 16 steps: linear: k_final by 0.25, b_final by 0, .*; cosine: .*; sigmoid: ",
    ),
    "an altered value": (
        lambda s: s["scheduler.cumbeta"][3].add_(1e-3),
        r"linear: k_final by 0, b_final by 0, .*, cumbeta by 0.001; cosine",
    ),
    "table of nothing": (fill("scheduler.beta", float("nan")), r"not finite floating numbers \['scheduler.beta'\]$"),
}


@pytest.mark.parametrize("damage, expected", AUTOENCODER_DAMAGE.values(), ids=AUTOENCODER_DAMAGE)
def test_damaged_autoencoder(damage: Callable[[State], Any], expected: str, tmp_path: Path) -> None:
    state = paper_autoencoder().checkpoint()
    damage(state)
    checkpoint = read(tmp_path, state)
    with pytest.raises(ValueError, match=f"(?s)^checkpoint: {checkpoint.path}.*{expected}"):
        convert_autoencoder(checkpoint, image_size=8)


@pytest.mark.parametrize("damage, expected", DENOISER_DAMAGE.values(), ids=DENOISER_DAMAGE)
def test_damaged_denoiser(damage: Callable[[State], Any], expected: str, tmp_path: Path) -> None:
    state = paper_diffusion(condition="text").state_dict()
    damage(state)
    checkpoint = read(tmp_path, state)
    with pytest.raises(ValueError, match=f"(?s)^checkpoint: {checkpoint.path}.*{expected}"):
        convert_denoiser(checkpoint, num_steps=16, num_heads=4)


def test_an_unknown_schedule(tmp_path: Path) -> None:
    checkpoint = read(tmp_path, paper_diffusion(schedule="square").state_dict())
    with pytest.raises(ValueError, match="no known schedule of 16 steps: linear: k_final by 0.25, b_final by 0.12, beta by"):
        convert_denoiser(checkpoint, num_steps=16, num_heads=4)


# --- hostile and broken files -----------------------------------------------------------------------------------------
class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("exploded",))


HOSTILE: dict[str, Callable[[], Any]] = {
    "code": lambda: torch.save(Bomb(), "file.th"),
    "code among tensors": lambda: torch.save({**paper_diffusion().state_dict(), "extra": Bomb()}, "file.th"),
    "old format": lambda: torch.save({"x": Bomb()}, "file.th", _use_new_zipfile_serialization=False),
    "bare pickle": lambda: Path("file.th").write_bytes(pickle.dumps(Bomb(), protocol=2)),
    "a whole module": lambda: torch.save(paper_diffusion(), "file.th"),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_pickle_that_carries_code(make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # whatever the user has set for other programs
    make()
    for option in ("--autoencoder", "--denoiser"):
        assert "checkpoint: file.th is refused: it holds more than tensors" in refuse(option, "file.th", *OPTIONS)
    assert not Path("exploded").exists()


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "truncated": (
        lambda: Path("file.th").write_bytes(Path("whole.th").read_bytes()[:-999]),
        "truncated or not a PyTorch checkpoint",
    ),
    "empty": (lambda: Path("file.th").write_bytes(b""), "truncated or not a PyTorch checkpoint"),
    "text": (lambda: Path("file.th").write_text("weights? no."), "is refused: it holds more than tensors, or is no pickle"),
    "a list": (lambda: torch.save([torch.zeros(2)], "file.th"), "expected a state dict, got list"),
    "a tensor": (lambda: torch.save(torch.zeros(2), "file.th"), "expected a state dict, got Tensor"),
    "no tensors": (lambda: torch.save({}, "file.th"), "expected a state dict, got an empty one"),
    "numbers": (lambda: torch.save({"a": torch.zeros(2), "b": 3}, "file.th"), "expected named tensors, got a int called 'b'"),
    "numbered": (lambda: torch.save({1: torch.zeros(2)}, "file.th"), "expected named tensors, got a Tensor called 1"),
    "nested": (
        lambda: torch.save({"model": {"a": torch.zeros(2)}}, "file.th"),
        "expected named tensors, got a dict called 'model'",
    ),
    "sparse": (lambda: torch.save({"a": torch.eye(3).to_sparse()}, "file.th"), "expected named tensors, got a sparse Tensor"),
}


@pytest.mark.parametrize("make, expected", BROKEN.values(), ids=BROKEN)
def test_broken_files(make: Callable[[], Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.zeros(2000)}, "whole.th")
    make()
    assert expected in refuse("--denoiser", "file.th", *OPTIONS)
