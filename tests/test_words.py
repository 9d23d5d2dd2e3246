"""The words and uniforms of the Triton kernels are those of the reference, to the bit."""

from __future__ import annotations

import pytest
import torch

import fused_elbo as fe
from fused_elbo import ops, reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

arithmetic = pytest.importorskip("fused_elbo.backends.triton.arithmetic")
philox4x32, uniform = arithmetic.philox4x32, arithmetic.uniform

COUNT = 1024
KNOWN = (
    ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@triton.jit
def words_kernel(inputs, words, uniforms, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    c0 = tl.load(inputs + i).to(tl.uint32)
    c1 = tl.load(inputs + COUNT + i).to(tl.uint32)
    c2 = tl.load(inputs + 2 * COUNT + i).to(tl.uint32)
    c3 = tl.load(inputs + 3 * COUNT + i).to(tl.uint32)
    k0 = tl.load(inputs + 4 * COUNT + i).to(tl.uint32)
    k1 = tl.load(inputs + 5 * COUNT + i).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(words + i, w0.to(tl.int64))
    tl.store(words + COUNT + i, w1.to(tl.int64))
    tl.store(words + 2 * COUNT + i, w2.to(tl.int64))
    tl.store(words + 3 * COUNT + i, w3.to(tl.int64))
    tl.store(uniforms + i, uniform(w0))
    tl.store(uniforms + COUNT + i, uniform(w1))
    tl.store(uniforms + 2 * COUNT + i, uniform(w2))
    tl.store(uniforms + 3 * COUNT + i, uniform(w3))


def test_words_and_uniforms(device):
    reason = ops.unavailable("triton", device.type)
    if reason is not None:
        pytest.skip(reason)
    inputs = torch.randint(0, 2**32, (6, COUNT), generator=torch.Generator().manual_seed(0))
    for column, (given, _) in enumerate(KNOWN):
        inputs[:, column] = torch.tensor(given)
    inputs = inputs.to(device)
    words = torch.empty(4, COUNT, dtype=torch.int64, device=device)
    uniforms = torch.empty(4, COUNT, dtype=torch.float32, device=device)
    words_kernel[(1,)](inputs, words, uniforms, COUNT=COUNT)
    for column, (_, expected) in enumerate(KNOWN):
        assert tuple(words[:, column].tolist()) == expected
    assert torch.equal(words, torch.stack(reference.philox4x32(inputs[:4], inputs[4:])))
    assert torch.equal(uniforms, reference.uniforms(words))


def test_the_kernels_use_the_same_words(backend, device):
    """Far fewer bits than a word would show in float64: a normal tells its two uniforms to 1e-15."""
    zero = torch.zeros(16, 64, dtype=torch.float64, device=device)
    z = fe.reparameterize(zero, zero, seed=2**63 + 5, first_index=2**35, offset=2**33 + 1)
    seed = torch.tensor(-(2**63) + 5, device=device)
    exact = reference.noise(seed, zero.shape, dtype=torch.float64, first_index=2**35, offset=2**33 + 1)
    torch.testing.assert_close(z, exact, rtol=0, atol=1e-13)
