"""What the kernels do as they are compiled: run by a machine for their PTX (tests/ptx), which `make ptx` chooses."""

import conftest
import numpy as np
import oracle
import pytest
import torch

import fused_elbo as fe
from fused_elbo import reference
from fused_elbo.accuracy import KL_RELATIVE, NARROW_KL_NEAR, NOISE
from fused_elbo.spec import Noise

pytestmark = pytest.mark.skipif(not conftest.PTX, reason="FUSED_ELBO_PTX=triton or native runs the kernels' PTX")
needs_text = pytest.mark.skipif("triton" not in conftest.PTX, reason="Triton's are the kernels whose text is changed")

if conftest.PTX:
    from ptx.launch import settings
    from ptx.memory import Fault, Global, Shared, regions_of
    from ptx.units import Error

SEED = 3


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    """Each test has the launches of its own, and leaves the settings as they were."""
    monkeypatch.setattr(settings, "launches", [])
    with fe.backend(conftest.PTX[0]):
        yield


def leaves(*shape: int, count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [oracle.leaf(oracle.randn(*shape, seed=k).to(dtype)) for k in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_moves_what_the_design_says(dtype):
    """Passes over the latents and the data, in the sectors that each warp's instructions touch: what lies beside is counted."""
    shape = (32, 2**13)
    one = torch.zeros(shape, dtype=dtype).nbytes
    mu, logvar, g_z, x_hat, x = leaves(*shape, count=5, dtype=dtype)
    z, kl = fe.rsample_kl(mu, logvar, seed=SEED)
    torch.autograd.backward((z, kl), (g_z, torch.ones_like(kl)))
    fe.elbo_loss(x_hat, x.detach(), kl=kl.detach()).loss.backward()
    with torch.no_grad():
        fe.elbo_loss(x_hat, x, kl=kl)
    fe.elbo_loss(x_hat, x.detach(), mu, logvar)
    found = [(launch.kernel, launch.moved / one) for launch in settings.launches]
    # What returns at once, where the upstream gradient is the one that was expected, is not always launched.
    assert all(passes < 0.1 for kernel, passes in found if "rescale" in kernel)
    found = [passes for kernel, passes in found if "rescale" not in kernel]
    for passes, wanted in zip(found, (3, 5, 3, 2, 7), strict=True):
        # Beside them each block reads some numbers of its row.
        assert wanted <= passes < wanted + 0.3


@pytest.mark.parametrize("error", ["ABOVE", "BELOW"])
def test_the_hardwares_approximations_may_be_as_wrong_as_is_documented(error, monkeypatch):
    """Normals and the KL within their bounds, with each approximation off by its documented error, all one way."""
    monkeypatch.setattr(settings, "error", Error[error])
    zero = torch.zeros(64, 2**12)
    normals = fe.reparameterize(zero, zero, seed=SEED)
    exact = reference.draw(zero.double(), Noise(torch.tensor(SEED)))
    assert (normals - exact).abs().max() < NOISE[torch.float32]
    for dtype, most, bound in (
        (torch.float32, 80, KL_RELATIVE[torch.float32]),
        (torch.bfloat16, 80, KL_RELATIVE[torch.bfloat16]),
        (torch.float16, 80, KL_RELATIVE[torch.float16]),
        (torch.bfloat16, 8, NARROW_KL_NEAR),
        (torch.float16, 8, NARROW_KL_NEAR),
    ):
        logvar = torch.linspace(-most, most, 2**14).to(dtype).reshape(-1, 1)
        kl = fe.kl_divergence(torch.zeros_like(logvar), logvar, reduction="none")
        truth = reference.kl_divergence(torch.zeros_like(logvar).double(), logvar.double())
        assert ((kl - truth).abs() <= bound * truth).all(), (dtype, most)


@pytest.mark.parametrize("error", ["ABOVE", "BELOW"])
def test_a_given_scale_does_not_come_from_the_special_function_unit(error, monkeypatch):
    """A gradient has its square, which would carry the unit's error twice."""
    monkeypatch.setattr(settings, "error", Error[error])
    x_hat, x = leaves(3, 700, count=2)
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(SEED))
    sigma = 0.3
    fe.nll(x_hat, x.detach(), sigma=sigma, weight=weight, reduction="sum").backward()
    exact, eager = (weight.to(t) * (x_hat.detach().to(t) - x.detach().to(t)) / sigma**2 for t in (torch.float64, torch.float32))
    oracle.assert_envelope(x_hat.grad, exact, eager, what="gradient")


def loss() -> torch.Tensor:
    """Of rows that several blocks share, so that the last of them adds up what all have left."""
    x_hat, x = leaves(3, 5000, count=2)
    return fe.gaussian_nll(x_hat, x, reduction="none").detach()


@pytest.mark.parametrize("together", [1, 300, 2**14])
def test_the_order_of_blocks_does_not_matter(together, monkeypatch):
    """Whoever is last adds up what all have left, in the same order: same inputs, same bits."""
    right = loss()
    monkeypatch.setattr(settings, "together", together)
    for order in (np.flip, np.random.default_rng(SEED).permutation):
        monkeypatch.setattr(settings, "order", order)
        assert torch.equal(loss(), right)


@pytest.mark.parametrize(
    ("readers", "writer", "stops"), [([[0], [1]], 1, True), ([[0, 1]], 1, True), ([[1, 0]], 1, True), ([[1], [1]], 1, False)]
)
def test_a_byte_that_other_warps_have_read_may_not_be_written_before_a_barrier(readers, writer, stops):
    """Warps that read a byte one after the other, or at once, and one that writes it."""
    shared, one = Shared(1, 64), np.zeros(1, dtype="i8")
    for warps in readers:
        shared.load(np.zeros(len(warps), dtype="u8"), 32, 1, np.zeros(len(warps), dtype="i8"), np.array(warps))
    store = (np.zeros(1, dtype="u8"), np.zeros((1, 1), dtype="u4"), one, np.array([writer]))
    if stops:
        with pytest.raises(Fault, match="without a barrier"):
            shared.store(*store)
        shared.synchronise(0)
    shared.store(*store)


@pytest.mark.parametrize(
    ("writers", "synchronised", "stops"),
    [([[0], [0]], False, False), ([[0], [1]], False, True), ([[0, 1]], False, True), ([[0], [1]], True, False)],
)
def test_a_byte_that_another_block_has_written_may_not_be_written_before_an_atomic_operation(writers, synchronised, stops):
    """Blocks that write a byte one after the other, or at once."""
    tensor = torch.zeros(16)
    memory = Global(regions_of(tensor))

    def write() -> None:
        for blocks in writers:
            where, numbers = np.full(len(blocks), tensor.data_ptr(), dtype="u8"), np.ones((len(blocks), 1), dtype="u4")
            memory.store(where, numbers, np.array(blocks), np.array(blocks), np.full(len(blocks), synchronised))

    if stops:
        with pytest.raises(Fault, match="writes over"):
            write()
    else:
        write()


@needs_text
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bar.sync", "// ", "without a barrier"),
        ("ld.global.cg", "ld.global", "through its own cache"),
        ("atom.global.gpu.acq_rel", "atom.global.gpu.relaxed", "relaxed"),
        ("setp.lt.s32", "setp.le.s32", "out of bounds"),
    ],
)
def test_the_machine_stops_at_what_would_be_wrong(old, new, said, monkeypatch):
    """Kernels that lack a barrier, read through a cache what other blocks wrote, or read past the last column."""
    monkeypatch.setattr(settings, "edit", lambda text: text.replace(old, new))
    with pytest.raises((Fault, NotImplementedError), match=said):
        loss()


@needs_text
@pytest.mark.parametrize(("old", "new"), [("shfl.sync.bfly", "shfl.sync.idx"), (", 16, 31, -1", ", 8, 31, -1")])
def test_sums_that_are_wrong_show(old, new, monkeypatch):
    right = loss()
    assert torch.equal(loss(), right)
    monkeypatch.setattr(settings, "edit", lambda text: text.replace(old, new))
    assert not torch.allclose(loss(), right)
