"""Reading the answers of a group: extraction and equivalence under one kind, as training and evaluation both need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ttrl.rewards.equivalence import Grades, canonical, grade, matching
from ttrl.rewards.extract import extract, extract_all
from ttrl.types import Rollout


def reader_of(reward: object, otherwise: AnswerReader) -> AnswerReader:
    """The reader a reward holds as `reader`, which plug-ins need not do; else `otherwise`."""
    own = getattr(reward, "reader", None)
    return own if isinstance(own, AnswerReader) else otherwise


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

    @property
    def description(self) -> str:
        """Two readers of one description read alike: the kind, its options, and whether cut text may answer."""
        options = [f"{name}={value!r}" for name, value in sorted(self.options.items())]
        options += ["truncated_votes"] if self._truncated_votes else []
        return self.kind + (f"({', '.join(options)})" if options else "")

    def read(self, rollouts: Sequence[Rollout]) -> tuple[str | None, ...]:
        """[V] the answer of each rollout, or None."""
        texts = [r.text if r.finish.is_complete() or self._truncated_votes else "" for r in rollouts]
        return tuple(extract_all(texts, self.kind, **self.options))

    def grade(self, answers: Sequence[str | None]) -> Grades:
        """Classes, the canonical text per class, and how many votes the limits of grading kept apart."""
        return grade(answers, self.kind)

    def classes(self, answers: Sequence[str | None]) -> tuple[list[int], tuple[str, ...]]:
        """Classes [V] numbered by their canonical text, and that text per class.

        Numbering by content keeps everything downstream independent of the order of the rollouts.
        """
        grades = self.grade(answers)
        return grades.classes, grades.forms

    def form(self, answer: str) -> str:
        """The canonical text of one answer. A class is named after one of its members: compare with `match`, not with `==`."""
        return canonical(answer, self.kind)

    def match(self, forms: Iterable[str], label: str) -> str | None:
        """The one of `forms` (as `classes` returns them) that equals `label` (as written), or None."""
        return self.match_form(forms, self.form(label))

    def match_form(self, forms: Iterable[str], form: str) -> str | None:
        """The one of `forms` that equals `form`, itself a canonical text, perhaps of another group; or None."""
        return matching(forms, form, self.kind)
