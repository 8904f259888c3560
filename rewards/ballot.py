"""From a group to a counted vote: what every reward over answers starts with, and ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.trees import tree_worth
from ttrl.rewards.vote import Decision, decide
from ttrl.rewards.weights import vote_weights
from ttrl.types import NO_ANSWER, Group, Scored

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteRule:
    """How votes are counted and when the group abstains: the options that rewards pass on to `decide`."""

    ties: str = "abstain"
    weights: str = "none"
    trees: str = "leaf"
    """see `ttrl.rewards.trees`"""
    min_share: float = 0.0
    min_margin: float = 0.0
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_share", "min_margin", "min_confidence"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def bounds(self) -> dict[str, Any]:
        """The thresholds as keyword arguments of `decide`."""
        return {"min_share": self.min_share, "min_margin": self.min_margin, "min_confidence": self.min_confidence}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """A group with its answers sorted into classes. Classes are numbered by content, so nothing depends on order."""

    group: Group
    answers: tuple[str | None, ...]
    """[V]"""
    classes: tuple[int, ...]
    """[V]"""
    forms: tuple[str, ...]
    """Canonical text per class."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Per-rollout arguments of `decide`: weights, lengths, worth."""
    grading: Mapping[str, float] = field(default_factory=dict)
    """Votes that the limits of grading kept apart; part of every reward's metrics."""

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        """[V]"""
        return np.asarray([c != NO_ANSWER for c in self.classes], np.bool_)

    def decide(self, rule: VoteRule, seed: int) -> Decision:
        """The vote of the whole group."""
        return decide(self.classes, ties=rule.ties, tie_seed=seed, **rule.bounds(), **self.arguments)

    def among(self, electorate: npt.NDArray[np.bool_]) -> Ballot:
        """The same answers, of which only the electorate's [V] count as votes."""
        classes = tuple(c if votes else NO_ANSWER for c, votes in zip(self.classes, electorate, strict=True))
        return replace(self, classes=classes)

    def form(self, winner: int | None) -> str | None:
        """The canonical text of a class, None for no class."""
        return None if winner is None else self.forms[winner]

    def share_of(self, label: str | None) -> tuple[float, float]:
        """Share of a label among the valid votes, and that minus the largest other share (negative where another one leads)."""
        counts = np.bincount([c for c in self.classes if c != NO_ANSWER], minlength=len(self.forms))
        total = int(counts.sum())
        if total == 0 or label is None:
            return 0.0, 0.0
        own = int(counts[self.forms.index(label)]) if label in self.forms else 0
        others = [int(n) for n, form in zip(counts, self.forms, strict=True) if form != label]
        return own / total, (own - max(others, default=0)) / total

    def paid(self, label: str | None) -> Values:
        """[V] 1 for the rollouts that answered `label`, else 0; all 0 without a label."""
        return np.asarray([float(c != NO_ANSWER and self.forms[c] == label) for c in self.classes])

    def scored(
        self, rewards: Sequence[float] | Values, train: npt.NDArray[np.bool_] | bool, *, label: str | None, share: float,
        margin: float, trace: Sequence[str], metrics: Mapping[str, float] | None = None,
    ) -> Scored:  # fmt: skip
        """The Scored of this group; rollouts outside `group.trainable` never train."""
        return Scored(
            group=self.group, rewards=np.asarray(rewards, np.float32), train=self.group.trainable & train,
            classes=np.asarray(self.classes, np.int32), answers=self.answers, label=label, share=share, margin=margin,
            metrics={**self.grading, **(metrics or {})}, trace=tuple(trace),
        )  # fmt: skip


def open_ballot(reader: AnswerReader, rule: VoteRule, group: Group) -> Ballot:
    """Read and classify the answers of a group, with the weights and lengths the rule asks for."""
    answers = reader.read(group.rollouts)
    grades = reader.grade(answers)
    arguments: dict[str, Any] = {}
    weights = vote_weights(rule.weights, group.rollouts, grades.classes)
    weights, worth = tree_worth(rule.trees, group.rollouts, grades.classes, weights)
    if weights is not None:
        arguments["weights"] = weights.tolist()
    if worth is not None:
        arguments["worth"] = worth.tolist()
    if rule.ties == "shortest":
        arguments["lengths"] = [len(r.token_ids) for r in group.rollouts]
    return Ballot(
        group=group, answers=answers, classes=tuple(grades.classes), forms=grades.forms, arguments=arguments,
        grading={"grading_timeouts": grades.timeouts, "grading_gated": grades.gated},
    )  # fmt: skip
