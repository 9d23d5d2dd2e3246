"""``docs/objective.md``: a published loss gives the number and the gradients of the arguments beside it; its code runs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from documents import blocks
from torch.distributions import Laplace

import fused_elbo as fe
from fused_elbo.options import ELBO_NAMES

pytestmark = pytest.mark.usefixtures("on_device")

DOCUMENT = (Path(__file__).parents[1] / "docs/objective.md").read_text()
N, C, H, W, LATENTS, K = 3, 2, 3, 5, 4, 3
SHAPES = {
    "x_hat": (N, C, H, W),
    "x": (N, C, H, W),
    "mu": (N, LATENTS),
    "logvar": (N, LATENTS),
    "raw": (N, LATENTS),
    "pm": (N, LATENTS),
    "pr": (N, LATENTS),
    "ls": (),
    "lc": (C, 1, 1),
    "le": (N, C, H, W),
    "z_hat": (K, N, C, H, W),
    "log_ratio": (K, N),
}


def rows(t):
    return t.flatten(1).sum(1)


def kl(m, s, pm, ps):
    pm, ps = torch.as_tensor(pm, dtype=m.dtype), torch.as_tensor(ps, dtype=m.dtype)
    return torch.log(ps / s) + (s**2 + (m - pm) ** 2) / (2 * ps**2) - 0.5


def pets(v, low, high):
    v = high - F.softplus(high - v)
    return low + F.softplus(v - low)


def logistic_mass(mean, x, log_scale):
    """Of a level on [-1, 1]: what PixelCNN++ takes the logarithm of."""
    upper, lower = (torch.sigmoid((x + sign / 255 - mean) / torch.exp(log_scale)) for sign in (1, -1))
    upper, lower = torch.where(x > 0.999, torch.ones_like(x), upper), torch.where(x < -0.999, torch.zeros_like(x), lower)
    return upper - lower


def lines() -> list[tuple[str, str, str]]:
    found = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([^|]+)` \| `([^|]+)` \|$", DOCUMENT, re.MULTILINE)
    assert len(found) == 24
    return found


def scope(tensors):
    def softclip_nll(log_sigma, least):
        log_sigma = least + F.softplus(log_sigma - least)
        return (0.5 * ((tensors["x"] - tensors["x_hat"]) / log_sigma.exp()) ** 2 + log_sigma).sum() / N

    u = (oracle.randn(N, C, H, W, seed=40) * 90 + 128).clamp(0, 255).to(torch.uint8)
    u[0, 0, 0, :2] = torch.tensor((0, 255))
    names = {"torch": torch, "F": F, "fe": fe, "math": math, "Laplace": Laplace, "rows": rows, "KL": kl, "pets": pets}
    return names | {
        "N": N,
        "D": C * H * W,
        "K": K,
        "u": u,
        "softclip_nll": softclip_nll,
        "logistic_mass": logistic_mass,
        "unit": oracle.randn(N, C, H, W, seed=41, dtype=torch.float64).sigmoid(),
        "mask": oracle.randn(N, C, H, W, seed=42) > 0,
        "w": oracle.randn(N, seed=43, dtype=torch.float64).abs(),
    }


@pytest.mark.parametrize(("name", "published", "ours"), lines(), ids=lambda text: text[:40])
def test_published_loss(backend, name, published, ours):
    values = []
    for expression in (published, ours):
        leaves = {
            key: oracle.leaf(oracle.randn(*shape, seed=k, dtype=torch.float64, scale=0.3 if key in ("ls", "lc", "le") else 1.0))
            for k, (key, shape) in enumerate(SHAPES.items())
        }
        value = eval(expression, scope(leaves), leaves)
        grads = oracle.grads(value, list(leaves.values()), allow_unused=True)
        values.append(
            (value.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True)))
        )
    assert any(g.any() for g in values[0][1:])
    for theirs, mine in zip(*values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_code_runs():
    (block,) = blocks(DOCUMENT)
    namespace: dict[str, object] = {}
    exec(compile(block, "objective.md", "exec"), namespace)
    assert namespace["held_out"].shape == (128,)
    assert all(p.grad is not None for name in ("encoder", "decoder") for p in namespace[name].parameters())


def test_every_option_is_documented():
    for option in ELBO_NAMES:
        assert f"{option}=" in DOCUMENT or f"`{option}`" in DOCUMENT, option
