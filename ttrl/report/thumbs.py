"""Small copies of the pictures of prompts, so that a report shows what was asked and still is one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttrl.errors import ConfigError
from ttrl.pictures import open_image
from ttrl.types import ImageFile

LONGEST_SIDE = 360
"""Pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumb:
    """A picture of groups.jsonl."""

    name: str
    data: str | None
    """As a data URL; None when the file is no longer there, or no longer the one that was shown to the model."""


def thumbs(group: Mapping[str, Any]) -> Sequence[Thumb]:
    """Of the prompt of a group. They are drawn from pixels, so nothing of the file itself gets into the page."""
    return [_thumb(ImageFile(path=one["path"], digest=one["digest"])) for one in group.get("images", ())]


def _thumb(image: ImageFile) -> Thumb:
    name = Path(image.path).name
    try:
        pixels = open_image(image)
    except ConfigError:
        return Thumb(name=name, data=None)
    pixels.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    stream = io.BytesIO()
    pixels.save(stream, "PNG")
    return Thumb(name=name, data="data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())
