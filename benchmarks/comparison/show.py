"""The table (Markdown, to the terminal) and the plot of a comparison.

python benchmarks/comparison/show.py benchmarks/results/comparison_emoji.json    (writes docs/images/comparison_emoji.png)
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from settings import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"binary": "#2f9e5b", "tokens": "#d9a441", "gaussian": "#3b7dd8"}
QUALITIES = {"frechet": "Frechet distance to the test set", "accuracy": "shows what was asked for, %"}
Result = dict[str, Any]


def rows_of(entry: Result, kind: str, guidance: float) -> list[Result]:
    return [row for row in entry["samples"] if row["set"] == kind and row["guidance"] == guidance]


def kinds(result: Result) -> list[tuple[str, float]]:
    """(set, guidance) in the order of the file."""
    rows = (row for entry in result["methods"].values() for row in entry["samples"])
    return list(dict.fromkeys((row["set"], row["guidance"]) for row in rows))


def quality(row: Result) -> str:
    shown = [f"{100 * row['accuracy']:.1f}%"]
    return ", ".join([f"{row['frechet']:.3f}", *shown] if "frechet" in row else shown)


def speed(row: Result) -> str:
    shown = f"{row['images_per_second']:,.0f}"
    return f"{shown} ({row['engine_images_per_second']:,.0f})" if "engine_images_per_second" in row else shown


def table(result: Result) -> str:
    """Quality by method, set, guidance and steps; a line of what each method is; images/s (those of the engine)."""
    methods = result["methods"]
    steps = list(dict.fromkeys(row["steps"] for entry in methods.values() for row in entry["samples"]))
    lines = ["| method | parameters | minutes | training steps | reconstructions |", "| --- | --- | --- | --- | --- |"]
    for name, entry in methods.items():
        parameters = " + ".join(f"{count / 1e6:.2f} M" for count in entry["parameters"].values())
        minutes = " + ".join(f"{value:.1f}" for value in entry["training_minutes"])
        done = " + ".join(f"{value:,}" for value in entry["training_steps"])
        lines.append(f"| {METHODS[name]} | {parameters} | {minutes} | {done} | {quality(entry['reconstructions'])} |")
    for title, cell in (("quality", quality), ("images/s", speed)):
        lines += ["", f"| {title} | " + " | ".join(f"{count} steps" for count in steps) + " |", "| --- " * (len(steps) + 1) + "|"]
        for kind, guidance in kinds(result):
            for name, entry in methods.items():
                label = ", ".join(part for part in (METHODS[name], kind.replace("_", " "), f"guidance {guidance:g}") if part)
                lines.append(f"| {label} | " + " | ".join(map(cell, rows_of(entry, kind, guidance))) + " |")
    return "\n".join(lines)


def draw(result: Result, path: Path) -> None:
    """Each quality against steps, and against images/s; guidance dashed."""
    shown = [name for name in QUALITIES if all(name in row for entry in result["methods"].values() for row in entry["samples"])]
    panels = [(name, kind) for kind in dict.fromkeys(kind for kind, _ in kinds(result)) for name in shown]
    figure, axes = plt.subplots(2, len(panels), figsize=(5 * len(panels), 7.5), squeeze=False, layout="constrained")
    for column, (measure, kind) in enumerate(panels):
        for axis, across, words in (
            (axes[0, column], "steps", "sampling steps"),
            (axes[1, column], "images_per_second", "images/s"),
        ):
            for i, guidance in enumerate(dict.fromkeys(g for k, g in kinds(result) if k == kind)):
                for name, entry in result["methods"].items():
                    rows = rows_of(entry, kind, guidance)
                    y = [100 * row[measure] if measure == "accuracy" else row[measure] for row in rows]
                    label = f"{METHODS[name]}, guidance {guidance:g}"
                    style = {"color": COLOURS[name], "linestyle": ("-", "--", ":")[i % 3], "marker": "o", "markersize": 3}
                    axis.plot([row[across] for row in rows], y, label=label, **style)
            axis.set(xscale="log", xlabel=words, ylabel=QUALITIES[measure], yscale="log" if measure == "frechet" else "linear")
            if across == "steps":
                steps = sorted({row["steps"] for entry in result["methods"].values() for row in entry["samples"]})
                axis.set_xticks(steps, map(str, steps))
                axis.tick_params(which="minor", bottom=False, labelbottom=False)
            axis.set_title(kind.replace("_", " "), fontsize=9)
            axis.grid(True, color="#eeeeee")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8, handlelength=4)
    entry = next(iter(result["methods"].values()))
    figure.supxlabel(f"{entry['machine']}, torch {entry['torch']}, {entry['date']}", fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    results: Annotated[list[Path], typer.Argument(help="benchmarks/results/comparison_*.json")],
    images: Annotated[Path, typer.Option(help="Where the pictures go")] = Path("docs/images"),
) -> None:
    for path in results:
        result = json.loads(path.read_text())
        print(table(result))
        draw(result, images / f"{path.stem}.png")


if __name__ == "__main__":
    typer.run(main)
