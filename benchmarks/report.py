"""What is said of the times: ratios, tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .measure import Result
from .work import SPECIFICATION, Item

Row = dict[str, Any]

# The targets are for one dtype, and not for the specification.
TARGET_DTYPE = torch.float32

# With more of the CPU time than this in other hands, threads that wait for each other wait a hundred times too long.
QUIET = 0.05
NOISY = "(!)"

MET = {True: "yes", False: "no", None: "-"}


def rows(item: Item, dtype: torch.dtype, results: Mapping[str, Result]) -> list[Row]:
    """A line of the table for each backend that was timed.

    Returns:
        ``item``; ``backend``; ``ms`` of ours and of the best "eager", "compiled" and "copy"; ``ratios``: how many times as long
        as ours (eager, compiled) take, or for "bandwidth" the percentage of a copy's (with ``gb_per_s`` of ours, 3 passes, and
        the copy, 2 passes); ``targets`` of these, and whether they are ``met``. None stands for what was not timed.
    """
    best = {
        kind: min((r.median for r in results.values() if r.kind == kind and r.ms), default=None)
        for kind in ("eager", "compiled", "copy")
    }
    found = []
    for name, result in results.items():
        if result.kind != "ours" or not result.ms:
            continue
        ms = {"ours": result.median, **best}
        row = {"item": item.name, "backend": name, "ms": ms}
        if item.stage == "bandwidth":
            megabytes = 1e-6 * item.shape[0] * item.shape[1] * dtype.itemsize
            row["gb_per_s"] = [ms[kind] and passes * megabytes / ms[kind] for kind, passes in (("ours", 3), ("copy", 2))]
            row["ratios"] = [ms["copy"] and 150 * ms["copy"] / ms["ours"]]
        else:
            row["ratios"] = [ms[kind] and ms[kind] / ms["ours"] for kind in ("eager", "compiled")]
        row["targets"] = item.targets if dtype == TARGET_DTYPE and result.backend != SPECIFICATION else ()
        row["met"] = [r and r >= target for r, target in zip(row["ratios"], row["targets"], strict=False)]
        found.append(row)
    return found


def tables(measured: Sequence[tuple[Item, Mapping[str, Result]]], dtype: torch.dtype) -> str:
    """All that was measured, in Markdown."""
    times = [("item", "backend", "ms", "eager ms", "compiled ms", "x eager", "x compiled", "targets", "met")]
    speeds = [("item", "backend", "GB/s, 3 passes", "copy GB/s, 2 passes", "% of the copy", "targets", "met")]
    refused, noisy, sweep = [], [], {}
    for item, results in measured:
        others = max((result.others or 0.0 for result in results.values()), default=0.0)
        label = item.name
        if others > QUIET:
            noisy.append(f"{item.name} ({others:.0%})")
            label = f"{item.name} {NOISY}"
        refused += [f"Refused, not timed: {item.name}, {n}: {r.refused}" for n, r in results.items() if r.refused is not None]
        eager = [(name, result.median) for name, result in results.items() if result.kind == "eager" and result.ms]
        named = ", ".join(f"{_number(ms)} {name}" if len(eager) > 1 else _number(ms) for name, ms in eager)
        for row in rows(item, dtype, results):
            ratios = [_number(ratio, 2) for ratio in row["ratios"]]
            goals = " / ".join(f"{target:g}" for target in row["targets"]), " / ".join(MET[met] for met in row["met"])
            if item.stage == "bandwidth":
                speeds.append((label, row["backend"], *(_number(g, 1) for g in row["gb_per_s"]), *ratios, *goals))
            else:
                ms = _number(row["ms"]["ours"]), named or "-", _number(row["ms"]["compiled"])
                times.append((label, row["backend"], *ms, *ratios, *goals))
            if item.sweep and row["ratios"][0]:
                sweep.setdefault(row["backend"], []).append((row["ratios"][0], item.name))
    remarks = []
    for backend, ratios in sweep.items():
        ratio, name = min(ratios)
        remarks.append(f"Worst of the sweep, {backend}: {ratio:.2f} x eager at {name}.")
    if noisy:
        remarks.append(f"{NOISY} Not to be trusted, since other processes took CPU time meanwhile: {', '.join(noisy)}.")
    return "\n\n".join([*(_markdown(lines) for lines in (times, speeds) if len(lines) > 1), *remarks, *refused])


def plot(path: Path, lines: Sequence[Row], title: str) -> None:
    """Ratios of ``rows`` as bars from 1, on a logarithmic axis; a mark stands at each target."""
    # Only where a picture is asked for: the tables need no matplotlib.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.use_sticky_edges = False
    for index, (kind, color) in enumerate((("eager PyTorch", "tab:blue"), ("torch.compile", "tab:orange"))):
        heights = [y + 0.36 * index - 0.18 for y in range(len(lines))]
        bars = [(height, row["ratios"][index]) for height, row in zip(heights, lines, strict=True) if row["ratios"][index]]
        axes.barh([h for h, _ in bars], [r - 1 for _, r in bars], 0.34, left=1, color=color, label=f"against {kind}")
        for height, ratio in bars:
            axes.annotate(f"{ratio:.2f}", (max(ratio, 1), height), (3, -3), textcoords="offset points", fontsize=8)
        for height, row in zip(heights, lines, strict=True):
            if row["targets"]:
                axes.plot(row["targets"][index], height, "k|", markersize=12)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.1, y=0.02)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(lines)), [f"{row['item']}\n{row['backend']}" for row in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="times as fast as the best of them (log scale; black marks: targets)", title=title)
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, format="png", dpi=120)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits if value < 10 else 1}f}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
