"""``fused_elbo.distributions`` for Pyro: ``pyro.sample("z", Normal(loc, scale).to_event(1))``."""

from __future__ import annotations

import torch

from .. import distributions

try:
    from pyro.distributions.torch_distribution import TorchDistributionMixin
except ImportError as error:
    raise ImportError(f"fused_elbo.integrations.pyro takes the package pyro-ppl, which cannot be had: {error}") from error


class _Events(TorchDistributionMixin):
    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Normal | Independent:
        """Pyro's ``to_event``; the result is this module's ``Independent``."""
        found = super().to_event(reinterpreted_batch_ndims)
        if isinstance(found, torch.distributions.Independent):
            return Independent(found.base_dist, found.reinterpreted_batch_ndims)
        return found


class Normal(distributions.Normal, _Events):
    """``fused_elbo.distributions.Normal`` with Pyro's methods."""


class Independent(distributions.Independent, _Events):
    """``fused_elbo.distributions.Independent`` with Pyro's methods."""
