"""The evaluations of a run: first and latest per split. Kept beside the run's progress, never inside what training sees."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter

from ttrl.evaluate.evaluator import Evaluation

FILE = "evaluations.json"
_EVALUATIONS = TypeAdapter(list[Evaluation])


class EvaluationBook:
    """Remembers what before/after comparisons need, through checkpoints and resumes."""

    def __init__(self) -> None:
        self._kept: list[Evaluation] = []

    def record(self, evaluation: Evaluation) -> None:
        """Keep the first and the latest evaluation of a split."""
        same = [e for e in self._kept if e.split == evaluation.split]
        if len(same) > 1:
            self._kept.remove(same[-1])
        self._kept.append(evaluation)

    def has(self, split: str, step: int) -> bool:
        """Was this split evaluated after exactly this many steps?"""
        return any(e.split == split and e.step == step for e in self._kept)

    def before(self, split: str) -> Evaluation | None:
        """The first evaluation."""
        return next((e for e in self._kept if e.split == split), None)

    def after(self, split: str) -> Evaluation | None:
        """The latest evaluation, if there is one besides the first."""
        same = [e for e in self._kept if e.split == split]
        return same[-1] if len(same) > 1 else None

    def to_json(self) -> str:
        """All that is kept."""
        return _EVALUATIONS.dump_json(self._kept).decode() + "\n"

    def save(self, folder: Path) -> None:
        """Write evaluations.json."""
        (folder / FILE).write_text(self.to_json(), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ValueError when it is something else."""
        self._kept = _EVALUATIONS.validate_json((folder / FILE).read_bytes())
