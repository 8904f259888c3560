"""What a run writes down while it goes: progress, metrics, sample groups, checkpoints, and the sinks that show them."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ttrl.answers import Answered, to_json
from ttrl.checkpoint import CheckpointStore
from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.book import EvaluationBook
from ttrl.evaluate.evaluator import Evaluation
from ttrl.evaluate.luck import LuckMeter
from ttrl.metrics import MetricSet, require_finite
from ttrl.protocols import Stateful, Trainer
from ttrl.rundir import ANSWERS, CHECKPOINTS, EVAL, EVENTS, GROUPS, LUCK, METRICS, MODEL, RunDir
from ttrl.seeds import generator
from ttrl.sinks import Sink
from ttrl.stepmetrics import share_histogram
from ttrl.types import Scored, StepStats


@dataclass(slots=True)
class Progress:
    """Everything a run remembers besides the weights. JSON-able, part of every checkpoint."""

    step: int = 0
    """steps completed"""
    empty_steps: int = 0
    rollout_tokens: int = 0
    train_tokens: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    """prompt id -> its label at the last visit that had one"""
    drawn: dict[str, int] = field(default_factory=dict)
    """prompt id -> steps that drew votes on it"""
    trained: dict[str, int] = field(default_factory=dict)
    """prompt id -> steps whose update it took part in"""
    seconds: float = 0.0
    """of completed steps, over all parts of a resumed run"""

    def flips(self, scored: Sequence[Scored]) -> list[bool]:
        """For every prompt that had a label before and has one now: did it change?"""
        return [
            self.labels[s.group.prompt.id] != s.label
            for s in scored
            if s.label is not None and s.group.prompt.id in self.labels
        ]

    def advance(
        self, scored: Sequence[Scored], stats: StepStats | None, seconds: float, admitted: Sequence[Scored] = ()
    ) -> None:
        """One step is complete; `admitted` are the groups that were trained on."""
        self.seconds += seconds
        self.step += 1
        self.empty_steps = 0 if stats is not None else self.empty_steps + 1
        self.rollout_tokens += sum(r.drawn for s in scored for r in (*s.group.rollouts, *s.group.probes))
        self.train_tokens += stats.tokens if stats is not None else 0
        for counts, items in ((self.drawn, scored), (self.trained, admitted)):
            for item in items:
                counts[item.group.prompt.id] = counts.get(item.group.prompt.id, 0) + 1
        self.labels.update((s.group.prompt.id, s.label) for s in scored if s.label is not None)

    def coverage(self, ids: Sequence[str]) -> dict[str, dict[str, int]]:
        """How often these prompts were drawn and trained on: for each the number of steps -> the number of prompts.

        Golden: of a, b, c only a was drawn, twice, and trained on once -> drawn {0: 2, 2: 1}, trained {0: 2, 1: 1}
        """
        return {
            name: {str(steps): n for steps, n in sorted(Counter(counts.get(i, 0) for i in ids).items())}
            for name, counts in (("drawn", self.drawn), ("trained", self.trained))
        }

    def to_json(self) -> dict[str, Any]:
        return dict(_PROGRESS.dump_python(self, mode="json"))

    @staticmethod
    def from_json(value: dict[str, Any]) -> Progress:
        return _PROGRESS.validate_python(value)


_PROGRESS = TypeAdapter(Progress)


class StepClock:
    """Seconds per phase of one step."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._started


class Journal:
    """Writes the run directory and feeds the sinks."""

    def __init__(self, recipe: Recipe, run: RunDir, sinks: Sequence[Sink], luck: LuckMeter | None = None) -> None:
        self._recipe, self._run, self._sinks, self._luck = recipe, run, sinks, luck
        self.book = EvaluationBook()
        self._store = CheckpointStore(run.path / CHECKPOINTS, recipe.checkpoint.keep)

    def step(
        self, step: int, metrics: MetricSet, stats: StepStats | None, clock: StepClock, scored: Sequence[Scored],
        events: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """One object in metrics.jsonl and luck.jsonl, some groups in groups.jsonl.

        Raises FloatingPointError for a number that is not finite.
        """
        values = metrics.values()
        if stats is not None:
            values |= {
                "train/grad_norm": stats.grad_norm,
                "train/lr": stats.lr,
                "train/updates": stats.updates,
                "train/tokens": stats.tokens,
            }
            values |= stats.metrics
        require_finite(values, f"step {step}")
        timed = {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        timed |= {
            "time/step": clock.total(),
            "time/rollout_tokens_per_second": values["rollout/tokens"]
            / max(clock.seconds.get("sampling", clock.seconds["rollout"]), 1e-9),
        }
        record: dict[str, Any] = {
            "step": step,
            **dict(sorted(values.items())),
            "reward/share_histogram": share_histogram(scored),
            **({EVENTS: list(events)} if events else {}),
        }
        self._run.append(METRICS, {**record, **{name: round(value, 6) for name, value in timed.items()}})
        lucky = self._luck(step, scored) if self._luck is not None else None
        if lucky is not None:
            self._run.append(LUCK, lucky)
        chosen = generator(self._recipe.seed, "shown", step).permutation(len(scored))[
            : self._recipe.log.groups_per_step
        ]
        for index in sorted(int(i) for i in chosen):
            self._run.append(GROUPS, group_record(step, scored[index]))
        for sink in self._sinks:
            sink.step(step, {**values, **timed})
        for event in events:
            self.note(step, event)

    def note(self, step: int, text: str) -> None:
        """Show what a guard says; events of a step are in metrics.jsonl too."""
        for sink in self._sinks:
            sink.note(step, text)

    def evaluation(self, evaluation: Evaluation) -> None:
        """One object in eval.jsonl."""
        self.book.record(evaluation)
        self._run.append(EVAL, evaluation.record())
        for sink in self._sinks:
            sink.evaluation(evaluation)

    @property
    def damaged(self) -> Sequence[str]:
        """Names of the checkpoints that `resume` could not use."""
        return tuple(self._store.passed_over)

    def answers(self, answered: Sequence[Answered]) -> None:
        """One object per prompt in answers.jsonl."""
        for one in answered:
            self._run.append(ANSWERS, to_json(one))

    def judged(self, evaluations: Sequence[Evaluation]) -> None:
        """Evaluations made from answers.jsonl. They replace those of an earlier part of the run in eval.jsonl."""
        splits = {evaluation.split for evaluation in evaluations}
        kept = [record for record in self._run.lines(EVAL) if record["split"] not in splits]
        self._run.write_lines(EVAL, [*kept, *(evaluation.record() for evaluation in evaluations)])
        for evaluation in evaluations:
            self.book.record(evaluation)
            for sink in self._sinks:
                sink.evaluation(evaluation)

    def scratch(self, name: str) -> Path:
        """An empty folder of that name in the run folder, where ranks on other machines can write too."""
        folder = self._run.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell the sinks what takes time now."""
        for sink in self._sinks:
            sink.phase(name)
        yield

    def checkpoint(self, trainer: Trainer, memory: Mapping[str, Stateful], progress: Progress) -> Path:
        """Weights, optimizer, what each part remembers under its name, progress and evaluations; atomic."""

        def write(folder: Path) -> None:
            trainer.save(folder)
            self.book.save(folder)

        self._run.sync()
        state = {"progress": progress.to_json(), "memory": remember(memory)}
        return self._store.save(progress.step, state, write)

    def resume(self, trainer: Trainer, memory: Mapping[str, Stateful]) -> Progress:
        """Load the newest undamaged checkpoint and cut the logs back to it; without any checkpoint start from the beginning.

        Raises ConfigError when there are checkpoints and all of them are damaged, or hold the memory of other parts.
        """
        if self._store.is_empty():
            self._run.cut_back(-1)
            return Progress()
        folder, state = self._store.latest()
        held = state["memory"]
        if held.keys() != memory.keys():
            raise ConfigError(
                f"{folder}: holds what {sorted(held) or 'nobody'} remembered, but this recipe needs it of "
                f"{sorted(memory) or 'nobody'}; was it written by another version of ttrl? Start again with another --output"
            )
        trainer.load(folder)
        self.book.load(folder)
        recall(memory, held)
        self._run.cut_back(int(state["step"]))
        return Progress.from_json(state["progress"])

    def export(self, trainer: Trainer) -> None:
        """model/, loadable with transformers; complete or not there."""
        part, final = self._run.path / f".{MODEL}.part", self._run.path / MODEL
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        trainer.export(part)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)


def remember(memory: Mapping[str, Stateful]) -> dict[str, dict[str, Any]]:
    """What each part remembers now. A copy: what the parts do next does not change it."""
    return {name: copy.deepcopy(dict(part.state())) for name, part in memory.items()}


def recall(memory: Mapping[str, Stateful], held: Mapping[str, Mapping[str, Any]]) -> None:
    """Every part continues from what `remember` returned."""
    for name, part in memory.items():
        part.load_state(held[name])


def group_record(step: int, scored: Scored) -> dict[str, Any]:
    """One object of groups.jsonl, for people to read."""
    size, images = scored.group.prompt.meta.get("image_size"), scored.group.prompt.images
    return {
        "step": step,
        **({} if size is None else {"screen": list(size)}),
        "prompt_id": scored.group.prompt.id,
        "prompt": scored.group.prompt.text,
        **({"images": [asdict(image) for image in images]} if images else {}),
        "label": scored.label,
        "share": round(scored.share, 4),
        "margin": round(scored.margin, 4),
        "trace": list(scored.trace),
        "rollouts": [
            {
                "text": rollout.text,
                "answer": scored.answers[i],
                "class": int(scored.classes[i]),
                "reward": float(scored.rewards[i]),
                "trained": bool(scored.train[i]),
                "finish": rollout.finish.value,
                "tokens": len(rollout.token_ids),
                "mean_logprob": round(float(np.mean(rollout.logprobs)), 4) if len(rollout.logprobs) else None,
                **({} if rollout.fork is None else {"fork": [rollout.fork.parent, rollout.fork.at]}),
            }
            for i, rollout in enumerate(scored.group.rollouts)
        ],
    }
