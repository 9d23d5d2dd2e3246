"""``python -m fused_elbo bench``: from the arguments to the record, the tables and the pictures."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from ..cli import BAD_ARGUMENTS, INTERRUPTED
from . import cpu_clock, cuda_clock, environment, measure, peers, record, report, steps, work
from .clock import Clock, states_of
from .items import Item, items
from .options import BUDGETS, DTYPES, MINUTES, QUICK_BUDGET, QUICK_MINUTES, BadArguments

# Of the memory that is free, what an item may need by estimate.
MEMORY_SHARE = 0.8

REFUSED = 1


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Measure, and print the tables.

    Args:
        args: what ``add_arguments``'s options gave.
        argv: the same as the user wrote it, for the record.

    Returns:
        The exit code: 0, 1 if a backend of the library was refused since it fails or its numbers are wrong, 2 for what the user
        can mend, 130 after Ctrl-C.
    """
    try:
        chosen = _chosen(args)
        if args.list:
            print("\n".join(item.title for item in chosen))
            return 0
        _require_usable(args)
        with _threads(args.threads, pinned=args.pin):
            return _measured(args, argv, chosen)
    except (BadArguments, record.RecordError) as error:
        print(f"python -m fused_elbo bench: error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS


def _measured(args: argparse.Namespace, argv: list[str], chosen: list[Item]) -> int:
    clock = _clock(args)
    kind = clock.device.type
    backends = peers.backends(kind)
    modes = peers.modes(kind, quick=args.quick) if args.compile else {}
    facts = environment.facts(argv, clock.device, backends, one_by_one=args.one_by_one)
    facts |= {"clock": clock.facts(), "compile_modes": modes}
    file = record.Record(args.json, facts, resume=args.resume)
    budget = args.budget if args.budget is not None else QUICK_BUDGET if args.quick else BUDGETS[kind]
    minutes = args.minutes if args.minutes is not None else QUICK_MINUTES if args.quick else MINUTES[kind]
    runnable = [name for name, reason in backends.items() if reason is None]
    session = Session(clock, runnable, modes, budget, time.perf_counter() + 60 * minutes, minutes, one_by_one=args.one_by_one)
    work_list = [(item, dtype) for dtype in args.dtype for item in chosen if not file.has(item.name, dtype)]
    code = 0
    try:
        with clock.running():
            clock.begin()
            file.content["conditions"].append(clock.conditions())
            file.content["copy"] = file.content["copy"] or measure.copy_bandwidth(clock)
            for item, dtype in (bar := tqdm(work_list, unit="item")):
                bar.set_description(f"{item.name}, {dtype}")
                file.add(session.item(item, dtype, file.content["copy"]["gb_per_s"], lambda doing: bar.set_postfix_str(doing)))
    except KeyboardInterrupt:
        code = INTERRUPTED
    file.content["conditions"].append(clock.conditions())
    file.save()
    text = f"{heading(file.content)}\n\n{report.tables(file.content['items'])}"
    print(text)
    if args.markdown:
        args.markdown.write_text(f"{text}\n")
    if args.plot:
        # Only where a picture is asked for: the tables need no matplotlib.
        from . import plots

        plots.draw(args.plot, file.content)
    ours = [peer for item in file.content["items"] for peer in item["peers"].values() if peer["kind"] == "ours"]
    return code or (REFUSED if any("refused" in peer for peer in ours) else 0)


class Session:
    """What all items of a run share.

    Args:
        clock: how the device is timed.
        backends: of the library.
        modes: of torch.compile.
        budget: seconds of timing for an item.
        deadline: when no further item begins, on ``time.perf_counter``; ``minutes`` after the beginning.
        one_by_one: how peers are timed, as for ``measure.measure``.
    """

    def __init__(
        self,
        clock: Clock,
        backends: list[str],
        modes: dict[str, dict[str, Any]],
        budget: float,
        deadline: float,
        minutes: float,
        *,
        one_by_one: bool = False,
    ) -> None:
        self.clock, self.backends, self.modes = clock, backends, modes
        self.budget, self.deadline, self.minutes, self.one_by_one = budget, deadline, minutes, one_by_one
        self.slow: dict[str, str] = {}

    def item(self, item: Item, dtype: str, copy_gb_per_s: float, doing: Any) -> dict[str, Any]:
        """The record of one item."""
        begin, kind = time.perf_counter(), self.clock.device.type
        stage = work.STAGES.get(item.stage)
        passes = stage and stage.passes
        moved = passes and sum(p * n for p, n in zip(passes, item.elements, strict=True))
        content = {
            **{
                name: getattr(item, name)
                for name in ("name", "model", "stage", "data", "latents", "packed", "sweep", "targets")
            },
            "dtype": dtype,
            "passes": passes,
            "ideal_bytes": moved and moved * DTYPES[dtype].itemsize,
            "state": self.clock.states[0] if stage else "hot",
            "left_out": peers.left_out(item, kind, self.backends, self.modes),
            "peers": {},
            "rows": [],
        }
        if reason := self._skipped(item, dtype):
            return content | {"skipped": reason, "seconds": 0.0}
        # Each item starts with no graphs, and so within the limit on recompilations.
        if self.modes:
            torch._dynamo.reset()
        torch.manual_seed(0)

        def draw(seed: int) -> work.Inputs:
            if stage is None:
                return steps.draw(item, self.clock.device)
            return work.draw(item, DTYPES[dtype], self.clock.device, seed)

        try:
            inputs = draw(0)
        except (MemoryError, RuntimeError) as error:
            return content | {"skipped": f"no inputs: {measure.said(error)}", "seconds": time.perf_counter() - begin}
        found = peers.peers(item, DTYPES[dtype], self.clock.device, self.backends, self.modes)
        results = measure.measure(
            found, inputs, draw, self.clock, self.budget, self.slow, doing,
            one_set=stage is None, one_by_one=self.one_by_one,
        )  # fmt: skip
        content["peers"] = {name: result.summary() for name, result in results.items()}
        content["rows"] = report.rows(content, copy_gb_per_s)
        return content | {"seconds": time.perf_counter() - begin}

    def _skipped(self, item: Item, dtype: str) -> str | None:
        if time.perf_counter() > self.deadline:
            return f"the run's {self.minutes:g} minutes were over: go on with --resume, or allow for more with --minutes"
        if item.stage == "step" and DTYPES[dtype] != steps.DTYPE:
            return "training steps are measured in float32"
        itemsize, free = DTYPES[dtype].itemsize, self.clock.free_bytes()
        set_bytes = 2 * itemsize * sum(item.elements)
        sets = max(states_of(self.clock, set_bytes).values())
        needed = item.working_set(itemsize, (sets - 1) * set_bytes)
        if free is not None and needed > MEMORY_SHARE * free:
            allowed = f"{MEMORY_SHARE:.0%} of the {free / 1e9:.1f} that are free"
            return f"it needs about {needed / 1e9:.1f} GB of memory, {allowed} are allowed"
        return None


def heading(content: dict[str, Any]) -> str:
    """What the tables are of."""
    facts = content["environment"]
    left_out = [f"{name}: {reason}" for name, reason in facts["backends"].items() if reason != "timed"]
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    copied = content["copy"]
    lines = [
        f"{where}, torch {facts['torch']} ({facts['torch_capability']}), triton {facts['triton']}, "
        f"commit {facts['commit']}{' and changes' if facts['uncommitted_changes'] else ''}, {facts['date']}",
        f"Backends left out: {'; '.join(left_out) or 'none'}.",
        f"Medians, {'one by one' if facts['one_by_one'] else 'in turns'}. x eager, x compiled: how many times as long as "
        "ours the best of them takes. GB/s: of what must be moved.",
    ]
    if copied:
        lines.append(f"A copy of {copied['bytes'] / 1e6:.0f} MB: {copied['gb_per_s']:.1f} GB/s, read and written.")
    return "\n".join(lines)


def _chosen(args: argparse.Namespace) -> list[Item]:
    kind = _kind(args)
    listed = list(items(kind, everything=args.all, sweep=args.sizes))
    chosen = [item for item in listed if args.filter.lower() in item.title.lower()]
    if not chosen:
        raise BadArguments(f"--filter: no item contains {args.filter!r}, of: {', '.join(item.title for item in listed)}")
    return chosen


def _require_usable(args: argparse.Namespace) -> None:
    """What would end the run when all is measured, or never."""
    if args.budget is not None and not 0 < args.budget < math.inf:
        raise BadArguments(f"--budget: got {args.budget:g}, takes a positive number of seconds")
    if args.minutes is not None and not args.minutes >= 0:
        raise BadArguments(f"--minutes: got {args.minutes:g}, takes a number of at least 0")
    for name in ("json", "markdown"):
        path = getattr(args, name)
        if path and not path.parent.is_dir():
            raise BadArguments(f"there is no folder {path.parent}")
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise BadArguments(f"--{name}: got {path}, takes a file that can be written")
    if args.plot:
        if importlib.util.find_spec("matplotlib") is None:
            raise BadArguments("--plot: needs matplotlib: pip install 'fused-elbo[bench]'")
        try:
            args.plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArguments(f"--plot: got {args.plot}, takes a folder: {error.strerror}") from error


def _kind(args: argparse.Namespace) -> str:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadArguments("--device: got cuda, and torch sees none")
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _clock(args: argparse.Namespace) -> Clock:
    return cpu_clock.CpuClock(cold=args.cold) if _kind(args) == "cpu" else cuda_clock.CudaClock()


@contextlib.contextmanager
def _threads(count: int, *, pinned: bool) -> Iterator[None]:
    """Inside, torch has so many threads, and if ``pinned`` the process as many processors."""
    if count < 1:
        raise BadArguments(f"--threads: got {count}, takes 1 or more")
    before, processors = torch.get_num_threads(), cpu_clock.affinity()
    torch.set_num_threads(count)
    if pinned and not cpu_clock.pin(count):
        raise BadArguments("--pin: this system does not let a process choose its processors")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if pinned:
            os.sched_setaffinity(0, processors)
