"""Healthy states on disk, in `checkpoints/healthy/`: written like checkpoints, but kept by what guards and checkpoints refer to."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttrl.checkpoint import STATE, CheckpointStore, damage
from ttrl.guards.base import Score

log = logging.getLogger(__name__)

HEALTHY = "healthy"
TOLERANCE = 0.02
"""Differences of scores that do not matter, however small their errors are."""
CLEARLY = 2.0
"""Standard errors of a difference of scores; the best of many noisy scores is too high by about as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state that was judged healthy. JSON-able."""

    step: int
    """steps that were complete: its weights drew the groups of this step"""
    weights: int
    """which weights these are: two snapshots with one number hold the same"""
    lr_factor: float
    score: Score | None
    """None when no prompt had come a second time"""


class SnapshotStore:
    """At most two snapshots of a run, and what the checkpoints on disk still need to be resumed from."""

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints, self._folder = checkpoints, checkpoints / HEALTHY
        self._store = CheckpointStore(self._folder, keep=1_000_000)  # `collect` is what removes

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Atomic and checksummed."""
        self._store.save(step, state, write)

    def open(self, snapshot: Snapshot) -> tuple[Path, dict[str, Any]] | None:
        """Its folder and state; None, with a warning, when it is damaged."""
        folder = self._path(snapshot.step)
        problem = damage(folder)
        if problem is not None:
            log.warning("healthy snapshot %s is damaged (%s)", folder.name, problem)
            return None
        return folder, json.loads((folder / STATE).read_text(encoding="utf-8"))

    def collect(self, wanted: Iterable[Snapshot]) -> None:
        """Remove what neither `wanted` names nor any checkpoint on disk refers to."""
        steps = {snapshot.step for snapshot in wanted}
        for file in self._checkpoints.glob(f"step-*/{STATE}"):
            steps |= set(json.loads(file.read_text(encoding="utf-8"))["memory"].get("guards", {}).get("needs", ()))
        self._remove(lambda step: step not in steps)

    def forget_from(self, step: int) -> None:
        """Remove snapshots of steps >= `step`, leftovers of before a resume."""
        self._remove(lambda other: other >= step)

    def _remove(self, unwanted: Callable[[int], bool]) -> None:
        for folder in self._folder.glob("step-*"):
            if unwanted(int(folder.name.removeprefix("step-"))):
                shutil.rmtree(folder)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"


def pick(candidates: Sequence[Snapshot]) -> Snapshot:
    """The last one whose score is not clearly below the best; a state without a score has nothing against it.

    Clearly: by more than CLEARLY standard errors of the difference, and by more than TOLERANCE. So noise in the scores costs no
    training, and a state that lost answers of the start model is not taken because it is new.
    """
    scores = {c.step: c.score for c in candidates if c.score is not None}
    if not scores:
        return max(candidates, key=lambda c: c.step)
    best = max(scores.values(), key=lambda score: score.value)

    def is_fit(candidate: Snapshot) -> bool:
        if candidate.score is None:
            return True
        error = math.hypot(candidate.score.error, best.error)
        return best.value - candidate.score.value <= max(TOLERANCE, CLEARLY * error)

    return max((c for c in candidates if is_fit(c)), key=lambda c: c.step)
