"""The page as text. Every sentence about an outcome is computed from the numbers."""

from __future__ import annotations

import html
import os
import platform
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from labkit.claims import claim_sentence, direction, final_sentence
from labkit.numbers import Row, interval, rows
from labkit.runs import Job, Result, results
from labkit.tasks import Task
from ttrl.run import COMPLETED, FAILED
from ttrl.sinks import show

HEAD = (
    "recipe", "seeds", "pass@1 before -> after", "change", "change of each seed", "maj@16", "pass@16", "tokens, thousands",
    "learned / sharpened / corrupted", "alarms",
)  # fmt: skip
WIDTH = 132
PROSE = """wrote this page, every number and every verdict in it, from {made_of}. Do not edit it: edit `scripts/labkit/tasks.py` and run
the command. Other measurements (the quickstart, a real model, speed) are in [measurements](measurements.md).

**What is compared.** Per task all rows have the same start model, prompts, steps, votes per prompt, sampling and evaluation: 16 samples
of each adapted prompt at temperature 1, before and after. Runs that were not made and measured alike are refused. `control:` rows
are no methods; `control: gold` sees the labels. This is a tiny model on tiny tasks: it shows what a method does, not how much it is
worth on a large one.

**Intervals** are 95 % percentile intervals of means over prompts and seeds, paired by prompt and seed; prompts and seeds are both
drawn anew and crossed (pigeonhole bootstrap, 10,000 draws). All rows of a seed are evaluated with the same random numbers, which keeps
differences small where models are alike.{few} An interval that excludes 0 by little may be chance: this page has dozens of them.

**Claims** are what a paper promises or a control is for. *Shown*: the interval excludes 0 on the claimed side. *Cannot be told*: it
holds 0, so more runs might show it or its opposite.

**Columns.** maj@16 is the vote of 16 samples, pass@16 the chance that one of 16 is right, both before -> after. Tokens are those
sampled by training, per run. Learned / sharpened / corrupted count prompts, summed over seeds ([evaluation](evaluation.md)), in
brackets how many of them all to expect if nothing had changed. Alarms: steps with an alarm of a guard, per seed."""
ELSEWHERE = """Tokens and labels of trees: [ETTRL](methods/ettrl.md). Regret of MRT: [MRT](methods/mrt.md). Streams and per-prompt
adaptation: [modes](modes.md). Guards on healthy runs: [guards](guards.md)."""
FEW = 10
"""Below this number of seeds the page says that they are few."""


def page(wanted: Sequence[Job], output: Path, command: str, sections: Path) -> str:
    """The whole page; `sections` is a folder of pages (*.md, may be absent) that are appended.

    Raises ConfigError when runs of one task were not made and measured alike.
    """
    known = results(output)
    parts = [_header([known[job.name] for job in wanted if job.name in known], wanted, command)]
    for task in dict.fromkeys(job.task for job in wanted):
        parts.append(_task(task, rows([job for job in wanted if job.task == task], output)))
    parts.append(_appendix(sections))
    return "\n".join(parts)


def _header(made: Sequence[Result], wanted: Sequence[Job], command: str) -> str:
    seconds = [result.seconds for result in made if result.status != FAILED]
    seeds = len({job.seed for job in wanted})
    few = f" With {seeds} per row, what differs between seeds is hardly covered." if seeds < FEW else ""
    taken = f"; a run took {statistics.median(seconds):.0f} s (median, other work on the machine)" if seconds else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    where = f"{machine}, Python {sys.version.split()[0]}, {packages}"
    made_of = f"{len(seconds)} of {len(wanted)} runs, each in a process with one thread ({where}{taken})"
    body = PROSE.format(made_of=made_of, few=few)
    return f"# Results of the lab\n\n    {command}\n\n" + "\n\n".join(map(_wrapped, body.split("\n\n"))) + "\n"


def _wrapped(text: str, indent: str = "") -> str:
    """A paragraph, its white space as it comes, in lines of WIDTH."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _task(task: Task, found: Sequence[Row]) -> str:
    settings = " ".join(change for change in task.changes)
    lines = [f"## {task.title}\n", _wrapped(task.about) + "\n", _wrapped(f"Task `{task.name}`: `{settings}`") + "\n"]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cells) + " |" for cells in map(_cells, found)]
    lines += ["", *_line_to_beat(found)]
    lines += [line for row in found for line in _sentences(row, found)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    marked = row.entry.name + (" (**labels in training**)" if _saw_labels(row) else "")
    count = str(len(row.ended)) + (f" ({len(row.failed)} failed)" if row.failed else "")
    if not row.ended:
        return (marked, count, "failed" if row.failed else "not run", *("-" for _ in HEAD[3:]))
    change = interval(row.change("pass@1"))
    assert change is not None
    each = " ".join(f"{value:+.3f}" for value in row.change("pass@1").mean(axis=1))
    verdicts, chance = row.verdicts()
    alarms = [one.alarms for one in row.ended]
    return (
        marked, count, _both(row, "pass@1"), show(change, sign=True), each, _both(row, "maj@16"), _both(row, "pass@16"),
        f"{statistics.mean(one.tokens for one in row.ended) / 1000:.1f}",
        f"{verdicts['learned']} / {verdicts['sharpened']} / {verdicts['corrupted']} ({chance:.1f})",
        "-" if None in alarms else ", ".join(map(str, alarms)),
    )  # fmt: skip


def _both(row: Row, metric: str) -> str:
    return f"{row.values(metric, before=True).mean():.3f} -> {row.values(metric).mean():.3f}"


def _saw_labels(row: Row) -> bool:
    return any(one.run.summary["labels_in_training"] for one in row.ended)


def _line_to_beat(found: Sequence[Row]) -> Iterator[str]:
    """Which rows end with single samples better than the vote of the start model, which costs no training."""
    ended = [row for row in found if row.ended]
    if not ended:
        return
    line = ended[0].values("maj@16", before=True).mean()
    over = {row.entry.name: interval(row.values("pass@1") - row.values("maj@16", before=True)) for row in ended}
    beaten = [f"`{name}`" for name, margin in over.items() if direction(margin) > 0]
    names = ", ".join(beaten) if beaten else "no row"
    first = [result for one in ended[0].ended for result in one.before.results]
    right = sum(result.majority_correct for result in first)
    said = f"The start majority of 16 is right for {right} of {len(first)} prompts (summed over seeds). The line to beat is the vote "
    said += f"of the start model, maj@16 {line:.3f}, which costs no training. Final pass@1 is above it (interval) for: {names}."
    yield _wrapped(said) + "\n"


def _sentences(row: Row, found: Sequence[Row]) -> Iterator[str]:
    """One paragraph per row: where it comes from, its change, its claims, and how it ends against the first row."""
    settings = " ".join((row.entry.recipe, *row.entry.changes))
    said = [f"- **{row.entry.name}** (`{settings}`)"]
    if row.ended:
        said[0] += f": {final_sentence(row)}"
        said += [claim_sentence(claim, row, found) for claim in row.entry.claims]
        first = ("pass@1", found[0].entry.name)
        if row is not found[0] and first not in [(claim.metric, claim.against) for claim in row.entry.claims]:
            said.append(claim_sentence(None, row, found))
        stopped = [one.run.summary for one in row.ended if one.run.summary["status"] != COMPLETED]
        if stopped:
            after = ", ".join(str(summary["steps"]) for summary in stopped)
            said.append(f"{len(stopped)} of {len(row.ended)} runs were stopped, after {after} steps.")
    else:
        said[0] += ": no run has ended."
    for result in row.failed:
        said.append(f"{result.run} failed: {html.escape(result.reason, quote=False)}")
    yield _wrapped(" ".join(said), "  ")


def _appendix(sections: Path) -> str:
    """Pages of other measurements; their links are relative to their own folder."""
    files = sorted(sections.glob("*.md")) if sections.is_dir() else []
    bodies = [file.read_text(encoding="utf-8").strip().replace("](../", "](") + "\n" for file in files]
    return "\n".join([*bodies, "## What is measured elsewhere\n", _wrapped(ELSEWHERE) + "\n"])
