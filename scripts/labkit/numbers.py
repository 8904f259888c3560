"""What the runs of a task came to: changes and differences paired by prompt, with intervals over prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.runs import Job, Result, results
from labkit.tasks import Entry
from ttrl.compare import Run, check_protocols, read_run
from ttrl.config import Recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.digest import entries as ledger_entries
from ttrl.evaluate.estimators import CONFIDENCE, RESAMPLES
from ttrl.evaluate.evaluator import Estimate, Evaluation
from ttrl.evaluate.ledger import by_chance, totals
from ttrl.run import FAILED
from ttrl.rundir import METRICS, RunDir

SPLIT = "adapted"
ALARM = 2.0
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One run with its numbers."""

    seed: int
    run: Run
    before: Evaluation
    after: Evaluation
    tokens: int
    """sampled by training, probes included, evaluations not"""
    alarms: int | None
    """steps with an alarm of a guard; None without guards"""
    rewards: tuple[float, float]
    """mean reward of the first and of the last step: what a run without labels sees of itself"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All runs of one entry."""

    entry: Entry
    ended: tuple[Ended, ...]
    failed: tuple[Result, ...]

    def values(self, metric: str, *, before: bool = False) -> Matrix:
        """[seeds, prompts], prompts in the order of their ids."""
        return np.asarray([_in_order(run.before if before else run.after, metric) for run in self.ended])

    def change(self, metric: str) -> Matrix:
        """[seeds, prompts]: after minus before."""
        return self.values(metric) - self.values(metric, before=True)

    def minus(self, other: Row, metric: str) -> Matrix:
        """[seeds, prompts]: final of this row minus final of another, for the seeds that both have."""
        seeds = [run.seed for run in other.ended]
        mine = [i for i, run in enumerate(self.ended) if run.seed in seeds]
        theirs = [seeds.index(self.ended[i].seed) for i in mine]
        return self.values(metric)[mine] - other.values(metric)[theirs] if mine else np.empty((0, 0))

    def verdicts(self) -> tuple[dict[str, int], float]:
        """Verdicts of the ledger, summed over seeds, and how many but `unchanged` to expect by chance."""
        found = [entry for one in self.ended for entry in ledger_entries(one.run.book, SPLIT)]
        return dict(totals(found)), by_chance(found)


def interval(values: Matrix, seed: int = 0) -> Estimate | None:
    """Mean of [seeds, prompts] and its 95 % percentile interval; None without numbers, no bounds for fewer than two prompts.

    Seeds and prompts are both drawn anew with replacement and crossed (the pigeonhole bootstrap, Owen 2007): all seeds share their
    prompts, so prompts within seeds must not be drawn as if they were independent. Few seeds say little about how seeds differ: with
    one this is the bootstrap over prompts.
    """
    if values.size == 0:
        return None
    mean = float(values.mean())
    seeds, prompts = values.shape
    if prompts < 2:
        return Estimate(value=mean, low=None, high=None)
    rng = np.random.Generator(np.random.Philox(key=seed))
    chosen = rng.integers(seeds, size=(RESAMPLES, seeds))
    places = rng.integers(prompts, size=(RESAMPLES, prompts))
    means = values[chosen[:, :, None], places[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=mean, low=float(low), high=float(high))


def rows(wanted: Sequence[Job], output: Path) -> list[Row]:
    """The rows of one task, in its order.

    Raises ConfigError when runs were not measured alike, or did not have the same steps, prompts, votes and start model.
    """
    known = results(output)
    found = []
    for entry in dict.fromkeys(job.entry for job in wanted):
        of_it = [(job, known[job.name]) for job in wanted if job.entry == entry and job.name in known]
        ended = tuple(_ended(job, output) for job, result in of_it if result.status != FAILED)
        failed = tuple(result for _, result in of_it if result.status == FAILED)
        found.append(Row(entry=entry, ended=ended, failed=failed))
    runs = [one.run for row in found for one in row.ended]
    if runs:
        check_protocols(runs, [SPLIT])
        _check_budgets(runs)
    return found


def _ended(job: Job, output: Path) -> Ended:
    folder = job.folder(output)
    run = read_run(folder, job.name)
    before, after = run.book.before(SPLIT), run.book.after(SPLIT)
    if before is None or after is None:
        raise ConfigError(
            f"{folder}: was not measured before and after training; delete its line in results.jsonl to run it again"
        )
    steps = list(RunDir(folder).lines(METRICS))
    probes = sum(int(step.get("rollout/probe_tokens", 0)) for step in steps)
    guarded = bool(run.recipe.guards)
    alarms = sum(step.get("guard/level") == ALARM for step in steps) if guarded else None
    tokens = run.summary["tokens"]["rollout"] + probes
    paid = [step["reward/mean"] for step in steps if "reward/mean" in step] or [float("nan")]
    return Ended(
        seed=job.seed, run=run, before=before, after=after, tokens=tokens, alarms=alarms, rewards=(paid[0], paid[-1])
    )


def budget(recipe: Recipe) -> dict[str, Any]:
    """What rows of one table must share besides the protocol of their evaluation."""
    return {
        "model.path": recipe.model.path, "steps": recipe.steps, "data.prompts": recipe.data.prompts,
        "data.limit": recipe.data.limit, "data.prompts_per_step": recipe.data.prompts_per_step,
        "rollout.votes_per_prompt": recipe.rollout.votes_per_prompt, "rollout.temperature": recipe.rollout.temperature,
        "rollout.max_new_tokens": recipe.rollout.max_new_tokens,
    }  # fmt: skip


def _check_budgets(runs: Sequence[Run]) -> None:
    first = budget(runs[0].recipe)
    problems = [
        f"  {key}: {runs[0].name} {first[key]!r}, {run.name} {value!r}"
        for run in runs for key, value in budget(run.recipe).items() if value != first[key]
    ]  # fmt: skip
    if problems:
        raise ConfigError(
            "these runs do not belong in one table, they were not trained under one protocol:\n" + "\n".join(problems)
            + "\nrun them again in another --output"
        )  # fmt: skip


def _in_order(evaluation: Evaluation, metric: str) -> list[float]:
    numbers = evaluation.per_prompt[metric]
    return [numbers[i] for i in sorted(range(len(numbers)), key=lambda i: evaluation.results[i].id)]
