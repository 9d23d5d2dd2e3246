"""``python -m fused_elbo.codegen.cost``: the tables of ``docs/cost.md``, counted from what each implementation really runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import functional, ops
from ..bench import work
from .hardware import GPUS

RECORD = Path(__file__).parents[2] / "benchmarks/results/cpu.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LATENTS, DATA = (50, 20), (50, 60)
# Inductor fuses by size, so it is asked about large tensors; one number of bytes then tells passes over both.
LARGE_LATENTS, LARGE_DATA = (4096, 2048), (4096, 2**17)
# Launches and passes of an operation beyond its own: a squared error is written whole before it is summed.
HIDDEN = {"aten::mse_loss": (1, 2)}
# Made from a tensor's shape alone.
SHAPE_ALONE = {"aten::randn_like", "aten::ones_like", "aten::zeros_like"}
NO_LAUNCH = {"aten::empty_like", "aten::empty", "aten::new_empty", "aten::empty_strided", "aten::detach", "aten::_unsafe_view"}
# Returns at once where the upstream gradient is the one that was expected.
AT_ONCE = "fused_elbo::rescale_"
GPU = GPUS[90]
# Host time of an operation, forward or backward, in seconds: an assumption, near what the smallest tensors take.
OVERHEAD = 5e-6


class Cost(NamedTuple):
    """``launches``, and how often tensors of the latents' size (N) and of the data's (M) are read or written."""

    launches: int
    latents: int
    data: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return " + ".join(f"{n} {letter}" for n, letter in ((self.latents, "N"), (self.data, "M")) if n) or "-"

    def seconds(self, item: Item, bandwidth: float) -> float:
        """In float32: bytes at ``bandwidth`` a second, and the launches' overhead."""
        moved = torch.float32.itemsize * (self.latents * item.latents + self.data * item.data)
        return moved / bandwidth + self.launches * OVERHEAD


NOTHING = Cost(0, 0, 0)
# Forward and backward by stage and implementation.
Costs = dict[tuple[str, str], tuple[Cost, Cost]]


class Item(NamedTuple):
    """A line of the record: a key of ``STAGES``, and how many elements latents and data have."""

    stage: str
    latents: int
    data: int


ITEMS = {
    "latent 4096x4096": Item("latent stage", 4096 * 4096, 0),
    "nll 4096x3072": Item("likelihood", 0, 4096 * 3072),
    "classic 128x784x20": Item("classic loss", 128 * 20, 128 * 784),
}


class Recorder(TorchDispatchMode):
    """Counts the operations that run, and how often they read or write tensors of the two sizes.

    Each tensor among an operation's arguments and results counts once, whether the operation needs all of it or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.passes = 0, Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name, returns = function._schema.name, function._schema.returns
        alias = returns[0].alias_info if returns else None
        is_view = alias is not None and not alias.is_write
        if is_view or name in NO_LAUNCH:
            return out
        launches, passes = HIDDEN.get(name, (0, 0))
        self.launches += 1 + launches
        if name != AT_ONCE:
            # What is written in place stands among the arguments and among the results.
            named = {
                id(t): t for t in tree_leaves((() if name in SHAPE_ALONE else (args, kwargs), out)) if isinstance(t, Tensor)
            }
            self.passes.update(t.numel() for t in named.values() if 0 not in t.stride())
            self.passes[args[0].numel() if passes else 0] += passes
        return out

    @property
    def cost(self) -> Cost:
        return Cost(self.launches, *(self.passes[rows * columns] for rows, columns in (LATENTS, DATA)))


class Stage(NamedTuple):
    """Functions ``eager``, by name and each compiled too, and ``ours``, of tensors that are "latents", "data" or a "target"."""

    inputs: tuple[str, ...]
    eager: dict[str, Callable[..., Any]]
    ours: Callable[..., Any]


STAGES = {
    "latent stage": Stage(("latents", "latents"), {"classic lines": work.latent}, functional.rsample_kl),
    "likelihood": Stage(
        ("data", "target"),
        {"mse_loss": work.nll_mse_loss, "written out": work.nll_written_out},
        lambda x_hat, x: (functional.gaussian_nll(x_hat, x),),
    ),
    "classic loss": Stage(("data", "target", "latents", "latents"), {"classic lines": work.classic}, work.our_classic),
}
# A step takes the latent stage and the likelihood, each so.
STEP = {
    "eager": ("eager, classic lines", "eager, mse_loss"),
    **{f"compiled, {d}": (f"compiled, classic lines, {d}", f"compiled, mse_loss, {d}") for d in DTYPES},
    "fused": ("fused", "fused"),
}


def recorded(function: Callable[..., Any], inputs: Iterable[str]) -> tuple[Cost, Cost]:
    """What forward and backward of a function run, on a CPU. The upstream gradients are there already."""
    tensors = [torch.rand(LATENTS if kind == "latents" else DATA, requires_grad=kind != "target") for kind in inputs]
    with Recorder() as forward:
        values = function(*tensors)
    upstream = [torch.ones_like(v) for v in values]
    with Recorder() as backward:
        torch.autograd.grad(values, [t for t in tensors if t.requires_grad], upstream)
    return forward.cost, backward.cost


def generated(function: Callable[..., Any], inputs: Iterable[str], dtype: torch.dtype) -> tuple[Cost, Cost]:
    """The same of the code that ``torch.compile`` generates for a GPU."""
    # Only where it is asked for: this imports a compiler.
    from .inductor import lowered

    shapes = [(LARGE_LATENTS if kind == "latents" else LARGE_DATA, kind != "target") for kind in inputs]
    latents, data = (dtype.itemsize * rows * columns for rows, columns in (LARGE_LATENTS, LARGE_DATA))
    forward, backward = (Cost(n, round(moved % data / latents), moved // data) for n, moved in lowered(function, shapes, dtype))
    return forward, backward


def costs() -> Costs:
    """All of them, counted."""
    found: Costs = {}
    for name, stage in STAGES.items():
        for how, function in stage.eager.items():
            found[name, f"eager, {how}"] = recorded(function, stage.inputs)
        for how, function in stage.eager.items():
            for dtype in DTYPES:
                found[name, f"compiled, {how}, {dtype}"] = generated(function, stage.inputs, DTYPES[dtype])
        with ops.backend("native"):
            found[name, "fused"] = recorded(stage.ours, stage.inputs)
    for kind, parts in STEP.items():
        latents, data = (found[stage, part] for stage, part in zip(("latent stage", "likelihood"), parts, strict=True))
        found["step", kind] = (latents[0] + data[0], latents[1] + data[1])
    return found


def measured(record: dict[str, Any], name: str) -> dict[str, float]:
    """Milliseconds of an item of a benchmark's record, with an upstream gradient of 1: the best of each kind, and of ours the
    native backend."""
    (item,) = (item for item in record["items"] if item["name"] == name)
    timed = ((of, peer) for of, peer in item["peers"].items() if "median_ms" in peer and peer["upstream"] == 1)
    peers = [(peer["kind"], of, peer["median_ms"]) for of, peer in timed]
    best = {kind: min(ms for k, _, ms in peers if k == kind) for kind in ("eager", "compiled")}
    return best | {"fused": next(ms for _, of, ms in peers if of == "native")}


def copy_bandwidth(record: dict[str, Any]) -> float:
    """Bytes a second that a copy read and wrote on the machine of a record."""
    return 1e9 * record["copy"]["gb_per_s"]


def tables(counted: Costs, record: dict[str, Any]) -> Iterator[str]:
    """Two tables in Markdown: what was counted, and what follows from it beside the times of a record."""
    head = ("stage", "implementation", "forward", "backward", "both", "launches")
    yield from _markdown(head, _counts(_merged(counted)))
    yield ""
    head = ("item", "implementation", "CPU, predicted ms", "CPU, measured ms", f"{GPU.name}, predicted µs (not measured)")
    yield from _markdown(head, _times(counted, record))


def _counts(counted: Costs) -> Iterator[Sequence[str]]:
    for (stage, kind), parts in counted.items():
        yield stage, kind, *map(str, parts), str(sum(parts, NOTHING)), " + ".join(str(part.launches) for part in parts)


def _merged(counted: Costs) -> Costs:
    """Without the dtype where all dtypes have one cost."""
    found = {}
    for (stage, kind), parts in counted.items():
        way, _, dtype = kind.rpartition(", ")
        alike = dtype in DTYPES and all(counted[stage, f"{way}, {other}"] == parts for other in DTYPES)
        found[stage, way if alike else kind] = parts
    return found


def _times(counted: Costs, record: dict[str, Any]) -> Iterator[Sequence[str]]:
    bandwidth = copy_bandwidth(record)
    for name, item in ITEMS.items():
        for kind, milliseconds in measured(record, name).items():
            # The fastest way of each kind was timed, so the cheapest is predicted.
            ways = [
                sum(parts, NOTHING)
                for (stage, way), parts in counted.items()
                if stage == item.stage and way.startswith(kind) and "bfloat16" not in way
            ]
            cpu, gpu = (min(way.seconds(item, rate) for way in ways) for rate in (bandwidth, GPU.copy_bandwidth))
            yield name, kind, f"{1e3 * cpu:.3g}", f"{milliseconds:.3g}", f"{1e6 * gpu:.0f}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables.

    Args:
        argv: the arguments. Default None: those of the process.

    Returns:
        The exit code, 0; 2 for a record that cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_elbo.codegen.cost", description=__doc__)
    parser.add_argument("--record", type=Path, default=RECORD, metavar="PATH", help="measured times (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        record = json.loads(args.record.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--record: {error}; takes what `python -m fused_elbo bench --json` wrote, or lies in benchmarks/results/")
    print("\n".join(tables(costs(), record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
