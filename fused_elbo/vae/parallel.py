"""One training by several processes, as ``torchrun`` starts them: each takes its part of every batch.

The noise is that of the undivided batch, and the gradient its gradient, so the number of processes decides nothing but the
order in which numbers are added up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..functional import ELBOTerms
from ..sampling import draw_seed
from . import losses
from .data import DataError
from .model import VAE
from .run_folder import RunError

Found = TypeVar("Found")


class Ranks(NamedTuple):
    """This process's number among ``size``; ``control`` is a group whose tensors are on the CPU, None for one process."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of a batch of ``count``; it may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds in any process."""
        if self.control is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def total(self, t: Tensor) -> Tensor:
        """The sum of every process's ``t``."""
        if self.control is not None:
            dist.all_reduce(t)
        return t

    def from_first(self, work: Callable[[], Found]) -> Found:
        """What ``work`` returns in the first process, which alone calls it; where it fails, every process fails."""
        if self.control is None:
            return work()
        answer = [None, None]
        if self.first:
            try:
                answer[0] = work()
            except (DataError, RunError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, 0, group=self.control)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


ALONE = Ranks()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that the environment names: those of ``torchrun``, or this one alone.

    Raises:
        RunError: they cannot find each other, or have not a CUDA device each; or the environment does not name them.
    """
    if not launched():
        yield ALONE
        return
    _rank()
    if not dist.is_available():
        raise RunError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this torch was built without torch.distributed")
    if device.type == "cuda":
        here, count = _from_environment("LOCAL_RANK", 0, default=str(_rank())), torch.cuda.device_count()
        if device.index is not None or here >= count:
            raise RunError(
                f"--device: got {device} for process {here} of this machine, takes cuda, where each one has the CUDA device "
                f"of its number, of which there are {count}; or cpu"
            )
        torch.cuda.set_device(here)
    ours = not dist.is_initialized()
    if ours:
        if not os.environ.get("MASTER_ADDR"):
            raise RunError("MASTER_ADDR: got nothing, takes the name of the first process's machine, as torchrun sets it")
        _from_environment("MASTER_PORT", 1, 2**16 - 1)
    try:
        if ours:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot meet: {reason}") from error
    try:
        control = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        yield Ranks(dist.get_rank(), dist.get_world_size(), control)
    finally:
        if ours:
            dist.destroy_process_group()


def launched() -> bool:
    """Whether this process is one of several.

    Raises:
        RunError: the environment does not say.
    """
    return _world_size() > 1


def silent() -> bool:
    """Whether another process does the talking; none does for one that does not know its place."""
    try:
        return launched() and _rank() > 0
    except RunError:
        return False


def _world_size() -> int:
    return _from_environment("WORLD_SIZE", 1, default="1")


def _rank() -> int:
    return _from_environment("RANK", 0, _world_size() - 1)


def _from_environment(name: str, least: int, most: int | None = None, default: str | None = None) -> int:
    """An integer that ``torchrun`` sets."""
    text = os.environ.get(name, default)
    # Of digits, and not of thousands, which int() refuses in words of its own.
    number = int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else None
    if number is None or not (least <= number and (most is None or number <= most)):
        got = "nothing" if text is None else repr(text)
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise RunError(f"{name}: got {got}, takes an integer {bound}, as torchrun sets it")
    return number


class Objective(nn.Module):
    """The training loss of a part of a batch, as a module, so that DistributedDataParallel sees its forward pass.

    Args:
        model: whose ``latent.generator`` gives each batch's seed. In every process it must be in the same state.
        loss: "fused" or "eager".
        beta, sigma: as for ``losses.fused``.
        head: as for ``TrainConfig``. Default "linear".
    """

    def __init__(self, model: VAE, loss: str, beta: float, sigma: float, head: str = "linear") -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.step = losses.eager if loss == "eager" else losses.fused_linear if head == "fused-linear" else losses.fused
        self.weights = {"beta": beta, "sigma": sigma}

    def noise(self, count: int, part: slice) -> dict[str, object]:
        """What ``forward`` takes beside the images, for ``part`` of a batch of ``count``; it advances the generator."""
        generator, latent_dim = self.model.latent.generator, self.model.latent_dim
        if self.loss == "eager":
            return {"eps": losses.draw_eps(count, latent_dim, generator)[part]}
        return {"seed": draw_seed(generator.device, generator), "first_index": part.start * latent_dim}

    def forward(self, x: Tensor, **noise: object) -> ELBOTerms:
        return self.step(self.model, x, **noise, **self.weights)


def distributed(objective: Objective, ranks: Ranks) -> nn.Module:
    """``objective`` with its gradients averaged over the processes."""
    return objective if ranks.size == 1 else DistributedDataParallel(objective)


def backward(objective: nn.Module, x: Tensor, ranks: Ranks, noise: dict[str, object]) -> Tensor:
    """The gradient of the whole batch's loss, from ``ranks.part`` of it; ``x`` is the batch.

    Returns:
        This part's share of the batch's loss, nll and kl (3,), so that the shares sum up to their means.
    """
    part = ranks.part(len(x))
    count = part.stop - part.start
    if count == 0:
        # Every process must take part in the average: this one with a digit that counts for nothing.
        x, share = x[:1], 0.0
        noise = {name: value.new_zeros(1, value.shape[1]) if name == "eps" else value for name, value in noise.items()}
    else:
        share, x = count / len(x), x[part]
    terms = objective(x, **noise)
    # The processes' gradients are averaged, with one weight for each, whatever its part of the batch.
    (terms.loss * (share * ranks.size) if share * ranks.size != 1.0 else terms.loss).backward()
    return share * torch.stack((terms.loss, terms.nll.mean(), terms.kl.mean())).detach()
