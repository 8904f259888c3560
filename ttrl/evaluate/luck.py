"""Were the pseudo-labels right, and the rewards that came of them? Looked at from outside, with the labels, after the fact.

A reward can be right although its label is wrong: whoever is wrong in another way than the label is rightly paid nothing. TTRL
(arXiv 2504.16084) calls that a lucky hit. Whoever holds a LuckMeter gets numbers to write down; nothing flows back into training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ttrl.evaluate.labels import read_labels
from ttrl.metrics import MetricSet
from ttrl.rewards.reader import AnswerReader
from ttrl.types import NO_ANSWER, Scored

PART = 0.25
"""Share of the steps that `summarise` calls the first and the last ones."""
COUNTED = ("step", "groups", "labelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Luck:
    """One group against its reference answer; names and definitions are those of TTRL.

    Example, answers 1 1 2 3 4 9 8 6 and reference 9: label 1 is wrong, yet 5 of 8 rewards are right ->
        label_accuracy 0   reward_accuracy .625   majority_ratio .25   ground_truth_ratio .125   any_right 1
    """

    label_accuracy: float | None
    """1 if the pseudo-label equals the reference, else 0; None without a label"""
    reward_accuracy: float | None
    """Share of rollouts whose reward is the true one: 1 for the reference answer, else 0. None without a label, and for rewards other
    than 0 and 1"""
    reward_accuracy_label_wrong: float | None
    """The same where the label is wrong: the lucky hits; None where it is right"""
    majority_ratio: float
    """Votes for the label divided by all rollouts"""
    ground_truth_ratio: float
    """Share of rollouts that give the reference answer"""
    majority_voting_reward: float
    """Mean reward"""
    any_right: float
    """TTRL's pass@V: 1 if any of the V rollouts gives the reference answer"""
    post_reward_accuracy: float | None
    """The next three: on the rollouts that may be trained on; None when there are none"""
    post_ground_truth_ratio: float | None
    post_any_right: float | None


def judge(scored: Scored, reference: str, reader: AnswerReader) -> Luck:
    """One group. Answers are compared as evaluation compares them, whatever the reward took for equal."""
    classes, forms = reader.classes(scored.answers)
    given = [forms[c] if c != NO_ANSWER else None for c in classes]
    true = _equal(given, reader.match(forms, reference))
    votes = _equal(given, None if scored.label is None else reader.match(forms, scored.label))
    right = None if scored.label is None else reader.match([scored.label], reference) is not None
    binary = right is not None and bool(np.isin(scored.rewards, (0.0, 1.0)).all())
    agree, kept = (scored.rewards == 1.0) == true, scored.train
    return Luck(
        label_accuracy=None if right is None else float(right),
        reward_accuracy=_mean(agree) if binary else None,
        reward_accuracy_label_wrong=_mean(agree) if binary and not right else None,
        majority_ratio=float(votes.mean()),
        ground_truth_ratio=float(true.mean()),
        majority_voting_reward=float(scored.rewards.mean()),
        any_right=float(true.any()),
        post_reward_accuracy=_mean(agree[kept]) if binary else None,
        post_ground_truth_ratio=_mean(true[kept]),
        post_any_right=float(true[kept].any()) if kept.any() else None,
    )


class LuckMeter:
    """Holds the reference answers of the prompts it was given; groups of other prompts are passed over."""

    def __init__(self, labels: str, prompt_ids: Sequence[str], reader: AnswerReader) -> None:
        self._labels, self._reader = read_labels(labels, prompt_ids), reader

    def __call__(self, step: int, scored: Sequence[Scored]) -> dict[str, Any] | None:
        """The line of luck.jsonl: means over the groups of a step in which a number is defined. None without a known group."""
        known = [item for item in scored if item.group.prompt.id in self._labels]
        if not known:
            return None
        metrics = MetricSet()
        for item in known:
            for name, value in asdict(judge(item, self._labels[item.group.prompt.id], self._reader)).items():
                if value is not None:
                    metrics.mean(name, value)
        labelled = sum(item.label is not None for item in known)
        rounded = {name: round(value, 6) for name, value in metrics.values().items()}
        return {"step": step, "groups": len(known), "labelled": labelled, **rounded}


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]] | None:
    """Means of luck.jsonl over the first quarter of the steps, the last quarter, and all; every step counts the same."""
    if not lines:
        return None
    size = max(1, round(PART * len(lines)))
    parts = {"first_quarter": lines[:size], "last_quarter": lines[-size:], "all": lines}
    return {name: _means(part) for name, part in parts.items()}


def _means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    metrics = MetricSet()
    for line in lines:
        for name, value in line.items():
            if name not in COUNTED:
                metrics.mean(name, float(value))
    return metrics.values()


def _equal(given: Sequence[str | None], form: str | None) -> npt.NDArray[np.bool_]:
    return np.asarray([form is not None and answer == form for answer in given], np.bool_)


def _mean(flags: npt.NDArray[np.bool_]) -> float | None:
    return float(flags.mean()) if flags.size else None
