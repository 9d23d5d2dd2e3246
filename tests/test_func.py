"""``torch.func`` and forward-mode differentiation: every transform, beside the same transform of the eager formula."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch.autograd import forward_ad

import fused_elbo as fe

pytestmark = pytest.mark.usefixtures("on_device")

SHAPE = (3, 4)


def tensors():
    return [oracle.randn(*SHAPE, seed=k, dtype=torch.float64) for k in range(4)]


def plain(mu, logvar, x, eps):
    z, kl = fe.rsample_kl(mu, logvar, eps=eps)
    return fe.elbo_loss(torch.tanh(z), x, kl=kl, beta=0.5).loss + fe.elbo_loss(mu * mu, x, mu, logvar).loss


def plain_eager(mu, logvar, x, eps):
    z, kl = oracle.reparameterize(mu, logvar, eps), oracle.kl_divergence(mu, logvar)
    return oracle.elbo(torch.tanh(z), x, kl=kl, beta=0.5)[0] + oracle.elbo(mu * mu, x, mu, logvar)[0]


def general(mu, logvar, x, eps):
    z, kl = fe.rsample_kl(mu, logvar, eps=eps, param="log_std")
    return fe.elbo_loss(z, x, kl=kl, likelihood="laplace", log_sigma=mu.mean()).loss


def general_eager(mu, logvar, x, eps):
    z, kl = mu + eps * torch.exp(logvar), oracle.kl_divergence(mu, 2 * logvar)
    scale = mu.mean()
    return ((z - x).abs() * torch.exp(-scale) + scale).sum(1).mean() + kl.mean()


PAIRS = {"plain": (plain, plain_eager), "general": (general, general_eager)}


def assert_same(found, right):
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(right), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian"])
def test_transform(backend, name, transform):
    def applied(loss):
        first, *rest = tensors()

        def of_mu(mu):
            return loss(mu, *rest)

        return {
            "grad": lambda: torch.func.grad(of_mu)(first),
            "vjp": lambda: torch.func.vjp(of_mu, first)[1](torch.tensor(1.5, dtype=torch.float64)),
            "jvp": lambda: torch.func.jvp(of_mu, (first,), (rest[0],)),
            "jacrev": lambda: torch.func.jacrev(of_mu)(first),
            "jacfwd": lambda: torch.func.jacfwd(of_mu)(first),
            "hessian": lambda: torch.func.hessian(of_mu)(first),
        }[transform]()

    fused, eager = PAIRS[name]
    assert_same(applied(fused), applied(eager))


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_of_samples(backend, name):
    """Per-sample gradients: vmap over grad, of batches of one."""

    def of_samples(loss):
        def one(mu, logvar, x, eps):
            return loss(*(t[None] for t in (mu, logvar, x, eps)))

        return torch.func.vmap(torch.func.grad(one, (0, 1)))(*tensors())

    assert_same(*map(of_samples, PAIRS[name]))


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_randomness_of_vmap(backend, randomness):
    mu = torch.zeros(5, 2, 3)

    def draw(m):
        return fe.reparameterize(m, m)

    if randomness == "error":
        with pytest.raises(RuntimeError, match="random"):
            torch.func.vmap(draw, randomness=randomness)(mu)
        return
    z = torch.func.vmap(draw, randomness=randomness)(mu)
    assert (z[0] == z[1]).all() == (randomness == "same")
    assert 0.3 < z.std() < 2


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_in_batches(backend, name):
    def jacobian(loss):
        first, *rest = tensors()
        first = oracle.leaf(first)
        outputs = torch.stack([loss(first, *rest), 2 * loss(first * first, *rest)])
        return torch.autograd.grad(outputs, first, torch.eye(2).double(), is_grads_batched=True)

    assert_same(*map(jacobian, PAIRS[name]))


@pytest.mark.parametrize("name", PAIRS)
def test_forward_mode(backend, name):
    results = []
    for loss in PAIRS[name]:
        first, *rest = tensors()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(first, rest[0])
            results.append(forward_ad.unpack_dual(loss(dual, *rest)))
    assert_same(*(tuple(r) for r in results))


@pytest.mark.parametrize("name", PAIRS)
def test_gradgradcheck(backend, interpreted, name):
    torch.manual_seed(0)
    leaves = [oracle.leaf(t) for t in tensors()[:3]]
    eps = tensors()[3]
    fused = PAIRS[name][0]
    # Derivatives along one direction take a few calls in place of one for each element.
    torch.autograd.gradcheck(lambda *t: fused(*t, eps), leaves, fast_mode=interpreted)
    torch.autograd.gradgradcheck(lambda *t: fused(*t, eps), leaves, fast_mode=interpreted)


def test_the_doubly_reparameterised_gradient_names_the_other():
    mu = torch.zeros(2, 3)

    def loss(m):
        return fe.rsample_log_ratio(m, m, num_samples=2, seed=1, estimator="dreg").log_ratio.sum()

    with pytest.raises(RuntimeError, match='takes "iwae" there'):
        torch.func.grad(loss)(mu)


def test_a_tensor_that_outlived_its_transform_stands_for_what_it_wraps(backend):
    t, other = (oracle.randn(3, 4, seed=k) for k in range(2))
    outlived = []
    torch.func.grad(lambda a: outlived.append(a) or a.sum())(t)
    for function in (lambda a: fe.gaussian_nll(a, other), lambda a: fe.reparameterize(a, other, seed=3)):
        out = function(*outlived)
        assert not out.requires_grad
        assert torch.equal(out, function(t))
