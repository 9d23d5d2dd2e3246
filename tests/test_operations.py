"""The general operations of every backend against the reference: any likelihood, shapes, strides and dtypes."""

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
    ACTIVATIONS,
    FAMILIES,
    LAST_LEVEL,
    DataGradients,
    Likelihood,
    Noise,
    Posterior,
    compute_dtype,
)

pytestmark = pytest.mark.usefixtures("on_device")


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
