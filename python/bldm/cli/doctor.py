"""`bldm doctor`: what is installed, what each backend offers, why one is missing."""

from rich.markup import escape
from rich.table import Table

from bldm_kernels.doctor import report

from ..bundled import bundled_model
from .common import console


def doctor() -> None:
    """Print versions, devices, backends and the reasons for what is missing."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in report():
        table.add_row(heading, escape(text))
    try:
        table.add_row("bundled model", escape(str(bundled_model())))
    except FileNotFoundError as error:
        table.add_row("bundled model", escape(str(error)))
    console.print(table, highlight=False)
