"""Mixed precision: autocast with losses in float32, a GradScaler whose scale is baked in, accumulation of gradients."""

from __future__ import annotations

import oracle
import pytest
import torch

import fused_elbo as fe


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)

    def forward(self, x, grad_scale=1.0, **options):
        z, kl = fe.rsample_kl(self.encoder(x), chunk_dim=1, seed=3)
        return z, fe.elbo_loss(self.decoder(z), x, kl=kl, grad_scale=grad_scale, **options)


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Model().to(device)


OPTIONS = ({}, {"likelihood": "laplace"}, {"sigma": "optimal"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "laplace", "optimal"))
def test_autocast(backend, device, model, dtype, options):
    x = oracle.randn(5, 12, device=device)
    with torch.autocast(device.type, dtype):
        z, out = model(x, **options)
    assert z.dtype == dtype
    assert {t.dtype for t in out} == {torch.float32}
    out.loss.backward()
    low = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x, **options)[1].loss.backward()
    for mine, p in zip(low, model.parameters(), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, p.grad, rtol=0.1, atol=0.05 * p.grad.abs().max().item())


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "laplace", "optimal"))
def test_a_scaler_keeps_float16_gradients_from_underflow(backend, device, model, options):
    """Of a batch so large in weight that an unscaled float16 gradient is 0: with the scale told, it is right."""
    x = oracle.randn(5, 12, device=device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    scale = torch.tensor(scaler.get_scale(), device=device)
    with torch.autocast(device.type, torch.float16):
        loss = model(x, scale * 1e-8, **options)[1].loss * 1e-8
    scaler.scale(loss).backward()
    found = [p.grad / scaler.get_scale() * 1e8 for p in model.parameters()]
    model.zero_grad()
    model(x, **options)[1].loss.backward()
    for mine, p in zip(found, model.parameters(), strict=True):
        assert p.grad.any()
        torch.testing.assert_close(mine, p.grad, rtol=0.1, atol=0.05 * p.grad.abs().max().item())


def test_a_scaled_step_is_one_pass(backend, device, model, monkeypatch):
    """Told of the scale, the forward makes the gradient, and the backward finds nothing to multiply."""
    backend_module = fe.ops.select(device)
    seen = []
    right = backend_module.rescale_

    def rescale_(gradients, upstream, expected):
        seen.append((float(upstream), float(expected)))
        return right(gradients, upstream, expected)

    monkeypatch.setattr(backend_module, "rescale_", rescale_)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    x = oracle.randn(5, 12, device=device)
    scaler.scale(model(x, scaler.get_scale())[1].loss).backward()
    assert seen == [(1024.0, 1024.0)]


def test_accumulated_gradients_are_those_of_the_whole_batch(backend, device, model):
    x = oracle.randn(8, 12, device=device)
    for k, part in enumerate(x.split(2)):
        z, kl = fe.rsample_kl(model.encoder(part), chunk_dim=1, seed=3, first_index=2 * k * 4)
        (fe.elbo_loss(model.decoder(z), part, kl=kl, grad_scale=1 / 4).loss / 4).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x)[1].loss.backward()
    for mine, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-5, atol=1e-6)
