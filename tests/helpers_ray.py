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


def moody(model, check_stop, *, orders, slow=False):
    """The engine of transformers that obeys a file: "MOOD METHOD [SKIP]" is carried out at the SKIP-th call of that method from
    now, by the worker that comes first. slow: every generation takes a random time of its own, so that their order varies.
    """
    moods = Moods(Path(orders), slow)
    moods.look("start")
    return Moody(model, check_stop, moods)


class Moods:
    def __init__(self, orders, slow):
        self._orders, self._slow, self._calls = orders, slow, 0

    def look(self, method):
        if self._slow and method == "generate":
            time.sleep(random.random() / 4)  # of this process: another one in every run
        try:
            mood, when, *skip = self._orders.read_text().split()
        except FileNotFoundError:
            return None
        if when != method:
            return None
        self._calls += 1
        if self._calls <= int(*skip or [0]):
            return None
        self._calls = 0
        try:
            os.rename(self._orders, str(self._orders) + ".done")
        except FileNotFoundError:
            return None  # another worker was first
        print("last words of this worker", flush=True)
        if mood == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if mood == "hang":
            time.sleep(600)
        if mood == "nap":
            time.sleep(5)
        if mood == "raise":
            raise EngineError("this engine is broken")
        return mood


class Moody(HFEngine):
    def __init__(self, model, check_stop, moods):
        super().__init__(model, check_stop, rows_at_once=128, shared_prefix=True)
        self._moods, self._frozen = moods, False

    def generate(self, requests):
        self._moods.look("generate")
        return super().generate(requests)

    def begin_load(self, version, manifest, adapter=None):
        self._frozen = self._moods.look("begin") == "freeze"
        super().begin_load(version, manifest, adapter)

    def load(self, tensors, *, lasting=False):
        self._moods.look("load")
        if not self._frozen:
            super().load(tensors)
            return
        for _ in self._intake.take(iter(tensors)):
            pass

    def score(self, token_ids):
        self._moods.look("score")
        return super().score(token_ids)

    def transfer(self, method, argument):
        self._moods.look("transfer")

    def release(self):
        self._moods.look("release")
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


def recipe(folder: Path, *changes: str, workers: int = 0, orders: str = "", slow: bool = False) -> Recipe:
    """The quickstart, small; on `workers` Ray workers with moody engines unless that is 0. `orders`: what they are to do."""
    found = [*SMALL, f"output={json.dumps(str(folder / 'run'))}"]
    if workers:
        if orders:
            (folder / "orders").write_text(orders)
        plug = {"use": f"{moody_file(folder)}:moody", "with": {"orders": str(folder / "orders"), "slow": slow}}
        found += [*ON_RAY, f"cluster.workers={workers}", f"rollout.engine={json.dumps(plug)}"]
    return load_recipe("quickstart", [*found, *changes])


def obeyed(folder: Path) -> bool:
    """The orders were carried out."""
    return (folder / "orders.done").exists()


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
