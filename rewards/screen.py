"""From what a model wrote to pixels of the original screenshot.

Models of this field print coordinates in four systems: pixels of the image, fractions of its sides, thousandths of its sides, and
pixels of the image *after* the model's own resizing (Qwen2-VL and its kin). Taking the last for the first misses small targets on
large screens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from ttrl.rewards.spots import Box, square
from ttrl.rewards.structured import parse_box, parse_point

Coordinates = Literal["pixels", "fraction", "thousandths", "resized"]

SIZE_FIELD = "image_size"
"""Column of the prompts file (kept with `data.keep`) that holds [width, height] of the screenshot in pixels."""
MAX_SIDE = 1 << 20


class Screen:
    """Reads canonical boxes and points (see `ttrl.rewards.structured`) as regions of the original image, in pixels.

    `resized` needs what the model's image processor uses: `factor` (sides are multiples of it), `min_pixels`, `max_pixels`.
    """

    def __init__(
        self, coordinates: Coordinates, *, expand: float, factor: int, min_pixels: int, max_pixels: int
    ) -> None:
        if coordinates not in ("pixels", "fraction", "thousandths", "resized"):
            raise ValueError(f"coordinates must be pixels, fraction, thousandths or resized, got {coordinates!r}")
        if not (math.isfinite(expand) and expand > 0):
            raise ValueError(f"expand must be a positive number of pixels, got {expand}")
        if factor < 1 or not 0 < min_pixels <= max_pixels:
            raise ValueError(
                f"needs factor >= 1 and 0 < min_pixels <= max_pixels, got {factor}, {min_pixels}, {max_pixels}"
            )
        self._coordinates: Coordinates = coordinates
        self._expand, self._factor, self._min, self._max = expand, factor, min_pixels, max_pixels

    def scale(self, width: int, height: int) -> tuple[float, float]:
        """What x and y are multiplied with."""
        if self._coordinates == "pixels":
            return 1.0, 1.0
        if self._coordinates == "fraction":
            return float(width), float(height)
        if self._coordinates == "thousandths":
            return width / 1000, height / 1000
        seen_width, seen_height = resized(width, height, self._factor, self._min, self._max)
        return width / seen_width, height / seen_height

    def region(self, answer: str | None, width: int, height: int) -> Box | None:
        """The region an answer stands for: its box, or the square of `expand` pixels around its point. None stays None."""
        if answer is None:
            return None
        across, down = self.scale(width, height)
        if answer.startswith("("):
            x, y = parse_point(answer)
            return square(x * across, y * down, self._expand)
        x1, y1, x2, y2 = parse_box(answer)
        return x1 * across, y1 * down, x2 * across, y2 * down


def screen_size(prompt_id: str, meta: Mapping[str, Any]) -> tuple[int, int]:
    """[width, height] from the prompt. Raises ValueError that says how to provide it."""
    size = meta.get(SIZE_FIELD)
    whole = isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int for side in size)
    if not whole or size is None or not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(
            f"prompt {prompt_id!r}: regions need {SIZE_FIELD!r}: [width, height] in whole pixels, found {size!r}; "
            f"write that column into the prompts file and keep it with data.keep: [{SIZE_FIELD}]"
        )
    return size[0], size[1]


def resized(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) that a Qwen2-VL style processor feeds to the model: both sides multiples of `factor`, the number of pixels
    between the bounds, the shape kept as well as that allows. Golden: 1920 x 1080, 28, 3136, 12845056 -> 1932 x 1092."""
    across, down = (max(factor, round(side / factor) * factor) for side in (width, height))
    if across * down > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        across, down = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    elif across * down < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        across, down = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return across, down
