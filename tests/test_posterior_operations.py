"""The general operations of every backend against the reference: any posterior, shapes, strides and dtypes."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from drawn import SEED, buffer, chosen, shapes, wide
from hypothesis import strategies as st
from tolerances import FLOATS

from fused_elbo import accuracy, ops, reference
from fused_elbo.spec import (
    PARAMS,
    Noise,
    Posterior,
    PosteriorGradients,
    compute_dtype,
)

pytestmark = pytest.mark.usefixtures("on_device")


@st.composite
def posterior_calls(draw):
    shape = draw(shapes(1))
    samples = draw(st.sampled_from((1, 2, 3, 5)))
    param = draw(st.sampled_from(PARAMS))
    dtypes = st.just(draw(st.sampled_from(FLOATS))) if draw(st.booleans()) else st.sampled_from(FLOATS)
    bounds = draw(st.sampled_from((None, (0.4, 1.3), (-0.5, 0.5)) if param in ("std", "var") else (None, (-0.5, 0.5))))
    if param in ("std", "var") and bounds is not None:
        bounds = (0.4, 1.3)
    spec = Posterior(
        param,
        draw(st.sampled_from((0.0, 0.1))) if param == "softplus" else 0.0,
        bounds,
        bounds is not None and draw(st.booleans()),
        draw(st.sampled_from((None, None, 0.3))),
        draw(st.sampled_from((1.0, 0.2))),
        draw(st.sampled_from((1.0, 0.8))),
    )
    seed = draw(st.integers(0, 99))

    def raw(number):
        values = oracle.randn(*shape, seed=number)
        return (values.abs() + 0.2 if param in ("std", "var") else values).to(draw(dtypes))

    tensors = {
        "mu": chosen(draw, oracle.randn(*shape, seed=seed).to(draw(dtypes))),
        "raw": chosen(draw, raw(seed + 1)),
        "prior_mean": chosen(draw, oracle.randn(*shape, seed=seed + 2).to(draw(dtypes))) if draw(st.booleans()) else None,
        "prior_raw": chosen(draw, raw(seed + 3)) if draw(st.booleans()) else None,
    }
    dtype = compute_dtype(*tensors.values())
    kind = draw(st.sampled_from(("none", "seed", "seed", "seeds", "eps")))
    noise = None
    if kind == "eps":
        eps = oracle.randn(samples, *shape, seed=seed + 4).to(draw(dtypes))
        noise = Noise(eps=chosen(draw, eps))
        if eps.dtype == torch.float64 and dtype != torch.float64:
            noise = Noise(eps=noise.eps.float())
    elif kind != "none":
        seeds = torch.tensor(SEED + seed) if kind == "seed" else torch.arange(shape[0]) * 7919 + seed
        noise = Noise(seeds, None, draw(st.sampled_from((0, 0, 4, 3, 2**34 + 1))), draw(st.sampled_from((0, 5, 2**63 + 1))))
    options = {
        "samples": samples,
        "want_kl": draw(st.sampled_from(("rows", "elements", None))),
        "want_log_ratio": noise is not None and draw(st.booleans()),
    }
    upstream = {
        "g_z": chosen(draw, oracle.randn(samples, *shape, seed=seed + 5).to(dtype))
        if noise is not None and draw(st.booleans())
        else None,
        "g_kl": chosen(draw, oracle.randn(*shape, seed=seed + 6).to(dtype)) if draw(st.booleans()) else None,
        "g_log_ratio": chosen(draw, oracle.randn(samples, shape[0], seed=seed + 7).to(dtype))
        if options["want_log_ratio"]
        else None,
    }
    upstream["path_weight"] = (
        chosen(draw, oracle.randn(samples, shape[0], seed=seed + 8).abs().to(dtype))
        if upstream["g_log_ratio"] is not None and draw(st.booleans())
        else None
    )
    names = [n for n, t in tensors.items() if t is not None and draw(st.integers(0, 3)) > 0]
    out = PosteriorGradients(*(buffer(draw, shape, t.dtype) if n in names else None for n, t in tensors.items()))
    return tensors, noise, spec, options, upstream, out


def run_posterior(module, call, convert=lambda t: t, eps=None):
    tensors, noise, spec, options, upstream, out = call
    values = [convert(t) for t in tensors.values()]
    dtype = compute_dtype(*values)
    noise = noise if eps is None else Noise(eps=convert(eps))
    z, kl, log_ratio = module.posterior(*values, noise, spec, **options)
    out = (
        PosteriorGradients(*(None if t is None else torch.empty_like(convert(t)) for t in out)) if module is reference else out
    )
    upstream = [None if t is None else t.to(dtype) for t in upstream.values()]
    module.posterior_backward(*upstream, *values, noise, spec, out, samples=options["samples"])
    return {"z": z, "kl": kl, "log_ratio": log_ratio, **{"g_" + n: t for n, t in out._asdict().items()}}


def posterior_magnitudes(call, eps):
    """What is added up in each result, in magnitude: the formulas' terms one by one."""
    tensors, _, spec, options, upstream, _ = call
    mu, raw, prior_mean, prior_raw = (wide(t) for t in tensors.values())
    sigma, logvar = reference.moments(reference.clamped(raw, spec), spec)
    std, prior_logvar = (torch.ones(()), torch.zeros(())) if prior_raw is None else reference.moments(prior_raw.double(), spec)
    rows = (..., *(None,) * (mu.dim() - 1))
    eps = torch.zeros(options["samples"], *mu.shape).double() if eps is None else eps.double().abs()
    mean = torch.zeros(()) if prior_mean is None else prior_mean.abs()
    scatter = (mu.abs() + mean + eps * sigma) / std
    # A rounding of sigma near 1 is worth as much of its logarithm, however small that is.
    squares = scatter**2 + eps**2 + logvar.abs() + prior_logvar.abs() + (spec.param in ("std", "softplus"))
    kl = ((mu.abs() + mean) / std) ** 2 + torch.exp(logvar - prior_logvar) + 1 + logvar.abs() + prior_logvar.abs()
    location, scale, prior_scale = torch.zeros_like(mu), torch.zeros_like(mu), torch.zeros_like(mu)
    if upstream["g_z"] is not None:
        g = upstream["g_z"].double().abs()
        if upstream["path_weight"] is not None:
            g = g * upstream["path_weight"].double()[rows]
        location, scale = location + g.sum(0), scale + (g * eps * sigma).sum(0)
    if upstream["g_log_ratio"] is not None:
        g = upstream["g_log_ratio"].double().abs()[rows]
        path = g * (scatter / std + eps / sigma)
        if upstream["path_weight"] is not None:
            path = path * upstream["path_weight"].double()[rows]
        location = location + torch.maximum(path, g * scatter / std).sum(0)
        scale = scale + (path * eps * sigma + g).sum(0)
        prior_scale = prior_scale + (g * (scatter**2 + 1)).sum(0)
    if upstream["g_kl"] is not None:
        g = upstream["g_kl"].double().abs()
        location, scale, prior_scale = location + g * (mu.abs() + mean) / std**2, scale + g * kl, prior_scale + g * kl

    def slope(std):
        return {"logvar": 1.0, "log_std": 2.0, "softplus": 2 / std, "std": 2 / std, "var": 1 / std**2}[spec.param]

    return {
        "z": mu.abs() + eps * sigma,
        "kl": kl if options["want_kl"] == "elements" or mu.dim() == 1 else kl.flatten(1).sum(1),
        "log_ratio": squares.flatten(2).sum(2) if mu.dim() > 1 else squares,
        "g_mu": location,
        "g_raw": scale * slope(sigma),
        "g_prior_mean": location,
        "g_prior_raw": prior_scale * slope(std),
    }


def test_posterior(backend, every):
    module = ops.select(torch.get_default_device())

    @every(posterior_calls())
    def check(call):
        tensors, noise, spec, options, upstream, _ = call
        eps = None
        if noise is not None:
            # The noise has a bound of its own; what is made of it has to be right to the last digits.
            dtype = compute_dtype(*tensors.values())
            zero = torch.zeros(tensors["mu"].shape, dtype=dtype)
            eps = noise.eps
            if eps is None:
                eps = module.posterior(zero, zero, None, None, noise, Posterior(), samples=options["samples"], want_kl=None)[0]
                exact = reference.draw_samples(zero, noise, options["samples"], torch.float64)
                assert (eps.double() - exact).abs().max() <= accuracy.NOISE[dtype]
        ours = run_posterior(module, call)
        exact = run_posterior(reference, call, wide, eps)
        eager = run_posterior(reference, call, eps=eps)
        magnitudes = posterior_magnitudes(call, eps)
        for name, value in ours.items():
            assert (value is None) == (exact[name] is None), name
            if value is not None:
                # A difference of the prior's and the posterior's parts, each rounded; a row adds them up.
                ulps = accuracy.SUM_ULPS if value.dtype == eager[name].dtype and value.dtype in accuracy.NOISE else None
                what = f"{name} {spec} {options} {[n for n, t in upstream.items() if t is not None]}"
                oracle.assert_envelope(value, exact[name], eager[name], ulps=ulps, terms=magnitudes[name], what=what)


def test_one_plain_sample_is_that_of_the_plain_operation(backend):
    module = ops.select(torch.get_default_device())
    mu, logvar = oracle.randn(5, 37), oracle.randn(5, 37, seed=1)
    for seed in (torch.tensor(SEED), torch.arange(5)):
        noise = Noise(seed, first_index=3, offset=2)
        z, kl = module.rsample_kl(mu, logvar, noise, want_kl=True)
        general, rows, _ = module.posterior(mu, logvar, None, None, noise, Posterior())
        torch.testing.assert_close(general[0], z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rows, kl, rtol=1e-6, atol=0)


@pytest.mark.parametrize("param", PARAMS)
def test_kl_of_an_element_is_accurate_and_never_negative(backend, param):
    module = ops.select(torch.get_default_device())
    near = torch.cat([s * torch.logspace(-6, 0, 40, dtype=torch.float64) for s in (1, -1)])
    logvar = torch.cat((near, torch.linspace(-20, 20, 81, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    std = torch.exp(0.5 * logvar)
    raw = {
        "logvar": logvar,
        "log_std": 0.5 * logvar,
        "std": std,
        "var": std**2,
        "softplus": std + torch.log(-torch.expm1(-std)),
    }[param]
    raw = raw.float()[:, None]
    kl = module.posterior(torch.zeros_like(raw), raw, None, None, None, Posterior(param), want_kl="elements")[1]
    exact = reference.posterior(raw.double() * 0, raw.double(), None, None, None, Posterior(param), want_kl="elements")[1]
    assert (kl >= 0).all()
    if param in ("logvar", "log_std"):
        oracle.assert_relative(kl, exact, accuracy.KL_RELATIVE[torch.float32])
    else:
        # sigma and its logarithm are each rounded: to first order, the slope times that; at the minimum, the second order.
        rounding = 4 * torch.finfo(torch.float32).eps * (1 + logvar[:, None].abs())
        bound = accuracy.KL_RELATIVE[torch.float32] * exact + 0.5 * torch.expm1(logvar[:, None]).abs() * rounding
        error = (kl.double() - exact).abs()
        assert (error <= bound + 0.25 * rounding**2).all(), (error / bound).max()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_posterior_swallows_nothing(backend, where, value):
    module = ops.select(torch.get_default_device())
    tensors = [oracle.randn(3, 7, seed=k) for k in range(4)]
    tensors[where][1, 4] = value
    spec = Posterior(clamp=(-3.0, 3.0), free_bits=0.1)
    _, kl, _ = module.posterior(*tensors, None, spec)
    exact = reference.posterior(*tensors, None, spec)[1]
    torch.testing.assert_close(kl, exact, equal_nan=True)
    # A clamp bounds an infinite parameter of the posterior.
    assert kl[1].isfinite() == exact[1].isfinite()
