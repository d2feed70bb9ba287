"""Draws result files: of `bldm bench --out` speed against size, and the fraction of the copy bandwidth; of engine.py its curves.

python benchmarks/plot.py benchmarks/results/nvidia-h200.csv            (writes docs/images/nvidia-h200-{speed,wall}.png)
python benchmarks/plot.py benchmarks/results/engine_nvidia_h200.json    (writes docs/images/engine_nvidia_h200-curves.png)
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLOURS = {
    "eager": "#9a9a9a",
    "matmul": "#5f5f5f",
    "compile": "#d9a441",
    "triton": "#3b7dd8",
    "cuda": "#2f9e5b",
    "cpu": "#8e5bb5",
}
Row = dict[str, str]


def kind(row: Row) -> str:
    """What is compared over sizes: the op and its configuration without the size, which comes first."""
    words = row["config"].split()
    if row["op"] == "hamming_topk":
        return f"hamming_topk, {words[0]} quer{'y' if words[0] == '1' else 'ies'}"
    return " ".join([row["op"], *words[1:]])


def source(row: Row) -> str:
    return f"{row['device']}, torch {row['torch']}, {row['date']}, {row['commit']}"


def grid(count: int, width: float, height: float, columns: int = 4):  # noqa: ANN201
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat[:count])


def legend(figure, rows: list[Row]) -> None:  # noqa: ANN001
    here = {row["provider"] for row in rows}
    shown = [name for name in COLOURS if name in here]
    handles = [plt.Line2D([], [], color=COLOURS[name], marker="o", linewidth=2) for name in shown]
    figure.legend(handles, shown, loc="outside upper center", ncols=len(shown), frameon=False)
    figure.supxlabel(source(rows[0]), fontsize=8, color="#666666")


def draw_speed(rows: list[Row], path: Path) -> None:
    """Billions of bits a second against bits, both logarithmic; the bar is p20 to p80."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[kind(row)].append(row)
    groups = {name: group for name, group in groups.items() if len({row["bits"] for row in group}) > 1} or groups
    figure, axes = grid(len(groups), 3.1, 2.5)
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        for provider, colour in COLOURS.items():
            mine = sorted((row for row in group if row["provider"] == provider), key=lambda row: int(row["bits"]))
            bits = [int(row["bits"]) for row in mine]
            p20, p50, p80 = ([int(row["bits"]) / float(row[p]) / 1e6 for row in mine] for p in ("p20", "p50", "p80"))
            spread = [[m - low for m, low in zip(p50, p80, strict=True)], [high - m for m, high in zip(p50, p20, strict=True)]]
            axis.errorbar(bits, p50, yerr=spread, color=colour, marker="o", markersize=4, linewidth=1.5)
        axis.set(xscale="log", yscale="log")
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(True, color="#eeeeee")
    figure.supylabel("billion bits a second, against bits", fontsize=10)
    legend(figure, rows)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_wall(rows: list[Row], path: Path) -> None:
    """The fraction of the copy bandwidth of every provider, at the largest size of each op."""
    largest: dict[str, list[Row]] = {}
    for row in rows:
        group = largest.setdefault(kind(row), [])
        if group and group[0]["config"] != row["config"]:
            group.clear()  # rows come in order of size
        group.append(row)
    groups = sorted(largest.values(), key=lambda group: group[0]["op"])
    here = {row["provider"] for row in rows}
    providers = [name for name in COLOURS if name in here]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.6 * len(groups)), layout="constrained")
    height = 0.8 / len(providers)
    for i, group in enumerate(groups):
        for row in group:
            y = i + (providers.index(row["provider"]) - (len(providers) - 1) / 2) * height
            fraction = 100 * float(row["fraction"])
            axis.barh(y, fraction, height, color=COLOURS[row["provider"]])
            label = f"{fraction:.0f}" if fraction >= 1 else f"{fraction:.1g}"
            axis.annotate(label, (fraction, y), (3, 0), textcoords="offset points", va="center", fontsize=6)
    axis.axvline(100, color="#999999", linewidth=1, linestyle=":")
    names = [f"{group[0]['op']}\n{group[0]['config']}" for group in groups]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("fewest bytes the packed op must move / time, % of the copy bandwidth")
    legend(figure, rows)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """What the engines cost as one quantity grows: ms a step, and the memory of an image."""
    names = {"batch": "batch", "bits": "bits a position", "grid": "side of the grid", "steps": "steps"}
    panels = [(name, "ms_per_step") for name in names if name in results["curves"]]
    panels += [(name, "mib_per_image") for name in ("batch", "grid") if name in results["curves"]]
    colours = {"bf16": COLOURS["triton"], "fp8": COLOURS["cuda"]}
    figure, axes = grid(len(panels), 3.4, 2.8, columns=3)
    for axis, (name, quantity) in zip(axes, panels, strict=True):
        ticks: set[int] = set()
        for precision, rows in results["curves"][name].items():
            values = sorted((int(value), row[quantity]) for value, row in rows.items())
            axis.plot(*zip(*values, strict=True), marker="o", markersize=3, color=colours[precision], label=precision)
            ticks |= {value for value, _ in values}
        axis.set(xscale="log", yscale="log", xlabel=names[name])
        axis.set_ylabel({"ms_per_step": "ms a step", "mib_per_image": "MiB an image"}[quantity])
        axis.set_xticks(sorted(ticks), map(str, sorted(ticks)), fontsize=7, rotation=45 if len(ticks) > 8 else 0)
        axis.minorticks_off()
        axis.grid(True, color="#eeeeee")
    axes[0].legend(frameon=False)
    machine = results["machine"]
    dates = sorted({row["date"] for curve in results["curves"].values() for rows in curve.values() for row in rows.values()})
    figure.supxlabel(f"{machine['device']}, torch {machine['torch']}, {', '.join(dates)}", fontsize=8, color="#666666")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="CSV files of bldm bench, JSON files of engine.py")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the pictures go (default: docs/images)")
    arguments = parser.parse_args()
    arguments.images.mkdir(parents=True, exist_ok=True)
    for path in arguments.results:
        if path.suffix == ".json":
            target = arguments.images / f"{path.stem}-curves.png"
            draw_curves(json.loads(path.read_text()), target)
            print(target)
            continue
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise SystemExit(f"{path}: no rows")
        for name, draw in (("speed", draw_speed), ("wall", draw_wall)):
            target = arguments.images / f"{path.stem}-{name}.png"
            draw([row for row in rows if row["metric"] == "ms"], target)
            print(target)


if __name__ == "__main__":
    main()
