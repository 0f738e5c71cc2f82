"""The curve of tries, as its docstring states it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamiyo.retry import MAX_ATTEMPTS, delay_after

seeds = st.integers(0, 2**32)


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 10), (2, 60), (3, 360), (4, 2160)])
@given(seed=seeds)
def test_each_wait_is_six_times_the_one_before_give_or_take_a_fifth(attempt: int, seconds: float, seed: int) -> None:
    wait = delay_after(attempt, random.Random(seed))
    assert wait is not None
    assert 0.8 * seconds <= wait <= 1.2 * seconds


@given(st.integers(MAX_ATTEMPTS, 10**6), seeds)
def test_after_the_fifth_try_there_is_no_next_one(attempt: int, seed: int) -> None:
    assert MAX_ATTEMPTS == 5
    assert delay_after(attempt, random.Random(seed)) is None


@given(st.floats(0.01, 3600), st.integers(1, 4), seeds)
def test_the_whole_curve_scales_with_its_first_wait(first: float, attempt: int, seed: int) -> None:
    scaled = delay_after(attempt, random.Random(seed), first=first)
    plain = delay_after(attempt, random.Random(seed), first=1.0)
    assert scaled is not None and plain is not None
    assert scaled == pytest.approx(first * plain)


@given(seeds)
def test_all_five_tries_are_over_within_the_hour_so_that_a_person_hears_of_it_the_same_day(seed: int) -> None:
    rng = random.Random(seed)
    waits = [delay_after(attempt, rng) for attempt in range(1, MAX_ATTEMPTS)]
    assert sum(wait or 0 for wait in waits) < 3600


def test_a_thousand_events_felled_by_one_outage_do_not_come_back_in_one_second() -> None:
    rng = random.Random(7)
    waits = sorted(delay_after(2, rng) or 0 for _ in range(1000))
    fullest = max(sum(second <= wait < second + 1 for wait in waits) for second in range(48, 72))
    assert waits[-1] - waits[0] > 20
    assert fullest < 100


def test_without_a_generator_of_its_own_each_call_draws_anew() -> None:
    assert len({delay_after(1) for _ in range(100)}) > 90


@given(st.integers(-5, 0), seeds)
def test_a_try_that_was_never_counted_waits_like_the_first(attempt: int, seed: int) -> None:
    assert delay_after(attempt, random.Random(seed)) == delay_after(1, random.Random(seed))
