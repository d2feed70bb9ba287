"""The benchmark suite: every op x provider, checked before it is timed, against PyTorch and against the machine's own copy.

`cases` says what is measured, `plain` holds the opponents, `checks` what is right, `timing` how time is taken, `run` makes rows.
"""

from .cases import OPS, SIZES, Case, cases
from .run import PROVIDERS, Report, Row, run, write_csv

__all__ = ["OPS", "PROVIDERS", "SIZES", "Case", "Report", "Row", "cases", "run", "write_csv"]
