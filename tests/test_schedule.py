"""Learning-rate schedules as functions of the update number."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttrl.trainers.schedule import lr_scale


def curve(total: int, schedule: str, warmup: float = 0.0, min_ratio: float = 0.0) -> list[float]:
    return [lr_scale(i, total, schedule=schedule, warmup=warmup, min_ratio=min_ratio) for i in range(total)]


def test_constant_is_one_after_the_warmup() -> None:
    assert curve(6, "constant", warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_linear_falls_in_equal_steps() -> None:
    assert curve(4, "linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert curve(4, "linear", min_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])


def test_cosine_golden_numbers() -> None:
    # (1 + cos(pi k / 4)) / 2 for k = 0 .. 3
    assert curve(4, "cosine") == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert curve(4, "cosine", min_ratio=0.5) == pytest.approx([1, 0.9267767, 0.75, 0.5732233])


def test_warmup_rises_to_the_peak_and_then_falls() -> None:
    assert curve(6, "linear", warmup=1 / 3) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert curve(4, "cosine", warmup=1.0) == pytest.approx([0.25, 0.5, 0.75, 1])


def test_warmup_length_is_not_a_victim_of_rounding() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point, and 7 updates are meant
    assert curve(100, "constant", warmup=0.07).index(1.0) == 6
    assert curve(100, "constant", warmup=0.071).index(1.0) == 7


@given(
    st.integers(1, 300), st.sampled_from(["cosine", "linear", "constant"]), st.floats(0, 1), st.floats(0, 1)
)  # fmt: skip
def test_every_update_moves_and_none_exceeds_the_peak(total: int, schedule: str, warmup: float, low: float) -> None:
    values = curve(total, schedule, warmup, low)
    assert all(0 < value <= 1 for value in values)
    peak = values.index(max(values))
    assert all(a <= b for a, b in pairwise(values[: peak + 1]))
    assert all(a >= b for a, b in pairwise(values[peak:]))
    assert schedule == "constant" or values[-1] >= min(low, values[0])


@pytest.mark.parametrize("update", [-1, 4, 5])
def test_updates_outside_the_run_are_refused(update: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0 \.\. 3"):
        lr_scale(update, 4, schedule="cosine", warmup=0.0, min_ratio=0.0)
