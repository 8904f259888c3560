"""Engines that misbehave on purpose, as a plug-in file, and recipes that use them. For tests of rollout workers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ttrl.config import Recipe, load_recipe
from ttrl.run import run

MOODY = '''
import os, random, signal, time
from pathlib import Path

from ttrl.errors import EngineError
from ttrl.rollout.hf import HFEngine


def moody(model, check_stop, *, mood="slow", when="generate", once=None, skip=0):
    """The engine of transformers that, at its `skip`-th call of `when`, does what `mood` says.

    once: a file that is created by the first worker that does it, so that no other one does.
    """
    if when == "start" and _first(once):
        _act(mood)
    return Moody(model, check_stop, mood, when, once, skip)


def _first(once):
    if once is None:
        return True
    try:
        Path(once).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _act(mood):
    print("last words of this worker", flush=True)
    if mood == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mood == "hang":
        time.sleep(600)
    if mood == "raise":
        raise EngineError("this engine is broken")
    if mood == "slow":
        time.sleep(random.random() / 4)  # of the process: another order of completion in every run


class Moody(HFEngine):
    def __init__(self, model, check_stop, mood, when, once, skip):
        super().__init__(model, check_stop, rows_at_once=128, shared_prefix=True)
        self._mood, self._when, self._once, self._skip = mood, when, once, skip

    def _call(self, what):
        if what == self._when:
            if self._skip > 0:
                self._skip -= 1
            elif _first(self._once):
                _act(self._mood)

    def generate(self, requests):
        self._call("generate")
        return super().generate(requests)

    def load(self, tensors, *, lasting=False):
        self._call("load")
        if self._mood == "frozen":
            for _ in self._intake.take(iter(tensors)):
                pass
            return
        super().load(tensors)

    def score(self, token_ids):
        self._call("score")
        return super().score(token_ids)

    def release(self):
        self._call("release")
'''

SMALL = [
    "steps=2", "data.limit=6", "data.prompts_per_step=4", "rollout.votes_per_prompt=4", "rollout.max_new_tokens=24",
    "eval.samples=2", "eval.k=[1,2]", "eval.limit=3", "eval.heldout=null", "checkpoint.every=0", "log.groups_per_step=9",
]  # fmt: skip
ON_RAY = ["cluster.backend=ray", "cluster.address=local", "cluster.bucket_mb=1", "cluster.start_seconds=240"]


def moody_file(folder: Path) -> Path:
    """The plug-in file with `moody`."""
    file = folder / "moody.py"
    file.write_text(MOODY)
    return file


def recipe(folder: Path, *changes: str, workers: int = 0, engine: dict[str, Any] | None = None) -> Recipe:
    """The quickstart, small; on `workers` Ray workers unless that is 0. `engine`: options of the moody engine."""
    found = [*SMALL, f"output={json.dumps(str(folder / 'run'))}"]
    if workers:
        found += [*ON_RAY, f"cluster.workers={workers}"]
    if engine is not None:
        plug = {"use": f"{moody_file(folder)}:moody", "with": engine}
        found.append(f"rollout.engine={json.dumps(plug)}")
    return load_recipe("quickstart", [*found, *changes])


def train(of: Recipe, *, resume: bool = False) -> Path:
    """A whole run in this process; returns its folder."""
    assert run(of, resume=resume, console=Console(quiet=True)).status == "completed"
    return Path(of.output)


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what may differ between runs that are the same."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "cluster/"))} for row in lines]


def results(folder: Path) -> tuple[Any, ...]:
    """All that a run computes: metrics, every rollout, evaluations, final weights byte by byte."""
    texts = [(folder / name).read_text() for name in ("groups.jsonl", "eval.jsonl", "ledger.jsonl")]
    return rows(folder), texts, (folder / "model" / "model.safetensors").read_bytes()


def replaced(folder: Path) -> Sequence[float]:
    """Workers replaced, step by step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["cluster/replaced"] for line in lines]
