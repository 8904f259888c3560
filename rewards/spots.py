"""Votes in the plane: which part of a screen most predictions cover, exactly, at any resolution.

Regions are half-open rectangles of whole pixels. Nothing is painted: the edges of K regions cut the screen into at most
(2K + 1)^2 cells within which the number of votes is constant, so a 4K screen costs as much as an icon. `tests/test_spots.py`
compares every number with a dense grid of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels, x to the right and y down."""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotVote:
    """What K regions say together.

    Golden: [0,0,4,4], [2,2,6,6], [2,2,4,4] on 10 x 10 pixels -> peak 3, region (2,2,4,4), centre (3,3), densities [.5, .5, 1].
    """

    peak: int
    """The largest number of regions over one pixel; 0 when there is no region."""
    region: tuple[int, int, int, int] | None
    """Bounding box of the largest connected part with `peak` votes (4 neighbours; the first in reading order among equals).
    Its centre need not lie in that part: a part can be L-shaped."""
    area: int
    """Pixels of that part."""
    densities: npt.NDArray[np.float64]
    """[K] mean number of votes over the pixels of a region, divided by `peak`, in (0, 1]; 0 for a region without pixels."""

    @property
    def centre(self) -> tuple[float, float] | None:
        """The prediction of GUI-RC."""
        return None if self.region is None else centre(self.region)


def centre(box: Sequence[float]) -> tuple[float, float]:
    """The middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def square(x: float, y: float, side: float) -> Box:
    """The region that a point stands for: `side` pixels wide and high, centred on it."""
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def covers(box: Sequence[float], point: Sequence[float]) -> bool:
    """Is the point in the box, borders included?"""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def to_pixels(boxes: Sequence[Box | None], width: int, height: int) -> Ints:
    """[K, 4] whole pixels inside the screen. Edges are rounded outwards, so a region with an area never vanishes; None, inverted
    and outlying regions become empty. Raises ValueError for a screen without pixels and for numbers that are not finite."""
    if width < 1 or height < 1:
        raise ValueError(f"a screen needs at least one pixel, got {width} x {height}")
    raw = np.asarray([(0.0, 0.0, 0.0, 0.0) if box is None else box for box in boxes], np.float64).reshape(-1, 4)
    if not np.isfinite(raw).all():
        raise ValueError("coordinates must be finite numbers")
    low = np.clip(np.floor(raw[:, :2]), 0, (width, height))
    high = np.clip(np.ceil(raw[:, 2:]), 0, (width, height))
    empty = (raw[:, 2:] <= raw[:, :2]).any(axis=1) | (high <= low).any(axis=1)
    pixels: Ints = np.concatenate([low, high], axis=1).astype(np.int64)
    pixels[empty] = 0
    return pixels


def spot_vote(pixels: Ints) -> SpotVote:
    """The vote of [K, 4] regions as `to_pixels` gives them; empty regions do not vote.

    Source: GUI-RC and GUI-RCPO (arXiv 2508.05615). Exact in integers up to screens of 2^26 x 2^26 pixels and 2^10 regions.
    """
    boxes = np.asarray(pixels, np.int64).reshape(-1, 4)
    real = boxes[:, 2] > boxes[:, 0]
    if not real.any():
        return SpotVote(peak=0, region=None, area=0, densities=np.zeros(len(boxes)))
    xs, ys = np.unique(boxes[real][:, 0::2]), np.unique(boxes[real][:, 1::2])
    left, top, right, bottom = (
        np.searchsorted(edges, boxes[real][:, side]) for side, edges in ((0, xs), (1, ys), (2, xs), (3, ys))
    )
    votes = _count(left, top, right, bottom, (len(ys), len(xs)))
    cells = np.diff(ys)[:, None] * np.diff(xs)[None, :]
    peak = int(votes.max())
    region, area = _largest_part(votes == peak, cells, xs, ys)
    totals = np.zeros((len(ys), len(xs)), np.int64)  # summed-area table of votes times pixels
    totals[1:, 1:] = (votes * cells).cumsum(axis=0).cumsum(axis=1)
    inside = totals[bottom, right] - totals[top, right] - totals[bottom, left] + totals[top, left]
    sizes = (xs[right] - xs[left]) * (ys[bottom] - ys[top])
    densities = np.zeros(len(boxes))
    densities[real] = inside / (sizes * peak)
    return SpotVote(peak=peak, region=region, area=area, densities=densities)


def _count(left: Ints, top: Ints, right: Ints, bottom: Ints, edges: tuple[int, int]) -> Ints:
    """[rows, columns] regions over each cell: four corners per region, then two running sums."""
    steps = np.zeros(edges, np.int64)
    np.add.at(steps, (top, left), 1)
    np.add.at(steps, (bottom, right), 1)
    np.add.at(steps, (top, right), -1)
    np.add.at(steps, (bottom, left), -1)
    return np.asarray(steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1], np.int64)


def _largest_part(top: npt.NDArray[np.bool_], cells: Ints, xs: Ints, ys: Ints) -> tuple[tuple[int, int, int, int], int]:
    from scipy import ndimage  # not at the top: a recipe is checked without it

    labels, count = ndimage.label(top)  # numbered in reading order, of cells as of pixels
    areas = ndimage.sum_labels(cells, labels, np.arange(1, count + 1)).astype(np.int64)
    chosen = int(np.argmax(areas))
    rows, columns = ndimage.find_objects(labels)[chosen]
    box = (xs[columns.start], ys[rows.start], xs[columns.stop], ys[rows.stop])
    return (int(box[0]), int(box[1]), int(box[2]), int(box[3])), int(areas[chosen])
