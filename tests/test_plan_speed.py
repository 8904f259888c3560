"""Seconds: closed forms of decoding, training and the pipeline."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan_memory import H100, LORA, ON_GPUS, SEVEN, recipe, work

from ttrl.plan.activations import trained
from ttrl.plan.devices import Fleet, parse_gpus
from ttrl.plan.memory import Layout
from ttrl.plan.options import options, scaling
from ttrl.plan.pipeline import simulate
from ttrl.plan.speed import StepTime, decode, lengths, sampling, syncing, train_flops, training

seconds = st.floats(0.01, 100.0)
times = st.builds(StepTime, sample=seconds, grade=seconds, train=seconds, sync=seconds)


@given(times=times, steps=st.integers(1, 50))
def test_in_step_the_parts_add_up(times: StepTime, steps: int):
    line = simulate(times, steps, 0, (1.0,))
    assert line.total == pytest.approx(steps * (times.sample + times.grade + times.train + times.sync))
    assert line.step == pytest.approx(times.total)


@given(times=times)
def test_one_ahead_the_slower_side_sets_the_pace(times: StepTime):
    line = simulate(times, 400, 1, (1.0,))
    assert line.step == pytest.approx(max(times.sample, times.grade + times.train) + times.sync)


@given(times=times, ahead=st.integers(1, 8), steps=st.integers(1, 60))
def test_more_ahead_is_never_slower_and_never_beats_the_slower_side(times: StepTime, ahead: int, steps: int):
    some, more = simulate(times, steps, ahead), simulate(times, steps, ahead + 1)
    assert more.total <= some.total * (1 + 1e-9)
    assert some.total >= steps * (times.grade + times.train + times.sync) * (1 - 1e-9)
    assert 0 < some.sampling_busy <= 1 + 1e-9 and 0 < some.training_busy <= 1 + 1e-9


def test_equal_halves_without_sync_are_twice_as_fast_ahead():
    even = StepTime(sample=5.0, grade=0.0, train=5.0, sync=0.0)
    assert simulate(even, 200, 0, (1.0,)).step == pytest.approx(2 * simulate(even, 200, 1, (1.0,)).step)


def test_sampling_waits_for_the_weights_it_needs():
    # Sampling takes 2 and 10 in turn, training 6. One ahead: a long one starts with the training before it and lasts 4 longer;
    # two ahead: it starts while the one before that is still trained on, and both sides are always busy
    uneven = StepTime(sample=6.0, grade=0.0, train=6.0, sync=0.0)
    turns = (1 / 3, 5 / 3)
    assert simulate(uneven, 400, 1, turns).step == pytest.approx((6 + 10) / 2)
    assert simulate(uneven, 400, 2, turns).step == pytest.approx(6.0)
    assert simulate(uneven, 400, 0, turns).step == pytest.approx(12.0)


def test_decoding_by_hand():
    # Two at once, a step costs 1 + active: three tokens with both, then the third starts, and the second ends after five
    assert decode([3, 5, 4], 2, lambda active: 1.0 + active) == pytest.approx(3 * 3 + 2 * 3 + 2 * 2)
    assert decode([7.0], 1, lambda active: 2.0) == pytest.approx(14.0)
    assert decode([4, 4], 8, lambda active: 1.0) == pytest.approx(4.0)


@given(count=st.integers(200, 400), longest=st.integers(8, 4096), share=st.floats(0.1, 0.9))
def test_lengths_have_the_mean_and_a_tail(count: int, longest: int, share: float):
    drawn = lengths(count, max(1.0, share * longest), longest)
    assert sum(drawn) / count == pytest.approx(max(1.0, share * longest), rel=0.05, abs=1.0)
    assert 0.8 * longest < max(drawn) <= longest


def test_a_weight_read_bounds_decoding():
    one = Layout(placement="split", ranks=1, workers=1)
    single = work(prompts=1, votes=2, trained=2, prompt=1, longest=100, mean=100 * (1 - 1e-9))
    read = 2 * (SEVEN.layers * SEVEN.layer_matrices + SEVEN.embedding) / (0.6 * H100.bandwidth)
    assert sampling(ON_GPUS, SEVEN, single, one, H100) == pytest.approx(100 * (read + 2e-3), rel=0.02)


def test_training_flops_by_hand():
    few = work(prompts=1, votes=2, trained=2, prompt=10, longest=8, mean=8.0, budget=10_000)
    matrices = SEVEN.layers * SEVEN.layer_matrices
    attention = 3 * 16 * 4 * SEVEN.layers * SEVEN.query * (10 + 4)
    full = recipe(model__dtype="bfloat16")
    expected = 6 * (10 + 16) * matrices + 6 * 16 * SEVEN.embedding + attention
    assert train_flops(full, SEVEN, few, trained(full, SEVEN)) == pytest.approx(expected)
    lora = recipe(trainer__parameters=LORA)
    assert train_flops(lora, SEVEN, few, trained(lora, SEVEN)) == pytest.approx(expected * 4 / 6)
    again = recipe(trainer__gradient_checkpointing=True)  # and every row computes the prompt
    ratio = train_flops(again, SEVEN, few, trained(again, SEVEN)) / expected
    assert ratio == pytest.approx(8 / 6 * 36 / 26, rel=0.1)


def test_a_rank_alone_exchanges_nothing_and_two_exchange_their_gradients():
    per_rank = [
        training(ON_GPUS, SEVEN, replace(work(), prompts=8 * n), Layout(placement="split", ranks=n, workers=1), H100)
        for n in (1, 2)
    ]
    assert per_rank[1] - per_rank[0] > 0.9 * SEVEN.parameters / H100.link


def test_sync_moves_what_changed():
    split = Layout(placement="split", ranks=1, workers=1)
    full = recipe(model__dtype="bfloat16")
    assert syncing(full, SEVEN, split, H100) == pytest.approx(2 * SEVEN.parameters / 8e9)
    adapters = recipe(model__dtype="bfloat16", trainer__parameters=LORA)
    moved = SEVEN.layers * (3584 * 3584 + 3584 * 512)
    assert syncing(adapters, SEVEN, split, H100) == pytest.approx(2 * moved / 8e9)


def test_scaling_loses_efficiency_and_costs_more():
    big = work(prompts=64, votes=16, trained=16, longest=2048, mean=1024.0, budget=8192)
    rows = scaling(ON_GPUS, SEVEN, big, parse_gpus("8xH100"), 3.0)
    assert [row.devices for row in rows] == [2**n for n in range(int(math.log2(rows[0].devices)), 11)]
    assert rows[0].efficiency == 1.0
    # A doubling may be a little more than twice as fast where it lets the two sides be divided better
    assert all(later.step <= first.step * 1.001 for first, later in pairwise(rows))
    assert rows[-1].efficiency < 0.5 < rows[1].efficiency and rows[-1].price > rows[0].price


def test_ahead_pays_on_a_split():
    big = work(prompts=64, votes=16, trained=16, longest=2048, mean=1024.0, budget=8192)
    by_name = {o.name: o for o in options(ON_GPUS, SEVEN, big, Fleet(H100, 8), 1.0)}
    assert by_name["split, ahead 1"].timeline.step < by_name["split"].timeline.step
