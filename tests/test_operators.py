"""The registered operators: torch's own four checks of each, for every backend and dtype."""

from __future__ import annotations

import oracle
import pytest
import torch
from tolerances import FLOATS
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_elbo as fe
from fused_elbo import accuracy, operators, reference, sampling

pytestmark = pytest.mark.usefixtures("on_device")

SHAPE = (3, 2, 5)


def seed():
    return torch.tensor(5)


def sample_calls(dtype):
    mu, raw = (oracle.randn(*SHAPE, seed=k).to(dtype).requires_grad_() for k in range(2))
    prior = [oracle.randn(*SHAPE, seed=k).to(dtype).requires_grad_() for k in (2, 3)]
    eps = oracle.randn(2, *SHAPE, seed=4).to(dtype)
    plain = ("logvar", 0.0, None, False, None, 1.0, 1.0)
    every = ("softplus", 0.1, [-1.0, 1.0], True, 0.1, 0.2, 0.8)
    packed = oracle.randn(3, 4, 5, seed=5).to(dtype).requires_grad_()
    yield (mu, raw, None, None, seed(), None, 0, 0, 0, 1, "rows", False, False, *plain)
    yield (mu, raw, None, None, None, None, 0, 0, 0, 1, "rows", False, False, *plain)
    yield (packed, None, None, None, seed(), None, 1, 3, -1, 3, "elements", True, False, *plain)
    yield (mu, raw, *prior, None, eps, 0, 0, 0, 2, "elements", True, False, *every)
    turned = [t.detach().transpose(1, 2).requires_grad_() for t in (mu, raw)]
    yield (*turned, None, None, seed(), None, 0, 0, 0, 1, None, True, True, *plain)


def nll_calls(dtype):
    x_hat, x, scale = (oracle.randn(*SHAPE, seed=k).to(dtype).requires_grad_() for k in range(3))
    mask, weight = oracle.randn(*SHAPE, seed=4) > 0, oracle.randn(*SHAPE, seed=5).abs()
    levels = (oracle.randn(*SHAPE, seed=6) * 50 + 128).to(torch.uint8)
    yield (x_hat, x, None, None, None, "gaussian", "identity", 0.0, False, 1.0, 0.0)
    yield (x_hat, x, scale, weight, mask, "laplace", "tanh", 0.0, True, 1.0, 0.0)
    yield (x_hat, x, scale.detach()[:, :1, :1].requires_grad_(), None, None, "gaussian", "sigmoid", 0.0, True, 1.0, 0.0)
    yield (x_hat, levels, None, None, None, "discretized_logistic", "identity", -1.0, False, 2 / 255, -1.0)


def latent_calls(dtype):
    mu, logvar, eps = (oracle.randn(*SHAPE, seed=k).to(dtype) for k in range(3))
    packed = oracle.randn(3, 4, 5, seed=5).to(dtype).requires_grad_()
    yield (mu.clone().requires_grad_(), logvar.clone().requires_grad_(), seed(), None, 0, 3, 0, True)
    yield (mu.transpose(1, 2).clone().requires_grad_(), logvar.transpose(1, 2), None, eps.transpose(1, 2), 0, 0, 0, False)
    yield (packed, None, None, None, 1, 0, 0, True)
    yield (packed, None, torch.arange(3), None, 1, 0, -1, True)


def gaussian_calls(dtype):
    x_hat, x = (oracle.randn(*SHAPE, seed=k).to(dtype).requires_grad_() for k in range(2))
    yield (x_hat, x, 0.5, False, [True, True])
    yield (x_hat, x.detach(), 1.0, True, [True, False])


OPERATORS = {
    operators.sample: sample_calls,
    operators.nll: nll_calls,
    operators.latent: latent_calls,
    operators.gaussian: gaussian_calls,
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(backend, dtype):
    """Schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    for call in sample_calls(dtype):
        torch.library.opcheck(operators.sample, call)
        upstream = operators._fake_sample(*call)
        grads = [t.detach().normal_() if t.numel() else None for t in upstream]
        needs = [t is not None for t in call[:4]]
        torch.library.opcheck(operators.sample_backward, (*grads, *(_detached(a) for a in call), needs))
    for call in nll_calls(dtype):
        torch.library.opcheck(operators.nll, call)
        upstream = torch.ones_like(operators.nll(*map(_detached, call)))
        needs = [t is not None and t.is_floating_point() for t in call[:3]]
        torch.library.opcheck(operators.nll_backward, (upstream, *(_detached(a) for a in call), needs))
    for call in latent_calls(dtype):
        torch.library.opcheck(operators.latent, call)
        grads = [t.detach().normal_() if t.numel() else None for t in operators._fake_latent(*call)]
        needs = [t is not None for t in call[:2]]
        torch.library.opcheck(operators.latent_backward, (*grads, *(_detached(a) for a in call), needs))
    for call in gaussian_calls(dtype):
        torch.library.opcheck(operators.gaussian, call)


def test_opcheck_of_the_seed(device):
    # What is random differs between two calls, so the checks that compare results do not apply.
    like = torch.zeros(2, device=device)
    torch.library.opcheck(operators.draw_seed, (like,), test_utils=("test_schema", "test_faketensor"))
    torch.manual_seed(3)
    found = [operators.draw_seed(like) for _ in range(2)]
    torch.manual_seed(3)
    assert found == [sampling.draw_seed(like.device) for _ in range(2)]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (2, 1031), (1, 0), (7,), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("seeds", ["one", "per sample"])
def test_the_noise(backend, device, seeds, shape, wide):
    """The operator's own kernel on a CPU, and what it is made of elsewhere."""
    key = seed().to(device) if seeds == "one" else torch.arange(11, 11 + shape[0], device=device)
    call = (key, list(shape), 2, -1, wide)
    if shape == (3, 5):
        torch.library.opcheck(operators.normals, call)
    dtype = torch.float64 if wide else torch.float32
    right = reference.noise(key, shape, dtype=torch.float64, first_index=2, offset=2**64 - 1)
    for found in (operators.normals(*call), operators.rows_of_normals(*call)):
        assert found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), right, rtol=0, atol=accuracy.NOISE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_fakes_promise_what_comes(backend, dtype):
    for operator, calls in OPERATORS.items():
        for call in calls(dtype):
            real = operator(*map(_detached, call))
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = operator(*(mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in call))
            for r, f in zip(*(o if isinstance(o, tuple) else (o,) for o in (real, fake)), strict=True):
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_fake_tensors_go_through_the_public_functions():
    with FakeTensorMode():
        moments, x = torch.empty(4, 6, requires_grad=True), torch.empty(4, 3)
        z, kl = fe.rsample_kl(moments, chunk_dim=1, param="softplus")
        out = fe.elbo_loss(z, x, kl=kl, likelihood="laplace")
        out.loss.backward()
        assert (z.shape, kl.shape, out.loss.shape, moments.grad.shape) == ((4, 3), (4,), (), (4, 6))


def test_operator_and_function_agree(backend):
    for operator, calls in OPERATORS.items():
        for call in calls(torch.float64):
            again = operator(*call)
            assert all(torch.equal(a, b) for a, b in zip(_tuple(again), _tuple(operator(*call)), strict=True))
    x_hat, x = oracle.leaf(oracle.randn(3, 5)), oracle.randn(3, 5, seed=1)
    loss = fe.nll(x_hat, x, likelihood="laplace", reduction="none")
    registered = operators.nll(x_hat[:, None], x[:, None], None, None, None, "laplace", "identity", 0.0, False, 1.0, 0.0)[:, 0]
    assert torch.equal(loss, registered)
    for mine, right in zip(*(oracle.grads(t.sum(), [x_hat]) for t in (loss, registered)), strict=True):
        assert torch.equal(mine, right)


def _detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)
