"""How the scripts of this folder write prompt files with their labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_pair(folder: Path, name: str, rows: Iterable[tuple[Mapping[str, Any], str]]) -> None:
    """``NAME.prompts.jsonl`` and ``NAME.labels.jsonl``. A row is the columns of a prompt, ``id`` among them, and its answer."""
    prompts = labels = ""
    for columns, answer in rows:
        prompts += json.dumps(columns) + "\n"
        labels += json.dumps({"id": columns["id"], "answer": answer}) + "\n"
    (folder / f"{name}.prompts.jsonl").write_text(prompts)
    (folder / f"{name}.labels.jsonl").write_text(labels)


def write_sums(folder: Path, name: str, pairs: Iterable[tuple[int, int]]) -> None:
    """Additions of two numbers, the second with three digits, under the ids NAME-000, NAME-001, ..."""
    rows = (({"id": f"{name}-{i:03d}", "prompt": f"{a}+{b:03d}="}, str(a + b)) for i, (a, b) in enumerate(pairs))
    write_pair(folder, name, rows)
