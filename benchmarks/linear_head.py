"""``python -m benchmarks.linear_head``: a wide decoder's last layer and its loss, forward and backward, with and without x_hat.

Times in turns; memory of one step, in a fresh process each; growth with the number of outputs up to 2^31; with ``--chunks`` the
sizes of a chunk that the library's rule comes from.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_elbo as fe
from fused_elbo import ops
from fused_elbo.autograd.linear import chunk_of
from fused_elbo.bench import environment
from fused_elbo.vae.measure import MIB, resident

# Samples, output features, and features before the last layer.
Shape = tuple[int, int, int]
ISSUE = (4096, 30000, 128)
SHAPES: tuple[Shape, ...] = (ISSUE, (4096, 2000, 128), (65536, 784, 64), (256, 262144, 32))
CHUNK_MIB = (0.5, 1, 2, 4, 8, 16, 32, 64)
# Outputs, by what grows: samples of 2^15 features, or features of 2^11 samples.
GROWTH = {"samples": [(2**k, 2**15, 8) for k in range(10, 17)], "features": [(2**11, 2**k, 8) for k in range(14, 21)]}
LEAST_ROUNDS = 3
# Of the largest, between two routes in float32.
SAME = 1e-4
BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"


def fused(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return fe.linear_gaussian_nll(h, weight, bias, x)


def unfused(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return fe.gaussian_nll(F.linear(h, weight, bias), x)


def eager(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(F.linear(h, weight, bias), x, reduction="sum") / len(x)


def compiled(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return torch.compile(eager, dynamic=False)(h, weight, bias, x)


ROUTES: dict[str, Callable[..., Tensor]] = {
    "linear_gaussian_nll": fused,
    "Linear + gaussian_nll": unfused,
    "Linear + mse_loss": eager,
    "Linear + mse_loss, torch.compile": compiled,
}
OURS, *OTHERS = ROUTES


def inputs(shape: Shape, device: torch.device, *, expanded: bool = False) -> tuple[Tensor, ...]:
    """h, weight and bias, which require grad, and x; an expanded x is one sample in memory."""
    count, features, width = shape
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    layer = randn(count, width), randn(features, width) / math.sqrt(width), randn(features)
    x = randn(1, features).expand(count, features) if expanded else randn(count, features)
    return *(t.requires_grad_() for t in layer), x


def step(route: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The loss and the gradients of the layer and of what is before it."""
    loss = route(*tensors)
    found = loss.detach(), *torch.autograd.grad(loss, tensors[:3])
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return found


def in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, Any]]:
    """Milliseconds of each call: quartiles and the least, of rounds in which everybody has one turn, in random order."""
    order, names, ms = random.Random(0), list(calls), {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    while len(ms[names[0]]) < LEAST_ROUNDS or time.perf_counter() < deadline:
        order.shuffle(names)
        for name in names:
            begin = time.perf_counter()
            calls[name]()
            ms[name].append(1e3 * (time.perf_counter() - begin))
    quartiles = {name: statistics.quantiles(times, n=4, method="inclusive") for name, times in ms.items()}
    return {name: {"ms": quartiles[name], "least": min(ms[name]), "rounds": len(ms[name])} for name in calls}


def times(shape: Shape, routes: Sequence[str], device: torch.device, seconds: float) -> dict[str, dict[str, Any]]:
    """``in_turns`` of routes whose numbers are the same."""
    tensors = inputs(shape, device)
    right = step(ROUTES[OURS], tensors)
    for name in routes:
        for mine, theirs in zip(step(ROUTES[name], tensors), right, strict=True):
            if not (mine - theirs).abs().max() <= SAME * theirs.abs().max():
                raise RuntimeError(f"{name} does not have the numbers of {OURS}")
    return in_turns({name: lambda name=name: step(ROUTES[name], tensors) for name in routes}, seconds)


def memory(route: str, shape: Shape, device: torch.device) -> float:
    """MiB that one step takes at most, beyond its inputs and the gradients that it returns. For a process of its own."""
    small = inputs((8, 16, 4), device)
    step(ROUTES[route], small)
    tensors = inputs(shape, device)
    if route.endswith("compile"):
        # What a compiler holds is not the step's.
        step(ROUTES[route], tensors)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    found = step(ROUTES[route], tensors)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    return (peak - before - sum(t.numel() * t.element_size() for t in found)) / MIB


def memory_in_a_process(route: str, shape: Shape, device: torch.device, threads: int) -> float:
    options = ["--peak", route, "--shape", *map(str, shape), "--device", device.type, "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.linear_head", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout)


def growth(device: torch.device, largest: int, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """A step's time for more and more outputs, and nanoseconds for each of them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for what, shapes in GROWTH.items():
        rows = []
        for shape in (s for s in shapes if s[0] * s[1] <= largest):
            tensors = inputs(shape, device, expanded=True)
            least = in_turns({OURS: lambda tensors=tensors: step(fused, tensors)}, seconds)[OURS]["least"]
            rows.append({"shape": shape, "ms": least, "ns_per_output": 1e6 * least / (shape[0] * shape[1])})
        found[what] = rows
    return found


def chunks(shapes: Sequence[Shape], device: torch.device, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """By shape, the times of chunks of several sizes: squares, as of the library's rule, and full rows."""
    found = {}
    for shape in shapes:
        count, features, _ = shape
        tensors = inputs(shape, device)
        sizes: dict[tuple[int, int], str] = {}
        for mib in CHUNK_MIB:
            elements = int(mib * MIB) // 4
            sizes.setdefault(chunk_of(count, features, 4, device.type, int(mib * MIB)), f"square {mib:g}")
            sizes.setdefault((min(count, max(1, elements // features)), features), f"rows {mib:g}")
        calls = {
            size: lambda size=size, tensors=tensors: step(lambda *t: fe.linear_gaussian_nll(*t, chunk_size=size), tensors)
            for size in sizes
        }
        rows = in_turns(calls, seconds)
        found[name(shape)] = [
            {"rows": size[0], "features": size[1], "mib": size[0] * size[1] * 4 / MIB, "kind": sizes[size].split()[0], **row}
            for size, row in rows.items()
        ]
    return found


def name(shape: Shape) -> str:
    return "{} x {}, H = {}".format(*shape)


def tables(record: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    routes = list(next(iter(record["times"].values())))
    lines = [f"| forward + backward, ms | {' | '.join(f'`{route}`' for route in routes)} |", "| --- |" + " --- |" * len(routes)]
    for shape, row in record["times"].items():
        medians = [row[route]["ms"][1] for route in routes]
        medians = (f"{ms:.0f}" if ms >= 1000 else f"{ms:.3g}" for ms in medians)
        lines.append(f"| {shape} | {' | '.join(medians)} |")
    lines += ["", "| one step's memory beyond inputs and gradients | MiB | share |", "| --- | --- | --- |"]
    largest = record["memory"].get(OTHERS[0])
    for route, mib in record["memory"].items():
        lines.append(f"| `{route}` | {mib:.0f} | {100 * mib / largest:.1f}% |")
    lines += ["", "| outputs | samples grow: ns an output | features grow: ns an output |", "| --- | --- | --- |"]
    for by_samples, by_features in zip(*record["growth"].values(), strict=True):
        outputs = round(math.log2(by_samples["shape"][0] * by_samples["shape"][1]))
        lines.append(f"| 2^{outputs} | {by_samples['ns_per_output']:.2f} | {by_features['ns_per_output']:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print tables; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_head", description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", action="store_true", help="sizes of a chunk instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: a GPU)")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="X", help="time for each shape (default: 20)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of torch (default: 2)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--document", type=Path, metavar="FILE", help=f"put the tables there, after {BEGIN}")
    parser.add_argument("--peak", metavar="ROUTE", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.peak:
        print(memory(args.peak, tuple(args.shape), device))
        return 0
    shapes = ((64, 96, 4),) if args.quick else SHAPES
    facts = environment.facts(argv, device, {b: ops.unavailable(b, device.type) for b in ops.BACKENDS})
    record: dict[str, Any] = {
        "environment": {**facts, "command": shlex.join(["python", "-m", "benchmarks.linear_head", *argv])}
    }
    if args.chunks:
        record["chunks"] = chunks(shapes, device, args.seconds)
        for shape, rows in record["chunks"].items():
            print(shape)
            for row in sorted(rows, key=lambda row: row["least"]):
                print(
                    f"  {row['rows']:>6} x {row['features']:<7} {row['mib']:>6.2f} MiB, {row['kind']:<7}{row['least']:>9.1f} ms"
                )
    else:
        routes = [route for route in ROUTES if args.compile or not route.endswith("compile")]
        record["times"] = {name(shape): times(shape, routes, device, args.seconds) for shape in shapes}
        record["memory_shape"] = shape = shapes[0]
        record["memory"] = {route: memory_in_a_process(route, shape, device, args.threads) for route in routes}
        record["growth"] = growth(device, 2**26 if args.quick else 2**31, 0.0 if args.quick else args.seconds / 20)
        # Tuples are lists in a file.
        record = json.loads(json.dumps(record))
        print(tables(record))
        if args.document:
            before, _, rest = args.document.read_text().partition(BEGIN)
            args.document.write_text(f"{before}{BEGIN}\n\n{tables(record)}\n\n{END}{rest.partition(END)[2]}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
