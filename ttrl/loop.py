"""The loop, on one screen: prompts -> votes -> pseudo-labels and rewards -> update -> weights back to the engine.

Labels do not occur here. Evaluators are closed boxes that return numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import islice

import numpy as np

from ttrl.contract import Blame, check_samples, check_scored
from ttrl.errors import GuardStop, PluginError, StopRequested
from ttrl.flow import Flow, InStep, RunAhead, Taught
from ttrl.hooks import WeighingGate
from ttrl.journal import Journal, Progress, StepClock, recall, remember
from ttrl.metrics import MetricSet
from ttrl.objectives import StepObjective
from ttrl.parts import Parts
from ttrl.protocols import RewardContext, Sampler, Stateful
from ttrl.rewards.probes import judged
from ttrl.rewards.reader import reader_of
from ttrl.rollout.flat import FlatSampler
from ttrl.seeds import derive
from ttrl.stepmetrics import agreement, reward_metrics, rollout_metrics
from ttrl.together import StepReward
from ttrl.trainers.packing import pack, split_updates
from ttrl.types import Group, PackedBatch, Sample, Scored, StepStats


def train(parts: Parts, journal: Journal, progress: Progress) -> None:
    """Run the remaining steps; `progress` says where to start and is moved along.

    Raises StopRequested (user), GuardStop (nothing left to train on), EngineError, FloatingPointError, and what plug-ins raise.
    After a stop, weights and `progress` are those of the last completed step; after a failure only checkpoints are.
    """
    if parts.guards.stopped:
        raise GuardStop(parts.guards.stopped)
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
    with remembered(parts.memory):
        with clock("rollout"):  # with rollout.ahead: the part of sampling that training had to wait for
            drawn = flow.groups(step)
        budget = recipe.rollout.votes_per_prompt + (recipe.rollout.trained if parts.teaching else 0)
        metrics.merge(rollout_metrics(drawn.groups, budget))
        if recipe.rollout.ahead:
            metrics.mean("rollout/staleness", step - drawn.state)
            clock.seconds["sampling"] = drawn.seconds
        with clock("reward"):
            scored = score_all(parts, drawn.groups, step)
        metrics.merge(reward_metrics(scored, progress.flips(scored)))
        if parts.teaching:
            metrics.merge(agreement(scored))
        with clock("guard"):  # before anything is trained on the groups: they tell what the weights have become
            ruling = parts.guards.rule(step, scored, metrics)
        admitted = admit(parts, ruling.admitted(scored, metrics), metrics)
        samples = [sample for item in admitted for sample in to_samples(parts, item)]
        samples = finish(parts, step, samples, metrics)
        with clock("train"), nullcontext() if recipe.rollout.ahead else parts.pool.released():
            stats = update(parts, step, samples)
        with clock("guard"):  # before anybody samples from the new weights
            verdict = parts.guards.inspect(step, scored, stats, metrics)
        with clock("sync"):
            if ruling.restored or verdict.restored:
                if stats is not None:
                    parts.link.check_on_policy(stats)
                parts.link.sync_restored(moved=(ruling.moved or verdict.moved) and not parts.teaching)
            else:
                flow.publish(step + 1, stats)
        progress.advance(scored, stats, clock.total())
    for name, count in parts.pool.events().items():
        metrics.sum(name, count)
    journal.step(step, metrics, stats, clock, scored, (*ruling.events, *verdict.events))
    if reason := ruling.stop or verdict.stop:
        raise GuardStop(reason)
    if progress.empty_steps >= recipe.max_empty_steps:
        raise GuardStop(f"{progress.empty_steps} steps in a row had nothing to train on; the dropped/ metrics say why")
    if progress.step == recipe.steps:
        hand_over(parts, journal, progress)
    evaluate_if_due(parts, journal, progress)
    if is_due(progress.step, recipe.checkpoint.every, recipe.steps):
        journal.checkpoint(parts.trainer, parts.memory, progress)


def hand_over(parts: Parts, journal: Journal, progress: Progress) -> None:
    """Trainer and engines get the weights that the guards trust most, so that these are evaluated and exported."""
    ruling = parts.guards.settle(progress.step)
    if ruling.restored:
        parts.link.sync_restored(moved=ruling.moved)
    for event in ruling.events:
        journal.note(progress.step, event)


def conclude(parts: Parts, journal: Journal, progress: Progress, reason: str) -> None:
    """After a GuardStop. A run with guards hands over its best weights, measured like those of a completed run."""
    if not parts.guards.acts:
        return
    parts.guards.stop(reason)
    hand_over(parts, journal, progress)
    with suppress(StopRequested):  # a resume makes up for it
        evaluate(parts, journal, progress)


def make_flow(parts: Parts, first: int) -> Flow:
    """In step, or ahead by `rollout.ahead`; steps before `first` are done."""
    recipe = parts.recipe

    def draw_step(step: int) -> list[Group]:
        return draw(parts, step, parts.source.batch(step))

    if parts.teaching:
        own = FlatSampler(recipe.rollout.trained, recipe.rollout.trained, lambda rollouts: [])
        return Taught(
            lambda step: probe(parts, sample(parts, own, "policy", step, parts.source.batch(step))),
            lambda step: sample(parts, parts.sampler, "rollout", step, parts.source.batch(step)), parts.link, parts.trainer,
        )  # fmt: skip
    if not recipe.rollout.ahead:
        return InStep(draw_step, parts.link)

    def is_boundary(step: int) -> bool:
        return any(is_due(step, every, recipe.steps) for every in (recipe.eval.every, recipe.checkpoint.every))

    return RunAhead(
        draw_step, parts.link, ahead=recipe.rollout.ahead, first=first, steps=recipe.steps, is_boundary=is_boundary
    )


def draw(parts: Parts, step: int, identifiers: Sequence[str]) -> list[Group]:
    """The votes on these prompts, under the weights the engines hold now, with the probes that the objective asks for."""
    return probe(parts, sample(parts, parts.sampler, "rollout", step, identifiers))


def sample(parts: Parts, sampler: Sampler, name: str, step: int, identifiers: Sequence[str]) -> list[Group]:
    """The groups of these prompts; `name` tells the random numbers of different draws of one step apart."""
    prompts = [parts.prompts[identifier] for identifier in identifiers]
    return sampler(prompts, parts.pool, parts.spec, derive(parts.recipe.seed, name, step))


@contextmanager
def remembered(memory: Mapping[str, Stateful]) -> Iterator[None]:
    """What was learned in a step that did not complete is forgotten: the step will be done again after a resume."""
    before = remember(memory)
    try:
        yield
    except BaseException:
        recall(memory, before)
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


def score_all(parts: Parts, groups: Sequence[Group], step: int) -> list[Scored]:
    """Every group of a step; together, where the reward wants to see them so."""
    if not isinstance(parts.reward, StepReward):
        return [score(parts, group, step) for group in groups]
    with Blame("reward", parts.recipe.reward.use, "any of the step"):
        together = parts.reward.score_step(groups, [reward_context(parts, group, step) for group in groups])
        if len(together) != len(groups):
            raise PluginError(f"score_step returned {len(together)} results for {len(groups)} groups")
    for scored, group in zip(together, groups, strict=True):
        with Blame("reward", parts.recipe.reward.use, group.prompt.id):
            check_scored(scored, group)
    return [judged(scored, reader_of(parts.reward, parts.reader)) for scored in together]


def reward_context(parts: Parts, group: Group, step: int) -> RewardContext:
    """What the reward may know besides the group."""
    return RewardContext(step=step, seed=derive(parts.recipe.seed, "reward", step, group.prompt.id))


def score(parts: Parts, group: Group, step: int) -> Scored:
    """Pseudo-label and rewards of one group, checked against the contract of the slot; its probes judged by the same reader."""
    with Blame("reward", parts.recipe.reward.use, group.prompt.id):
        scored = parts.reward(group, reward_context(parts, group, step))
        check_scored(scored, group)
    return judged(scored, reader_of(parts.reward, parts.reader))


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
        weight = math.prod(gate.weight(scored) for gate in parts.gates if isinstance(gate, WeighingGate))
        if weight != 1.0:
            samples = [replace(sample, advantages=sample.advantages * np.float32(weight)) for sample in samples]
        check_samples(samples)
    return samples


def finish(parts: Parts, step: int, samples: list[Sample], metrics: MetricSet) -> list[Sample]:
    """What the objective does to the samples of a step as a whole: normalise over all of them, mask tokens, weigh rows."""
    if not samples or not isinstance(parts.objective, StepObjective):
        return samples
    with Blame("objective", parts.recipe.objective.use, "any of the step"):
        finished, found = parts.objective.finish(samples, step)
        check_samples(finished)
    metrics.merge(found)
    return finished


def update(parts: Parts, step: int, samples: Sequence[Sample]) -> StepStats | None:
    """Move the weights; None when there was nothing to train on."""
    if not samples:
        return None
    settings, shared = parts.recipe.trainer, parts.trainer.shares_prompts
    objective = parts.objective

    def packed(share: list[Sample]) -> list[PackedBatch]:
        whole = objective.denominator(share) if isinstance(objective, StepObjective) else None
        return pack(share, settings.tokens_per_microbatch, whole, shared_prompt=shared)

    return parts.trainer.step(step, [packed(share) for share in split_updates(samples, settings.updates_per_step)])


def evaluate_if_due(parts: Parts, journal: Journal, progress: Progress) -> None:
    """Before, after and in between. A split that was already evaluated at this step is not evaluated again, so a run that was
    stopped in the middle of an evaluation catches up when it is resumed."""
    settings = parts.recipe.eval
    if not progress.step or is_due(progress.step, settings.every, parts.recipe.steps):
        evaluate(parts, journal, progress)


def evaluate(parts: Parts, journal: Journal, progress: Progress) -> None:
    """Every split that was not evaluated at this step yet."""
    for evaluator in parts.evaluators:
        if not journal.book.has(evaluator.split, progress.step):
            with journal.phase(f"evaluating {evaluator.split}"):
                journal.evaluation(evaluator(progress.step, parts.pool))
