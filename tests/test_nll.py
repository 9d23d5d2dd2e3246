"""``gaussian_nll``: values and gradients."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from tolerances import FLOATS, compute
from torch.distributions import Normal

import fused_elbo as fe
from fused_elbo.accuracy import SUM_ULPS

SHAPES = ((4, 6), (3, 2, 5, 3), (7, 1), (5,), (1, 1), (2, 1031))
SIGMAS = (1.0, 0.1, math.sqrt(0.5), 3.0)


def data(shape, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(oracle.randn(*shape, seed=s, dtype=dtype, device=device) for s in (1, 2))


def assert_like_the_oracle(inputs, upstream, **options):
    ours, ours_g = oracle.with_gradients(lambda a, b: fe.gaussian_nll(a, b, **options), inputs, (upstream,))
    options = {k: v for k, v in options.items() if k not in ("grad_scale", "inplace")}
    reduction = options.pop("reduction", "mean")

    def formula(a, b):
        return oracle.reduce(oracle.gaussian_nll(a, b, **options), reduction)

    exact, exact_g = oracle.with_gradients(formula, inputs, (upstream.double(),), torch.float64)
    other, other_g = oracle.with_gradients(formula, inputs, (upstream,))
    # ln sigma is negative for sigma < 1: it and the squared error cancel, and so do samples.
    constant = math.prod(inputs[0].shape[1:]) * (abs(math.log(options.get("sigma", 1.0))) + math.log(2 * math.pi))
    terms = torch.full_like(exact[0], constant * (len(inputs[0]) if reduction == "sum" else 1)) + exact[0].abs()
    oracle.assert_envelope(ours[0], exact[0], other[0], ulps=SUM_ULPS, terms=terms, what="nll")
    for name, mine, right, theirs in zip(("x_hat", "x"), ours_g, exact_g, other_g, strict=True):
        oracle.assert_envelope(mine, right, theirs, what=name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_envelope(backend, device, dtype, shape, reduction):
    inputs = data(shape, dtype, device)
    upstream = torch.ones((), device=device) if reduction != "none" else oracle.randn(shape[0], seed=3, device=device)
    assert_like_the_oracle(inputs, upstream, reduction=reduction)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("full", [False, True])
def test_sigma_and_constant(backend, device, dtype, sigma, full):
    assert_like_the_oracle(data((3, 7), dtype, device), torch.ones((), device=device), sigma=sigma, full=full)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"sigma": 0.3, "full": True}, {"grad_scale": 4.0}], ids=str)
def test_gradcheck(backend, device, interpreted, reduction, options):
    inputs = [oracle.leaf(t) for t in data((2, 3), torch.float64, device)]

    def function(a, b):
        return fe.gaussian_nll(a, b, reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=interpreted)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_agrees_with_torch_distributions(backend, device, sigma):
    x_hat, x = data((3, 2, 5), torch.float64, device)
    expected = -Normal(x_hat, sigma).log_prob(x).sum((1, 2))
    found = fe.gaussian_nll(x_hat, x, sigma=sigma, full=True, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_mixed_dtypes(backend, device, dtypes, reduction):
    x_hat = oracle.leaf(oracle.randn(3, 5, seed=1, dtype=dtypes[0], device=device))
    x = oracle.leaf(oracle.randn(3, 5, seed=2, dtype=dtypes[1], device=device))
    nll = fe.gaussian_nll(x_hat, x, sigma=0.5, reduction=reduction)
    assert nll.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    wide = [oracle.leaf(t.double()) for t in (x_hat, x)]
    exact = oracle.reduce(oracle.gaussian_nll(*wide, sigma=0.5), reduction)
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=1e-6)
    found, right = oracle.grads(nll.sum(), [x_hat, x]), oracle.grads(exact.sum(), wide)
    for mine, true, dtype in zip(found, right, dtypes, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), true, rtol=2 * max(torch.finfo(dtype).eps, 1e-7), atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients(backend, device, mode, reduction):
    x_hat, x = (oracle.leaf(t) for t in data((3, 5), torch.float32, device))
    expected = fe.gaussian_nll(x_hat, x, reduction=reduction)
    with mode():
        found = fe.gaussian_nll(x_hat, x, reduction=reduction)
    assert not found.requires_grad
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 4), (0,), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty(backend, device, shape, reduction):
    x_hat, x = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
    nll = fe.gaussian_nll(x_hat, x, sigma=0.5, full=True, reduction=reduction)
    expected = oracle.reduce(torch.zeros(shape[0], device=device), reduction)
    assert torch.equal(nll.nan_to_num(7.0), expected.nan_to_num(7.0))
    for gradient in oracle.grads(nll.sum(), [x_hat, x]):
        assert gradient.shape == shape


@pytest.mark.parametrize("dtype", FLOATS)
def test_huge_values_overflow_to_infinity(backend, device, dtype):
    large = {torch.float64: 1e300, torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 6e4}[dtype]
    x_hat = torch.tensor([[large, 0.0], [1.0, 0.0]], dtype=dtype, device=device, requires_grad=True)
    x = torch.zeros_like(x_hat, requires_grad=True)
    nll = fe.gaussian_nll(x_hat, x, reduction="none")
    assert nll[1] == 0.5
    assert nll[0] == (0.5 * x_hat[0, 0].double() ** 2).to(compute(dtype))
    loss = fe.gaussian_nll(x_hat, x, reduction="sum")
    assert loss == torch.inf or dtype == torch.float16
    g_x_hat, g_x = oracle.grads(loss, [x_hat, x])
    assert torch.equal(g_x_hat, x_hat)
    assert torch.equal(g_x, -x_hat)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_bad_values_stay_in_their_sample(backend, device, bad, where):
    def terms(spoil: bool):
        inputs = data((3, 5), torch.float32, device)
        if spoil:
            inputs[where][1, 2] = bad
        x_hat, x = (oracle.leaf(t) for t in inputs)
        out = fe.elbo_loss(x_hat, x, kl=torch.ones(3, device=device))
        return out, oracle.grads(out.loss, [x_hat, x])

    (good, good_g), (spoiled, spoiled_g) = terms(False), terms(True)
    assert torch.equal(good.nll[[0, 2]], spoiled.nll[[0, 2]])
    others = torch.arange(15, device=device).reshape(3, 5) != 7
    for before, after in zip(good_g, spoiled_g, strict=True):
        assert torch.equal(before[others], after[others])
        assert not after[~others].isfinite().any()
    for value in (spoiled.nll[1], spoiled.loss):
        assert value.isnan() if bad != bad else value == torch.inf
