"""``fused_elbo.distributions``: numbers, gradients, shapes and errors of ``torch.distributions``, in fewer passes."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import oracle
import pytest
import spies
import torch
from documents import blocks
from torch import distributions as td
from torch.distributions import kl_divergence

import fused_elbo as fe
from fused_elbo.distributions import Independent, Normal
from fused_elbo.integrations.diffusers import DiagonalGaussianDistribution

# Shapes of loc and scale, which broadcast.
SHAPES = [((), ()), ((7,), (7,)), ((3, 5), (5,)), ((3, 1, 5), (2, 1)), ((0, 4), (4,)), ((4, 0), (4, 1)), ((2, 3, 1, 5), ())]
TOLERANCES = {"rtol": 1e-12, "atol": 1e-12}


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """A mean and a deviation."""
    loc, scale = (oracle.randn(*s, seed=seed + k, dtype=torch.float64) for k, s in enumerate(shapes))
    return [loc.requires_grad_(), scale.abs().add(0.1).requires_grad_()]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, **TOLERANCES)
    upstream = oracle.randn(*theirs.shape, seed=9, dtype=theirs.dtype)
    grads = [oracle.grads(t, leaves, upstream, allow_unused=True, retain_graph=True) for t in (ours, theirs)]
    for mine, other in zip(*grads, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, **TOLERANCES)


@pytest.fixture
def calls(monkeypatch, device) -> list[str]:
    return spies.counted(monkeypatch, device, (*spies.LATENT, "elbo", "likelihood"))


def divergence_of_events(p: td.Normal, q: td.Normal, count: int) -> torch.Tensor:
    """Torch's own ``Independent`` cannot sum up an empty batch."""
    terms = kl_divergence(p, q)
    return terms.sum(tuple(range(terms.dim() - count, terms.dim()))) if count else terms


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_methods_are_torchs(shapes):
    leaves = parameters(*shapes)
    ours, theirs = Normal(*leaves), td.Normal(*leaves)
    assert (ours.batch_shape, ours.event_shape, ours.has_rsample) == (theirs.batch_shape, theirs.event_shape, True)
    value = oracle.randn(2, *theirs.batch_shape, seed=5, dtype=torch.float64)
    for expression in (lambda d: d.log_prob(value), lambda d: d.cdf(value), lambda d: d.entropy(), lambda d: d.variance):
        assert_same(expression(ours), expression(theirs), leaves)
    expanded = ours.expand((4, *ours.batch_shape))
    assert isinstance(expanded, Normal)
    assert_same(expanded.log_prob(value[:1]), theirs.expand((4, *theirs.batch_shape)).log_prob(value[:1]), leaves)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("sample_shape", [(), (1,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("count", [None, 0, 1])
def test_rsample(shapes, sample_shape, count):
    leaves = parameters(*shapes)
    q = Normal(*leaves)
    if count is not None:
        if len(q.batch_shape) < count:
            with pytest.raises(ValueError, match="Expected reinterpreted_batch_ndims"):
                Independent(q, count)
            return
        q = Independent(q, count)
    torch.manual_seed(3)
    z = q.rsample(sample_shape)
    assert z.shape == q._extended_shape(sample_shape)
    # The noise of the sample, and what its gradients must be.
    eps = ((z - q.mean) / q.variance.sqrt()).detach()
    assert_same(z, leaves[0] + eps * leaves[1], leaves)
    torch.manual_seed(3)
    again = q.sample(sample_shape)
    assert torch.equal(again, z)
    assert not again.requires_grad
    if eps.numel() > 1:
        assert (eps.flatten()[1:] != eps.flatten()[:-1]).all()
        assert not torch.equal(q.rsample(sample_shape), z)
        assert torch.equal(q.rsample(sample_shape, seed=4), q.rsample(sample_shape, seed=4))
        generators = (torch.Generator().manual_seed(4) for _ in range(2))
        assert torch.equal(*(q.rsample(sample_shape, generator=g) for g in generators))


def test_samples_are_the_librarys_stream():
    loc, scale = parameters((3, 5), (3, 5))
    expected = fe.reparameterize(loc, scale, param="std", seed=7, num_samples=6)
    assert torch.equal(Normal(loc, scale).rsample((2, 3), seed=7), expected.view(2, 3, 3, 5))


PAIRS = {
    "ours, ours": (Normal, Normal, Independent, Independent),
    "ours, torch": (Normal, td.Normal, Independent, td.Independent),
    "torch, ours": (td.Normal, Normal, td.Independent, Independent),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("divergence", [kl_divergence, fe.distributions.kl_divergence], ids=["torch", "ours"])
def test_kl(pair, shapes, count, divergence):
    leaves = parameters(*shapes) + parameters(*shapes[::-1], seed=2)
    first, second, outer, other_outer = PAIRS[pair]
    p, q = first(*leaves[:2]), second(*leaves[2:])
    expected = divergence_of_events(td.Normal(*leaves[:2]), td.Normal(*leaves[2:]), min(count, len(p.batch_shape)))
    if count:
        p, q = (make(d, min(count, len(p.batch_shape))) for make, d in ((outer, p), (other_outer, q)))
    assert_same(divergence(p, q), expected, leaves)


def test_kl_inside_torchs_independent():
    leaves = parameters((3, 5), (5,)) + parameters((3, 5), (3, 1), seed=2)
    expected = divergence_of_events(td.Normal(*leaves[:2]), td.Normal(*leaves[2:]), 1)
    p, q = (td.Independent(Normal(*pair), 1) for pair in (leaves[:2], leaves[2:]))
    assert_same(kl_divergence(p, q), expected, leaves)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_kl_from_the_standard_normal_comes_with_the_sample(calls, shapes, count):
    leaves = parameters(*shapes)
    q = Normal(*leaves)
    count = min(count, len(q.batch_shape))
    q = Independent(q, count)
    prior = Independent(Normal(0.0, 1.0).expand(q.base_dist.batch_shape), count)
    expected = divergence_of_events(td.Normal(*leaves), td.Normal(0.0, 1.0), count)
    z = q.rsample()
    assert_same(kl_divergence(q, prior), expected, leaves)
    assert calls == ["posterior", "posterior_backward"]
    again = kl_divergence(q, prior)
    (z.sum() + again.sum()).backward()
    torch.testing.assert_close(again, expected, **TOLERANCES)
    assert calls[2:] == ["posterior", "posterior_backward", "posterior_backward"]


def test_a_sample_without_gradients_leaves_the_kl_its_own():
    q = Independent(Normal(*parameters((3, 5), (3, 5))), 1)
    with torch.no_grad():
        q.rsample()
    assert kl_divergence(q, Independent(Normal(0.0, 1.0).expand((3, 5)), 1)).requires_grad
    q.rsample()
    wide = kl_divergence(q, Independent(Normal(0.0, 1.0).expand((2, 3, 5)), 1))
    assert wide.shape == (2, 3)


def made(kind):
    """A distribution of leaves that has been sampled, and how its KL from the standard normal is asked for."""
    if kind is Independent:
        prior = Independent(Normal(0.0, 1.0).expand((3, 4)), 1)
        q, kl = Independent(Normal(*parameters((3, 4), (3, 4))), 1), lambda q: kl_divergence(q, prior)
    else:
        q, kl = kind(oracle.leaf(oracle.randn(3, 8, dtype=torch.float64))), lambda q: q.kl()
    return q, kl


@pytest.mark.parametrize("kind", [Independent, DiagonalGaussianDistribution])
def test_a_copy_of_what_was_sampled_has_a_graph_of_its_own(kind):
    q, kl = made(kind)
    q.rsample() if kind is Independent else q.sample()
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        leaf = other.base_dist.loc if kind is Independent else other.parameters
        (gradient,) = torch.autograd.grad(kl(other).sum(), leaf)
        torch.testing.assert_close(gradient[:, :4], leaf[:, :4].detach(), **TOLERANCES)


@pytest.mark.parametrize("kind", [Independent, DiagonalGaussianDistribution])
def test_a_kl_that_inference_mode_made_stays_there(kind):
    q, kl = made(kind)
    q = q.expand((3,)) if kind is Independent else q
    with torch.inference_mode():
        q.rsample() if kind is Independent else q.sample()
    assert kl(q).requires_grad


def test_parameters_that_are_replaced_or_overwritten_are_read_anew():
    loc, scale = parameters((3, 4), (3, 4))
    other = loc.detach() + 1
    q, prior = Independent(Normal(loc, scale), 1), Normal(0.0, 1.0).expand((3, 4))
    q.rsample()
    q.base_dist.loc = other
    exact = kl_divergence(td.Normal(other, scale), td.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl_divergence(q, Independent(prior, 1)), exact, **TOLERANCES)
    packed = oracle.randn(3, 8, dtype=torch.float64)
    latents = DiagonalGaussianDistribution(packed)
    latents.sample()
    latents.parameters = 2 * packed
    assert torch.equal(latents.kl(), DiagonalGaussianDistribution(2 * packed).kl())
    exact = kl_divergence(td.Normal(loc, scale), td.Normal(2.0, 1.0))
    prior.loc = torch.full((3, 4), 2.0)
    overwritten = Normal(0.0, 1.0)
    overwritten.loc.fill_(2.0)
    for changed in (prior, overwritten, overwritten.expand((3, 4))):
        torch.testing.assert_close(kl_divergence(Normal(loc, scale), changed), exact, **TOLERANCES)
    decoder = Normal(loc, 0.5)
    decoder.scale = scale
    torch.testing.assert_close(
        Independent(decoder, 1).log_prob(other), td.Normal(loc, scale).log_prob(other).sum(1), **TOLERANCES
    )


SCALES = {"a number": 0.3, "one element": torch.tensor([0.3], dtype=torch.float64), "one for each": None}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("value_shape", ["same", "samples", "fewer"])
@pytest.mark.parametrize("count", [1, 2])
def test_log_prob_of_events(calls, scale, shape, value_shape, count):
    loc, each = parameters(shape, shape)
    given = each if SCALES[scale] is None else SCALES[scale]
    given = oracle.leaf(given) if isinstance(given, torch.Tensor) else given
    leaves = [loc] + [given] * isinstance(given, torch.Tensor)
    count = min(count, len(shape))
    size = {"same": shape, "samples": (4, 2, *shape), "fewer": shape[1:]}[value_shape]
    x = oracle.leaf(oracle.randn(*size, seed=5, dtype=torch.float64))
    expected = td.Independent(td.Normal(loc, given), count).log_prob(x)
    assert_same(Independent(Normal(loc, given), count).log_prob(x), expected, [*leaves, x])
    assert bool(calls) == (scale != "one for each")


def test_terms_of_half_precision_are_float32():
    loc = oracle.randn(64, 300).bfloat16()
    q = Independent(Normal(loc, torch.full_like(loc, 0.5)), 1)
    exact = kl_divergence(td.Normal(loc.double(), 0.5), td.Normal(0.0, 1.0)).sum(1)
    kl = kl_divergence(q, Independent(Normal(0.0, 1.0).expand(loc.shape), 1))
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)
    decoder = Independent(Normal(loc, 0.5), 1)
    expected = td.Normal(loc.double(), 0.5).log_prob(loc.double() + 1).sum(1)
    torch.testing.assert_close(decoder.log_prob(loc.double() + 1), expected, rtol=1e-6, atol=0)
    assert q.rsample().dtype == torch.bfloat16


def test_validation_is_torchs(monkeypatch):
    # The first torch.compile of a process turns it off.
    monkeypatch.setattr(td.Distribution, "_validate_args", True)
    for make in (Normal, td.Normal):
        with pytest.raises(ValueError, match="Expected parameter scale"):
            make(torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]))
        q = make(torch.zeros(3), 1.0)
        outer = Independent if make is Normal else td.Independent
        with pytest.raises(ValueError, match="within the support"):
            outer(q, 1).log_prob(torch.tensor([0.0, math.nan, 0.0]))
        with pytest.raises(ValueError, match="broadcast"):
            outer(q, 1).log_prob(torch.zeros(4))
        unchecked = outer(make(torch.zeros(3), 1.0, validate_args=False), 1)
        assert unchecked.log_prob(torch.tensor([0.0, math.nan, 0.0])).isnan()
        for scale in (0.0, -1.0, math.inf, 1e-160):
            terms = [m(torch.zeros(3), scale, validate_args=False) for m in (make, td.Normal)]
            found, right = outer(terms[0], 1).log_prob(torch.ones(3)), td.Independent(terms[1], 1).log_prob(torch.ones(3))
            torch.testing.assert_close(found, right, equal_nan=True)


def test_other_bases_and_other_events_are_torchs():
    loc, scale = parameters((3, 5), (3, 5))
    laplace = Independent(td.Laplace(loc, scale), 1)
    assert_same(laplace.log_prob(loc + 1), td.Independent(td.Laplace(loc, scale), 1).log_prob(loc + 1), [loc, scale])
    assert laplace.expand((2, 3)).rsample((4,)).shape == (4, 2, 3, 5)
    nested = Independent(Independent(Normal(loc, scale), 1), 1)
    prior = td.Independent(td.Independent(td.Normal(torch.zeros_like(loc), 1.0), 1), 1)
    assert_same(kl_divergence(nested, prior), kl_divergence(td.Normal(loc, scale), td.Normal(0.0, 1.0)).sum(), [loc, scale])
    assert nested.rsample().shape == (3, 5)
    with pytest.raises(NotImplementedError):
        kl_divergence(Independent(Normal(loc, scale), 1), td.Categorical(torch.ones(3)))
    integers = torch.ones(3, 5, dtype=torch.int64)
    assert_same(
        Independent(Normal(loc, 0.5), 1).log_prob(integers), td.Independent(td.Normal(loc, 0.5), 1).log_prob(integers), [loc]
    )


def with_kl(module, divergence, loc, scale):
    q = module.Independent(module.Normal(loc, scale), 1)
    z = q.rsample()
    prior = module.Independent(module.Normal(0.0, 1.0).expand(loc.shape), 1)
    return z, divergence(q, prior), module.Independent(module.Normal(loc, 0.1), 1).log_prob(z)


def with_validation(module, divergence, loc, scale):
    q = module.Normal(loc, scale, validate_args=True)
    return q.rsample(), q.log_prob(loc + 1)


@pytest.mark.parametrize("step", [with_kl, with_validation])
def test_inside_a_compiled_graph_where_torchs_breaks(step):
    if step is with_kl and torch.__version__ < "2.13":
        pytest.skip("torch's own expand cannot be traced there")
    leaves = parameters((3, 5), (3, 5))

    def compiled(module, divergence):
        torch._dynamo.reset()
        td.kl._KL_MEMOIZE.clear()
        return torch.compile(step, fullgraph=True, backend="aot_eager")(module, divergence, *leaves)

    torch.manual_seed(1)
    eager = step(fe.distributions, fe.distributions.kl_divergence, *leaves)
    torch.manual_seed(1)
    for mine, other in zip(compiled(fe.distributions, fe.distributions.kl_divergence), eager, strict=True):
        assert_same(mine, other, leaves)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(td, kl_divergence)


BLOCKS = blocks((Path(__file__).parents[1] / "docs/distributions.md").read_text())


@pytest.fixture
def pyro():
    pyro = pytest.importorskip("pyro")
    pyro.clear_param_store()
    yield pyro
    pyro.clear_param_store()


def test_the_documented_program_is_one_latent_pass_each_way(calls):
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS[0], "distributions.md", "exec"), namespace)
    assert [name for name in calls if "posterior" in name] == ["posterior", "posterior_backward"]
    assert namespace["encoder"].weight.grad.any()


def test_the_documented_pyro_program(pyro, calls):
    assert len(BLOCKS) == 2
    pyro.set_rng_seed(0)
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS[1], "distributions.md", "exec"), namespace)
    assert all(math.isfinite(loss) for loss in namespace["losses"])
    assert namespace["losses"][2] < namespace["losses"][0]
    assert calls.count("posterior") == calls.count("posterior_backward") == 3


def test_pyro_gets_the_numbers_of_its_own_classes(pyro):
    """With the sample given, the two bounds and their gradients are numbers to compare."""
    from pyro import distributions
    from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

    from fused_elbo.integrations import pyro as ours

    x, eps = (oracle.randn(6, 4, seed=k, dtype=torch.float64) for k in range(2))

    def bound(module, loss):
        leaves = parameters((6, 4), (6, 4))

        class Given(module.Normal):
            def rsample(self, sample_shape=()):
                return self.loc + eps * self.scale

        def model(x):
            with pyro.plate("data", 6):
                z = pyro.sample("z", module.Normal(x.new_zeros(()), x.new_ones(())).expand((6, 4)).to_event(1))
                pyro.sample("x", module.Normal(z.tanh(), 0.5).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", 6):
                pyro.sample("z", distributions.Independent(Given(*leaves), 1))

        value = loss().differentiable_loss(model, guide, x)
        return [value.detach(), *oracle.grads(value, leaves)]

    for loss in (Trace_ELBO, TraceMeanField_ELBO):
        for mine, theirs in zip(bound(ours, loss), bound(distributions, loss), strict=True):
            torch.testing.assert_close(mine, theirs, **TOLERANCES)


def test_pyros_events(pyro):
    from fused_elbo.integrations.pyro import Independent, Normal

    q = Normal(torch.zeros(2, 3, 4), 1.0)
    assert isinstance(q.to_event(1).to_event(1), Independent)
    assert q.to_event(1).to_event(1).event_shape == q.to_event(2).event_shape == (3, 4)
    assert q.to_event().batch_shape == ()
    assert q.to_event(2).to_event(-2) is q
    assert isinstance(q.to_event(1).expand((5, 2, 3)), Independent)
    assert isinstance(q.expand_by((5,)).to_event(1).mask(False), torch.distributions.Distribution)
