"""``python -m benchmarks.cpu``: the backends beside eager PyTorch and torch.compile on a CPU, in one run, as ratios."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_elbo import ops

from . import report, work
from .measure import BOUNDS, Result, measure

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in BOUNDS}
# Triton runs on a CPU as an interpreter only.
NEVER = {"triton": "its interpreter is not timed"}
ENVIRONMENT_PREFIXES = ("FUSED_ELBO_", "OMP_", "KMP_", "GOMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_PRELOAD", "TORCH", "ATEN_")
REFUSED = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the tables.

    Args:
        argv: the arguments. Default None: those of the process.

    Returns:
        The exit code: 0, 1 if a peer was refused because its numbers are wrong, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args = parser.parse_args(argv)
    chosen = [item for item in work.items(args.sizes) if args.filter in item.name]
    if not chosen:
        parser.error(f"--filter: no item contains {args.filter!r}, of: {', '.join(i.name for i in work.items(args.sizes))}")
    for path in (args.json, args.plot):
        if path and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent}")
    dtype = DTYPES[args.dtype]
    torch.set_num_threads(args.threads)
    backends = {name: NEVER.get(name) or ops.unavailable(name, "cpu") for name in ops.BACKENDS}
    facts = environment(argv, backends)
    measured: list[tuple[work.Item, dict[str, Result]]] = []
    code = 0
    try:
        for item in (bar := tqdm(chosen, unit="item")):
            bar.set_description(item.name)
            if args.compile:
                # Each item starts with no graphs, and so within the limit on recompilations.
                torch._dynamo.reset()
            runnable = [name for name, reason in backends.items() if reason is None]
            peers = work.peers(item, dtype, runnable, compiled=args.compile)
            measured.append((item, measure(peers, dtype, args.budget)))
    except KeyboardInterrupt:
        code = INTERRUPTED
    print(_heading(facts, args.dtype), report.tables(measured, dtype), sep="\n\n")
    if args.json:
        content = [
            {
                "name": item.name,
                "shape": item.shape,
                "peers": {name: result.summary() for name, result in results.items()},
                "rows": report.rows(item, dtype, results),
            }
            for item, results in measured
        ]
        text = json.dumps({"environment": facts, "dtype": args.dtype, "bound": BOUNDS[dtype], "items": content}, indent=1)
        args.json.write_text(text + "\n")
    if args.plot:
        bars = [(item, results) for item, results in measured if item.stage != "bandwidth" and not item.sweep]
        lines = [row for item, results in bars for row in report.rows(item, dtype, results)]
        # Beside a backend that is built for speed the reference would only flatten the bars.
        lines = [row for row in lines if row["backend"] != work.SPECIFICATION] or lines
        report.plot(args.plot, lines, f"Forward and backward, {args.dtype}, {facts['cpu']}, {facts['threads']} threads")
    refused = any(result.refused is not None for _, results in measured for result in results.values())
    return code or (REFUSED if refused else 0)


def environment(argv: Sequence[str], backends: dict[str, str | None], module: str = "benchmarks.cpu") -> dict[str, Any]:
    """Where, when and with what a measurement was made; ``backends`` has the reason of each that is left out."""
    capability = None
    if backends.get("native", "") is None:
        capability = getattr(importlib.import_module(ops.BACKENDS["native"]), "capability", None)
    changes = _git("--no-optional-locks", "status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *argv]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "native_capability": capability and capability(),
        "backends": {name: reason or "timed" for name, reason in backends.items()},
        # Large tensors are new pages at each call, so what a page is decides how long the largest items take.
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip() or None,
        # A folder decides nothing.
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(ENVIRONMENT_PREFIXES) and not name.endswith("_DIR")
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="float32", help="of all tensors (default: float32)")
    threads = min(2, os.cpu_count() or 1)
    add("--threads", type=int, default=threads, metavar="N", help=f"of everybody (default: {threads})")
    add("--filter", default="", metavar="SUBSTRING", help="only the items with this in their name (default: all)")
    add("--sizes", action="store_true", help='add items named "sweep": 2^6 to 2^24 elements against eager (default: off)')
    add("--no-compile", dest="compile", action="store_false", help="without torch.compile (default: with it)")
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--budget", type=float, default=4.0, metavar="SECONDS", help="of timing, for each item (default: 4)")
    quick = "a budget of 0.2 seconds: to see that it runs (default: off)"
    time.add_argument("--quick", dest="budget", action="store_const", const=0.2, help=quick)
    add("--json", type=Path, metavar="PATH", help="write everything that was measured there (default: off)")
    add("--plot", type=Path, metavar="PATH", help="draw the ratios there, as PNG (default: off)")
    return parser


def _heading(facts: dict[str, Any], dtype: str) -> str:
    left_out = [f"{name}: {reason}" for name, reason in facts["backends"].items() if reason != "timed"]
    return "\n".join(
        (
            f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']} ({facts['torch_capability']}), {dtype}, "
            f"commit {facts['commit']}{' and changes' if facts['uncommitted_changes'] else ''}, {facts['date']}",
            f"Backends left out: {'; '.join(left_out) or 'none'}.",
            "Medians. x eager, x compiled: how many times as long as ours the best of them takes, forward and backward.",
        )
    )


def _cpu() -> str:
    # platform.processor() is empty or the architecture's name on Linux.
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _git(*arguments: str) -> str | None:
    """What git says of this repository; None where there is none."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
