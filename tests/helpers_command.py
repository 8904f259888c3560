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
from functools import lru_cache
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


def _child(request: dict[str, Any]) -> None:
    """Never returns."""
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(request["folder"], name), os.O_WRONLY | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.argv = ["ttrl", *request["words"]]
        from ttrl.cli import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - as an interpreter ends, with the hook that typer sets
            sys.excepthook(*sys.exc_info())
            code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import torch  # noqa: F401 - once, for every child
    from helpers_kill import with_figures

    import ttrl.run
    import ttrl.trainers.torch_backend  # noqa: F401

    with_figures()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _child(json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
