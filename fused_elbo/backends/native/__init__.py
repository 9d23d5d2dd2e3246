"""The native backend: C++ on a CPU, CUDA C++ on a GPU, from the libraries that ``csrc/build.py`` makes.

A library is loaded when its device is first asked for. The operations have no fake implementations, so a compiler breaks its
graph at each; to keep it out by a decorator would take a tenth of the time of a call.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ... import reference
from ...spec import (
    ACTIVATIONS,
    FAMILIES,
    PARAMS,
    DataGradients,
    Gaussian,
    Gradients,
    Likelihood,
    Noise,
    Posterior,
    PosteriorGradients,
    compute_dtype,
    elements_per_sample,
    signed,
)
from . import library, tools

# The arguments of a CUDA kernel have room for no more.
MOST_CUDA_DIMS = 8

PROCESSOR_VARIABLE = "FUSED_ELBO_CPU"

for _schema in library.SCHEMAS:
    _name = _schema.partition("(")[0]
    # What is defined outlives this module, and a second import finds it.
    if not hasattr(torch.ops.fused_elbo, _name):
        torch.library.define(f"fused_elbo::{_name}", _schema.removeprefix(_name))

_rsample_kl = torch.ops.fused_elbo.rsample_kl.default
_rsample_kl_backward = torch.ops.fused_elbo.rsample_kl_backward.default
_elbo = torch.ops.fused_elbo.elbo.default
_gaussian_nll_backward = torch.ops.fused_elbo.gaussian_nll_backward.default
_rescale = torch.ops.fused_elbo.rescale_.default
_likelihood = torch.ops.fused_elbo.likelihood.default
_posterior = torch.ops.fused_elbo.posterior.default
_posterior_backward = torch.ops.fused_elbo.posterior_backward.default


def unavailable(device_type: str) -> str | None:
    """Why the library for ``device_type`` cannot be used, in one line; None if it is loaded."""
    if device_type not in _reasons:
        _reasons[device_type] = _load(device_type)
    return _reasons[device_type]


def capability() -> str | None:
    """The instruction set that the CPU library uses ("avx512", "avx2", "portable"); None where it is not loaded."""
    return None if unavailable("cpu") else _ask("fused_elbo_capability")


def supported() -> list[str]:
    """The instruction sets that this processor has, best first; none where the CPU library is not loaded."""
    return [] if unavailable("cpu") else _ask("fused_elbo_supported").split()


def remedy(device_type: str) -> str:
    """How to get the library for ``device_type`` here."""
    try:
        tools.cxx()
        if device_type == "cuda":
            tools.nvcc()
    except tools.MissingTool as error:
        return f"{error}; then run `make build`, or `pip install .` again"
    return "run `make build`, or `pip install .` again"


def rsample_kl(mu: Tensor, logvar: Tensor, noise: Noise | None, *, want_kl: bool) -> tuple[Tensor | None, Tensor | None]:
    if _outside(mu):
        return reference.rsample_kl(mu, logvar, noise, want_kl=want_kl)
    if noise is None:
        return None, _rsample_kl(mu, logvar, None, None, 0, 0, None, want_kl) if want_kl else None
    seed, eps, first_index, offset = noise
    z = torch.empty_like(mu)
    return z, _rsample_kl(mu, logvar, seed, eps, first_index, signed(offset), z, want_kl)


def rsample_kl_backward(
    g_z: Tensor | None, g_kl: Tensor | None, mu: Tensor, logvar: Tensor, noise: Noise | None, out: Gradients
) -> None:
    if _outside(mu):
        return reference.rsample_kl_backward(g_z, g_kl, mu, logvar, noise, out)
    seed, eps, first_index, offset = noise or _NO_NOISE
    return _rsample_kl_backward(g_z, g_kl, mu, logvar, seed, eps, first_index, signed(offset), out.mu, out.logvar)


def elbo(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    beta: float | Tensor,
    likelihood: Gaussian,
    out: Gradients,
    *,
    weight: float | None,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    if _outside(x_hat) or (mu is not None and _outside(mu)):
        return reference.elbo(x_hat, x, mu, logvar, kl, beta, likelihood, out, weight=weight, grad_scale=grad_scale)
    beta, beta_tensor = (0.0, beta) if isinstance(beta, Tensor) else (beta, None)
    grad_scale, grad_scale_tensor = (0.0, grad_scale) if isinstance(grad_scale, Tensor) else (grad_scale, None)
    precision, constant = 1.0, 0.0
    if likelihood != _UNIT:
        precision, constant = likelihood.precision, elements_per_sample(x_hat) * likelihood.log_normaliser
    loss, nll, kl_out = _elbo(
        x_hat, x, mu, logvar, kl, beta, beta_tensor, grad_scale, grad_scale_tensor, weight, precision, constant, *out
    )
    return loss, nll, kl if mu is None else kl_out


def gaussian_nll_backward(
    g_nll: Tensor,
    x_hat: Tensor,
    x: Tensor,
    likelihood: Gaussian,
    out: Gradients,
    *,
    weight: float = 1.0,
    expected: float | Tensor | None = None,
) -> None:
    if _outside(x_hat):
        return reference.gaussian_nll_backward(g_nll, x_hat, x, likelihood, out, weight=weight)
    expected, expected_tensor = (None, expected) if isinstance(expected, Tensor) else (expected, None)
    return _gaussian_nll_backward(g_nll, x_hat, x, weight * likelihood.precision, expected, expected_tensor, out.x_hat, out.x)


def rescale_(gradients: Sequence[Tensor], upstream: Tensor, expected: float | Tensor) -> None:
    if type(upstream) not in _PLAIN:
        return reference.rescale_(gradients, upstream, expected)
    # On a CPU a look at the value costs less than the call.
    if not isinstance(expected, Tensor) and upstream.is_cpu and upstream.item() == expected:
        return None
    expected, expected_tensor = (0.0, expected) if isinstance(expected, Tensor) else (expected, None)
    return _rescale([g for g in gradients if g.numel()], upstream, expected, expected_tensor)


def likelihood(
    x_hat: Tensor,
    x: Tensor,
    log_scale: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor | None,
    spec: Likelihood,
    out: DataGradients,
    *,
    want_nll: bool = True,
    want_slope: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    if _outside(x_hat):
        return reference.likelihood(
            x_hat, x, log_scale, weight, mask, upstream, spec, out, want_nll=want_nll, want_slope=want_slope
        )
    terms = {"dtype": compute_dtype(x_hat, x, log_scale, weight), "device": x_hat.device}
    nll, slope = (torch.empty(x_hat.shape[:2], **terms) if wanted else None for wanted in (want_nll, want_slope))
    numbers = (FAMILIES.index(spec.family), ACTIVATIONS.index(spec.activation), spec.log_scale, spec.constant)
    _likelihood(x_hat, x, log_scale, weight, mask, upstream, *numbers, spec.scale, spec.shift, nll, slope, *out)
    return nll, slope


def posterior(
    mu: Tensor,
    raw: Tensor,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    noise: Noise | None,
    spec: Posterior,
    *,
    samples: int = 1,
    want_kl: str | None = "rows",
    want_log_ratio: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if _outside(mu):
        return reference.posterior(
            mu, raw, prior_mean, prior_raw, noise, spec, samples=samples, want_kl=want_kl, want_log_ratio=want_log_ratio
        )
    seed, eps, first_index, offset = noise or _NO_NOISE
    terms = {"dtype": compute_dtype(mu, raw, prior_mean, prior_raw), "device": mu.device}
    z = None if noise is None else reference.empty_samples(mu, samples)
    rows = torch.empty(mu.shape[:1], **terms) if want_kl == "rows" else None
    elements = torch.empty_like(mu, **terms) if want_kl == "elements" else None
    log_ratio = torch.empty((samples, mu.shape[0]), **terms) if want_log_ratio and noise is not None else None
    _posterior(
        mu, raw, prior_mean, prior_raw, seed, eps, first_index, signed(offset), *_raw(spec), spec.free_bits,
        z, rows, elements, log_ratio,
    )  # fmt: skip
    return z, elements if rows is None else rows, log_ratio


def posterior_backward(
    g_z: Tensor | None,
    g_kl: Tensor | None,
    g_log_ratio: Tensor | None,
    path_weight: Tensor | None,
    mu: Tensor,
    raw: Tensor,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    noise: Noise | None,
    spec: Posterior,
    out: PosteriorGradients,
    *,
    samples: int = 1,
) -> None:
    upstream, tensors = (g_z, g_kl, g_log_ratio, path_weight), (mu, raw, prior_mean, prior_raw)
    if _outside(mu):
        return reference.posterior_backward(*upstream, *tensors, noise, spec, out, samples=samples)
    seed, eps, first_index, offset = noise or _NO_NOISE
    shares = (spec.posterior_share, spec.prior_share)
    return _posterior_backward(
        *upstream, *tensors, seed, eps, first_index, signed(offset), samples, *_raw(spec), spec.free_bits, *shares, *out
    )


def _raw(spec: Posterior) -> tuple[int, float, int, float, float]:
    """How the raw parameter is to be read, in numbers."""
    kind = 0 if spec.clamp is None else 2 if spec.soft else 1
    return PARAMS.index(spec.param), spec.min_std, kind, *(spec.clamp or (0.0, 0.0))


_NO_NOISE = Noise()
_PLAIN = (Tensor, torch.nn.Parameter)
_UNIT = Gaussian()

# A dictionary, since a compiler that traces a call does not see what functools.cache remembers.
_reasons: dict[str, str | None] = {}


def _outside(t: Tensor) -> bool:
    """Whether the reference takes the call: a tensor of no memory (one that a compiler traces with, say), nothing to do, or
    more dimensions than a kernel takes."""
    return type(t) not in _PLAIN or t.numel() == 0 or (t.dim() > MOST_CUDA_DIMS and not t.is_cpu)


def _load(device_type: str) -> str | None:
    if device_type not in library.LIBRARIES:
        return f"there is no library for {device_type!r}"
    if device_type == "cuda":
        if torch.version.hip:
            return "the kernels are CUDA's, which an AMD GPU does not run"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a build without CUDA"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    if tuple(map(int, torch.__version__.split(".")[:2])) < library.TORCH_TARGET:
        return f"torch {torch.__version__} is older than {library.version(library.TORCH_TARGET)}"
    path = library.location(device_type)
    reason = library.problem(path) if path.exists() else f"there is no {path}"
    if reason is not None:
        return f"{reason}: {remedy(device_type)}"
    if library.read_manifest(path).get("sanitize") and "asan" not in os.environ.get("LD_PRELOAD", ""):
        # Without its runtime a sanitizer ends the process.
        return f"{path} was built with sanitizers, which have to be loaded first: `make sanitize` does"
    try:
        reason = _cuda_problem(path) if device_type == "cuda" else None
        if reason is not None:
            return reason
        _open(path)
        if device_type == "cpu" and _ask("fused_elbo_capability") is None:
            asked = os.environ.get(PROCESSOR_VARIABLE)
            return f"{PROCESSOR_VARIABLE}={asked} is none of what this processor has: {_ask('fused_elbo_supported')}"
    except (OSError, AttributeError, LookupError, ValueError) as error:
        return f"{path} does not load ({' '.join(str(error).split())}): {remedy(device_type)}"
    return None


def _cuda_problem(path: Path) -> str | None:
    """What would show only when a kernel is launched: a driver or GPUs that are too old."""
    manifest = library.read_manifest(path)
    gpus = [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))]
    oldest = min(int(code.partition("_")[2]) for code in manifest["architectures"])
    if max(gpus) < oldest:
        return f"{path} is for GPUs from sm_{oldest} on, here is sm_{max(gpus)}"
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    driver = (version.value // 1000, version.value % 1000 // 10)
    built_with = tuple(map(int, manifest["cuda"].split(".")))
    # Within a major version a library runs with every driver.
    if driver[0] < built_with[0]:
        return f"{path} was built with CUDA {library.version(built_with)}, the driver's is {library.version(driver)}: update it"
    return None


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _ask(function: str) -> str | None:
    """What a function of the CPU library answers."""
    call = getattr(_open(library.location("cpu")), function)
    call.restype = ctypes.c_char_p
    answer = call()
    return None if answer is None else answer.decode()
