"""Running what is missing: one subprocess with one thread per run, and one line of results.jsonl when it has ended."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit.tasks import Entry, Task
from ttrl.cli import EXIT_GUARD
from ttrl.errors import ConfigError
from ttrl.run import COMPLETED, FAILED, STOPPED
from ttrl.rundir import CHECKPOINTS, MODEL, RECIPE, RunDir

RESULTS = "results.jsonl"
ENDINGS = {0: COMPLETED, EXIT_GUARD: STOPPED}
"""Exit status of a run that need not be run again; any other is a failure, Ctrl-C included."""
TAIL = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run that is wanted."""

    task: Task
    entry: Entry
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.entry.name}-{self.seed}"

    @property
    def settings(self) -> tuple[str, ...]:
        """Recipe and changes, as `ttrl train` takes them."""
        return (self.entry.recipe, *self.entry.changes, *self.task.changes, f"seed={self.seed}")

    def folder(self, output: Path) -> Path:
        plain = re.sub(r"[^a-z0-9]+", "-", self.entry.name.lower())
        return output / self.task.name / f"{plain}-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A line of results.jsonl."""

    run: str
    settings: tuple[str, ...]
    status: str
    """completed | stopped | failed"""
    reason: str
    seconds: float
    """wall clock of the run without the start of its process; 0 when it failed"""


def jobs(tasks: Sequence[Task], seeds: Sequence[int], only: Sequence[str] = ()) -> list[Job]:
    """All runs, seed by seed, so that what is there when time is over has every row. `only`: names of tasks or TASK/ROW.

    Raises ConfigError for a name that is neither.
    """
    known = {t.name for t in tasks} | {f"{t.name}/{e.name}" for t in tasks for e in t.entries}
    if unknown := set(only) - known:
        raise ConfigError(
            f"--only {', '.join(sorted(unknown))}: not a task or TASK/ROW; there are {', '.join(sorted(known))}"
        )
    return [
        Job(task=task, entry=entry, seed=seed)
        for seed in seeds for task in tasks for entry in task.entries
        if not only or task.name in only or f"{task.name}/{entry.name}" in only
    ]  # fmt: skip


def results(output: Path) -> dict[str, Result]:
    """Run -> how it ended; empty before there is a file."""
    return {
        line["run"]: Result(**line | {"settings": tuple(line["settings"])}) for line in RunDir(output).lines(RESULTS)
    }


def missing(wanted: Sequence[Job], output: Path) -> list[Job]:
    """What has not ended yet: never run, interrupted or failed.

    Raises ConfigError when a run stands there under other settings: its numbers would be taken for those of these.
    """
    done = results(output)
    for job in wanted:
        if job.name in done and done[job.name].settings != job.settings:
            changed = sorted(set(done[job.name].settings) ^ set(job.settings))
            raise ConfigError(
                f"{output}: {job.name} was run with other settings ({', '.join(changed)}); "
                "choose another --output, or delete that folder"
            )
    return [job for job in wanted if job.name not in done or done[job.name].status == FAILED]


def train(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit status and the last words of one `ttrl train`, in a process with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    call = [sys.executable, "-m", "ttrl.cli", "train", *arguments, "--output", str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, errors="replace", env=environment)
    return done.returncode, " ".join((done.stderr or done.stdout).split())[-TAIL:]


def run_one(job: Job, output: Path, trainer: Callable[[Sequence[str], Path], tuple[int, str]] = train) -> Result:
    """Run it, note how it ended, and drop its weights: the numbers are what the lab keeps."""
    folder = job.folder(output)
    if (folder / RECIPE).exists() or (folder / CHECKPOINTS).exists():
        shutil.rmtree(folder)  # of a run of ours that was interrupted or failed
    folder.parent.mkdir(parents=True, exist_ok=True)
    code, words = trainer(job.settings, folder)
    status = ENDINGS.get(code, FAILED)
    if status == FAILED:
        return Result(
            run=job.name, settings=job.settings, status=status, reason=f"exit status {code}: {words}", seconds=0.0
        )
    for heavy in (CHECKPOINTS, MODEL):
        shutil.rmtree(folder / heavy, ignore_errors=True)
    summary = RunDir(folder).summary()
    return Result(
        run=job.name, settings=job.settings, status=status, reason=summary["reason"], seconds=summary["seconds"]
    )


def run_all(todo: Sequence[Job], output: Path, workers: int = 1,
            trainer: Callable[[Sequence[str], Path], tuple[int, str]] = train) -> Iterator[Result]:  # fmt: skip
    """Each result as it comes, already written to results.jsonl, where the newest result of a run replaces older ones."""
    output.mkdir(parents=True, exist_ok=True)
    known = results(output)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = [pool.submit(run_one, job, output, trainer) for job in todo]
        try:
            for future in as_completed(waiting):
                result = future.result()
                known[result.run] = result
                RunDir(output).write_lines(RESULTS, map(asdict, known.values()))
                yield result
        finally:
            for future in waiting:
                future.cancel()
