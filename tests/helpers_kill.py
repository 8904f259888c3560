"""Runs that are killed at chosen instants, resumed and compared. A program of its own: it imports torch once and forks every run.

python helpers_kill.py FOLDER INSTANTS SEED [kills-only]     writes FOLDER/found.json, a list of what each case came to
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers_command import ended, forked, import_all, status_of
from helpers_reaper import Plant, Reaper

# Six prompts, two per step: an epoch ends with step 3, 6, 9 and 12, a checkpoint is written after every second step.
# The learning rate is high enough for labels to change, so that a lost history of votes would show in reward/flip_rate.
RECIPE = [
    "train", "quickstart", "steps=12", "data.limit=6", "data.prompts_per_step=2", "rollout.votes_per_prompt=4", "trainer.lr=0.0003",
    "eval.samples=2", "eval.k=[1,2]", "eval.limit=2", "eval.heldout=null", "checkpoint.every=2", "log.groups_per_step=2",
    "stabilizers=[]",
]  # fmt: skip
FILES = ("groups.jsonl", "eval.jsonl", "ledger.jsonl")
SECRETS = {
    name: f"secret-{name.lower()}-5f1c"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
}


def command(folder: Path, *more: str, plant: Plant | None = None) -> int:
    """`ttrl train` in a child; returns its process id."""

    def action() -> int:
        if plant is not None:
            plant()
        else:
            without_figures()
        return status_of([*RECIPE, *more, "--output", str(folder)])

    log = folder.with_suffix(".log")
    return forked(log, log, action)


def resumed(folder: Path, *more: str) -> int:
    """Continue, or start again when there is nothing to continue yet."""
    return ended(command(folder, *more, *(["--resume"] if (folder / "recipe.yaml").exists() else [])))


def content(folder: Path) -> dict[str, str]:
    """Everything that must not depend on interruptions, hashed."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    held = {name: (folder / name).read_bytes() for name in FILES}
    held |= {
        "metrics.jsonl": json.dumps(timeless).encode(),
        "model": (folder / "model" / "model.safetensors").read_bytes(),
    }
    return {name: hashlib.sha256(data).hexdigest() for name, data in held.items()}


def choose(names: list[str], count: int, seed: int) -> list[int]:
    """Instants, in turns from those within checkpoints, lines, phases, and loops over tokens and micro-batches."""
    draw = random.Random(seed)
    kinds: dict[str, list[int]] = {"stored": [], "line": [], "phase": [], "loop": []}
    for index, name in enumerate(names):
        stored = "safetensors" in name or "step-" in name or "LATEST" in name
        loop = name.endswith("check")
        kinds["stored" if stored else "line" if name.startswith("append") else "loop" if loop else "phase"].append(
            index
        )
    turns = list(kinds.values())
    return [draw.choice(turns[turn % 4]) for turn in range(count)]


class Bench:
    """The cases, each compared with one run that nothing happened to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[dict[str, Any]] = []
        whole = folder / "whole"
        reaper = Reaper(whole, None)

        def plant() -> None:
            reaper.plant()
            at_the_end(lambda: (folder / "names.json").write_text(json.dumps(reaper.names)))

        self.report("whole", status=ended(command(whole, plant=plant)))
        self.names: list[str] = json.loads((folder / "names.json").read_text())
        self.expected = content(whole)

    def report(self, case: str, **facts: Any) -> None:
        self.found.append({"case": case, **facts})
        (self.folder / "found.json").write_text(json.dumps(self.found, indent=1))

    def compare(self, case: str, folder: Path, **facts: Any) -> None:
        """Which files differ from those of the whole run; then the folder has served."""
        now = content(folder)
        different = [name for name in self.expected if now[name] != self.expected[name]]
        self.report(case, different=different, log=folder.with_suffix(".log").read_text()[-3000:], **facts)
        shutil.rmtree(folder)

    def kill(self, number: int, at: int, harm: Plant | None = None) -> None:
        folder = self.folder / f"kill{number}"
        status = ended(command(folder, plant=Reaper(folder, at).plant))
        assert status == -signal.SIGKILL, (self.names[at], status)
        if harm is not None:
            harm()
        self.compare(f"kill {at} of {len(self.names)}: {self.names[at]}", folder, status=resumed(folder))

    def damaged(self) -> None:
        """Killed right after the second checkpoint, which then loses a bit."""
        folder = self.folder / "damaged"
        at = [i for i, name in enumerate(self.names) if name == "half of write_file LATEST"][1]
        assert ended(command(folder, plant=Reaper(folder, at).plant)) == -signal.SIGKILL
        file = folder / "checkpoints" / "step-000004" / "trained.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        status = resumed(folder)
        head = (folder / "recipe.yaml").read_text().splitlines()[0]
        self.compare("damaged", folder, status=status, head=head)

    def signalled(self, *numbers: int) -> None:
        """As a scheduler does before it takes the machine away: a signal, and the same again; then in the resumed run."""
        folder = self.folder / "signals"
        stops, lines = [], 0
        for number in numbers:
            child = command(folder, *(["--resume"] if stops else []))
            deadline = time.monotonic() + 240
            while count_lines(folder / "metrics.jsonl") <= lines:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(child, number)
            time.sleep(0.02)
            os.kill(child, number)
            status = ended(child)
            summary = json.loads((folder / "summary.json").read_text())
            lines = count_lines(folder / "metrics.jsonl")
            stops.append({"number": number, "status": status, "lines": lines, "summary": summary})
        self.compare("signals", folder, stops=stops, status=resumed(folder))

    def failing(self, case: str, plant: Plant, *changes: str, resume: bool = True) -> None:
        """A failure in the middle, then a resume without its cause."""
        folder = self.folder / case
        failed = ended(command(folder, plant=plant))
        said = folder.with_suffix(".log").read_text()
        summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        facts = {"failed": failed, "said": said, "summary": summary, "left": left}
        if not resume:
            return self.report(case, **facts)
        status = resumed(folder, *changes)
        head = (folder / "recipe.yaml").read_text().splitlines()[0]
        self.compare(case, folder, status=status, head=head, **facts)
        return None


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def at_the_end(action: Callable[[], Any]) -> None:
    """Do this when the command ends; children leave by os._exit, which runs no exit handlers."""
    from ttrl import run

    original = run.write_report

    def last(directory: Any) -> Any:
        result = original(directory)
        action()
        return result

    run.write_report = last


def full_disk() -> None:
    """No file may grow beyond this, which lines do not and weights do, from the third checkpoint on."""
    from ttrl.trainers import torch_backend

    original, calls = torch_backend.save_file, [0]

    def save(tensors: Any, path: Path) -> None:
        calls[0] += 1
        if calls[0] == 5:  # the weights of the third checkpoint; the moments are a file of their own
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        original(tensors, path)

    torch_backend.save_file = save


def fails_at_step_5(error: Callable[[], BaseException]) -> Plant:
    def plant() -> None:
        from ttrl.trainers.torch_backend import TorchTrainer

        original = TorchTrainer.step

        def step(self: Any, number: int, updates: Any) -> Any:
            if number == 5:
                raise error()
            return original(self, number, updates)

        TorchTrainer.step = step  # type: ignore[method-assign]

    return plant


def out_of_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def nan_loss() -> None:
    """A term of the loss becomes NaN in step 5."""
    from ttrl.trainers.losses.clip import ClipLoss

    original, calls = ClipLoss.__call__, [0]

    def loss(self: Any, *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        out = original(self, *arguments, **named)
        return replace(out, loss=out.loss * float("nan")) if calls[0] == 6 else out

    ClipLoss.__call__ = loss  # type: ignore[method-assign]


def without_figures() -> None:
    """Half of the time of a run as short as these."""
    from ttrl.report import page

    page._figures = lambda *_: []


def main() -> None:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ.update(SECRETS)
    import_all()
    bench = Bench(folder)
    for number, at in enumerate(choose(bench.names, count, seed)):
        bench.kill(number, at)
    if "kills-only" in sys.argv:
        return
    bench.damaged()
    bench.signalled(signal.SIGTERM, signal.SIGUSR1)
    bench.failing("full-disk", full_disk, resume=False)
    bench.failing("nan", nan_loss)
    bench.failing("memory", fails_at_step_5(out_of_memory), "trainer.tokens_per_microbatch=4096")


if __name__ == "__main__":
    main()
