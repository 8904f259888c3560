"""`ttrl compare`: runs side by side, if and only if they were measured under one protocol on the same prompts."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttrl.config import Recipe, load_recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.book import EvaluationBook
from ttrl.evaluate.digest import entries
from ttrl.evaluate.evaluator import Estimate, Evaluation, change
from ttrl.evaluate.ledger import Verdict, by_chance, shares, totals
from ttrl.rundir import EVALUATIONS, RECIPE, SUMMARY
from ttrl.sinks import show

if TYPE_CHECKING:
    from rich.table import Table

SPLITS = {"adapted": "adapted prompts", "heldout": "held-out prompts"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run folder, as far as a comparison needs it."""

    name: str
    recipe: Recipe
    summary: Mapping[str, Any]
    book: EvaluationBook

    def evaluations(self, split: str) -> Iterator[Evaluation]:
        return (e for e in (self.book.before(split), self.book.after(split)) if e is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """One table: a title, the names of the columns, rows of text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `ttrl compare` prints."""

    sheets: tuple[Sheet, ...]
    notes: tuple[str, ...]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Raises ConfigError for folders that hold no run with an end, and for runs that cannot be compared."""
    if len(folders) < 2:
        raise ConfigError("ttrl compare needs at least two run folders")
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    shared = [split for split in SPLITS if all(run.book.before(split) is not None for run in runs)]
    if "adapted" not in shared:
        missing = [run.name for run in runs if run.book.before("adapted") is None]
        raise ConfigError(f"{', '.join(missing)}: has no evaluation to compare; it ended before the first one")
    check_protocols(runs, shared)
    sheets = [_measures(runs, split) for split in shared]
    return Comparison(sheets=(*sheets, _costs(runs), _ledgers(runs)), notes=tuple(_notes(runs, shared)))


def to_tables(comparison: Comparison) -> list[Table]:
    """For the console."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for sheet in comparison.sheets:
        table = Table(title=sheet.title, title_justify="left")
        for name in sheet.head:
            table.add_column(Text(name), overflow="fold")
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        tables.append(table)
    return tables


def to_markdown(comparison: Comparison) -> str:
    """The same tables and notes; text of the runs is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(html.escape(c, quote=False).replace("|", "\\|") for c in cells) + " |\n"

    text = ""
    for sheet in comparison.sheets:
        text += f"## {sheet.title}\n\n" + line(sheet.head) + "|" + "---|" * len(sheet.head) + "\n"
        text += "".join(map(line, sheet.rows)) + "\n"
    return text + "".join(f"- {html.escape(note, quote=False)}\n" for note in comparison.notes)


def read_run(folder: Path, name: str) -> Run:
    """A run that has ended. Raises ConfigError when the folder holds none, or one that cannot be read."""
    for file in (RECIPE, SUMMARY, EVALUATIONS):
        if not (folder / file).is_file():
            raise ConfigError(f"{folder}: holds no run that has ended (no {file})")
    book = EvaluationBook()
    try:
        book.load(folder)
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        tokens = {kind: int(summary["tokens"][kind]) for kind in ("rollout", "train")}
        summary = {key: summary[key] for key in ("status", "steps", "seconds", "labels_in_training")} | {
            "tokens": tokens
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: its {SUMMARY} or {EVALUATIONS} cannot be read: {error}") from None
    return Run(name=name, recipe=load_recipe(folder / RECIPE), summary=summary, book=book)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole path where that is not enough."""
    short = [folder.resolve().name for folder in folders]
    found = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    if len(set(found)) < len(found):
        raise ConfigError("ttrl compare: one folder is named twice")
    return ["".join(c if c.isprintable() else "?" for c in name) for name in found]


def check_protocols(runs: Sequence[Run], splits: Sequence[str]) -> None:
    """Raises ConfigError, with every field that differs, unless all runs were measured alike on these splits."""
    problems = []
    for split in splits:
        wanted = next(runs[0].evaluations(split)).protocol
        for run in runs:
            for evaluation in run.evaluations(split):
                own, first = asdict(evaluation.protocol), asdict(wanted)
                lines = [
                    f"  {split}.{k}: {runs[0].name} {first[k]!r}, {run.name} {own[k]!r}"
                    for k in own
                    if own[k] != first[k]
                ]
                problems += [line for line in lines if line not in problems]
    if problems:
        raise ConfigError(
            "these runs cannot be compared, they were not measured alike:\n"
            + "\n".join(problems)
            + "\nmeasure both models with `ttrl eval` under one protocol, or run again"
        )


def _measures(runs: Sequence[Run], split: str) -> Sheet:
    """Per run: start, final and paired change; then final against the final of the first run, paired by prompt."""
    start = next(runs[0].evaluations(split))
    metrics = [name for name in start.estimates if name not in ("answered", "length")]
    rows = []
    for index, run in enumerate(runs):
        before, after = run.book.before(split), run.book.after(split)
        assert before is not None
        rows.append((run.name, "start", *(_cell(before.estimates.get(m)) for m in metrics)))
        if after is None:
            rows.append((run.name, "final", *("not measured" for _ in metrics)))
            continue
        rows.append((run.name, f"after {after.step} steps", *(_cell(after.estimates.get(m)) for m in metrics)))
        rows.append((run.name, "change", *(_cell(change(before, after, m, 0), sign=True) for m in metrics)))
        first = runs[0].book.after(split)
        if index and first is not None:
            other = _in_order_of(after, first)
            against = (_cell(change(first, other, m, 0), sign=True) for m in metrics)
            rows.append((run.name, f"minus {runs[0].name}", *against))
    title = f"{SPLITS[split]} ({start.protocol.prompts} prompts, {start.protocol.samples} samples, 95 % intervals)"
    return Sheet(title=title, head=("run", "", *metrics), rows=tuple(rows))


def _in_order_of(evaluation: Evaluation, other: Evaluation) -> Evaluation:
    """The prompts are the same, but their order in the files need not be."""
    place = {result.id: index for index, result in enumerate(evaluation.results)}
    order = [place[result.id] for result in other.results]
    numbers = {name: tuple(values[i] for i in order) for name, values in evaluation.per_prompt.items()}
    return replace(evaluation, results=tuple(evaluation.results[i] for i in order), per_prompt=numbers)


def _costs(runs: Sequence[Run]) -> Sheet:
    rows = []
    for run in runs:
        s = run.summary
        counts = (f"{s['tokens'][kind]:,}" for kind in ("rollout", "train"))
        rows.append((run.name, str(s["status"]), str(s["steps"]), *counts, f"{float(s['seconds']):.0f}"))
    return Sheet(
        title="cost", head=("run", "status", "steps", "tokens sampled", "tokens trained", "seconds"), rows=tuple(rows)
    )


def _ledgers(runs: Sequence[Run]) -> Sheet:
    rows = []
    for run in runs:
        found = entries(run.book, "adapted")
        if not found:
            rows.append((run.name, *("not measured" for _ in Verdict), ""))
            continue
        counted, parts = totals(found), shares(found)
        rows.append(
            (run.name, *(f"{counted[v.value]} = {show(parts[v.value])}" for v in Verdict), f"{by_chance(found):.1f}")
        )
    head = ("run", *(v.value for v in Verdict), "expected by chance")
    return Sheet(title="what happened to the adapted prompts (count = share)", head=head, rows=tuple(rows))


def _notes(runs: Sequence[Run], shared: Sequence[str]) -> Iterator[str]:
    models = {run.recipe.model.path for run in runs}
    if len(models) > 1:
        yield f"the runs start from {len(models)} different models"
    for run in runs:
        if run.summary["labels_in_training"]:
            yield f"{run.name}: LABELS IN TRAINING, an upper bound and not a label-free run"
        if run.summary["status"] != "completed":
            yield f"{run.name}: {run.summary['status']} after {run.summary['steps']} of {run.recipe.steps} steps"
    for split in SPLITS:
        with_it = [run.name for run in runs if run.book.before(split) is not None]
        if split not in shared and with_it:
            yield f"{SPLITS[split]}: measured for {', '.join(with_it)} only"
    yield "the line to beat is maj@k at the start: the vote of the start model costs no training"


def _cell(estimate: Estimate | None, *, sign: bool = False) -> str:
    return "not measured" if estimate is None else show(estimate, sign=sign)
