"""Who is measured at a stage: the library's backends, eager PyTorch, ``torch.distributions``, ``torch.compile``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from .. import ops
from . import checking, steps, work
from .items import Item
from .work import Inputs, Stage, Tensors, Way

# The backend that is timed, but not built for speed, and so not on large items; on a GPU, where its hundreds of launches take
# a quarter of an item's time, on the smallest alone.
SPECIFICATION = "reference"
SPECIFICATION_ELEMENTS = {"cpu": 2**22, "cuda": 2**17}

# Triton runs on a CPU as an interpreter only.
NEVER = {("triton", "cpu"): "its interpreter is not timed"}

LONG_COMPILATION = "compiled on a GPU, and on a CPU with --all"

# Our operations called one after the other, to tell what they cost from what torch's autograd costs on top.
DIRECT = "operations alone"

# Inductor's switches for this very work: sums that thread blocks share, which are off by themselves; and all four lanes of
# Philox, which kernels of one dimension use from torch 2.13 on (pytorch/pytorch#184377) unless the numbers are to be eager's.
SWITCHES = {"triton.cooperative_reductions": True, "align_random_eager": False}
NO_SWITCHES = "these are switches of Inductor's Triton kernels; on a CPU it writes C++"


class Peer(NamedTuple):
    """One side of a comparison.

    Attributes:
        name: unique in its item.
        kind: "ours", "eager", "distributions", "compiled" or "copy".
        bind: to a set of inputs; what it returns is one call of what is timed, which returns values, then gradients.
        fault: what is wrong with such a result of those inputs; None if nothing is.
        backend: of the library, which calls are to be made under; None for other peers.
        upstream: the gradient of a mean that the backward begins with.
        mode: of torch.compile; a mode that takes too long once is not tried again.
        eager: why its launches are not captured and replayed on a GPU; None if they are.
    """

    name: str
    kind: str
    bind: Callable[[Inputs], Callable[[], Tensors]]
    fault: Callable[[Inputs, Sequence[Tensor]], str | None]
    backend: str | None = None
    upstream: float = 1.0
    mode: str | None = None
    eager: str | None = None


def backends(device_type: str) -> dict[str, str | None]:
    """By name: why a backend of the library is not timed on a kind of device, or None."""
    return {name: NEVER.get((name, device_type)) or ops.unavailable(name, device_type) for name in ops.BACKENDS}


def modes(device_type: str, *, quick: bool) -> dict[str, dict[str, Any]]:
    """The ways of torch.compile, as its keyword arguments.

    CUDA graphs of its own would be measured against everybody else's without them: here all are replayed, or nobody.
    """
    found = {"compiled": {}}
    if not quick:
        found["max-autotune"] = {"mode": "max-autotune-no-cudagraphs"}
        if device_type != "cpu":
            found["switches"] = {"options": switches()}
    return found


def switches() -> dict[str, Any]:
    """Those of ``SWITCHES`` that this version of torch has."""
    known = torch._inductor.list_options()
    return {name: value for name, value in SWITCHES.items() if name in known}


def left_out(item: Item, device_type: str, names: Sequence[str], compile_modes: Collection[str]) -> dict[str, str]:
    """Peers that this item does without, and why."""
    found = {}
    if compile_modes and item.eager:
        found |= dict.fromkeys(compile_modes, LONG_COMPILATION)
    elif device_type == "cpu" and compile_modes and not item.sweep:
        found["switches"] = NO_SWITCHES
    most = SPECIFICATION_ELEMENTS[device_type]
    if SPECIFICATION in names and max(item.elements) > most:
        found[SPECIFICATION] = f"not built for speed, it is timed up to {most} elements"
    return found


def peers(
    item: Item, dtype: torch.dtype, device: torch.device, names: Sequence[str], compile_modes: dict[str, dict[str, Any]]
) -> Iterator[Peer]:
    """Everybody who does the work of ``item`` there: backends of the library by ``names``, and plain PyTorch."""
    runnable = [name for name in names if name not in left_out(item, device.type, names, compile_modes)]
    if item.stage == "step":
        for name, kind, made, backend, mode in steps.sides(item, device, runnable, {} if item.eager else compile_modes):
            fault = functools.partial(steps.fault, made)
            yield Peer(name, kind, made.bind, fault, backend, mode=mode, eager="a training step is launched by the host")
        return
    stage = work.STAGES[item.stage]
    in_place = item.stage == "bandwidth"
    plain = []
    if not in_place:
        plain += [(name, "eager", formula, None) for name, formula in stage.eager.items()]
    if not in_place and not item.sweep:
        plain.append(("torch.distributions", "distributions", stage.distributions, None))
        # Inductor makes the same kernels of all ways to write a formula down.
        name, formula = next(iter(stage.eager.items()))
        for mode, how in compile_modes.items():
            plain.append((f"{name}, {mode}", "compiled", _compiled(formula, stage.part, how), mode))
    terms = torch.float64 if dtype == torch.float64 else torch.float32
    for upstream in stage.upstreams if not (item.sweep or in_place) else (1.0,):
        suffix = "" if upstream == 1 else f", upstream {upstream:.2g}"
        for name in runnable:
            yield _peer(f"{name}{suffix}", "ours", work.by_autograd(stage.ours), stage, upstream, terms, backend=name)
        for name in runnable if not (item.sweep or in_place) else ():
            if name != SPECIFICATION:
                way = work.by_operations(stage.operations, functools.partial(ops.select, device))
                yield _peer(f"{name}, {DIRECT}{suffix}", "ours", way, stage, upstream, terms, backend=name)
        for name, kind, formula, mode in plain:
            yield _peer(f"{name}{suffix}", kind, work.by_autograd(formula), stage, upstream, dtype, mode=mode)
    if in_place:
        yield copy()


def copy() -> Peer:
    """The copy of a tensor like x: two passes."""

    def bind(inputs: Inputs) -> Callable[[], Tensors]:
        x = inputs.leaves[-1].detach()
        to = torch.empty_like(x)
        return lambda: (to.copy_(x),)

    def fault(inputs: Inputs, found: Sequence[Tensor]) -> str | None:
        return None if torch.equal(found[0], inputs.leaves[-1]) else "is not a copy"

    return Peer("copy", "copy", bind, fault)


def selected(peer: Peer) -> contextlib.AbstractContextManager:
    """The backend that calls of ``peer`` are to be made under."""
    return contextlib.nullcontext() if peer.backend is None else ops.backend(peer.backend)


def _peer(
    name: str, kind: str, way: Way, stage: Stage, factor: float, terms: torch.dtype, *, backend: str | None = None,
    mode: str | None = None,
) -> Peer:  # fmt: skip
    def upstream(inputs: Inputs) -> Tensors:
        given = zip(inputs.upstream, stage.values, strict=True)
        return tuple(g if value == "sample" else (factor * g).to(terms) for g, value in given)

    def bind(inputs: Inputs) -> Callable[[], Tensors]:
        if stage is work.STAGES["bandwidth"] and kind == "ours":
            x_hat, x = inputs.leaves
            # A clone is no leaf, so that it may be overwritten, and serves every call: the gradient is asked for at the clone.
            inputs = inputs._replace(leaves=(x_hat.clone(), x))
        return work.bind(way, stage.part, inputs, upstream(inputs))

    def fault(inputs: Inputs, found: Sequence[Tensor]) -> str | None:
        constant = work.constant(stage, inputs.leaves) if kind == "distributions" else 0.0
        return checking.fault(stage, inputs, [g.double() for g in upstream(inputs)], found, constant)

    return Peer(name, kind, bind, fault, backend, factor, mode)


def _compiled(formula: Callable[..., Tensors], part: str, how: dict[str, Any]) -> Callable[..., Tensors]:
    compiled = torch.compile(formula, dynamic=False, **how)
    if part != "backward":
        return compiled

    def kept(*leaves: Tensor) -> Tensors:
        # A backward that may be called again must not put its results into what it has saved.
        with functorch_config.patch(donated_buffer=False):
            return compiled(*leaves)

    return kept
