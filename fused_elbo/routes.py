"""How an operation is called: by an autograd Function, as an operator, or as a composition of PyTorch's own operations.

A Function costs the least host time, and its loss makes the gradient in the forward pass. Compilers, exporters and tensor
subclasses (fake and distributed tensors) need operators. Function transforms (torch.func) and forward-mode differentiation take
the formulas apart themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import operators, ops, sharding
from .autograd import Posterior, PosteriorCall, apply
from .autograd import likelihood as likelihood_rules
from .autograd import posterior as posterior_rules
from .autograd.common import noise_of
from .spec import Likelihood, signed

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_TRACED = (*_PLAIN, FakeTensor, FunctionalTensor)

# Whether Dynamo may take functions into its graph without a look at their lines: before, they are not told that a compiler
# traces them.
UNREAD = torch.__version__ >= "2.13"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def unread(*names: str) -> Callable[[_Function], _Function]:
    """A decorator: a compiler takes a call without keywords but ``names`` into its graph as it is, and never reads the lines.

    It would guard every default, global and builtin that they read, in each call of what it compiled: some 200 guards, which
    take longer than the formulas of a small batch. So ``call`` itself reads next to nothing.
    """
    known = frozenset(names)

    def decorate(function: _Function) -> _Function:
        # Marks are for good, and calls with other keywords need a function without.
        def whole(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                # This makes a compiler leave the call to eager code, which raises the error itself or can take what a graph
                # cannot (a number of NumPy's).
                if any(isinstance(a, FakeTensor) for a in (*args, *kwargs.values())):
                    raise NotImplementedError(str(error)) from error
                raise

        def taken(*names: str) -> bool:
            if not UNREAD or not known.issuperset(names):
                return False
            torch.compiler.allow_in_graph(whole)
            return True

        # Run when a call of it is traced, in place of being traced: torch.compiler.assume_constant_result, without the second
        # and a half that an import of the compiler takes.
        taken._dynamo_marked_constant = True

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling() and taken(*kwargs):
                return whole(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate


def plainly(*tensors: Tensor | None) -> bool:
    """Whether the autograd Functions may be called."""
    for t in tensors:
        if type(t) not in _PLAIN:
            return False
    return not (is_dynamo_compiling() or _transformed())


def compiled(*tensors: Tensor | None) -> bool:
    """Whether a compiler is tracing plain tensors, outside of transforms."""
    return torch.compiler.is_compiling() and not _transformed() and all(type(t) in _TRACED for t in tensors)


def left_to_compiler(*tensors: Tensor | None) -> bool:
    """Whether a compiler is to have the plain objective's formulas, with the noise alone from an operator.

    On a CPU it writes them into the loops beside them, and an operator's call costs more than they do: see docs/pytorch.md.
    """
    return UNREAD and compiled(*tensors) and tensors[0].device.type == "cpu" and ops.requested() is None


def posterior(
    mu: Tensor,
    raw: Tensor | None,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    seed: Tensor | None,
    eps: Tensor | None,
    call: PosteriorCall,
    shard: Callable | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``z, kl, log_ratio`` as of ``reference.posterior``; ``call`` needs no backend.

    ``shard`` samples the shards of distributed tensors, by default this function.
    """
    tensors = (mu, raw, prior_mean, prior_raw, seed, eps)
    if plainly(*tensors):
        return apply(Posterior, *tensors, call._replace(backend=ops.select(mu.device)))
    if _transformed():
        if call.doubly:
            raise RuntimeError(
                'estimator: got "dreg" under a function transform, takes "iwae" there: it is no function\'s gradient'
            )
        noise = noise_of(seed, eps, call.first_index, call.offset)
        return posterior_rules.formula(mu, raw, prior_mean, prior_raw, noise, call)
    if sharding.involved(*tensors):
        if torch.compiler.is_compiling():
            tensors = sharding.traced(*tensors)
        elif seed is not None:
            return sharding.sampled(*tensors[:5], call, shard or posterior)
        else:
            tensors = sharding.prepared(*tensors)
    chosen = call.spec
    place = (
        call.chunk_dim,
        call.first_index,
        signed(call.offset),
        call.samples,
        call.want_kl,
        call.want_log_ratio,
        call.doubly,
    )
    z, kl, log_ratio = operators.sample(*tensors, *place, *chosen)
    sampled = seed is not None or eps is not None
    return z if sampled else None, kl if call.want_kl else None, log_ratio if call.want_log_ratio else None


def nll(
    x_hat: Tensor, x: Tensor, log_scale: Tensor | None, weight: Tensor | None, mask: Tensor | None, spec: Likelihood
) -> Tensor:
    """``nll`` (A, B) of ``reference.likelihood``, where ``plainly`` says no."""
    if _transformed():
        return likelihood_rules.formula(x_hat, x, log_scale, weight, mask, spec)
    if sharding.involved(x_hat, x, log_scale, weight, mask):
        if torch.compiler.is_compiling():
            sharding.register()
        else:
            x_hat, x, log_scale, weight, mask = sharding.prepared(x_hat, x, log_scale, weight, mask)
    return operators.nll(x_hat, x, log_scale, weight, mask, *spec)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
