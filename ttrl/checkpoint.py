"""Checkpoints: written to the side, checksummed, renamed into place. A damaged one is noticed and the one before it used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ttrl.errors import ConfigError
from ttrl.files import sync, write_file

log = logging.getLogger(__name__)

STATE, SUMS, LATEST = "state.json", "sums.json", "LATEST"


class CheckpointStore:
    """Folder `checkpoints/` of a run: step-NNNNNN/ and LATEST. Contents are safetensors and JSON only."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self.passed_over: list[str] = []
        """Names of the damaged checkpoints that `latest` did not return."""

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """`write` fills a fresh folder; `state` becomes state.json. Older checkpoints beyond `keep` are removed afterwards.

        When writing fails (OSError: the disk is full) what was written is removed, and the checkpoints before it are as they were.
        """
        final = self._folder / f"step-{step:06d}"
        if damage(final) is None and json.loads((final / STATE).read_text(encoding="utf-8")) == {"step": step, **state}:
            return final  # the same checkpoint again; there must be no moment without it
        for left in self._folder.glob(".step-*.part"):
            shutil.rmtree(left)
        temporary = self._folder / f".step-{step:06d}.part"
        temporary.mkdir(parents=True)
        try:
            _fill(temporary, {"step": step, **state}, write)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            error.add_note(f"checkpoint {final.name} could not be written; those before it are intact")
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync(self._folder)
        write_file(self._folder / LATEST, final.name + "\n")
        held = self._all()
        end = held.index(final) + 1
        # Later ones are damaged leftovers of before a resume; counting them would push out what is still good.
        for other in held[: max(0, end - self._keep)] + held[end:]:
            shutil.rmtree(other)
        return final

    def latest(self) -> tuple[Path, dict[str, Any]]:
        """The newest undamaged checkpoint and its state. Raises ConfigError when there is none."""
        self.passed_over = []
        for folder in reversed(self._all()):
            problem = damage(folder)
            if problem is None:
                return folder, json.loads((folder / STATE).read_text(encoding="utf-8"))
            self.passed_over.append(folder.name)
            log.warning("checkpoint %s is damaged (%s); trying the one before it", folder.name, problem)
        raise ConfigError(
            f"{self._folder}: holds no usable checkpoint to resume from; start again with another --output"
        )

    def is_empty(self) -> bool:
        """No checkpoint was ever completed."""
        return not self._all()

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"), key=lambda folder: (len(folder.name), folder.name))


def _fill(folder: Path, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """All files of a checkpoint, with their sums, on the disk."""
    try:
        write(folder)
    except SafetensorError as error:  # it hides the number of the error in its text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    (folder / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    (folder / SUMS).write_text(json.dumps(sums) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        bad = [name for name, digest in sums.items() if _sha256(folder / name) != digest]
        bad += [STATE] if STATE not in sums else []
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return f"checksum of {', '.join(bad)}" if bad else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
