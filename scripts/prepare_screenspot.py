"""ScreenSpot as ttrl reads it: prompts without answers in one file, boxes in pixels in another.

    python scripts/prepare_screenspot.py screenspot.jsonl FOLDER [--images DIR]

A row has `image` (file name), `instruction`, `bbox` [x1,y1,x2,y2] as fractions of the sides, `data_type` (text | icon), `data_source`,
and `image_size` [width, height]; without the last one the image is opened (needs Pillow and --images). An `id` is optional.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROMPT = (
    "The screenshot is {width} x {height} pixels. Which element does this instruction mean?\n{instruction}\n"
    "Answer with its box in pixels: [x1, y1, x2, y2]"
)
"""One wording for training and evaluation: two wordings make two tasks."""


def convert(row: Mapping[str, Any], number: int, images: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The prompt and the label of one row. Raises ValueError that says what is wrong with it."""
    missing = [key for key in ("image", "instruction", "bbox", "data_type", "data_source") if key not in row]
    if missing:
        raise ValueError(f"row {number} has no {', '.join(missing)}")
    width, height = size(row, number, images)
    box = [float(side) for side in row["bbox"]]
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"row {number}: bbox must be x1 < x2, y1 < y2 as fractions of the sides, it is {row['bbox']}")
    corners = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    identifier = str(row.get("id", f"{number:05d}"))
    prompt = {
        "id": identifier,
        "prompt": PROMPT.format(width=width, height=height, instruction=row["instruction"]),
        "image": str(row["image"]),
        "image_size": [width, height],
        "data_source": str(row["data_source"]),
        "data_type": str(row["data_type"]),
    }
    return prompt, {"id": identifier, "answer": "[" + ",".join(f"{side:.3f}" for side in corners) + "]"}


def size(row: Mapping[str, Any], number: int, images: Path | None) -> tuple[int, int]:
    """Width and height in pixels, as the row says or as the image is."""
    if "image_size" in row:
        width, height = row["image_size"]
        return int(width), int(height)
    if images is None:
        raise ValueError(f"row {number} has no image_size; give --images, so that the image can be looked at")
    from PIL import Image

    with Image.open(images / row["image"]) as image:
        return image.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path)
    arguments = parser.parse_args()
    text = arguments.rows.read_text(encoding="utf-8")
    rows = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    )
    try:
        pairs = [convert(row, number, arguments.images) for number, row in enumerate(rows)]
    except (ValueError, OSError) as error:
        sys.exit(f"{arguments.rows}: {error}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("prompts", 0), ("labels", 1)):
        lines = "".join(json.dumps(pair[part], ensure_ascii=False) + "\n" for pair in pairs)
        (arguments.folder / f"screenspot.{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(pairs)} prompts in {arguments.folder}")


if __name__ == "__main__":
    main()
