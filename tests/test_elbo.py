"""``elbo_loss`` in its three forms: the posterior, packed moments, and the KL that was returned with the sample."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from tolerances import FLOATS, compute

import fused_elbo as fe
from fused_elbo.accuracy import SUM_ULPS

FORMS = ("classic", "packed", "kl")
NAMES = {"classic": ("x_hat", "x", "mu", "logvar"), "packed": ("x_hat", "x", "moments"), "kl": ("x_hat", "x", "kl")}


def inputs_of(form, dtype, device, *, data=(4, 3, 7), latent=(4, 5)) -> list[torch.Tensor]:
    x_hat, x = (oracle.randn(*data, seed=s, dtype=dtype, device=device) for s in (1, 2))
    mu, logvar = (oracle.randn(*latent, seed=s, dtype=dtype, device=device) for s in (3, 4))
    if form == "packed":
        return [x_hat, x, torch.cat((mu, logvar), 1)]
    if form == "kl":
        return [x_hat, x, oracle.randn(data[0], seed=5, dtype=compute(dtype), device=device).abs()]
    return [x_hat, x, mu, logvar]


def call(function, form, inputs, **options):
    if form == "packed":
        return tuple(function(*inputs, chunk_dim=1, **options))
    if form == "kl":
        return tuple(function(*inputs[:2], kl=inputs[2], **options))
    return tuple(function(*inputs, **options))


def formulas(form, **options):
    ours = lambda *t: call(fe.elbo_loss, form, t, **options)  # noqa: E731
    theirs = lambda *t: call(oracle.elbo, form, t, **{k: v for k, v in options.items() if k != "grad_scale"})  # noqa: E731
    return ours, theirs


def assert_like_the_oracle(form, inputs, upstream, *, magnitude=0.0, **options):
    """``upstream`` holds the gradients of (loss, nll, kl), None where one is not used."""
    ours, theirs = formulas(form, **options)
    double = [None if g is None else g.double() for g in upstream]
    found, found_g = oracle.with_gradients(ours, inputs, upstream)
    exact, exact_g = oracle.with_gradients(theirs, inputs, double, torch.float64)
    eager, eager_g = oracle.with_gradients(theirs, inputs, upstream)
    dtype = inputs[0].dtype
    for name, mine, right, other in zip(("loss", "nll", "kl"), found, exact, eager, strict=True):
        assert mine.dtype == compute(dtype), name
        # Terms of one size are added; their sum may be small only where ln sigma is negative, or in the oracle's KL.
        terms = right.abs() + magnitude + (10.0 if dtype == torch.float64 else 0.0)
        oracle.assert_envelope(mine, right, other, ulps=SUM_ULPS, terms=terms, what=name)
    for name, mine, right, other in zip(NAMES[form], found_g, exact_g, eager_g, strict=True):
        # The float64 oracle subtracts exp(logvar) from 1.
        terms = None
        if dtype == torch.float64 and name in ("logvar", "moments"):
            terms = torch.full_like(right, sum(g.abs().max() for g in upstream if g is not None).item())
        oracle.assert_envelope(mine, right, other, terms=terms, what=f"gradient of {name}")


def ones(device):
    return torch.ones((), device=device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_envelope(backend, device, form, dtype, reduction):
    upstream = oracle.randn(4, seed=9, device=device) if reduction == "none" else ones(device)
    assert_like_the_oracle(form, inputs_of(form, dtype, device), (upstream, None, None), reduction=reduction)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("data", "latent"),
    [
        ((1, 1), (1, 1)),
        ((5,), (5,)),
        ((3, 1, 1), (3, 2, 1, 2)),
        ((7, 521), (7, 3)),
        ((3, 4), (3, 257)),
        ((67, 3), (67, 2)),
        ((4, 64), (4, 16)),
    ],
    ids=str,
)
def test_shapes(backend, device, form, data, latent):
    if form == "packed" and len(latent) == 1:
        latent = (*latent, 1)
    inputs = inputs_of(form, torch.float32, device, data=data, latent=latent)
    assert_like_the_oracle(form, inputs, (ones(device), None, None))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("beta", [0.0, 0.25, 7])
@pytest.mark.parametrize(("sigma", "full"), [(1.0, True), (0.2, False), (math.sqrt(0.5), True)])
def test_options(backend, device, form, dtype, beta, sigma, full):
    magnitude = 21 * (abs(math.log(sigma)) + math.log(2 * math.pi))
    assert_like_the_oracle(
        form,
        inputs_of(form, dtype, device),
        (ones(device), None, None),
        magnitude=magnitude,
        beta=beta,
        sigma=sigma,
        full=full,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("used", [(1, 1, 1), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], ids=str)
def test_differentiable_terms(backend, device, form, reduction, used):
    inputs = inputs_of(form, torch.float64, device)
    loss = torch.tensor(-1.5, device=device) if reduction != "none" else oracle.randn(4, seed=9, device=device)
    upstream = [loss, oracle.randn(4, seed=10, device=device), oracle.randn(4, seed=11, device=device)]
    upstream = [g.double() if u else None for g, u in zip(upstream, used, strict=True)]
    ours, theirs = formulas(form, reduction=reduction, beta=0.3, sigma=0.7)
    found, found_g = oracle.with_gradients(ours, inputs, upstream)
    exact, exact_g = oracle.with_gradients(theirs, inputs, upstream)
    for mine, right in zip(found + found_g, exact + exact_g, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend, device, interpreted, form, reduction):
    inputs = [oracle.leaf(t) for t in inputs_of(form, torch.float64, device, data=(2, 3), latent=(2, 2))]

    def function(*t):
        out = call(fe.elbo_loss, form, t, reduction=reduction, beta=0.4, sigma=0.8)
        return out[:2] if form == "kl" else out

    assert torch.autograd.gradcheck(function, inputs, fast_mode=interpreted)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("chunk_dim", [1, 2, -1])
def test_gradcheck_packed(backend, device, interpreted, chunk_dim):
    x_hat, x = (oracle.randn(2, 3, seed=s, dtype=torch.float64, device=device) for s in (1, 2))
    moments = oracle.leaf(oracle.randn(2, 2, 2, seed=3, dtype=torch.float64, device=device))

    def function(m):
        return fe.elbo_loss(x_hat, x, m, chunk_dim=chunk_dim).loss

    assert torch.autograd.gradcheck(function, [moments], fast_mode=interpreted)
    assert torch.autograd.gradgradcheck(function, [moments], fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_beta_on_the_device(backend, device, form, reduction, shape):
    inputs = inputs_of(form, torch.float32, device)
    beta = torch.full(shape, 0.3, device=device, requires_grad=True)
    leaves = [oracle.leaf(t) for t in inputs]
    out = call(fe.elbo_loss, form, leaves, beta=beta, reduction=reduction)
    plain = call(fe.elbo_loss, form, inputs, beta=beta.item(), reduction=reduction)
    assert torch.equal(out[0], plain[0])
    found = oracle.grads(out[0].sum(), [*leaves, beta])
    exact_leaves = [oracle.leaf(t.double()) for t in inputs]
    exact_beta = oracle.leaf(beta.double())
    exact = call(oracle.elbo, form, exact_leaves, beta=exact_beta, reduction=reduction)
    right = oracle.grads(exact[0].sum(), [*exact_leaves, exact_beta])
    assert found[-1].shape == shape
    for mine, true in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)


def test_beta_has_second_derivatives(backend, device, interpreted):
    inputs = [oracle.leaf(t) for t in inputs_of("classic", torch.float64, device, data=(2, 2), latent=(2, 1))]
    beta = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    function = lambda b, *t: fe.elbo_loss(*t, beta=b).loss  # noqa: E731
    assert torch.autograd.gradcheck(function, [beta, *inputs], fast_mode=interpreted)
    assert torch.autograd.gradgradcheck(function, [beta, *inputs], fast_mode=True)


@pytest.mark.parametrize("beta_dtype", FLOATS)
def test_beta_of_any_dtype(backend, device, beta_dtype):
    inputs = inputs_of("classic", torch.float32, device)
    beta = torch.tensor(0.5, dtype=beta_dtype, device=device, requires_grad=True)
    out = fe.elbo_loss(*inputs, beta=beta)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, fe.elbo_loss(*inputs, beta=0.5).loss)
    (gradient,) = oracle.grads(out.loss, [beta])
    assert gradient.dtype == beta_dtype
    torch.testing.assert_close(gradient.float(), out.kl.mean(), rtol=torch.finfo(beta_dtype).eps * 2 + 1e-6, atol=0)


@pytest.mark.parametrize("form", ["classic", "kl"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("image", "target", "posterior"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.float16, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_mixed_dtypes(backend, device, form, reduction, image, target, posterior):
    dtypes = (image, target, posterior, posterior)
    inputs = [t.to(d) for t, d in zip(inputs_of(form, torch.float32, device), dtypes, strict=False)]
    leaves, wide = [oracle.leaf(t) for t in inputs], [oracle.leaf(t.double()) for t in inputs]
    out = call(fe.elbo_loss, form, leaves, reduction=reduction)
    exact = call(oracle.elbo, form, wide, reduction=reduction)
    assert out[0].dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    torch.testing.assert_close(out[0].double(), exact[0], rtol=1e-6, atol=0)
    found, right = oracle.grads(out[0].sum(), leaves), oracle.grads(exact[0].sum(), wide)
    for mine, true, source in zip(found, right, leaves, strict=True):
        assert mine.dtype == source.dtype
        bound = 2 * max(torch.finfo(mine.dtype).eps, 1e-7)
        torch.testing.assert_close(mine.double(), true, rtol=bound, atol=bound)


def test_the_two_forms_agree(backend, device):
    x_hat, x, mu, logvar = (oracle.leaf(t) for t in inputs_of("classic", torch.float64, device))
    classic = fe.elbo_loss(x_hat, x, mu, logvar, beta=0.3)
    two_step = fe.elbo_loss(x_hat, x, kl=fe.rsample_kl(mu, logvar, seed=1).kl, beta=0.3)
    torch.testing.assert_close(classic.loss, two_step.loss, rtol=1e-13, atol=0)
    found = (oracle.grads(out.loss, [x_hat, x, mu, logvar]) for out in (classic, two_step))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_the_whole_step_has_the_gradients_of_eager(backend, device):
    mu, logvar = (oracle.randn(3, 4, seed=s, dtype=torch.float64, device=device) for s in (1, 2))
    weight, x = (oracle.randn(*s, seed=3, dtype=torch.float64, device=device) for s in ((4, 6), (3, 6)))
    eps = oracle.randn(3, 4, seed=5, dtype=torch.float64, device=device)

    def fused(m, v, w):
        z, kl = fe.rsample_kl(m, v, eps=eps)
        return fe.elbo_loss(torch.tanh(z @ w), x, kl=kl, beta=0.3, sigma=0.5).loss

    def plain(m, v, w):
        return oracle.elbo(torch.tanh(oracle.reparameterize(m, v, eps) @ w), x, m, v, beta=0.3, sigma=0.5)[0]

    results = [oracle.with_gradients(f, (mu, logvar, weight), (torch.ones((), device=device),)) for f in (fused, plain)]
    for mine, right in zip(*(a + b for a, b in results), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients(backend, device, form, mode, reduction):
    leaves = [oracle.leaf(t) for t in inputs_of(form, torch.float32, device)]
    expected = call(fe.elbo_loss, form, leaves, reduction=reduction)
    with mode():
        found = call(fe.elbo_loss, form, leaves, reduction=reduction)
    for mine, right in zip(found[: 2 if form == "kl" else 3], expected, strict=False):
        assert not mine.requires_grad
        assert torch.equal(mine, right)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("data", "latent"), [((0, 4), (0, 3)), ((2, 0), (2, 3)), ((2, 4), (2, 0)), ((2, 0), (2, 0))], ids=str)
def test_empty(backend, device, form, reduction, data, latent):
    inputs = inputs_of(form, torch.float32, device, data=data, latent=latent)
    leaves, wide = [oracle.leaf(t) for t in inputs], [oracle.leaf(t.double()) for t in inputs]
    out, exact = (call(f, form, t, reduction=reduction) for f, t in ((fe.elbo_loss, leaves), (oracle.elbo, wide)))
    for mine, right in zip(out, exact, strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-6, equal_nan=True)
    found = oracle.grads(out[0].sum(), leaves)
    right = oracle.grads(exact[0].sum(), wide, allow_unused=True)
    for mine, true in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_bad_latents_stay_in_their_sample(backend, device, form, bad):
    def results(spoil: bool):
        inputs = inputs_of(form, torch.float32, device)
        if spoil:
            inputs[2].view(4, -1)[1, 0] = bad
        leaves = [oracle.leaf(t) for t in inputs]
        out = call(fe.elbo_loss, form, leaves)
        return out, oracle.grads(out[0], leaves)

    (good, good_g), (spoiled, spoiled_g) = results(False), results(True)
    assert torch.equal(good[1], spoiled[1])
    assert torch.equal(good[2][[0, 2, 3]], spoiled[2][[0, 2, 3]])
    for before, after in zip(good_g, spoiled_g, strict=True):
        assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert torch.equal(good_g[0], spoiled_g[0])
    assert spoiled[0].isnan() if bad != bad else spoiled[0] == torch.inf


def test_modules_are_the_functions(backend, device):
    x_hat, x, mu, logvar = inputs_of("classic", torch.float32, device)
    latent = fe.nn.GaussianLatent()
    z, kl = latent(mu, logvar, seed=4)
    expected = fe.rsample_kl(mu, logvar, seed=4)
    assert torch.equal(z, expected.z)
    assert torch.equal(kl, expected.kl)
    assert torch.equal(latent.eval()(mu, logvar).z, mu)
    loss = fe.nn.ELBOLoss(beta=0.3, sigma=0.5, full=True, reduction="sum")
    options = {"beta": 0.3, "sigma": 0.5, "full": True, "reduction": "sum"}
    assert torch.equal(loss(x_hat, x, kl=kl).loss, fe.elbo_loss(x_hat, x, kl=kl, **options).loss)
    assert torch.equal(loss(x_hat, x, mu, logvar).loss, fe.elbo_loss(x_hat, x, mu, logvar, **options).loss)
    moments = torch.cat((mu, logvar), 1)
    packed = fe.nn.ELBOLoss(chunk_dim=1)
    assert torch.equal(packed(x_hat, x, moments).loss, fe.elbo_loss(x_hat, x, moments, chunk_dim=1).loss)
    assert torch.equal(fe.nn.GaussianLatent(chunk_dim=1)(moments, seed=4).z, z)
