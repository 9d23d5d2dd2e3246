"""The options of ``python -m fused_elbo bench``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .checking import BOUNDS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in BOUNDS}
# Seconds of timing for each item, and minutes for all of them, by kind of device.
BUDGETS = {"cpu": 4.0, "cuda": 1.5}
MINUTES = {"cpu": 6.0, "cuda": 7.0}
QUICK_BUDGET = 0.2
QUICK_MINUTES = 1.5


class BadArguments(ValueError):
    """What the user can mend, in one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="where (default: cuda where there is one, else cpu)")
    add("--dtype", type=_dtypes, default=["float32"], metavar="NAMES",
        help=f"of all tensors, one or several of {', '.join(DTYPES)} with commas between (default: float32)")  # fmt: skip
    threads = min(2, os.cpu_count() or 1)
    add("--threads", type=int, default=threads, metavar="N", help=f"of everybody, on the CPU (default: {threads})")
    add("--pin", action="store_true", help="keep to as many processors as there are threads (default: off)")
    add("--filter", default="", metavar="SUBSTRING", help="only items with this in their name or model (default: all)")
    add("--all", action="store_true", help="every stage on every shape (default: those that a run has time for)")
    add("--sizes", action="store_true", help='add items named "sweep": 2^6 to 2^24 elements against eager (default: off)')
    add(
        "--cold", action="store_true", help="on a CPU, also with inputs that no cache holds; a GPU has it anyway (default: off)"
    )
    add("--one-by-one", action="store_true",
        help="every peer's calls in a row, as in a training, which finds memory as it left it (default: in turns)")  # fmt: skip
    add("--no-compile", dest="compile", action="store_false", help="without torch.compile (default: with it)")
    shown = "{cpu:g} on a CPU, {cuda:g} on a GPU"
    add("--budget", type=float, metavar="SECONDS", help=f"of timing, for each item (default: {shown.format(**BUDGETS)})")
    add("--minutes", type=float, metavar="MINUTES",
        help=f"after these no further item begins; --resume goes on (default: {shown.format(**MINUTES)})")  # fmt: skip
    quick = f"a budget of {QUICK_BUDGET:g} s, {QUICK_MINUTES:g} minutes, torch.compile in its default mode alone (default: off)"
    add("--quick", action="store_true", help=quick)
    add("--json", type=Path, metavar="PATH", help="write everything that was measured there, after each item (default: off)")
    add("--resume", action="store_true", help="go on with the file of --json (default: off)")
    add("--markdown", type=Path, metavar="PATH", help="write the tables there too (default: off)")
    add("--plot", type=Path, metavar="FOLDER", help="draw ratios and rates there, as PNG (default: off)")
    add("--list", action="store_true", help="name the items and leave (default: off)")


def _dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"got {name!r}, takes of {', '.join(DTYPES)}")
    return names
