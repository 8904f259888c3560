"""Ends a run at a chosen instant, as SIGKILL does: in any phase of a step, at any change of its folder, in the middle of a write."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Plant = Callable[[], None]


class Reaper:
    """Counts the instants of a run and, at one of them, ends the process as SIGKILL does, perhaps in the middle of a write."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self._folder, self._at = str(folder), at
        self.names: list[str] = []

    def tick(self, name: str, harm: Plant | None = None) -> None:
        if len(self.names) == self._at:
            if harm is not None:
                harm()
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def plant(self) -> None:
        """Every phase of a step, every change of the run folder, and half of every file of tensors and of every line."""
        import torch

        from ttrl import checkpoint, loop, rundir, scoring
        from ttrl.evaluate.evaluator import Evaluator
        from ttrl.stopping import StopSwitch
        from ttrl.sync import WeightLink
        from ttrl.trainers import torch_backend

        for owner, name in ((scoring, "score"), (loop, "update"), (Evaluator, "__call__"), (StopSwitch, "check"),
                            (WeightLink, "sync"), (torch.optim.AdamW, "step")):  # fmt: skip
            self._before(owner, name)
        self._torn(torch_backend, "save_file", lambda tensors, path: half(Path(path)))
        for owner in (checkpoint, rundir):
            self._torn(
                owner, "write_file", lambda path, text: (path.with_name(path.name + ".part")).write_text(text[:9])
            )
        original = rundir.RunDir.append

        def append(run: Any, file: str, record: Any) -> None:
            def tear() -> None:
                original(run, file, record)
                content = (run.path / file).read_bytes()
                (run.path / file).write_bytes(content[: -len(json.dumps(record)) // 2])

            self.tick(f"append {file}", tear)
            original(run, file, record)

        rundir.RunDir.append = append  # type: ignore[method-assign]
        sys.addaudithook(self._audit)

    def _before(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def ticking(*arguments: Any, **named: Any) -> Any:
            self.tick(name)
            result = original(*arguments, **named)
            self.tick(f"after {name}")
            return result

        setattr(owner, name, ticking)

    def _torn(self, owner: Any, name: str, tear: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def ticking(*arguments: Any) -> Any:
            def harm() -> None:
                if name == "save_file":
                    original(*arguments)
                tear(*arguments)

            self.tick(f"half of {name} {Path(arguments[name == 'save_file']).name}", harm)
            return original(*arguments)

        setattr(owner, name, ticking)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(self._folder) or not os.path.isabs(path):  # rmtree names files relative to their folder
            self.tick(f"{event} {Path(path).name}")


def half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)
