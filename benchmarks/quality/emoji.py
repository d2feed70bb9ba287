"""Quality of an emoji model: does a sample look like what its caption says, for captions it was trained on and for held-out ones?

    python benchmarks/quality/emoji.py --data emoji --model emoji-model

Every family of names is asked for by its first member's name, some of the training set's and all held-out ones. A sample is
right if, among the first members of all families (held-out ones too), the nearest one is its own: by the autoencoder's bits
(Hamming distance), and by a small classifier that learned all families from moved and scaled real emoji. Top-1 and top-5,
against steps and guidance, beside reconstructions of the real emoji and samples without a caption. Writes one JSON file and one
picture. On a CPU, `--samples 1 --steps 16 --guidance 3 --judge-steps 400` takes minutes.
"""

import datetime
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import bldm
import torch
import typer
from bldm.bench.run import commit as current_commit
from bldm.bench.run import device_name
from bldm.checkpoint import write_atomically
from bldm.data import CAPTIONS, load_images, to_float
from bldm.grid import draw_grid, save_png
from bldm.training.augment import augment
from bldm.training.conditions import caption_features, features_file
from classifier import Classifier
from torch import Tensor
from torch.nn import functional as F

import bldm_kernels as bk


@dataclass
class Emoji:
    """All emoji, training set first: images uint8 (N, 3, H, W), the number of each one's family; and of each family its name,
    its first member and the features of that one's first caption."""

    images: Tensor
    family: Tensor
    names: list[str]
    categories: list[str]
    first: Tensor
    features: Tensor
    num_trained: int  # families of the training set; the held-out ones come after them


def read(folder: Path, size: int, tokens: bool) -> Emoji:
    images, texts, numbers, names, categories, first = [], [], {}, [], [], []
    family: list[int] = []
    num_trained = 0
    for split in ("train", "test"):
        data = load_images(folder, split, size)
        found = caption_features(data.captions or [], features_file(folder / split, tokens), tokens=tokens)
        own = found.table()[found.index[found.counts.cumsum(0) - found.counts]]  # of the first caption of each image
        for i, about in enumerate(json.loads((folder / split / CAPTIONS).read_text(encoding="utf-8")).values()):
            if about["family"] not in numbers:
                numbers[about["family"]] = len(numbers)
                names.append(about["captions"][0])
                categories.append(about["category"])
                first.append(len(family))
                texts.append(own[i])
            family.append(numbers[about["family"]])
        images.append(data.images)
        num_trained = num_trained or len(numbers)
    # tokens of the two sets may be padded to different lengths
    features = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True) if tokens else torch.stack(texts)
    return Emoji(torch.cat(images), torch.tensor(family), names, categories, torch.tensor(first), features.float(), num_trained)


class Judge:
    """The two ways to say which family an image shows: both give (B, 5), the likeliest families first."""

    def __init__(self, model: bldm.BinaryLatentDiffusion, emoji: Emoji, steps: int, device: torch.device):
        self.model = model
        self.real = to_float(emoji.images).to(device)
        self.bits = torch.cat([model.encode(part) for part in self.real[emoji.first.to(device)].split(512)])
        self.classifier = self._train(emoji, steps, device)

    def _train(self, emoji: Emoji, steps: int, device: torch.device) -> Classifier:
        """Each step shows 128 families, one member of each, at half the resolution."""
        torch.manual_seed(0)
        members = [(emoji.family == i).nonzero()[:, 0] for i in range(len(emoji.names))]
        classifier = Classifier(3, len(members)).to(device).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(members), (128,))
            rows = torch.stack([members[i][torch.randint(len(members[i]), ())] for i in chosen.tolist()])
            logits = classifier(self._small(augment(self.real[rows.to(device)])))
            loss = F.cross_entropy(logits, chosen.to(device), label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        return classifier.eval()

    def _small(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 2)

    def by_bits(self, latents: Tensor) -> Tensor:
        return bk.hamming_topk(latents, self.bits, min(5, len(self.bits)))[1]

    @torch.no_grad()
    def by_classifier(self, images: Tensor) -> Tensor:
        logits = torch.cat([self.classifier(self._small(part)) for part in images.split(512)])
        return logits.topk(min(5, logits.shape[1]), dim=1).indices

    def measure(self, images: Tensor, wanted: Tensor) -> dict[str, float]:
        """Shares of images whose family is the first, or among the first five, by either judge."""
        latents = torch.cat([self.model.encode(part) for part in images.split(512)])
        result = {}
        for name, found in (("bits", self.by_bits(latents)), ("classifier", self.by_classifier(images))):
            hits = found == wanted.to(found.device)[:, None]
            result[f"{name}_top1"] = round(hits[:, 0].float().mean().item(), 4)
            result[f"{name}_top5"] = round(hits.any(1).float().mean().item(), 4)
        return result


def main(
    data: Annotated[Path, typer.Option(help="Folder that examples/emoji/make_dataset.py wrote")] = Path("emoji"),
    model: Annotated[Path, typer.Option(help="Model folder")] = Path("emoji-model"),
    captions: Annotated[int, typer.Option(help="Families of the training set to ask for")] = 200,
    samples: Annotated[int, typer.Option(help="Samples of each caption")] = 4,
    steps: Annotated[str, typer.Option(help="Numbers of steps")] = "8,16,32,64",
    guidance: Annotated[str, typer.Option(help="Guidance scales")] = "1,2,3,5",
    judge_steps: Annotated[int, typer.Option(help="Optimiser steps of the classifier")] = 4000,
    batch_size: Annotated[int, typer.Option(help="Samples at once")] = 1000,
    pictured: Annotated[int, typer.Option(help="Captions of either set in the picture")] = 12,
    commit: Annotated[str | None, typer.Option(help="What the result calls the version [default: git's word]")] = None,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/emoji_quality.json"),
    picture: Annotated[Path, typer.Option()] = Path("docs/images/emoji.png"),
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model, map_location=device)
    emoji = read(data, loaded.autoencoder.image_size, loaded.denoiser.cross_attention)
    judge = Judge(loaded, emoji, judge_steps, device)
    generator = torch.Generator().manual_seed(0)
    asked = {
        "trained": torch.randperm(emoji.num_trained, generator=generator)[:captions].sort().values,
        "held_out": torch.arange(emoji.num_trained, len(emoji.names)),
    }
    result: dict[str, Any] = {
        "machine": device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit or current_commit(),
        "families": {"trained": emoji.num_trained, "held_out": len(emoji.names) - emoji.num_trained},
        "samples_a_caption": samples,
        "baselines": [],
        "samples": [],
    }
    for name, wanted in asked.items():
        real = judge.real[emoji.first[wanted].to(device)]
        decoded = torch.cat([loaded.decode(loaded.encode(part)) for part in real.split(512)])
        anything = loaded.sample(len(wanted), 16, seed=1, batch_size=batch_size)
        for what, images in (("moved real emoji", augment(real)), ("reconstructions", decoded), ("no caption", anything)):
            row = {"set": name, "images": what, **judge.measure(images, wanted)}
            result["baselines"].append(row)
            print(row, flush=True)
    painted: dict[tuple[str, float, int], Tensor] = {}
    for name, wanted in asked.items():
        repeated = wanted.repeat_interleave(samples)
        cond = emoji.features[repeated].to(device)
        for scale in [float(part) for part in guidance.split(",")]:
            for count in [int(part) for part in steps.split(",")]:
                images = loaded.sample(len(repeated), count, labels=cond, guidance_scale=scale, seed=count, batch_size=batch_size)
                row = {"set": name, "steps": count, "guidance": scale, **judge.measure(images, repeated)}
                result["samples"].append(row)
                print(row, flush=True)
                painted[name, scale, count] = images
    # The setting to look at closer is chosen on the training set's captions: nothing is tuned on the held-out ones.
    best = max((row for row in result["samples"] if row["set"] == "trained"), key=lambda row: row["classifier_top1"])
    shown = {name: painted[name, best["guidance"], best["steps"]] for name in asked}
    result["best"] = {name: best[name] for name in ("steps", "guidance")}
    result["by_category"] = {name: by_category(judge, emoji, asked[name], shown[name], samples) for name in asked}
    result["minutes"] = round((time.perf_counter() - start) / 60, 2)
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(out, lambda name: Path(name).write_text(text))
    draw(judge, emoji, asked, shown, samples, pictured, picture)
    print(f"{out}, {picture}")


def by_category(judge: Judge, emoji: Emoji, wanted: Tensor, images: Tensor, samples: int) -> dict[str, dict[str, float]]:
    """The best setting's shares, by Unicode's category, and how many captions each has."""
    result = {}
    for category in dict.fromkeys(emoji.categories[i] for i in wanted.tolist()):
        of_it = torch.tensor([emoji.categories[i] == category for i in wanted.tolist()])
        rows = of_it.repeat_interleave(samples)
        measured = judge.measure(images[rows.to(images.device)], wanted.repeat_interleave(samples)[rows])
        result[category] = {"captions": int(of_it.sum()), **measured}
    return result


def draw(
    judge: Judge, emoji: Emoji, asked: dict[str, Tensor], images: dict[str, Tensor], samples: int, pictured: int, path: Path
) -> None:
    """The best setting's samples, each caption's beside the real emoji: two captions a row, held-out ones below."""
    cells, texts = [], []
    for name, wanted in asked.items():
        chosen = torch.linspace(0, len(wanted) - 1, min(pictured, len(wanted))).round().long().tolist()
        for i in chosen:
            real = judge.real[emoji.first[wanted[i]]]
            cells += [real, *images[name][i * samples : (i + 1) * samples]]
            texts += [f"{'held out' if name == 'held_out' else 'real'}:", *[emoji.names[int(wanted[i])]] * samples]
    save_png(draw_grid(torch.stack([cell.float() for cell in cells]), texts, columns=2 * (samples + 1)), path)


if __name__ == "__main__":
    typer.run(main)
