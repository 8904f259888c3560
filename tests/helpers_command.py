"""`ttrl` as a user starts it, or in a child of a server that has imported torch: a short run spends most of its time on imports.

A child is a process of its own, with its own environment, working directory, standard streams and exit status. What it shares with
the others is the state that imports left behind, string hashes among it; `cold` starts a new interpreter.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
DEADLINE = 300.0


def command(*arguments: object) -> list[str]:
    """What a shell would start."""
    return [sys.executable, "-m", "ttrl.cli", *(str(argument) for argument in arguments)]


def cold(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`ttrl` in a new interpreter."""
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=DEADLINE, env=environment)


def ttrl(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`ttrl` in a child of the server."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        request = {"words": words, "environment": {**ENVIRONMENT, **environment}, "cwd": os.getcwd(), "folder": folder}
        status = server().ask(request)
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(words, status, out, err)


class Server:
    """The client's end: one line of JSON for every command, one line with its exit status back."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> int:
        """Raises TimeoutError, and ends the server, when a command does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], DEADLINE)[0]:
            self.close()
            server.cache_clear()
            raise TimeoutError(f"ttrl {' '.join(request['words'])} did not end within {DEADLINE:g} s")
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """The server and the command it is at."""
        subprocess.run(["pkill", "-KILL", "-P", str(self._process.pid)], check=False)
        self._process.kill()
        self._process.wait()


@lru_cache(maxsize=1)
def server() -> Server:
    """One per process, started when first asked for."""
    return Server()


def forked(out: Path, err: Path, action: Callable[[], int]) -> int:
    """Process id of a child that does this and nothing else; what it says is appended to the files."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        code = action()
    except BaseException:  # noqa: BLE001 - as an interpreter ends, with the hook that typer sets
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def status_of(words: Sequence[str]) -> int:
    """Exit status of `ttrl` in this process."""
    from ttrl.cli import main

    sys.argv = ["ttrl", *words]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def ended(child: int) -> int:
    """Exit status, or minus the number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def import_all() -> None:
    """What a run and its report need, which takes longer to import than a short run takes."""
    import torch  # noqa: F401

    import ttrl.run
    import ttrl.trainers.torch_backend  # noqa: F401
    from ttrl.report.plots import curve

    curve([{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}], {"a": "a"}, "a")


def _answer(request: dict[str, Any]) -> int:
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    return status_of(request["words"])


def _serve() -> None:
    import_all()
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        child = forked(folder / "out", folder / "err", partial(_answer, request))
        sys.stdout.write(f"{ended(child)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
