"""`bldm bench`: every op with every provider on this machine, against PyTorch and against the memory's own speed."""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..bench import OPS, PROVIDERS, SIZES, Row, cases, run, write_csv
from ..progress import progress_bar
from .common import choose_device, console, one_line_errors


def _chosen(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...] | None:
    """The comma-separated names of an option, each of them known."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names


def _table(name: str, rows: list[Row], show_header: bool) -> Table:
    table = Table(title=escape(name), title_justify="left", title_style="bold", box=None, show_header=show_header)
    table.add_column("", width=10)
    for heading, width in (("median", 10), ("p20 - p80", 17), ("x eager", 9), ("of the wall", 11)):
        table.add_column(heading, width=width, justify="right", no_wrap=True)
    for row in rows:
        unit, scale = ("us", 1e3) if row.p50 < 1 else ("ms", 1)
        spread = f"{row.p20 * scale:.4g} - {row.p80 * scale:.4g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.1f}"
        table.add_row(row.provider, f"{row.p50 * scale:.4g} {unit}", spread, ratio, f"{row.fraction:.1%}")
    return table


@one_line_errors
def bench(
    ops: Annotated[str | None, typer.Option(help=f"Which, with commas: {', '.join(OPS)} [default: all]")] = None,
    providers: Annotated[str | None, typer.Option(help=f"Which, with commas: {', '.join(PROVIDERS)} [default: all]")] = None,
    size: Annotated[str | None, typer.Option(help="small, large or all [default: all on a GPU, else small]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows as CSV")] = None,
    commit: Annotated[str | None, typer.Option(help="What the rows call the version [default: git's word]")] = None,
) -> None:
    """Check, then time the ops against plain PyTorch, torch.compile and the copy bandwidth.

    Times are medians. "x eager" is how many times faster than plain PyTorch; "of the wall" is the speed of the fewest bytes
    the op must move over that of a plain copy measured in the same run (small problems in a cache can exceed it).
    """
    where = choose_device(device)
    size = size or ("all" if where.type == "cuda" else "small")
    if size not in SIZES:
        raise ValueError(f"size: {size!r} is not one of {', '.join(SIZES)}")
    wanted, names = _chosen("ops", ops, OPS), _chosen("providers", providers, PROVIDERS)
    chosen = [case for case in cases(size, where) if wanted is None or case.op in wanted]
    with progress_bar(console) as bar:
        task = bar.add_task("copy bandwidth", total=len(chosen))
        seen: set[str] = set()

        def advance(label: str) -> None:
            seen.add(label.rsplit(",", 1)[0])
            bar.update(task, description=label, completed=len(seen) - 1)

        report = run(chosen, where, names, source=commit, progress=advance)
        bar.update(task, description="done", completed=len(chosen))
    for i, (name, rows) in enumerate(groupby(report.rows, key=lambda row: f"{row.op} {row.config}")):
        console.print(_table(name, list(rows), show_header=i == 0), highlight=False)
    for line in report.skipped:
        console.print(f"skipped: {line}", soft_wrap=True, highlight=False, markup=False)
    for line in report.failures:
        console.print(f"FAILED: {line}", soft_wrap=True, highlight=False, markup=False)
    copy = f"copy bandwidth {report.bandwidth / 1e9:,.0f} GB/s (read + write)"
    console.print(f"{len(report.rows)} rows, {copy}", soft_wrap=True, highlight=False, markup=False)
    if out is not None:
        write_csv(report.rows, out)
    if report.failures:
        raise typer.Exit(1)
