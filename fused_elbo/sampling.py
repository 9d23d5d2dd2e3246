"""Where the noise of a sample comes from: the arguments ``seed``, ``generator``, ``eps``, ``first_index`` and ``offset``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments

# ``seed, generator, eps, first_index, offset`` as they were given.
Source = tuple[int | Tensor | None, torch.Generator | None, Tensor | None, int, int]
NO_SOURCE: Source = (None, None, None, 0, 0)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """The seed that a sample takes where none is given: one int64 draw, shape (), from a generator of ``device``.

    Raises:
        ValueError: the generator is of another kind of device.
    """
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: got one of device {generator.device}, takes one of {device}")
    return torch.randint(-(2**63), 2**63 - 1, (), device=device, generator=generator)


def noise(
    mu: Tensor,
    mean: Tensor,
    num_samples: int | None,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    eps: Tensor | None,
    first_index: int,
    offset: int,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """``seed, eps, first_index, offset`` as tensors and ints that fit a sample of ``mean``, which is ``mu`` or packed in it."""
    if (seed is not None) + (generator is not None) + (eps is not None) > 1:
        first, second, *_ = (name for name, v in (("seed", seed), ("generator", generator), ("eps", eps)) if v is not None)
        raise ValueError(f"{second}: got it together with {first}, takes at most one of seed, generator and eps")
    # 0, the default, needs no check, which takes longer than to see that.
    if type(first_index) is not int or first_index:
        arguments.index("first_index", first_index, 2**62)
    if type(offset) is not int or offset:
        arguments.index("offset", offset, 2**64)
    if eps is not None:
        if num_samples is None:
            return None, arguments.like("eps", eps, "mu", mean), first_index, offset
        wanted = (num_samples, *mean.shape)
        if arguments.floating("eps", eps).shape != wanted:
            raise ValueError(f"eps: got shape {tuple(eps.shape)}, takes num_samples of mu's, {wanted}")
        arguments.on_device("eps", eps, "mu", mean)
        return None, eps, first_index, offset
    return seed_of(mu, seed, generator), None, first_index, offset


def seed_of(mu: Tensor, seed: int | Tensor | None, generator: torch.Generator | None) -> Tensor:
    if seed is None:
        if generator is None and torch.compiler.is_compiling() and not _mapped():
            # A compiler puts random numbers of its own in torch's place; an operator draws what eager code draws. Two calls
            # with the same arguments it would make one, whatever their tags say: nothing but empty tensors is never the same.
            return torch.ops.fused_elbo.draw_seed.default(torch.empty(0, device=mu.device))
        return draw_seed(mu.device, generator)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: got dtype {seed.dtype}, takes torch.int64")
        if seed.shape not in ((), mu.shape[:1]):
            raise ValueError(f"seed: got shape {tuple(seed.shape)}, takes () or, one per sample, {tuple(mu.shape[:1])}")
        arguments.on_device("seed", seed, "mu", mu)
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: got {seed!r}, takes an int or an int64 tensor")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, takes 64 bits")
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((), signed, dtype=torch.int64, device=mu.device)


def _mapped() -> bool:
    """Whether ``torch.func.vmap`` is active: it gives torch's own draws its ``randomness``, an operator's none."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


# A compiler that traces a call has the transforms active, but cannot look at them.
_mapped._dynamo_marked_constant = True
