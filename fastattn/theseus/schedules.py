"""How much of the successor takes part at a training step: the curriculum of replacing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

SCHEDULES = ("linear", "constant", "blend")


class Schedule(Protocol):
    """``schedule(step)`` is the successor's share, from 0 to 1, at a step counted from 0.

    Where ``blends`` is False it is the probability that a module is replaced in a forward pass;
    where it is True, the weight of the successor's output in a sum with the predecessor's.
    """

    @property
    def blends(self) -> bool: ...

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class ConstantSchedule:
    """A constant rate, and 1 from step ``until`` on (never, if None).

    Raises:
        ValueError: a rate outside of [0, 1].
    """

    rate: float = 0.5
    until: int | None = None
    blends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_share("rate", self.rate)

    def __call__(self, step: int) -> float:
        return 1.0 if self.until is not None and step >= self.until else self.rate


@dataclass(frozen=True)
class LinearSchedule:
    """min(1, slope * step + base): the paper's curriculum, better than a constant rate in all of
    its experiments. The defaults are those of its published example (MRPC).

    Raises:
        ValueError: a base outside of [0, 1] or a negative slope.
    """

    base: float = 0.3
    slope: float = 0.0006
    blends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_share("base", self.base)
        if not self.slope >= 0:
            raise ValueError(f"slope must not be negative; got {self.slope}")

    def __call__(self, step: int) -> float:
        return min(1.0, self.slope * step + self.base)

    @classmethod
    def over(cls, steps: int, base: float = 0.3) -> LinearSchedule:
        """The schedule that reaches 1 at step ``steps``."""
        return cls(base, (1.0 - base) / max(1, steps))


@dataclass(frozen=True)
class BlendSchedule:
    """No draw: both run, and the output is (1 - a) predecessor + a successor with
    a = min(1, base + (1 - base) step / steps). Without the variance of a gate, at twice its cost.

    Raises:
        ValueError: a base outside of [0, 1] or fewer than one step.
    """

    steps: int
    base: float = 0.0
    blends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share("base", self.base)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")

    def __call__(self, step: int) -> float:
        return min(1.0, self.base + (1.0 - self.base) * step / self.steps)


def make_schedule(name: str, steps: int, base: float) -> Schedule:
    """A schedule for a training of ``steps`` steps: "linear" or "blend" from ``base`` at the first
    to 1 at the last, or "constant", ``base`` in the first half and 1 in the second.

    Raises:
        ValueError: another name, or a base outside of [0, 1].
    """
    if name == "linear":
        return LinearSchedule.over(steps, base)
    if name == "blend":
        return BlendSchedule(max(1, steps), base)
    if name == "constant":
        return ConstantSchedule(base, until=steps // 2)
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {name!r}")


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be within 0..1; got {value}")
