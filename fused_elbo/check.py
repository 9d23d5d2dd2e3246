"""``python -m fused_elbo check``: every backend, operation and dtype against the formulas, on this machine."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from . import accuracy, codegen, functional, ops, reference
from .cases import Operation, draw, operations
from .codegen.hardware import GPUS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SEED = 20140501
GRADCHECK_SHAPE = (2, 3, 2)


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
    echo(f"Operations on {device}: largest error as a share of the envelope (float64: gradcheck too; reference: gradgradcheck)")
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
    inputs = [_at(draw(kind, generator), device, result.dtype) for kind in operation.inputs]
    ours = _evaluate(operation.fused, inputs)
    exact = _evaluate(operation.eager, [_at(t, device, torch.float64) for t in inputs])
    eager = _evaluate(operation.eager, inputs)
    for what, value in ours.items():
        ulps = accuracy.SUM_ULPS if what.startswith("output") and operation.sums[int(what.split()[1])] else None
        # Nothing is more exact than float64 here, so there the formulas' own cancellation is allowed for.
        magnitude = max(1.0, operation.magnitude) if result.dtype == torch.float64 else operation.magnitude
        terms = torch.full_like(value, magnitude) if result.dtype in accuracy.NOISE else None
        _record(result, *accuracy.envelope(value, exact[what], eager[what], ulps=ulps, terms=terms), what)
    if result.dtype == torch.float64 and operation.function:
        leaves = [_at(draw(kind, generator, GRADCHECK_SHAPE), device, result.dtype) for kind in operation.inputs]
        try:
            # Triton's interpreter has time for the derivative along one direction, not for each element's.
            fast = result.backend == "triton" and device.type == "cpu"
            torch.autograd.gradcheck(operation.fused, leaves, fast_mode=fast)
            if result.backend == "reference":
                # A double backward is made of the formulas, whatever the backend.
                torch.autograd.gradgradcheck(operation.fused, leaves)
        except GradcheckError as error:
            result.failure = str(error).strip().splitlines()[0]


def _at(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A leaf like ``t``; what is not floats keeps its dtype."""
    return t.detach().to(device, dtype if t.is_floating_point() else t.dtype).requires_grad_(t.requires_grad)


def _evaluate(function: Callable[..., Any], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs by name, and for each output the gradients of all inputs, for the same upstream gradient in every dtype."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    wanted = [t for t in leaves if t.requires_grad]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = {}
    for k, output in enumerate(outputs):
        values[f"output {k}"] = output.detach()
        # Small multiples of 1/2: the same number in every dtype. One output at a time, so that no two terms cancel.
        upstream = torch.randint(1, 9, output.shape, generator=torch.Generator().manual_seed(k)) / 2
        upstream = upstream.to(output.device, output.dtype)
        grads = torch.autograd.grad(output, wanted, upstream, retain_graph=True, allow_unused=True)
        for i, (grad, leaf) in enumerate(zip(grads, wanted, strict=True)):
            values[f"gradient {i} of output {k}"] = torch.zeros_like(leaf) if grad is None else grad
    return values


def _record(result: Result, error: Tensor, bound: Tensor, what: str) -> None:
    share = (error / bound).max().item()
    result.worst = max(result.worst, share)
    if not share <= 1.0 and result.failure is None:
        result.failure = f"{what}: error {share:.3g} times what is allowed"


def _codegen(echo: Callable[[str], None]) -> int:
    """Compile the Triton kernels for this GPU, else for all; 1 if one is over its budget, or is not read and should be."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fused_elbo.codegen", "--only", "triton"]
    here = 10 * torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
    if here in GPUS:
        command += ["--gpu", str(here)]
    echo(f"Machine code of the Triton kernels, compiled for {'this GPU' if here in GPUS else 'GPUs that need not be here'}")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            echo(line.rstrip())
    if process.returncode == codegen.UNREADABLE:
        # That is a failure only where the kernels can run.
        return int(ops.unavailable("triton", "cuda") is None)
    return int(process.returncode != 0)


def _row(backend: str, operation: str, *cells: str) -> str:
    return f"{backend:<12}{operation:<22}" + "".join(f"{cell:>10}" for cell in cells)
