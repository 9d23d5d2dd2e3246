"""The Function of a decoder that ends in a linear layer: x_hat = h W^T + b is made, compared and forgotten chunk by chunk.

A chunk is some rows by some output features. Its part of x_hat is a product, the likelihood's gradient is written over it in
place, and two more products take it to the gradients of h and W; the next chunk uses the same memory. So x_hat, (N, D), and its
gradient never exist. The products are those of PyTorch's own libraries.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..spec import DataGradients, Gaussian, Gradients, Likelihood, compute_dtype
from .common import composed, differentiable

# Bytes of a chunk by device, from `python -m benchmarks.linear_head --chunks` on a CPU whose third-level cache has 32 MiB
# (benchmarks/results/linear_chunks.json): smaller ones cost calls, larger ones fall out of the cache. No GPU has been measured;
# there it is what lies in the second-level cache of an H100 besides what is read.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
OTHER_CHUNK_BYTES = 4 * 2**20
# What a dense target's chunk of a sparse one may take, in full rows.
DENSE_BYTES = 32 * 2**20
# What a gradient is made for, and one over it, are numbers of float32 up to exp of this, whatever sigma is.
MOST_EXPONENT = 80.0
# Products are quickest where their sizes are multiples of this.
GRANULE = 64


class LinearCall(NamedTuple):
    """What is asked of ``LinearNLL``.

    Attributes:
        spec: the likelihood; its ``log_scale`` holds where there is no tensor of it.
        backend: that of the likelihood's pass; None in an operator, which asks for it when it runs.
        dtype: of x_hat, which h, weight and bias are brought to.
        chunk: rows and output features of a chunk; None for ``chunk_of``'s.
        by_rows: the value is that of each sample, (N,), and the gradient waits for the upstream one; else it is their total,
            whose gradient is made in the forward.
        needs: which of (h, weight, bias, x, log_scale) need a gradient.
    """

    spec: Likelihood
    backend: ModuleType | None
    dtype: torch.dtype
    chunk: tuple[int, int] | None
    by_rows: bool
    needs: Sequence[bool]


class LinearNLL(torch.autograd.Function):
    """``(value, *gradients)``: the negative log-likelihood of x under the linear layer's output, total or by sample.

    ``apply(h, weight, bias, x, log_scale, sample_weight, mask, call)``: h (N, H), weight (D, H), bias (D,) or None, x (N, D)
    dense or torch.sparse_csr; log_scale, sample_weight and mask (1 or N, 1 or D) or None. The gradients are its own and not
    differentiable. ``fused_elbo.linear_gaussian_nll`` checks its arguments, this does not.
    """

    @staticmethod
    def forward(
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        log_scale: Tensor | None,
        sample_weight: Tensor | None,
        mask: Tensor | None,
        call: LinearCall,
    ) -> tuple[Tensor | None, ...]:
        tensors = (h, weight, bias, x, log_scale, sample_weight, mask)
        return valued(tensors, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.call = inputs
        gradients = [g for g in output[1:] if g is not None]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *gradients)

    @staticmethod
    def backward(ctx: Any, g_value: Tensor | None, *_: None) -> tuple:
        if g_value is None:
            return (None,) * 8
        # A checkpoint hands them out once.
        saved = ctx.saved_tensors
        tensors, baked = saved[:7], saved[7:]
        call: LinearCall = ctx.call
        if composed():
            return *differentiable(lambda *tensors: (formula(*tensors, call),), tensors, (g_value,)), None
        if call.by_rows:
            found = passed(tensors, g_value, call._replace(needs=ctx.needs_input_grad[:5]), want_nll=False)[1]
            return *(None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=False)), *(None,) * 3
        factor = factor_of(g_value, call.spec, unknown_of(tensors, call.dtype), tensors[3].shape)
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        rest, inputs = iter(baked), zip(tensors, call.needs, strict=False)
        return *(scaled(next(rest), factor, t.dtype, kept) if need else None for t, need in inputs), *(None,) * 3


def valued(tensors: Sequence[Tensor | None], call: LinearCall) -> tuple[Tensor | None, ...]:
    """The value, and the gradients of (h, weight, bias, x, log_scale) that are made along with it, as of ``buffers``."""
    baking = not call.by_rows and any(call.needs)
    nll, gradients = passed(tensors, None, call if baking else call._replace(needs=(False,) * 5), want_nll=True)
    return nll if call.by_rows else nll.sum(), *gradients


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, kept: bool) -> Tensor:
    """``factor`` times the gradient in ``dtype``, in its own memory where that is free."""
    return (gradient * factor if kept else gradient.mul_(factor)).to(dtype)


class Unknown(NamedTuple):
    """What keeps ``unit_of`` from knowing how large x_hat's gradient is: a ``scale`` that is learned, and in ``float16`` also a
    weight of elements."""

    scale: bool
    float16: bool


def unknown_of(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Unknown:
    *_, log_scale, sample_weight, _ = tensors
    return Unknown(log_scale is not None, dtype == torch.float16 and not (log_scale is None and sample_weight is None))


def factor_of(upstream: Tensor, spec: Likelihood, unknown: Unknown, shape: torch.Size) -> Tensor:
    """From gradients that were made for an upstream gradient of ``unit_of`` to those for ``upstream``, of an x of ``shape``."""
    # Sums over nothing are 0, also where a mean over nothing is NaN.
    return torch.zeros_like(upstream) if 0 in shape else upstream / unit_of(spec, unknown, shape[0])


def unit_of(spec: Likelihood, unknown: Unknown, count: int) -> float:
    """What a total's gradient is made for: the upstream gradient that leaves x_hat's of the order of its error, or, where that
    is not known and the dtype ends early, of a mean's over ``count`` samples.

    In float16 another one may over- or underflow; the factor to the right one multiplies sums in float32.
    """
    unit = 1.0
    if not unknown.scale and spec.family != "bernoulli":
        exponent = (2.0 if spec.family == "gaussian" else 1.0) * spec.log_scale
        unit = math.exp(max(-MOST_EXPONENT, min(exponent, MOST_EXPONENT)))
    return unit / max(count, 1) if unknown.float16 else unit


def chunk_of(count: int, features: int, itemsize: int, device_type: str, most: int | None = None) -> tuple[int, int]:
    """Rows and output features of a chunk of ``most`` bytes, by default those of ``CHUNK_BYTES``: as near to a square as the
    sizes allow, so that no operand is read often."""
    elements = (most or CHUNK_BYTES.get(device_type, OTHER_CHUNK_BYTES)) // itemsize
    rows = min(count, _granules(math.isqrt(elements)))
    columns = min(features, _granules(elements // max(rows, 1)))
    return max(1, min(count, _granules(elements // max(columns, 1)))), max(1, columns)


def _granules(size: int) -> int:
    return max(size // GRANULE, 1) * GRANULE


def buffers(tensors: Sequence[Tensor | None], call: LinearCall) -> list[Tensor | None]:
    """Contiguous memory for the gradients of (h, weight, bias, x, log_scale): sums in float32 or better, the rest in their
    tensor's dtype."""
    h, weight, bias, x, log_scale, sample_weight, _ = tensors
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    terms = compute_dtype(h, x, log_scale, sample_weight)
    full = log_scale is not None and log_scale.shape == x.shape
    dtypes = (wide, wide, wide, x.dtype, log_scale.dtype if full else terms)
    found = []
    for t, dtype, need in zip((h, weight, bias, x, log_scale), dtypes, call.needs, strict=True):
        # Without a chunk nobody writes to them.
        new = torch.zeros if 0 in x.shape else torch.empty
        found.append(new(t.shape, dtype=dtype, device=h.device) if need else None)
    return found


def passed(
    tensors: Sequence[Tensor | None], upstream: Tensor | None, call: LinearCall, *, want_nll: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The negative log-likelihood of rows (N,), and gradients as of ``buffers``: for upstream gradients of the rows (N,), or
    without them those of the total's for an upstream gradient ``unit_of``."""
    autocast = torch.autocast(tensors[0].device.type, enabled=False)
    with autocast if torch.is_autocast_enabled(tensors[0].device.type) else contextlib.nullcontext():
        return _passed(tensors, upstream, call, want_nll)


def _passed(
    tensors: Sequence[Tensor | None], upstream: Tensor | None, call: LinearCall, want_nll: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    h, weight, bias, x, log_scale, sample_weight, mask = tensors
    found = buffers(tensors, call)
    g_h, g_weight, g_bias, g_x, g_log_scale = found
    h, weight, bias = (None if t is None else t.to(call.dtype) for t in (h, weight, bias))
    (count, features), terms = x.shape, compute_dtype(h, x, log_scale, sample_weight)
    step, width = call.chunk or chunk_of(count, features, h.element_size(), h.device.type)
    if x.layout is torch.sparse_csr:
        step = max(1, min(step, DENSE_BYTES // max(1, features * x.element_size())))
    plain = upstream is None and _is_plain(x, (log_scale, sample_weight, mask), call.spec)
    if upstream is None:
        unit = unit_of(call.spec, unknown_of(tensors, call.dtype), count)
        upstream = torch.full((), unit, dtype=terms, device=h.device).expand(count)
    by_rows = g_log_scale is not None and log_scale.shape[1] == 1
    by_columns = g_log_scale is not None and not by_rows and log_scale.shape[0] < count
    parts = -(-features // width)
    nll, slope = (torch.zeros((parts, count), dtype=terms, device=h.device) if w else None for w in (want_nll, by_rows))
    memory = torch.empty(min(step, count) * min(width, features), dtype=call.dtype, device=h.device)
    scale_memory = torch.empty_like(memory, dtype=terms) if by_columns else None
    for rows, x_rows in _row_blocks(x, step):
        for part, columns in enumerate(_blocks(features, width)):
            size = (rows.stop - rows.start, columns.stop - columns.start)
            chunk = memory[: math.prod(size)].view(size)
            _linear(h[rows], weight[columns], None if bias is None else bias[columns], chunk)
            g_scale = None
            if by_columns:
                g_scale = scale_memory[: chunk.numel()].view(size)
            elif g_log_scale is not None and not by_rows:
                g_scale = g_log_scale[rows, columns]
            out = DataGradients(chunk if any(call.needs[:3]) else None, None if g_x is None else g_x[rows, columns], g_scale)
            if plain:
                sums = _plain(chunk, x_rows[:, columns], call, out)
            else:
                others = (_part(t, rows, columns, size) for t in (log_scale, sample_weight, mask))
                sums = _general(chunk, x_rows[:, columns], *others, upstream[rows], call, out, (want_nll, by_rows))
            for kept, value in zip((nll, slope), sums, strict=True):
                if kept is not None:
                    kept[part, rows] = value
            if g_h is not None:
                _add_product(g_h[rows], chunk, weight[columns], first=part == 0)
            if g_weight is not None:
                _add_product(g_weight[columns], chunk.t(), h[rows], first=rows.start == 0)
            if g_bias is not None:
                _add(g_bias[columns], chunk.sum(0, dtype=g_bias.dtype), first=rows.start == 0)
            if by_columns:
                _add(g_log_scale[0, columns], g_scale.sum(0), first=rows.start == 0)
    if by_rows:
        of_rows = (slope.sum(0) * upstream)[:, None]
        g_log_scale.copy_(of_rows if log_scale.shape[0] == count else of_rows.sum(0, keepdim=True))
    return nll.sum(0) if want_nll else None, found


def _is_plain(x: Tensor, others: tuple[Tensor | None, ...], spec: Likelihood) -> bool:
    """Whether the plain objective's pass, which has less to do, is that of the likelihood."""
    gaussian = spec.family == "gaussian" and spec.activation == "identity" and x.dtype != torch.uint8
    return gaussian and all(t is None for t in others)


def _plain(chunk: Tensor, x: Tensor, call: LinearCall, out: DataGradients) -> tuple[Tensor, None]:
    """Sums of rows, (A,), of the plain objective."""
    likelihood = Gaussian(math.exp(call.spec.log_scale), call.spec.full)
    weight = unit_of(call.spec, Unknown(False, False), len(x))
    return call.backend.elbo(chunk, x, None, None, None, 1.0, likelihood, Gradients(out.x_hat, out.x), weight=weight)[1], None


def _general(
    chunk: Tensor,
    x: Tensor,
    log_scale: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor,
    call: LinearCall,
    out: DataGradients,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of rows, (A,) each, of any likelihood, whose operation takes rows (A, B)."""
    tensors = (None if t is None else t.unsqueeze(1) for t in (chunk, x, log_scale, sample_weight, mask))
    out = DataGradients(*(None if t is None else t.unsqueeze(1) for t in out))
    upstream = upstream[:, None] if any(t is not None for t in out) else None
    want_nll, want_slope = wanted
    sums = call.backend.likelihood(*tensors, upstream, call.spec, out, want_nll=want_nll, want_slope=want_slope)
    return tuple(None if t is None else t.squeeze(1) for t in sums)


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(h, weight.t(), out=out)
    else:
        torch.addmm(bias, h, weight.t(), out=out)


def _add_product(into: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``into += a b``, or ``into = a b`` for the first of them. A low precision's products are added in float32."""
    if into.dtype == a.dtype:
        into.addmm_(a, b, beta=0 if first else 1)
    else:
        # Only a GPU's library hands over the sum before it is rounded, and a sum over many rows may be beyond float16.
        if a.is_cuda:
            product = torch.mm(a, b, out_dtype=into.dtype)
        elif a.dtype == torch.float16:
            product = torch.mm(a.to(into.dtype), b.to(into.dtype))
        else:
            product = torch.mm(a, b)
        _add(into, product, first=first)


def _add(into: Tensor, value: Tensor, *, first: bool) -> None:
    into.copy_(value) if first else into.add_(value)


def _part(t: Tensor | None, rows: slice, columns: slice, size: tuple[int, int]) -> Tensor | None:
    if t is None:
        return None
    return t[rows if t.shape[0] > 1 else slice(None), columns if t.shape[1] > 1 else slice(None)].expand(size)


def _blocks(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _row_blocks(x: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x and what is in them, dense. Of a sparse x, in memory that is used again: what was set is set to 0 again."""
    count, features = x.shape
    if 0 in x.shape:
        return
    if x.layout is not torch.sparse_csr:
        for rows in _blocks(count, step):
            yield rows, x[rows]
        return
    starts, columns, values = x.crow_indices(), x.col_indices(), x.values()
    # Where the rows of each block begin, in one reading: on a GPU the only time that the host waits.
    edges = [*starts[::step].tolist(), values.shape[0]]
    memory = torch.zeros(min(step, count), features, dtype=x.dtype, device=x.device)
    flat = memory.view(-1)
    for rows, begin, end in zip(_blocks(count, step), edges, edges[1:], strict=False):
        size = rows.stop - rows.start
        lengths = starts[rows.start + 1 : rows.stop + 1] - starts[rows]
        offsets = torch.arange(0, size * features, features, device=x.device)
        at = torch.repeat_interleave(offsets, lengths, output_size=end - begin).add_(columns[begin:end])
        flat[at] = values[begin:end]
        yield rows, memory[:size]
        flat[at] = 0


def formula(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    log_scale: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    call: LinearCall,
) -> Tensor:
    """What ``LinearNLL`` returns first, of PyTorch's own differentiable operations; x_hat exists there."""
    x = x.to_dense() if x.layout is torch.sparse_csr else x
    x_hat = F.linear(*(None if t is None else t.to(call.dtype) for t in (h, weight, bias)))
    tensors = (None if t is None else t.expand(x.shape)[:, None] for t in (x_hat, x, log_scale, sample_weight, mask))
    nll = reference.likelihood_nll(*tensors, call.spec)[:, 0]
    return nll if call.by_rows else nll.sum()
