"""The run directory: one place that knows its file names and writes them."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ttrl.errors import ConfigError
from ttrl.files import no_links, sync, write_file

log = logging.getLogger(__name__)

RECIPE, METRICS, EVAL, GROUPS = "recipe.yaml", "metrics.jsonl", "eval.jsonl", "groups.jsonl"
ANSWERS, LUCK = "answers.jsonl", "luck.jsonl"
LEDGER, SUMMARY, REPORT, CHECKPOINTS, MODEL = "ledger.jsonl", "summary.json", "report.html", "checkpoints", "model"
LOCK, TENSORBOARD, EVALUATIONS = ".lock", "tensorboard", "evaluations.json"
WRITTEN = (RECIPE, METRICS, EVAL, GROUPS, ANSWERS, LUCK, LEDGER, EVALUATIONS, SUMMARY, REPORT, CHECKPOINTS, MODEL)
EVENTS = "guard/events"
"""Key in metrics.jsonl: what guards said of a step, in words."""
STEPPED = (METRICS, EVAL, GROUPS, ANSWERS, LUCK)
"""Files with one object per step, cut back to the checkpoint when a run is resumed."""


class RunDir:
    """`RunDir.create` for a new run, `RunDir.existing` to resume or to read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Raises ConfigError when the folder already holds a run or cannot be made."""
        check_unused(path)
        try:
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output {path}: cannot be created: {error.strerror}") from None
        return cls(path)

    @classmethod
    def existing(cls, path: Path) -> RunDir:
        """Raises ConfigError when there is no run, or a part of it is a link to somewhere else."""
        if not (path / RECIPE).is_file() or not (path / CHECKPOINTS).is_dir():
            raise ConfigError(f"{path}: holds no run (a run has {RECIPE} and {CHECKPOINTS}/)")
        _check_links(path)
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder while training. Raises ConfigError when another process does."""
        with open(self.path / LOCK, "w", opener=no_links) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"output {self.path}: another process is running there") from None
            yield

    def append(self, file: str, record: Mapping[str, Any]) -> None:
        """Add one object to a JSONL file and flush it, so that a reader never sees half a line for long."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with open(self.path / file, "a", encoding="utf-8", opener=no_links) as stream:
            stream.write(line)

    def write_lines(self, file: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace a JSONL file."""
        self.write(file, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records))

    def write(self, file: str, text: str) -> None:
        """Replace a file; readers see the old or the new one, never a part."""
        write_file(self.path / file, text)

    def write_json(self, file: str, value: Mapping[str, Any]) -> None:
        self.write(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def lines(self, file: str) -> Iterator[dict[str, Any]]:
        """Objects of a JSONL file; nothing when it does not exist. A torn last line, left by a kill, is skipped."""
        path = self.path / file
        if not path.is_file():
            return
        # Bytes: a torn line may end inside a character, and str.splitlines would also split at U+2028 within model text
        for line in path.read_bytes().split(b"\n"):
            try:
                yield json.loads(line)
            except ValueError:
                return

    def sync(self) -> None:
        """Wait until the logs are on the disk: a checkpoint must not outlive, in a power cut, the lines of its steps."""
        for file in STEPPED:
            if (self.path / file).exists():
                sync(self.path / file)

    def summary(self) -> dict[str, Any]:
        """The content of summary.json; empty before the run ended."""
        path = self.path / SUMMARY
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def cut_back(self, step: int) -> None:
        """Forget lines of steps >= `step`; evaluations after step `step` go too. Used by resume."""
        for file in STEPPED:
            limit = step + 1 if file == EVAL else step
            kept = [record for record in self.lines(file) if record["step"] < limit]
            if file == METRICS and len(kept) < step:
                log.warning(
                    "%s: has %d lines for %d steps; something else changed it", self.path / file, len(kept), step
                )
            if kept or (self.path / file).is_file():
                self.write_lines(file, kept)


def check_unused(path: Path) -> None:
    """Raises ConfigError when `path` already holds a run, or is not a folder."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output {path}: is a file, not a folder")
    _check_links(path)
    taken = [name for name in WRITTEN if os.path.lexists(path / name)]
    if taken == [CHECKPOINTS] and (path / CHECKPOINTS).is_dir() and not any((path / CHECKPOINTS).iterdir()):
        return  # a run that was killed before it had written anything
    if taken:
        raise ConfigError(
            f"output {path}: already holds a run, or what a run would overwrite ({', '.join(taken)}); "
            "continue a run with --resume, or choose another folder with --output"
        )


def _check_links(path: Path) -> None:
    """Raises ConfigError when something a run writes is a symbolic link. The folder itself may be one: it was named."""
    links = [name for name in (*WRITTEN, LOCK, TENSORBOARD) if (path / name).is_symlink()]
    if links:
        raise ConfigError(
            f"output {path}: {', '.join(links)} is a symbolic link, and a run writes only inside its own folder; remove the link, "
            "or make the folder itself one"
        )
