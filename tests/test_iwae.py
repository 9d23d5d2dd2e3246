"""Several samples: the importance-weighted bound, its gradients, the log-likelihood; and a model where all of it is known."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch

import fused_elbo as fe

pytestmark = pytest.mark.usefixtures("on_device")

N, D, Q = 4, 6, 3


def model(dtype=torch.float64, seed=0):
    """Weights of a little VAE, and data."""
    tensors = {
        "encode": oracle.randn(D, 2 * Q, seed=seed, scale=0.3),
        "decode": oracle.randn(Q, D, seed=seed + 1, scale=0.5),
        "x": oracle.randn(N, D, seed=seed + 2),
    }
    return {name: t.to(dtype) for name, t in tensors.items()}


def eager_bound(encode, decode, x, eps, *, doubly=False):
    """The loss as it is written; the doubly reparameterised one by its paper's trick, a hook that weighs what reaches z."""
    mu, logvar = (x @ encode).chunk(2, 1)
    z = mu + eps * torch.exp(0.5 * logvar)
    q = (mu.detach(), logvar.detach()) if doubly else (mu, logvar)
    log_q = torch.distributions.Normal(q[0], torch.exp(0.5 * q[1])).log_prob(z).sum(2)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(2)
    log_weight = log_p - log_q - 0.5 * ((torch.tanh(z @ decode) - x) ** 2).sum(2)
    weights = torch.softmax(log_weight, 0).detach()
    if doubly:
        z.register_hook(lambda g: g * weights[..., None])
        return -(weights * log_weight).sum(0).mean(), log_weight
    return -(torch.logsumexp(log_weight, 0) - math.log(len(eps))).mean(), log_weight


def fused_bound(encode, decode, x, eps, estimator="iwae"):
    mu, logvar = (x @ encode).chunk(2, 1)
    z, log_ratio = fe.rsample_log_ratio(mu, logvar, num_samples=len(eps), eps=eps, estimator=estimator)
    return fe.iwae_loss(z @ decode, x, log_ratio, activation="tanh")


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_bound_and_gradient(backend, samples, estimator):
    tensors = model()
    eps = oracle.randn(samples, N, Q, seed=9, dtype=torch.float64)
    leaves, eager = ({n: oracle.leaf(t) for n, t in tensors.items()} for _ in range(2))
    out = fused_bound(**leaves, eps=eps, estimator=estimator)
    loss, log_weight = eager_bound(**eager, eps=eps, doubly=estimator == "dreg")
    torch.testing.assert_close(out.log_weight, log_weight, rtol=1e-10, atol=1e-10)
    if estimator == "iwae":
        torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-12)
    wanted = ("encode", "decode")
    found = oracle.grads(out.loss, [leaves[n] for n in wanted])
    for mine, right in zip(found, oracle.grads(loss, [eager[n] for n in wanted]), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10)


def test_both_estimators_have_one_expectation(backend, interpreted):
    """Averages of 2000 gradients agree within five standard errors, and the doubly reparameterised scatter less."""
    if interpreted:
        pytest.skip("a matter of statistics, which the interpreter has no time for")
    tensors = model(torch.float32)
    batches = 2000
    means, scatter = [], []
    for estimator in ("iwae", "dreg"):
        x = tensors["x"][:1].expand(batches, D)
        encode = oracle.leaf(tensors["encode"].expand(batches, D, 2 * Q).contiguous())
        mu, logvar = torch.bmm(x[:, None], encode)[:, 0].chunk(2, 1)
        z, log_ratio = fe.rsample_log_ratio(mu, logvar, num_samples=64, seed=3, estimator=estimator)
        out = fe.iwae_loss(z @ tensors["decode"], x.contiguous(), log_ratio, activation="tanh", reduction="sum")
        (g,) = oracle.grads(out.loss, [encode])
        means.append(g.double().mean(0))
        scatter.append(g.double().std(0))
    error = (means[0] - means[1]).abs() / (scatter[0] ** 2 + scatter[1] ** 2).sqrt() * math.sqrt(batches)
    assert error.max() < 5
    assert scatter[1].mean() < 0.7 * scatter[0].mean()


def test_bound_does_not_decrease_with_the_number_of_samples(backend, interpreted):
    tensors = model(torch.float32)
    mu, logvar = (tensors["x"] @ tensors["encode"]).chunk(2, 1)
    total = 32 if interpreted else 8192
    z, log_ratio = fe.rsample_log_ratio(mu, logvar, num_samples=total, seed=5)
    log_weight = fe.iwae_loss(z @ tensors["decode"], tensors["x"], log_ratio).log_weight.double()
    bounds = []
    for k in (1, 2, 4, 16, 32):
        # The mean over disjoint groups of k: exactly ordered, since the mean of logarithms is below that of the mean.
        groups = log_weight.reshape(total // k, k, N)
        bounds.append((torch.logsumexp(groups, 1) - math.log(k)).mean(0))
    for fewer, more in itertools.pairwise(bounds):
        assert (more >= fewer - 1e-12).all()


@pytest.mark.parametrize("shift", [0.0, -3e4, 3e4])
def test_thousands_of_samples_are_stable(backend, interpreted, shift):
    samples = 64 if interpreted else 4096
    x_hat, x = oracle.leaf(oracle.randn(samples, 2, 3)), oracle.randn(2, 3, seed=1)
    log_ratio = oracle.leaf(oracle.randn(samples, 2, seed=2, scale=30.0) + shift)
    out = fe.iwae_loss(x_hat, x, log_ratio)
    wide = [oracle.leaf(t.double()) for t in (x_hat, log_ratio)]
    log_weight = wide[1] - 0.5 * ((wide[0] - x.double()) ** 2).sum(2)
    exact = (math.log(samples) - torch.logsumexp(log_weight, 0)).mean()
    torch.testing.assert_close(out.loss.double(), exact, rtol=1e-6, atol=1e-5)
    tolerance = 4 * torch.finfo(torch.float32).eps * max(abs(shift), 100.0)
    for mine, right in zip(oracle.grads(out.loss, [x_hat, log_ratio]), oracle.grads(exact, wide), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), right, rtol=tolerance, atol=tolerance)


def test_a_datum_is_read_once_for_all_samples(backend):
    x = torch.randint(0, 256, (3, 5), dtype=torch.uint8)
    x_hat, log_ratio = oracle.randn(7, 3, 5), oracle.randn(7, 3, seed=1)
    mask = oracle.randn(3, 5, seed=2) > 0
    out = fe.iwae_loss(x_hat, x, log_ratio, scale=1 / 255, mask=mask)
    exact = 0.5 * ((x_hat.double() - x.double() / 255) ** 2 * mask).sum(2)
    torch.testing.assert_close(out.nll.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["one", "each"])
def test_log_likelihood_does_not_depend_on_its_parts(backend, kind):
    seed = 3 if kind == "one" else torch.tensor((3, 4, 5, 6))
    tensors = model(torch.float32)
    mu, logvar = (tensors["x"] @ tensors["encode"]).chunk(2, 1)
    done = []

    def decoder(z):
        assert z.dim() == 2
        return z @ tensors["decode"]

    options = {"num_samples": 10, "seed": seed, "sigma": 0.7}
    whole = fe.log_likelihood(decoder, tensors["x"], mu, logvar, samples_at_once=10, **options)
    parts = fe.log_likelihood(decoder, tensors["x"], mu, logvar, samples_at_once=3, progress=done.append, **options)
    packed = fe.log_likelihood(decoder, tensors["x"], torch.cat((mu, logvar), 1), chunk_dim=1, samples_at_once=4, **options)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed, whole, rtol=1e-5, atol=1e-5)
    assert done == [3, 6, 9, 10]
    z, log_ratio = fe.rsample_log_ratio(mu, logvar, num_samples=10, seed=seed)
    bound = fe.iwae_loss(z @ tensors["decode"], tensors["x"], log_ratio, sigma=0.7, full=True, reduction="none").loss
    torch.testing.assert_close(whole, -bound, rtol=1e-5, atol=1e-5)


class LinearModel:
    """Probabilistic PCA of scikit-learn's digits, q = 8 (Tipping and Bishop 1999).

    x = W z + mean + sigma n; the maximum likelihood is known, and so is the posterior, N(M^-1 W^T (x - mean), sigma^2 M^-1)
    with M = W^T W + sigma^2 I. W's columns are orthogonal, so M is diagonal, as a VAE's posterior is.
    """

    def __init__(self) -> None:
        digits = pytest.importorskip("sklearn.datasets").load_digits()
        x = torch.as_tensor(digits.data, device=torch.get_default_device()) / 16
        self.mean = x.mean(0)
        centred = x - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        q, d = 8, x.shape[1]
        self.variance = values[q:].mean()
        self.weight = vectors[:, :q] * (values[:q] - self.variance).sqrt()
        m = values[:q]
        self.log_likelihood = -0.5 * (d * math.log(2 * math.pi) + values[:q].log().sum() + (d - q) * self.variance.log() + d)
        covariance = self.weight @ self.weight.T + self.variance * torch.eye(d, dtype=x.dtype)
        self.density = torch.distributions.MultivariateNormal(self.mean, covariance)
        self.x = x
        self.mu = centred @ self.weight / m
        self.logvar = (self.variance / m).log().expand_as(self.mu)

    def decode(self, z):
        return z @ self.weight.T + self.mean


@pytest.fixture
def pca():
    return LinearModel()


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_linear_vae_is_probabilistic_pca(backend, interpreted, pca, samples):
    count = 50 if interpreted else len(pca.x)
    x, mu, logvar = (t[:count] for t in (pca.x, pca.mu, pca.logvar))
    sigma = pca.variance.sqrt().item()
    z, log_ratio = fe.rsample_log_ratio(mu, logvar, num_samples=samples, seed=1)
    exact = pca.density.log_prob(x)
    out = fe.iwae_loss(pca.decode(z), x, log_ratio, sigma=sigma, full=True, reduction="none")
    # With the exact posterior every weight is p(x), whatever the noise, and so is the bound of any number of them.
    torch.testing.assert_close(out.log_weight, exact.expand(samples, count), rtol=0, atol=1e-9)
    torch.testing.assert_close(-out.loss, exact, rtol=0, atol=1e-9)
    assert abs(pca.log_likelihood.item() - 14.2098) < 5e-5
    assert abs(pca.variance.item() - 0.02733) < 5e-6
    if count == len(pca.x):
        assert abs(-out.loss.mean().item() - pca.log_likelihood.item()) < 1e-9


def test_the_elbo_of_the_exact_posterior_is_the_log_likelihood(backend, interpreted, pca):
    """In expectation over the noise, which for the squared error is known: that of mu, plus the trace of W^T W S."""
    count = 50 if interpreted else len(pca.x)
    x, mu, logvar = (t[:count] for t in (pca.x, pca.mu, pca.logvar))
    sigma = pca.variance.sqrt().item()
    nll = fe.gaussian_nll(pca.decode(mu), x, sigma=sigma, full=True, reduction="none")
    spread = 0.5 * ((pca.weight**2).sum(0) * logvar.exp()).sum(1) / pca.variance
    elbo = -(nll + spread + fe.kl_divergence(mu, logvar, reduction="none"))
    torch.testing.assert_close(elbo, pca.density.log_prob(x), rtol=0, atol=1e-9)


def test_the_optimal_variance_is_that_of_probabilistic_pca(backend, interpreted, pca):
    """Of samples of the posterior, x - W z has sigma^2 per dimension on average over data and noise: here both are exact, by
    samples at plus and minus sqrt(q) deviations along each axis, which have the moments of a normal."""
    q = pca.mu.shape[1]
    x, mu, logvar = (t[:: 40 if interpreted else 1] for t in (pca.x, pca.mu, pca.logvar))
    axes = math.sqrt(q) * torch.cat((torch.eye(q), -torch.eye(q))).double()
    z = fe.reparameterize(mu, logvar, num_samples=2 * q, eps=axes[:, None].expand(2 * q, *mu.shape))
    x_hat, target = pca.decode(z).flatten(0, 1), x.repeat(2 * q, 1)
    found = fe.nll(x_hat, target, sigma="optimal", full=True)
    variance = ((x_hat - target) ** 2).mean()
    torch.testing.assert_close(found, 0.5 * x.shape[1] * (1 + (2 * math.pi * variance).log()))
    if len(x) == len(pca.x):
        torch.testing.assert_close(variance, pca.variance, rtol=1e-9, atol=0)
        elbo = -(found + fe.kl_divergence(mu, logvar))
        torch.testing.assert_close(elbo, pca.log_likelihood, rtol=0, atol=1e-9)
