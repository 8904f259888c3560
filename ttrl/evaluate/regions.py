"""Evaluation of clicks: a prediction is right when its centre lies in the box of the label, borders included.

The labels are boxes `[x1,y1,x2,y2]` in pixels of the original image. `maj@k` is here whether GUI-RC on the first k samples is
right: regions have no classes whose draws could be counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ttrl.errors import ConfigError
from ttrl.evaluate.evaluator import Evaluator, PromptResult, passes
from ttrl.evaluate.labels import read_labels
from ttrl.prompts import PromptRecord
from ttrl.rewards.region import RegionConsistency
from ttrl.rewards.screen import screen_size
from ttrl.rewards.spots import Box, centre, covers, spot_vote, to_pixels
from ttrl.rewards.structured import box_answer, parse_box
from ttrl.types import Prompt, Rollout


class RegionEvaluator(Evaluator):
    """Evaluates predictions as `reward` reads them (coordinates, expansion of points)."""

    def __init__(self, *arguments: Any, reward: RegionConsistency, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._reward = reward
        self._region_right: dict[str, tuple[float, ...]] = {}
        if self._labels is not None:
            self._boxes = {name: label_box(name, text) for name, text in self._labels.items()}

    def _result(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> PromptResult:
        width, height = screen_size(prompt.id, prompt.meta)
        answers = self._reader.read(rollouts)
        regions = [self._reward.screen.region(answer, width, height) for answer in answers]
        pixels = to_pixels(regions, width, height)
        vote = spot_vote(pixels)
        counts = Counter(answer for answer in answers if answer is not None)
        correct, right = None, None
        consensus = None if vote.region is None else "[" + ",".join(map(str, vote.region)) + "]"
        if self._labels is not None:
            box = self._boxes[prompt.id]
            correct = sum(region is not None and covers(box, centre(region)) for region in regions)
            hits = tuple(
                float((middle := spot_vote(pixels[:k]).centre) is not None and covers(box, middle)) for k in self._ks
            )
            self._region_right[prompt.id] = hits
            if vote.centre is not None and covers(box, vote.centre):
                right = consensus
        valid = sum(answer is not None for answer in answers)
        return PromptResult(
            id=prompt.id, samples=len(rollouts), answers=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            no_answer=len(rollouts) - valid, majority=consensus, share=vote.peak / valid if valid else 0.0,
            length=sum(len(r.token_ids) for r in rollouts) / len(rollouts), correct=correct, right=right,
        )  # fmt: skip

    def _accuracies(self, results: Sequence[PromptResult]) -> dict[str, tuple[float, ...]]:
        table = passes(
            results, self._ks
        )  # the elected region need not be anybody's answer, so it has no votes to count
        for place, k in enumerate(self._ks):
            if k > 1:
                table[f"maj@{k}"] = tuple(self._region_right[r.id][place] for r in results)
        return table


def check_screens(records: Sequence[PromptRecord]) -> None:
    """Raises ConfigError for the first prompt that does not say how large its screenshot is."""
    for record in records:
        try:
            screen_size(record.id, record.meta)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def check_regions(records: Sequence[PromptRecord], labels: str | None, limit: int | None) -> None:
    """Raises ConfigError for a prompt without screen size and for a label that is no box. Returns nothing, on purpose."""
    check_screens(records)
    if labels is not None:
        for name, text in read_labels(labels, [record.id for record in records[:limit]]).items():
            label_box(name, text)


def label_box(prompt_id: str, label: str) -> Box:
    """The box of a label. Raises ConfigError when it is none."""
    found = box_answer(label)
    if found is None:
        raise ConfigError(
            f"the label of {prompt_id!r} must be a box [x1,y1,x2,y2] in pixels of the image with x1 < x2 and y1 < y2, it is {label!r}"
        )
    return parse_box(found)
