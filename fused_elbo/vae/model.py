"""Two variational autoencoders for grey images of 28 x 28 pixels in [0, 1]: fully connected and convolutional.

The activation is SiLU because it is smooth: a ReLU that two roundings of one number put on different sides of 0 starts two
different trainings, and the fused and the eager loss could not be compared step by step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import GaussianLatent

IMAGE = (1, 28, 28)
PIXELS = 28 * 28


class VAEOutput(NamedTuple):
    """``x_hat`` (N, 1, 28, 28) in (0, 1), the latent sample ``z`` (N, d), and ``kl`` (N,) in nats."""

    x_hat: Tensor
    z: Tensor
    kl: Tensor


class VAE(nn.Module):
    """An encoder, a Gaussian latent layer and a decoder.

    Train it with ``x_hat, z, kl = model(x)`` and ``fused_elbo.elbo_loss(x_hat, x, kl=kl).loss.backward()``.

    Args:
        encoder: maps (N, 1, 28, 28) to packed moments (N, 2 d), mu and logvar side by side.
        decoder: maps (N, d) to (N, 1, 28, 28) in (0, 1).
        latent_dim: d.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.latent = GaussianLatent(chunk_dim=1)
        self.decoder = decoder
        self.latent_dim = latent_dim

    def encode(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) to packed moments (N, 2 d); ``mu, logvar = moments.chunk(2, 1)``."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, d) to the mean image ``x_hat`` (N, 1, 28, 28) in (0, 1)."""
        return self.decoder(z)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, first_index: int = 0) -> VAEOutput:
        """Encode images (N, 1, 28, 28), sample (in evaluation mode: take the mean), decode.

        ``seed`` and ``first_index`` are those of ``fused_elbo.rsample_kl``, for a part of a larger batch.
        """
        z, kl = self.latent(self.encode(x), seed=seed, first_index=first_index)
        return VAEOutput(self.decode(z), z, kl)

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Decode ``count`` samples of the prior N(0, I): (count, 1, 28, 28). ``seed`` gives the same z on every device."""
        z = torch.randn(count, self.latent_dim, generator=torch.Generator().manual_seed(seed))
        return self.decode(z.to(next(self.parameters()).device))


class MLPVAE(VAE):
    """A VAE of fully connected layers.

    Args:
        latent_dim: latent dimension d. Default 10.
        hidden: width of the two hidden layers, the one next to the image first. Default (512, 256).
    """

    # Behind the last layer there is this, without parameters, and the image's shape.
    ACTIVATION = "sigmoid"
    BEHIND_LAST_LAYER = 2

    def __init__(self, latent_dim: int = 10, hidden: tuple[int, int] = (512, 256)) -> None:
        outer, inner = hidden
        encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(PIXELS, outer),
            nn.SiLU(),
            nn.Linear(outer, inner),
            nn.SiLU(),
            nn.Linear(inner, 2 * latent_dim),
        )
        decoder = nn.Sequential(
            nn.Linear(latent_dim, inner),
            nn.SiLU(),
            nn.Linear(inner, outer),
            nn.SiLU(),
            nn.Linear(outer, PIXELS),
            nn.Sigmoid(),
            nn.Unflatten(1, IMAGE),
        )
        super().__init__(encoder, decoder, latent_dim)

    @property
    def last_layer(self) -> nn.Linear:
        """The decoder's last layer with parameters."""
        return self.decoder[-1 - self.BEHIND_LAST_LAYER]

    def features(self, z: Tensor) -> Tensor:
        """What the decoder gives its last layer for latents (N, d): (N, H)."""
        return self.decoder[: -1 - self.BEHIND_LAST_LAYER](z)


class ConvVAE(VAE):
    """A VAE of strided convolutions, 28 -> 14 -> 7 pixels and back.

    Args:
        latent_dim: latent dimension d. Default 10.
        channels: channels at 14 x 14; twice as many at 7 x 7. Default 32.
        hidden: width of the fully connected layer between the 7 x 7 features and the latents. Default 256.
    """

    def __init__(self, latent_dim: int = 10, channels: int = 32, hidden: int = 256) -> None:
        inner = (2 * channels, 7, 7)
        features = 2 * channels * 7 * 7
        encoder = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent_dim),
        )
        decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, features),
            nn.SiLU(),
            nn.Unflatten(1, inner),
            nn.ConvTranspose2d(2 * channels, channels, kernel_size=4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(channels, 1, kernel_size=4, stride=2, padding=1),
            nn.Sigmoid(),
        )
        super().__init__(encoder, decoder, latent_dim)


MODELS = {"mlp": MLPVAE, "conv": ConvVAE}


def build(name: str, *, latent_dim: int = 10, seed: int = 0) -> VAE:
    """A freshly initialised model on the CPU, in float32; the same ``seed`` gives the same weights.

    Torch's global generators are left as they are.

    Args:
        name: "mlp" or "conv".
        latent_dim: latent dimension d. Default 10.
        seed: of the initial weights. Default 0.

    Raises:
        ValueError: no model has that name.
    """
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, takes one of {sorted(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reach the generators of other devices too, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        return MODELS[name](latent_dim)
