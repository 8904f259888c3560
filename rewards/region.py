"""Region consistency (GUI-RC and GUI-RCPO, arXiv 2508.05615): where on a screenshot do the samples agree?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.screen import Coordinates, Screen, screen_size
from ttrl.rewards.spots import Box, Ints, SpotVote, centre, covers, spot_vote, to_pixels
from ttrl.types import NO_ANSWER, Group, Scored

AGREES, DIFFERS = 0, 1
QWEN_FACTOR, QWEN_MIN, QWEN_MAX = 28, 3_136, 12_845_056


class RegionConsistency:
    """r_i = mean number of votes over the pixels of region i, divided by the peak of all votes, in (0, 1].

        v(pixel) = number of regions that cover it        r_i = sum_{pixel in region i} v(pixel) / (|region i| max v)

    The label is the bounding box of the largest part of the screen with the peak of votes; its centre is GUI-RC's prediction.
    A region that covers that centre is of class 0, another of class 1. What cannot be read never votes and is paid 0, also when
    most answers cannot be read. Regions are in pixels of the original image (`image_size` of the prompt), whatever system the
    model writes in (`coordinates`); a point stands for a square of `expand` pixels, in the vote and in the reward alike.
    The group abstains when no two regions overlap: then every region is its own peak and all would be paid 1.

    Any part of the peak is paid 1, so predictions can shrink without losing pay while centre accuracy does not show it:
    `region_area` is their mean share of the screen, `region_shrink` that divided by its value at the prompt's first visit, and
    `region_shrink_alarm` the share of prompts where it fell below `shrink_alarm`.
    Golden, 10 x 10: [0,0,4,4], [2,2,6,6], [2,2,4,4] -> label [2,2,4,4], share 1, rewards [.5, .5, 1].
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        extractor: Literal["box", "point"] = "box",
        coordinates: Coordinates = "pixels",
        expand: float = 50.0,
        truncated_votes: bool = False,
        min_share: float = 0.0,
        shrink_alarm: float = 0.5,
        factor: int = QWEN_FACTOR,
        min_pixels: int = QWEN_MIN,
        max_pixels: int = QWEN_MAX,
    ) -> None:
        if not 0.0 <= min_share <= 1.0 or not 0.0 <= shrink_alarm <= 1.0:
            raise ValueError(f"min_share and shrink_alarm must lie in [0, 1], got {min_share} and {shrink_alarm}")
        self.reader = AnswerReader(extractor, {}, truncated_votes=truncated_votes)
        self.screen = Screen(coordinates, expand=expand, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
        self._min_share, self._shrink_alarm = min_share, shrink_alarm
        self._first_area: dict[str, float] = {}

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        width, height = screen_size(group.prompt.id, group.prompt.meta)
        read = self.reader.read(group.rollouts)
        regions = [self.screen.region(answer, width, height) for answer in read]
        pixels = to_pixels(regions, width, height)
        vote = spot_vote(pixels)
        classes = region_classes(pixels, vote)
        share, margin = agreement(pixels, classes, vote)
        # one region is no agreement, whatever its own share
        elected = vote.peak >= self.min_votes and share >= self._min_share
        unread = classes == NO_ANSWER
        answers = (None if box is None or no else _spell(box) for box, no in zip(regions, unread, strict=True))
        return Scored(
            group=group, rewards=vote.densities.astype(np.float32), train=group.trainable & elected, classes=classes,
            answers=tuple(answers), label=_spell(vote.region) if elected and vote.region is not None else None, share=share,
            margin=margin, metrics=self._metrics(group.prompt.id, pixels, vote, width * height), trace=(_reason(vote, classes),),
        )  # fmt: skip

    @property
    def examples(self) -> tuple[str, ...]:
        """Twelve answers that do not overlap on a screen of 1000 x 1000: what `ttrl check` tries the reward with."""
        across, down = self.screen.scale(1000, 1000)
        corners = [(80 * k / across, 80 * k / down, (80 * k + 40) / across, (80 * k + 40) / down) for k in range(12)]
        if self.reader.kind == "box":
            return tuple(_spell(corner) for corner in corners)
        return tuple(f"({x:g},{y:g})" for x, y, *_ in corners)

    def state(self) -> Mapping[str, Any]:
        """Mean area per prompt at its first visit, as a share of the screen."""
        return {"first_area": dict(self._first_area)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._first_area = dict(state["first_area"])

    def _metrics(self, prompt_id: str, pixels: Ints, vote: SpotVote, screen: int) -> dict[str, float]:
        areas = (pixels[:, 2] - pixels[:, 0]) * (pixels[:, 3] - pixels[:, 1])
        found = {"region_peak": float(vote.peak), "consensus_area": vote.area / screen}
        if areas.any():
            mean = float(areas[areas > 0].mean()) / screen
            ratio = mean / self._first_area.setdefault(prompt_id, mean)
            found |= {
                "region_area": mean,
                "region_shrink": ratio,
                "region_shrink_alarm": float(ratio < self._shrink_alarm),
            }
        return found


def region_classes(pixels: Ints, vote: SpotVote) -> Any:
    """[K] int32: covers the consensus centre, or does not, or NO_ANSWER for an empty region."""
    middle = vote.centre
    return np.asarray(
        [
            NO_ANSWER if box[2] <= box[0] else AGREES if middle and covers(box, middle) else DIFFERS
            for box in pixels.tolist()
        ],
        np.int32,
    )


def agreement(pixels: Ints, classes: Any, vote: SpotVote) -> tuple[float, float]:
    """Share: peak over valid votes. Margin: that minus the share of the peak among the regions that differ."""
    valid = int((classes != NO_ANSWER).sum())
    if not valid:
        return 0.0, 0.0
    rival = spot_vote(pixels[classes == DIFFERS]).peak
    return vote.peak / valid, (vote.peak - rival) / valid


def _reason(vote: SpotVote, classes: Any) -> str:
    valid = int((classes != NO_ANSWER).sum())
    if vote.region is None:
        return "no region could be read"
    x, y = centre(vote.region)
    return f"{vote.peak} of {valid} regions overlap; the centre of their largest common part is ({x:g}, {y:g})"


def _spell(box: Box | Sequence[float]) -> str:
    return "[" + ",".join(f"{round(side, 3):g}" for side in box) + "]"
