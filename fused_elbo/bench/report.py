"""What is said of the times: ratios, rates and tables. It works on a record alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .peers import DIRECT, SPECIFICATION

Row = dict[str, Any]
Entry = Mapping[str, Any]

# The targets are for one dtype, and not for the specification.
TARGET_DTYPE = "float32"

# With more of the CPU time than this in other hands, threads that wait for each other wait a hundred times too long.
QUIET = 0.05
NOISY = "(!)"

MET = {True: "yes", False: "no", None: "-"}
MIB = 2**20


def rows(item: Entry, copy_gb_per_s: float | None) -> list[Row]:
    """A line of the table for each backend that was timed, in each state and with each upstream gradient.

    Returns:
        As ``fused_elbo.bench`` says under "rows". None stands for what was not timed.
    """
    timed = {name: peer for name, peer in item["peers"].items() if "median_ms" in peer}
    found = []
    for name, peer in timed.items():
        if peer["kind"] != "ours":
            continue
        alike = {
            other: p["median_ms"]
            for other, p in timed.items()
            if p["kind"] != "ours" and p["state"] == peer["state"] and p["upstream"] in (peer["upstream"], None)
        }
        ours = peer["median_ms"]
        best = {
            kind: min((ms for other, ms in alike.items() if timed[other]["kind"] == kind), default=None)
            for kind in ("eager", "distributions", "compiled", "copy")
        }
        gb_per_s = item["ideal_bytes"] and 1e-6 * item["ideal_bytes"] / ours
        row = {
            "item": item["name"],
            "dtype": item["dtype"],
            "backend": name,
            "upstream": peer["upstream"],
            "state": peer["state"],
            "ms": {"ours": ours, **best},
            "ratios": [best[kind] and best[kind] / ours for kind in ("eager", "compiled")],
            "ratio_to": {other: ms / ours for other, ms in alike.items()},
            "gb_per_s": gb_per_s,
            "percent_of_copy": gb_per_s and copy_gb_per_s and 100 * gb_per_s / copy_gb_per_s,
        }
        if item["stage"] == "bandwidth":
            # The copy was of such a tensor, in turn with it: 2 passes beside 3.
            row["copy_gb_per_s"] = best["copy"] and 2e-6 * item["ideal_bytes"] / 3 / best["copy"]
            row["ratios"] = [best["copy"] and 100 * gb_per_s / row["copy_gb_per_s"]]
        row["targets"] = item["targets"] if item["dtype"] == TARGET_DTYPE and peer["backend"] != SPECIFICATION else []
        row["met"] = [r and r >= target for r, target in zip(row["ratios"], row["targets"], strict=False)]
        found.append(row)
    return found


def headline(item: Entry) -> Row | None:
    """The row that stands for an item: the library's public call, as fast as a backend makes it, with the upstream gradient
    that was foreseen and the caches as they are reported first."""
    found = [
        row for row in item["rows"] if row["upstream"] == 1 and row["state"] == item["state"] and DIRECT not in row["backend"]
    ]
    # Beside a backend that is built for speed the reference would only flatten the picture.
    found = [row for row in found if row["backend"] != SPECIFICATION] or found
    best = min(found, key=lambda row: row["ms"]["ours"], default=None)
    if best is None or item["stage"] != "step":
        return best
    # A model is compiled or not, with either loss.
    alike: dict[bool, Row] = {}
    for row in sorted(found, key=lambda row: -row["ms"]["ours"]):
        alike[item["peers"][row["backend"]]["backend"] is None] = row
    ratios = [alike[compiled]["ratios"][compiled] if compiled in alike else None for compiled in (False, True)]
    return {**alike.get(False, best), "ratios": ratios}


def tables(items: Sequence[Entry]) -> str:
    """All that was measured, in Markdown."""
    head = ("item", "dtype", "backend", "ms", "GB/s", "% of copy", "peak MiB", "eager ms", "distributions ms", "compiled ms")
    times = [(*head, "x eager", "x compiled", "targets", "met")]
    speeds = [("item", "dtype", "backend", "GB/s, 3 passes", "copy GB/s, 2 passes", "% of the copy", "targets", "met")]
    sweep: dict[str, list[tuple[float, str]]] = {}
    for item in items:
        label = f"{item['name']} {NOISY}" if _others(item) > QUIET else item["name"]
        for row in item["rows"]:
            ratios = [_number(ratio, 2) for ratio in row["ratios"]]
            goals = " / ".join(f"{target:g}" for target in row["targets"]), " / ".join(MET[met] for met in row["met"])
            if item["stage"] == "bandwidth":
                rates = (row["gb_per_s"], row["copy_gb_per_s"])
                speeds.append((label, row["dtype"], row["backend"], *(_number(g, 1) for g in rates), *ratios, *goals))
                continue
            peak = item["peers"][row["backend"]]["peak_bytes"]
            plain = (_number(row["ms"][kind]) for kind in ("eager", "distributions", "compiled"))
            rates = map(_significant, (row["gb_per_s"], row["percent_of_copy"], peak and peak / MIB))
            times.append((label, row["dtype"], row["backend"], _number(row["ms"]["ours"]), *rates, *plain, *ratios, *goals))
            if item["sweep"] and row["ratios"][0]:
                sweep.setdefault(row["backend"], []).append((row["ratios"][0], item["name"]))
    worst = ["Worst of the sweep, {}: {:.2f} x eager at {}.".format(backend, *min(ratios)) for backend, ratios in sweep.items()]
    return "\n\n".join([*(_markdown(lines) for lines in (times, speeds) if len(lines) > 1), *worst, *_remarks(items)])


def _remarks(items: Sequence[Entry]) -> Iterable[str]:
    noisy = [f"{item['name']}, {item['dtype']} ({_others(item):.0%})" for item in items if _others(item) > QUIET]
    if noisy:
        yield f"{NOISY} Not to be trusted, since other processes took CPU time meanwhile: {', '.join(noisy)}."
    first = [
        (peer["first_call_seconds"], f"{name} at {item['name']}")
        for item in items
        for name, peer in item["peers"].items()
        if peer["kind"] == "compiled" and peer["first_call_seconds"]
    ]
    if first:
        longest, where = max(first)
        total = sum(seconds for seconds, _ in first)
        yield f"First calls of torch.compile: {total:.0f} s in all, the longest {longest:.1f} s ({where})."
    for item in items:
        if "skipped" in item:
            yield f"Skipped: {item['name']}, {item['dtype']}: {item['skipped']}"
        for name, peer in item["peers"].items():
            if "refused" in peer:
                yield f"Refused, not timed: {item['name']}, {item['dtype']}, {name}: {peer['refused']}"
    left_out: dict[str, list[str]] = {}
    for item in items:
        for name, reason in {
            **item["left_out"],
            **{n: p["left_out"] for n, p in item["peers"].items() if "left_out" in p},
        }.items():
            left_out.setdefault(f"{name}: {reason}", []).append(item["name"])
    for reason, names in left_out.items():
        yield f"Left out, {reason} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})."


def _others(item: Entry) -> float:
    return max((peer.get("others") or 0.0 for peer in item["peers"].values()), default=0.0)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits if value < 10 else 1}f}"


def _significant(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = 3
    rule = ["-" * width if i < words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
