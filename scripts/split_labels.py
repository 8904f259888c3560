"""A benchmark as ttrl wants it: prompts in one file, reference answers in another that only evaluation opens.

    python scripts/split_labels.py hub:HuggingFaceH4/aime_2024#train --prompt problem --answer answer --output recipes/data/aime24
    python scripts/split_labels.py my.parquet --prompt prompt --answer answer --output recipes/data/math500
    python scripts/split_labels.py gpqa.csv --prompt Question --output recipes/data/gpqa \
        --choices "Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3"

writes OUTPUT.prompts.jsonl ({id, prompt}) and OUTPUT.labels.jsonl ({id, answer}) in the order of the source. With --choices the first
column is the right answer; the choices of a question are shuffled by its number and lettered, and the label is a letter.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttrl.errors import ConfigError
from ttrl.prompts import read_rows
from ttrl.seeds import generator

LETTERS = "ABCDEFGHIJ"


def take(row: Mapping[str, Any], column: str, where: str) -> str:
    """A column as text. Raises ConfigError when it is missing or empty."""
    value = row.get(column)
    if value is None or not str(value).strip():
        raise ConfigError(f"{where}: no {column!r} (columns: {', '.join(row)})")
    return str(value).strip()


def lettered(question: str, choices: Sequence[str], number: int) -> tuple[str, str]:
    """The question with its choices in an order of its own, and the letter of the first choice given."""
    order = generator("choices", number).permutation(len(choices)).tolist()
    lines = [f"({LETTERS[place]}) {choices[i]}" for place, i in enumerate(order)]
    return "\n\n".join([question, "\n".join(lines)]), LETTERS[order.index(0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=".jsonl, .json, .csv, .parquet or hub:NAME[#SPLIT]")
    parser.add_argument("--prompt", required=True, help="column with the question")
    answer = parser.add_mutually_exclusive_group(required=True)
    answer.add_argument("--answer", help="column with the reference answer")
    answer.add_argument("--choices", help="comma-separated columns, the right one first")
    parser.add_argument("--output", required=True, type=Path, help="both files begin with this")
    args = parser.parse_args()
    prompts, labels = [], []
    try:
        for number, (where, row) in enumerate(read_rows(args.source)):
            identifier, question = f"{args.output.name}-{number:03d}", take(row, args.prompt, where)
            if args.choices:
                question, label = lettered(question, [take(row, c, where) for c in args.choices.split(",")], number)
            else:
                label = take(row, args.answer, where)
            prompts.append({"id": identifier, "prompt": question})
            labels.append({"id": identifier, "answer": label})
    except ConfigError as error:
        sys.exit(f"split_labels: {error}")
    for kind, rows in (("prompts", prompts), ("labels", labels)):
        file = args.output.with_name(f"{args.output.name}.{kind}.jsonl")
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        sys.stdout.write(f"{file}: {len(rows)} rows\n")


if __name__ == "__main__":
    main()
