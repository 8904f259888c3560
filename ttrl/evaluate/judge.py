"""Judging answers that a mode wrote to `answers.jsonl`, after the fact: nothing of it comes back to the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ttrl.answers import Answered, Vote
from ttrl.config.schema import Recipe
from ttrl.evaluate.evaluator import Evaluation, Protocol, accuracies, graded, label_free, summarise
from ttrl.evaluate.labels import read_labels
from ttrl.rewards.reader import AnswerReader

STREAM, ADAPTED = "stream", "adapted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Knows where the labels are and under which protocol the votes were cast."""

    labels: str | None
    reader: AnswerReader
    votes: int
    ks: tuple[int, ...]
    temperature: float
    top_p: float
    max_new_tokens: int
    template: str
    seed: int

    @staticmethod
    def of(recipe: Recipe, reader: AnswerReader) -> Judge:
        """Answers are votes of training: its number, temperature and length, not those of `eval`."""
        rollout = recipe.rollout
        return Judge(
            labels=recipe.eval.labels, reader=reader, votes=rollout.votes_per_prompt, ks=recipe.eval.k,
            temperature=rollout.temperature, top_p=rollout.top_p, max_new_tokens=rollout.max_new_tokens,
            template=Path(recipe.data.template).name, seed=recipe.seed,
        )  # fmt: skip

    def prequential(self, answered: Sequence[Answered], step: int) -> dict[str, Evaluation]:
        """Every prompt as it was answered before anything was learned from it: `all`, and two halves by arrival, because a shift
        shows as a difference between them. Empty without answers.

        `accuracy` is the share of prompts whose answer is right (no answer is wrong), `pass@1` that of single samples.
        """
        middle = (len(answered) + 1) // 2
        parts = {"all": answered, "first_half": answered[:middle], "second_half": answered[middle:]}
        found = {
            name: self._evaluation(step, STREAM, [(a.prompt_id, a.before) for a in part])
            for name, part in parts.items()
        }
        return {name: evaluation for name, evaluation in found.items() if evaluation is not None}

    def paired(self, answered: Sequence[Answered], step: int) -> tuple[Evaluation, ...]:
        """Before and after adapting to each prompt; empty without answers."""
        both = [(a.prompt_id, a.before, a.after) for a in answered if a.after is not None]
        sides = [[(name, before) for name, before, _ in both], [(name, after) for name, _, after in both]]
        found = [self._evaluation(done, ADAPTED, side) for done, side in zip((0, step), sides, strict=True)]
        return tuple(evaluation for evaluation in found if evaluation is not None)

    def _evaluation(self, step: int, split: str, votes: Sequence[tuple[str, Vote]]) -> Evaluation | None:
        if not votes:
            return None
        ids = [name for name, _ in votes]
        labels = read_labels(self.labels, ids) if self.labels is not None else None
        results = [
            graded(name, vote, labels[name] if labels is not None else None, self.reader) for name, vote in votes
        ]
        fewest = min(result.samples for result in results)
        protocol = Protocol(
            samples=self.votes, temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens,
            template=self.template, extractor=self.reader.kind, prompts=len(ids),
        )  # fmt: skip
        per_prompt = label_free(results)
        if labels is not None:
            right = {"accuracy": tuple(float(result.majority_correct) for result in results)}
            per_prompt = {**right, **accuracies(results, [k for k in self.ks if k <= fewest]), **per_prompt}
        return summarise(step, split, protocol, results, per_prompt, seed=self.seed)
