"""``python -m fused_elbo check``: every backend, operation and dtype against the formulas, on this machine."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from . import accuracy, functional, ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPE = (3, 5, 7)
SEED = 20140501
BETA = 0.7
SIGMA = 0.6


class Operation(NamedTuple):
    """``fused(*inputs)`` is the library's, ``eager`` the classic lines; ``sums`` says which outputs are sums."""

    fused: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: int
    sums: tuple[bool, ...]


@dataclasses.dataclass
class Result:
    """Outcome for one backend, operation and dtype: ``worst`` is the largest error as a share of what is allowed."""

    backend: str
    operation: str
    dtype: torch.dtype
    worst: float
    failure: str | None = None


def run(echo: Callable[[str], None] = print) -> int:
    """Check everything that can run here and print the tables.

    Args:
        echo: gets each line. Default: print.

    Returns:
        0, or 1 if anything failed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # Read when the backend is first loaded: without a GPU its kernels run in Triton's interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    failures = []
    echo(f"Operations on {device}: largest error as a share of the envelope (float64: gradcheck and gradgradcheck as well)")
    echo(_row("backend", "operation", *(str(d).removeprefix("torch.") for d in DTYPES)))
    for name in ops.BACKENDS:
        reason = ops.unavailable(name, device.type)
        if reason is not None:
            echo(f"{name:<12}not run: {reason}")
            continue
        for operation in (*operations(), "noise"):
            results = list(check(name, device, operation))
            cells = [f"{r.worst:.2f}" if r.failure is None else "FAIL" for r in results]
            echo(_row(name, operation, *cells))
            failures += [r for r in results if r.failure is not None]
    for r in failures:
        echo(f"FAIL {r.backend} {r.operation} {r.dtype}: {r.failure}")
    unclean = _codegen(echo)
    echo("all passed" if not failures and not unclean else f"{len(failures) + unclean} failed")
    return int(bool(failures or unclean))


def operations() -> dict[str, Operation]:
    """The public operations, on inputs that are each of shape ``SHAPE``."""
    fe, n = functional, SHAPE[0]

    def pack(mu: Tensor, logvar: Tensor) -> Tensor:
        return torch.cat((mu, logvar), 1)

    def nll(x_hat: Tensor, x: Tensor) -> Tensor:
        return ((x_hat - x) ** 2).flatten(1).sum(1) / (2 * SIGMA**2) + x[0].numel() * math.log(SIGMA)

    def kl(mu: Tensor, logvar: Tensor) -> Tensor:
        return -0.5 * (1 + logvar - mu**2 - logvar.exp()).flatten(1).sum(1)

    def z(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        return mu + eps * torch.exp(0.5 * logvar)

    def elbo(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        terms = nll(x_hat, x), kl(mu, logvar)
        return (terms[0] + BETA * terms[1]).mean(), *terms

    def staged(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        divergence = fe.kl_divergence(mu, logvar, reduction="none")
        return tuple(fe.elbo_loss(x_hat, x, kl=divergence, beta=BETA, sigma=SIGMA))

    return {
        "reparameterize": Operation(lambda m, v, e: fe.reparameterize(m, v, eps=e), z, 3, (False,)),
        "rsample_kl": Operation(
            lambda m, v, e: tuple(fe.rsample_kl(m, v, eps=e)), lambda m, v, e: (z(m, v, e), kl(m, v)), 3, (False, True)
        ),
        "rsample_kl, packed": Operation(
            lambda m, v, e: tuple(fe.rsample_kl(pack(m, v), chunk_dim=1, eps=e)),
            lambda m, v, e: (z(m, v, e), kl(m, v)),
            3,
            (False, True),
        ),
        "kl_divergence": Operation(fe.kl_divergence, lambda m, v: kl(m, v).mean(), 2, (True,)),
        **{
            f"gaussian_nll, {reduction}": Operation(
                lambda a, b, reduction=reduction: fe.gaussian_nll(a, b, sigma=SIGMA, reduction=reduction),
                lambda a, b, weight=weight: nll(a, b) if weight is None else weight * nll(a, b).sum(),
                2,
                (True,),
            )
            for reduction, weight in (("mean", 1 / n), ("sum", 1.0), ("none", None))
        },
        "elbo_loss": Operation(
            lambda a, b, m, v: tuple(fe.elbo_loss(a, b, m, v, beta=BETA, sigma=SIGMA)), elbo, 4, (True, True, True)
        ),
        "elbo_loss, kl=": Operation(staged, elbo, 4, (True, True, True)),
    }


def check(backend: str, device: torch.device, operation: str) -> Iterator[Result]:
    """One operation (or "noise") of one backend, in every dtype."""
    for dtype in DTYPES:
        result = Result(backend, operation, dtype, 0.0)
        with ops.backend(backend):
            if operation == "noise":
                if dtype not in accuracy.NOISE:
                    continue
                _noise(result, device)
            else:
                _values_and_gradients(result, operations()[operation], device)
        yield result


def _noise(result: Result, device: torch.device) -> None:
    seed = torch.tensor(SEED, device=device)
    for shape, first_index in (((257,), 0), ((5, 7), 3), ((2, 3, 64), 2**34 + 4)):
        zero = torch.zeros(shape, dtype=result.dtype, device=device)
        ours = functional.reparameterize(zero, zero, seed=seed, first_index=first_index)
        exact = reference.noise(seed, shape, dtype=torch.float64, first_index=first_index)
        _record(result, (ours.double() - exact).abs(), torch.tensor(accuracy.NOISE[result.dtype], device=device), "normals")


def _values_and_gradients(result: Result, operation: Operation, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(SEED)
    draws = [torch.randn(SHAPE, generator=generator) for _ in range(operation.inputs)]
    inputs = [d.to(device, result.dtype) for d in draws]
    ours = _evaluate(operation.fused, inputs)
    exact = _evaluate(operation.eager, [t.double() for t in inputs])
    eager = _evaluate(operation.eager, inputs)
    for what, value in ours.items():
        ulps = accuracy.SUM_ULPS if what.startswith("output") and operation.sums[int(what.split()[1])] else None
        # Nothing is more exact than float64 here, so there the formulas' own cancellation is allowed for.
        terms = torch.ones_like(value) if result.dtype == torch.float64 else None
        _record(result, *accuracy.envelope(value, exact[what], eager[what], ulps=ulps, terms=terms), what)
    if result.dtype == torch.float64:
        leaves = [t[:2, :3, :2].requires_grad_() for t in inputs]
        try:
            torch.autograd.gradcheck(operation.fused, leaves)
            torch.autograd.gradgradcheck(operation.fused, leaves)
        except GradcheckError as error:
            result.failure = str(error).strip().splitlines()[0]


def _evaluate(function: Callable[..., Any], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs by name, and for each output the gradients of all inputs, for the same upstream gradient in every dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = {}
    for k, output in enumerate(outputs):
        values[f"output {k}"] = output.detach()
        # Small multiples of 1/2: the same number in every dtype. One output at a time, so that no two terms cancel.
        upstream = torch.randint(1, 9, output.shape, generator=torch.Generator().manual_seed(k)) / 2
        upstream = upstream.to(output.device, output.dtype)
        grads = torch.autograd.grad(output, leaves, upstream, retain_graph=True, allow_unused=True)
        for i, (grad, leaf) in enumerate(zip(grads, leaves, strict=True)):
            values[f"gradient {i} of output {k}"] = torch.zeros_like(leaf) if grad is None else grad
    return values


def _record(result: Result, error: Tensor, bound: Tensor, what: str) -> None:
    share = (error / bound).max().item()
    result.worst = max(result.worst, share)
    if not share <= 1.0 and result.failure is None:
        result.failure = f"{what}: error {share:.3g} times what is allowed"


def _codegen(echo: Callable[[str], None]) -> int:
    """Compile the Triton kernels for GPUs that need not be here; the number of kernels that spill or split their accesses."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fused_elbo.backends.triton.codegen"]
    echo("Machine code of the Triton kernels, compiled for GPUs that need not be here")
    header = ("target", "registers", "spills", "local bytes", "accesses", "per element")
    echo(f"{'kernel':<32}{'dtype':<10}" + "".join(f"{c:>13}" for c in header))
    unclean = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            r = json.loads(line)
            target, widths = f"sm_{r['architecture']}", "/".join(str(w) for w in sorted(set(r["accesses"])))
            cells = (target, r["registers"], r["spilled"], r["local"], f"{widths} bit", f"{r['instructions']:.1f}")
            verdict = "" if r["clean"] else "  FAIL"
            echo(f"{r['kernel']:<32}{r['dtype']:<10}" + "".join(f"{c:>13}" for c in cells) + verdict)
            unclean += not r["clean"]
        message = process.stderr.read().strip()
    if process.returncode:
        echo(f"not read: {message.splitlines()[-1]}")
        return int(ops.unavailable("triton", "cuda") is None)
    return unclean


def _row(backend: str, operation: str, *cells: str) -> str:
    return f"{backend:<12}{operation:<22}" + "".join(f"{cell:>10}" for cell in cells)
