"""What a run was made of besides its recipe: versions, commit, and hashes of prompts and plug-in files.

Written as comments at the head of recipe.yaml, shown in the report, and compared when a run is resumed.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ttrl.config.schema import Recipe
from ttrl.doctor import versions
from ttrl.prompts import PromptRecord
from ttrl.templates import NAMES, describe

_IN_FILE = re.compile(r"\.py:[A-Za-z_]\w*$")


def stamp(recipe: Recipe, records: Iterable[PromptRecord]) -> dict[str, str]:
    """name -> what it was, in the order to show. `commit` is there only in a checkout."""
    found = versions()
    commit = _commit()
    if commit is not None:
        found["commit"] = commit
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.id, [(m.role, m.content) for m in record.messages])).encode())
        if record.images:
            digest.update(repr([image.digest for image in record.images]).encode())
        if record.meta:
            digest.update(repr(sorted(record.meta.items())).encode())
    found["prompts"] = f"sha256 {digest.hexdigest()[:16]}"
    if recipe.data.template not in NAMES:
        found["template"] = describe(recipe.data.template)
    files = plugin_files(recipe)
    for file in files:
        alone = sum(other.name == file.name for other in files) == 1
        found[f"plug-in {file.name if alone else file}"] = (
            f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
        )
    return found


def plugin_files(recipe: Recipe) -> list[Path]:
    """Every file of the user's that the recipe makes run, wherever in the recipe it is named."""
    named = {Path(use.rpartition(":")[0]) for use in _strings(recipe.model_dump(mode="json")) if _IN_FILE.search(use)}
    return sorted(file for file in named if file.is_file())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def to_comments(found: Mapping[str, str]) -> str:
    """One `# name: value` line each."""
    return "".join(f"# {name}: {value}\n" for name, value in found.items())


def from_comments(text: str) -> dict[str, str]:
    """What `to_comments` wrote at the head of a recipe."""
    return dict(re.findall(r"^# ([^:\n]+): (.*)$", text, flags=re.MULTILINE))


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Prompts, template and plug-in files that are not what they were, in words."""
    keys = [key for key in {**old, **new} if key in ("prompts", "template") or key.startswith("plug-in ")]
    return [f"  {key}: was {old.get(key)}, is {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
