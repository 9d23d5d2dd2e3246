"""What a backend is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from fused_elbo import ops

LATENT = ("posterior", "posterior_backward", "rsample_kl", "rsample_kl_backward")


def counted(monkeypatch: pytest.MonkeyPatch, device: torch.device, names: tuple[str, ...] = LATENT) -> list[str]:
    """A list to which the device's backend adds the name of each of its operations ``names`` as it is called."""
    backend, made = ops.select(device), []

    def call(name: str, operation: Callable, *args: object, **options: object) -> object:
        made.append(name)
        return operation(*args, **options)

    for name in names:
        monkeypatch.setattr(backend, name, functools.partial(call, name, getattr(backend, name)))
    return made
