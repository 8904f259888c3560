from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.errors import ConfigError
from ttrl.sources import EpochSource

sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, 3)))


def ids(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def drawn(source: EpochSource, steps: int) -> list[str]:
    return [prompt for step in range(steps) for prompt in source.batch(step)]


@settings(derandomize=True, max_examples=200)
@given(sizes)
def test_every_epoch_holds_every_prompt_once_and_no_step_holds_one_twice(case: tuple[int, int, int]) -> None:
    count, per_step, seed = case
    source = EpochSource(ids(count), per_step, seed)
    steps = 6 * count // per_step + 1
    stream = drawn(source, steps)
    for epoch in range(len(stream) // count):
        assert Counter(stream[epoch * count : (epoch + 1) * count]) == Counter(ids(count))
    for step in range(steps):
        batch = source.batch(step)
        assert len(batch) == per_step == len(set(batch))


@settings(derandomize=True, max_examples=50)
@given(sizes, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_batch_depends_on_the_step_only(case: tuple[int, int, int], asked: list[int]) -> None:
    count, per_step, seed = case
    used = EpochSource(ids(count), per_step, seed)
    for step in asked:
        assert used.batch(step) == EpochSource(ids(count), per_step, seed).batch(step)


def test_a_step_that_crosses_epochs_takes_from_both() -> None:
    # 5 prompts, 3 per step: step 1 is 2 prompts of the first epoch and 1 of the second
    source = EpochSource(list("abcde"), 3, 0)
    first = source.batch(0) + source.batch(1)[:2]
    assert sorted(first) == list("abcde")
    assert source.batch(1)[2] not in source.batch(1)[:2]


def test_batches_are_pinned() -> None:
    # a run that is resumed under a newer version must meet the same prompts
    source = EpochSource(list("abcde"), 3, 0)
    assert ["".join(source.batch(step)) for step in range(5)] == ["dce", "abd", "bce", "adb", "aec"]


def test_the_order_of_the_file_does_not_matter_but_the_seed_does() -> None:
    forward, backward = EpochSource(ids(20), 4, 0), EpochSource(ids(20)[::-1], 4, 0)
    assert drawn(forward, 10) == drawn(backward, 10)
    assert drawn(forward, 10) != drawn(EpochSource(ids(20), 4, 1), 10)


def test_epochs_are_shuffled_differently() -> None:
    source = EpochSource(ids(20), 20, 0)
    assert source.batch(0) != source.batch(1)


def test_more_prompts_per_step_than_prompts_is_an_error_that_names_the_limit() -> None:
    with pytest.raises(ConfigError, match="prompts_per_step is 4, but there are only 3 prompts"):
        EpochSource(ids(3), 4, 0)
