"""Judges of samples, as in benchmarks/quality: trained once, then kept, so that all methods have the same ones."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bldm.checkpoint import write_atomically
from settings import Setting
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "quality"))
import emoji as emoji_quality  # noqa: E402
from classifier import Classifier, evaluate, frechet_distance, train_classifier  # noqa: E402
from learn import read  # noqa: E402


def kept(path: Path, blank: Classifier, begin: Callable[[], Classifier]) -> Classifier:
    """The classifier in `path`, or the one that `begin` trains."""
    if path.is_file():
        blank.load_state_dict(torch.load(path, weights_only=True))
        return blank.eval()
    trained = begin()
    write_atomically(path, lambda name: torch.save(trained.state_dict(), name))
    return trained


class FashionJudge:
    """Share of samples classified as their label, and Frechet distance to the test images in the classifier's features."""

    def __init__(self, data: Path, setting: Setting, path: Path, device: torch.device, epochs: int = 20):
        train, test = read(data, setting)[0], read(data, setting, "test")[0]
        assert train.labels is not None and test.labels is not None
        self.pad, self.num_classes = setting.pad, int(train.labels.max()) + 1
        blank = Classifier(train.images.shape[1], self.num_classes).to(device)
        self.classifier = kept(
            path,
            blank,
            lambda: train_classifier(self._crop(train.images), train.labels, epochs, device),  # type: ignore[arg-type]
        )
        self.images, self.labels = (test.images.float() / 127.5 - 1).to(device), test.labels.to(device)
        self.real = evaluate(self.classifier, self._crop(self.images))[1]

    def _crop(self, images: Tensor) -> Tensor:
        end = images.shape[-1] - self.pad
        return images[..., self.pad : end, self.pad : end]

    def asked(self, num_samples: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each set, the conditions of the samples and what they are to show."""
        labels = torch.arange(num_samples, device=self.labels.device) * self.num_classes // num_samples
        return {"": (labels, labels)}

    def references(self) -> tuple[Tensor, Tensor]:
        """Real images, which each method encodes and decodes, and what they show."""
        return self.images, self.labels

    def measure(self, images: Tensor, wanted: Tensor) -> dict[str, float]:
        classes, features = evaluate(self.classifier, self._crop(images))
        right = (classes == wanted).float().mean().item()
        return {"accuracy": round(right, 4), "frechet": round(frechet_distance(features, self.real), 4)}


class EmojiJudge(emoji_quality.Judge):
    """Retrieval by the classifier of benchmarks/quality/emoji.py: the other judge there goes by one method's own bits."""

    def __init__(self, data: Path, setting: Setting, path: Path, device: torch.device, steps: int = 4000):
        self.emoji = emoji_quality.read(data, setting.image_size, tokens=False)
        self.real = emoji_quality.to_float(self.emoji.images).to(device)
        blank = Classifier(3, len(self.emoji.names)).to(device)
        self.classifier = kept(path, blank, lambda: self._train(self.emoji, steps, device))

    def asked(self, num_samples: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Families of the training set and all held-out ones; about so many samples of either set."""
        generator = torch.Generator().manual_seed(0)
        trained = torch.randperm(self.emoji.num_trained, generator=generator)[:200].sort().values
        sets = {"trained": trained, "held_out": torch.arange(self.emoji.num_trained, len(self.emoji.names))}
        repeated = {name: rows.repeat_interleave(max(num_samples // len(rows), 1)) for name, rows in sets.items()}
        device = self.real.device
        return {name: (self.emoji.features[rows].to(device), rows.to(device)) for name, rows in repeated.items()}

    def references(self) -> tuple[Tensor, Tensor]:
        first = self.emoji.first.to(self.real.device)
        return self.real[first], torch.arange(len(first), device=first.device)

    def measure(self, images: Tensor, wanted: Tensor) -> dict[str, float]:
        hits = self.by_classifier(images) == wanted[:, None]
        top1, top5 = hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()
        return {"accuracy": round(top1, 4), "top5": round(top5, 4)}


JUDGES: dict[str, Callable[..., Any]] = {"fashion_mnist": FashionJudge, "emoji": EmojiJudge}
NUM_SAMPLES = {"fashion_mnist": 10_000, "emoji": 800}
