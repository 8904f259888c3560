"""Prompts arrive once, in the order of the file; each is answered before anything is learned from it.

An update is a transaction. The trainer makes its step, the engines get the new weights, and the canaries vote: the update is
committed when they keep their answers (`ttrl.modes.canaries`), else weights, moments and schedule go back to the last commit. Only
prompts of committed updates enter the bank. Prompts of an update that was undone are quarantined: the same text, under whatever
id, is answered but never learned from again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttrl.answers import Answered, Vote, count_votes
from ttrl.errors import ConfigError, GuardStop, StopRequested
from ttrl.guards import build_guards
from ttrl.guards.keeper import Ruling
from ttrl.journal import Journal, Progress, StepClock
from ttrl.loop import draw, evaluate_if_due, finish, hand_over, is_due, remembered, to_samples, update
from ttrl.metrics import MetricSet
from ttrl.modes.bank import Bank, Entry, answer_kind, vote_entropy
from ttrl.modes.canaries import KEPT, LOST, Canaries, Panel, Verdict, panel_seed
from ttrl.scoring import admit, score
from ttrl.seeds import derive
from ttrl.stepmetrics import reward_metrics, rollout_metrics
from ttrl.types import Prompt, Sample, Scored, StepStats

if TYPE_CHECKING:
    from ttrl.config.schema import Recipe
    from ttrl.parts import Parts

SNAPSHOT = ".committed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What a step wants to learn."""

    samples: list[Sample]
    admitted: list[Scored]
    """of the prompts that arrived"""
    replayed: list[Scored]


class Stream:
    """`learn: false` only answers: what learning has to beat. `canaries: 0` commits every update.

    `canaries` prompts are anchored, from the first whose vote has a share of `canary_share`; until then nothing is learned.
    `canary_votes` is the most of each one's votes that an update may cost, `tolerance` how much more often than at the start they
    may disagree with their anchors, `level` the chance, over the whole stream, that an update beyond that is committed. `replay`
    prompts per step come from a bank of `bank` prompts, balanced over `bank_classes` types of answers.
    """

    def __init__(
        self, ids: Sequence[str], prompts_per_step: int, seed: int, *, learn: bool = True, canaries: int = 16,
        canary_share: float = 0.6, canary_votes: int = 32, tolerance: float = 0.1, level: float = 0.05,
        replay: int = 0, bank: int = 64, bank_classes: int = 4,
    ) -> None:  # fmt: skip
        if canaries < 0 or canary_votes < 1 or not 0.0 < canary_share <= 1.0:
            raise ValueError("stream needs canaries >= 0, canary_votes >= 1 and 0 < canary_share <= 1")
        if not (0.0 < tolerance < 1.0 and 0.0 < level < 1.0):
            raise ValueError(f"tolerance and level must lie strictly between 0 and 1, got {tolerance} and {level}")
        if replay < 0 or not 1 <= bank_classes <= bank:
            raise ValueError(
                f"stream needs replay >= 0 and 1 <= bank_classes <= bank, got {replay}, {bank_classes}, {bank}"
            )
        self._ids, self._per_step, self._seed = tuple(ids), prompts_per_step, seed
        self._learns, self._replay, self._level, self._guarded = learn, replay, level, canaries > 0
        self._canaries = Canaries(wanted=canaries, share=canary_share, votes=canary_votes, tolerance=tolerance)
        self._bank = Bank(bank, bank_classes)
        self._quarantine: set[str] = set()
        self._snapshot: Path | None = None

    def batch(self, step: int) -> list[str]:
        """The next ids in the order of the file; the last batch may be smaller."""
        return list(self._ids[step * self._per_step : (step + 1) * self._per_step])

    def total(self, recipe: Recipe) -> int:
        """One step per batch."""
        return recipe.steps

    def check(self, recipe: Recipe) -> None:
        """Raises ConfigError for more steps than the stream has batches, and for guards that would roll back commits."""
        if any(guard.policy.action == "rollback" for guard in build_guards(recipe).values()):
            raise ConfigError(
                "source stream takes bad updates back by itself, one at a time; a rollback of a guard would also take back what was "
                "committed. Give guards the action warn, abstain, lower_lr or stop"
            )
        batches = -(-len(self._ids) // self._per_step)
        if recipe.steps > batches:
            raise ConfigError(
                f"steps is {recipe.steps}, but a stream of {len(self._ids)} prompts ends after {batches} steps of "
                f"{self._per_step}; lower steps"
            )

    def state(self) -> Mapping[str, Any]:
        """Anchors, limit, bank, quarantine."""
        return {"canaries": self._canaries.state(), "bank": self._bank.state(), "quarantine": sorted(self._quarantine)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._canaries.load_state(state["canaries"])
        self._bank.load_state(state["bank"])
        self._quarantine = set(state["quarantine"])

    def run(self, parts: Parts, journal: Journal, progress: Progress) -> None:
        """The remaining batches. Raises what `ttrl.loop.train` raises, but never for want of anything to train on."""
        self._snapshot = None
        if parts.guards.stopped:
            raise GuardStop(parts.guards.stopped)
        evaluate_if_due(parts, journal, progress)
        while progress.step < parts.recipe.steps:
            self._one_step(parts, journal, progress)

    def _one_step(self, parts: Parts, journal: Journal, progress: Progress) -> None:
        """Answer, then learn; evaluate and store what is due."""
        recipe, step = parts.recipe, progress.step
        clock, metrics = StepClock(), MetricSet()
        with remembered(parts.memory):
            with clock("rollout"):
                groups = draw(parts, step, self.batch(step))
            votes = {group.prompt.id: count_votes(parts.reader, group.rollouts) for group in groups}
            journal.answers([Answered(step=step, prompt_id=name, before=vote) for name, vote in votes.items()])
            metrics.merge(rollout_metrics(groups, recipe.rollout.votes_per_prompt))
            with clock("reward"):
                scored = [score(parts, group, step) for group in groups]
            metrics.merge(reward_metrics(scored, progress.flips(scored)))
            with clock("guard"):
                ruling = parts.guards.rule(step, scored, metrics)
            lesson = self._lesson(parts, step, ruling.admitted(scored, metrics), votes, metrics, clock)
            stats, verdict = None, Ruling()
            if lesson is not None and lesson.samples:
                stats, committed = self._transaction(parts, journal, step, lesson, votes, metrics, clock)
                if committed:  # an update that was undone left nothing to judge
                    with clock("guard"):
                        verdict = parts.guards.inspect(step, scored, stats, metrics)
            progress.advance([*scored, *(lesson.replayed if lesson else [])], stats, clock.total())
            progress.rollout_tokens += int(metrics.values().get("guard/canary_tokens", 0))
        for name, count in parts.pool.events().items():
            metrics.sum(name, count)
        journal.step(step, metrics, stats, clock, scored, (*ruling.events, *verdict.events))
        if reason := ruling.stop or verdict.stop:
            raise GuardStop(reason)
        if progress.step == recipe.steps:
            hand_over(parts, journal, progress)
        evaluate_if_due(parts, journal, progress)
        if is_due(progress.step, recipe.checkpoint.every, recipe.steps):
            journal.checkpoint(parts.trainer, parts.memory, progress)

    def _lesson(
        self, parts: Parts, step: int, scored: Sequence[Scored], votes: Mapping[str, Vote], metrics: MetricSet, clock: StepClock
    ) -> Lesson | None:  # fmt: skip
        """Samples of the prompts that arrived and of some from the bank; None while the stream only answers."""
        if not self._learns:
            return None
        if self._guarded and self._canaries.limit is None:
            self._collect(parts, step, votes, metrics, clock)
            metrics.sum("dropped/before_canaries", len(scored))
            return None
        known = [item for item in scored if content(item.group.prompt) in self._quarantine]
        if known:
            metrics.sum("dropped/quarantined", len(known))
        admitted = admit(parts, [item for item in scored if item not in known], metrics)
        samples = [sample for item in admitted for sample in to_samples(parts, item)]
        entries = {e.prompt_id: e for e in self._bank.draw(self._replay, self._seed, "replay", step)}
        with clock("rollout"):
            groups = draw(parts, step, list(entries)) if entries else []
        replayed = [score(parts, group, step) for group in groups]
        for item in admit(parts, replayed, metrics):
            weight = self._bank.weight(entries[item.group.prompt.id])
            samples += [replace(s, advantages=s.advantages * weight) for s in to_samples(parts, item)]
        samples = finish(parts, step, samples, metrics)
        return Lesson(samples=samples, admitted=admitted, replayed=replayed)

    def _collect(
        self, parts: Parts, step: int, votes: Mapping[str, Vote], metrics: MetricSet, clock: StepClock
    ) -> None:  # fmt: skip
        """Anchors from the answers of this step, and their limit once there are enough."""
        for name, vote in votes.items():
            self._canaries.offer(name, vote)
        metrics.mean("guard/canaries", len(self._canaries.anchors))
        if self._canaries.complete:
            with clock("canaries"):
                _note(metrics, self._canaries.measure(self._panel(parts, step)), self._canaries)

    def _transaction(
        self, parts: Parts, journal: Journal, step: int, lesson: Lesson, votes: Mapping[str, Vote], metrics: MetricSet,
        clock: StepClock,
    ) -> tuple[StepStats, bool]:  # fmt: skip
        """An update that is committed, or leaves no trace but its costs and the quarantine; and which of the two."""
        if self._snapshot is None:
            self._save(parts, journal)
        try:
            with clock("train"), parts.pool.released():
                stats = update(parts, step, lesson.samples)
            assert stats is not None
            with clock("sync"):
                parts.link.check_on_policy(stats)
                parts.link.sync(stats)
            verdict = None
            if self._guarded:
                with clock("canaries"):
                    verdict = self._canaries.judge(self._panel(parts, step), self._level / parts.recipe.steps)
        except StopRequested:  # what is stored then must be the last commit
            self._restore(parts)
            raise
        if verdict is not None:
            _note(metrics, verdict, self._canaries)
        committed = verdict is None or verdict.outcome == KEPT
        metrics.mean("guard/committed", float(committed))
        if committed:
            self._save(parts, journal)
            for item in lesson.admitted:
                self._bank.arrive(_entry(item, votes[item.group.prompt.id]))
        else:
            self._quarantine.update(content(item.group.prompt) for item in lesson.admitted)
            with clock("sync"):
                self._restore(parts)
                parts.link.sync(None)
        return stats, committed

    def _panel(self, parts: Parts, step: int) -> Panel:
        return Panel(
            parts.prompts, self._canaries.anchors, parts.pool, parts.reader, parts.spec, panel_seed(self._seed, step)
        )

    def _save(self, parts: Parts, journal: Journal) -> None:
        """The weights are committed. Until the new state is whole the trainer itself is the copy that is good."""
        if self._guarded:
            self._snapshot = journal.scratch(SNAPSHOT)
            parts.trainer.save(self._snapshot)

    def _restore(self, parts: Parts) -> None:
        if self._snapshot is not None:
            parts.trainer.restore(self._snapshot, version=parts.trainer.version + 1)


def content(prompt: Prompt) -> str:
    """What a prompt says, whatever its id: 16 hex digits."""
    return f"{derive(*(part for message in prompt.messages for part in (message.role, message.content))):016x}"


def _entry(scored: Scored, vote: Vote) -> Entry:
    kind = answer_kind(scored.label or vote.answer or "")
    return Entry(
        prompt_id=scored.group.prompt.id, kind=kind, entropy=vote_entropy(list(vote.answers.values()), vote.samples)
    )


def _note(metrics: MetricSet, verdict: Verdict, canaries: Canaries) -> None:
    """guard/canary_...: rate of disagreement, changed answers, votes spent; the limit; was it lost or merely not decided?"""
    metrics.mean("guard/canary_rate", verdict.rate)
    metrics.mean("guard/canary_changed", verdict.changed)
    metrics.sum("guard/canary_votes", verdict.votes)
    metrics.sum("guard/canary_tokens", verdict.tokens)
    metrics.mean("guard/canary_lost", float(verdict.outcome == LOST))
    if canaries.limit is not None:
        metrics.mean("guard/canary_limit", canaries.limit)
