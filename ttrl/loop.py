"""The loop, on one screen: prompts -> votes -> pseudo-labels and rewards -> update -> weights back to the engine.

Labels do not occur here. Evaluators are closed boxes that return numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ttrl.contract import Blame, check_samples, check_scored
from ttrl.errors import GuardStop
from ttrl.journal import Journal, Progress, StepClock
from ttrl.metrics import MetricSet
from ttrl.protocols import Reward, RewardContext, StatefulReward
from ttrl.seeds import derive
from ttrl.setup import Parts
from ttrl.stepmetrics import reward_metrics, rollout_metrics
from ttrl.trainers.packing import pack, split_updates
from ttrl.types import Group, Sample, Scored, StepStats


def train(parts: Parts, journal: Journal, progress: Progress) -> None:
    """Run the remaining steps; `progress` says where to start and is moved along.

    Raises StopRequested (user), GuardStop (nothing left to train on), EngineError, FloatingPointError, and what plug-ins raise.
    Whatever is raised, weights and `progress` are those after the last completed step.
    """
    recipe = parts.recipe
    if not progress.evaluations:
        evaluate(parts, journal, progress)
    for step in range(progress.step, recipe.steps):
        clock, metrics = StepClock(), MetricSet()
        prompts = [parts.prompts[identifier] for identifier in parts.source.batch(step)]
        with clock("rollout"):
            groups = parts.sampler(prompts, parts.pool, parts.spec, derive(recipe.seed, "rollout", step))
        metrics.merge(rollout_metrics(groups))
        with remembered(parts.reward):
            with clock("reward"):
                scored = [score(parts, group, step) for group in groups]
            metrics.merge(reward_metrics(scored, progress.flips(scored)))
            samples = [sample for item in admit(parts, scored, metrics) for sample in to_samples(parts, item)]
            with clock("train"):
                stats = update(parts, step, samples)
            if stats is not None:
                with clock("sync"):
                    must_move = stats.grad_norm > 0 and recipe.model.dtype == "float32"
                    parts.pool.sync(parts.trainer.version, parts.trainer.weights(), must_move=must_move)
            progress.advance(scored, stats)
        journal.step(step, metrics, stats, clock, scored)
        if progress.empty_steps >= recipe.max_empty_steps:
            raise GuardStop(
                f"{progress.empty_steps} steps in a row had nothing to train on; the dropped/ metrics say why"
            )
        last = progress.step == recipe.steps
        if last or (recipe.eval.every and progress.step % recipe.eval.every == 0):
            evaluate(parts, journal, progress)
        if last or (recipe.checkpoint.every and progress.step % recipe.checkpoint.every == 0):
            journal.checkpoint(parts.trainer, parts.reward, progress)


@contextmanager
def remembered(reward: Reward) -> Iterator[None]:
    """What a reward learned in a step that did not complete is forgotten: the step will be done again after a resume."""
    before = copy.deepcopy(dict(reward.state())) if isinstance(reward, StatefulReward) else None
    try:
        yield
    except BaseException:
        if before is not None and isinstance(reward, StatefulReward):
            reward.load_state(before)
        raise


def score(parts: Parts, group: Group, step: int) -> Scored:
    """Pseudo-label and rewards of one group, checked against the contract of the slot."""
    context = RewardContext(step=step, seed=derive(parts.recipe.seed, "reward", step, group.prompt.id))
    with Blame("reward", parts.recipe.reward.use, group.prompt.id):
        scored = parts.reward(group, context)
        check_scored(scored, group)
    return scored


def admit(parts: Parts, scored: Sequence[Scored], metrics: MetricSet) -> list[Scored]:
    """Groups that may train. Every group left out is counted under dropped/<reason>."""
    kept = []
    for item in scored:
        reasons = (gate(item) for gate in parts.gates)
        reason = "abstained" if not item.train.any() else next((r for r in reasons if r is not None), None)
        if reason is None:
            kept.append(item)
        else:
            metrics.sum(f"dropped/{reason}", 1)
    return kept


def to_samples(parts: Parts, scored: Scored) -> list[Sample]:
    """Token advantages of one group, checked for length and finiteness."""
    with Blame("objective", parts.recipe.objective.use, scored.group.prompt.id):
        samples = parts.objective.samples(scored)
        check_samples(samples)
    return samples


def update(parts: Parts, step: int, samples: Sequence[Sample]) -> StepStats | None:
    """Move the weights; None when there was nothing to train on."""
    if not samples:
        return None
    settings = parts.recipe.trainer
    return parts.trainer.step(
        step, [pack(part, settings.tokens_per_microbatch) for part in split_updates(samples, settings.updates_per_step)]
    )


def evaluate(parts: Parts, journal: Journal, progress: Progress) -> None:
    """All prompt sets under the recipe's protocol."""
    for evaluator in parts.evaluators:
        with journal.phase(f"evaluating {evaluator.split}"):
            evaluation = evaluator(progress.step, parts.pool)
        progress.record(evaluation)
        journal.evaluation(evaluation)
