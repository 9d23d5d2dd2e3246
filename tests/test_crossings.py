"""Where two features meet: options beside dtypes, subclasses, transforms and memory that is shared."""

from __future__ import annotations

import contextvars
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import fused_elbo as fe
from fused_elbo import ops

N, D = 4, 3


class Subclass(torch.Tensor):
    """What a library of images gives: a tensor by another name."""


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_float16_layer_whose_gradient_of_all_samples_is_beyond_float16(backend, on_device, learned):
    """Its mean over the samples is not, and that is what is asked for."""
    count = 20000 if backend != "triton" else 400
    h, weight, x = torch.rand(count, 4) + 200 / count**0.5, torch.zeros(16, 4), torch.full((count, 16), -2.0)
    h, weight, x = h.half(), weight.half().requires_grad_(), x.half()
    options = {"log_sigma": torch.tensor(-3.0)} if learned else {"sigma": math.exp(-3)}
    (ours,) = oracle.grads(fe.linear_gaussian_nll(h, weight, None, x, **options), [weight])
    exact = (2.0 * math.exp(6) * h.double().mean(0)).expand(16, 4)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0)


def test_a_weight_beyond_float16_in_a_layer(backend, on_device):
    h, weight = oracle.randn(64, 4).half(), torch.zeros(8, 4).half().requires_grad_()
    x = oracle.randn(64, 8, seed=1).half()
    (ours,) = oracle.grads(fe.linear_gaussian_nll(h, weight, None, x, weight=torch.full((64,), 1e5)), [weight])
    exact = 1e5 / 64 * (-x.double().t() @ h.double())
    torch.testing.assert_close(ours.double(), exact, rtol=5e-3, atol=5.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"likelihood": "gaussian"}, {"sigma": "optimal"}, {"capacity": 1.0}, {"free_bits": 1.0, "free_bits_over": "sample"}],
)
def test_a_kl_of_16_bits_is_summed_up_in_float32(on_device, dtype, options):
    kl, x_hat, x = (20 + 40 * torch.rand(4096)).to(dtype), torch.zeros(4096, 2), torch.ones(4096, 2)
    ours = fe.elbo_loss(x_hat, x, kl=kl, beta=3000.0, **options).loss
    wide = fe.elbo_loss(x_hat, x, kl=kl.float(), beta=3000.0, **options).loss
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["subclass", "compiled"])
def test_explicit_noise_gets_its_gradient_from_an_operator_too(how):
    mu, logvar, eps = (oracle.leaf(oracle.randn(N, D, seed=k)) for k in range(3))

    def sample(mu, logvar, eps):
        z, kl = fe.rsample_kl(mu, logvar, eps=eps)
        return z.sum() + kl.sum()

    with fe.backend("native"):
        if how == "subclass":
            value = sample(mu.as_subclass(Subclass), logvar, eps)
        else:
            value = torch.compile(sample, backend="aot_eager", fullgraph=True)(mu, logvar, eps)
    g_mu, g_eps = oracle.grads(value.as_subclass(torch.Tensor), [mu, eps])
    torch.testing.assert_close(g_eps, torch.exp(0.5 * logvar).detach())
    torch.testing.assert_close(g_mu, 1 + mu.detach())


def negated(t: torch.Tensor) -> torch.Tensor:
    """The same values in a view that torch knows to be negated."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    return view


def test_negated_views_are_what_they_say(backend, on_device):
    tensors = [oracle.randn(N, D, seed=k) for k in range(4)]
    call = lambda x_hat, x, mu, logvar: fe.elbo_loss(x_hat, x, mu, logvar)  # noqa: E731
    torch.testing.assert_close(call(*map(negated, tensors)), call(*tensors))
    sample = lambda mu, logvar, eps: fe.rsample_kl(mu, logvar, eps=eps)  # noqa: E731
    torch.testing.assert_close(sample(*map(negated, tensors[:3])), sample(*tensors[:3]))
    found = []
    for g in (tensors[2], negated(tensors[2])):
        mu, logvar = map(oracle.leaf, tensors[:2])
        found.append(oracle.grads(fe.reparameterize(mu, logvar, eps=tensors[3]), [mu, logvar], g))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("floor", [-6.0, -100.0, -1e6, -1e9, -math.inf])
def test_a_floor_far_below_is_none(floor):
    x_hat, x = (oracle.randn(N, D, seed=k, dtype=torch.float64) for k in range(2))
    value = fe.nll(x_hat, x, sigma="optimal", min_log_sigma=floor)
    torch.testing.assert_close(value, fe.nll(x_hat, x, sigma="optimal"), rtol=1e-4 if floor == -6 else 1e-14, atol=0)
    ours = torch.func.hessian(lambda a: fe.nll(a, x, sigma="optimal", min_log_sigma=floor))(x_hat.float())
    exact = torch.func.hessian(lambda a: fe.nll(a, x, sigma="optimal"))(x_hat)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bounds", [(-10.0, math.inf), (-math.inf, 5.0), (-1e6, 5.0), (-10.0, 1e9), (-1.0, 1.0)])
def test_soft_clamps_of_any_width(backend, on_device, bounds):
    low, high = bounds
    raw = torch.tensor([[0.5, 1.0, -4.0, 30.0, -200.0]])
    near = torch.minimum(raw, torch.tensor(high)) - F.softplus(-(raw - high).abs())
    bounded = torch.maximum(near, torch.tensor(low)) + F.softplus(-(near - low).abs())
    exact = oracle.kl_divergence(torch.zeros_like(raw).double(), bounded.double())
    leaf = oracle.leaf(raw)
    ours = fe.kl_divergence(torch.zeros_like(raw), leaf, soft_clamp=bounds, reduction="none")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    slope = torch.sigmoid(high - raw) * torch.sigmoid(near - low)
    expected = 0.5 * slope * torch.expm1(bounded)
    transformed = torch.func.grad(lambda r: fe.kl_divergence(torch.zeros_like(r), r, soft_clamp=bounds))(raw)
    for found in (oracle.grads(ours.sum(), [leaf])[0], transformed):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-44, torch.tensor(0.0), torch.tensor(1e-44), torch.tensor(-0.0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"likelihood": "laplace"}])
def test_a_weight_that_is_told_and_is_zero(backend, on_device, scale, options, kept):
    """A weight of the loss that warms up begins so."""
    scale = scale.to(torch.get_default_device()) if isinstance(scale, torch.Tensor) else scale
    x_hat, x = oracle.leaf(oracle.randn(N, D)), oracle.randn(N, D, seed=1)
    loss = fe.nll(x_hat, x, grad_scale=scale, **options)
    (found,) = oracle.grads(loss, [x_hat], torch.tensor(0.5), retain_graph=kept)
    (expected,) = oracle.grads(fe.nll(x_hat, x, **options), [x_hat], torch.tensor(0.5))
    torch.testing.assert_close(found, expected)
    (nothing,) = oracle.grads(fe.nll(x_hat, x, grad_scale=scale, **options) * scale, [x_hat])
    assert (nothing.abs() <= 1e-40).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_that_is_told_in_another_dtype(backend, on_device, dtype):
    scale = torch.tensor(0.01).to(dtype)
    x_hat, x = (oracle.randn(600, 1, seed=k, dtype=torch.float64) for k in range(2))
    for options in ({}, {"likelihood": "gaussian"}):
        found = oracle.grads(fe.nll(leaf := oracle.leaf(x_hat), x, grad_scale=scale, **options), [leaf], scale.double())[0]
        torch.testing.assert_close(found, scale.double() / 600 * (x_hat - x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"likelihood": "laplace", "sigma": 0.5}])
def test_derivatives_of_a_gradient_beside_a_subclass(options):
    """A penalty on the gradient counts whatever the target is called."""
    x_hat, x = (oracle.randn(N, D, seed=k) for k in range(2))

    def step(wrapped):
        a = oracle.leaf(x_hat)
        loss = fe.nll(a, wrapped(x), **options)
        (g,) = oracle.grads(loss, [a], create_graph=True)
        return oracle.grads((loss + (g**2).sum()).as_subclass(torch.Tensor), [a])[0]

    torch.testing.assert_close(step(lambda t: t.as_subclass(Subclass)).as_subclass(torch.Tensor), step(lambda t: t))


def test_the_latent_gradient_is_differentiated_beside_a_subclass():
    def step(wrapped):
        mu, logvar = (oracle.leaf(oracle.randn(N, D, seed=k)) for k in range(2))
        kl = fe.kl_divergence(wrapped(mu), logvar, param="log_std")
        (g,) = oracle.grads(kl, [logvar], create_graph=True)
        return oracle.grads((g**2).sum().as_subclass(torch.Tensor), [logvar])[0]

    torch.testing.assert_close(step(lambda t: t.as_subclass(Subclass)).as_subclass(torch.Tensor), step(lambda t: t))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_dual_upstream_gradient_has_a_tangent(backend, on_device, reduction):
    x_hat, x = oracle.leaf(oracle.randn(N, D)), oracle.randn(N, D, seed=1)
    loss = fe.gaussian_nll(x_hat, x, reduction=reduction)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), 2 * torch.ones_like(loss))
        tangent = forward_ad.unpack_dual(oracle.grads(loss, [x_hat], upstream)[0]).tangent
    torch.testing.assert_close(tangent, 2 * (x_hat.detach() - x))


@pytest.mark.parametrize("share", [0.8, 1.0, 0.0])
def test_balanced_gradients_are_differentiated_as_they_are(backend, on_device, share):
    mu, logvar, mean, second = (oracle.randn(1, 2, seed=k, dtype=torch.float64) for k in range(4))
    balanced = lambda *t: fe.kl_divergence(*t[:2], prior=t[2:], kl_balance=share)  # noqa: E731

    def written_out(mu, logvar, mean, second):
        kl = lambda q, p: torch.distributions.kl_divergence(q, p).sum()  # noqa: E731
        normal = lambda m, v: torch.distributions.Normal(m, torch.exp(0.5 * v))  # noqa: E731
        fixed = [t.detach() for t in (mu, logvar, mean, second)]
        by_q = kl(normal(mu, logvar), normal(*fixed[2:]))
        return (1 - share) * by_q + share * kl(normal(*fixed[:2]), normal(mean, second))

    found = []
    for function in (balanced, written_out):
        leaves = [oracle.leaf(t) for t in (mu, logvar, mean, second)]
        first = oracle.grads(function(*leaves), leaves, create_graph=True)
        second_order = oracle.grads(sum((g * (k + 1)).sum() for k, g in enumerate(first)), leaves, allow_unused=True)
        found.append([*first, *(torch.zeros_like(mu) if g is None else g for g in second_order)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_memory_that_may_not_be_overwritten(on_device):
    buffer = oracle.randn(2, 40)
    x = oracle.randn(2, 9, 8, seed=1)
    frames = (buffer.clone().requires_grad_() * 1).unfold(1, 8, 4)
    with pytest.raises(ValueError, match="inplace: got True with x_hat of which elements share memory"):
        fe.gaussian_nll(frames, x, inplace=True)
    held = buffer.clone().requires_grad_() * 1
    for call in (
        lambda: fe.gaussian_nll(held[:, 1:], held[:, :-1].detach(), inplace=True),
        lambda: fe.elbo_loss(held, buffer, held, held, inplace=True),
        lambda: fe.elbo_loss(held, buffer, kl=held.detach()[:, 0], inplace=True),
    ):
        with pytest.raises(ValueError, match=r"inplace: got True with x_hat in the memory of (x|mu|kl), takes False there"):
            call()
    with pytest.raises(ValueError, match="inplace: got True with x_hat that is a negated view"):
        fe.gaussian_nll(negated(held), buffer, inplace=True)
    halves = torch.cat((buffer, buffer)).requires_grad_() * 1
    fe.gaussian_nll(halves[:2], halves[2:].detach(), inplace=True).backward()


@pytest.mark.parametrize(("param", "raw", "slope"), [("std", 0.0, 1.0), ("softplus", -104.0, 0.0), ("log_std", -200.0, 0.0)])
def test_a_deviation_of_zero_has_a_gradient(backend, on_device, param, raw, slope):
    raw = torch.full((1, 5), raw).requires_grad_()
    eps = oracle.randn(1, 5)
    z = fe.reparameterize(torch.zeros(1, 5), raw, param=param, eps=eps)
    assert (z == 0).all()
    torch.testing.assert_close(oracle.grads(z.sum(), [raw])[0], slope * eps, rtol=1e-6, atol=1e-30)


def test_one_sample_may_be_changed_in_place(backend, on_device):
    mu, raw = oracle.leaf(oracle.randn(N, D)), torch.ones(N, D)
    z = fe.rsample_kl(mu, raw, param="std", seed=3).z
    oracle_z = z.detach().clone()
    F.leaky_relu_(z, 0.1)
    (g,) = oracle.grads(z.sum(), [mu])
    torch.testing.assert_close(g, torch.where(oracle_z > 0, 1.0, 0.1))


class Selected(torch.autograd.Function):
    """Asks in its backward, as a GPU's thread would, without the caller's context variables."""

    found: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, upstream):
        Selected.found.append(contextvars.Context().run(lambda: (ops.requested(), ops.select(upstream.device).__name__)))
        return upstream


@pytest.mark.parametrize("name", ["reference", "native"])
def test_the_backend_that_is_asked_for_reaches_autograds_threads(name, monkeypatch):
    monkeypatch.delenv(ops.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(Selected, "found", [])
    t = torch.zeros((), requires_grad=True)
    with fe.backend("native"), fe.backend(name):
        Selected.apply(t).backward()
        assert contextvars.Context().run(ops.requested) is None, "another task of this thread"
    with fe.backend("native"):
        pass
    Selected.apply(t).backward()
    inside, outside = Selected.found
    assert inside == (name, ops.BACKENDS[name])
    assert outside[0] is None


def test_bfloat16_beside_float64(backend, on_device):
    mu, logvar, eps = (oracle.randn(N, D, seed=k) for k in range(3))
    m, v = oracle.leaf(mu.bfloat16()), oracle.leaf(logvar.double())
    z, kl = fe.rsample_kl(m, v, eps=eps.double())
    exact = m.double() + eps.double() * torch.exp(0.5 * v)
    torch.testing.assert_close(z, exact.bfloat16())
    torch.testing.assert_close(kl, oracle.kl_divergence(m.double(), v))
    x_hat = oracle.leaf(mu.bfloat16())
    g_mu, g_x_hat = oracle.grads(z.double().sum() + fe.gaussian_nll(x_hat, v.detach(), reduction="sum"), [m, x_hat])
    torch.testing.assert_close(g_mu, torch.ones_like(m))
    torch.testing.assert_close(g_x_hat, (x_hat.double() - v).bfloat16())
