"""Every native kernel once or twice on odd sizes, for a tool that watches it: ``make gpu`` runs it under compute-sanitizer.

That the numbers are those of the reference, roughly, shows that the kernels ran; how near they are is what the tests hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fused_elbo as fe

ROUGHLY = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
# Samples, elements and latents: a part of a row for a thread block, and rows that several share.
SIZES = ((3, 7, 5), (2, 40_001, 3_001))


def results(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> list[Tensor]:
    """A number that everything goes into, and its gradients."""
    z, kl = fe.rsample_kl(mu, logvar, seed=3, first_index=1)
    staged, classic = fe.elbo_loss(x_hat, x, kl=kl).loss, fe.elbo_loss(x_hat, x, mu, logvar).loss
    samples, bounded = fe.rsample_kl(mu, logvar, seed=3, num_samples=2, free_bits=0.1)
    # Of terms the backward starts from the inputs.
    rows = fe.gaussian_nll(x_hat, x, reduction="none")
    ratios = fe.rsample_log_ratio(mu, logvar, seed=3, num_samples=2).log_ratio
    nll = fe.nll(x_hat, x, likelihood="laplace", mask=x > 0) + fe.nll(x_hat, x, activation="tanh")
    nll += fe.nll(x_hat, x.sigmoid(), likelihood="bernoulli")
    nll += fe.nll(x_hat, (64 * x).clamp(0, 255).byte(), likelihood="discretized_logistic", scale=2 / 255, shift=-1.0)
    total = 3 * staged + classic + nll + z.float().sum() + samples.float().sum() + bounded.sum() + ratios.sum() + rows[0]
    return [total.detach(), *torch.autograd.grad(total, (x_hat, mu, logvar))]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype, most in ROUGHLY.items():
        for count, elements, latents in SIZES:
            x_hat, x, mu, logvar = (
                torch.randn(count, n, device=device).to(dtype) for n in (elements, elements, latents, latents)
            )
            leaves = [t.requires_grad_() for t in (x_hat, mu, logvar)]
            found = {}
            for name in ("native", "reference"):
                with fe.backend(name):
                    found[name] = results(leaves[0], x, *leaves[1:])
            for mine, right in zip(*found.values(), strict=True):
                error = ((mine - right).abs().max() / right.abs().max().clamp(min=1)).item()
                if not error < most:
                    raise SystemExit(f"{dtype}, {count} x {elements}: off by {error:.2g}")
    print(f"every native kernel ran on {device}")


if __name__ == "__main__":
    main()
