"""The latent distribution of the ``diffusers`` package's autoencoders: sample and KL in one pass forward and one backward.

from fused_elbo.integrations import diffusers as fe_diffusers

fe_diffusers.patch()  # from here on encode(x).latent_dist is the distribution below
fe_diffusers.unpatch()

with fe_diffusers.patched():  # the same for a block
    ...
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import functional, sampling
from ..remembered import RememberedKL

# AutoencoderKL has them from latent diffusion (Rombach et al. 2022, arXiv:2112.10752).
LOGVAR_BOUNDS = (-30.0, 20.0)

_NAME = "DiagonalGaussianDistribution"
_DEFINED_IN = "diffusers.models.autoencoders.vae"

_installed: type | None = None


class DiagonalGaussianDistribution:
    """A diagonal Gaussian over packed moments, with the interface of ``diffusers``' class of this name.

    Nothing is computed before it is asked for. The first ``sample`` makes the KL in the same pass and ``kl`` returns it, so a
    training step that calls both, in this order, costs one latent pass forward and one backward.

    Args:
        parameters: (N, 2 C, ...) mean and log-variance side by side on dimension 1; read in place, and their gradient is
            packed too. The log-variance counts as clamped to [-30, 20], with torch.clamp's gradient.
        deterministic: z is the mean, std and var are 0, and kl and nll are ``tensor([0.])``. Default False.

    Attributes:
        compat: whether kl and nll sum over dimensions 1, 2 and 3 alone, as the original does: of the latents of a video,
            (N, C, T, H, W), that leaves one number for each column of pixels, (N, W). Default False: summed over all
            dimensions but the batch's, (N,). Latents of up to four dimensions are the same either way.

    Raises:
        ValueError: the parameters have no dimension 1 of even size.
    """

    compat = False

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(
                f"parameters: got shape {tuple(parameters.shape)}, takes (N, 2 C, ...), mean and log-variance side by side"
            )
        self.parameters = parameters
        self.deterministic = deterministic
        self._remembered: RememberedKL | None = None

    @property
    def mean(self) -> Tensor:
        """(N, C, ...): a view of the parameters."""
        return self.parameters.chunk(2, 1)[0]

    @property
    def logvar(self) -> Tensor:
        """(N, C, ...): the clamped log-variance."""
        return self.parameters.chunk(2, 1)[1].clamp(*LOGVAR_BOUNDS)

    @property
    def std(self) -> Tensor:
        """(N, C, ...)."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """(N, C, ...)."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None, *, eps: Tensor | None = None) -> Tensor:
        """``mean + std * noise``, new noise in each call.

        The noise is this library's stream (``fused_elbo.rsample_kl``), whose seed is drawn from the generator: the same
        generator gives other numbers than the original's ``randn``, in the same distribution.

        Args:
            generator: default torch's own for the device; or a list with one for each sample, whose noise then does not depend
                on its batch; a generator of the CPU serves any device.
            eps: (N, C, ...) explicit noise in place of it. Not part of the original's interface.

        Returns:
            (N, C, ...) with the parameters' dtype.

        Raises:
            ValueError: too few generators, one of another device than the CPU or the parameters', or both arguments given.
        """
        if self.deterministic:
            return self.mean
        source = {"seed": self._seed(generator), "eps": eps}
        if self._remembered is not None:
            return functional.reparameterize(self.parameters, chunk_dim=1, clamp=LOGVAR_BOUNDS, **source)
        z, kl = functional.rsample_kl(
            self.parameters, chunk_dim=1, clamp=LOGVAR_BOUNDS, batch_dims=self._batch_dims(), **source
        )
        self._remembered = RememberedKL(kl, self.parameters)
        return z

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """The KL divergence from N(0, I), or from another diagonal Gaussian, in nats.

        Args:
            other: of the same shape, this class or the original. Default None: N(0, I).

        Returns:
            (N,), or what ``compat`` says; float32, or float64 for float64 parameters.

        Raises:
            ValueError: ``other`` is deterministic.
        """
        if self.deterministic:
            return self._nothing()
        remembered = None
        prior = {}
        if other is not None:
            if other.deterministic:
                raise ValueError(
                    "other: got a deterministic distribution, takes one with a variance: the KL from it is infinite"
                )
            prior = {"prior": (other.mean, other.logvar)}
        elif self._remembered is not None:
            remembered = self._remembered.take(self.parameters)
        if remembered is not None:
            return remembered
        return functional.kl_divergence(
            self.parameters, chunk_dim=1, clamp=LOGVAR_BOUNDS, batch_dims=self._batch_dims(), reduction="none", **prior
        )

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """``-ln N(sample; mean, var)`` in nats, ``ln 2 pi`` included.

        Args:
            sample: (N, C, ...).
            dims: those to sum over. Default None: those of ``kl``.

        Returns:
            The dimensions that were not summed over; float32, or float64 for float64 parameters.
        """
        if self.deterministic:
            return self._nothing()
        count = self.mean.dim()
        summed = set(range(count)) - set(self._batch_dims()) if dims is None else {d % count for d in dims}
        kept = tuple(d for d in range(count) if d == 0 or d not in summed)
        terms = functional.nll(self.mean, sample, log_sigma=0.5 * self.logvar, full=True, reduction="none", batch_dims=kept)
        return terms.sum(0) if 0 in summed else terms

    def _batch_dims(self) -> tuple[int, ...]:
        return (0, *range(4, self.parameters.dim())) if self.compat else (0,)

    def _nothing(self) -> Tensor:
        return torch.zeros(1, device=self.parameters.device)

    def _seed(self, generator: torch.Generator | list[torch.Generator] | None) -> Tensor | None:
        device = self.parameters.device
        if generator is None:
            return None
        if isinstance(generator, list) and len(generator) == 1:
            (generator,) = generator
        if not isinstance(generator, list):
            return _drawn(generator, device)
        count = self.parameters.shape[0]
        if len(generator) < count:
            raise ValueError(f"generator: got a list of {len(generator)}, takes one for each of {count} samples")
        return torch.stack([_drawn(g, device) for g in generator[:count]])


def patch(*, compat: bool = False) -> None:
    """Let every autoencoder of ``diffusers`` make this module's distribution. Where it does already, nothing changes.

    Args:
        compat: sum KL and nll as the original does; see ``DiagonalGaussianDistribution``. Default False.

    Raises:
        ImportError: ``diffusers`` is not installed, or defines no such distribution.
        ValueError: it is patched with another ``compat``.
    """
    chosen = _class_for(compat)
    if _installed not in (None, chosen):
        raise ValueError(f"compat: got {compat} where diffusers is patched with {not compat}, takes unpatch() first")
    _install(chosen)


def unpatch() -> None:
    """Give ``diffusers`` its own distribution back. Where it has it, nothing changes."""
    if _installed is not None:
        _install(None)


@contextlib.contextmanager
def patched(*, compat: bool = False) -> Iterator[None]:
    """``patch`` for a ``with`` block; afterwards everything is as it was before, also where blocks are nested.

    Arguments and errors are those of ``patch``, but that an inner block may choose another ``compat``.
    """
    before = _installed
    _install(_class_for(compat))
    try:
        yield
    finally:
        _install(before)


@functools.cache
def _original() -> type:
    try:
        found = getattr(importlib.import_module(_DEFINED_IN), _NAME)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fused_elbo.integrations.diffusers takes the diffusers package with {_DEFINED_IN}.{_NAME}, which cannot be had: "
            f"{error}; pip install diffusers"
        ) from error
    return found


@functools.cache
def _class_for(compat: bool) -> type:
    """What is put in the original's place, and passes for it in ``isinstance``."""
    return type(_NAME, (DiagonalGaussianDistribution, _original()), {"compat": compat, "__module__": __name__})


def _install(chosen: type | None) -> None:
    """Bind the name in every module of diffusers that has it; what is imported later takes it from its definition."""
    global _installed
    known = {_original(), *(_class_for(compat) for compat in (False, True))}
    for name, module in list(sys.modules.items()):
        # Modules that load lazily import what getattr asks for.
        if name.partition(".")[0] == "diffusers" and vars(module).get(_NAME) in known:
            setattr(module, _NAME, chosen or _original())
    _installed = chosen


def _drawn(generator: torch.Generator, device: torch.device) -> Tensor:
    if generator.device.type != "cpu":
        return sampling.draw_seed(device, generator)
    return sampling.draw_seed(generator.device, generator).to(device)
