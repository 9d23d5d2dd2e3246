"""Several processes on one batch: DDP, FSDP2, DTensor and process groups, against one process. Gloo, on the CPU."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fused_elbo as fe
from fused_elbo.vae import TrainConfig, build, load_digits
from fused_elbo.vae.parallel import ALONE, Ranks
from fused_elbo.vae.training import Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"),
]

SECONDS = 300
STEPS = 100
# In three processes and more, the last batch leaves one of them without a digit: 512 digits are 17 batches of 30 and one of 2.
BATCH = 30
COUNTS = (30, 7, 2, 1)
DIMENSIONS = 5
N = 12


def start(rank: int, size: int, folder: str, work: Callable, *args: object) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timeout)
    try:
        found = work(rank, size, *args)
        if rank == 0:
            torch.save(found, f"{folder}/found")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def world(size: int, folder: Path, work: Callable, *args: object) -> dict:
    """What ``work`` returns in the first of ``size`` processes; an exception in any of them is raised here."""
    context = torch.multiprocessing.spawn(start, (size, str(folder), work, *args), size, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{size} processes are not done after {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()
    return torch.load(folder / "found")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(
    data: str, ranks: Ranks, loss: str, steps: int, head: str = "linear", dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Weights after ``steps`` steps: of Adam in float64, and of gradient descent in float32, where Adam would make whole steps
    of gradients that are rounding errors."""
    torch.set_default_dtype(dtype)
    try:
        digits = load_digits(data)
        digits = digits._replace(train=digits.train.to(dtype), heldout=digits.heldout[:20].to(dtype))
        config = TrainConfig(data=data, device="cpu", batch_size=BATCH, loss=loss, head=head, log_likelihood_samples=0)
        trainer = Trainer(config, digits, ranks)
        if dtype == torch.float32:
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-4)
        while trainer.steps_done < steps:
            for _ in trainer.epoch():
                if trainer.steps_done == steps:
                    break
        trainer._read_steps()
    finally:
        torch.set_default_dtype(torch.float32)
    steps = {name: torch.tensor(trainer.metrics["steps"][name]) for name in ("loss", "nll", "kl")}
    return {**trainer.model.state_dict(), **steps}


def noise(ranks: Ranks) -> list[Tensor]:
    """What a sample adds to the mean, in the parts of several batches that these ranks have."""
    from fused_elbo.vae.parallel import Objective

    found = []
    for loss in ("fused", "eager"):
        model = build("mlp", latent_dim=DIMENSIONS)
        model.latent.generator = torch.Generator().manual_seed(3)
        objective = Objective(model, loss, 1.0, 1.0)
        for count in COUNTS:
            part = ranks.part(count)
            zeros = torch.zeros(count, DIMENSIONS)[part]
            found.append(fe.reparameterize(zeros, zeros, **objective.noise(count, part)))
    return found


SHARED = {
    "optimal": {"sigma": "optimal"},
    "optimal with a floor": {"sigma": "optimal", "min_log_sigma": -1.0, "mask": None},
    "free bits": {"free_bits": 0.4},
    "capacity": {"capacity": 5.0, "beta": 3.0},
    "everything": {"sigma": "optimal", "free_bits": 0.4, "capacity": 5.0, "likelihood": "gaussian"},
    "nothing of the batch": {"sigma": 0.5},
}


def shared(name: str, rows: slice, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Loss and gradients of parameters, of some rows of a batch of N; the loss weighs as much as they do."""
    options = dict(SHARED[name])
    if "mask" in options:
        options["mask"] = (randn(N, 6, seed=5) > 0)[rows]
    data, target = randn(N, 4, seed=1)[rows], randn(N, 6, seed=2)[rows]
    encoder, decoder = (randn(*shape, seed=k).requires_grad_() for k, shape in enumerate(((4, 6), (3, 6)), 3))
    moments = data @ encoder
    mu, logvar = moments.chunk(2, 1)
    x_hat = fe.reparameterize(moments, chunk_dim=1, seed=7, first_index=3 * rows.start) @ decoder
    out = fe.elbo_loss(x_hat, target, mu, logvar, process_group=group, **options)
    share = (rows.stop - rows.start) / N
    size = 1 if group is None else group.size()
    (out.loss * share * size).backward()
    found = [out.loss.detach() * share, encoder.grad / size, decoder.grad / size]
    if group is not None:
        for t in found:
            dist.all_reduce(t, group=group)
    return found


def fully_sharded(ranks: Ranks) -> dict[str, Tensor]:
    """Weights after a few steps of a model whose parameters are sharded, on its part of each batch."""
    from torch.distributed.fsdp import fully_shard

    model = build("mlp").double()
    # A decoder of its own, whose output is never held.
    head = fe.nn.LinearGaussianHead(model.latent_dim, 28 * 28, sigma="optimal", dtype=torch.float64)
    torch.nn.utils.vector_to_parameters(randn(28 * 28 * (model.latent_dim + 1), seed=9), head.parameters())
    both = torch.nn.ModuleList((model, head))
    if ranks.size > 1:
        for part in (model.encoder, model.decoder, model, head):
            fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks.size,)))
    optimizer = torch.optim.Adam(both.parameters(), lr=1e-3)
    for step in range(5):
        x = randn(8, 1, 28, 28, seed=step).sigmoid()
        part = ranks.part(len(x))
        x_hat, z, kl = model(x[part], seed=step, first_index=part.start * model.latent_dim)
        group = ranks.control
        (fe.elbo_loss(x_hat, x[part], kl=kl).loss + head(z, x[part], process_group=group)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in both.state_dict().items()}


def sample_and_terms(mu, logvar, **options):
    return tuple(fe.rsample_kl(mu, logvar, **options))


def bound(mu, logvar, *, estimator):
    z, log_ratio = fe.rsample_log_ratio(mu, logvar, num_samples=3, seed=SEEDS, estimator=estimator)
    return fe.iwae_loss(torch.tanh(z), mu.detach(), log_ratio, sigma=0.5).loss


def weighed(mu, logvar, *, seed):
    return tuple(fe.rsample_log_ratio(mu, logvar, num_samples=3, seed=seed))


def prior(mu, logvar, mean, second):
    z, kl = fe.rsample_kl(mu, logvar, seed=SEEDS, prior=(mean, second))
    return z, kl, fe.kl_divergence(mu, logvar, prior=(mean, second), reduction="none")


LATENT, IMAGES, SEVEN = (N, 6), (N, 2, 4, 6), (7, 3)
SEEDS = torch.arange(N)

# Of one dimension of a mesh: operation, and each operand's shape and the dimension that is sharded, None for none of them.
CASES = {
    "nll of a sharded batch": (lambda a, b: fe.nll(a, b, likelihood="laplace", reduction="none"), (IMAGES, 0), (IMAGES, 0)),
    "nll of sharded rows": (lambda a, b: fe.nll(a, b, likelihood="laplace", reduction="none"), (IMAGES, 2), (IMAGES, 2)),
    "nll": (lambda a, b: fe.nll(a, b, activation="tanh"), (IMAGES, 3), (IMAGES, 3)),
    "gaussian_nll": (lambda a, b: fe.gaussian_nll(a, b, sigma=0.3), (IMAGES, 0), (IMAGES, 0)),
    "channels' scale": (lambda a, b, c: fe.nll(a, b, log_sigma=c), (IMAGES, 0), (IMAGES, 0), ((2, 1, 1), None)),
    "one scale": (lambda a, b, c: fe.nll(a, b, log_sigma=c), (IMAGES, 2), (IMAGES, 2), ((1,), None)),
    "optimal": (lambda a, b: fe.nll(a, b, sigma="optimal"), (IMAGES, 0), (IMAGES, 0)),
    "mask": (lambda a, b: fe.nll(a, b, mask=b.detach() > 0), (IMAGES, 0), (IMAGES, 0)),
    "weight": (lambda a, b, c: fe.nll(a, b, weight=c.detach()), (IMAGES, 2), (IMAGES, 2), (LATENT[:1], None)),
    "batch of 7": (lambda a, b: fe.nll(a, b, sigma=0.3, reduction="none", full=True), (SEVEN, 0), (SEVEN, 0)),
    "sample of 7": (lambda a, b: sample_and_terms(a, b, seed=4), (SEVEN, 0), (SEVEN, 0)),
    "bound": (lambda a, b: bound(a, b, estimator="iwae"), (LATENT, 0), (LATENT, 0)),
    "doubly reparameterised": (lambda a, b: bound(a, b, estimator="dreg"), (LATENT, 0), (LATENT, 0)),
    "elbo_loss": (lambda a, b, c, d: fe.elbo_loss(a, b, c, d).loss, (IMAGES, 2), (IMAGES, 2), (LATENT, 0), (LATENT, 0)),
    "kl": (lambda a, b: fe.kl_divergence(a, b, reduction="none"), (LATENT, 0), (LATENT, 0)),
    "kl of sharded dimensions": (lambda a, b: fe.kl_divergence(a, b, reduction="none"), (LATENT, 1), (LATENT, 1)),
    "clamped": (lambda a, b: fe.kl_divergence(a, b, clamp=(-0.5, 0.5)), (LATENT, 0), (LATENT, 0)),
    "clamped elsewhere": (lambda a, b: fe.kl_divergence(a, b, clamp=(-0.2, 0.5)), (LATENT, 0), (LATENT, 0)),
    "free bits": (lambda a, b: fe.kl_divergence(a, b, free_bits=0.4), (LATENT, 0), (LATENT, 0)),
    "packed": (lambda a: fe.kl_divergence(a, chunk_dim=1), (LATENT, 0)),
    "sample": (lambda a, b: sample_and_terms(a, b, seed=4, first_index=5), (LATENT, 0), (LATENT, 0)),
    "packed sample": (lambda a: sample_and_terms(a, None, chunk_dim=1, seed=4, offset=2), (LATENT, 0)),
    "replicated sample": (lambda a, b: sample_and_terms(a, b, seed=4, num_samples=2), (LATENT, None), (LATENT, None)),
    "seeds": (lambda a, b: sample_and_terms(a, b, seed=SEEDS, num_samples=3), (LATENT, 0), (LATENT, 0)),
    "seeds of sharded dimensions": (lambda a, b: sample_and_terms(a, b, seed=SEEDS), (LATENT, 1), (LATENT, 1)),
    "weighed": (lambda a, b: weighed(a, b, seed=SEEDS), (LATENT, 0), (LATENT, 0)),
    "learned prior": (prior, (LATENT, 0), (LATENT, 0), (LATENT[1:], None), (LATENT, 0)),
    "prior of one number": (prior, (LATENT, 1), (LATENT, 1), ((1,), None), ((N, 1), None)),
    "eps": (lambda a, b, c: sample_and_terms(a, b, eps=c.detach(), num_samples=2), (LATENT, 1), (LATENT, 1), ((2, *LATENT), 2)),
}
PARTIAL = {"nll of sharded rows", "kl of sharded dimensions"}
COMPILED = ("elbo_loss", "mask", "seeds")


def differentiated(operation: Callable, operands: list[Tensor]) -> tuple[tuple, list]:
    found = operation(*operands)
    found = found if isinstance(found, tuple) else (found,)
    # To be squared, what is Partial must be summed up; a linear function stays with the shards.
    sum((k + 1) * t.sum() for k, t in enumerate(found)).backward()
    return tuple(t.detach() for t in found), [t.grad for t in operands]


def undivided_and_placed(name: str, mesh: dist.device_mesh.DeviceMesh) -> tuple[tuple[tuple, list], list[Tensor]]:
    """Results and gradients of one process, and the operands on a mesh."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    operation, *operands = CASES[name]
    tensors = [randn(*size, seed=k) for k, (size, _) in enumerate(operands)]
    whole = differentiated(operation, [t.clone().requires_grad_() for t in tensors])
    placed = []
    for t, (_, dim) in zip(tensors, operands, strict=True):
        across = [Replicate() if dim is None else Shard(dim)] * mesh.ndim
        placed.append(distribute_tensor(t, mesh, across).requires_grad_())
    return whole, placed


def assert_undivided(parts: tuple[tuple, list], whole: tuple[tuple, list], name: str) -> None:
    for mine, theirs in zip((*parts[0], *parts[1]), (*whole[0], *whole[1]), strict=True):
        if theirs is None:
            assert mine is None, name
        else:
            torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-11, atol=1e-11, msg=name)


def compiled() -> None:
    """The same in a compiler's graph, by a process that has not called anything on a DTensor before."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for name in COMPILED:
        whole, placed = undivided_and_placed(name, mesh)
        operation = torch.compile(CASES[name][0], backend="aot_eager", fullgraph=True)
        assert_undivided(differentiated(operation, placed), whole, name)


def sharded(shape: tuple[int, ...]) -> None:
    """Every case on a mesh: the results and gradients of one process, where they belong, and nothing was gathered."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = dist.device_mesh.init_device_mesh("cpu", shape)
    for name, (operation, *_) in CASES.items():
        whole, placed = undivided_and_placed(name, mesh)
        with CommDebugMode() as communication:
            parts = differentiated(operation, placed)
        assert_undivided(parts, whole, name)
        assert all(g is None or g.placements == t.placements for g, t in zip(parts[1], placed, strict=True)), name
        assert not any("gather" in str(kind) for kind in communication.get_comm_counts()), (
            name,
            communication.get_comm_counts(),
        )
        if "sample" in name or "seeds" in name:
            assert torch.equal(parts[0][0].full_tensor(), whole[0][0]), name
        if name in PARTIAL:
            assert parts[0][0].placements[0].is_partial(), name


def refused() -> None:
    """Layouts whose noise would not be that of the undivided batch, and operands that are not distributed."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    rows, columns = (distribute_tensor(randn(N, 6, seed=0), mesh, [Shard(d)]) for d in (0, 1))
    with pytest.raises(ValueError, match=r"^seed: got one with num_samples 1 .*takes mu sharded on the batch.*eps="):
        fe.rsample_kl(columns, columns, seed=1)
    with pytest.raises(ValueError, match=r"^seed: got one with num_samples 2 .*one seed for each sample"):
        fe.rsample_kl(rows, rows, seed=1, num_samples=2)
    with pytest.raises(ValueError, match=r"^seed: got one for each sample with num_samples 2 .*eps="):
        fe.rsample_kl(columns, columns, seed=SEEDS, num_samples=2)
    with pytest.raises(ValueError, match=r"^mu: got moments sharded on chunk_dim=1"):
        fe.rsample_kl(columns, chunk_dim=1, seed=1)
    with pytest.raises(TypeError, match=r"^mu, x_hat: got a DTensor together with plain tensors"):
        fe.kl_divergence(rows, randn(N, 6, seed=0))


def operators_alone() -> None:
    """An operator that nobody has prepared gathers for its noise instead of numbering a shard from 0."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from fused_elbo import sharding
    from fused_elbo.spec import Posterior

    sharding.register()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    mu = randn(N, 6, seed=0)
    place = (0, 0, 0, 1, "rows", False, False, *Posterior())
    for seed, dim in ((torch.tensor(4), 0), (SEEDS, 1)):
        whole = torch.ops.fused_elbo.sample(mu, mu, None, None, seed, None, *place)
        parts, seed = distribute_tensor(mu, mesh, [Shard(dim)]), distribute_tensor(seed, mesh, [Replicate()])
        found = torch.ops.fused_elbo.sample(parts, parts, None, None, seed, None, *place)
        assert torch.equal(found[0].full_tensor(), whole[0])


def rows_of(rank: int, size: int, *, even: bool) -> slice:
    edges = [N * r // size if even else N * r * (r + 2) // (size * (size + 2)) for r in range(size + 1)]
    return slice(edges[rank], edges[rank + 1])


def an_empty_part(rank: int, group: dist.ProcessGroup) -> None:
    """A process without a sample has no loss, and takes nothing from the others' gradients."""
    rows = slice(0, N) if rank == 0 else slice(0, 0)
    h, x = randn(N, 3, seed=1)[rows], randn(N, 4, seed=2)[rows]
    found = []
    for layer in (fe.linear_gaussian_nll, lambda h, weight, bias, x, **options: fe.gaussian_nll(h @ weight.t(), x, **options)):
        weight = randn(4, 3, seed=3).requires_grad_()
        layer(h, weight, None, x, sigma="optimal", process_group=group).backward()
        found.append(weight.grad)
    if rank == 0:
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def in_a_world(rank: int, size: int, data: str) -> dict:
    ranks = Ranks(rank, size, dist.group.WORLD)
    parts = [None] * size
    dist.all_gather_object(parts, noise(ranks))
    found = {"noise": [torch.cat(of_ranks) for of_ranks in zip(*parts, strict=True)]}
    found["fused"] = trained(data, ranks, "fused", STEPS)
    found["single precision"] = trained(data, ranks, "fused", STEPS, dtype=torch.float32)
    found["shared"] = {
        (name, even): shared(name, rows_of(rank, size, even=even), dist.group.WORLD)
        for name in SHARED
        for even in (True, False)
    }
    if size == 2:
        found["eager"] = trained(data, ranks, "eager", 20)
        found["fused-linear"] = trained(data, ranks, "fused", 20, "fused-linear")
        found["fully sharded"] = fully_sharded(ranks)
        compiled()
        sharded((2,))
        refused()
        operators_alone()
        an_empty_part(rank, dist.group.WORLD)
    else:
        sharded((2, 2))
    return found


@pytest.fixture(scope="module")
def alone(data) -> dict:
    return {
        "noise": noise(ALONE),
        "fused": trained(data, ALONE, "fused", STEPS),
        "single precision": trained(data, ALONE, "fused", STEPS, dtype=torch.float32),
        "eager": trained(data, ALONE, "eager", 20),
        "fused-linear": trained(data, ALONE, "fused", 20, "fused-linear"),
        "fully sharded": fully_sharded(ALONE),
        "shared": {name: shared(name, slice(0, N), None) for name in SHARED},
    }


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_are_one(size, alone, data, tmp_path):
    found = world(size, tmp_path, in_a_world, data)
    for mine, theirs in zip(found["noise"], alone["noise"], strict=True):
        assert torch.equal(mine, theirs)
    for name in ("fused", "single precision", "eager", "fused-linear", "fully sharded"):
        if name in found:
            assert found[name].keys() == alone[name].keys()
            for key, value in found[name].items():
                assert (value - alone[name][key]).abs().max() <= 1e-6 * alone[name][key].abs().max(), (name, key)
    for name in ("fused", "single precision"):
        losses = found[name]["loss"]
        assert len(losses) == STEPS
        assert losses[-5:].mean() < losses[:5].mean()
    for (name, even), values in found["shared"].items():
        for mine, theirs in zip(values, alone["shared"][name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, n=name, e=even: f"{n}, {e}: {m}")
