"""One training run from checked recipe to report: `summary.json` and `report.html` are written however it ends."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ttrl.answers import from_json
from ttrl.config import Recipe, load_recipe, recipe_to_yaml
from ttrl.errors import ConfigError, GuardStop, StopRequested
from ttrl.evaluate.book import EvaluationBook
from ttrl.evaluate.evaluator import Evaluation, change
from ttrl.evaluate.judge import Judge
from ttrl.evaluate.ledger import ledger, totals
from ttrl.journal import Journal, Progress
from ttrl.loop import train
from ttrl.modes import Mode
from ttrl.report import write_report
from ttrl.room import check_memory
from ttrl.rundir import ANSWERS, LEDGER, METRICS, RECIPE, SUMMARY, RunDir, check_unused
from ttrl.setup import Checked, Parts, assemble, check_recipe
from ttrl.sinks import open_sinks
from ttrl.stamp import differences, from_comments, stamp, to_comments
from ttrl.stopping import StopSwitch

RSS_PER_MB = 1024 if sys.platform != "darwin" else 2**20
COMPLETED, STOPPED, FAILED = "completed", "stopped", "failed"
NO_WORD = "nothing was heard of its end: it is still running, or it was killed"
"""What summary.json says until the end is known: no process can write down that it was killed, or that Ray ended it."""


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    status: str = FAILED
    reason: str = ""
    guard: bool = False
    """stopped by a guard, not by the user"""
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0
    """of the steps that earlier parts of a resumed run completed"""

    def seconds(self) -> float:
        """Of the whole run so far."""
        return self.seconds_before + time.monotonic() - self.started


def run(recipe: Recipe, *, resume: bool, console: Console) -> Outcome:
    """Train, evaluate, export, report. Raises ConfigError before anything is written when the recipe cannot run."""
    folder = Path(recipe.output)
    directory = _resumable(recipe, folder) if resume else None
    if directory is None:
        check_unused(folder)
    checked = check_recipe(recipe)
    check_memory(recipe)
    stamped = stamp(recipe, checked.records)
    if directory is not None:
        _same_inputs(directory, stamped)
    message = f"{recipe.name}: {len(checked.records)} prompts, {recipe.steps} steps, output {folder}"
    console.print(message, highlight=False, markup=False)
    with StopSwitch() as switch:
        parts = assemble(checked, switch.check)
        with closing(parts):
            if directory is None:
                directory = RunDir.create(folder)
                directory.write(RECIPE, to_comments(stamped) + recipe_to_yaml(recipe))
            with directory.locked():
                return _run(checked, parts, directory, resume=resume, console=console)


def _run(checked: Checked, parts: Parts, directory: RunDir, *, resume: bool, console: Console) -> Outcome:
    recipe = checked.recipe
    outcome, progress = Outcome(), Progress()
    directory.write_json(SUMMARY, {"status": FAILED, "reason": NO_WORD, "name": recipe.name})
    with _journal(checked, directory, console) as journal:
        try:
            if resume:
                progress = journal.resume(parts.trainer, parts.memory)
                outcome.seconds_before = progress.seconds
                parts.link.sync(None)
                console.print(f"resuming after step {progress.step}")
            loop = parts.source.run if isinstance(parts.source, Mode) else train
            loop(parts, journal, progress)
            journal.export(parts.trainer)
            outcome.status = COMPLETED
        except (StopRequested, GuardStop) as stop:
            journal.checkpoint(parts.trainer, parts.memory, progress)
            journal.export(parts.trainer)
            outcome.status, outcome.reason, outcome.guard = STOPPED, str(stop), isinstance(stop, GuardStop)
        finally:
            error = sys.exc_info()[1]
            if error is not None:
                outcome.reason = f"{type(error).__name__}: {error}"
            prequential = _judge(checked, directory, journal, progress)
            _conclude(checked, directory, progress, journal.book, outcome, prequential)
    return outcome


@contextmanager
def _journal(checked: Checked, directory: RunDir, console: Console) -> Iterator[Journal]:
    start = sum(1 for _ in directory.lines(METRICS))
    recipe = checked.recipe
    sinks = open_sinks(recipe, directory.path, console, start, _total(checked))
    try:
        yield Journal(recipe, directory, sinks)
    finally:
        for sink in sinks:
            sink.close()


def _total(checked: Checked) -> int:
    """Steps of the loop, which a mode may count otherwise than the recipe."""
    return checked.source.total(checked.recipe) if isinstance(checked.source, Mode) else checked.recipe.steps


def _judge(checked: Checked, directory: RunDir, journal: Journal, progress: Progress) -> dict[str, Any] | None:
    """What the answers of a mode are worth. Returns the part of the summary that only a stream has."""
    answered = [from_json(record) for record in directory.lines(ANSWERS)]
    if not isinstance(checked.source, Mode) or not answered:
        return None
    judge = Judge.of(checked.recipe, checked.reader)
    paired = judge.paired(answered, progress.step)
    if paired:
        journal.judged(paired)
        return None
    found = judge.prequential(answered, progress.step)
    journal.judged([found["all"]])
    return {name: {"prompts": len(found[name].results), **(_estimates(found[name]) or {})} for name in found}


def _conclude(
    checked: Checked, directory: RunDir, progress: Progress, book: EvaluationBook, outcome: Outcome,
    prequential: dict[str, Any] | None,
) -> None:  # fmt: skip
    """ledger.jsonl, summary.json, report.html."""
    recipe = checked.recipe
    before, after = book.before("adapted"), book.after("adapted")
    entries = ledger(before, after) if before is not None and after is not None else []
    directory.write_lines(LEDGER, [entry.record() for entry in entries])
    summary = {
        "status": outcome.status,
        "reason": outcome.reason,
        "name": recipe.name,
        "steps": progress.step,
        "total_steps": _total(checked),
        "labels_in_training": checked.labels_in_training,
        **_comparison(book, "adapted", recipe.seed),
        "ledger": totals(entries) if entries else None,
        "heldout": _comparison(book, "heldout", recipe.seed) if recipe.eval.heldout is not None else None,
        "prequential": prequential,
        "tokens": {"rollout": progress.rollout_tokens, "train": progress.train_tokens},
        "seconds": round(outcome.seconds(), 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_PER_MB),
    }
    directory.write_json(SUMMARY, summary)
    write_report(directory)


def _comparison(book: EvaluationBook, split: str, seed: int) -> dict[str, Any]:
    """initial and final estimates, the paired change, and after how many steps each was measured."""
    before, after = book.before(split), book.after(split)
    changes = None
    if before is not None and after is not None:
        found = {name: change(before, after, name, seed) for name in before.estimates}
        changes = {name: asdict(difference) for name, difference in found.items() if difference is not None}
    return {
        "initial": _estimates(before),
        "final": _estimates(after),
        "change": changes,
        "measured_after_steps": [evaluation.step for evaluation in (before, after) if evaluation is not None],
    }


def _estimates(evaluation: Evaluation | None) -> dict[str, Any] | None:
    return None if evaluation is None else {name: asdict(estimate) for name, estimate in evaluation.estimates.items()}


def _same_inputs(directory: RunDir, stamped: dict[str, str]) -> None:
    """Raises ConfigError when prompts or plug-in files changed since the run was started."""
    changed = differences(from_comments((directory.path / RECIPE).read_text(encoding="utf-8")), stamped)
    if changed:
        raise ConfigError("cannot resume, the inputs of the run have changed:\n" + "\n".join(changed))


def _resumable(recipe: Recipe, folder: Path) -> RunDir:
    """The run to continue. Raises ConfigError when the recipe differs from the one it was started with."""
    directory = RunDir.existing(folder)
    old = load_recipe(folder / RECIPE)
    # More steps would change the learning-rate schedule of the steps already taken, so it counts as another recipe
    differing = _differences(old.model_dump(by_alias=True), recipe.model_dump(by_alias=True), ())
    allowed: tuple[str, ...] = ("checkpoint.keep", "log.", "output", "description", "cluster.")
    if not recipe.rollout.ahead:  # sampling ahead waits at checkpoints, so there they are part of what is computed
        allowed += ("checkpoint.",)
    refused = [line for key, line in differing if not key.startswith(allowed)]
    if refused:
        raise ConfigError(
            "cannot resume with another recipe:\n"
            + "\n".join(refused)
            + "\nundo these changes, or start a new run with another --output"
        )
    return directory


def _differences(old: Any, new: Any, path: Sequence[str]) -> list[tuple[str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [found for key in keys for found in _differences(old.get(key), new.get(key), (*path, str(key)))]
    dotted = ".".join(path)
    return [] if old == new else [(dotted, f"  {dotted}: was {old!r}, is {new!r}")]
