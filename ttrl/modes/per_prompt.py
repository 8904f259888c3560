"""Adapt to one prompt, answer it, go back: nothing of one prompt leaks into the next.

For every prompt the start model votes, `steps` updates are made on fresh votes on this prompt alone, and the adapted model votes
again. Then weights, moments and whatever a reward or gate remembers are those of the start, and fingerprints of the trainer's and
the engines' weights must say so. Random numbers depend on the prompt and not on its place, so the order of the prompts does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ttrl.answers import Answered, Vote, count_votes
from ttrl.errors import ConfigError, EngineError, StopRequested
from ttrl.journal import Journal, Progress, StepClock, recall, remember
from ttrl.loop import draw, finish, is_due, remembered, to_samples, update
from ttrl.metrics import MetricSet
from ttrl.protocols import Trainer
from ttrl.rollout.flat import vote_requests
from ttrl.scoring import admit, score
from ttrl.seeds import derive
from ttrl.stepmetrics import reward_metrics, rollout_metrics
from ttrl.types import Prompt, Scored, StepStats

if TYPE_CHECKING:
    from ttrl.config.schema import Recipe
    from ttrl.parts import Parts

START = ".start"


class PerPrompt:
    """One prompt per step of the loop, in the order of the file; the recipe's `steps` are made on each."""

    def __init__(self, ids: Sequence[str], prompts_per_step: int, seed: int) -> None:
        if prompts_per_step != 1:
            raise ConfigError(
                f"source per_prompt adapts to one prompt at a time; set data.prompts_per_step: 1 (it is {prompts_per_step})"
            )
        self._ids, self._seed = tuple(ids), seed
        self._engines = ""

    def batch(self, step: int) -> list[str]:
        """The id of prompt number `step`."""
        return [self._ids[step]]

    def total(self, recipe: Recipe) -> int:
        """One step of the loop per prompt."""
        return len(self._ids)

    def check(self, recipe: Recipe) -> None:
        """Raises ConfigError for what cannot be done when the weights go back after every prompt."""
        if recipe.rollout.ahead:
            raise ConfigError("source per_prompt samples from the weights it just made; set rollout.ahead: 0")
        if recipe.guards:
            raise ConfigError(
                "source per_prompt goes back to the start weights after every prompt, so guards have nothing to watch; remove guards"
            )
        if recipe.eval.heldout is not None or recipe.eval.every:
            raise ConfigError(
                "source per_prompt ends with the start weights, and every prompt is judged before and after; set eval.heldout: null "
                "and eval.every: 0"
            )

    def run(self, parts: Parts, journal: Journal, progress: Progress) -> None:
        """The remaining prompts. Raises EngineError when the weights after a prompt are not those of the start, byte for byte."""
        self._engines = ""
        start = journal.scratch(START)
        parts.trainer.save(start)
        parts.link.sync(None)
        held, memory = fingerprints(parts), remember(parts.memory)
        while progress.step < len(self._ids):
            try:
                self._one_prompt(parts, journal, progress)
            except StopRequested:  # what is stored then must be the start weights
                _restore(parts.trainer, start)
                raise
            _restore(parts.trainer, start)
            recall(parts.memory, memory)
            parts.link.sync(None)
            if fingerprints(parts) != held:
                raise EngineError(
                    f"after prompt {self._ids[progress.step - 1]!r} the restored weights are not those of the start: "
                    f"{fingerprints(parts)}, not {held}"
                )
            if is_due(progress.step, parts.recipe.checkpoint.every, len(self._ids)):
                journal.checkpoint(parts.trainer, parts.memory, progress)

    def _one_prompt(self, parts: Parts, journal: Journal, progress: Progress) -> None:
        """Vote, adapt, vote again; one line of metrics for the prompt."""
        prompt = parts.prompts[self._ids[progress.step]]
        clock, metrics = StepClock(), MetricSet()
        scored: list[Scored] = []
        taken: list[StepStats] = []
        with remembered(parts.memory):
            with clock("answer"):
                before = self._vote(parts, prompt)
            self._engines = self._engines or before.weights
            if before.weights != self._engines:
                raise EngineError(f"prompt {prompt.id!r} meets an engine that does not hold the start weights")
            for step in range(parts.recipe.steps):
                taken += self._adapt(parts, prompt, step, scored, metrics, clock)
            with clock("answer"):
                after = self._vote(parts, prompt) if taken else before
            sampled = [before, after] if taken else [before]
            tokens = sum(round(vote.length * vote.samples) for vote in sampled)
            metrics.sum("answer/tokens", tokens)
            metrics.mean("answer/changed", float(after.answer != before.answer))
            metrics.mean("answer/share_before", before.share)
            metrics.mean("answer/share_after", after.share)
            stats = together(taken)
            journal.answers([Answered(step=progress.step, prompt_id=prompt.id, before=before, after=after)])
            progress.advance(scored, stats, clock.total())
            progress.rollout_tokens += tokens
        for name, count in parts.pool.events().items():
            metrics.sum(name, count)
        journal.step(progress.step - 1, metrics, stats, clock, scored)

    def _adapt(
        self, parts: Parts, prompt: Prompt, step: int, scored: list[Scored], metrics: MetricSet, clock: StepClock
    ) -> list[StepStats]:  # fmt: skip
        """One update on fresh votes; empty when they leave nothing to train on."""
        with clock("rollout"):
            groups = draw(parts, step, [prompt.id])
        metrics.merge(rollout_metrics(groups, parts.recipe.rollout.votes_per_prompt))
        with clock("reward"):
            new = [score(parts, group, step) for group in groups]
        scored += new
        metrics.merge(reward_metrics(new, []))
        samples = [sample for item in admit(parts, new, metrics) for sample in to_samples(parts, item)]
        samples = finish(parts, step, samples, metrics)
        with clock("train"), parts.pool.released():
            stats = update(parts, step, samples)
        if stats is None:
            return []
        with clock("sync"):
            parts.link.check_on_policy(stats)
            parts.link.sync(stats)
        return [stats]

    def _vote(self, parts: Parts, prompt: Prompt) -> Vote:
        """As many votes as in training. Before and after use the same random numbers, and no update has seen them."""
        seed = derive(self._seed, "answer")
        requests = vote_requests(prompt, parts.spec, seed, 0, parts.recipe.rollout.votes_per_prompt)
        return count_votes(parts.reader, parts.pool.generate(requests))


def _restore(trainer: Trainer, start: Path) -> None:
    trainer.restore(start, version=trainer.version + 1)


def fingerprints(parts: Parts) -> tuple[str, ...]:
    """Hashes of everything that training can change, read from the trainer: the model's weights and, of a LoRA run, both factors."""
    from ttrl.model.weights import fingerprint_of

    sources = [parts.trainer.weights()]
    adapter = parts.trainer.weights(adapter=True)
    sources += [adapter] if adapter.adapter is not None else []
    return tuple(fingerprint_of(source) for source in sources)


def together(taken: Sequence[StepStats]) -> StepStats | None:
    """The updates on one prompt as one: metrics averaged, tokens and updates added, the largest norm; None for none."""
    if not taken:
        return None
    names = sorted({name for stats in taken for name in stats.metrics})
    metrics = MetricSet()
    for name in names:
        for stats in taken:
            if name in stats.metrics:
                metrics.mean(name, stats.metrics[name])
    return StepStats(
        metrics=metrics.values(), tokens=sum(s.tokens for s in taken), grad_norm=max(s.grad_norm for s in taken),
        lr=taken[-1].lr, updates=sum(s.updates for s in taken),
    )  # fmt: skip
