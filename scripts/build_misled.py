r"""Write ``recipes/data/misled.prompts.jsonl`` and its labels: additions whose vote misleads the bundled tiny model.

The second number begins with a zero (``390+085=``). The model was trained on numbers from 100 to 999 and has never seen a zero in
that place, so for most of these sums its most frequent answer is a wrong one. The rule knows no label: pairs are drawn by seed,
none is picked.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "data"
PROMPTS = 48
SEED = 30


def main() -> None:
    """Both files."""
    rng = random.Random(SEED)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < PROMPTS:
        pairs[rng.randint(100, 999), rng.randint(10, 99)] = None
    prompts = labels = ""
    for i, (a, b) in enumerate(pairs):
        prompts += json.dumps({"id": f"misled-{i:03d}", "prompt": f"{a}+{b:03d}="}) + "\n"
        labels += json.dumps({"id": f"misled-{i:03d}", "answer": str(a + b)}) + "\n"
    (FOLDER / "misled.prompts.jsonl").write_text(prompts)
    (FOLDER / "misled.labels.jsonl").write_text(labels)


if __name__ == "__main__":
    main()
