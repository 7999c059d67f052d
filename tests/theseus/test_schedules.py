"""Shares at given steps, and draws that are what they must be."""

from __future__ import annotations

import itertools

import pytest

from fastattn.theseus import BlendSchedule, ConstantSchedule, LinearSchedule
from fastattn.theseus.gates import draw
from fastattn.theseus.schedules import SCHEDULES, make_schedule


def test_constant_rate_until_a_step() -> None:
    schedule = ConstantSchedule(0.5, until=3)
    assert [schedule(step) for step in range(5)] == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert ConstantSchedule(0.25)(10**6) == 0.25
    assert not schedule.blends


def test_linear_rate_is_min_of_one_and_kt_plus_b() -> None:
    schedule = LinearSchedule(base=0.25, slope=0.125)
    assert [schedule(step) for step in range(8)] == [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    over = LinearSchedule.over(100, base=0.3)
    assert over(0) == 0.3 and over(99) < 1.0 and over(100) == pytest.approx(1.0)


def test_blend_goes_from_base_to_one() -> None:
    schedule = BlendSchedule(steps=4, base=0.5)
    assert [schedule(step) for step in range(6)] == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    assert schedule.blends


def test_schedules_by_name_end_at_one() -> None:
    assert make_schedule("linear", 8, 0.5) == LinearSchedule(0.5, 0.0625)
    assert make_schedule("blend", 8, 0.5) == BlendSchedule(8, 0.5)
    assert make_schedule("constant", 8, 0.5) == ConstantSchedule(0.5, until=4)
    for name in SCHEDULES:
        schedule = make_schedule(name, 8, 0.25)
        assert schedule(0) == 0.25 and schedule(8) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantSchedule(1.5), r"rate must be within 0..1; got 1.5"),
        (lambda: LinearSchedule(base=-0.1), r"base must be within 0..1; got -0.1"),
        (lambda: LinearSchedule(slope=-1.0), r"slope must not be negative; got -1.0"),
        (lambda: BlendSchedule(0), r"steps must be at least 1; got 0"),
        (lambda: make_schedule("cosine", 8, 0.5), r"linear, constant, blend; got 'cosine'"),
    ],
)
def test_impossible_schedules_raise(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_draws_are_of_seed_and_pass_alone() -> None:
    assert draw(3, 17, 6, 0.5) == draw(3, 17, 6, 0.5)
    passes = [draw(3, number, 6, 0.5) for number in range(64)]
    assert len(set(passes)) > 30  # of 64 possible combinations, at random 41 of them
    assert passes != [draw(4, number, 6, 0.5) for number in range(64)]


def test_draws_are_independent_with_the_rate_asked_for() -> None:
    rows = [draw(0, number, 4, 0.3) for number in range(20_000)]
    for module in range(4):
        assert sum(row[module] for row in rows) / len(rows) == pytest.approx(0.3, abs=0.015)
    both = sum(row[0] and row[3] for row in rows) / len(rows)
    after = sum(a[1] and b[1] for a, b in itertools.pairwise(rows)) / len(rows)
    assert both == pytest.approx(0.09, abs=0.01) and after == pytest.approx(0.09, abs=0.01)


def test_rates_zero_and_one_are_certain() -> None:
    for number in range(200):
        assert not any(draw(number, number, 5, 0.0)) and all(draw(number, number, 5, 1.0))
