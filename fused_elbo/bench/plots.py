"""Pictures of a record: how many times as fast, and how near to the bandwidth of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Row, headline

# Of Okabe and Ito, "Color Universal Design" (2008): told apart by the colour-blind too.
OURS, EAGER, COMPILED, INK, FAINT = "#0072B2", "#D55E00", "#E69F00", "#222222", "#999999"
PEERS = {"eager": ("eager PyTorch", EAGER), "compiled": ("torch.compile", COMPILED)}
MARKERS = {"nll": "s", "classic": "D", "both": "^"}
LATENT_MARKER = "o"

WIDTH_INCHES = 7.5
DPI = 120


def draw(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    """Write ``ratios-DTYPE.png`` and ``roofline-DTYPE.png`` of each dtype that has times; returns what was written."""
    facts = content["environment"]
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    written = []
    for dtype in dict.fromkeys(item["dtype"] for item in content["items"]):
        items = [
            item for item in content["items"] if item["dtype"] == dtype and item["stage"] != "bandwidth" and not item["sweep"]
        ]
        lines = [(item, row) for item in items if (row := headline(item)) is not None]
        rated = [(item, row) for item, row in lines if row["gb_per_s"]]
        for name, drawn, function in (("ratios", lines, ratios), ("roofline", rated, roofline)):
            if drawn:
                path = folder / f"{name}-{dtype}.png"
                figure = function(drawn, f"{dtype}, {where}, torch {facts['torch']}", content["copy"])
                figure.savefig(path, format="png", dpi=DPI)
                written.append(path)
    return written


def ratios(lines: Sequence[tuple[Mapping[str, Any], Row]], subtitle: str, copied: Mapping[str, Any]) -> Figure:
    """Bars from 1, on a logarithmic axis; a mark stands at each target."""
    figure = Figure(figsize=(WIDTH_INCHES, 1.3 + 0.42 * len(lines)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for index, (name, color) in enumerate(PEERS.values()):
        for y, (_, row) in enumerate(lines):
            height, ratio = y + 0.38 * index - 0.19, row["ratios"][index]
            if not ratio:
                continue
            axes.barh(height, ratio - 1, 0.34, left=1, color=color, label=f"against {name}" if y == 0 else None)
            side = {"ha": "left", "xytext": (3, 0)} if ratio >= 1 else {"ha": "right", "xytext": (-3, 0)}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            place = {"textcoords": "offset points", "va": "center", "zorder": 4, **side}
            axes.annotate(_short(ratio), (ratio, height), fontsize=8, color=INK, bbox=box, **place)
            if len(row["targets"]) > index:
                axes.plot([row["targets"][index]] * 2, [height - 0.17, height + 0.17], color=INK, linewidth=2)
    axes.axvline(1, color=INK, linewidth=1)
    axes.margins(x=0.12, y=0.01)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks(range(len(lines)), [f"{_label(item)}\n{row['backend']}, {_time(row)}" for item, row in lines], fontsize=8)
    axes.invert_yaxis()
    marked = any(row["targets"] for _, row in lines)
    axes.set_xlabel("times as fast, log scale" + (" (black: target)" if marked else ""), fontsize=9)
    _finish(figure, axes, "How many times as fast", subtitle)
    axes.legend(loc="best", fontsize=8, frameon=False)
    return figure


def roofline(lines: Sequence[tuple[Mapping[str, Any], Row]], subtitle: str, copied: Mapping[str, Any]) -> Figure:
    """Ideal bytes a second by ideal bytes; the roof is what a copy moves."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log")
    stages: dict[str, str] = {}
    for item, row in lines:
        megabytes = item["ideal_bytes"] / 1e6
        rates = {kind: item["ideal_bytes"] / 1e6 / row["ms"][kind] for kind in ("ours", *PEERS) if row["ms"][kind]}
        family = "latent" if item["stage"].startswith("latent") else item["stage"]
        marker = stages.setdefault(family, MARKERS.get(family, LATENT_MARKER))
        axes.plot([megabytes] * 2, [min(rates.values()), max(rates.values())], color=FAINT, linewidth=0.6, zorder=1)
        if item["stage"] == "both":
            below = {"textcoords": "offset points", "xytext": (0, -6), "ha": "center", "va": "top"}
            axes.annotate(f"both, {item['model']}", (megabytes, min(rates.values())), fontsize=8, color=INK, **below)
        for kind, color in (("ours", OURS), *((kind, color) for kind, (_, color) in PEERS.items())):
            if kind in rates:
                axes.plot(megabytes, rates[kind], marker, color=color, markersize=6, markeredgecolor="white", zorder=2)
    roof = copied["gb_per_s"]
    axes.axhline(roof, color=INK, linewidth=1.2, linestyle="--", zorder=1)
    axes.annotate(
        f"a copy: {_short(roof)} GB/s", (0.01, roof), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", fontsize=8, color=INK,
    )  # fmt: skip
    axes.margins(x=0.08, y=0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("MB that must be moved in a call (log scale)", fontsize=9)
    axes.set_ylabel("GB/s of these (log scale)", fontsize=9)
    named = (("fused_elbo", OURS), *PEERS.values())
    handles = [axes.plot([], [], "o", color=color, label=name)[0] for name, color in named]
    handles += [axes.plot([], [], marker, color=FAINT, label=stage)[0] for stage, marker in stages.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False, handletextpad=0.1)
    _finish(figure, axes, "How near to the bandwidth of memory", subtitle)
    return figure


def _finish(figure: Figure, axes: Axes, title: str, subtitle: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_title(subtitle, loc="left", fontsize=8, color=INK)
    axes.grid(axis="x", which="major", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _label(item: Mapping[str, Any]) -> str:
    return f"{item['stage']}, {item['model']}" if item["model"] and item["stage"] != "step" else item["name"]


def _time(row: Row) -> str:
    ms = row["ms"]["ours"]
    return f"{_short(1e3 * ms)} us" if ms < 1 else f"{_short(ms)} ms"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
