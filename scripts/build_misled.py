r"""Write ``recipes/data/misled.prompts.jsonl`` and its labels: additions whose vote misleads the bundled tiny model.

The second number begins with a zero (``390+085=``). The model was trained on numbers from 100 to 999 and has never seen a zero in
that place, so for most of these sums its most frequent answer is a wrong one. The rule knows no label: pairs are drawn by seed,
none is picked.
"""

from __future__ import annotations

import random
from pathlib import Path

from prompt_files import write_sums

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "data"
PROMPTS = 48
SEED = 30


def main() -> None:
    """Both files."""
    rng = random.Random(SEED)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < PROMPTS:
        pairs[rng.randint(100, 999), rng.randint(10, 99)] = None
    write_sums(FOLDER, "misled", pairs)


if __name__ == "__main__":
    main()
