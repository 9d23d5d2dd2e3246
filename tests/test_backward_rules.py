"""What a backward pass must get right beside the formula: upstream gradients of any value and layout, kept graphs, subsets
of the inputs, reproducibility."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from forms import FORMS, SEED, assert_close, elbo, exact_gradients, inputs_of, leaves_of
from tolerances import FLOATS
from torch.utils.checkpoint import checkpoint

import fused_elbo as fe


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("upstream", [1.0, 3.7, 0.0, -2.0])
def test_upstream_value(backend, device, form, reduction, dtype, upstream):
    inputs = inputs_of(form, device, dtype)
    leaves = leaves_of(inputs)
    (elbo(form, leaves, reduction=reduction, beta=0.5).loss * upstream).backward()
    right = exact_gradients(form, inputs, upstream, reduction=reduction, beta=0.5)
    assert_close([t.grad for t in leaves.values()], right, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape",
    [
        lambda g: g,
        lambda g: torch.stack((g, -g), 1)[:, 0],
        lambda g: g[:1].expand(3),
        lambda g: torch.cat((g.new_full((5,), torch.nan), g))[5:],
        lambda g: g.double(),
    ],
    ids=("contiguous", "strided", "expanded", "offset", "float64"),
)
def test_upstream_of_reduction_none(backend, device, form, shape):
    inputs = inputs_of(form, device)
    leaves = leaves_of(inputs)
    upstream = shape(oracle.randn(3, seed=9, device=device))
    loss = elbo(form, leaves, reduction="none", beta=0.5).loss
    # A float64 upstream arrives through the cast that made the loss float64.
    found = oracle.grads(loss.to(upstream.dtype), list(leaves.values()), upstream)
    assert_close(found, exact_gradients(form, inputs, upstream, reduction="none", beta=0.5))


@pytest.mark.parametrize("consumer", ["sum", "mean", "expand", "weighted", "slice", "cat", "index"])
@pytest.mark.parametrize("term", ["loss", "nll", "kl"])
def test_consumers_of_the_terms(backend, device, consumer, term):
    def use(t):
        return {
            "sum": lambda: t.sum(),
            "mean": lambda: t.mean(),
            "expand": lambda: (t.expand(4, 3) * torch.arange(12.0, device=device).reshape(4, 3)).sum(),
            "weighted": lambda: t @ torch.arange(3.0, device=device).to(t.dtype),
            "slice": lambda: t[::2].sum() * 2,
            "cat": lambda: (torch.cat((t, t * 2)) * torch.arange(6.0, device=device)).sum(),
            "index": lambda: t[1],
        }[consumer]()

    inputs = inputs_of("classic", device)
    leaves, wide = leaves_of(inputs), [oracle.leaf(t.double()) for t in inputs.values()]
    found = oracle.grads(
        use(getattr(elbo("classic", leaves, reduction="none"), term)), list(leaves.values()), allow_unused=True
    )
    exact = dict(zip(("loss", "nll", "kl"), oracle.elbo(*wide, reduction="none"), strict=True))[term]
    right = oracle.grads(use(exact), wide, allow_unused=True)
    for mine, true in zip(found, right, strict=True):
        if true is None:
            assert mine is None or not mine.any()
        else:
            assert_close([mine], [true])


@pytest.mark.parametrize("consumer", ["cat", "transpose", "expand", "slice", "flip", "channels_last", "double_use"])
def test_upstream_of_z(backend, device, consumer):
    shape = (3, 4, 2, 5)
    inputs = [oracle.randn(*shape, seed=s, device=device) for s in (1, 2)]
    eps = oracle.randn(*shape, seed=3, device=device)
    weight = oracle.randn(3 * 4 * 2 * 5 * 2, seed=4, device=device).double()

    def use(z):
        w = weight.to(z.dtype)
        return {
            "cat": lambda: (torch.cat((torch.ones_like(z), z), 1) * w.reshape(3, 8, 2, 5)).sum(),
            "transpose": lambda: (z.transpose(1, 3) * w[:120].reshape(3, 5, 2, 4)).sum(),
            "expand": lambda: z.sum(),
            "slice": lambda: (z[:, 1:3, :, ::2] * w[:36].reshape(3, 2, 2, 3)).sum(),
            "flip": lambda: (z.permute(3, 2, 1, 0).flip(0) * w[:120].reshape(5, 2, 4, 3)).sum(),
            "channels_last": lambda: (z * w[:120].reshape(shape).contiguous(memory_format=torch.channels_last)).sum(),
            "double_use": lambda: (z * w[:120].reshape(shape)).sum() + (z[:, 0] * 2).sum(),
        }[consumer]()

    leaves, wide = [oracle.leaf(t) for t in inputs], [oracle.leaf(t.double()) for t in inputs]
    z, kl = fe.rsample_kl(*leaves, eps=eps)
    found = oracle.grads(use(z) + kl.sum(), leaves)
    exact = use(oracle.reparameterize(*wide, eps.double())) + oracle.kl_divergence(*wide).sum()
    assert_close(found, oracle.grads(exact, wide))


@pytest.mark.parametrize(
    "g_z",
    [
        lambda t: torch.cat((t, t), 1)[:, 3:6],
        lambda t: t.t().contiguous().t(),
        lambda t: t[:1].expand(4, 3),
        lambda t: t[:, :1].expand(4, 3),
        lambda t: t[:1, :1].expand(4, 3),
        lambda t: torch.stack((t, t), -1)[..., 1],
    ],
    ids=("cat", "transposed", "expand_batch", "expand_latent", "expand_both", "every_other"),
)
@pytest.mark.parametrize(
    "g_kl",
    [lambda t: t[:1].expand(4), lambda t: torch.stack((t, -t), 1)[:, 0], lambda t: None],
    ids=("expand", "strided", "none"),
)
def test_upstream_strides_of_the_latent(backend, device, g_z, g_kl):
    inputs = [oracle.randn(4, 3, seed=s, device=device) for s in (1, 2)]
    eps = oracle.randn(4, 3, seed=3, device=device)
    g_z = g_z(oracle.randn(4, 3, seed=4, device=device))
    g_kl = g_kl(oracle.randn(4, seed=5, device=device))
    upstream = (g_z, g_kl)
    _, found = oracle.with_gradients(lambda m, v: tuple(fe.rsample_kl(m, v, eps=eps)), inputs, upstream)
    _, right = oracle.with_gradients(
        lambda m, v: (oracle.reparameterize(m, v, eps.double()), oracle.kl_divergence(m, v)), inputs, upstream, torch.float64
    )
    assert_close(found, right)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_subset_of_inputs(backend, device, form, reduction):
    inputs = inputs_of(form, device)
    upstream = torch.tensor(-1.7, device=device) if reduction == "mean" else oracle.randn(3, seed=9, device=device)

    def gradients(names):
        leaves = {n: oracle.leaf(t) if n in names else t.clone() for n, t in inputs.items()}
        elbo(form, leaves, reduction=reduction, beta=0.5).loss.backward(upstream)
        return {n: t.grad for n, t in leaves.items()}

    full = gradients(tuple(inputs))
    for size in range(1, len(inputs)):
        for names in itertools.combinations(inputs, size):
            for name, gradient in gradients(names).items():
                assert torch.equal(gradient, full[name]) if name in names else gradient is None


@pytest.mark.parametrize("names", [("mu",), ("logvar",), ("eps",), ("mu", "eps"), ("logvar", "eps")], ids=str)
def test_every_subset_of_latents(backend, device, names):
    inputs = {name: oracle.randn(3, 5, seed=s, device=device) for s, name in enumerate(("mu", "logvar", "eps"))}

    def gradients(names):
        leaves = {n: oracle.leaf(t) if n in names else t.clone() for n, t in inputs.items()}
        z, kl = fe.rsample_kl(**leaves)
        (z.sum() * 2 + kl.sum()).backward()
        return {n: t.grad for n, t in leaves.items()}

    full = gradients(tuple(inputs))
    for name, gradient in gradients(names).items():
        assert torch.equal(gradient, full[name]) if name in names else gradient is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_kept_graph(backend, device, form, reduction, dtype):
    inputs = inputs_of(form, device, dtype)
    leaves = leaves_of(inputs)
    loss = elbo(form, leaves, reduction=reduction).loss
    upstreams = [
        u if reduction == "mean" else u * oracle.randn(3, seed=9, device=device).to(loss.dtype) for u in (2.5, 2.5, 1, -3)
    ]
    upstreams = [torch.as_tensor(u, dtype=loss.dtype, device=device) for u in upstreams]
    rounds = []
    for i, upstream in enumerate(upstreams):
        found = oracle.grads(loss, list(leaves.values()), upstream, retain_graph=i < len(upstreams) - 1)
        assert_close(found, exact_gradients(form, inputs, upstream, reduction=reduction), dtype)
        rounds.append([g.clone() for g in found])
        if i < len(upstreams) - 1:
            # What was handed out is the caller's: nothing of the next pass may lie in it.
            for g in found:
                if 0 not in g.stride():
                    g.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(rounds[0], rounds[1], strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        oracle.grads(loss, list(leaves.values()), upstreams[0])


def test_kept_graph_of_the_latent(backend, device):
    mu, logvar = (oracle.leaf(oracle.randn(3, 5, seed=s, device=device)) for s in (1, 2))
    z, kl = fe.rsample_kl(mu, logvar, seed=SEED)
    total = (z * oracle.randn(3, 5, seed=3, device=device)).sum() + kl.sum()
    first = [g.clone() for g in oracle.grads(total, [mu, logvar], retain_graph=True)]
    for g in oracle.grads(total, [mu, logvar], retain_graph=True):
        g.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(first, oracle.grads(total, [mu, logvar]), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        oracle.grads(total, [mu, logvar])


@pytest.mark.parametrize("dtype", FLOATS)
def test_adaptive_weight(backend, device, dtype):
    """Latent diffusion's: the NLL's gradient at the last layer, twice, then the whole loss."""
    hidden, x = (oracle.randn(3, 4, seed=s, dtype=dtype, device=device) for s in (1, 2))
    last = oracle.leaf(oracle.randn(4, 4, seed=3, dtype=dtype, device=device))
    x_hat = hidden @ last
    nll = fe.gaussian_nll(x_hat, x)
    seen = []
    for _ in range(2):
        (g_x_hat,) = oracle.grads(nll, [x_hat], retain_graph=True)
        (g_last,) = oracle.grads(nll, [last], retain_graph=True)
        seen.append((g_x_hat.clone(), g_last.clone()))
        g_x_hat.mul_(1e4)
        g_last.zero_()
    (2 * nll).backward()
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
    assert_close([seen[0][0]], [(x_hat.detach().double() - x.double()) / 3], dtype)
    torch.testing.assert_close(last.grad, 2 * seen[0][1], rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", FORMS)
def test_runs_are_equal_to_the_bit(backend, device, form):
    inputs = inputs_of(form, device)
    runs = []
    for _ in range(3):
        leaves = leaves_of(inputs)
        out = elbo(form, leaves)
        runs.append([*out, *oracle.grads(out.loss, list(leaves.values()))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_long_runs_are_equal_to_the_bit(backend, device):
    # Several programs share a sample here, so that the order of their sums shows.
    x_hat, x = (oracle.randn(2, 20011, seed=s, device=device) for s in (1, 2))
    runs = [(fe.elbo_loss(x_hat, x, x, x_hat), fe.rsample_kl(x, x_hat, seed=SEED)) for _ in range(3)]
    for out, sample in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip((*out, *sample), (*runs[0][0], *runs[0][1]), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("upstream", [0.25, 1.0, -3.0])
def test_grad_scale(backend, device, form, dtype, kind, upstream):
    inputs = inputs_of(form, device, dtype)
    leaves = leaves_of(inputs)
    scale = 0.25 if kind == "float" else torch.tensor(0.25, device=device)
    out = elbo(form, leaves, grad_scale=scale)
    assert torch.equal(out.loss, elbo(form, leaves).loss)
    found = oracle.grads(out.loss, list(leaves.values()), torch.tensor(upstream, dtype=out.loss.dtype, device=device))
    assert_close(found, exact_gradients(form, inputs, upstream), dtype)


@pytest.mark.parametrize("grad_scale", [1.0, 65536.0])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_float16_does_not_underflow(backend, device, form, kept, grad_scale):
    """Gradients of 1e-8 are nothing in float16; times the 65536 of a GradScaler they are not."""
    dtype, upstream = torch.float16, 65536.0
    inputs = inputs_of(form, device, dtype, scale=0.01)
    inputs["x"] = inputs["x_hat"] + inputs["x"]
    options = {"sigma": 30.0, "beta": 1e-3}
    leaves = leaves_of(inputs)
    loss = elbo(form, leaves, grad_scale=grad_scale, **options).loss
    found = oracle.grads(loss, list(leaves.values()), torch.tensor(upstream, device=device), retain_graph=kept)
    right = exact_gradients(form, inputs, upstream, **options)
    for name, mine, true in zip(inputs, found, right, strict=True):
        oracle.assert_envelope(mine, true, true.to(dtype), what=f"gradient of {name}")


@pytest.mark.parametrize("seed", [None, SEED])
def test_checkpoint(backend, device, seed):
    mu, logvar = (oracle.leaf(oracle.randn(3, 4, seed=s, device=device)) for s in (1, 2))
    x = oracle.randn(3, 4, seed=3, device=device)

    def block(m, v):
        z, kl = fe.rsample_kl(m, v, seed=seed)
        return fe.elbo_loss(torch.tanh(z), x, kl=kl).loss

    found = []
    for run in (block, lambda m, v: checkpoint(block, m, v, use_reentrant=False, preserve_rng_state=True)):
        torch.manual_seed(5)
        loss = run(mu, logvar)
        torch.rand(3)
        found.append([loss, *oracle.grads(loss, [mu, logvar])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_torch_seeds_reproduce_and_advance(backend, device):
    mu, logvar = (oracle.randn(3, 4, seed=s, device=device) for s in (1, 2))
    torch.manual_seed(3)
    first, second = fe.reparameterize(mu, logvar), fe.reparameterize(mu, logvar)
    torch.manual_seed(3)
    again = fe.reparameterize(mu, logvar)
    assert torch.equal(first, again)
    assert not torch.isclose(first, second).any()
    with torch.random.fork_rng(devices=[0] if device.type == "cuda" else []):
        forked = fe.reparameterize(mu, logvar)
    assert torch.equal(forked, fe.reparameterize(mu, logvar))


def state_of_torch(device):
    return (torch.cuda if device.type == "cuda" else torch).get_rng_state()


def test_generator(backend, device):
    mu, logvar = (oracle.randn(3, 4, seed=s, device=device) for s in (1, 2))
    state = state_of_torch(device)
    generators = [torch.Generator(device).manual_seed(s) for s in (7, 7, 8)]
    a, b, c = (fe.reparameterize(mu, logvar, generator=g) for g in generators)
    assert torch.equal(a, b)
    assert not torch.isclose(a, c).any()
    assert not torch.isclose(a, fe.reparameterize(mu, logvar, generator=generators[0])).any()
    assert torch.equal(state_of_torch(device), state)
    assert torch.equal(fe.nn.GaussianLatent(generator=generators[0].manual_seed(7))(mu, logvar).z, a)


def test_backward_does_not_touch_the_generator(backend, device):
    mu, logvar = (oracle.leaf(oracle.randn(3, 4, seed=s, device=device)) for s in (1, 2))
    z, kl = fe.rsample_kl(mu, logvar)
    state = state_of_torch(device)
    (z.sum() + kl.sum()).backward()
    assert torch.equal(state_of_torch(device), state)


def test_backward_runs_on_the_backend_of_the_forward(backend, device, monkeypatch):
    mu, logvar = (oracle.leaf(oracle.randn(3, 4, seed=s, device=device)) for s in (1, 2))
    z, kl = fe.rsample_kl(mu, logvar, seed=SEED)
    other = "reference" if backend == "triton" else "triton"
    with fe.backend(other):
        found = oracle.grads(z.sum() + kl.sum(), [mu, logvar], retain_graph=True)
    expected = oracle.grads(z.sum() + kl.sum(), [mu, logvar])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_accumulation_adds_up(backend, device):
    inputs = inputs_of("classic", device)
    leaves = leaves_of(inputs)
    for _ in range(3):
        (elbo("classic", leaves, grad_scale=1 / 3).loss / 3).backward()
    assert_close([t.grad for t in leaves.values()], exact_gradients("classic", inputs, 1.0))


def test_create_graph_where_one_input_is_computed_from_another(backend, device):
    """First-order gradients with ``create_graph`` are those without, and the second order is eager's."""
    mu0, logvar0, x, eps = (oracle.randn(3, 4, seed=k, dtype=torch.float64, device=device) for k in range(4))

    def fused(mu, logvar):
        z, kl = fe.rsample_kl(mu, torch.sin(mu) + logvar, eps=eps)
        return fe.elbo_loss(torch.tanh(z), x, mu, logvar * mu).loss + (fe.elbo_loss(z * z, x, kl=kl).loss)

    def eager(mu, logvar):
        inner = torch.sin(mu) + logvar
        z, kl = oracle.reparameterize(mu, inner, eps), oracle.kl_divergence(mu, inner)
        return oracle.elbo(torch.tanh(z), x, mu, logvar * mu)[0] + oracle.elbo(z * z, x, kl=kl)[0]

    results = []
    for loss in (fused, eager):
        leaves = [oracle.leaf(mu0), oracle.leaf(logvar0)]
        plain = oracle.grads(loss(*leaves), leaves)
        first = oracle.grads(loss(*leaves), leaves, create_graph=True)
        second = oracle.grads(sum((g**2).sum() for g in first), leaves)
        for a, b in zip(plain, first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        results.append((*first, *second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_create_graph_with_constant_latents(backend, device):
    x_hat = oracle.leaf(oracle.randn(3, 4, device=device))
    mu, logvar, x = (oracle.randn(3, 4, seed=k, device=device) for k in (1, 2, 3))
    out = fe.elbo_loss(x_hat, x, mu, logvar)
    (grad,) = oracle.grads(out.loss + out.kl.sum(), [x_hat], create_graph=True)
    torch.testing.assert_close(grad, (x_hat - x) / 3)
