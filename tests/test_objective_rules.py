"""The general objective's rules: one pass, any upstream gradient, any shape and layout, and what it refuses."""

from __future__ import annotations

import math

import oracle
import pytest
import spies
import torch
from tolerances import FLOATS, compute

import fused_elbo as fe
from fused_elbo import accuracy, ops

pytestmark = pytest.mark.usefixtures("on_device")

SHAPE = (3, 4, 2, 5)
OPTIONS = {
    "bernoulli": {"likelihood": "bernoulli"},
    "sigmoid": {"activation": "sigmoid", "sigma": 0.5},
    "laplace": {"likelihood": "laplace"},
}


def nll64(name, x_hat, x):
    """The terms (N,) in float64, differentiable."""
    x_hat, x = x_hat.double(), x.double()
    value = {
        "bernoulli": lambda: torch.nn.functional.softplus(x_hat) - x * x_hat,
        "sigmoid": lambda: (x_hat.sigmoid() - x) ** 2 * 2 + math.log(0.5),
        "laplace": lambda: (x_hat - x).abs(),
        "log_sigma": None,
    }[name]()
    return value.flatten(1).sum(1)


def inputs(dtype=torch.float32):
    return [oracle.randn(*SHAPE, seed=1).to(dtype), oracle.randn(*SHAPE, seed=2).sigmoid().to(dtype)]


def assert_close(found, right, dtype=torch.float32):
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), right.double(), rtol=bound, atol=bound * max(1.0, right.abs().max().item()))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0])
def test_upstream(backend, name, dtype, reduction, upstream):
    x_hat, x = (oracle.leaf(t) for t in inputs(dtype))
    loss = fe.nll(x_hat, x, reduction=reduction, **OPTIONS[name])
    weights = oracle.randn(3, seed=3)[:1].expand(3) if reduction == "none" else torch.ones(())
    (loss * weights * upstream).sum().backward()
    wide = [oracle.leaf(t.double()) for t in (x_hat, x)]
    exact = oracle.reduce(nll64(name, *wide), reduction)
    (exact * weights * upstream).sum().backward()
    assert_close(loss.detach(), exact.detach(), torch.float64 if dtype == torch.float64 else torch.float32)
    for mine, right in zip((x_hat, x), wide, strict=True):
        assert mine.grad.dtype == dtype
        assert_close(mine.grad, right.grad, dtype)


def test_kept_graph_and_repeated_backward(backend):
    x_hat, x = (oracle.leaf(t) for t in inputs())
    log_sigma = oracle.leaf(torch.tensor(0.3))
    loss = fe.nll(x_hat, x, log_sigma=log_sigma)
    leaves = [x_hat, x, log_sigma]
    first = oracle.grads(loss, leaves, retain_graph=True)
    third = oracle.grads(3 * loss, leaves, retain_graph=True)
    again = oracle.grads(loss, leaves)
    for a, b, c in zip(first, third, again, strict=True):
        assert torch.equal(a, c)
        assert_close(b, 3 * a)


@pytest.mark.parametrize("needed", range(1, 8))
def test_partial_requires_grad(backend, needed):
    tensors = [*inputs(), torch.tensor([0.1, -0.2, 0.3, 0.0]).reshape(4, 1, 1)]
    leaves = [t.clone().requires_grad_(bool(needed >> k & 1)) for k, t in enumerate(tensors)]
    fe.nll(*leaves[:2], log_sigma=leaves[2]).backward()
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    eager = 0.5 * ((wide[0] - wide[1]) * torch.exp(-wide[2])) ** 2 + wide[2]
    (eager.sum() / SHAPE[0]).backward()
    for mine, right in zip(leaves, wide, strict=True):
        assert (mine.grad is None) == (right.grad is None)
        if mine.grad is not None:
            assert_close(mine.grad, right.grad)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (5,), (3, 1, 1, 1), (1, 4, 2, 5), (3, 4, 1, 1), SHAPE, (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_log_sigma_of_any_shape(backend, shape, dtype):
    x_hat, x = (oracle.leaf(t) for t in inputs(dtype))
    log_sigma = oracle.leaf(oracle.randn(*shape, seed=5, scale=0.3).to(dtype))
    loss = fe.nll(x_hat, x, log_sigma=log_sigma, full=True)
    loss.backward()
    wide = [oracle.leaf(t.double()) for t in (x_hat, x, log_sigma)]
    distribution = torch.distributions.Normal(wide[0], wide[2].exp().expand(SHAPE))
    exact = -distribution.log_prob(wide[1]).sum() / SHAPE[0]
    exact.backward()
    assert_close(loss.detach(), exact.detach(), torch.float64 if dtype == torch.float64 else torch.float32)
    for mine, right in zip((x_hat, x, log_sigma), wide, strict=True):
        assert mine.grad.shape == right.grad.shape
        assert_close(mine.grad, right.grad, dtype)


@pytest.mark.parametrize("dtypes", [*((d, d) for d in FLOATS), (torch.float64, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("linear", [False, True], ids=("nll", "linear"))
def test_a_soft_floor_is_as_exact_as_the_terms(backend, dtypes, linear):
    """Whatever the dtype of the parameter, near the floor, under it and far above it."""
    x_hat, x = (oracle.randn(3, 10, seed=k).to(dtypes[0]) for k in range(2))
    log_sigma = oracle.leaf(torch.linspace(-12, 27, 30).view(3, 10).to(dtypes[1]))
    options = {"log_sigma": log_sigma, "min_log_sigma": -2.1, "reduction": "none"}
    ours = (
        fe.linear_gaussian_nll(x_hat, torch.eye(10, dtype=dtypes[0]), None, x, **options)
        if linear
        else fe.nll(x_hat, x, **options)
    )
    (gradient,) = oracle.grads(ours.sum(), [log_sigma])

    def lines(dtype):
        s = oracle.leaf(log_sigma.to(dtype))
        soft = torch.logaddexp(s, torch.full_like(s, -2.1))
        squares = ((x_hat.to(dtype) - x.to(dtype)) * torch.exp(-soft)) ** 2
        terms = 0.5 * squares + soft
        return terms.sum(1).detach(), oracle.grads(terms.sum(), [s])[0], (squares + soft.abs() + 1).detach()

    (exact, exact_g, magnitude), (eager, eager_g, _) = lines(torch.float64), lines(compute(dtypes[0]))
    assert ours.dtype == compute(dtypes[0])
    assert gradient.dtype == dtypes[1]
    oracle.assert_envelope(ours, exact, eager, ulps=accuracy.SUM_ULPS, terms=magnitude.sum(1), what="nll")
    slope = torch.sigmoid(log_sigma.detach().double() + 2.1)
    oracle.assert_envelope(gradient, exact_g, eager_g, terms=magnitude * slope, what="gradient")


def there(options):
    """Options that were made before a test, on its device."""
    return {name: v.to(torch.get_default_device()) if isinstance(v, torch.Tensor) else v for name, v in options.items()}


@pytest.mark.parametrize("options", [{}, {"log_sigma": torch.zeros((), requires_grad=True)}], ids=("fixed", "learned"))
def test_the_gradient_is_made_in_the_forward_pass(backend, monkeypatch, options):
    options = there(options)
    made = spies.counted(monkeypatch, torch.get_default_device(), ("likelihood", "rescale_"))
    x_hat, x = inputs()
    loss = fe.nll(x_hat.requires_grad_(), x, likelihood="laplace", **options)
    assert made == ["likelihood"]
    loss.backward()
    assert made == ["likelihood", "rescale_"]


@pytest.mark.parametrize("shape", [(3, 40), (40,)], ids=("elements", "channels"))
def test_flat_data_are_read_by_the_row_whatever_their_scale(backend, monkeypatch, shape):
    module, rows = ops.select(torch.get_default_device()), []
    right = module.likelihood
    monkeypatch.setattr(module, "likelihood", lambda x_hat, *a, **k: rows.append(x_hat.shape) or right(x_hat, *a, **k))
    x_hat, x = (t.flatten(1) for t in inputs())
    fe.nll(x_hat, x, log_sigma=torch.zeros(shape))
    assert [tuple(shape) for shape in rows] == [(3, 1, 40)]


def test_no_gradient_is_made_without_need(backend, monkeypatch):
    module = ops.select(torch.get_default_device())
    seen = []
    right = module.likelihood
    monkeypatch.setattr(module, "likelihood", lambda *a, **k: seen.append(a[7]) or right(*a, **k))
    x_hat, x = inputs()
    fe.nll(x_hat, x, likelihood="bernoulli")
    with torch.no_grad():
        fe.nll(x_hat.requires_grad_(), x, likelihood="bernoulli")
    assert [any(t is not None for t in out) for out in seen] == [False, False]


def test_grad_scale_keeps_float16_from_underflow(backend):
    x_hat, x = (t.half() for t in inputs())
    leaf = oracle.leaf(x_hat)
    scale = torch.tensor(1024.0)
    (fe.nll(leaf, x, likelihood="bernoulli", grad_scale=scale) * scale * 2).backward()
    assert_close(leaf.grad, 2048 / 3 * (x_hat.double().sigmoid() - x.double()), torch.float16)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_layouts(backend, layout):
    def laid(t):
        return {
            "channels_last": lambda: t.contiguous(memory_format=torch.channels_last),
            "transposed": lambda: t.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
            "expanded": lambda: t[:, :1].expand(SHAPE),
            "sliced": lambda: torch.stack((t, t + 9), -1)[..., 0],
        }[layout]()

    x_hat, x = (laid(t).detach().requires_grad_() for t in inputs())
    mask = laid(oracle.randn(*SHAPE, seed=6)) > 0
    options = {"likelihood": "laplace", "log_sigma": laid(oracle.randn(*SHAPE, seed=7)), "mask": mask}
    found = oracle.grads(fe.nll(x_hat, x, **options), [x_hat, x])
    plain = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x_hat, x)]
    options = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    right = oracle.grads(fe.nll(*plain, **options), plain)
    for mine, same in zip(found, right, strict=True):
        assert_close(mine, same)


@pytest.mark.parametrize("dims", [(0,), (0, 2), (0, 1), (0, 1, 3), (0, -1, 1, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_batch_dims(backend, dims, reduction):
    x_hat, x = (oracle.leaf(t) for t in inputs(torch.float64))
    loss = fe.nll(x_hat, x, likelihood="laplace", batch_dims=dims, reduction=reduction)
    kept = sorted(d % 4 for d in dims)
    others = [d for d in range(4) if d not in kept]
    terms = (x_hat - x).abs()
    terms = terms.sum(others) if others else terms
    torch.testing.assert_close(loss, oracle.reduce(terms, reduction))
    found = oracle.grads(loss.sum(), [x_hat, x])
    for mine, right in zip(found, oracle.grads(oracle.reduce(terms, reduction).sum(), [x_hat, x]), strict=True):
        torch.testing.assert_close(mine, right)


def test_bounds_beyond_the_dtype_bound_nothing(backend):
    """As a configuration writes them that has no word for infinity; also where PyTorch's own clamp is differentiated twice."""
    mu, logvar = (oracle.leaf(oracle.randn(2, 3, seed=k)) for k in range(2))
    for bounds in ((-1e308, 1e308), (-1.0, 1e308), (-1e308, 1.0)):
        limits = [b if abs(b) < 2 else math.copysign(math.inf, b) for b in bounds]
        first, second = (fe.rsample_kl(mu, logvar, seed=3, clamp=pair).kl.sum() for pair in (bounds, limits))
        assert torch.equal(first, second)
        slopes = [oracle.grads(kl, [mu, logvar], create_graph=True)[1].sum() for kl in (first, second)]
        torch.testing.assert_close(*(oracle.grads(slope, [logvar]) for slope in slopes))


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (2, 6, 2, 3, 4)], ids=("image", "video"))
def test_packed_moments_with_every_kind_of_option(backend, shape):
    moments = oracle.leaf(oracle.randn(*shape, dtype=torch.float64))
    options = {"param": "softplus", "min_std": 0.1, "clamp": (-1.0, 1.0), "free_bits": 0.2, "free_bits_over": "element"}
    frames = (0, 2) if len(shape) == 5 else (0,)
    z, kl = fe.rsample_kl(moments, chunk_dim=1, seed=3, batch_dims=frames, **options)
    mu, raw = moments.detach().chunk(2, 1)
    apart = [oracle.leaf(mu), oracle.leaf(raw)]
    same_z, same_kl = fe.rsample_kl(*apart, seed=3, batch_dims=frames, **options)
    assert torch.equal(z, same_z)
    assert kl.shape == tuple(shape[d] for d in frames)
    torch.testing.assert_close(kl, same_kl)
    (packed,) = oracle.grads((z**2).sum() + kl.sum(), [moments])
    torch.testing.assert_close(packed, torch.cat(oracle.grads((same_z**2).sum() + same_kl.sum(), apart), 1))


def test_a_videos_kl_is_summed_over_all_but_the_batch(backend):
    mu, logvar = oracle.randn(2, 3, 2, 4, 5), oracle.randn(2, 3, 2, 4, 5, seed=1)
    whole = fe.kl_divergence(mu, logvar, reduction="none")
    frames = fe.kl_divergence(mu, logvar, batch_dims=(0, 2), reduction="none")
    assert whole.shape == (2,)
    assert frames.shape == (2, 2)
    torch.testing.assert_close(frames.sum(1), whole)
    torch.testing.assert_close(whole.double(), oracle.kl_divergence(mu.double(), logvar.double()), rtol=1e-6, atol=0)


def test_padded_sequences(backend):
    """Lengths 4 and 2: what is padding may hold anything, and has no gradient."""
    lengths = torch.tensor((4, 2))
    mask = torch.arange(4) < lengths[:, None]
    x_hat, x = oracle.randn(2, 4, 3), oracle.randn(2, 4, 3, seed=1)
    mu, logvar = oracle.randn(2, 4, 2, seed=2), oracle.randn(2, 4, 2, seed=3)
    for t in (x_hat, x, mu, logvar):
        t[~mask] = torch.nan
    leaves = [oracle.leaf(t) for t in (x_hat, x, mu, logvar)]
    kl = fe.kl_divergence(*leaves[2:], mask=mask, reduction="none")
    out = fe.elbo_loss(*leaves[:2], kl=kl, mask=mask)
    out.loss.backward()
    wide = [oracle.leaf(t.double()) for t in (x_hat, x, mu, logvar)]
    exact = sum(
        0.5 * ((wide[0][n, :t] - wide[1][n, :t]) ** 2).sum() + oracle.kl_divergence(*(w[n : n + 1, :t] for w in wide[2:])).sum()
        for n, t in enumerate(lengths)
    )
    (exact / 2).backward()
    assert_close(out.loss.detach(), exact.detach() / 2)
    for mine, right in zip(leaves, wide, strict=True):
        assert not mine.grad[~mask].any()
        assert_close(mine.grad[mask], right.grad[mask])


@pytest.mark.parametrize(
    "options", [{"likelihood": "bernoulli"}, {"log_sigma": torch.zeros(5)}, {"mask": torch.ones(0, 5) > 0}]
)
def test_empty_batch(backend, options):
    options = there(options)
    x_hat = torch.empty(0, 5, requires_grad=True)
    terms = fe.nll(x_hat, torch.empty(0, 5), reduction="none", **options)
    assert terms.shape == (0,)
    fe.nll(x_hat, torch.empty(0, 5), reduction="sum", **options).backward()
    assert x_hat.grad.shape == (0, 5)
    z, kl = fe.rsample_kl(x_hat, x_hat, num_samples=3, param="log_std")
    assert (z.shape, kl.shape) == ((3, 0, 5), (0,))


def test_one_sample_and_no_latents(backend):
    z, kl = fe.rsample_kl(torch.randn(1, 1), torch.randn(1, 1), num_samples=1, seed=1, free_bits=1.0, free_bits_over="sample")
    assert (z.shape, kl.shape) == ((1, 1, 1), (1,))
    z, kl = fe.rsample_kl(torch.empty(2, 0), torch.empty(2, 0), num_samples=2, seed=1, param="std")
    assert z.shape == (2, 2, 0)
    assert not kl.any()


def test_samples_are_those_of_the_stream(backend):
    mu, logvar = torch.zeros(3, 5), torch.zeros(3, 5)
    many = fe.reparameterize(mu, logvar, seed=9, num_samples=4)
    flat = fe.reparameterize(mu[:1].expand(12, 5).contiguous(), logvar[:1].expand(12, 5).contiguous(), seed=9)
    torch.testing.assert_close(many.flatten(0, 1), flat, rtol=1e-6, atol=1e-6)
    seeds = torch.tensor((4, 5, 6))
    many = fe.reparameterize(mu, logvar, seed=seeds, num_samples=4)
    alone = fe.reparameterize(mu[1:2], logvar[1:2], seed=seeds[1:2], num_samples=4)
    torch.testing.assert_close(many[:, 1:2], alone, rtol=1e-6, atol=1e-6)


def test_modules_take_the_options(backend):
    x_hat, x = inputs()
    mu, raw = oracle.randn(3, 4, seed=3), oracle.randn(3, 4, seed=4)
    latent = fe.nn.GaussianLatent(param="softplus", min_std=0.1)
    z, kl = latent(mu, raw, seed=2)
    same_z, same_kl = fe.rsample_kl(mu, raw, seed=2, param="softplus", min_std=0.1)
    assert torch.equal(z, same_z)
    assert torch.equal(kl, same_kl)
    loss = fe.nn.ELBOLoss(beta=0.3, log_sigma=-0.5, capacity=2.0)
    assert [name for name, _ in loss.named_parameters()] == ["log_sigma"]
    mask = oracle.randn(*SHAPE, seed=8) > 0
    out = loss(x_hat, x, kl=kl, mask=mask)
    right = fe.elbo_loss(x_hat, x, kl=kl, beta=0.3, log_sigma=torch.tensor(-0.5), capacity=2.0, mask=mask)
    assert torch.equal(out.loss, right.loss)
    out.loss.backward()
    assert loss.log_sigma.grad is not None
    assert "capacity=2.0" in repr(loss)
    assert "param='softplus'" in repr(latent)


def test_a_prior_is_part_of_its_module():
    mean, scale = torch.nn.Parameter(oracle.randn(4, seed=5)), oracle.randn(4, seed=6)
    mu, raw = (oracle.randn(3, 4, seed=k).double() for k in (3, 4))
    latent = fe.nn.GaussianLatent(param="log_std", prior=(mean, scale)).double()
    assert [name for name, _ in latent.named_parameters()] == list(latent.state_dict()) == ["prior_mean"]
    kl = latent(mu, raw, seed=2).kl
    assert torch.equal(kl, fe.rsample_kl(mu, raw, seed=2, param="log_std", prior=(mean, scale.double())).kl)
    kl.sum().backward()
    assert latent.prior_mean.grad is not None
    assert torch.equal(latent(mu, raw, prior=(mu, raw)).kl, torch.zeros(3).double())
    with pytest.raises(ValueError, match=r"^prior\[0\]: got shape"):
        fe.nn.GaussianLatent(prior=(torch.zeros(5), None))(mu, raw)
    with pytest.raises(TypeError, match=r"^prior: got"):
        fe.nn.GaussianLatent(prior=(mean,))(mu, raw)
