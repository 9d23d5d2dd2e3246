"""The reference variational autoencoder: models, digits to train them on, and a trainer that resumes bit for bit."""

from .config import TrainConfig
from .data import DataError, Digits, load_digits
from .model import MLPVAE, VAE, ConvVAE, VAEOutput, build
from .run_folder import RunError
from .training import Interrupted, train

__all__ = [
    "MLPVAE",
    "VAE",
    "ConvVAE",
    "DataError",
    "Digits",
    "Interrupted",
    "RunError",
    "TrainConfig",
    "VAEOutput",
    "build",
    "load_digits",
    "train",
]
