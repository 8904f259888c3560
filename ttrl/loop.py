"""The loop, on one screen: prompts -> votes -> pseudo-labels and rewards -> update -> weights back to the engine.

Labels do not occur here. Evaluators are closed boxes that return numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice

from ttrl.contract import Blame, check_samples, check_scored
from ttrl.errors import GuardStop
from ttrl.flow import Flow, InStep, RunAhead
from ttrl.journal import Journal, Progress, StepClock
from ttrl.metrics import MetricSet
from ttrl.protocols import Reward, RewardContext, StatefulReward
from ttrl.rewards.probes import judged
from ttrl.seeds import derive
from ttrl.setup import Parts
from ttrl.stepmetrics import reward_metrics, rollout_metrics
from ttrl.trainers.packing import pack, split_updates
from ttrl.types import Group, Sample, Scored, StepStats


def train(parts: Parts, journal: Journal, progress: Progress) -> None:
    """Run the remaining steps; `progress` says where to start and is moved along.

    Raises StopRequested (user), GuardStop (nothing left to train on), EngineError, FloatingPointError, and what plug-ins raise.
    After a stop, weights and `progress` are those of the last completed step; after a failure only checkpoints are.
    """
    evaluate_if_due(parts, journal, progress)
    flow = make_flow(parts, progress.step)
    try:
        while progress.step < parts.recipe.steps:
            one_step(parts, flow, journal, progress)
    finally:
        flow.close()


def one_step(parts: Parts, flow: Flow, journal: Journal, progress: Progress) -> None:
    """Sample, score, train, sync; then evaluate and store what is due."""
    recipe, step = parts.recipe, progress.step
    clock, metrics = StepClock(), MetricSet()
    with clock("rollout"):  # with rollout.ahead: the part of sampling that training had to wait for
        drawn = flow.groups(step)
    metrics.merge(rollout_metrics(drawn.groups, recipe.rollout.votes_per_prompt))
    if recipe.rollout.ahead:
        metrics.mean("rollout/staleness", step - drawn.state)
        clock.seconds["sampling"] = drawn.seconds
    with remembered(parts.reward):
        with clock("reward"):
            scored = [score(parts, group, step) for group in drawn.groups]
        metrics.merge(reward_metrics(scored, progress.flips(scored)))
        samples = [sample for item in admit(parts, scored, metrics) for sample in to_samples(parts, item)]
        with clock("train"), nullcontext() if recipe.rollout.ahead else parts.pool.released():
            stats = update(parts, step, samples)
        with clock("sync"):
            flow.publish(step + 1, stats)
        progress.advance(scored, stats, clock.total())
    for name, count in parts.pool.events().items():
        metrics.sum(name, count)
    journal.step(step, metrics, stats, clock, scored)
    if progress.empty_steps >= recipe.max_empty_steps:
        raise GuardStop(f"{progress.empty_steps} steps in a row had nothing to train on; the dropped/ metrics say why")
    evaluate_if_due(parts, journal, progress)
    if is_due(progress.step, recipe.checkpoint.every, recipe.steps):
        journal.checkpoint(parts.trainer, parts.reward, progress)


def make_flow(parts: Parts, first: int) -> Flow:
    """In step, or ahead by `rollout.ahead`; steps before `first` are done."""
    recipe = parts.recipe

    def draw(step: int) -> list[Group]:
        prompts = [parts.prompts[identifier] for identifier in parts.source.batch(step)]
        groups = parts.sampler(prompts, parts.pool, parts.spec, derive(recipe.seed, "rollout", step))
        return probe(parts, groups)

    if not recipe.rollout.ahead:
        return InStep(draw, parts.link)

    def is_boundary(step: int) -> bool:
        return any(is_due(step, every, recipe.steps) for every in (recipe.eval.every, recipe.checkpoint.every))

    return RunAhead(
        draw, parts.link, ahead=recipe.rollout.ahead, first=first, steps=recipe.steps, is_boundary=is_boundary
    )


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


def is_due(step: int, every: int, steps: int) -> bool:
    """Every `every` completed steps (0: never) and at the end."""
    return step == steps or (every > 0 and step % every == 0)


def probe(parts: Parts, groups: list[Group]) -> list[Group]:
    """The groups with the extra generations their objective asks for, made in one call; most ask for none."""
    asked = [parts.objective.probes(group) for group in groups]
    if not any(asked):
        return groups
    made = iter(parts.pool.generate([request for requests in asked for request in requests]))
    return [
        replace(group, probes=tuple(islice(made, len(requests)))) for group, requests in zip(groups, asked, strict=True)
    ]


def score(parts: Parts, group: Group, step: int) -> Scored:
    """Pseudo-label and rewards of one group, checked against the contract of the slot; its probes judged by the same reader."""
    context = RewardContext(step=step, seed=derive(parts.recipe.seed, "reward", step, group.prompt.id))
    with Blame("reward", parts.recipe.reward.use, group.prompt.id):
        scored = parts.reward(group, context)
        check_scored(scored, group)
    return judged(scored, parts.reader)


def admit(parts: Parts, scored: Sequence[Scored], metrics: MetricSet) -> list[Scored]:
    """Groups that may train. Every group left out is counted under dropped/<reason>."""
    kept = []
    for item in scored:
        with Blame("gates", ", ".join(plug.use for plug in parts.recipe.gates), item.group.prompt.id):
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
    settings, shared = parts.recipe.trainer, parts.trainer.shares_prompts
    shares = split_updates(samples, settings.updates_per_step)
    return parts.trainer.step(step, [pack(s, settings.tokens_per_microbatch, shared_prompt=shared) for s in shares])


def evaluate_if_due(parts: Parts, journal: Journal, progress: Progress) -> None:
    """Before, after and in between. A split that was already evaluated at this step is not evaluated again, so a run that was
    stopped in the middle of an evaluation catches up when it is resumed."""
    settings = parts.recipe.eval
    if progress.step and not is_due(progress.step, settings.every, parts.recipe.steps):
        return
    for evaluator in parts.evaluators:
        if not journal.book.has(evaluator.split, progress.step):
            with journal.phase(f"evaluating {evaluator.split}"):
                journal.evaluation(evaluator(progress.step, parts.pool))
