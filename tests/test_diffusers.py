"""The distribution of ``fused_elbo.integrations.diffusers`` against the package's own."""

from __future__ import annotations

import oracle
import pytest
import torch

from fused_elbo.integrations import diffusers as fe_diffusers
from fused_elbo.integrations.diffusers import DiagonalGaussianDistribution

pytestmark = pytest.mark.usefixtures("one_thread")

N = 3
IMAGES, VIDEOS, SOUNDS = (N, 6, 5, 7), (N, 6, 3, 5, 7), (N, 6, 11)


def moments(*shape: int, seed: int = 0) -> torch.Tensor:
    """With log-variances on both sides of the bounds."""
    packed = oracle.randn(*shape, seed=seed, dtype=torch.float64)
    packed[:, shape[1] // 2 :] *= 12
    return packed


def assert_same(ours, theirs, packed) -> None:
    """The same numbers and the same gradients, of functions of distributions over ``packed``."""
    values = []
    for function in (ours, theirs):
        leaves = [oracle.leaf(t) for t in packed]
        found = function(*leaves)
        weights = [oracle.randn(*t.shape, seed=k, dtype=t.dtype) for k, t in enumerate(found)]
        grads = oracle.grads(found, leaves, weights, allow_unused=True)
        values.append([*found, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))])
    for mine, other in zip(*values, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-9)


LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d, 3: torch.contiguous_format}


@pytest.mark.parametrize("shape", [IMAGES, VIDEOS, SOUNDS], ids=str)
def test_sample_and_attributes_are_the_originals(original, shape):
    eps = torch.randn(N, 3, *shape[2:], generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def attributes(q, **source):
        return [q.sample(**source), q.mode(), q.mean, q.logvar, q.std, q.var]

    assert_same(
        lambda p: attributes(DiagonalGaussianDistribution(p), eps=eps),
        lambda p: attributes(original(p), generator=torch.Generator().manual_seed(5)),
        [moments(*shape).contiguous(memory_format=LAYOUTS[len(shape)])],
    )


@pytest.mark.parametrize("shape", [IMAGES, VIDEOS], ids=str)
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("other_is_ours", [False, True])
def test_terms_are_the_originals(original, shape, compat, other_is_ours):
    """The original leaves the last dimension of a video; without ``compat`` it is summed too."""
    from diffusers.models.autoencoders import vae

    x = oracle.randn(N, 3, *shape[2:], seed=2, dtype=torch.float64)

    def terms(p, q):
        return [p.kl(), p.kl(q), p.nll(x)]

    def ours(p, q):
        with fe_diffusers.patched(compat=compat):
            p = vae.DiagonalGaussianDistribution(p)
        return terms(p, DiagonalGaussianDistribution(q) if other_is_ours else original(q))

    def theirs(p, q):
        found = terms(original(p), original(q))
        assert all(t.shape == ((N,) if shape == IMAGES else (N, 7)) for t in found)
        return found if compat else [t.reshape(N, -1).sum(1) for t in found]

    assert_same(ours, theirs, [moments(*shape), moments(*shape, seed=1)])


@pytest.mark.parametrize("dims", [(1, 2, 3), [0, 1, -1], (0, 1, 2, 3)])
def test_nll_over_chosen_dimensions(original, dims):
    x = oracle.randn(N, 3, 5, 7, seed=2, dtype=torch.float64)
    both = (lambda p, make=make: [make(p).nll(x, dims)] for make in (DiagonalGaussianDistribution, original))
    assert_same(*both, [moments(*IMAGES)])


def test_a_deterministic_distribution_is_its_mean(original):
    packed = moments(*IMAGES)
    ours, theirs = (make(packed, deterministic=True) for make in (DiagonalGaussianDistribution, original))
    for name in ("std", "var", "mean"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.sample(), theirs.sample())
    assert torch.equal(ours.kl(), theirs.kl())
    assert torch.equal(ours.nll(packed[:, :3]), theirs.nll(packed[:, :3]))
    with pytest.raises(ValueError, match=r"^other: got a deterministic distribution, takes"):
        DiagonalGaussianDistribution(packed).kl(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sample_has_the_dtype_of_the_parameters_and_terms_do_not_lose_by_it(dtype):
    packed = oracle.randn(2, 4, 16, 16).to(dtype)
    q = DiagonalGaussianDistribution(packed)
    assert q.sample().dtype == q.std.dtype == q.mean.dtype == dtype
    exact = DiagonalGaussianDistribution(packed.double()).kl()
    torch.testing.assert_close(q.kl().double(), exact, rtol=1e-6, atol=0)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_a_list_of_generators_is_one_for_each_sample():
    packed = moments(*VIDEOS)
    z = DiagonalGaussianDistribution(packed).sample(generators(N))
    for n, generator in enumerate(generators(N)):
        assert torch.equal(z[n : n + 1], DiagonalGaussianDistribution(packed[n : n + 1]).sample([generator]))
    whole = DiagonalGaussianDistribution(packed).sample(generators(1)[0])
    assert torch.equal(whole, DiagonalGaussianDistribution(packed).sample(generators(1)))
    assert not torch.equal(whole, DiagonalGaussianDistribution(packed).sample(generators(2)[1]))
    with pytest.raises(ValueError, match=r"^generator: got a list of 2, takes one for each of 3 samples"):
        DiagonalGaussianDistribution(packed).sample(generators(2))


def test_each_sample_is_new_and_a_seed_repeats_it():
    q = DiagonalGaussianDistribution(moments(*IMAGES))
    torch.manual_seed(0)
    first, second = q.sample(), q.sample()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, q.sample())


@pytest.mark.parametrize("shape", [(3,), (3, 5, 4, 4)])
def test_parameters_that_are_no_moments(shape):
    with pytest.raises(ValueError, match=r"^parameters: got shape \(3,.*takes \(N, 2 C, \.\.\.\)"):
        DiagonalGaussianDistribution(torch.zeros(shape))


def test_a_kl_that_no_sample_brought_costs_a_pass_of_its_own(calls):
    packed = oracle.leaf(moments(*IMAGES))
    q = DiagonalGaussianDistribution(packed)
    expected = q.kl().detach()
    q.sample()
    q.sample()
    assert calls == ["posterior"] * 3
    with torch.no_grad():
        assert torch.equal(q.kl(), expected)
        assert not q.kl().requires_grad
    shared = q.kl()
    assert torch.equal(shared, expected)
    assert calls == ["posterior"] * 3
    shared.sum().backward()
    # Its graph is freed now, so the next one is another.
    q.kl().sum().backward()
    assert calls == ["posterior"] * 3 + ["posterior_backward", "posterior", "posterior_backward"]


def test_a_kept_graph_gives_the_same_bits_twice(calls):
    packed = oracle.leaf(moments(*IMAGES))
    q = DiagonalGaussianDistribution(packed)
    loss = q.sample().sum() + q.kl().sum()
    first, second = (torch.autograd.grad(loss, packed, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert calls == ["posterior", *["posterior_backward"] * 2]


@pytest.mark.parametrize("compat", [False, True])
def test_a_kl_is_never_that_of_other_parameters_nor_of_a_freed_graph(original, compat):
    packed = oracle.leaf(moments(*VIDEOS))
    with fe_diffusers.patched(compat=compat):
        from diffusers.models.autoencoders import vae

        make = vae.DiagonalGaussianDistribution
    q = make(packed)
    q.sample().sum().backward()
    first, packed.grad = packed.grad, None
    q.kl().sum().backward()
    assert packed.grad.isfinite().all()
    assert not torch.equal(first, packed.grad)
    with torch.no_grad():
        q = make(packed)
        q.sample()
    q.kl().sum().backward()
    q = make(packed)
    q.sample()
    with torch.no_grad():
        packed.mul_(0.5)
    torch.testing.assert_close(q.kl().sum(), original(packed).kl().sum(), rtol=1e-12, atol=0)
    with torch.inference_mode():
        q = make(packed * 1)
        assert q.sample().isfinite().all()
        assert torch.equal(q.kl(), q.kl())


def test_inside_a_compiled_graph():
    packed = moments(*IMAGES)

    def step(t):
        q = DiagonalGaussianDistribution(t)
        return q.sample(), q.kl(), q.std

    torch.manual_seed(0)
    eager = step(packed)
    torch.manual_seed(0)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(packed)
    for mine, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
