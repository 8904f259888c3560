"""Sampling in step and ahead: which weights draw which step, that it overlaps, ends, fails and resumes as it should."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.errors import EngineError, StopRequested
from ttrl.flow import InStep, RunAhead
from ttrl.types import StepStats

TRAINED = StepStats(metrics={"train/sampler_mismatch": 0.0}, tokens=1, grad_norm=1.0, lr=1.0, updates=1)


class Link:
    """Stands for trainer, pool and everything between: a number is the weights."""

    def __init__(self) -> None:
        self.trainer = self.engine = 0
        self.busy = False
        self.checked = 0

    def sync(self, stats: StepStats | None) -> None:
        assert stats is not None
        self.install(self.trainer)

    def keep(self, stats: StepStats | None) -> int:
        assert stats is not None
        return self.trainer

    def install(self, published: int) -> None:
        assert not self.busy, "new weights while something is sampled"
        self.engine = published

    def check_on_policy(self, stats: StepStats) -> None:
        self.checked += 1


def run(
    make: Callable[[Link, Callable[[int], Any]], Any], steps: int, idle: frozenset[int] = frozenset(), first: int = 0
) -> list[int]:
    """Weights that drew each step, under a loop like that of ttrl.loop; steps in `idle` train nothing."""
    link = Link()
    link.trainer = link.engine = first
    used: dict[int, int] = {}

    def draw(step: int) -> list[Any]:
        assert not link.busy
        link.busy = True
        used[step] = link.engine
        link.busy = False
        return []

    flow = make(link, draw)
    for step in range(first, steps):
        drawn = flow.groups(step)
        assert used[step] == link.engine or drawn.state < step
        stats = None if step in idle else TRAINED
        if stats is not None:
            link.trainer = step + 1
        flow.publish(step + 1, stats)
    flow.close()
    return [used[step] for step in range(first, steps)]


def ahead(by: int, steps: int, boundaries: frozenset[int] = frozenset(), first: int = 0) -> Callable[..., RunAhead]:
    return lambda link, draw: RunAhead(
        draw, link, ahead=by, first=first, steps=steps, is_boundary=lambda step: step in boundaries
    )


def test_in_step_every_group_is_from_the_current_weights() -> None:
    assert run(lambda link, draw: InStep(draw, link), 5) == [0, 1, 2, 3, 4]


def test_in_step_nothing_is_synced_when_nothing_was_trained() -> None:
    assert run(lambda link, draw: InStep(draw, link), 5, idle=frozenset({1, 2})) == [0, 1, 1, 1, 4]


def test_one_ahead_is_one_step_old() -> None:
    assert run(ahead(1, 6), 6) == [0, 0, 1, 2, 3, 4]


def test_three_ahead_is_three_steps_old() -> None:
    assert run(ahead(3, 7), 7) == [0, 0, 0, 0, 1, 2, 3]


def test_at_boundaries_sampling_waits_for_training() -> None:
    assert run(ahead(1, 8, frozenset({3, 6})), 8) == [0, 0, 1, 3, 3, 4, 6, 6]
    assert run(ahead(2, 8, frozenset({3, 4})), 8) == [0, 0, 0, 3, 4, 4, 4, 5]


def test_a_run_resumed_at_a_boundary_uses_the_weights_of_one_that_was_not_stopped() -> None:
    boundaries = frozenset({4, 8})
    whole = run(ahead(2, 12, boundaries), 12)
    assert run(ahead(2, 12, boundaries, first=4), 12, first=4) == whole[4:]


@settings(deadline=None, max_examples=60)
@given(
    by=st.integers(1, 4), steps=st.integers(1, 12), boundaries=st.frozensets(st.integers(1, 12)),
    idle=st.frozensets(st.integers(0, 11)),
)  # fmt: skip
def test_weights_are_a_function_of_the_recipe(
    by: int, steps: int, boundaries: frozenset[int], idle: frozenset[int]
) -> None:
    """The state a step asks for, and of that state the weights of the last step that trained something."""
    found = run(ahead(by, steps, boundaries), steps, idle)
    for step, weights in enumerate(found):
        state = max([0, step - by, *(b for b in boundaries if b <= step)])
        assert weights == max([0, *(s + 1 for s in range(state) if s not in idle)])


def test_sampling_really_runs_while_training_does() -> None:
    """Step 1 is drawn before step 0 is published: it would dead-lock (and time out) otherwise."""
    link, drawn = Link(), threading.Event()

    def draw(step: int) -> list[Any]:
        if step == 1:
            drawn.set()
        return []

    flow = ahead(1, 3)(link, draw)
    flow.groups(0)
    assert drawn.wait(timeout=30)
    link.trainer = 1
    flow.publish(1, TRAINED)
    flow.groups(1)
    flow.close()


@pytest.mark.parametrize("error", [EngineError("stale"), StopRequested("stopped by SIGINT")])
def test_what_sampling_raises_reaches_the_loop(error: Exception) -> None:
    def draw(step: int) -> list[Any]:
        if step == 1:
            raise error
        return []

    flow = ahead(1, 5)(Link(), draw)
    flow.groups(0)
    flow.publish(1, TRAINED)
    with pytest.raises(type(error)):
        flow.groups(1)
    flow.close()
    assert not flow._thread.is_alive()


def test_closing_in_the_middle_ends_the_thread() -> None:
    flow = ahead(2, 50)(Link(), lambda step: [])
    flow.groups(0)
    flow.close()
    assert not flow._thread.is_alive()


def test_only_in_step_are_log_probs_held_against_the_trainers() -> None:
    link = Link()
    flow = InStep(lambda step: [], link)  # type: ignore[arg-type]
    flow.groups(0)
    flow.publish(1, TRAINED)
    assert link.checked == 1
