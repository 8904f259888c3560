"""SPINE: forks only, inside an entropy band. Golden numbers, exact zeros, and the collapse it is meant to avoid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_group, make_scored
from helpers_torch import samples, tensors, trainer
from rich.console import Console

from ttrl.config import load_recipe
from ttrl.config.schema import Plug
from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut
from ttrl.registry import build
from ttrl.run import run
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.losses.entropy_band import EntropyBand, band_edges
from ttrl.trainers.losses.kl import KLAnchor
from ttrl.trainers.packing import pack
from ttrl.types import Sample, Scored


def objective(**options: Any) -> GRPO:
    made: GRPO = build("objective", Plug.model_validate({"use": "grpo", "with": options}))
    return made


def band_term(
    current: Sequence[float], drawn: Sequence[float], **options: Any
) -> tuple[float, list[float], dict[str, float]]:
    """Loss, gradient with respect to the entropies now, and metrics; the edges come from the entropies when drawn."""
    term = EntropyBand(coefficient=1.0, **options)
    count = len(drawn)
    sample = Sample(
        prompt_ids=np.zeros(1, np.int32), completion_ids=np.zeros(count, np.int32), sampler_logprobs=np.zeros(count, np.float32),
        advantages=np.zeros(count, np.float32), weights=np.ones(count, np.float32), group="p", entropy=np.asarray(drawn, np.float64),
    )  # fmt: skip
    packed = pack(term.on_step([sample], 0, MetricSet()), 1000)[0]
    leaf = torch.tensor(current, dtype=torch.float64, requires_grad=True)
    out = term.loss(ForwardOut(logprobs=leaf, entropy=leaf, ref_logprobs=None), tensors(packed, torch.float64))
    out.loss.backward()
    assert leaf.grad is not None
    return float(out.loss.detach()), leaf.grad.tolist(), out.metrics.values()


def test_band_golden_numbers() -> None:
    # Edges 0.84 and 1.0: excess .04, 0, 0, .1, .2, whose mean is 0.068
    values = [0.8, 0.9, 1.0, 1.1, 1.2]
    assert band_edges(np.asarray(values)) == pytest.approx((0.84, 1.0))
    loss, grads, metrics = band_term(values, values)
    assert loss == pytest.approx(0.068, abs=1e-6)
    assert grads == pytest.approx([-0.2, 0.0, 0.0, 0.2, 0.2])
    assert (metrics["train/band_below"], metrics["train/band_above"]) == pytest.approx((0.2, 0.4))
    assert metrics["train/band"] == pytest.approx(0.068, abs=1e-6)


def test_edges_of_the_sampler_do_not_follow_the_policy() -> None:
    drawn = [0.8, 0.9, 1.0, 1.1, 1.2]
    sunk = [value - 0.5 for value in drawn]
    loss, grads, _ = band_term(sunk, drawn)
    assert grads == pytest.approx([-0.2] * 5)  # everything is pulled up again
    assert loss == pytest.approx(np.mean(0.84 - np.asarray(sunk)), abs=1e-6)
    # Edges taken anew are about the new level, and push three of five down or not at all
    assert band_term(sunk, sunk)[1] == pytest.approx([-0.2, 0, 0, 0.2, 0.2])


def test_weights_of_the_two_sides() -> None:
    values = [0.8, 0.9, 1.0, 1.1, 1.2]
    assert band_term(values, values, low_weight=3.0, high_weight=0.0)[1] == pytest.approx([-0.6, 0, 0, 0, 0])
    assert band_term(values, values, edges=(0.85, 1.15))[1] == pytest.approx([-0.2, 0, 0, 0, 0.2])


# --- a policy of two tokens per position ---------------------------------------------------------------------------------


def toy_loss(made: GRPO, logits: torch.Tensor, drawn: np.ndarray, chosen: np.ndarray, advantage: float) -> torch.Tensor:
    """One row of len(logits) positions, each with its own two logits; the start model is uniform."""
    table = logits.log_softmax(1)
    entropy = -(table.exp() * table).sum(1)
    logprobs = table[torch.arange(len(chosen)), torch.as_tensor(chosen)]
    sample = Sample(
        prompt_ids=np.zeros(1, np.int32), completion_ids=chosen.astype(np.int32), group="p",
        sampler_logprobs=logprobs.detach().numpy().astype(np.float32), entropy=drawn.astype(np.float32),
        advantages=np.full(len(chosen), advantage, np.float32), weights=np.ones(len(chosen), np.float32),
    )  # fmt: skip
    finished, _ = made.finish([sample], 0)
    packed = pack(finished, 1000, made.denominator(finished))[0]
    out = ForwardOut(logprobs=logprobs, entropy=entropy, ref_logprobs=torch.full_like(logprobs, -np.log(2.0)))
    return made.loss(out, tensors(packed, torch.float64)).loss


def test_followers_get_exactly_no_gradient_from_any_term() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (10, 2))).requires_grad_()
    made = objective(
        shape=["fork_tokens"],
        regularizers=[{"use": "entropy_band", "with": {"coefficient": 0.5, "edges": [0.1, 0.2]}}, "kl"],
    )
    drawn = np.arange(10) / 10
    toy_loss(made, logits, drawn, rng.integers(0, 2, 10), 1.5).backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum(1) > 0
    assert moved.tolist() == [False] * 8 + [True] * 2


@pytest.mark.parametrize(("edges", "sign"), [((0.0, 0.1), 1.0), ((0.68, 0.69), -1.0), ((0.0, 0.69), 0.0)])
def test_a_fork_outside_the_band_is_pushed_back_by_one_over_the_forks(edges: tuple[float, float], sign: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, 5.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    term = {"use": "entropy_band", "with": {"coefficient": 1.0, "edges": list(edges)}}
    made = objective(shape=[{"use": "fork_tokens", "with": {"fraction": 0.5}}], regularizers=[term])
    toy_loss(made, logits, np.array([0.5, 0.0, 0.0, 0.5]), np.zeros(4, int), 0.0).backward()
    table = logits.detach().clone().requires_grad_()
    probabilities = table.log_softmax(1)
    (sign * -(probabilities.exp() * probabilities).sum(1)[[0, 3]].sum() / 2).backward()
    assert logits.grad is not None and table.grad is not None
    torch.testing.assert_close(logits.grad, table.grad)


# --- the collapse ----------------------------------------------------------------------------------------------------------


STEPS, FILLERS = 30, 4


def vote(theta: torch.Tensor, rng: np.random.Generator) -> tuple[Scored, list[list[tuple[int, int]]]]:
    """16 answers: up to 4 times go on (0) or stop thinking (1), then answer 0 or 1. Whoever stops early says the popular answer."""
    table = theta.log_softmax(1).detach().numpy()
    rows, answers = [], []
    for _ in range(16):
        row: list[tuple[int, int]] = []  # (which pair of logits, which of the two)
        while len(row) < FILLERS and (not row or row[-1][1] == 0):
            row.append((0, int(rng.random() > np.exp(table[0, 0]))))
        which = 1 if len(row) < FILLERS else 2
        row.append((which, int(rng.random() > np.exp(table[which, 0]))))
        rows.append(row)
        answers.append(row[-1][1])
    group = make_group(["x"] * 16)
    rollouts = [
        replace(
            rollout, token_ids=np.asarray([3 * which + choice for which, choice in row], np.int32),
            logprobs=np.asarray([table[which, choice] for which, choice in row], np.float32),
            entropy=np.asarray([-(np.exp(table[which]) * table[which]).sum() for which, _ in row], np.float32),
        )
        for rollout, row in zip(group.rollouts, rows, strict=True)
    ]  # fmt: skip
    winner = int(2 * sum(answers) > len(answers))
    paid = [float(answer == winner) for answer in answers]
    return make_scored(answers, paid, group=replace(group, rollouts=tuple(rollouts))), rows


def adapt(made: GRPO, seed: int) -> tuple[float, float]:
    """(how likely one more thought is, how likely the popular answer is after thinking) after label-free steps from 0.9 and 0.5."""
    rng = np.random.default_rng(seed)
    theta = torch.tensor([[2.2, 0.0], [1.5, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    for step in range(STEPS):
        scored, _ = vote(theta, rng)
        finished, _ = made.finish(made.samples(scored), step)
        packed = pack(finished, 10_000, made.denominator(finished))[0]
        ids = torch.as_tensor(packed.completion_ids, dtype=torch.long)
        logprobs = theta.log_softmax(1)[ids // 3, ids % 3]
        out = made.loss(
            ForwardOut(logprobs=logprobs, entropy=logprobs, ref_logprobs=None), tensors(packed, torch.float64)
        )
        gradient = torch.autograd.grad(out.loss, theta)[0]
        theta = (theta.detach() - 0.12 * gradient).requires_grad_()
    shares = theta.softmax(1)[:, 0].tolist()
    return shares[0], shares[2]


def test_training_on_forks_leaves_filler_alone_where_training_on_everything_shortens_it() -> None:
    """Stopping early goes with the popular answer, so a reward for the popular answer pays for not thinking."""
    start = float(torch.tensor([2.2, 0.0], dtype=torch.float64).softmax(0)[0])
    for seed in range(2):
        thinking, popular = adapt(objective(), seed)
        assert thinking < start - 0.01 and popular > 0.55
        thinking, popular = adapt(objective(shape=["fork_tokens"]), seed)
        assert thinking == pytest.approx(start, abs=1e-15) and popular > 0.55


# --- the real forward pass --------------------------------------------------------------------------------------------------


def test_a_trainer_step_pushes_entropy_into_the_band(tiny_model_dir: Path) -> None:
    """With nothing but the band (advantages 0) the entropy of the policy falls below 2 nats, where it was above."""
    made = objective(regularizers=[{"use": "entropy_band", "with": {"coefficient": 1.0, "edges": [0.0, 2.0]}}])
    items = [
        replace(s, advantages=0 * s.advantages, weights=np.ones_like(s.weights), entropy=0 * s.advantages)
        for s in samples()
    ]
    finished, _ = made.finish(items, 0)
    batches = [pack(finished, 20, made.denominator(finished))]
    assert len(batches[0]) > 1
    machine = trainer(tiny_model_dir, objective=made, settings={"lr": 3e-3}, steps=8)
    stats = [machine.step(step, batches) for step in range(8)]
    excess = [item.metrics["train/band"] for item in stats]
    assert excess[0] > 0.2 and excess[-1] < 0.5 * excess[0]
    assert stats[-1].metrics["train/entropy"] < stats[0].metrics["train/entropy"]


def test_kl_as_a_regularizer_is_the_stabilizer(tiny_model_dir: Path) -> None:
    items = samples()
    updates = [pack(items, 10_000)]
    norms = []
    for fields in (
        {"objective": objective(regularizers=[{"use": "kl", "with": {"coefficient": 0.5}}])},
        {"objective": objective(), "stabilizers": (KLAnchor(coefficient=0.5),)},
    ):
        machine = trainer(tiny_model_dir, **fields)
        machine.step(0, updates)
        norms.append(machine.step(1, updates).grad_norm)  # at step 0 the policy is the start model
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


SMALL = [
    "steps=2", "data.limit=6", "data.prompts_per_step=6", "rollout.votes_per_prompt=6", "eval.samples=1", "eval.k=[1]",
    "eval.limit=1", "eval.heldout=null", "log.groups_per_step=0",
    "objective.with.shape=[answer_span, {use: fork_tokens, with: {fraction: 0.2, over: step}}]",
]  # fmt: skip


def test_a_whole_run_masks_and_bands_and_remembers(tmp_path: Path) -> None:
    """The lab recipe with the answer masked as well. Its edges stay for three steps, so the checkpoint has those of step 0."""
    recipe = load_recipe("lab/spine", [*SMALL, f"output={json.dumps(str(tmp_path / 'run'))}"])
    assert run(recipe, resume=False, console=Console(quiet=True)).status == "completed"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert 0.0 < row["train/answer_masked"] <= 1.0
        assert row["train/fork_share"] == pytest.approx(0.2, abs=0.02)
        assert row["train/token_share"] < 0.2  # of all tokens, those of the answers included
        assert row["train/fork_entropy"] > row["train/follower_entropy"]
    low, high = ([row[f"train/band_{name}"] for row in rows] for name in ("low", "high"))
    assert low[0] == pytest.approx(low[1], rel=1e-12) and high[0] == pytest.approx(high[1], rel=1e-12)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").read_text())
    (held,) = state["memory"]["objective"].values()
    assert held == {"edges": [pytest.approx(low[0]), pytest.approx(high[0])], "since": 0}
