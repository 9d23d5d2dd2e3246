"""The operators on distributed tensors (DTensor): what each process computes of its shards, without gathering them.

A batch may be sharded, and so may every dimension behind it: sums over those come out as ``Partial``. The operators know how
their arguments may be sharded once ``register`` was called. Noise is numbered in the undivided tensor, so a sample drawn from a
seed runs on each shard with the number of the shard's first element.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import operators
from .autograd import PosteriorCall, halves

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

# Placements of an operator's outputs and of its arguments, along one dimension of the mesh.
Rule = tuple[list, list]


def involved(*tensors: Tensor | None) -> bool:
    """Whether one of them is a DTensor."""
    # To import that class takes long; where nobody has, there is none.
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and any(isinstance(t, tensor.DTensor) for t in tensors)


def register() -> None:
    """Tell DTensor how the operators may be sharded."""
    _register()


# A compiler that traces a call runs it, in place of tracing it.
register._dynamo_marked_constant = True


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    # What torch.distributed.tensor.experimental.register_sharding does, for operators whose first argument may be absent, and
    # whose rules depend on which arguments are and on lists of bools: all of them are part of the key of DTensor's cache.
    everything = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)

    def strategy(rules: Callable[..., list[Rule]], schema: OpSchema) -> OpStrategy:
        args = [a.strategies[0].output_spec if isinstance(a, OpStrategy) else a for a in schema.args_schema]
        placements = [[*outputs, *inputs] for outputs, inputs in rules(*args)]
        outputs = len(schema.op._schema.returns)
        mesh = schema.args_strategy[0].strategies[0].mesh
        return expand_to_full_mesh_op_strategy(mesh, schema, placements, input_index=outputs)

    for operator, rules in (
        (operators.nll, _nll_rules),
        (operators.nll_backward, _nll_backward_rules),
        (operators.sample, _sample_rules),
        (operators.sample_backward, _sample_backward_rules),
    ):
        chosen = functools.partial(strategy, rules)
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(operator, chosen, everything)


def prepared(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Operands for an operator, whose gradients come back with their own placements, not those of the operator's results."""
    register()
    _all_distributed(tensors)
    return tuple(
        t if t is None or not t.requires_grad else _unexpanded(t).redistribute(placements=t.placements).expand(t.shape)
        for t in tensors
    )


def traced(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The posterior's tensors for an operator in a compiler's graph: it gathers them where it numbers the noise of one seed."""
    from torch.distributed.tensor import DTensor, Replicate

    register()
    mu, *others, seed, eps = tensors
    if seed is not None and not involved(seed):
        mesh = mu.device_mesh
        seed = DTensor.from_local(seed, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return mu, *others, seed, eps


def sampled(
    mu: Tensor,
    raw: Tensor | None,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    seed: Tensor,
    call: PosteriorCall,
    run: Callable,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``routes.posterior`` of distributed tensors, with noise from a seed; a plain seed is that of the mesh's first process.

    Args:
        run: ``routes.posterior`` for this process's shards.

    Raises:
        ValueError: the elements of a shard are not numbered in one piece, so that an operator cannot make their noise.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    _all_distributed((mu, raw, prior_mean, prior_raw))
    mesh = mu.device_mesh
    mu = mu.redistribute(placements=[Replicate() if p.is_partial() else p for p in mu.placements])
    mean, second = halves(mu, raw, call.chunk_dim)
    placements = mu.placements
    if raw is None and any(p.is_shard(call.chunk_dim % mu.dim()) for p in placements):
        raise ValueError(f"mu: got moments sharded on chunk_dim={call.chunk_dim}, takes them sharded on another dimension")
    start, shape = _local_place(mean.shape, mesh, placements)
    first_index = call.first_index + _first(start, mean.shape, seed.dim() > 0, call.samples, placements)
    if not involved(seed):
        seed = distribute_tensor(seed, mesh, [Replicate()] * mesh.ndim)
    seed = seed.full_tensor() if seed.dim() == 0 else _shard(seed, placements, start, shape)
    local = [None if t is None else _shard(t, placements, start, shape) for t in (mean, second, prior_mean, prior_raw)]
    found = run(*local, seed, None, call._replace(chunk_dim=0, first_index=first_index))
    samples, count = call.samples, mean.shape[:1]
    by_row = [p if not p.is_shard() or p.is_shard(0) else Partial() for p in placements]
    layouts = (
        (torch.Size((samples, *mean.shape)), [Shard(p.dim + 1) if p.is_shard() else p for p in placements]),
        (mean.shape, placements) if call.want_kl == "elements" else (count, by_row),
        (torch.Size((samples, *count)), [Shard(1) if p.is_shard(0) else p for p in by_row]),
    )

    def wrapped(t: Tensor | None, shape: torch.Size, placements: Sequence[Placement]) -> DTensor | None:
        if t is None:
            return None
        return _distributed(t, mesh, placements, shape, torch.empty(shape, device="meta").stride())

    return tuple(wrapped(t, *layout) for t, layout in zip(found, layouts, strict=True))


def _first(start: list[int], shape: torch.Size, seeds: bool, samples: int, placements: Sequence[Placement]) -> int:
    """How many elements the stream counts from its first to a shard's, of a sample of ``shape``."""
    sharded = {p.dim for p in placements if p.is_shard()}
    first, several = 0, samples > 1
    for d, (size, before) in enumerate(zip(shape, start, strict=True)):
        # With one seed for each sample of the batch, its elements alone are counted.
        if d > 0 or not seeds:
            if several and d in sharded:
                raise ValueError(
                    f"seed: got {'one for each sample' if seeds else 'one'} with num_samples {samples} and mu of shape "
                    f"{tuple(shape)} as {tuple(placements)}, takes mu sharded on the batch alone, for several samples with one "
                    "seed for each sample of the batch; or eps=, sharded as mu is: the elements of such a shard are not "
                    "numbered one after the other"
                )
            several = several or size > 1
            first = first * size + before
    return first


def _local_place(shape: torch.Size, mesh: Any, placements: Sequence[Placement]) -> tuple[list[int], list[int]]:
    """Where this process's shard of a tensor starts, and its shape."""
    from torch.distributed.tensor import Replicate, Shard

    start, sizes = [0] * len(shape), list(shape)
    for dim, placement in enumerate(placements):
        if type(placement) is Shard:
            d, here = placement.dim, mesh.get_local_rank(dim)
            chunk = -(-sizes[d] // mesh.size(dim))
            before = min(chunk * here, sizes[d])
            start[d] += before
            sizes[d] = min(chunk, sizes[d] - before)
        elif type(placement) is not Replicate:
            raise ValueError(f"mu: got placement {placement} with a seed, takes Shard and Replicate, or explicit noise, eps=")
    return start, sizes


class _Local(torch.autograd.Function):
    """A DTensor's part in this process. ``to_local`` does not know the strides of a gradient whose shards differ in size."""

    @staticmethod
    def forward(ctx: Any, t: DTensor, placements: Sequence[Placement]) -> Tensor:
        ctx.mesh, ctx.placements = t.device_mesh, placements
        ctx.shape, ctx.stride = t.shape, t.stride()
        return t.to_local().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[DTensor, None]:
        return _distributed(gradient, ctx.mesh, ctx.placements, ctx.shape, ctx.stride), None


def _distributed(t: Tensor, mesh: Any, placements: Sequence[Placement], shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(t, mesh, placements, run_check=False, shape=shape, stride=stride)


def _shard(t: DTensor, placements: Sequence[Placement], start: list[int], shape: list[int]) -> Tensor:
    """This process's part of ``t``, of whose leading dimensions all have a mean's size, for a mean placed so."""
    from torch.distributed.tensor import Partial, Replicate

    t = _unexpanded(t)
    # A dimension of size 1 is broadcast: each process has all of it, and its share of the gradient.
    here = [Replicate() if p.is_shard() and (p.dim >= t.dim() or t.shape[p.dim] == 1) else p for p in placements]
    partial = [
        Partial() if p.is_shard() and p.dim < t.dim() and not q.is_shard() else q for p, q in zip(placements, here, strict=True)
    ]
    local = _Local.apply(t.redistribute(placements=here), partial)
    wanted = tuple(shape[: t.dim()])
    if any(a not in (b, 1) for a, b in zip(local.shape, wanted, strict=True)):
        raise ValueError(f"mu: got a shard of shape {tuple(local.shape)}, takes {wanted}: torch.chunk's parts of the tensor")
    return local.expand(wanted)


def _unexpanded(t: Tensor) -> Tensor:
    """``t`` with size 1 where it was expanded, so that its gradient is summed up before it is sent anywhere."""
    for d, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(d, 0, 1)
    return t


def _all_distributed(tensors: Sequence[Tensor | None]) -> None:
    if any(t is not None and not involved(t) for t in tensors):
        raise TypeError(
            "mu, x_hat: got a DTensor together with plain tensors, takes DTensors alone, as distribute_tensor makes"
        )


def _nll_rules(x_hat: Any, *args: Any) -> list[Rule]:
    """Rows are sharded as they are; elements of a row are summed up on each shard."""
    tensors, options = (x_hat, *args[:4]), args[4:]
    return [([out[0]], [*inputs, *_nothing(options)]) for out, inputs, _ in _data(tensors)]


def _nll_backward_rules(upstream: Any, x_hat: Any, *args: Any) -> list[Rule]:
    tensors, options = (x_hat, *args[:4]), args[4:]
    *_, needs = options
    return [
        ([_needed(g, need) for g, need in zip(gradients, needs, strict=True)], [rows, *inputs, *_nothing(options)])
        for (_, rows), inputs, gradients in _data(tensors)
    ]


def _data(tensors: tuple) -> list[tuple[tuple, list, list]]:
    """Along a mesh's dimension: the placement of the rows' sums, and of their upstream gradient; those of the data side's
    tensors, of which any size may be 1; and those of gradients of the first three."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    x_hat = tensors[0]
    found = [((Replicate(), Replicate()), [_all(t) for t in tensors], [Replicate()] * 3)]
    for d, size in enumerate(x_hat.shape):
        if size > 1:
            out = (Shard(d), Shard(d)) if d < 2 else (Partial(), Replicate())
            inputs = [None if t is None else Shard(d) if t.shape[d] == size else Replicate() for t in tensors]
            gradients = [p if p is None or p.is_shard() else Partial() for p in inputs[:3]]
            found.append((out, inputs, gradients))
    return found


def _sample_rules(*args: Any) -> list[Rule]:
    tensors, (chunk_dim, _, _, _, want_kl, want_log_ratio, *_), options = args[:6], args[6:], args[6:]
    sampled = tensors[4] is not None or tensors[5] is not None
    return [
        ([_needed(z, sampled), _needed(kl[0], want_kl), _needed(ratio[0], want_log_ratio)], [*inputs, *_nothing(options)])
        for z, kl, ratio, inputs in _latent(tensors, chunk_dim, want_kl)
    ]


def _sample_backward_rules(*args: Any) -> list[Rule]:
    upstream, tensors, options = args[:3], args[3:9], args[9:]
    chunk_dim, _, _, _, want_kl, *_, needs = options
    return [
        (
            [_needed(g, need) for g, need in zip((inputs[0] if g is None else g for g in inputs[:4]), needs, strict=True)],
            [
                *(None if g is None else p for g, p in zip(upstream, (z, kl[1], ratio[1]), strict=True)),
                *inputs,
                *_nothing(options),
            ],
        )
        for z, kl, ratio, inputs in _latent(tensors, chunk_dim, want_kl)
    ]


def _latent(tensors: tuple, chunk_dim: int, want_kl: str | None) -> list[tuple]:
    """Along a mesh's dimension: the placement of z; of kl and log_ratio with that of their upstream gradients; of the latent
    side's tensors."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    mu, *_, seed, eps = tensors
    everywhere = (Replicate(), Replicate())
    found = [(Replicate(), everywhere, everywhere, [_all(t) for t in tensors])]
    for d, size in enumerate(mu.shape):
        # Of a shard the operator numbers the elements as if there were no other.
        numbered_here = seed is None or (seed.ndim == 1 and d == 0)
        if size > 1 and numbered_here and not (chunk_dim and d == chunk_dim % mu.ndim):
            inputs = [None if t is None else Shard(d) for t in tensors[:4]]
            inputs += [None if seed is None else Shard(0), None if eps is None else Shard(d + 1)]
            rows = (Partial(), Replicate())
            kl = (Shard(d), Shard(d)) if d == 0 or want_kl == "elements" else rows
            found.append((Shard(d + 1), kl, (Shard(1), Shard(1)) if d == 0 else rows, inputs))
    return found


def _needed(placement: Any, need: object) -> Any:
    """Of an output: what is not needed is an empty tensor, which every process has."""
    from torch.distributed.tensor import Replicate

    return placement if need and placement is not None else Replicate()


def _all(t: Any) -> Placement | None:
    from torch.distributed.tensor import Replicate

    return None if t is None else Replicate()


def _nothing(options: Sequence) -> list[None]:
    return [None] * len(options)
