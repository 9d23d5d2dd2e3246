"""``python -m benchmarks.steps``: whole training steps with the fused loss and with the classic lines, in turns, on a CPU.

The loss is a small part of a step, so what is asked is whether the step is the worse for it: eager, and with the model and the
loss compiled together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fused_elbo as fe
from fused_elbo import ops
from fused_elbo.vae.model import build

from .cpu import environment

LATENTS = 10
# Of the first step's loss, which both compute on noise of their own: some tens of nats in hundreds.
SAME_LOSS = 0.1


class Step:
    """A training step of a model: ``forward(x)`` is the loss."""

    def __init__(self, model: nn.Module, x: Tensor, compiled: bool) -> None:
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        self.forward = torch.compile(model, fullgraph=True) if compiled else model
        self.x = x

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.forward(self.x)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Fused(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        z, kl = fe.rsample_kl(self.vae.encode(x), chunk_dim=1)
        return fe.elbo_loss(self.vae.decode(z), x, kl=kl).loss


class Classic(Fused):
    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.vae.encode(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        reconstruction = 0.5 * F.mse_loss(self.vae.decode(z), x, reduction="sum")
        return (reconstruction - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())) / x.shape[0]


class Wide(nn.Module):
    """A VAE of flat data whose layers are so narrow that the loss is a fair part of the step."""

    def __init__(self, size: int, hidden: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, hidden), nn.SiLU(), nn.Linear(hidden, size), nn.Sigmoid())

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def cases(quick: bool) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]]:
    """By name: a model, the shape of a batch, and whether it is compiled."""
    digits = (32, 1, 28, 28)
    large = (64, 3072) if quick else (4096, 3072)
    return {
        "mlp 32x784, eager": (lambda: build("mlp", latent_dim=LATENTS, seed=0), digits, False),
        "conv 32x784, eager": (lambda: build("conv", latent_dim=LATENTS, seed=0), digits, False),
        "narrow 128x784, compiled": (lambda: Wide(784), (128, 784), True),
        f"narrow {large[0]}x{large[1]}, compiled": (lambda: Wide(large[1]), large, True),
    }


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], compiled: bool, seconds: float) -> dict[str, Any]:
    """Quartiles of the step's time in ms by loss, and the ratio of the medians; the two take turns."""
    torch.manual_seed(0)
    x = torch.rand(shape)
    steps = {}
    for name, kind in (("fused", Fused), ("classic", Classic)):
        torch.manual_seed(0)
        steps[name] = Step(kind(make()), x, compiled)
    first = {name: step().item() for name, step in steps.items()}
    if abs(first["fused"] / first["classic"] - 1) > SAME_LOSS:
        raise RuntimeError(f"the losses are not the same: {first}")
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["classic"]) < 4:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    quartiles = {name: statistics.quantiles(ms, n=4, method="inclusive") for name, ms in times.items()}
    return {"ms": quartiles, "rounds": len(times["fused"]), "ratio": quartiles["classic"][1] / quartiles["fused"][1]}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", metavar="TEXT", help="only the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="X", help="time for each case (default: 20)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of torch (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    chosen = {name: case for name, case in cases(args.quick).items() if args.filter in name}
    if not chosen:
        parser.error(f"--filter: no case contains {args.filter!r}, of: {', '.join(cases(args.quick))}")
    results = {}
    for name, case in (bar := tqdm(chosen.items())):
        bar.set_description(name)
        results[name] = measure(*case, args.seconds)
    print(f"{'step':<32}{'fused, ms':>12}{'classic, ms':>14}{'classic / fused':>18}")
    for name, row in results.items():
        print(f"{name:<32}{row['ms']['fused'][1]:>12.3f}{row['ms']['classic'][1]:>14.3f}{row['ratio']:>18.3f}")
    if args.json:
        facts = environment(argv, {name: ops.unavailable(name, "cpu") for name in ops.BACKENDS}, "benchmarks.steps")
        args.json.write_text(json.dumps({"environment": facts, "steps": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
