"""One training run from checked recipe to report: `summary.json` and `report.html` are written however it ends."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ttrl.answers import from_json
from ttrl.config import Recipe, recipe_to_yaml
from ttrl.errors import GuardStop, StopRequested
from ttrl.evaluate.book import EvaluationBook
from ttrl.evaluate.digest import digest, entries, estimates, line_to_beat
from ttrl.evaluate.judge import Judge
from ttrl.evaluate.luck import summarise
from ttrl.evaluate.seal import label_files, sealed
from ttrl.failures import describe
from ttrl.guards import Keeper
from ttrl.journal import Journal, Progress
from ttrl.loop import conclude, train
from ttrl.modes import Mode
from ttrl.parts import Parts, assemble
from ttrl.protocols import Source
from ttrl.report import write_report
from ttrl.resume import continuation, note_resume, same_inputs
from ttrl.room import check_memory
from ttrl.rundir import ANSWERS, EVALUATIONS, LEDGER, LUCK, METRICS, RECIPE, SUMMARY, RunDir, check_unused
from ttrl.setup import Checked, check_recipe
from ttrl.sinks import open_sinks, show_line
from ttrl.stamp import stamp, to_comments
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
    line: str = ""
    """the line to beat, in words; empty without labels"""
    signal: int = 0
    """number of the signal that asked the run to stop"""
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0
    """of the steps that earlier parts of a resumed run completed"""

    def seconds(self) -> float:
        """Of the whole run so far."""
        return self.seconds_before + time.monotonic() - self.started


def run(recipe: Recipe, *, resume: bool, console: Console) -> Outcome:
    """Train, evaluate, export, report. Raises ConfigError before anything is written when the recipe cannot run."""
    with sealed(label_files(recipe)):
        return _start(recipe, resume=resume, console=console)


def _start(recipe: Recipe, *, resume: bool, console: Console) -> Outcome:
    folder = Path(recipe.output)
    directory, changes = continuation(recipe, folder) if resume else (None, ())
    if directory is None:
        check_unused(folder)
    checked = check_recipe(recipe)
    check_memory(recipe)
    stamped = stamp(recipe, checked.records)
    if directory is not None:
        changes = [*changes, *same_inputs(directory, stamped)]
    message = f"{recipe.name}: {len(checked.records)} prompts, {recipe.steps} steps, output {folder}"
    console.print(message, highlight=False, markup=False)
    with StopSwitch() as switch:
        parts = assemble(checked, switch.check)
        with closing(parts):
            if directory is None:
                directory = RunDir.create(folder)
                directory.write(RECIPE, to_comments(stamped) + recipe_to_yaml(recipe))
            with directory.locked():
                return _run(checked, parts, directory, console, resume=resume, changes=changes)


def _run(
    checked: Checked, parts: Parts, directory: RunDir, console: Console, *, resume: bool, changes: Sequence[str]
) -> Outcome:
    recipe = checked.recipe
    outcome, progress = Outcome(), Progress()
    directory.write_json(SUMMARY, {"status": FAILED, "reason": NO_WORD, "name": recipe.name})
    with _journal(parts, directory, console) as journal:
        try:
            if resume:
                progress = journal.resume(parts.trainer, parts.memory)
                parts.guards.forget_from(progress.step)
                outcome.seconds_before = progress.seconds
                parts.link.sync(None)
                found = [f"{name} was damaged and not used" for name in journal.damaged] + list(changes)
                note_resume(directory, progress.step, found)
                for line in [f"resuming after step {progress.step}", *found]:
                    console.print(line, highlight=False, markup=False)
            loop = parts.source.run if isinstance(parts.source, Mode) else train
            loop(parts, journal, progress)
            journal.export(parts.trainer)
            outcome.status = COMPLETED
        except (StopRequested, GuardStop) as stop:
            if isinstance(stop, GuardStop):
                conclude(parts, journal, progress, str(stop))
            journal.checkpoint(parts.trainer, parts.memory, progress)
            parts.guards.settle(
                progress.step
            )  # a checkpoint goes on where the run was, the model is what can be trusted
            journal.export(parts.trainer)
            outcome.status, outcome.reason, outcome.guard = STOPPED, str(stop), isinstance(stop, GuardStop)
            outcome.signal = stop.signal if isinstance(stop, StopRequested) else 0
        finally:
            error = sys.exc_info()[1]
            if error is not None:
                outcome.reason = describe(error)
            try:
                prequential = _judge(checked, directory, journal, progress)
                _conclude(checked, directory, progress, journal.book, outcome, parts.guards, prequential)
            except OSError as second:  # of a full disk the first error tells more
                if error is None:
                    raise
                error.add_note(f"nor could the end of the run be written down: {second}")
    return outcome


@contextmanager
def _journal(parts: Parts, directory: RunDir, console: Console) -> Iterator[Journal]:
    recipe, source = parts.recipe, parts.source
    start = sum(1 for _ in directory.lines(METRICS))
    sinks = open_sinks(recipe, directory.path, console, start, _total(recipe, source))
    try:
        yield Journal(recipe, directory, sinks, parts.luck)
    finally:
        for sink in sinks:
            sink.close()


def _total(recipe: Recipe, source: Source) -> int:
    """Steps of the loop, which a mode may count otherwise than the recipe."""
    return source.total(recipe) if isinstance(source, Mode) else recipe.steps


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
    return {name: {"prompts": len(found[name].results), **(estimates(found[name]) or {})} for name in found}


def _conclude(
    checked: Checked, directory: RunDir, progress: Progress, book: EvaluationBook, outcome: Outcome, guards: Keeper,
    prequential: dict[str, Any] | None,
) -> None:  # fmt: skip
    """ledger.jsonl, evaluations.json, summary.json, report.html."""
    recipe = checked.recipe
    directory.write_lines(LEDGER, [entry.record() for entry in entries(book, "adapted")])
    directory.write(EVALUATIONS, book.to_json())
    summary = {
        "status": outcome.status,
        "reason": outcome.reason,
        "name": recipe.name,
        "steps": progress.step,
        "total_steps": _total(recipe, checked.source),
        "labels_in_training": checked.labels_in_training,
        "guards": guards.summary(),
        **digest(book, "adapted", recipe.seed),
        "heldout": digest(book, "heldout", recipe.seed) if recipe.eval.heldout is not None else None,
        "prequential": prequential,
        "luck": summarise(list(directory.lines(LUCK))),
        "coverage": None if isinstance(checked.source, Mode) else progress.coverage([r.id for r in checked.records]),
        "tokens": {"rollout": progress.rollout_tokens, "train": progress.train_tokens},
        "seconds": round(outcome.seconds(), 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_PER_MB),
    }
    line = line_to_beat(book.before("adapted"), book.after("adapted"), recipe.seed)
    outcome.line = show_line(line) if line is not None else ""
    directory.write_json(SUMMARY, summary)
    write_report(directory)
