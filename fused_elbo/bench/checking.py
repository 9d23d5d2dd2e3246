"""Nobody is timed whose values and gradients are not those of the formulas in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .work import Inputs, Stage, halves

# Largest error of a value or gradient, as a share of the largest exact one of its tensor: wide enough for the sums and
# cancellations of plain PyTorch in that dtype, which are not judged here.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Deviation of the noise's mean and mean square from 0 and 1, in units of the latter's standard error.
NOISE_BOUND = 6.0

# Elements of the largest tensor that are in float64 at a time: all would need more memory than what is checked.
CHUNK = {"cpu": 2**17, "cuda": 2**25}


class Comparison:
    """The largest error of one result beside its exact values, over parts of it; not a number stays one."""

    def __init__(self) -> None:
        self.error = self.largest = torch.zeros((), dtype=torch.float64)

    def add(self, ours: Tensor, right: Tensor) -> None:
        right = right.detach()
        self.error = torch.maximum(self.error, (ours.detach().double() - right).abs().max().cpu())
        self.largest = torch.maximum(self.largest, right.abs().max().cpu())

    def fault(self, bound: float) -> str | None:
        share = float(self.error / self.largest)
        return None if share <= bound else f"is off by {share:.1e} of its largest, {bound:.0e} is allowed"


def fault(stage: Stage, inputs: Inputs, upstream: Sequence[Tensor], found: Sequence[Tensor], constant: float) -> str | None:
    """What is wrong with ``found``, values and then gradients, beside the same in float64; None if nothing is.

    The noise is what ``found``'s sample says it was; ``constant`` is added to an exact mean.
    """
    # Parts as small as those on a CPU are no faster with more threads, and much slower where these wait for a processor.
    with contextlib.nullcontext() if inputs.leaves[0].is_cuda else _one_thread():
        return _fault(stage, inputs, upstream, found, constant)


def _fault(stage: Stage, inputs: Inputs, upstream: Sequence[Tensor], found: Sequence[Tensor], constant: float) -> str | None:
    leaves, bound = inputs.leaves, BOUNDS[inputs.leaves[0].dtype]
    wanted = [t for t in leaves if t.requires_grad] if stage.part != "forward" else []
    shapes = [*(g.shape for g in inputs.upstream), *(t.shape for t in wanted)]
    for index, (ours, shape) in enumerate(zip(found, shapes, strict=True)):
        if ours.shape != shape:
            return f"result {index} has shape {tuple(ours.shape)}, not {tuple(shape)}"
    comparisons = [Comparison() for _ in shapes]
    means = {index: constant for index, value in enumerate(stage.values) if value == "mean"}
    noise = torch.zeros(2, dtype=torch.float64)
    for rows, share in _chunks(leaves):
        part = [t[rows].detach().double().requires_grad_(t.requires_grad) for t in leaves]
        options = {}
        if "sample" in stage.values:
            index = stage.values.index("sample")
            # With x_hat and x before them or not, packed moments make the number of leaves odd.
            mu, logvar = (t.detach() for t in halves(tuple(part[-1:] if len(part) % 2 else part[-2:])))
            options["eps"] = (found[index][rows].detach().double() - mu) * torch.exp(-0.5 * logvar)
            noise += torch.stack((options["eps"].sum(), options["eps"].square().sum())).cpu()
        formula = next(iter(stage.eager.values()))
        values = formula(*part, **options)
        exact = list(values)
        if wanted:
            gradients = [
                g.double() * share if value == "mean" else g[rows].double()
                for g, value in zip(upstream, stage.values, strict=True)
            ]
            exact += torch.autograd.grad(values, [t for t in part if t.requires_grad], gradients)
        for index, (ours, right) in enumerate(zip(found, exact, strict=True)):
            if index in means:
                means[index] += share * right.item()
            else:
                comparisons[index].add(ours[rows], right)
    for index, mean in means.items():
        comparisons[index].add(found[index], torch.tensor(mean, dtype=torch.float64, device=found[index].device))
    for index, comparison in enumerate(comparisons):
        if said := comparison.fault(bound):
            return f"result {index} {said}"
    if "sample" in stage.values:
        count = found[stage.values.index("sample")].numel()
        error = max(abs(float(noise[0] / count)), abs(float(noise[1] / count) - 1)) / math.sqrt(2 / count)
        if not error <= NOISE_BOUND:
            return f"the noise is not standard normal: off by {error:.1f} standard errors, {NOISE_BOUND:.0f} are allowed"
    return None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _chunks(leaves: Sequence[Tensor]) -> Iterator[tuple[slice, float]]:
    """Rows that are looked at together, and which share they are of all."""
    count = len(leaves[0])
    most = CHUNK[leaves[0].device.type] // max(t[0].numel() for t in leaves) or 1
    for begin in range(0, count, most):
        rows = slice(begin, min(begin + most, count))
        yield rows, (rows.stop - rows.start) / count
