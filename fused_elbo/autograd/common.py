"""What the autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from ..spec import Noise

# The vmap of autograd.grad(is_grads_batched=True), which is not torch.func's.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def halves(moments: Tensor | None, logvar: Tensor | None, chunk_dim: int | None) -> tuple[Tensor | None, Tensor | None]:
    """``mu, logvar`` as given, or as views of the two halves of moments that are packed on ``chunk_dim``, which is not 0."""
    return moments.chunk(2, chunk_dim) if chunk_dim and moments is not None else (moments, logvar)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` at a third of its cost, outside of transforms and compilers."""
    # Torch's apply first binds the arguments to forward's signature, for keywords and defaults that no call here has: about
    # 20 us, more than all the rest of a small batch's call. Below is what it does then, where a tensor that outlived its
    # transform stands for what it wraps. Transforms and compilers, which need more of it, are taken another way before.
    args = [unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]
    return super(torch.autograd.Function, function).apply(*args)


def noise_of(seed: Tensor | None, eps: Tensor | None, first_index: int, offset: int) -> Noise | None:
    return None if seed is None and eps is None else Noise(seed, eps, first_index, offset)


def rows_of(g_loss: Tensor | None, weight: float | None, g_term: Tensor | None, count: int) -> tuple[Tensor | None, float]:
    """The upstream gradient of one per-sample term, (N,), and a factor that it still needs. ``weight`` is that of ``ELBO``."""
    weight = 1.0 if weight is None else weight
    if g_loss is None:
        return g_term, 1.0
    if g_term is None:
        return g_loss.expand(count), weight
    return g_loss * weight + g_term, 1.0


def rescaled(gradients: Sequence[Tensor], upstream: Tensor, expected: float | Tensor, backend: ModuleType) -> Sequence[Tensor]:
    """Gradients that were computed for the upstream gradient ``expected``, for that which came."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        factor = upstream / expected
        return [g * factor for g in gradients]
    backend.rescale_(gradients, upstream, expected)
    return gradients


def underflow(gradients: Sequence[Tensor]) -> bool:
    """Whether what was computed for one upstream gradient may be too small to be scaled for another."""
    return torch.float16 in [g.dtype for g in gradients]


def placed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Those that there are, each in the place of what needed it."""
    rest = iter(gradients)
    return [next(rest, None) if needed else None for needed in needs]


def composed() -> bool:
    """Whether a backward has to be a composition of PyTorch's own operations: to be differentiated, or under a transform."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
    )


def differentiable(
    formula: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Any], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``formula(*inputs)`` that are part of the graph, None for inputs that need none."""
    with torch.enable_grad():
        # One input may have been computed from another (x_hat from mu); an alias has no such past.
        inputs = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in inputs]
        wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        pairs = [(o, g) for o, g in zip(formula(*inputs), upstream, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in inputs]
