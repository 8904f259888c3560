"""Reading the answers of a group: extraction and equivalence under one kind, as training and evaluation both need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ttrl.rewards.equivalence import canonical, classes
from ttrl.rewards.extract import extract
from ttrl.types import NO_ANSWER, Rollout


class AnswerReader:
    """Extracts answers of one kind and sorts them into classes. Truncated text is no answer unless asked for."""

    def __init__(self, kind: str, options: Mapping[str, Any], *, truncated_votes: bool = False) -> None:
        self.kind = kind
        self.options = dict(options)
        self._truncated_votes = truncated_votes
        try:
            extract("", kind, **self.options)  # a wrong option is an error now, not at the first rollout
        except TypeError as error:
            raise ValueError(f"extractor {kind!r}: {error}") from None

    def read(self, rollouts: Sequence[Rollout]) -> tuple[str | None, ...]:
        """[V] the answer of each rollout, or None."""
        return tuple(
            extract(rollout.text, self.kind, **self.options)
            if rollout.finish.is_complete() or self._truncated_votes
            else None
            for rollout in rollouts
        )

    def classes(self, answers: Sequence[str | None]) -> tuple[list[int], tuple[str, ...]]:
        """Classes [V] numbered by their canonical text, and that text per class.

        Numbering by content keeps everything downstream independent of the order of the rollouts.
        """
        raw = classes(answers, self.kind)
        form_of = {
            c: canonical(a, self.kind) for a, c in zip(answers, raw, strict=True) if a is not None and c != NO_ANSWER
        }
        forms = tuple(sorted(form_of.values()))
        rank = {form: index for index, form in enumerate(forms)}
        return [rank[form_of[c]] if c != NO_ANSWER else NO_ANSWER for c in raw], forms

    def form(self, answer: str) -> str:
        """The canonical text of one answer, as `classes` returns it."""
        return canonical(answer, self.kind)
