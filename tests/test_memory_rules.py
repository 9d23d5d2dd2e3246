"""Whose memory may be written: gradients over x_hat only where asked for, and whoever is overwritten is told."""

from __future__ import annotations

import oracle
import pytest
import torch
from forms import FORMS, assert_close, elbo, exact_gradients, inputs_of, leaves_of
from tolerances import FLOATS

import fused_elbo as fe


def test_forgotten_memory_is_nan(device):
    for t in (torch.empty(5, device=device), torch.empty_like(torch.ones(2, 3, device=device)), torch.ones(2).new_empty(4)):
        assert t.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("form", FORMS)
def test_inplace(backend, device, form, dtype, upstream):
    inputs = inputs_of(form, device, dtype)
    leaves = leaves_of(inputs)
    x_hat = leaves["x_hat"] * 1
    out = elbo(form, {**leaves, "x_hat": x_hat}, inplace=True)
    found = oracle.grads(
        out.loss, [x_hat, *list(leaves.values())[1:]], torch.tensor(upstream, dtype=out.loss.dtype, device=device)
    )
    assert found[0].data_ptr() == x_hat.data_ptr()
    assert_close(found, exact_gradients(form, inputs, upstream), dtype)


def test_inplace_with_a_kept_graph(backend, device):
    inputs = inputs_of("classic", device)
    leaves = leaves_of(inputs)
    x_hat = leaves["x_hat"] * 1
    loss = elbo("classic", {**leaves, "x_hat": x_hat}, inplace=True).loss
    for upstream, kept in ((2.0, True), (2.0, True), (-1.0, False)):
        found = oracle.grads(loss, list(leaves.values()), torch.tensor(upstream, device=device), retain_graph=kept)
        assert_close(found, exact_gradients("classic", inputs, upstream))


def test_inplace_through_a_layer(backend, device):
    weight = oracle.leaf(oracle.randn(4, 5, seed=1, device=device))
    hidden, x = oracle.randn(3, 4, seed=2, device=device), oracle.randn(3, 5, seed=3, device=device)
    fe.gaussian_nll(hidden @ weight, x, inplace=True).backward()
    (right,) = oracle.grads(oracle.gaussian_nll(hidden @ weight, x).mean(), [weight])
    assert_close([weight.grad], [right])


def test_inplace_is_noticed_by_whoever_saved_x_hat(backend, device):
    logits, x = oracle.leaf(oracle.randn(3, 5, seed=1, device=device)), oracle.randn(3, 5, seed=2, device=device)
    loss = fe.gaussian_nll(torch.sigmoid(logits), x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_gradient_is_protected(backend, device):
    x_hat = oracle.leaf(oracle.randn(3, 5, seed=1, device=device)) * 1
    loss = fe.gaussian_nll(x_hat, torch.zeros(3, 5, device=device), inplace=True)
    x_hat.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_refuses_what_it_cannot_overwrite(backend, device):
    x = torch.zeros(3, 5, device=device)
    leaf = oracle.leaf(oracle.randn(3, 5, seed=1, device=device))
    with pytest.raises(ValueError, match=r"^inplace: .*leaf x_hat"):
        fe.gaussian_nll(leaf, x, inplace=True)
    with pytest.raises(ValueError, match=r"^inplace: .*x_hat of which elements share memory"):
        fe.gaussian_nll((leaf[:1] * 1).expand(3, 5), x, inplace=True)
    with pytest.raises(ValueError, match=r'^inplace: .*reduction "none"'):
        fe.gaussian_nll(leaf * 1, x, inplace=True, reduction="none")


def test_inplace_refuses_a_view_of_a_leaf(backend, device):
    # As PyTorch's own in-place operations do: the parameter itself would be overwritten.
    leaf = oracle.leaf(oracle.randn(3, 5, seed=1, device=device))
    before = leaf.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match="leaf"):
        fe.gaussian_nll(leaf[:], torch.zeros(3, 5, device=device), inplace=True).backward()
    assert torch.equal(leaf, before)


def test_inplace_keeps_terms_and_refuses_their_gradients(backend, device):
    inputs = inputs_of("classic", device)
    leaves = leaves_of(inputs)
    # Of the same gradients: a compiler makes another kernel of other ones, which may round elsewhere.
    expected = elbo("classic", leaves)
    out = elbo("classic", {**leaves, "x_hat": leaves["x_hat"] * 1}, inplace=True)
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="inplace=True"):
        (out.loss + out.nll.sum()).backward()


def test_inplace_without_gradient_leaves_x_hat_alone(backend, device):
    inputs = inputs_of("classic", device)
    before = inputs["x_hat"].clone()
    with torch.no_grad():
        elbo("classic", leaves_of(inputs) | {"x_hat": inputs["x_hat"]}, inplace=True)
    elbo("classic", inputs, inplace=True)
    assert torch.equal(inputs["x_hat"], before)


def test_x_hat_is_untouched(backend, device):
    inputs = inputs_of("classic", device)
    leaves = leaves_of(inputs)
    (elbo("classic", leaves).loss * 3).backward()
    for name, t in leaves.items():
        assert torch.equal(t, inputs[name])
        assert t._version == 0


@pytest.mark.parametrize("name", ["mu", "logvar", "seed", "eps"])
def test_modified_latents_are_noticed(backend, device, name):
    source = {n: oracle.randn(3, 5, seed=s, device=device).requires_grad_() for s, n in enumerate(("mu", "logvar", "eps"))}
    options = {n: t * 1 for n, t in source.items()}
    if name == "eps":
        changed = options["eps"]
    else:
        options.pop("eps")
        options["seed"] = torch.tensor(4, device=device)
        changed = options[name]
    z, kl = fe.rsample_kl(**options)
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (z.sum() + kl.sum()).backward()


@pytest.mark.parametrize("name", ["x_hat", "x", "mu", "logvar"])
def test_modified_inputs_are_noticed_where_they_are_read_again(backend, device, name):
    leaves = leaves_of(inputs_of("classic", device))
    inputs = {n: t * 1 for n, t in leaves.items()}
    loss = elbo("classic", inputs, reduction="none").loss
    with torch.no_grad():
        inputs[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
