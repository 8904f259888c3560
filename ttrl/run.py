"""One training run from checked recipe to report: `summary.json` and `report.html` are written however it ends."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ttrl.config import Recipe, load_recipe, recipe_to_yaml
from ttrl.doctor import versions
from ttrl.errors import ConfigError, GuardStop, StopRequested
from ttrl.evaluate.evaluator import change
from ttrl.evaluate.ledger import ledger, totals
from ttrl.journal import Journal, Progress
from ttrl.loop import train
from ttrl.report import write_report
from ttrl.rundir import LEDGER, RECIPE, SUMMARY, RunDir, check_unused
from ttrl.setup import Checked, Parts, assemble, check_recipe
from ttrl.sinks import open_sinks
from ttrl.stopping import StopSwitch

COMPLETED, STOPPED, FAILED = "completed", "stopped", "failed"


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    status: str = FAILED
    reason: str = ""
    guard: bool = False
    """stopped by a guard, not by the user"""
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0
    """of earlier parts of a resumed run"""


def run(recipe: Recipe, *, resume: bool, console: Console) -> Outcome:
    """Train, evaluate, export, report. Raises ConfigError before anything is written when the recipe cannot run."""
    folder = Path(recipe.output)
    directory = _resumable(recipe, folder) if resume else None
    if directory is None:
        check_unused(folder)
    checked = check_recipe(recipe)
    console.print(
        f"[bold]{recipe.name}[/bold]: {len(checked.records)} prompts, {recipe.steps} steps, output {folder}",
        highlight=False,
    )
    with StopSwitch() as switch:
        parts = assemble(checked, switch.check)
        directory = directory or RunDir.create(folder)
        return _run(checked, parts, directory, switch.check, resume=resume, console=console)


def _run(
    checked: Checked, parts: Parts, directory: RunDir, check_stop: Callable[[], None], *, resume: bool, console: Console
) -> Outcome:
    recipe = checked.recipe
    outcome, progress = Outcome(), Progress()
    with _sinks_closed(recipe, directory, console) as journal:
        if resume:
            progress = journal.resume(parts.trainer, parts.reward)
            outcome.seconds_before = float(directory.summary().get("seconds", 0.0))
            if progress.step:
                parts.pool.sync(parts.trainer.version, parts.trainer.weights(), must_move=False)
            console.print(f"resuming after step {progress.step}")
        else:
            header = "".join(f"# {name}: {version}\n" for name, version in versions().items())
            directory.write(RECIPE, header + recipe_to_yaml(recipe))
        try:
            check_stop()
            train(parts, journal, progress)
            outcome.status = COMPLETED
        except (StopRequested, GuardStop) as stop:
            outcome.status, outcome.reason, outcome.guard = STOPPED, str(stop), isinstance(stop, GuardStop)
            journal.checkpoint(parts.trainer, parts.reward, progress)
        finally:
            error = sys.exc_info()[1]
            if error is not None:
                outcome.reason = f"{type(error).__name__}: {error}"
            if outcome.status != FAILED:
                journal.export(parts.trainer)
            _conclude(checked, directory, progress, outcome)
    return outcome


@contextmanager
def _sinks_closed(recipe: Recipe, directory: RunDir, console: Console) -> Iterator[Journal]:
    start = sum(1 for _ in directory.lines("metrics.jsonl"))
    sinks = open_sinks(recipe, directory.path, console, start)
    try:
        yield Journal(recipe, directory, sinks)
    finally:
        for sink in sinks:
            sink.close()


def _conclude(checked: Checked, directory: RunDir, progress: Progress, outcome: Outcome) -> None:
    """ledger.jsonl, summary.json, report.html."""
    recipe = checked.recipe
    pair = progress.first_and_last("adapted")
    entries = ledger(*pair) if pair is not None and pair[1] is not None else []  # type: ignore[arg-type]
    directory.write_lines(LEDGER, [entry.record() for entry in entries])
    summary: dict[str, Any] = {
        "status": outcome.status,
        "reason": outcome.reason,
        "name": recipe.name,
        "steps": progress.step,
        "labels_in_training": checked.labels_in_training,
        "initial": _estimates(progress, "adapted", 0),
        "final": _estimates(progress, "adapted", 1),
        "change": _changes(progress, "adapted", recipe.seed),
        "ledger": totals(entries) if entries else None,
        "heldout": None,
        "tokens": {"rollout": progress.rollout_tokens, "train": progress.train_tokens},
        "seconds": round(outcome.seconds_before + time.monotonic() - outcome.started, 1),
        "peak_memory_mb": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
        ),
    }
    if progress.first_and_last("heldout") is not None:
        summary["heldout"] = {
            "initial": _estimates(progress, "heldout", 0),
            "final": _estimates(progress, "heldout", 1),
            "change": _changes(progress, "heldout", recipe.seed),
        }
    directory.write_json(SUMMARY, summary)
    write_report(directory)


def _estimates(progress: Progress, split: str, which: int) -> dict[str, Any] | None:
    pair = progress.first_and_last(split)
    evaluation = pair[which] if pair is not None else None
    return None if evaluation is None else {name: asdict(estimate) for name, estimate in evaluation.estimates.items()}


def _changes(progress: Progress, split: str, seed: int) -> dict[str, Any] | None:
    pair = progress.first_and_last(split)
    if pair is None or pair[1] is None:
        return None
    first, last = pair[0], pair[1]
    return {
        name: asdict(difference)
        for name in first.estimates
        if (difference := change(first, last, name, seed)) is not None
    }


def _resumable(recipe: Recipe, folder: Path) -> RunDir:
    """The run to continue. Raises ConfigError when the recipe differs from the one it was started with."""
    directory = RunDir.existing(folder)
    old = load_recipe(folder / RECIPE)
    # More steps would change the learning-rate schedule of the steps already taken, so it counts as another recipe
    differing = _differences(old.model_dump(by_alias=True), recipe.model_dump(by_alias=True), ())
    allowed = ("checkpoint.", "log.", "output", "description")
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
