"""Schedules: their numbers, and that a checkpoint takes them along."""

from __future__ import annotations

import io

import pytest
import torch

import fused_elbo as fe
from fused_elbo.schedules import Cyclical, Warmup


def test_warmup():
    schedule = Warmup(4, end=2.0)
    assert [schedule.value, *(schedule.step() for _ in range(6))] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cyclical():
    """Fu et al. 2019, eq. 6 and 7: with tau = (t mod T/M) / (T/M), tau / R up to R, then 1."""
    schedule = Cyclical(4, cycles=2)
    assert [schedule.at(step) for step in range(10)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert [Cyclical(2, ratio=1.0, start=1.0, end=0.0).at(step) for step in range(4)] == [1.0, 0.5, 1.0, 0.5]


def test_a_compiler_takes_a_step_as_a_symbol():
    schedule, one = Cyclical(7, cycles=1), torch.ones(())
    compiled = torch.compile(lambda t: t * schedule.value, backend="aot_eager", fullgraph=True)
    for _ in range(9):
        torch.testing.assert_close(compiled(one), one * schedule.value)
        schedule.step()


@pytest.mark.parametrize("make", [lambda: Warmup(10), lambda: Cyclical(7, cycles=3)], ids=("warmup", "cyclical"))
def test_a_checkpoint_goes_on_where_it_was(make):
    first, second = make(), make()
    for _ in range(5):
        first.step()
    buffer = io.BytesIO()
    torch.save({"beta": first.state_dict()}, buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True)["beta"])
    assert [first.step() for _ in range(30)] == [second.step() for _ in range(30)]


def test_another_schedules_state_is_refused():
    with pytest.raises(ValueError, match="steps: the state has 10, this schedule 11"):
        Warmup(11).load_state_dict(Warmup(10).state_dict())
    with pytest.raises(ValueError, match="state"):
        Warmup(10).load_state_dict(Cyclical(10).state_dict() | {"steps": 10})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Warmup(0), "steps"),
        (lambda: Warmup(2.5), "steps"),
        (lambda: Warmup(3, end=float("nan")), "end"),
        (lambda: Warmup(3, start=10**400), "start"),
        (lambda: Cyclical(0), "period"),
        (lambda: Cyclical(3, cycles=0), "cycles"),
        (lambda: Cyclical(3, ratio=0.0), "ratio"),
        (lambda: Cyclical(3, ratio=1.5), "ratio"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        make()


def test_the_loss_takes_its_value():
    x = torch.ones(2, 3)
    beta = fe.schedules.Warmup(2)
    losses = []
    for _ in range(3):
        losses.append(fe.elbo_loss(x, x, kl=torch.ones(2), beta=beta.value).loss.item())
        beta.step()
    assert losses == [0.0, 0.5, 1.0]
