"""The noise stream: Philox words, float32 uniforms, normals.

Sources: Salmon, Moraes, Dror and Shaw 2011 ("Parallel random numbers: as easy as 1, 2, 3"), section 4.3, for Philox; Box and
Muller 1958 for the normals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Noise, compute_dtype

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LANES = 4

_WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. A word is an int64 tensor with values in [0, 2^32); counter (4 words) and key (2) broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The 64-bit product wraps as two's complement; its two halves are those of the unsigned product.
        product0 = c0 * PHILOX_MULTIPLIERS[0]
        product1 = c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32) & _WORD ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32) & _WORD ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0 = (k0 + PHILOX_KEY_STEPS[0]) & _WORD
        k1 = (k1 + PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def noise_words(seed: Tensor, shape: Sequence[int], *, first_index: int = 0, offset: int = 0) -> Tensor:
    """The Philox words behind ``noise``: int64, shape (S, blocks, 4) for S seeds.

    Each row covers whole blocks, so it starts ``first_index % 4`` elements before the first that was asked for.
    """
    count = math.prod(shape[1:] if seed.dim() else shape)
    blocks = torch.arange(first_index // LANES, -(-(first_index + count) // LANES), device=seed.device)
    # torch.full is filled by the device: torch.tensor would be copied to it, and waited for.
    stream = torch.full((1, 1), (offset + 2**63) % 2**64 - 2**63, device=seed.device)
    words = philox4x32((*_halves(blocks[None]), *_halves(stream)), _halves(seed.reshape(-1, 1)))
    return torch.stack(torch.broadcast_tensors(*words), -1)


def uniforms(words: Tensor) -> Tensor:
    """32-bit words to float32 in (0, 1]: ``u = w 2^-32 + 2^-33``, the conversion and the sum rounded to nearest."""
    return words.to(torch.float32) * 2.0**-32 + 2.0**-33


def noise(
    seed: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    first_index: int = 0,
    offset: int = 0,
) -> Tensor:
    """Standard normals of the library's one stream.

    Args:
        seed: int64 key, shape (), or one per sample, shape (N,): elements are then counted within the sample.
        shape: shape of the result; its elements are numbered in row-major order.
        dtype: dtype of the result, which is computed in float64 from the float32 uniforms.
        first_index: number of the first element, for a shard of a larger tensor.
        offset: 64-bit counter that separates streams of one seed.

    Returns:
        Tensor of ``shape`` on the seed's device.
    """
    u = uniforms(noise_words(seed, shape, first_index=first_index, offset=offset)).double()
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    angle = 2.0 * math.pi * u[..., 1::2]
    normals = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(1)
    count = math.prod(shape[1:] if seed.dim() else shape)
    return normals.narrow(1, first_index % LANES, count).reshape(shape).to(dtype)


def draw(mu: Tensor, noise_: Noise) -> Tensor:
    """The normals for a sample of ``mu``'s shape, in the compute dtype of ``mu``."""
    dtype = compute_dtype(mu)
    if noise_.eps is not None:
        return noise_.eps.to(dtype)
    return noise(noise_.seed, mu.shape, dtype=dtype, first_index=noise_.first_index, offset=noise_.offset)


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    return value & _WORD, (value >> 32) & _WORD
