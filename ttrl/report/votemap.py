"""The map of a vote over a screenshot: every predicted region, darker where more of them lie, and the elected one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from ttrl.report.plots import BLUE, ORANGE

LONGEST_SIDE = 360
"""Pixels of the picture; the numbers inside are those of the original screen."""


def vote_map(group: Mapping[str, Any], picture: str | None = None) -> Markup | None:
    """SVG for a group of groups.jsonl whose answers are regions; None for any other group. Everything in it is a number, but for
    `picture`, the screenshot as a data URL of our own making."""
    screen = group.get("screen")
    boxes = [box for box in (_numbers(rollout["answer"]) for rollout in group["rollouts"]) if box is not None]
    if not screen or not boxes:
        return None
    width, height = int(screen[0]), int(screen[1])
    scale = LONGEST_SIDE / max(width, height)
    # a pixel under all regions is nearly opaque, one under a single region just visible
    opacity = min(0.8, 1 - 0.08 ** (1 / len(boxes)))
    shapes = [_rectangle(box, f'fill="{BLUE}" fill-opacity="{opacity:.3f}"') for box in boxes]
    elected = _numbers(group["label"])
    if elected is not None:
        x, y = (elected[0] + elected[2]) / 2, (elected[1] + elected[3]) / 2
        line = f'fill="none" stroke="{ORANGE}" stroke-width="{2 / scale:.3f}"'
        shapes += [
            _rectangle(elected, line),
            f'<circle cx="{x:.3f}" cy="{y:.3f}" r="{4 / scale:.3f}" fill="{ORANGE}"/>',
        ]
    below = f'<image href="{escape(picture)}" width="{width}" height="{height}" opacity="0.6"/>' if picture else ""
    return Markup(
        f'<svg class="votemap" role="img" aria-label="map of {len(boxes)} predicted regions" viewBox="0 0 {width} {height}" '
        f'width="{width * scale:.0f}" height="{height * scale:.0f}"><rect width="{width}" height="{height}" fill="none" '
        f'stroke="currentColor" stroke-width="{1 / scale:.3f}"/>{below}{"".join(shapes)}</svg>'
    )


def _rectangle(box: Sequence[float], style: str) -> str:
    x1, y1, x2, y2 = box
    return f'<rect x="{x1:.3f}" y="{y1:.3f}" width="{x2 - x1:.3f}" height="{y2 - y1:.3f}" {style}/>'


def _numbers(answer: Any) -> tuple[float, float, float, float] | None:
    """The box an answer is, read as numbers so that no text of a model reaches the page unescaped."""
    if not isinstance(answer, str) or not (answer.startswith("[") and answer.endswith("]")):
        return None
    try:
        x1, y1, x2, y2 = map(float, answer[1:-1].split(","))
    except ValueError:
        return None
    finite = all(abs(side) < 1e7 for side in (x1, y1, x2, y2))  # false for nan and inf too
    return (x1, y1, x2, y2) if finite and x1 < x2 and y1 < y2 else None
