"""The forms of ``elbo_loss`` under test and ``gaussian_nll``, their inputs, and their gradients by the oracle."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import torch

import fused_elbo as fe

FORMS = ("classic", "packed", "kl", "nll")
SEED = 12


class LossAlone(NamedTuple):
    loss: torch.Tensor


def inputs_of(form, device, dtype=torch.float32, scale=1.0) -> dict[str, torch.Tensor]:
    shapes = {"x_hat": (3, 2, 5), "x": (3, 2, 5), "mu": (3, 4), "logvar": (3, 4), "kl": (3,)}
    parts = {"classic": ("mu", "logvar"), "packed": ("mu",), "kl": ("kl",), "nll": ()}
    names = ("x_hat", "x", *parts[form])
    made = {n: oracle.randn(*s, seed=i, dtype=dtype, device=device, scale=scale) for i, (n, s) in enumerate(shapes.items())}
    if "kl" in names:
        made["kl"] = made["kl"].abs()
    return {name: made[name] for name in names}


def elbo(form, leaves, **options):
    if form == "nll":
        return LossAlone(fe.gaussian_nll(**leaves, **{n: v for n, v in options.items() if n != "beta"}))
    return fe.elbo_loss(**leaves, **({"chunk_dim": 1} if form == "packed" else {}), **options)


def leaves_of(inputs) -> dict[str, torch.Tensor]:
    return {name: oracle.leaf(t) for name, t in inputs.items()}


def exact_gradients(form, inputs, upstream, **options):
    wide = {name: oracle.leaf(t.double()) for name, t in inputs.items()}
    if form == "nll":
        # A KL of nothing.
        options["kl"] = torch.zeros_like(wide["x"][:, 0, 0])
    loss = oracle.elbo(**wide, **({"chunk_dim": 1} if form == "packed" else {}), **options)[0]
    upstream = torch.as_tensor(upstream, dtype=torch.float64, device=loss.device)
    return oracle.grads(loss, list(wide.values()), upstream.expand(loss.shape))


def assert_close(found, right, dtype=torch.float32):
    bound = 4 * torch.finfo(dtype).eps
    for mine, true in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), true.double(), rtol=bound, atol=bound * max(1.0, true.abs().max().item()) / 4)
