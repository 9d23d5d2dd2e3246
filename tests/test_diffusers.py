"""``fused_elbo.integrations.diffusers`` against the real package, on tiny random models."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import spies
import torch
from documents import blocks

from fused_elbo.integrations import diffusers as fe_diffusers
from fused_elbo.integrations.diffusers import DiagonalGaussianDistribution

DOCUMENT = (Path(__file__).parents[1] / "docs/diffusers.md").read_text()

pytestmark = pytest.mark.usefixtures("one_thread")

N, STEPS = 3, 20
IMAGES, VIDEOS, SOUNDS = (N, 6, 5, 7), (N, 6, 3, 5, 7), (N, 6, 11)
TINY = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2, "sample_size": 8}

# Class, configuration, shape of a video, and how it decodes what it encoded.
EIGHTS = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1}
VIDEO_MODELS = {
    "AutoencoderKLCogVideoX": (
        {
            **EIGHTS,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "norm_num_groups": 2,
        },
        (1, 3, 5, 16, 16),
        {},
    ),
    "AutoencoderKLWan": (
        {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        (1, 3, 5, 16, 16),
        {},
    ),
    "AutoencoderKLHunyuanVideo": ({**EIGHTS, "norm_num_groups": 4}, (2, 3, 5, 16, 16), {}),
    "AutoencoderKLMagvit": ({**EIGHTS, "norm_num_groups": 2}, (1, 3, 5, 16, 16), {}),
    "AutoencoderKLTemporalDecoder": ({"block_out_channels": (32,)}, (3, 3, 8, 8), {"num_frames": 3}),
}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def original(diffusers) -> type:
    from diffusers.models.autoencoders import vae

    return vae.DiagonalGaussianDistribution


@pytest.fixture
def calls(monkeypatch, device) -> list[str]:
    return spies.counted(monkeypatch, device)


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


def names_bound() -> dict[str, type]:
    found = {name: vars(module).get("DiagonalGaussianDistribution") for name, module in sys.modules.items()}
    return {name: value for name, value in found.items() if value is not None and name.startswith("diffusers")}


def autoencoders(diffusers) -> set[str]:
    """Public classes of the modules that have the distribution, which make it."""
    found = set()
    for module in names_bound():
        classes = vars(sys.modules[module]).values()
        found |= {c.__name__ for c in classes if inspect.isclass(c) and c.__module__ == module and hasattr(c, "encode")}
    return {name for name in found if hasattr(diffusers, name)}


def test_the_document_names_every_autoencoder(diffusers):
    _ = diffusers.AutoencoderKL
    version, listed = re.search(r"In diffusers ([\d.]+) these classes make it: ([^.]+)\.", DOCUMENT).groups()
    assert set(VIDEO_MODELS) <= set(re.findall(r"Autoencoder\w+", DOCUMENT.partition("The tests train")[2]))
    if version != diffusers.__version__:
        pytest.skip(f"the document has the classes of {version}")
    assert set(re.split(r",\s+", listed)) == autoencoders(diffusers)


def test_the_documented_code_runs(diffusers, original, unpatched, calls):
    namespace: dict[str, object] = {}
    first, second = blocks(DOCUMENT)
    exec(compile(first, "diffusers.md", "exec"), namespace)
    assert calls == ["posterior", "posterior_backward"]
    assert set(names_bound().values()) == {original}
    exec(compile(second, "diffusers.md", "exec"), namespace)
    assert namespace["posterior"].kl().shape == (2,)


@pytest.fixture
def unpatched():
    yield
    fe_diffusers.unpatch()


def test_patching_is_undone_exactly(diffusers, original, unpatched, monkeypatch):
    later = diffusers.AutoencoderKLAllegro.__module__
    monkeypatch.delitem(sys.modules, later)
    before = names_bound()
    assert len(before) >= 2
    fe_diffusers.patch()
    fe_diffusers.patch()
    importlib.import_module(later)
    during = names_bound()
    assert during.keys() == {*before, later}
    assert all(issubclass(c, DiagonalGaussianDistribution) and issubclass(c, original) for c in during.values())
    with pytest.raises(ValueError, match=r"^compat: got True where diffusers is patched with False, takes unpatch\(\)"):
        fe_diffusers.patch(compat=True)
    with fe_diffusers.patched(compat=True), fe_diffusers.patched():
        assert not any(c.compat for c in names_bound().values())
    assert names_bound() == during
    fe_diffusers.unpatch()
    fe_diffusers.unpatch()
    assert set(names_bound().values()) == {original}
    assert before.items() <= names_bound().items()
    with contextlib.suppress(KeyError), fe_diffusers.patched(compat=True):
        assert all(c.compat for c in names_bound().values())
        raise KeyError
    assert set(names_bound().values()) == {original}


def test_without_diffusers_the_error_says_what_to_install():
    code = """
import sys
sys.modules["diffusers"] = None
from fused_elbo.integrations import diffusers
try:
    diffusers.patch()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "takes the diffusers package" in done.stdout
    assert "pip install diffusers" in done.stdout


def trained(diffusers, optimizer: type, dtype: torch.dtype, patched: bool) -> dict[str, torch.Tensor]:
    """Weights after some steps of a tiny AutoencoderKL, on noise that both distributions can be given."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        model = diffusers.AutoencoderKL(in_channels=1, out_channels=1, **TINY)
        steps = optimizer(model.parameters(), lr=1e-3)
        with fe_diffusers.patched() if patched else contextlib.nullcontext():
            for seed in range(STEPS):
                x = oracle.randn(4, 1, 8, 8, seed=seed, dtype=dtype).sigmoid()
                posterior = model.encode(x).latent_dist
                generator = torch.Generator().manual_seed(seed)
                if patched:
                    z = posterior.sample(eps=torch.randn(4, 2, 8, 8, generator=generator))
                else:
                    z = posterior.sample(generator)
                loss = ((model.decode(z).sample - x) ** 2).sum() / len(x) + 1e-3 * posterior.kl().mean()
                steps.zero_grad()
                loss.backward()
                steps.step()
    finally:
        torch.set_default_dtype(torch.float32)
    return model.state_dict()


# In float32, Adam makes whole steps of gradients that are nothing but rounding errors: biases in front of a normalisation.
@pytest.mark.parametrize(("optimizer", "dtype"), [(torch.optim.SGD, torch.float32), (torch.optim.AdamW, torch.float64)])
def test_an_autoencoder_trains_to_the_same_weights(diffusers, optimizer, dtype):
    ours, theirs = (trained(diffusers, optimizer, dtype, patched) for patched in (True, False))
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


def test_a_training_step_is_one_latent_pass_each_way(diffusers, calls):
    model = diffusers.AutoencoderKL(in_channels=1, out_channels=1, **TINY)
    x = oracle.randn(2, 1, 8, 8).sigmoid()
    with fe_diffusers.patched():
        posterior = model.encode(x).latent_dist
        x_hat = model.decode(posterior.sample()).sample
        (((x_hat - x) ** 2).sum() + 1e-3 * posterior.kl().sum()).backward()
        assert calls == ["posterior", "posterior_backward"]
        assert model.quant_conv.weight.grad.any()
        assert model(x, sample_posterior=True).sample.shape == x.shape


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_a_video_autoencoder_runs(diffusers, calls, name):
    options, shape, decoding = VIDEO_MODELS[name]
    model = getattr(diffusers, name)(**options)
    x = oracle.randn(*shape)
    with fe_diffusers.patched():
        posterior = model.encode(x).latent_dist
    assert isinstance(posterior, DiagonalGaussianDistribution)
    z = posterior.sample(generators(shape[0]))
    (model.decode(z, **decoding).sample.square().mean() + posterior.kl().mean()).backward()
    assert calls == ["posterior", "posterior_backward"]
    assert posterior.kl().shape == shape[:1]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert next(model.encoder.parameters()).grad.any()


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
