"""benchmarks/quality/emoji.py, on emoji of four colours and a model that paints at random."""

import json
import sys
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.training.conditions import caption_features, features_file
from PIL import Image
from test_conditions import LetterCounts

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "quality"))
import emoji as quality  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def write_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bldm.training.conditions.TextEncoder", LetterCounts)
    for split, names in (("train", ["red", "green", "blue"]), ("test", ["black"])):
        (root / split).mkdir(parents=True)
        table: dict[str, Any] = {}
        for name in names:
            for shade in ("", "pale "):
                file = f"{shade}{name}.png"
                Image.new("RGB", (16, 16), tuple(v // (2 if shade else 1) for v in COLOURS[name])).save(root / split / file)
                table[file] = {"name": shade + name, "family": name, "category": "Colours", "captions": [shade + name, "a b s"]}
        (root / split / "captions.json").write_text(json.dumps(table))
        captions = [about["captions"] for about in table.values()]
        caption_features(captions, features_file(root / split, tokens=False))


def model() -> bldm.BinaryLatentDiffusion:
    torch.manual_seed(0)
    autoencoder = {"image_size": 16, "in_channels": 3, "num_bits": 32, "base_channels": 8, "channel_multipliers": (1, 1)}
    denoiser = {"width": 16, "depth": 1, "num_heads": 2, "text_width": 3}
    return bldm.BinaryLatentDiffusion(autoencoder, denoiser, num_steps=16, text_encoder="all-MiniLM-L6-v2").eval()


def test_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.torch.cuda, "is_available", lambda: False)
    write_data(tmp_path / "data", monkeypatch)
    model().save_pretrained(tmp_path / "model")
    quality.main(
        data=tmp_path / "data",
        model=tmp_path / "model",
        captions=2,
        samples=2,
        steps="2,4",
        guidance="1,2",
        judge_steps=2,
        batch_size=3,
        pictured=2,
        commit="test",
        out=tmp_path / "result.json",
        picture=tmp_path / "grid.png",
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["families"] == {"trained": 3, "held_out": 1} and len(result["baselines"]) == 6
    assert [(r["set"], r["guidance"], r["steps"]) for r in result["samples"]] == [
        (name, scale, steps) for name in ("trained", "held_out") for scale in (1, 2) for steps in (2, 4)
    ]
    assert result["by_category"]["held_out"]["Colours"]["captions"] == 1
    assert Image.open(tmp_path / "grid.png").size[0] > 6 * 84


def test_families_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each judge finds the real emoji's own family first, and the held-out family is among those it can find."""
    write_data(tmp_path, monkeypatch)
    emoji = quality.read(tmp_path, 16, tokens=False)
    assert emoji.names == ["red", "green", "blue", "black"] and emoji.num_trained == 3
    assert emoji.family.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and emoji.first.tolist() == [0, 2, 4, 6]
    assert torch.equal(emoji.features, LetterCounts().encode(emoji.names))
    judge = quality.Judge(model(), emoji, 60, torch.device("cpu"))
    measured = judge.measure(judge.real[emoji.first], torch.arange(4))
    assert measured == {"bits_top1": 1.0, "bits_top5": 1.0, "classifier_top1": 1.0, "classifier_top5": 1.0}
    others = judge.measure(judge.real[emoji.first], torch.tensor([1, 2, 3, 0]))
    assert others["bits_top1"] == others["classifier_top1"] == 0.0 and others["bits_top5"] == 1.0
