"""The general operations of every backend against the reference: any options, shapes, strides and dtypes."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import strategies as st
from tolerances import FLOATS

from fused_elbo import accuracy, ops, reference
from fused_elbo.spec import (
    ACTIVATIONS,
    FAMILIES,
    LAST_LEVEL,
    PARAMS,
    DataGradients,
    Likelihood,
    Noise,
    Posterior,
    PosteriorGradients,
    compute_dtype,
)

pytestmark = pytest.mark.usefixtures("on_device")

SIZES = (1, 2, 3, 4, 5, 8, 13)
MOST_ELEMENTS = 2000
SEED = 77


def chosen(draw, tensor, *, expand=True, holes=True):
    """The tensor in some layout; expanding over a dimension changes its values."""
    layout = draw(st.sampled_from(("plain", "transposed", "sliced", "expanded")))
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and holes:
        wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
        return wide[..., 1::2].copy_(tensor)
    if layout == "expanded" and expand:
        dim = draw(st.integers(0, tensor.dim() - 1))
        return tensor.narrow(dim, 0, 1).expand(tensor.shape)
    return tensor


def buffer(draw, shape, dtype):
    return chosen(draw, torch.empty(shape, dtype=dtype), expand=False)


def wide(t):
    return t if t is None or not t.is_floating_point() else t.double()


def shapes(rows):
    """Shapes with ``rows`` leading dimensions that are small enough."""
    dims = st.lists(st.sampled_from(SIZES), min_size=rows, max_size=rows + 3)
    return dims.filter(lambda shape: math.prod(shape) <= MOST_ELEMENTS)


@st.composite
def likelihood_calls(draw):
    shape = draw(shapes(2))
    family = draw(st.sampled_from(FAMILIES))
    discrete = family == "discretized_logistic"
    dtypes = st.just(draw(st.sampled_from(FLOATS))) if draw(st.booleans()) else st.sampled_from(FLOATS)
    spec = Likelihood(
        family,
        "identity" if family == "bernoulli" else draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from((0.0, -1.5, 0.7))),
        draw(st.booleans()),
        draw(st.sampled_from((1 / LAST_LEVEL, 2 / LAST_LEVEL))),
        draw(st.sampled_from((0.0, -1.0))),
    )
    seed = draw(st.integers(0, 99))
    levels = discrete or draw(st.booleans())
    x = oracle.randn(*shape, seed=seed + 1)
    x = ((x * 60 + 128).clamp(0, LAST_LEVEL).to(torch.uint8)) if levels else x.to(draw(dtypes))
    if levels and discrete:
        x.flatten()[:2] = torch.tensor((0, LAST_LEVEL), dtype=torch.uint8)[: x.numel()]
    tensors = {
        "x_hat": chosen(draw, oracle.randn(*shape, seed=seed).to(draw(dtypes))),
        "x": chosen(draw, x),
        "log_scale": chosen(draw, oracle.randn(*shape, seed=seed + 2, scale=0.3).to(draw(dtypes)))
        if draw(st.booleans())
        else None,
        "weight": chosen(draw, oracle.randn(*shape, seed=seed + 3).abs().to(draw(dtypes))) if draw(st.booleans()) else None,
        "mask": chosen(draw, oracle.randn(*shape, seed=seed + 4) > -0.5) if draw(st.booleans()) else None,
    }
    dtype = compute_dtype(*(t for t in tensors.values() if t is not None and t.is_floating_point()))
    upstream = chosen(draw, oracle.randn(*shape[:2], seed=seed + 5).to(dtype)) if draw(st.booleans()) else None
    out = DataGradients()
    if upstream is not None:
        needs = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
        wanted = (needs[0], needs[1] and not levels, needs[2] and tensors["log_scale"] is not None)
        names = ("x_hat", "x", "log_scale")
        out = DataGradients(
            *(buffer(draw, shape, tensors[n].dtype) if want else None for n, want in zip(names, wanted, strict=True))
        )
    wants = {"want_nll": draw(st.booleans()), "want_slope": tensors["log_scale"] is not None and draw(st.booleans())}
    return tensors, upstream, spec, out, wants


def run_likelihood(module, call, convert=lambda t: t):
    tensors, upstream, spec, out, wants = call
    out = DataGradients(*(None if t is None else torch.empty_like(convert(t)) for t in out)) if module is reference else out
    values = [convert(t) for t in tensors.values()]
    upstream = None if upstream is None else upstream.to(compute_dtype(*(t for t in values if t is not None)))
    sums = module.likelihood(*values, upstream, spec, out, **wants)
    return dict(zip(("nll", "slope", *("g_" + n for n in out._fields)), (*sums, *out), strict=True))


def likelihood_terms(call):
    """Magnitudes of what is added: of a row's sums, and of an element's gradient without its cancellation."""
    tensors, _, spec, _, _ = call
    x_hat, x, log_scale, weight, _ = (wide(t) for t in tensors.values())
    scale = torch.full_like(x_hat, spec.log_scale) if log_scale is None else log_scale
    target = spec.scale * x + spec.shift if x.dtype == torch.uint8 else x
    factor = torch.exp(-scale) if spec.family != "bernoulli" else torch.ones_like(scale)
    size = (x_hat.abs() + target.abs()) * factor
    value = (1 + size * (1 + size) + scale.abs()) * (1 if weight is None else weight)
    rows = value.flatten(2).sum(2) if value.dim() > 2 else value
    return rows, value * factor


def assert_sums_and_elements(ours, exact, eager, rows, elements, upstream=None, note=""):
    for name, value in ours.items():
        assert (value is None) == (exact[name] is None), name
        if value is None:
            continue
        single = elements is None or value.shape == rows.shape
        terms = rows if single else elements
        if upstream is not None and name.startswith("g_"):
            terms = terms * upstream
        ulps = accuracy.SUM_ULPS if value.shape == rows.shape else None
        oracle.assert_envelope(value, exact[name], eager[name], ulps=ulps, terms=terms, what=f"{name} {note}")


def test_likelihood(backend, every):
    module = ops.select(torch.get_default_device())

    @every(likelihood_calls())
    def check(call):
        ours = run_likelihood(module, call)
        exact = run_likelihood(reference, call, wide)
        eager = run_likelihood(reference, call)
        rows, elements = likelihood_terms(call)
        upstream = call[1]
        if upstream is not None:
            upstream = upstream.double().abs().reshape(*upstream.shape, *(1,) * (elements.dim() - 2))
        assert_sums_and_elements(ours, exact, eager, rows, elements, upstream, f"{call[2]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihood_of_what_is_masked_is_nothing(backend, family):
    module = ops.select(torch.get_default_device())
    shape = (3, 2, 37)
    mask = oracle.randn(*shape, seed=1) > 0
    hole = torch.full(shape, torch.nan)
    x_hat, log_scale = (torch.where(mask, oracle.randn(*shape, seed=k), hole) for k in (2, 3))
    x = torch.where(mask, oracle.randn(*shape, seed=4), -hole)
    if family == "discretized_logistic":
        x = (oracle.randn(*shape, seed=4) * 50 + 128).to(torch.uint8)
    upstream = torch.ones(3, 2)
    out = DataGradients(torch.empty(shape), None if x.dtype == torch.uint8 else torch.empty(shape), torch.empty(shape))
    spec = Likelihood(family, scale=1 / LAST_LEVEL)
    nll, slope = module.likelihood(x_hat, x, log_scale, None, mask, upstream, spec, out, want_slope=True)
    zero = torch.zeros(())
    filled = [t if t.dtype == torch.uint8 else torch.where(mask, t, zero) for t in (x_hat, x, log_scale)]
    right = DataGradients(*(None if b is None else torch.empty(shape) for b in out))
    right_nll, right_slope = reference.likelihood(*filled, mask.float(), None, upstream, spec, right, want_slope=True)
    torch.testing.assert_close(nll, right_nll)
    torch.testing.assert_close(slope, right_slope)
    for found, expected in zip(out, right, strict=True):
        if found is not None:
            assert not found[~mask].any()
            torch.testing.assert_close(found[mask], expected[mask])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_likelihood_swallows_nothing(backend, family, value):
    module = ops.select(torch.get_default_device())
    x_hat = oracle.randn(2, 3, 19)
    x_hat[1, 2, 7] = value
    x = (
        torch.full((2, 3, 19), 7, dtype=torch.uint8)
        if family == "discretized_logistic"
        else oracle.randn(2, 3, 19, seed=1).abs()
    )
    nll, _ = module.likelihood(x_hat, x, None, None, None, None, Likelihood(family, scale=1 / LAST_LEVEL), DataGradients())
    exact, _ = reference.likelihood(x_hat, x, None, None, None, None, Likelihood(family, scale=1 / LAST_LEVEL), DataGradients())
    torch.testing.assert_close(nll, exact, equal_nan=True)
    assert nll.isfinite().sum() == exact.isfinite().sum() >= 5


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


def test_operations_repeat_to_the_bit(backend):
    module = ops.select(torch.get_default_device())
    mu, raw = oracle.randn(3, 1500), oracle.randn(3, 1500, seed=1)
    spec, noise = Posterior("softplus", 0.1), Noise(torch.tensor(SEED))
    first, second = (module.posterior(mu, raw, None, None, noise, spec, samples=2, want_log_ratio=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    x_hat = oracle.randn(2, 3, 1500)
    call = (x_hat, x_hat.sigmoid(), None, None, None, None, Likelihood("bernoulli"), DataGradients())
    assert torch.equal(module.likelihood(*call)[0], module.likelihood(*call)[0])
