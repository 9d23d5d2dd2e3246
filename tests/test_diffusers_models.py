"""``fused_elbo.integrations.diffusers`` in the real package: patching, the document, and tiny random models that train."""

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
import torch
from documents import blocks

from fused_elbo.integrations import diffusers as fe_diffusers
from fused_elbo.integrations.diffusers import DiagonalGaussianDistribution

DOCUMENT = (Path(__file__).parents[1] / "docs/diffusers.md").read_text()

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20
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
    z = posterior.sample([torch.Generator().manual_seed(seed) for seed in range(shape[0])])
    (model.decode(z, **decoding).sample.square().mean() + posterior.kl().mean()).backward()
    assert calls == ["posterior", "posterior_backward"]
    assert posterior.kl().shape == shape[:1]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert next(model.encoder.parameters()).grad.any()
