r"""Write ``recipes/data/stream.prompts.jsonl`` and its labels: 200 additions for the bundled tiny model, with a shift in the middle.

The first hundred sums carry in no column, the second hundred in every column but the last. The model forgets one carry in five, so
the shift makes the task much harder. All pairs are from the side of the split that the model was not trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from build_tiny_model import draw_pair
from prompt_files import write_sums

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "data"
HALF = 100
SEED = 20


def carries(a: int, b: int) -> list[bool]:
    """Whether the columns of ones and tens carry, with the carry of the column before."""
    ones = a % 10 + b % 10 >= 10
    return [ones, a // 10 % 10 + b // 10 % 10 + ones >= 10]


def pairs(rng: random.Random, wanted: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """HALF different pairs, in the order drawn."""
    found: dict[tuple[int, int], None] = {}
    while len(found) < HALF:
        pair = draw_pair(rng, reserved=True)
        if wanted(*pair):
            found[pair] = None
    return list(found)


def main() -> None:
    """Both files, easy pairs first."""
    rng = random.Random(SEED)
    easy = pairs(rng, lambda a, b: not any(carries(a, b)) and a // 100 + b // 100 < 10)
    hard = pairs(rng, lambda a, b: all(carries(a, b)))
    write_sums(FOLDER, "stream", [*easy, *hard])


if __name__ == "__main__":
    main()
