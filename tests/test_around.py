"""Stabilizers inside the torch trainer: what happens to weights, moments and the proof that weights moved; save and load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_torch import largest_difference, one_update, samples, trainer, weights_of

from ttrl.errors import ConfigError
from ttrl.hooks import Update
from ttrl.metrics import MetricSet
from ttrl.trainers.packing import pack, split_updates
from ttrl.trainers.parameters import Full, LoRA
from ttrl.trainers.stabilizers.ema import EMATeacher
from ttrl.trainers.stabilizers.fisher import FisherAnchor
from ttrl.trainers.stabilizers.reset import FullReset
from ttrl.trainers.stabilizers.restore import StochasticRestore
from ttrl.trainers.stabilizers.spikes import GradNormFilter
from ttrl.trainers.torch_backend import TorchTrainer
from ttrl.types import StepStats

KINDS = pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])


def made(folder: Path, *stabilizers: Any, **fields: Any) -> TorchTrainer:
    settings = {"lr": 0.01, **fields.pop("settings", {})}
    return trainer(folder, temperature=0.8, stabilizers=stabilizers, settings=settings, **fields)


def run(of: TorchTrainer, *steps: int) -> list[StepStats]:
    return [of.step(step, one_update(samples(seed=step), 25)) for step in steps]


def trained(of: TorchTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of._trained.items()}


def moments(of: TorchTrainer) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": value.clone()
        for name, p in of._trained.items()
        for key, value in of._optimizer.state[p].items()
        if key != "step"
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Veto:
    """Vetoes the updates of these steps."""

    needs: frozenset[str] = frozenset()

    def __init__(self, *steps: int) -> None:
        self.steps, self.seen = steps, []

    def before_update(self, update: Update, metrics: MetricSet) -> bool:
        self.seen.append(update)
        return update.step not in self.steps


# --- stochastic restore ---------------------------------------------------------------------------------------------------


@KINDS
def test_restoring_everything_gives_the_start_byte_for_byte_and_moments_of_zero(
    tiny_model_dir: Path, parameters: Any
) -> None:
    ours = made(tiny_model_dir, StochasticRestore(p=1.0), parameters=parameters())
    start, sent = trained(ours), weights_of(ours)
    stats = run(ours, 0, 1)[-1]
    assert stats.grad_norm > 0 and stats.may_stand and stats.metrics["train/restored"] == 1.0
    assert same(trained(ours), start) and same(weights_of(ours), sent)
    assert len(moments(ours)) == 2 * len(start) and all(not m.any() for m in moments(ours).values())


@KINDS
def test_restoring_nothing_is_no_stabilizer_bit_for_bit(tiny_model_dir: Path, parameters: Any) -> None:
    ours, plain = (made(tiny_model_dir, *s, parameters=parameters()) for s in ((StochasticRestore(p=0.0),), ()))
    assert run(ours, 0, 1) == run(plain, 0, 1)
    assert same(trained(ours), trained(plain)) and same(moments(ours), moments(plain))


@KINDS
def test_restoring_some_entries_leaves_the_others_as_the_optimizer_left_them(
    tiny_model_dir: Path, parameters: Any
) -> None:
    ours, plain = (made(tiny_model_dir, *s, parameters=parameters()) for s in ((StochasticRestore(p=0.3),), ()))
    start = trained(ours)
    stats, _ = run(ours, 0)[0], run(plain, 0)
    assert not stats.may_stand and 0.2 < stats.metrics["train/restored"] < 0.4
    restored = 0
    for name, now in trained(ours).items():
        # Entries without a gradient stay where they are in both: only moved ones tell
        moved = trained(plain)[name] != start[name]
        back = (now == start[name]) & moved
        assert torch.equal(now[~back], trained(plain)[name][~back])
        for key in ("exp_avg", "exp_avg_sq"):
            held, expected = moments(ours)[f"{name} {key}"], moments(plain)[f"{name} {key}"]
            assert not held[back].any() and torch.equal(held[moved & ~back], expected[moved & ~back])
        restored += int(back.sum())
    assert restored > 0


# --- veto and reset -------------------------------------------------------------------------------------------------------


@KINDS
def test_a_vetoed_update_leaves_no_trace(tiny_model_dir: Path, parameters: Any) -> None:
    ours, plain = made(tiny_model_dir, Veto(1), parameters=parameters()), made(tiny_model_dir, parameters=parameters())
    first, vetoed, last = run(ours, 0, 1, 2)
    assert (first.may_stand, vetoed.may_stand, last.may_stand) == (False, True, False)
    assert vetoed.grad_norm > 0 and ours.version == 3
    assert run(plain, 0, 2)[-1].metrics == last.metrics
    assert same(trained(ours), trained(plain)) and same(moments(ours), moments(plain))


def test_the_facts_of_an_update_are_those_of_the_step(tiny_model_dir: Path) -> None:
    watch = Veto()
    ours = made(tiny_model_dir, watch, settings={"updates_per_step": 2}, seed=5)
    stats = ours.step(3, [pack(share, 25) for share in split_updates(samples(), 2)])
    one, two = watch.seen
    assert [(u.seed, u.step, u.number) for u in watch.seen] == [(5, 3, 0), (5, 3, 1)]
    assert max(one.grad_norm, two.grad_norm) == stats.grad_norm
    assert (one.loss + two.loss) / 2 == pytest.approx(stats.metrics["train/loss"])
    assert min(one.entropy, two.entropy) <= stats.metrics["train/entropy"] <= max(one.entropy, two.entropy)
    assert one.entropy != two.entropy


def test_a_spike_is_left_out_by_the_filter(tiny_model_dir: Path) -> None:
    ours = made(tiny_model_dir, GradNormFilter(quantile=1.0, factor=1.5, warmup=2))
    run(ours, 0, 0)
    before = trained(ours)
    spike = [replace(item, advantages=item.advantages * 50) for item in samples(seed=1)]
    assert ours.step(2, one_update(spike, 25)).metrics["train/vetoed"] == 1.0
    assert same(trained(ours), before)
    assert run(ours, 0)[0].metrics["train/vetoed"] == 0.0
    assert not same(trained(ours), before)


def test_a_reset_gives_a_new_run(tiny_model_dir: Path) -> None:
    """Weights, optimizer and teacher are those of the start; the next step is the first step of a fresh trainer."""
    teacher = EMATeacher(decay=0.5)
    ours, plain = made(tiny_model_dir, teacher, FullReset(below=1e9)), made(tiny_model_dir)
    start = trained(ours)
    stats = run(ours, 0)[0]
    assert stats.metrics["train/reset"] == 1.0 and stats.may_stand
    assert same(trained(ours), start) and not ours._optimizer.state
    assert all(torch.equal(teacher.teacher_weights(name), start[name].flatten()) for name in start)
    seen: list[dict[str, torch.Tensor]] = []
    ours._optimizer.register_step_post_hook(lambda *_: seen.append(trained(ours)))
    run(ours, 1), run(plain, 1)
    assert same(seen[0], trained(plain))


# --- Fisher anchor --------------------------------------------------------------------------------------------------------


@KINDS
def test_the_anchor_adds_its_gradient_before_clipping(tiny_model_dir: Path, parameters: Any) -> None:
    anchor = FisherAnchor(coefficient=3.0, rollouts=4)
    ours, plain = (
        made(tiny_model_dir, *s, parameters=parameters(), settings={"grad_clip": 1e9}) for s in ((anchor,), ())
    )
    start = trained(ours)
    caught: list[dict[str, torch.Tensor]] = []
    for of in (ours, plain):
        of._optimizer.register_step_pre_hook(
            lambda *_, of=of: caught.append({n: p.grad.clone() for n, p in of._trained.items()})
        )
    assert run(ours, 0)[0].metrics["train/fisher"] == 0.0
    run(plain, 0)
    assert same(caught[0], caught[1]) and same(trained(ours), trained(plain))
    now = trained(ours)
    mine, theirs = run(ours, 1)[0], run(plain, 1)[0]
    expected, value = {}, 0.0
    for name, gradient in caught[3].items():
        omega, moved = anchor._omega[name].view_as(gradient), now[name] - start[name]
        expected[name] = gradient + 6.0 * omega * moved
        value += 3.0 * float((omega.double() * moved.double() ** 2).sum())
    assert value > 1e-4 and mine.metrics["train/fisher"] == pytest.approx(value, rel=1e-4)
    assert mine.metrics["train/loss"] - theirs.metrics["train/loss"] == pytest.approx(value, rel=1e-3)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest_difference(caught[2], expected) < 1e-5 * scale
    norm = float(torch.sqrt(sum((g.double() ** 2).sum() for g in expected.values())))
    assert mine.grad_norm == pytest.approx(norm, rel=1e-5) and mine.grad_norm != theirs.grad_norm


def test_a_strong_anchor_holds_the_weights(tiny_model_dir: Path) -> None:
    free, held = (made(tiny_model_dir, *s, steps=12) for s in ((), (FisherAnchor(coefficient=1e4),)))
    start = trained(free)
    run(free, *range(12))
    run(held, *range(12))

    def away(of: TorchTrainer) -> float:
        omega = dict(held._setup.stabilizers[0]._omega)  # type: ignore[attr-defined]
        return sum(float((omega[n] * (p - start[n]).flatten() ** 2).sum()) for n, p in trained(of).items())

    assert away(held) < 0.2 * away(free)


# --- what is remembered ---------------------------------------------------------------------------------------------------


def everything() -> tuple[Any, ...]:
    return (
        FisherAnchor(coefficient=5.0, rollouts=4), GradNormFilter(quantile=0.5, factor=1.0, warmup=2),
        EMATeacher(decay=0.7), StochasticRestore(p=0.05), FullReset(below=1e-3),
    )  # fmt: skip


@KINDS
def test_a_saved_trainer_continues_bit_for_bit(tiny_model_dir: Path, tmp_path: Path, parameters: Any) -> None:
    straight = made(tiny_model_dir, *everything(), parameters=parameters(), steps=6)
    run(straight, 0, 1, 2)
    straight.save(tmp_path)
    expected = run(straight, 3, 4, 5)
    assert 0 < sum(stats.metrics["train/vetoed"] for stats in expected) < 3  # the window of norms is at work
    resumed = made(tiny_model_dir, *everything(), parameters=parameters(), steps=6)
    run(resumed, 5, 4)  # what was there before must not survive
    resumed.load(tmp_path)
    assert run(resumed, 3, 4, 5) == expected
    assert same(trained(resumed), trained(straight)) and same(moments(resumed), moments(straight))
    teachers = [of._setup.stabilizers[2] for of in (straight, resumed)]
    for name in straight._trained:
        assert torch.equal(*(teacher.teacher_weights(name) for teacher in teachers))
    assert {f.suffix for f in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_the_memory_of_other_stabilizers_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    ours = made(tiny_model_dir, EMATeacher())
    run(ours, 0)
    ours.save(tmp_path)
    for others in ((), (StochasticRestore(), EMATeacher())):
        with pytest.raises(ConfigError, match="other stabilizers"):
            made(tiny_model_dir, *others).load(tmp_path)


@KINDS
def test_the_teacher_comes_and_goes_without_a_trace(tiny_model_dir: Path, parameters: Any) -> None:
    teacher = EMATeacher(decay=0.999999)
    ours = made(tiny_model_dir, teacher, parameters=parameters())
    start = weights_of(ours)
    run(ours, 0, 1)
    before, adapters = trained(ours), weights_of(ours)
    with ours.teaching():
        assert largest_difference(weights_of(ours), start) < 1e-6
    with pytest.raises(RuntimeError, match="planted"), ours.teaching():
        raise RuntimeError("planted")
    assert same(trained(ours), before) and same(weights_of(ours), adapters)
    assert largest_difference(adapters, start) > 1e-3
