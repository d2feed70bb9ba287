"""Quality of a Fashion-MNIST model: do samples look like their label, and how far are they from the test set?

    python benchmarks/quality/fashion_mnist.py --data /usr/share/datasets/fashion-mnist

Trains a small classifier (92% test accuracy or the script stops), then measures: the share of samples it gives their label, and
the Frechet distance in its features between 10,000 images and the 10,000 test images, for samples (as a function of steps, rule
and guidance), for reconstructions, and for real training images. Writes one JSON file and one plot.

With `--precision float32 --precision bf16 --precision fp8` it compares the model's engines instead, at 16 steps, judged by one
classifier, and writes fashion_mnist_engines.json.
"""

import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bldm import BinaryLatentDiffusion, bundled_model
from bldm.bench.run import commit as current_commit
from bldm.bench.run import device_name
from bldm.checkpoint import write_atomically
from bldm.data import load_images
from bldm.engine import DiffusionEngine
from classifier import evaluate, frechet_distance, train_classifier
from torch import Tensor

STEPS, RULES, GUIDANCE = (4, 8, 16, 32, 64), ("plugin", "marginal"), (1.0, 2.0)


def plot(rows: list[dict[str, Any]], baselines: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for rule in RULES:
        for guidance in GUIDANCE:
            line = [r for r in rows if r["rule"] == rule and r["guidance"] == guidance]
            style = "-" if guidance == 1 else "--"
            axes.plot(
                [r["steps"] for r in line],
                [r["frechet"] for r in line],
                style,
                marker="o",
                label=f"{rule}, guidance {guidance:g}",
            )
    for name, value in baselines.items():
        axes.axhline(value, color="grey", linewidth=0.8)
        axes.text(STEPS[0], value, name, fontsize=8, va="bottom", color="grey")
    axes.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Frechet distance to the test set")
    axes.set_xticks(STEPS, [str(s) for s in STEPS])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def measure(
    model: BinaryLatentDiffusion | DiffusionEngine,
    test_images: Tensor,
    test_labels: Tensor,
    judge: Callable[[Tensor], tuple[Tensor, Tensor]],
    settings: Iterable[tuple[str, float, int]],
    num_samples: int,
    num_runs: int,
    batch_size: int,
) -> dict[str, Any]:
    """Reconstructions of the test images, and samples at every (rule, guidance, steps), means of `num_runs` runs with seeds of
    their own; `judge` gives classes and features."""
    real = judge(test_images)[1]
    decoded = torch.cat([model.decode(model.encode(x)) for x in test_images.split(1000)])
    decoded_predicted, decoded_features = judge(decoded)
    reconstructions = {
        "frechet": round(frechet_distance(decoded_features, real), 4),
        "classified_as_their_label": round((decoded_predicted.cpu() == test_labels).float().mean().item(), 4),
        "mean_absolute_error": round((decoded - test_images).abs().mean().item() / 2, 5),
    }
    samples = []
    labels = (torch.arange(num_samples) * 10 // num_samples).to(test_images.device)
    for rule, guidance, steps in settings:
        runs = []
        for run in range(num_runs):
            images = model.sample(
                num_samples,
                steps,
                labels=labels,
                guidance_scale=guidance,
                rule=rule,
                seed=steps + 1000 * run,
                batch_size=batch_size,
            )
            classes, features = judge(images)
            right = (classes == labels).double()
            runs.append(
                [right.mean().item(), frechet_distance(features, real), *(right[labels == c].mean().item() for c in range(10))]
            )
        classified, distance, *by_class = torch.tensor(runs, dtype=torch.float64).mean(0).tolist()
        row = {
            "rule": rule,
            "guidance": guidance,
            "steps": steps,
            "classified_as_their_label": round(classified, 4),
            "frechet": round(distance, 4),
            "by_class": [round(value, 3) for value in by_class],
        }
        if num_runs > 1:
            row["runs"] = [{"classified_as_their_label": round(run[0], 4), "frechet": round(run[1], 4)} for run in runs]
        samples.append(row)
        print(row, flush=True)
    return {"reconstructions": reconstructions, "samples": samples}


def main(
    data: Annotated[Path, typer.Option(help="Folder with the IDX files")] = Path("/usr/share/datasets/fashion-mnist"),
    model: Annotated[Path | None, typer.Option(help="Model folder [default: bundled]")] = None,
    num_samples: Annotated[int, typer.Option(help="Samples for each figure")] = 10_000,
    num_runs: Annotated[int, typer.Option(min=1, help="Runs of every setting, with other seeds; figures are their means")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of the classifier")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples at once")] = 2500,
    precision: Annotated[
        list[str] | None, typer.Option(help="Compare these: float32 (the model itself), bf16, fp8; may be repeated")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="What the result calls the version [default: git's word]")] = None,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/fashion_mnist_quality.json"),
    picture: Annotated[Path, typer.Option()] = Path("docs/images/fashion_mnist_quality.png"),
) -> None:
    if precision:
        out = out.with_stem(out.stem.replace("_quality", "") + "_engines")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    train, test = load_images(data, "train"), load_images(data, "test")
    assert train.labels is not None and test.labels is not None
    classifier = train_classifier(train.images, train.labels, epochs, device)
    test_images = (test.images.float() / 127.5 - 1).to(device)
    predicted, real = evaluate(classifier, test_images)
    accuracy = (predicted.cpu() == test.labels).float().mean().item()
    print(f"classifier: {accuracy:.4f} test accuracy")
    if accuracy < 0.92:
        raise SystemExit("the classifier is below 92% test accuracy: its judgement is not worth reporting")

    loaded = BinaryLatentDiffusion.from_pretrained(model or bundled_model(), map_location=device)
    subset = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[: len(test_images)]
    training = (train.images[subset].float() / 127.5 - 1).to(device)
    result: dict[str, Any] = {
        "machine": device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit or current_commit(),
        "num_samples": num_samples,
        "num_runs": num_runs,
        "classifier_test_accuracy": round(accuracy, 4),
        "real_training_images": {"frechet": round(frechet_distance(evaluate(classifier, training)[1], real), 4)},
    }

    def measured(painter: BinaryLatentDiffusion | DiffusionEngine, settings: Iterable[tuple[str, float, int]]) -> dict[str, Any]:
        judge = partial(evaluate, classifier)
        return measure(painter, test_images, test.labels, judge, settings, num_samples, num_runs, batch_size)

    if precision:
        result["engines"] = {}
        for name in precision:
            painter = loaded if name == "float32" else loaded.optimize(name)
            result["engines"][name] = measured(painter, ((rule, guidance, 16) for rule in RULES for guidance in GUIDANCE))
    else:
        result |= measured(loaded, ((rule, guidance, steps) for rule in RULES for guidance in GUIDANCE for steps in STEPS))
    result["minutes"] = round((time.perf_counter() - start) / 60, 2)
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(out, lambda name: Path(name).write_text(text))
    if precision:
        return
    baselines = {"reconstructions": result["reconstructions"]["frechet"]}
    baselines["real training images"] = result["real_training_images"]["frechet"]
    plot(result["samples"], baselines, picture)
    print(f"{out}, {picture}")


if __name__ == "__main__":
    typer.run(main)
