"""Train the reference VAE. A run that is interrupted and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import shlex
import signal
import statistics
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..functional import gaussian_nll, rsample_kl
from ..iwae import log_likelihood
from . import parallel, run_folder, signals
from .config import FIXED_OPTIONS, TrainConfig
from .data import Digits, load_digits
from .measure import PeakMemory, StepClock
from .model import VAE, build
from .parallel import ALONE, Ranks
from .run_folder import RunError

# The noise of the evaluation: the same for every epoch, run and device, and independent of the batch size.
EVALUATION_SEED = 20140101


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or TERM after a whole step; the state is saved, and the message says how to go on."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, and fill the run folder: metrics.json, checkpoint.pt, loss_curve.png, reconstructions.png, samples.png.

    Ctrl-C finishes the step, saves and raises ``Interrupted``; so does TERM, if this process trains alone. The checkpoint is
    also written after every epoch. Under ``torchrun`` its processes train together: the batch is divided among them, and the
    first one writes and prints.

    Returns:
        The content of metrics.json: ``config``; ``environment``; ``untrained``, the held-out terms before the first step;
        ``steps``, lists of ``loss``, ``nll``, ``kl`` (means over the batch, in nats) and ``ms`` by step; ``epochs``, a list of
        ``train`` and ``heldout`` terms (``elbo = -nll - kl``, in nats per digit) and ``seconds`` of training;
        ``heldout_log_likelihood`` of the trained model, ``nats`` per digit by importance sampling with ``samples`` samples;
        ``peak_memory_mib`` and what that measures; ``finished``.

    Raises:
        RunError: the run cannot start or go on: folder, checkpoint, device, backend, packages, a loss that is not finite.
        DataError: the digits cannot be had.
        Interrupted: by Ctrl-C or TERM.
    """
    try:
        from tqdm import tqdm

        from . import plots
    except ImportError as error:
        raise RunError(f"training needs the package {error.name}: pip install 'fused-elbo[demo]'") from error
    config = replace(config, device=str(_device(config.device)))
    with parallel.joined(torch.device(config.device)) as ranks:
        config = config if ranks.first else replace(config, quiet=True)
        trainer = _run(config, ranks, tqdm)
        if ranks.first:
            plots.draw_run(config.folder, trainer.metrics, trainer.model, trainer.digits.heldout)
    return trainer.metrics


def steps_in_turns(configs: dict[str, TrainConfig], steps: int) -> dict[str, float]:
    """The median milliseconds of a training step with each configuration, of steps that are taken in turns.

    A machine's speed drifts by more than a loss takes: of trainings that run one after the other it would be what is compared.
    """
    configs = {name: replace(config, device=str(_device(config.device))) for name, config in configs.items()}
    digits = {folder: load_digits(folder) for folder in {config.data for config in configs.values()}}
    trainers = {name: Trainer(config, digits[config.data]) for name, config in configs.items()}
    with _deterministic():
        for _ in itertools.islice(zip(*(trainer.epoch() for trainer in trainers.values()), strict=True), steps):
            pass
    for trainer in trainers.values():
        trainer._read_steps()
    return {name: statistics.median(trainer.metrics["steps"]["ms"]) for name, trainer in trainers.items()}


def _deterministic() -> contextlib.AbstractContextManager:
    # Bit for bit on CUDA takes convolutions that add in a fixed order.
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _run(config: TrainConfig, ranks: Ranks, tqdm: type) -> Trainer:
    # A run that is overwritten is erased last, when everything that its successor needs has been found.
    ranks.from_first(lambda: run_folder.require_free(config.folder, resume=config.resume, overwrite=config.overwrite))
    trainer = Trainer(config, load_digits(config.data), ranks)
    folder = ranks.from_first(lambda: run_folder.open_folder(config))
    if config.resume:
        trainer.load(ranks.from_first(lambda: run_folder.read_checkpoint(folder)))

    total = config.epochs * trainer.steps_per_epoch
    bar = tqdm(total=total, initial=trainer.steps_done, unit="step", disable=True if config.quiet else None)
    # A process that another one waits for has to end at once where that one has failed, which TERM says under torchrun.
    numbers = (signal.SIGINT, signal.SIGTERM) if ranks.size == 1 else (signal.SIGINT,)
    interrupted = threading.Event()
    with bar, _deterministic(), signals.answered(numbers, interrupted.set):
        while trainer.epochs_done < config.epochs:
            for _ in trainer.epoch():
                bar.update()
                if ranks.any(interrupted.is_set()):
                    trainer.save(folder)
                    raise Interrupted(
                        f"interrupted after step {trainer.steps_done} of {total}, saved in {folder}; "
                        f"continue with: python -m fused_elbo train --out {shlex.quote(str(folder))} --resume"
                    )
            trainer.save(folder)
            if not config.quiet:
                bar.write(describe(trainer.metrics["epochs"][-1], config.epochs))
    if config.log_likelihood_samples:
        trainer.estimate_log_likelihood(config.log_likelihood_samples)
        if not config.quiet:
            found = trainer.metrics["heldout_log_likelihood"]
            print(f"held-out ln p(x) is {found['nats']:.2f} nats or more ({found['samples']} importance samples)")
    trainer.metrics["finished"] = True
    trainer.save(folder)
    return trainer


class Trainer:
    """Everything that changes during training, and the means to save it and load it.

    Args:
        config: with a ``device`` that is not "auto".
        digits: on any device; they are moved to that of ``config``.
        ranks: the processes that train together. Default: this one alone.
    """

    def __init__(self, config: TrainConfig, digits: Digits, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.ranks = ranks
        self.device = torch.device(config.device)
        self.digits = digits._replace(train=digits.train.to(self.device), heldout=digits.heldout.to(self.device))
        self.model = _built(config).to(self.device)
        self.noise = torch.Generator(self.device).manual_seed(config.seed)
        self.model.latent.generator = self.noise
        self.objective = parallel.Objective(self.model, config.loss, config.beta, config.sigma, config.head)
        self.distributed = parallel.distributed(self.objective, ranks)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.order_generator = torch.Generator().manual_seed(config.seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.epochs_done = 0
        self.position = 0

        self._pending: list[Tensor] = []
        self._clock = StepClock(self.device)
        self._memory = PeakMemory(self.device)
        self.metrics: dict[str, Any] = {
            "config": asdict(config),
            "environment": environment(self.device, digits.source),
            "untrained": evaluate(self.model, self.digits.heldout, config.sigma, config.batch_size),
            "steps": {"loss": [], "nll": [], "kl": [], "ms": []},
            "epochs": [],
            "heldout_log_likelihood": None,
            "peak_memory_mib": None,
            "peak_memory_meaning": self._memory.meaning,
            "finished": False,
        }

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.digits.train) / self.config.batch_size)

    @property
    def steps_done(self) -> int:
        return self.epochs_done * self.steps_per_epoch + self.position

    def epoch(self) -> Iterator[None]:
        """Train to the end of the epoch, one step for each item, and evaluate."""
        if self.position == 0:
            self.order = torch.randperm(len(self.digits.train), generator=self.order_generator)
        batches = self.order.to(self.device).split(self.config.batch_size)
        self.model.train()
        for batch in batches[self.position :]:
            self._step(self.digits.train[batch])
            self.position += 1
            yield
        self._read_steps()
        self._record_epoch([len(batch) for batch in batches])
        self.epochs_done += 1
        self.position = 0

    @torch.no_grad()
    def estimate_log_likelihood(self, samples: int) -> None:
        """Put the held-out log-likelihood into the metrics. A digit's noise is its own, whatever the batch size."""
        self.model.eval()
        heldout = self.digits.heldout
        seeds = EVALUATION_SEED + torch.arange(len(heldout), device=self.device)
        total = 0.0
        for x, seed in zip(heldout.split(self.config.batch_size), seeds.split(self.config.batch_size), strict=True):
            moments = self.model.encode(x)
            options = {"num_samples": samples, "chunk_dim": 1, "seed": seed, "sigma": self.config.sigma}
            total += log_likelihood(self.model.decode, x, moments, **options).sum().item()
        self.metrics["heldout_log_likelihood"] = {"samples": samples, "nats": total / len(heldout)}

    def save(self, folder: Path) -> None:
        """Write the checkpoint and metrics.json; of several processes the first one does."""
        self._read_steps()
        if not self.ranks.first:
            return
        previous, peak = self.metrics["peak_memory_mib"], self._memory.read()
        self.metrics["peak_memory_mib"] = peak if previous is None else max(previous, peak)
        state = {
            "config": {name: self.metrics["config"][name] for name in (*FIXED_OPTIONS, "epochs")},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "noise": self.noise.get_state(),
            "order_generator": self.order_generator.get_state(),
            "order": self.order,
            "epochs_done": self.epochs_done,
            "position": self.position,
            "metrics": self.metrics,
        }
        run_folder.save_checkpoint(folder, state)
        run_folder.write_json(folder / run_folder.METRICS, self.metrics)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises ``RunError`` where its options are not this run's, or its content is no run's."""
        try:
            self._load(state)
        except RunError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(run_folder.damaged(self.config.folder)) from error

    def _load(self, state: dict[str, Any]) -> None:
        run_folder.require_same(self.config, state["config"], state["epochs_done"] + (state["position"] > 0))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.noise.set_state(state["noise"])
        self.order_generator.set_state(state["order_generator"])
        self.order = state["order"]
        if len(self.order) not in (0, len(self.digits.train)):
            raise RunError(
                f"--data: got {len(self.digits.train)} training digits, the checkpoint was made with {len(self.order)}"
            )
        self.epochs_done = state["epochs_done"]
        self.position = state["position"]
        current = {name: self.metrics[name] for name in ("config", "environment", "finished")}
        self.metrics = {**state["metrics"], **current}

    def _step(self, x: Tensor) -> None:
        # Outside the clock: in plain PyTorch the library's noise costs more than the randn that nobody would replace by it.
        noise = self.objective.noise(len(x), self.ranks.part(len(x)))
        self._clock.start()
        self.optimizer.zero_grad()
        share = parallel.backward(self.distributed, x, self.ranks, noise)
        self.optimizer.step()
        self._clock.stop()
        self._pending.append(share)

    def _read_steps(self) -> None:
        """Fetch the losses since the last call: one wait for the device, not one a step."""
        if not self._pending:
            return
        terms = self.ranks.total(torch.stack(self._pending)).T
        self._pending = []
        steps = self.metrics["steps"]
        if not terms.isfinite().all():
            raise RunError(
                f"the loss is no longer finite (near step {self.steps_done}): try a smaller --lr than {self.config.lr}"
            )
        for name, values in zip(("loss", "nll", "kl"), terms.tolist(), strict=True):
            steps[name] += values
        steps["ms"] += self._clock.take()

    def _record_epoch(self, sizes: list[int]) -> None:
        steps = {name: values[-len(sizes) :] for name, values in self.metrics["steps"].items()}
        nll, kl = (sum(n * v for n, v in zip(sizes, steps[name], strict=True)) / sum(sizes) for name in ("nll", "kl"))
        self.metrics["epochs"].append(
            {
                "epoch": self.epochs_done + 1,
                "last_step": len(self.metrics["steps"]["loss"]),
                "train": _terms(nll, kl),
                "heldout": evaluate(self.model, self.digits.heldout, self.config.sigma, self.config.batch_size),
                "seconds": sum(steps["ms"]) / 1e3,
            }
        )


@torch.no_grad()
def evaluate(model: VAE, x: Tensor, sigma: float, batch_size: int = 32) -> dict[str, float]:
    """The ELBO of images (N, 1, 28, 28): a lower bound of ln p(x), in nats per image, constants included.

    The noise is always the same, whatever the batch size.

    Returns:
        ``elbo = -nll - kl``, ``nll`` and ``kl``.
    """
    nll = kl = 0.0
    for start in range(0, len(x), batch_size):
        batch = x[start : start + batch_size]
        first_index = start * model.latent_dim
        z, kl_batch = rsample_kl(model.encode(batch), chunk_dim=1, seed=EVALUATION_SEED, first_index=first_index)
        nll += gaussian_nll(model.decode(z), batch, sigma=sigma, full=True, reduction="sum").item()
        kl += kl_batch.sum().item()
    return _terms(nll / len(x), kl / len(x))


def environment(device: torch.device, data: str) -> dict[str, Any]:
    """What a run ran on.

    Raises:
        RunError: the backend that was asked for cannot run on ``device``.
    """
    try:
        backend = ops.select(device).__name__
    except (RuntimeError, ValueError) as error:
        raise RunError(str(error)) from error
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "data": data,
    }


def describe(epoch: dict[str, Any], epochs: int) -> str:
    """One line for an item of ``metrics["epochs"]``."""
    heldout = epoch["heldout"]
    return (
        f"epoch {epoch['epoch']}/{epochs}: ELBO {epoch['train']['elbo']:.2f} nats, held out {heldout['elbo']:.2f} "
        f"(nll {heldout['nll']:.2f}, kl {heldout['kl']:.2f}), {epoch['seconds']:.1f} s"
    )


def _terms(nll: float, kl: float) -> dict[str, float]:
    return {"elbo": -nll - kl, "nll": nll, "kl": kl}


def _built(config: TrainConfig) -> VAE:
    try:
        return build(config.model, latent_dim=config.latent_dim, seed=config.seed)
    except RuntimeError as error:
        # Of what it lacks torch says where in its own code that was noticed.
        reason = str(error).splitlines()[0].rpartition("] ")[2]
        raise RunError(f"--latent-dim: got {config.latent_dim}, for which this machine has no room: {reason}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"--device: got {name!r}, which this machine or torch cannot use: {reason}") from error
    return device
