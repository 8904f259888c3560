"""Checkpoints: written to the side, checksummed, renamed into place. A damaged one is noticed and the one before it used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ttrl.errors import ConfigError

log = logging.getLogger(__name__)

STATE, SUMS, LATEST = "state.json", "sums.json", "LATEST"


class CheckpointStore:
    """Folder `checkpoints/` of a run: step-NNNNNN/ and LATEST. Contents are safetensors and JSON only."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """`write` fills a fresh folder; `state` becomes state.json. Older checkpoints beyond `keep` are removed afterwards."""
        final = self._folder / f"step-{step:06d}"
        if damage(final) is None and json.loads((final / STATE).read_text(encoding="utf-8")) == {"step": step, **state}:
            return final  # the same checkpoint again; there must be no moment without it
        for left in self._folder.glob(".step-*.part"):
            shutil.rmtree(left)
        temporary = self._folder / f".step-{step:06d}.part"
        temporary.mkdir(parents=True)
        write(temporary)
        (temporary / STATE).write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
        (temporary / SUMS).write_text(
            json.dumps({f.name: _sha256(f) for f in sorted(temporary.iterdir())}) + "\n", encoding="utf-8"
        )
        for file in temporary.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(self._folder)
        latest = self._folder / f".{LATEST}.part"
        latest.write_text(final.name + "\n", encoding="utf-8")
        os.replace(latest, self._folder / LATEST)
        held = self._all()
        end = held.index(final) + 1
        # Later ones are damaged leftovers of before a resume; counting them would push out what is still good.
        for other in held[: max(0, end - self._keep)] + held[end:]:
            shutil.rmtree(other)
        return final

    def latest(self) -> tuple[Path, dict[str, Any]]:
        """The newest undamaged checkpoint and its state. Raises ConfigError when there is none."""
        for folder in reversed(self._all()):
            problem = damage(folder)
            if problem is None:
                return folder, json.loads((folder / STATE).read_text(encoding="utf-8"))
            log.warning("checkpoint %s is damaged (%s); trying the one before it", folder.name, problem)
        raise ConfigError(
            f"{self._folder}: holds no usable checkpoint to resume from; start again with another --output"
        )

    def is_empty(self) -> bool:
        """No checkpoint was ever completed."""
        return not self._all()

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"), key=lambda folder: (len(folder.name), folder.name))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        bad = [name for name, digest in sums.items() if _sha256(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return f"checksum of {', '.join(bad)}" if bad else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
