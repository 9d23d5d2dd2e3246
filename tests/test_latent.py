"""``rsample_kl``, ``reparameterize`` and ``kl_divergence``: values and gradients."""

from __future__ import annotations

import oracle
import pytest
import torch
from tolerances import FLOATS, compute
from torch.distributions import Normal, kl_divergence

import fused_elbo as fe
from fused_elbo import reference
from fused_elbo.accuracy import NOISE, SUM_ULPS

SHAPES = ((4, 6), (3, 5, 2, 3), (7, 1), (5,), (1, 1), (2, 131), (4, 64))
SEED = 20


def posterior(shape, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(oracle.randn(*shape, seed=s, dtype=dtype, device=device) for s in (1, 2))


def packed(shape, chunk_dim, dtype, device) -> torch.Tensor:
    return torch.cat(posterior(shape, dtype, device), chunk_dim)


def eager(mu, logvar, eps):
    return oracle.reparameterize(mu, logvar, eps), oracle.kl_divergence(mu, logvar)


def check_gradients(function, inputs, interpreted, second=True):
    # The fast mode compares random projections: two evaluations a case in place of two an element.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=interpreted)
    if second:
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_envelope(backend, device, dtype, shape):
    mu, logvar = posterior(shape, dtype, device)
    eps, g_z = (oracle.randn(*shape, seed=s, dtype=dtype, device=device) for s in (3, 4))
    g_kl = oracle.randn(shape[0], seed=5, device=device)
    inputs = (mu, logvar, eps)
    exact, exact_g = oracle.with_gradients(eager, inputs, (g_z.double(), g_kl.double()), torch.float64)
    other, other_g = oracle.with_gradients(eager, inputs, (g_z, g_kl))
    ours, ours_g = oracle.with_gradients(lambda m, v, e: tuple(fe.rsample_kl(m, v, eps=e)), inputs, (g_z, g_kl))

    assert ours[0].dtype == dtype
    assert ours[1].dtype == compute(dtype)
    sigma = (0.5 * logvar.double()).exp()
    c = g_kl.double().reshape(-1, *[1] * (len(shape) - 1))
    spread = (eps.double() * sigma).abs()
    terms = {
        "z": mu.double().abs() + spread,
        "kl": None,
        "mu": g_z.double().abs() + (c * mu.double()).abs(),
        "logvar": 0.5 * (g_z.double() * spread).abs() + 0.5 * (c * torch.expm1(logvar.double())).abs(),
        "eps": None,
    }
    if dtype == torch.float64:
        # The oracle is rounded as well, and it adds 1 and exp(logvar) before they cancel.
        terms["kl"] = 0.5 * oracle.row_sum(1 + logvar.abs() + mu**2 + logvar.exp())
        terms["logvar"] = terms["logvar"] + c.abs() * (1 + logvar.exp())
    results = zip(terms, ours + ours_g, exact + exact_g, other + other_g, strict=True)
    for name, mine, right, theirs in results:
        ulps = SUM_ULPS if name == "kl" else None
        oracle.assert_envelope(mine, right, theirs, ulps=ulps, terms=terms[name], what=name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk_dim", [1, 2, -1])
def test_packed_moments(backend, device, dtype, chunk_dim):
    shape = (3, 4, 2, 5)
    moments = packed(shape, chunk_dim, dtype, device)
    g_z = oracle.randn(*shape, seed=4, dtype=dtype, device=device)
    g_kl = oracle.randn(shape[0], seed=5, device=device)
    ours, (gradient,) = oracle.with_gradients(
        lambda m: tuple(fe.rsample_kl(m, chunk_dim=chunk_dim, seed=SEED)), [moments], (g_z, g_kl)
    )
    halves = [t.contiguous() for t in moments.chunk(2, chunk_dim)]
    apart, apart_g = oracle.with_gradients(lambda m, v: tuple(fe.rsample_kl(m, v, seed=SEED)), halves, (g_z, g_kl))
    assert torch.equal(ours[0], apart[0])
    torch.testing.assert_close(ours[1], apart[1], rtol=1e-6, atol=0)
    assert torch.equal(gradient, torch.cat(apart_g, chunk_dim))
    assert torch.equal(fe.reparameterize(moments, chunk_dim=chunk_dim, seed=SEED), ours[0])
    kl = fe.kl_divergence(moments, chunk_dim=chunk_dim, reduction="none")
    torch.testing.assert_close(kl, ours[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeded_sample_and_its_gradient(backend, device, dtype):
    mu, logvar = posterior((3, 11), dtype, device)
    eps = reference.noise(torch.tensor(SEED), mu.shape, dtype=torch.float64, first_index=3, offset=1).to(device)
    g_z = oracle.randn(3, 11, seed=4, dtype=dtype, device=device)
    (z,), (g_mu, g_logvar) = oracle.with_gradients(
        lambda m, v: fe.reparameterize(m, v, seed=SEED, first_index=3, offset=1), (mu, logvar), (g_z,)
    )
    (exact,), (right_mu, right_logvar) = oracle.with_gradients(
        lambda m, v: oracle.reparameterize(m, v, eps), (mu, logvar), (g_z.double(),), torch.float64
    )
    bound = 8 * NOISE[dtype]
    torch.testing.assert_close(z.double(), exact, rtol=bound, atol=bound)
    torch.testing.assert_close(g_logvar.double(), right_logvar, rtol=bound, atol=bound)
    assert torch.equal(g_mu, g_z)
    torch.testing.assert_close(g_mu.double(), right_mu)


@pytest.mark.parametrize("options", [{"seed": SEED}, {"seed": SEED, "first_index": 3, "offset": 2}], ids=("seed", "shard"))
def test_gradcheck_rsample_kl(backend, device, interpreted, options):
    inputs = [oracle.leaf(t) for t in posterior((2, 3), torch.float64, device)]
    check_gradients(lambda m, v: tuple(fe.rsample_kl(m, v, **options)), inputs, interpreted)


def test_gradcheck_per_sample_seeds(backend, device, interpreted):
    seeds = torch.tensor([4, -7], device=device)
    inputs = [oracle.leaf(t) for t in posterior((2, 3), torch.float64, device)]
    check_gradients(lambda m, v: tuple(fe.rsample_kl(m, v, seed=seeds)), inputs, interpreted)


def test_gradcheck_reparameterize(backend, device, interpreted):
    inputs = [oracle.leaf(t) for t in posterior((2, 3), torch.float64, device)]
    check_gradients(lambda m, v: fe.reparameterize(m, v, seed=SEED), inputs, interpreted)
    eps = oracle.leaf(oracle.randn(2, 3, seed=9, dtype=torch.float64, device=device))
    check_gradients(lambda m, v, e: fe.reparameterize(m, v, eps=e), [*inputs, eps], interpreted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_kl_divergence(backend, device, interpreted, reduction):
    inputs = [oracle.leaf(t) for t in posterior((3, 2), torch.float64, device)]
    check_gradients(lambda m, v: fe.kl_divergence(m, v, reduction=reduction), inputs, interpreted)


@pytest.mark.parametrize("chunk_dim", [1, 2, -1])
def test_gradcheck_packed(backend, device, interpreted, chunk_dim):
    moments = oracle.leaf(packed((2, 2, 2), chunk_dim, torch.float64, device))
    check_gradients(lambda m: tuple(fe.rsample_kl(m, chunk_dim=chunk_dim, seed=SEED)), [moments], interpreted)


def test_agrees_with_torch_distributions(backend, device):
    mu, logvar = posterior((4, 3, 2), torch.float64, device)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    torch.testing.assert_close(fe.kl_divergence(mu, logvar, reduction="none"), expected.sum((1, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fe.rsample_kl(mu, logvar).kl, expected.sum((1, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(backend, device, reduction):
    mu, logvar = posterior((5, 3), torch.float64, device)
    expected = oracle.reduce(oracle.kl_divergence(mu, logvar), reduction)
    torch.testing.assert_close(fe.kl_divergence(mu, logvar, reduction=reduction), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_a_sample(backend, device, dtype):
    inputs = posterior((3, 4), dtype, device)
    g_z = oracle.randn(3, 4, seed=4, dtype=dtype, device=device)
    g_kl = oracle.randn(3, seed=5, device=device)
    (z, kl), (g_mu, g_logvar) = oracle.with_gradients(
        lambda m, v: tuple(fe.rsample_kl(m, v, sample=False)), inputs, (g_z, g_kl)
    )
    assert torch.equal(z, inputs[0])
    assert torch.equal(fe.reparameterize(*inputs, sample=False), inputs[0])
    torch.testing.assert_close(kl, fe.rsample_kl(*inputs).kl, rtol=1e-6, atol=0)
    (_, right_kl), right = oracle.with_gradients(
        lambda m, v: (m * 1, oracle.kl_divergence(m, v)), inputs, (g_z.double(), g_kl.double()), torch.float64
    )
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(kl.double(), right_kl, rtol=1e-6, atol=0)
    torch.testing.assert_close(g_mu.double(), right[0], rtol=rtol, atol=rtol)
    torch.testing.assert_close(g_logvar.double(), right[1], rtol=rtol, atol=rtol)
    moments = torch.cat(inputs, 1)
    assert torch.equal(fe.rsample_kl(moments, chunk_dim=1, sample=False).z, inputs[0])


@pytest.mark.parametrize("which", ["z", "kl"])
def test_one_output_alone(backend, device, which):
    mu, logvar = (oracle.leaf(t) for t in posterior((3, 5), torch.float32, device))
    found = oracle.grads(getattr(fe.rsample_kl(mu, logvar, seed=SEED), which).sum(), [mu, logvar])
    if which == "kl":
        expected = (mu, 0.5 * torch.expm1(logvar))
    else:
        z = fe.reparameterize(mu, logvar, seed=SEED)
        expected = (torch.ones_like(mu), 0.5 * (z - mu))
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float32)],
    ids=str,
)
def test_mixed_dtypes(backend, device, dtypes):
    mu = oracle.randn(3, 5, seed=1, dtype=dtypes[0], device=device)
    logvar = oracle.randn(3, 5, seed=2, dtype=dtypes[1], device=device)
    eps = oracle.randn(3, 5, seed=3, dtype=torch.float16, device=device)
    upstream = (oracle.randn(3, 5, seed=4, dtype=dtypes[0], device=device), torch.ones(3, device=device))
    ours, ours_g = oracle.with_gradients(lambda m, v: tuple(fe.rsample_kl(m, v, eps=eps)), (mu, logvar), upstream)
    exact, exact_g = oracle.with_gradients(
        lambda m, v: eager(m, v, eps.double()), (mu, logvar), [g.double() for g in upstream], torch.float64
    )
    assert [t.dtype for t in ours] == [dtypes[0], torch.float64 if torch.float64 in dtypes else torch.float32]
    assert [t.dtype for t in ours_g] == list(dtypes)
    for mine, right in zip(ours + ours_g, exact + exact_g, strict=True):
        bound = 4 * max(torch.finfo(mine.dtype).eps, 1e-7)
        torch.testing.assert_close(mine.double(), right, rtol=bound, atol=bound)


def test_z_is_laid_out_like_mu(backend, device):
    mu, logvar = posterior((2, 3, 4, 5), torch.float32, device)
    for layout in (torch.channels_last, torch.contiguous_format):
        z = fe.reparameterize(mu.contiguous(memory_format=layout), logvar, seed=SEED)
        assert z.is_contiguous(memory_format=layout)
    assert fe.reparameterize(mu.permute(3, 0, 1, 2), logvar.permute(3, 0, 1, 2), seed=SEED).stride() == (1, 60, 20, 5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, device, mode):
    mu, logvar = (oracle.leaf(t) for t in posterior((3, 5), torch.float32, device))
    expected = fe.rsample_kl(mu, logvar, seed=SEED)
    with mode():
        found = fe.rsample_kl(mu, logvar, seed=SEED)
        assert torch.equal(fe.kl_divergence(mu, logvar, reduction="none"), found.kl)
    assert not found.z.requires_grad
    assert not found.kl.requires_grad
    assert torch.equal(found.z, expected.z)
    assert torch.equal(found.kl, expected.kl)


@pytest.mark.parametrize("shape", [(0, 4), (0,), (3, 0), (0, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("source", ["seed", "eps"])
def test_empty(backend, device, shape, source):
    mu, logvar = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
    z, kl = fe.rsample_kl(mu, logvar, **{source: 0 if source == "seed" else torch.empty(shape, device=device)})
    assert z.shape == shape
    assert torch.equal(kl, torch.zeros(shape[0], device=device))
    for gradient in oracle.grads(z.sum() + kl.sum(), [mu, logvar]):
        assert gradient.shape == shape
    assert fe.kl_divergence(mu, logvar, reduction="sum").item() == 0
    mean = fe.kl_divergence(mu, logvar)
    assert mean.isnan() if shape[0] == 0 else mean == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
@pytest.mark.parametrize("where", ["mu", "logvar"])
def test_bad_values_stay_in_their_sample(backend, device, bad, where):
    def terms(spoil: bool):
        inputs = dict(zip(("mu", "logvar"), posterior((3, 5), torch.float32, device), strict=True))
        if spoil:
            inputs[where][1, 2] = bad
        mu, logvar = (oracle.leaf(t) for t in inputs.values())
        z, kl = fe.rsample_kl(mu, logvar, seed=SEED)
        return z, kl, *oracle.grads(z.sum() + kl.sum(), [mu, logvar])

    good, spoiled = terms(False), terms(True)
    others = torch.arange(5, device=device) != 2
    for before, after in zip(good, spoiled, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        if before.dim() == 2:
            assert torch.equal(before[1, others], after[1, others])
    assert not spoiled[1][1].isfinite() or abs(bad) < torch.inf
    if bad == bad and abs(bad) < torch.inf:
        huge = spoiled[1][1]
        # |1e30|^2 / 2 and exp(1e30) are beyond float32; -(-1e30) / 2 is not.
        assert huge == 5e29 if (where, bad) == ("logvar", -1e30) else huge == torch.inf
    if bad != bad:
        assert spoiled[0][1, 2].isnan()
        assert spoiled[1][1].isnan()
