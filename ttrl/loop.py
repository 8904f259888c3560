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

from ttrl.contract import Blame, check_samples
from ttrl.errors import GuardStop, StopRequested
from ttrl.flow import Flow, InStep, RunAhead, Taught
from ttrl.hooks import WeighingGate
from ttrl.journal import Journal, Progress, StepClock, recall, remember
from ttrl.metrics import MetricSet
from ttrl.objectives import StepObjective
from ttrl.parts import Parts
from ttrl.protocols import Sampler, Stateful
from ttrl.rollout.flat import FlatSampler
from ttrl.scoring import admit, score_all, turned_away
from ttrl.seeds import derive
from ttrl.sources import RefillSource
from ttrl.stepmetrics import agreement, reward_metrics, rollout_metrics
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
        if recipe.rollout.ahead:
            metrics.mean("rollout/staleness", step - drawn.state)
            clock.seconds["sampling"] = drawn.seconds
        with clock("reward"):
            scored = score_all(parts, drawn.groups, step)
        if isinstance(parts.source, RefillSource):
            scored = refill(parts, parts.source, step, scored, clock, metrics)
        budget = recipe.rollout.votes_per_prompt + (recipe.rollout.trained if parts.teaching else 0)
        metrics.merge(rollout_metrics([item.group for item in scored], budget))
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
        progress.advance(scored, stats, clock.total(), admitted if stats is not None else ())
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


def refill(
    parts: Parts, source: RefillSource, step: int, scored: list[Scored], clock: StepClock, metrics: MetricSet
) -> list[Scored]:  # fmt: skip
    """All groups of the step: as many more prompts are drawn as groups were turned away, until the step is full."""
    first, new = len(scored), scored
    missing = first
    for _ in range(source.rounds):
        missing -= sum(turned_away(parts, item) is None for item in new)
        more = source.more(missing, [item.group.prompt.id for item in scored])
        if not more:
            break
        with clock("rollout"):
            groups = draw(parts, step, more)
        with clock("reward"):
            new = score_all(parts, groups, step)
        scored = [*scored, *new]
        metrics.sum("rollout/refill_rounds", 1)
    metrics.sum("rollout/refilled", len(scored) - first)
    return scored


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
