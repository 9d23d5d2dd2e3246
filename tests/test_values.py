"""Values that are known without a second implementation, and the accuracy of the hard ones."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from tolerances import LOW, compute

import fused_elbo as fe
from fused_elbo.accuracy import KL_RELATIVE, SUM_RELATIVE


def column(values, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1).to(dtype).to(device)


def kl_per_sample(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    return fe.kl_divergence(mu, logvar, reduction="none")


def around(values, distance=2.0**-20) -> list[float]:
    return [v * (1 + k * distance) for v in values for k in (-3, -2, -1, 0, 1, 2, 3)]


def logvar_grid(dense: int) -> list[float]:
    grid = torch.linspace(-80, 80, dense, dtype=torch.float64).tolist()
    grid += torch.linspace(-4, 4, dense, dtype=torch.float64).tolist()
    # Where range reductions and the series change over, and the multiples of ln 2 and ln 2 / 2.
    joints = [1.0, math.log(2), math.log(4), 0.5 * math.log(2), 4 * math.log(2), 0.25, 0.5, 2.0, 0.125, 1 / 3]
    grid += [s * v for v in around(joints) + around(joints, 2.0**-12) for s in (1, -1)]
    grid += [s * 10.0**e for e in torch.linspace(-12, 0, 97).tolist() for s in (1, -1)]
    return grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_textbook_kl(backend, device, dtype):
    assert kl_per_sample(column([1.0], dtype, device), column([0.0], dtype, device)).item() == 0.5
    mu = torch.tensor([[1.0, 0.0]], dtype=dtype, device=device)
    logvar = torch.tensor([[0.5, 2.0]], dtype=torch.float64, device=device).log().to(dtype)
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-7}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert kl_per_sample(mu, logvar).item() == pytest.approx(0.75, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_kl_is_zero_at_the_prior_with_zero_gradient(backend, device, dtype):
    mu, logvar = (torch.zeros(3, 5, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    kl = kl_per_sample(mu, logvar)
    assert torch.equal(kl, torch.zeros_like(kl))
    for gradient in oracle.grads(kl.sum(), [mu, logvar]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 1e-3, 1.0])
def test_kl_relative_accuracy(backend, device, interpreted, dtype, shift):
    logvar = column(logvar_grid(400 if interpreted or dtype == torch.float64 else 2000), dtype)
    mu = torch.full_like(logvar, shift)
    exact = oracle.kl_mpmath(mu.flatten().tolist(), logvar.flatten().tolist())
    ours = kl_per_sample(mu.to(device), logvar.to(device)).cpu()
    assert (ours >= 0).all()
    assert (ours[exact > 0] > 0).all()
    oracle.assert_relative(ours, exact, KL_RELATIVE[dtype], "kl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_relative_accuracy_in_mu(backend, device, dtype):
    mu = column([s * 10.0**e for e in range(-12, 13) for s in (1, -1)], dtype)
    zeros = torch.zeros_like(mu)
    exact = oracle.kl_mpmath(mu.flatten().tolist(), zeros.flatten().tolist())
    oracle.assert_relative(kl_per_sample(mu.to(device), zeros.to(device)).cpu(), exact, KL_RELATIVE[dtype], "kl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_gradient_relative_accuracy(backend, device, dtype):
    logvar = column([v for v in logvar_grid(200) if v], dtype, device).requires_grad_()
    (gradient,) = oracle.grads(kl_per_sample(torch.zeros_like(logvar), logvar).sum(), [logvar])
    exact = 0.5 * torch.expm1(logvar.detach().double())
    oracle.assert_relative(gradient, exact, KL_RELATIVE[dtype], "d kl / d logvar")


def test_kl_where_bfloat16_eager_is_negative(backend, device):
    logvar = column(torch.linspace(-0.5, 0.5, 801), torch.bfloat16, device)
    mu = torch.zeros_like(logvar)
    # The other common order of the four terms.
    assert (0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar) < 0).any()
    exact = oracle.kl_mpmath(mu.flatten().tolist(), logvar.flatten().tolist())
    ours = kl_per_sample(mu, logvar)
    assert (ours >= 0).all()
    oracle.assert_relative(ours.cpu(), exact, KL_RELATIVE[torch.float32], "kl")


def test_where_float16_eager_overflows(backend, device):
    logvar = column([12.0, 20.0, -60.0], torch.float16, device)
    mu = column([0.0, 0.5, 300.0], torch.float16, device)
    assert not oracle.kl_divergence(mu, logvar).isfinite().all(0)
    exact = oracle.kl_mpmath(mu.flatten().tolist(), logvar.flatten().tolist())
    oracle.assert_relative(kl_per_sample(mu, logvar).cpu(), exact, KL_RELATIVE[torch.float32], "kl")
    x_hat, x = column([300.0, -60000.0], torch.float16, device), column([-300.0, 60000.0], torch.float16, device)
    assert not oracle.gaussian_nll(x_hat, x).isfinite().any()
    ours = fe.gaussian_nll(x_hat, x, reduction="none")
    assert ours.tolist() == [0.5 * 600.0**2, 0.5 * 120000.0**2]


@pytest.mark.parametrize("sigma", [0.1, 1.0, math.sqrt(0.5), 7.0])
def test_calibrated_likelihood(backend, device, sigma):
    x_hat, x = (oracle.randn(4, 3, 7, seed=s, dtype=torch.float64, device=device) for s in (1, 2))
    size = 21
    mse = ((x - x_hat) ** 2).mean(dim=(1, 2))
    expected = size * math.log(sigma) + 0.5 * size * math.log(2 * math.pi) + size / (2 * sigma**2) * mse
    torch.testing.assert_close(
        fe.gaussian_nll(x_hat, x, sigma=sigma, full=True, reduction="none"), expected, rtol=1e-13, atol=0
    )


def test_sigma_is_a_weight_on_the_squared_error(backend, device):
    x_hat, x = (oracle.randn(4, 21, seed=s, dtype=torch.float64, device=device) for s in (1, 2))
    weight = 3.0
    sigma = math.sqrt(1 / (2 * weight))
    ours = fe.gaussian_nll(x_hat, x, sigma=sigma, reduction="none") - 21 * math.log(sigma)
    torch.testing.assert_close(ours, weight * ((x - x_hat) ** 2).sum(1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("values", ["equal", "lognormal", "one_large"])
def test_large_sums(backend, device, interpreted, values):
    size = 2**16 + 3 if interpreted else 2**20 + 3
    # 1/3 has a full mantissa: each addition to a long running sum rounds the same way, and the error would add up.
    residual = {
        "equal": torch.full((2, size), 1 / 3),
        "lognormal": oracle.randn(2, size, seed=3).exp(),
        "one_large": torch.full((2, size), 1 / 3).index_fill(1, torch.tensor([1]), 300.0),
    }[values].to(device)
    zeros = torch.zeros_like(residual)
    ours = fe.gaussian_nll(residual, zeros, reduction="none")
    exact = 0.5 * residual.double().square().sum(1)
    oracle.assert_relative(ours, exact, SUM_RELATIVE[torch.float32], "nll")
    kl = kl_per_sample(residual, zeros)
    oracle.assert_relative(kl, exact, SUM_RELATIVE[torch.float32], "kl")
    out = fe.elbo_loss(residual, zeros, residual, zeros, reduction="sum")
    oracle.assert_relative(out.loss, 2 * exact.sum(), SUM_RELATIVE[torch.float32], "loss")


def test_large_batch(backend, device, interpreted):
    count = 4099 if interpreted else 2**18 + 3
    x_hat = torch.full((count, 1), 1 / 3, device=device)
    ours = fe.gaussian_nll(x_hat, torch.zeros_like(x_hat), reduction="sum")
    oracle.assert_relative(ours, 0.5 * x_hat.double().square().sum(), SUM_RELATIVE[torch.float32], "loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_dtype_of_results(backend, device, dtype):
    x_hat, x = (oracle.randn(2, 3, seed=s, dtype=dtype, device=device) for s in (1, 2))
    z, kl = fe.rsample_kl(x_hat, x, seed=0)
    out = fe.elbo_loss(x_hat, x, x_hat, x)
    assert z.dtype == dtype
    assert {t.dtype for t in (kl, *out)} == {compute(dtype)}
