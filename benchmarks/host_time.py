"""``python -m benchmarks.host_time``: what a call of the smallest size costs the host, boundary by boundary, in microseconds.

Nothing waits for a device, and on 8 x 8 elements no kernel takes long: what is left is Python's and torch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_elbo as fe
from fused_elbo import operators, ops
from fused_elbo.autograd import GaussianNLL, RsampleKL, apply
from fused_elbo.bench import environment
from fused_elbo.spec import Gaussian, Gradients, Noise

LATENTS, DATA = (8, 4), (8, 8)
CALLS, ROUNDS = 200, 50
FORWARD, BOTH = "forward", "forward and backward"
Case = tuple[str, str, str]


class Smallest(torch.autograd.Function):
    """What torch asks of any Function, and nothing else."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_hat: Tensor, loss: Callable[[], Tensor], grad: Tensor) -> Tensor:
        ctx.grad = grad
        return loss()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.grad, None, None


def cases(device: torch.device) -> Iterator[tuple[Case, Callable[[], object]]]:
    """(stage, part, boundary) and a call. A backward's gradients are taken off before, so that none is added to another."""
    module = ops.select(device)
    mu, logvar = (torch.zeros(LATENTS, device=device, requires_grad=True) for _ in range(2))
    x_hat, x = torch.zeros(DATA, device=device, requires_grad=True), torch.ones(DATA, device=device)
    m, v, y = mu.detach(), logvar.detach(), x_hat.detach()
    seed = torch.zeros((), dtype=torch.int64, device=device)

    def operation() -> Tensor:
        return module.elbo(y, x, None, None, None, 1.0, Gaussian(), Gradients(x_hat=torch.empty_like(y)), weight=1.0)[0]

    place = (0, 0, 0, True, module)
    call = (None, Gaussian(), 1.0, (True, False, False, False, False), False, module)
    yield ("sample and KL", FORWARD, "backend's call"), lambda: module.rsample_kl(m, v, Noise(seed), want_kl=True)
    yield ("sample and KL", FORWARD, "Function"), lambda: apply(RsampleKL, mu, logvar, seed, None, place)
    yield ("sample and KL", FORWARD, "public function"), lambda: fe.rsample_kl(mu, logvar)
    yield ("sample and KL", FORWARD, "operator"), lambda: operators.latent(mu, logvar, seed, None, 0, 0, 0, True)
    yield ("likelihood", FORWARD, "backend's call"), operation
    yield ("likelihood", FORWARD, "Function"), lambda: apply(GaussianNLL, x_hat, x, 1.0, call)
    yield ("likelihood", FORWARD, "public function"), lambda: fe.gaussian_nll(x_hat, x, reduction="sum")
    yield ("likelihood", FORWARD, "operator"), lambda: operators.gaussian(x_hat, x, 1.0, False, [True, False])

    def both(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x_hat.grad = None
            loss().backward()

        return run

    scalar, grad = torch.zeros((), device=device), torch.zeros(DATA, device=device)
    yield ("likelihood", BOTH, "`F.mse_loss`"), both(lambda: F.mse_loss(x_hat, x, reduction="sum"))
    yield ("likelihood", BOTH, "smallest Function"), both(lambda: Smallest.apply(x_hat, scalar.clone, grad))
    yield ("likelihood", BOTH, "smallest Function with the operation"), both(lambda: Smallest.apply(x_hat, operation, grad))
    yield ("likelihood", BOTH, "public function"), both(lambda: fe.gaussian_nll(x_hat, x, reduction="sum"))


def measure(backend: str, device: torch.device) -> list[dict[str, object]]:
    """Of each case the median and the least of many rounds, in which the cases take turns."""
    with fe.backend(backend):
        found = [(case, run, []) for case, run in cases(device)]
        for turn in range(ROUNDS + 1):
            for _, run, times in found:
                begin = time.perf_counter_ns()
                for _ in range(CALLS):
                    run()
                if turn:
                    times.append((time.perf_counter_ns() - begin) / CALLS / 1e3)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    return [
        {"backend": backend, "stage": stage, "part": part, "boundary": boundary, "us": statistics.median(t), "least_us": min(t)}
        for (stage, part, boundary), _, t in found
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    reasons = {name: ops.unavailable(name, args.device.type) for name in ("native", "triton")}
    rows = [row for name, reason in reasons.items() if reason is None for row in measure(name, args.device)]
    for row in rows:
        print(f"{row['backend']:8}{row['stage']:15}{row['part']:22}{row['boundary']:38}{row['us']:6.1f}{row['least_us']:7.1f}")
    if args.json:
        facts = environment.facts([], args.device, reasons) | {"command": "python -m benchmarks.host_time"}
        args.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
