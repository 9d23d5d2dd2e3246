"""A KL that came along with a sample, kept until it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


class Unchanged:
    """``tensors`` as they are now, to be told from others and from what they may be changed to."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._versions = _versions(tensors)

    def are(self, *tensors: Tensor) -> bool:
        """Whether ``tensors`` are the same ones, with the same values."""
        same = all(a is b for a, b in zip(self._tensors, tensors, strict=True))
        return same and _versions(tensors) == self._versions


class RememberedKL:
    """``kl`` of a pass over ``tensors``, for whoever asks for it after the sample.

    Sample and KL of one pass have one backward. What was remembered is given out only where that changes nothing but the
    cost: once, for the same tensors, unchanged, and as long as the pass's graph was not freed by a backward in between.
    """

    def __init__(self, kl: Tensor, *tensors: Tensor) -> None:
        self._kl: Tensor | None = kl
        self._made_of = Unchanged(*tensors)

    def __reduce__(self) -> tuple:
        # A copy's tensors are others, and a graph cannot be copied: there None is remembered.
        return type(None), ()

    def take(self, *tensors: Tensor) -> Tensor | None:
        """The KL of ``tensors``, or None where it has to be computed anew."""
        kl = self._kl
        if kl is None or not self._made_of.are(*tensors) or _unusable(kl):
            return None
        if not torch.is_grad_enabled():
            return kl.detach()
        self._kl = None
        if kl.requires_grad:
            return None if _freed(kl) else kl
        return None if any(t.requires_grad for t in tensors) else kl


def _versions(tensors: tuple[Tensor, ...]) -> list[int]:
    # Inference tensors have no version; and a compiler sees to it that nothing changes behind its back.
    return [0 if torch.compiler.is_compiling() or t.is_inference() else t._version for t in tensors]


def _unusable(kl: Tensor) -> bool:
    """Whether autograd refuses ``kl``, since it was made in inference mode, which is over."""
    return not torch.compiler.is_compiling() and kl.is_inference() and not torch.is_inference_mode_enabled()


def _freed(kl: Tensor) -> bool:
    """Whether a backward has already gone through the pass that made ``kl``."""
    if torch.compiler.is_compiling():
        return False
    node = kl.grad_fn
    while not isinstance(node, BackwardCFunction):
        if not node.next_functions:
            return False
        node = node.next_functions[0][0]
    try:
        return node.saved_tensors is None
    except RuntimeError:
        return True
