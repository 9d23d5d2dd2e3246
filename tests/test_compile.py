"""Under ``torch.compile`` and ``torch.export``: no graph break, no recompilation, and the numbers of eager code."""

from __future__ import annotations

import functools

import mpmath
import oracle
import pytest
import spies
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fused_elbo as fe
from fused_elbo import accuracy, ops, routes


class Model(torch.nn.Module):
    def __init__(self, latent=None, loss=None) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)
        self.latent, self.loss = fe.nn.GaussianLatent(chunk_dim=1, **latent or {}), fe.nn.ELBOLoss(**loss or {})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, kl = self.latent(self.encoder(x))
        return self.loss(self.decoder(z), x, kl=kl).loss


OPTIONS = {
    "plain": ({}, {"beta": 0.5}),
    "learned": ({"param": "softplus", "min_std": 0.1}, {"log_sigma": -0.3, "activation": "tanh"}),
    "both sides": ({"free_bits": 0.1, "clamp": (-1.0, 1.0)}, {"likelihood": "laplace", "capacity": 0.5}),
    "optimal": ({}, {"sigma": "optimal"}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, forward, x):
    torch.manual_seed(11)
    model.zero_grad()
    loss = forward(x)
    loss.backward()
    return loss.detach(), *(p.grad for p in model.parameters())


def assert_same(found, right):
    for mine, eager in zip(found, right, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_full_graph(backend, device, name, dynamic):
    torch.manual_seed(0)
    model, x = Model(*OPTIONS[name]).to(device), oracle.randn(16, 12, device=device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_same(step(model, compiled, x), step(model, model, x))


def operators_of(function, *inputs):
    """The library's operators in the forward graph that a compiler is given."""
    found = set()

    def forward_graph(graph, _):
        found.update(str(node.target) for node in graph.graph.nodes if "fused_elbo" in str(node.target))
        return graph

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=forward_graph), fullgraph=True)
    compiled(*inputs)
    return {name.split(".")[1] for name in found}


def test_on_a_cpu_the_compiler_has_the_plain_formulas():
    model, x = Model(), oracle.randn(16, 12)
    assert operators_of(model, x) == ({"draw_seed", "normals"} if routes.UNREAD else {"draw_seed", "latent", "gaussian"})
    with fe.backend("reference"):
        assert operators_of(model, x) == {"draw_seed", "latent", "gaussian"}
    assert operators_of(Model(*OPTIONS["both sides"]), x) == {"draw_seed", "sample", "nll"}


@pytest.mark.parametrize(("likelihood", "an_operator"), [("gaussian", not routes.UNREAD), ("laplace", True)])
def test_what_a_graph_notices_of_a_later_backend(monkeypatch, likelihood, an_operator):
    monkeypatch.delenv(ops.ENVIRONMENT_VARIABLE, raising=False)
    x_hat, x = (oracle.randn(3, 4, seed=k, device="cpu") for k in range(2))
    function = fe.gaussian_nll if likelihood == "gaussian" else functools.partial(fe.nll, likelihood=likelihood)
    graph = torch.compile(lambda t: function(t, x), fullgraph=True, backend="aot_eager")
    graph(x_hat)
    with fe.backend("reference"):
        calls = spies.counted(monkeypatch, x.device, ("elbo", "likelihood"))
        graph(x_hat)
        assert len(calls) == an_operator
        torch.compiler.reset()
        graph(x_hat)
        assert len(calls) == an_operator + 1


@pytest.mark.parametrize("v", [0.0, 1e-6, -1e-3, 0.3, 40.0, -40.0])
def test_the_kl_that_a_compiler_has_is_as_exact(v):
    """Relative to the exact value and derivative, also where the classic lines cancel to nothing."""
    logvar = torch.full((1, 7), v, requires_grad=True)
    kl = torch.compile(lambda t: fe.kl_divergence(torch.zeros_like(t), t), fullgraph=True)(logvar)
    kl.backward()
    with mpmath.workdps(oracle.MPMATH_DIGITS):
        exact = mpmath.mpf(logvar[0, 0].item())
        value, slope = 7 * (mpmath.expm1(exact) - exact) / 2, mpmath.expm1(exact) / 2
    assert float(abs(kl.item() - value)) <= accuracy.KL_RELATIVE[torch.float32] * float(value)
    assert float(abs(logvar.grad[0, 0].item() - slope)) <= accuracy.KL_RELATIVE[torch.float32] * float(abs(slope))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductor_modes(device, mode):
    torch.manual_seed(0)
    model, x = Model(loss={"beta": 0.5}).to(device), oracle.randn(16, 12, device=device)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    assert_same(step(model, compiled, x), step(model, model, x))


@pytest.mark.parametrize("kind", ["tensor", "float"])
def test_no_recompilation_as_beta_anneals_and_the_last_batch_is_smaller(device, kind):
    torch.manual_seed(0)
    model = Model().to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch, beta in ((16, 0.05), (16, 0.1), (16, 0.2), (7, 0.3), (5, 0.4)):
        model.loss.beta = torch.tensor(beta, device=device) if kind == "tensor" else beta
        x = oracle.randn(batch, 12, device=device)
        assert_same(step(model, compiled, x), step(model, model, x))
        if batch == 16 and beta == 0.05:
            compiled_once = counter.frame_count
    assert counter.frame_count == compiled_once


@pytest.mark.parametrize("place", ["seed", "first_index", "offset"])
def test_the_place_of_the_noise_may_change(device, place):
    given = {"seed": 5, "first_index": 2, "offset": 3}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda m, k: fe.rsample_kl(m, m, **{**given, place: k}), backend=counter, fullgraph=True)
    mu = torch.ones(3, 4, device=device)
    for k in (4, 8, 12, 16):
        right = fe.rsample_kl(mu, mu, **{**given, place: k})
        assert_same(compiled(mu, k), right)
    # Once for a number that never changes, once for any.
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("function", "name", "shapes"),
    [
        (fe.elbo_loss, "beta", 4),
        (fe.elbo_loss, "sigma", 4),
        (fe.elbo_loss, "grad_scale", 4),
        (fe.kl_divergence, "chunk_dim", 1),
        (fe.kl_divergence, "batch_dims", 2),
    ],
    ids=("beta", "sigma", "grad_scale", "chunk_dim", "batch_dims"),
)
def test_whole_numbers_may_change(function, name, shapes):
    tensors = [oracle.randn(4, 2, 2, 2, seed=k) for k in range(shapes)]

    def call(n):
        given = {"batch_dims": (0, n), "reduction": "none"} if name == "batch_dims" else {name: n}
        return function(*tensors, **given)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for n in (3, 2, 1):
        torch.testing.assert_close(compiled(n), call(n))


def test_two_layers_of_any_batch():
    layers = fe.nn.GaussianLatent(), fe.nn.GaussianLatent()

    def forward(moments, seed):
        z = layers[0](moments, moments, seed=seed).z
        return layers[1](z, z, seed=seed).kl

    inputs = oracle.leaf(oracle.randn(3, 4)), torch.tensor(5)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*inputs), forward(*inputs))


def test_a_parameter_beside_any_batch():
    loss, x = fe.nn.ELBOLoss(log_sigma=torch.nn.Parameter(torch.zeros(4))), oracle.randn(3, 4)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, 2 * x, kl=x.sum(1)), loss(x, 2 * x, kl=x.sum(1)))


def test_modules_are_taken_unread():
    """They pass every keyword on, also those that nobody gave."""
    model, x = Model(), oracle.randn(16, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(Model.forward.__code__)
    read = "__import_fused_elbo_dot_plain" in str(entry.guard_manager)
    assert read == (not routes.UNREAD)


def test_errors_are_those_of_eager_code():
    compiled = torch.compile(lambda a, b: fe.gaussian_nll(a, b), backend="aot_eager")
    with pytest.raises(ValueError, match=r"^x: got shape \(3, 5\)"):
        compiled(oracle.randn(3, 4), oracle.randn(3, 5))


@pytest.mark.parametrize("wide", ["kl", "mu"])
def test_terms_of_several_dtypes(wide):
    x, latents = oracle.randn(3, 4), oracle.randn(3, 4, dtype=torch.float64)
    given = {"kl": latents.sum(1)} if wide == "kl" else {"mu": latents, "logvar": latents}
    right = fe.elbo_loss(x, 2 * x, **given)
    found = torch.compile(lambda a: fe.elbo_loss(a, 2 * a, **given), backend="aot_eager")(x)
    assert [t.dtype for t in found] == [t.dtype for t in right]
    torch.testing.assert_close(found, right)


def test_the_noise_is_new_in_every_call(device):
    compiled = torch.compile(lambda m: fe.reparameterize(m, m), backend="aot_eager", fullgraph=True)
    mu = torch.zeros(3, 4, device=device)
    torch.manual_seed(2)
    first, second = compiled(mu), compiled(mu)
    torch.manual_seed(2)
    assert torch.equal(first, fe.reparameterize(mu, mu))
    assert torch.equal(second, fe.reparameterize(mu, mu))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"param": "softplus"}], ids=("plain", "any"))
def test_two_samples_of_one_posterior_are_two(device, options, compiler):
    def twice(mu, raw):
        return torch.stack([fe.rsample_kl(mu, raw, **options).z for _ in range(2)])

    leaves = [oracle.leaf(oracle.randn(3, 4, seed=k, device=device)) for k in range(2)]
    torch.manual_seed(3)
    found = torch.compile(twice, backend=compiler, fullgraph=True)(*leaves)
    torch.manual_seed(3)
    right = twice(*leaves)
    torch.testing.assert_close(found, right)
    assert not torch.equal(found[0], found[1])
    for mine, eager in zip(*(oracle.grads(t.square().sum(), leaves) for t in (found, right)), strict=True):
        torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("randomness", ["different", "error"])
def test_randomness_of_vmap(device, randomness):
    def draw(mu):
        return torch.func.vmap(lambda m: fe.reparameterize(m, m), randomness=randomness)(mu)

    mu, compiled = torch.zeros(5, 2, 3, device=device), torch.compile(draw, backend="aot_eager", fullgraph=True)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="called random operation"):
            compiled(mu)
        return
    torch.manual_seed(3)
    found = compiled(mu)
    torch.manual_seed(3)
    torch.testing.assert_close(found, draw(mu))
    assert not torch.equal(found[0], found[1])


def test_compiled_autograd(device):
    torch.manual_seed(0)
    model, x = Model(loss={"beta": 0.5}).to(device), oracle.randn(16, 12, device=device)
    right = step(model, model, x)
    torch.manual_seed(11)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    assert_same([loss.detach(), *(p.grad for p in model.parameters())], right)


@pytest.mark.parametrize("compiled", [False, True], ids=("eager", "compiled"))
@pytest.mark.parametrize("reentrant", [False, True], ids=("", "reentrant"))
@pytest.mark.parametrize("name", ["plain", "learned"])
def test_a_checkpoint_replays_the_same_noise(backend, device, name, compiled, reentrant):
    if compiled and reentrant:
        pytest.skip("torch.compile traces the checkpoint that is not reentrant")
    torch.manual_seed(0)
    model, x = Model(*OPTIONS[name]).to(device), oracle.randn(16, 12, device=device).requires_grad_()

    def forward(x):
        return checkpoint(model, x, use_reentrant=reentrant)

    assert_same(step(model, torch.compile(forward, backend="aot_eager") if compiled else forward, x), step(model, model, x))


def test_export(device, tmp_path):
    model, x = Model(*OPTIONS["learned"]).to(device).eval(), oracle.randn(16, 12, device=device)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (16, 5):
        torch.testing.assert_close(loaded(x[:size]), model(x[:size]))


def test_aot_inductor(device, tmp_path):
    model, x = Model(*OPTIONS["learned"]).to(device).eval(), oracle.randn(16, 12, device=device)
    program = torch.export.export(model, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))


def test_several_samples_and_their_bound(device):
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(12, 8).to(device), torch.nn.Linear(4, 12).to(device)

    def forward(x, estimator):
        mu, logvar = encoder(x).chunk(2, 1)
        z, log_ratio = fe.rsample_log_ratio(mu, logvar, num_samples=5, estimator=estimator)
        return fe.iwae_loss(decoder(z), x, log_ratio).loss

    x = oracle.randn(6, 12, device=device)
    for estimator in ("iwae", "dreg"):
        results = []
        for run in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(4)
            results.append(torch.autograd.grad(run(x, estimator), [*encoder.parameters(), *decoder.parameters()]))
        assert_same(*results)


@pytest.mark.parametrize("changing", ["beta", "grad_scale"])
def test_floats_that_change_are_no_new_graphs_with_options(changing):
    x_hat, x, kl = torch.randn(8, 5), torch.rand(8, 5), torch.rand(8)
    compiled = torch.compile(
        lambda value: fe.elbo_loss(x_hat, x, kl=kl, sigma="optimal", **{changing: value}).loss,
        backend="eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    compiled(0.25)
    with torch.compiler.set_stance("fail_on_recompile"):
        for value in (0.5, 0.75):
            expected = fe.elbo_loss(x_hat, x, kl=kl, sigma="optimal", **{changing: value}).loss
            torch.testing.assert_close(compiled(value), expected)


@pytest.mark.parametrize(("of_kl", "of_loss"), [({"free_bits": 0.1}, {}), ({}, {"capacity": 2.0})])
def test_an_exported_batch_may_be_of_any_size_where_its_mean_is_taken(of_kl, of_loss):
    class Model(torch.nn.Module):
        def forward(self, moments, x):
            kl = fe.kl_divergence(moments, chunk_dim=1, reduction="none", **of_kl)
            return fe.elbo_loss(x, x + 1, kl=kl, **of_loss).loss

    sizes = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(Model(), (torch.randn(8, 6), torch.randn(8, 3)), dynamic_shapes=(sizes, sizes))
    other = torch.randn(5, 6), torch.randn(5, 3)
    torch.testing.assert_close(program.module()(*other), Model()(*other))
