"""Schedules of the KL's weight: small objects with a state, to be saved with a checkpoint.

beta = fe.schedules.Warmup(1000)
loss = fe.elbo_loss(x_hat, x, kl=kl, beta=beta.value).loss
beta.step()
"""

from __future__ import annotations

import math
from typing import Any

from . import arguments


class Schedule:
    """A number that changes with every ``step()``.

    Attributes:
        steps_done: how often ``step`` was called; with the constructor's arguments it is the whole state.
    """

    def __init__(self) -> None:
        self.steps_done = 0

    @property
    def value(self) -> float:
        """The number for the step that comes next."""
        return self.at(self.steps_done)

    def at(self, step: int) -> float:
        """The number after ``step`` steps."""
        raise NotImplementedError

    def step(self) -> float:
        """Go one step on; returns the new value."""
        self.steps_done += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep: the step and, so that a wrong schedule is noticed, the constructor's arguments."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            ValueError: the state is that of a schedule with other arguments.
        """
        for name, value in vars(self).items():
            if name != "steps_done" and state.get(name) != value:
                raise ValueError(f"{name}: the state has {state.get(name)}, this schedule {value}")
        if set(state) != set(vars(self)):
            raise ValueError(f"state: got {sorted(state)}, takes {sorted(vars(self))}")
        self.steps_done = state["steps_done"]


class Warmup(Schedule):
    """From ``start`` to ``end`` along a straight line in ``steps`` steps, then ``end`` (Bowman et al. 2016, arXiv:1511.06349,
    section 3.1; Sonderby et al. 2016, arXiv:1602.02282, section 2.3).

    Args:
        steps: at least 1.
        start: first value. Default 0.
        end: last value. Default 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, steps: int, *, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__()
        _at_least("steps", steps, 1)
        self.steps, self.start, self.end = steps, _finite("start", start), _finite("end", end)

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


class Cyclical(Schedule):
    """Over and over again: from ``start`` to ``end`` in the first ``ratio`` of a period, then ``end`` (Fu et al. 2019,
    arXiv:1903.10145, eq. 6).

    Args:
        period: steps of a cycle, at least 1.
        cycles: after so many the value stays at ``end``. Default None: for ever.
        ratio: part of a cycle that rises, in (0, 1]. Default 0.5.
        start: value at the beginning of a cycle. Default 0.
        end: value at its end. Default 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, period: int, *, cycles: int | None = None, ratio: float = 0.5, start: float = 0.0, end: float = 1.0
    ) -> None:
        super().__init__()
        _at_least("period", period, 1)
        if cycles is not None:
            _at_least("cycles", cycles, 1)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: got {ratio}, takes a float in (0, 1]")
        self.period, self.cycles, self.ratio = period, cycles, ratio
        self.start, self.end = _finite("start", start), _finite("end", end)

    def at(self, step: int) -> float:
        if self.cycles is not None and step >= self.cycles * self.period:
            return self.end
        # Not by %, which a compiler for which the step is a symbol cannot divide.
        position = (step - step // self.period * self.period) / self.period
        return self.start + (self.end - self.start) * min(1.0, position / self.ratio)


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, takes an int, at least {least}")


def _finite(name: str, value: object) -> float:
    value = arguments.number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, takes a finite float")
    return value
