"""Each stabilizer by itself: the numbers of its formula, its random entries, and options that make no sense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_group, make_scored
from helpers_torch import samples, tiny_llama, token_scores, trainer

from ttrl.gates import Reliable, vote_entropy
from ttrl.hooks import Memory, Part, Update
from ttrl.metrics import MetricSet
from ttrl.trainers.fisher_pass import rows, squared_gradients
from ttrl.trainers.packing import pack
from ttrl.trainers.stabilizers.ema import EMATeacher
from ttrl.trainers.stabilizers.fisher import FisherAnchor
from ttrl.trainers.stabilizers.reset import FullReset
from ttrl.trainers.stabilizers.restore import StochasticRestore, drawn, positions
from ttrl.trainers.stabilizers.spikes import GradNormFilter


def update(step: int = 0, **fields: Any) -> Update:
    return Update(**{"seed": 0, "step": step, "number": 0, "loss": 0.1, "entropy": 1.0, "grad_norm": 1.0, **fields})


def part(weights: Any, name: str = "w", shape: Any = None, first: int = 0, start: Any = None, **fields: Any) -> Part:
    held = torch.as_tensor(weights, dtype=torch.float32)
    return Part(
        name=name, shape=shape or (held.numel(),), first=first, weights=held, start=None if start is None else torch.as_tensor(start),
        **{"moments": {}, **fields},
    )  # fmt: skip


class Held:
    """A Trained over given parts."""

    def __init__(self, *parts: Part) -> None:
        self.parts, self.resets = parts, 0

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def reset(self) -> None:
        self.resets += 1


# --- stochastic restore ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_entries_are_drawn_independently_with_probability_p(p: float) -> None:
    total = 200_000
    hit = np.zeros(total, bool)
    found = positions(7, p, total)
    hit[found] = True
    assert len(found) == hit.sum() and (np.diff(found) > 0).all() and found.min() >= 0 and found.max() < total
    for share, expected in ((hit.mean(), p), ((hit[1:] & hit[:-1]).mean(), p * p)):
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / total)
    # The chunks in which numbers are drawn depend on the total; the entries must not
    assert np.array_equal(positions(7, p, 1000), found[found < 1000])


def test_the_entries_of_a_slice_are_those_of_the_whole() -> None:
    whole = set(drawn(part(np.zeros(5000)), 0.2, update(3)).tolist())
    pieces = [(0, 1234), (1234, 1), (1235, 3765)]
    joined = [first + i for first, n in pieces for i in drawn(part(np.zeros(n), first=first), 0.2, update(3)).tolist()]
    assert joined == sorted(whole) and len(whole) > 800


def test_the_entries_depend_on_seed_step_update_and_name_only() -> None:
    base = drawn(part(np.zeros(5000)), 0.2, update(3)).tolist()
    assert base == drawn(part(np.ones(5000)), 0.2, update(3, loss=9.0, grad_norm=2.0)).tolist()
    others = [update(4), update(3, number=1), update(3, seed=1)]
    assert all(drawn(part(np.zeros(5000)), 0.2, other).tolist() != base for other in others)
    assert drawn(part(np.zeros(5000), name="v"), 0.2, update(3)).tolist() != base


def test_factors_of_an_adapter_are_restored_component_by_component() -> None:
    rank, inputs, outputs = 8, 6, 5
    a = part(np.zeros(rank * inputs), "l.lora_A.default.weight", (rank, inputs))
    b = part(np.zeros(outputs * rank), "l.lora_B.default.weight", (outputs, rank))
    for step in range(5):
        hit_a, hit_b = np.zeros(rank * inputs, bool), np.zeros(outputs * rank, bool)
        hit_a[drawn(a, 0.4, update(step))] = True
        hit_b[drawn(b, 0.4, update(step))] = True
        components = hit_a.reshape(rank, inputs)
        assert (components.all(1) == components.any(1)).all()
        assert np.array_equal(hit_b.reshape(outputs, rank), np.tile(components.any(1), (outputs, 1)))
        tail = part(np.zeros(17), b.name, b.shape, first=23)
        assert np.array_equal(drawn(tail, 0.4, update(step)), np.flatnonzero(hit_b[23:]))


def test_restoring_bounds_a_constant_drift() -> None:
    """d = p = 0.01: the mean displacement ends at d (1 - p) / p = 0.990, where without restoring it would be 15."""
    held = part(np.zeros(6000), start=np.zeros(6000, np.float32))
    stabilizer = StochasticRestore(p=0.01)
    for step in range(1500):
        held.weights += 0.01
        stabilizer.after_update(update(step), Held(held), MetricSet())
    assert float(held.weights.mean()) == pytest.approx(0.990, abs=0.05)


def test_restored_entries_have_no_moments_and_others_keep_theirs() -> None:
    def fresh() -> Part:
        moments = {"exp_avg": torch.full((1000,), 2.0), "exp_avg_sq": torch.full((1000,), 3.0)}
        return part(np.ones(1000), start=np.full(1000, -0.1, np.float32), moments=moments)

    both, first = fresh(), fresh()
    StochasticRestore(p=0.3).after_update(update(), Held(both), metrics := MetricSet())
    StochasticRestore(p=0.3, forget="first").after_update(update(), Held(first), MetricSet())
    back = both.weights == torch.tensor(-0.1)
    assert 200 < int(back.sum()) < 400 and metrics.values()["train/restored"] == pytest.approx(int(back.sum()) / 1000)
    assert torch.equal(both.weights == 1.0, ~back) and torch.equal(first.weights, both.weights)
    assert torch.equal(both.moments["exp_avg"] == 0, back) and torch.equal(both.moments["exp_avg_sq"] == 0, back)
    assert torch.equal(first.moments["exp_avg"] == 0, back) and bool((first.moments["exp_avg_sq"] == 3.0).all())


def test_without_a_signal_nothing_is_restored() -> None:
    held = part(np.ones(10), start=np.zeros(10, np.float32))
    StochasticRestore(p=1.0).after_update(update(grad_norm=0.0), Held(held), MetricSet())
    assert bool((held.weights == 1).all())
    StochasticRestore(p=1.0).after_update(update(), Held(held), MetricSet())
    assert bool((held.weights == 0).all())


# --- EMA teacher ----------------------------------------------------------------------------------------------------------


def test_the_teacher_after_n_equal_steps() -> None:
    """theta (1 - a^n) + theta0 a^n; after one step a once, not twice."""
    held, teacher = part([1.0, -2.0]), EMATeacher(decay=0.9)
    teacher.at_start(Held(held))
    held.weights.copy_(torch.tensor([3.0, 0.0]))
    for n in (1, 2, 3):
        teacher.after_update(update(n), Held(held), metrics := MetricSet())
        a = 0.9**n
        expected = [3.0 * (1 - a) + 1.0 * a, -2.0 * a]
        assert teacher.teacher_weights("w").tolist() == pytest.approx(expected, abs=1e-6)
        assert metrics.values()["train/teacher_gap"] == pytest.approx(4.0 * a * a, rel=1e-5)
    other = EMATeacher(decay=0.9)
    other.at_start(Held(part([0.0, 0.0])))
    other.recall(Memory(tensors={"w": teacher.teacher_weights("w").clone()}))
    assert torch.equal(other.teacher_weights("w"), teacher.teacher_weights("w"))


# --- Fisher anchor --------------------------------------------------------------------------------------------------------


def test_the_anchor_balances_a_quadratic_at_one_half() -> None:
    """0.5 (theta - 1)^2 with coefficient * omega = 0.5 and start 0: theta = 0.5 (and 1 without the anchor)."""
    anchor = FisherAnchor(coefficient=2.0)
    anchor.take_squares({"w": torch.tensor([1.0])}, 4)  # omega = 1/4
    held = part([0.0], start=[0.0])
    for _ in range(200):
        held.gradient = held.weights - 1.0
        value = anchor.add_gradient(Held(held), metrics := MetricSet())
        held.weights -= 0.1 * held.gradient
    assert float(held.weights) == pytest.approx(0.5, abs=1e-6)
    assert value == pytest.approx(0.5 * 0.25, abs=1e-6) and metrics.values()["train/fisher"] == value
    assert anchor.rollouts_wanted == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_squares_are_those_of_single_rollouts(tiny_model_dir: Path, checkpointing: bool) -> None:
    ours = trainer(tiny_model_dir, temperature=0.8, settings={"gradient_checkpointing": checkpointing})
    batches = pack(samples(), 40)
    assert len(batches) > 1
    got, tokens = squared_gradients(lambda row: ours._loss.scorer(row).logprobs, batches, ours._trained, 5)
    assert all(p.grad is None for p in ours._trained.values())
    twin = tiny_llama().double()
    expected = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    chosen = list(rows(batches))[:5]
    for row in chosen:
        twin.zero_grad()
        token_scores(twin, row, 0.8)[0].sum().backward()
        for name, p in twin.named_parameters():
            expected[name] += p.grad**2
    assert tokens == sum(len(row.completion_ids) for row in chosen) and len(chosen) == 5
    scale = max(float(square.max()) for square in expected.values())
    for name, square in expected.items():
        assert float((got[name].view_as(square) - square).abs().max()) < 1e-4 * scale


def test_rows_are_the_samples_that_were_packed() -> None:
    items = {item.completion_ids.tobytes(): item for item in samples()}
    found = list(rows(pack(list(items.values()), 40)))
    assert {row.completion_ids.tobytes() for row in found} == items.keys() and len(found) == len(items) == 7
    for row in found:
        item = items[row.completion_ids.tobytes()]
        assert np.array_equal(row.segments[0].prompt_ids, item.prompt_ids)
        for name in ("completion_ids", "sampler_logprobs", "advantages", "weights"):
            assert np.array_equal(getattr(row, name), getattr(item, name))


# --- gradient-norm filter and full reset ----------------------------------------------------------------------------------


def test_a_norm_far_above_the_usual_is_vetoed_once_enough_are_known() -> None:
    stabilizer = GradNormFilter(quantile=0.5, factor=2.0, window=4, warmup=3)
    seen = [stabilizer.before_update(update(grad_norm=norm), MetricSet()) for norm in (9.0, 1.0, 1.0, 2.1, 2.0, 50.0)]
    # known before:                    -    -    -   9 1 1 -> 2.0   9 1 1 2.1 -> 3.1   1 1 2.1 2 -> 3
    assert seen == [True, True, True, False, True, False]
    twin = GradNormFilter(quantile=0.5, factor=2.0, window=4, warmup=3)
    twin.recall(stabilizer.memory())
    assert twin.bound == stabilizer.bound == pytest.approx(2 * 2.05)  # 1 2.1 2 50
    for _ in range(3):  # a new scale that lasts is accepted: 2.1 2 50 50 -> 2 50 50 50 -> 50 50 50 50
        last = stabilizer.before_update(update(grad_norm=50.0), metrics := MetricSet())
    assert last and metrics.values() == {"train/vetoed": 0.0}
    stabilizer.at_start(Held())
    assert stabilizer.bound == math.inf


def test_collapse_of_the_entropy_resets_at_the_eleventh_update_and_then_starts_anew() -> None:
    """Average from 0.5 with inputs of 0.05 and decay 0.9: 0.05 + 0.45 * 0.9^n < 0.2 first at n = 11."""
    stabilizer, held = FullReset(below=0.2), Held()
    stabilizer.recall(Memory(numbers={"average": 0.5}))
    for n in range(1, 12):
        assert held.resets == 0
        stabilizer.after_update(update(n, entropy=0.05), held, metrics := MetricSet())
    assert held.resets == 1 and metrics.values()["train/reset"] == 1.0
    stabilizer.at_start(held)  # as the trainer does after a reset
    assert stabilizer.average is None
    stabilizer.after_update(update(12, entropy=0.3), held, MetricSet())
    assert held.resets == 1 and stabilizer.memory().numbers == {"average": 0.3}


# --- reliable prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "entropy", "reason"),
    [
        ([0] * 8, 0.0, "vote_entropy_low"),
        ([0] * 7 + [1], 0.3768, None),
        ([0] * 6 + [1] * 2, 0.5623, None),
        ([0] * 5 + [1] * 3, 0.6616, None),
        ([0] * 5 + [1] * 2 + [2], 0.9003, "vote_entropy_high"),
        ([0, 0, 1, 1, -1, -1, -1, -1], 0.6931, None),  # silence is no vote, but the bound is that of eight rollouts
        ([-1] * 8, 0.0, "vote_entropy_low"),
    ],
)
def test_reliable_keeps_a_band_of_the_entropy_of_the_vote(
    classes: list[int], entropy: float, reason: str | None
) -> None:
    scored = make_scored(classes, group=make_group([""] * 8))
    assert vote_entropy(scored) == pytest.approx(entropy, abs=5e-5)
    assert Reliable()(scored) == reason


def test_reliable_weighs_nearly_unanimous_prompts_most() -> None:
    def weight(entropy_of: list[int], **options: Any) -> float:
        return Reliable(weigh=True, **options).weight(make_scored(entropy_of, group=make_group([""] * 8)))

    assert weight([0] * 8) == pytest.approx(2.2974, abs=5e-5)  # exp(0.4 ln 8)
    assert weight([0] * 6 + [1] * 2) == pytest.approx(2.29740 / math.exp(0.56234), abs=5e-5)
    assert weight([0] * 4 + [1] * 4, high=1 / 3) == pytest.approx(1.0, abs=1e-6)  # at the bound: ln 2 = ln 8 / 3
    assert Reliable().weight(make_scored([0] * 8)) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StochasticRestore(p=1.1), "p in"),
        (lambda: EMATeacher(decay=1.0), "decay"),
        (lambda: FisherAnchor(coefficient=0.0), "positive coefficient"),
        (lambda: FisherAnchor(rollouts=0), "at least 1 rollout"),
        (lambda: GradNormFilter(quantile=0.0), "quantile"),
        (lambda: GradNormFilter(warmup=65), "warmup <= window"),
        (lambda: FullReset(below=0.0), "below > 0"),
        (lambda: FullReset(below=0.1, decay=1.0), "decay"),
        (lambda: Reliable(low=0.5, high=0.5), "low"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
