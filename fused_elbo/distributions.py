"""``torch.distributions`` with this library's passes: a diagonal normal that is sampled, and its KL summed, in one.

    from fused_elbo.distributions import Independent, Normal, kl_divergence

in place of the same names of ``torch.distributions``, which these classes extend: shapes, validation and every method that is
not below are torch's. Formulas and noise are those of ``fused_elbo.rsample_kl``; the same seed of torch's generator gives other
samples than torch's own classes do, in the same distribution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, register_kl

from . import functional
from .arguments import LEAST_SIGMA
from .remembered import RememberedKL, Unchanged


class Normal(torch.distributions.Normal):
    """``torch.distributions.Normal``: ``rsample`` never stores its noise, ``kl_divergence`` is one pass each way.

    ``log_prob`` is torch's own; see ``Independent`` for its sum. With ``Normal(0.0, 1.0)``, of Python numbers, as the prior the
    KL reads no prior from memory.
    """

    def __init__(self, loc: float | Tensor, scale: float | Tensor, validate_args: bool | None = None) -> None:
        # Values are not there when a compiler traces.
        super().__init__(loc, scale, validate_args=False if torch.compiler.is_compiling() else validate_args)
        self._given_scale = scale
        self._standard = not isinstance(loc, Tensor) and not isinstance(scale, Tensor) and loc == 0 and scale == 1
        self._given = Unchanged(self.loc, self.scale)

    def expand(self, batch_shape: torch.Size, _instance: Normal | None = None) -> Normal:
        new = self._get_checked_instance(Normal, _instance)
        as_given = self._as_given()
        new._given_scale, new._standard = self._given_scale if as_given else self.scale, self._standard and as_given
        super().expand(batch_shape, _instance=new)
        new._given = Unchanged(new.loc, new.scale)
        return new

    def _as_given(self) -> bool:
        """Whether nobody has changed or replaced the parameters since."""
        return self._given.are(self.loc, self.scale)

    def rsample(
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``loc + scale * noise`` of shape ``sample_shape + batch_shape``, with a gradient for both.

        Args:
            sample_shape: default (): one sample.
            seed, generator: as for ``fused_elbo.rsample_kl``. Default torch's own generator.
        """
        shape = self._extended_shape(sample_shape)
        count = math.prod(sample_shape)
        if count == 0:
            return (self.loc + self.scale).expand(shape)
        options = {"num_samples": count} if len(sample_shape) else {}
        loc, scale = _parameters(self, 0)
        z = functional.reparameterize(loc, scale, param="std", seed=seed, generator=generator, **options)
        return z.reshape(shape)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = (), **source: Any) -> Tensor:
        """``rsample`` without gradients; the same arguments."""
        with torch.no_grad():
            return self.rsample(sample_shape, **source)


class Independent(torch.distributions.Independent):
    """``torch.distributions.Independent`` of a ``Normal``: what it sums is summed in the pass that makes it.

    * ``rsample()`` makes the KL from the standard normal along, and ``kl_divergence(q, Independent(Normal(0.0, 1.0), n))``
      returns it (the prior expanded to q's shape): together one pass forward and one backward. Any other normal prior takes a
      pass of its own.
    * ``log_prob`` is one pass where the scale is one number, or a tensor of one element, which may be learned. With a scale for
      each element it is torch's own.

    KL and fused ``log_prob`` are float32 in half precision, float64 in double. Over any other base distribution this is torch's
    class.
    """

    _remembered: RememberedKL | None = None

    def expand(self, batch_shape: torch.Size, _instance: Independent | None = None) -> Independent:
        return super().expand(batch_shape, _instance=self._get_checked_instance(Independent, _instance))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = (), **source: Any) -> Tensor:
        """As of the base distribution; the same arguments."""
        base = self.base_dist
        if not isinstance(base, Normal) or len(sample_shape):
            return base.rsample(sample_shape, **source)
        loc, scale = _parameters(base, self.reinterpreted_batch_ndims)
        dims = _batch_dims(loc, self.reinterpreted_batch_ndims)
        z, kl = functional.rsample_kl(loc, scale, param="std", batch_dims=dims, **source)
        self._remembered = RememberedKL(kl.reshape(self.batch_shape), base.loc, base.scale)
        return z.reshape(base.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        base, count = self.base_dist, self.reinterpreted_batch_ndims
        scale = _one_scale(base)
        if scale is None or not count or not value.is_floating_point():
            return super().log_prob(value)
        if base._validate_args:
            base._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, base.batch_shape)
        x_hat, x = (_led(t.expand(shape), count) for t in (base.loc, value))
        dims = _batch_dims(x_hat, count)
        options = {} if dims == (0,) else {"batch_dims": dims}
        options |= {"log_sigma": scale.reshape(()).log()} if isinstance(scale, Tensor) else {"sigma": float(scale)}
        terms = functional.gaussian_nll(x_hat, x, full=True, reduction="none", **options)
        return -terms.reshape(shape[: len(shape) - count])


def kl_divergence(p: Distribution, q: Distribution) -> Tensor:
    """``torch.distributions.kl_divergence``, which finds this module's classes too; for them, here a compiler can follow it.

    Returns:
        The KL divergence in nats, of p's and q's common batch shape.
    """
    if isinstance(p, (Normal, Independent)) or isinstance(q, (Normal, Independent)):
        if isinstance(p, torch.distributions.Normal) and isinstance(q, torch.distributions.Normal):
            return _kl_normal(p, q)
        if isinstance(p, torch.distributions.Independent) and isinstance(q, torch.distributions.Independent):
            return _kl_independent(p, q)
    return torch.distributions.kl_divergence(p, q)


@register_kl(Normal, Normal)
@register_kl(Normal, torch.distributions.Normal)
@register_kl(torch.distributions.Normal, Normal)
def _kl_normal(p: torch.distributions.Normal, q: torch.distributions.Normal) -> Tensor:
    return _kl(p, q, 0)


@register_kl(Independent, Independent)
@register_kl(Independent, torch.distributions.Independent)
@register_kl(torch.distributions.Independent, Independent)
def _kl_independent(p: torch.distributions.Independent, q: torch.distributions.Independent) -> Tensor:
    counts = p.reinterpreted_batch_ndims, q.reinterpreted_batch_ndims
    normal = all(isinstance(d.base_dist, torch.distributions.Normal) for d in (p, q))
    if not normal or counts[0] != counts[1]:
        p, q = (torch.distributions.Independent(d.base_dist, n) for d, n in zip((p, q), counts, strict=True))
        return torch.distributions.kl_divergence(p, q)
    remembered = None
    if isinstance(p, Independent) and p._remembered is not None and _standard(q.base_dist) and p.batch_shape == q.batch_shape:
        remembered = p._remembered.take(p.base_dist.loc, p.base_dist.scale)
    return _kl(p.base_dist, q.base_dist, counts[0]) if remembered is None else remembered


def _kl(p: torch.distributions.Normal, q: torch.distributions.Normal, count: int) -> Tensor:
    """Summed over the last ``count`` dimensions."""
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    (loc, scale), prior = (_parameters(d.expand(shape), count) for d in (p, q))
    options = {} if _standard(q) else {"prior": prior}
    dims = _batch_dims(loc, count)
    kl = functional.kl_divergence(loc, scale, param="std", batch_dims=dims, reduction="none", **options)
    return kl.reshape(shape[: len(shape) - count])


def _standard(q: torch.distributions.Normal) -> bool:
    """Whether q is known to be N(0, 1) without a look at its values."""
    return isinstance(q, Normal) and q._standard and q._as_given()


def _one_scale(base: Distribution) -> float | Tensor | None:
    """The scale of a ``Normal`` where it is one number for all elements, as it was given."""
    if not isinstance(base, Normal) or not base._as_given():
        return None
    scale = base._given_scale
    one = scale.numel() == 1 if isinstance(scale, Tensor) else LEAST_SIGMA <= scale < math.inf
    return scale if one else None


def _parameters(base: torch.distributions.Normal, count: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of one dtype, with at least one dimension before the last ``count``."""
    dtype = torch.promote_types(base.loc.dtype, base.scale.dtype)
    return _led(base.loc.to(dtype), count), _led(base.scale.to(dtype), count)


def _led(t: Tensor, count: int) -> Tensor:
    return t if t.dim() > count else t[None]


def _batch_dims(t: Tensor, count: int) -> tuple[int, ...]:
    return tuple(range(t.dim() - count))
