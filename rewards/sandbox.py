"""Hostile work under limits: tasks go to grading servers (`sandbox_worker.py`), which fork a child per batch and kill it in time.

The servers are plain subprocesses that start at the first task, not multiprocessing children: those would import the caller's
main script again, cannot start inside daemonic processes, and a fork would copy the caller's torch threads. So this works from
the main thread, other threads, `asyncio.to_thread` and Ray actors alike. A server ends with its caller, whatever ends that.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Task = tuple[str, ...]
"""("math", latex) or ("regex", pattern, group, text); see sandbox_worker.py."""

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_INHERITED = (
    "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "SYSTEMROOT",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one task. CPU time is the deadline: wall time would let a busy machine change verdicts."""

    cpu_seconds: float = 0.4
    wall_seconds: float = 4.0
    """For work that waits instead of computing."""
    memory_mb: int = 1024
    """Address space of the child."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a task: `key` when it ended, None when the text cannot be read; `timed_out` when a limit stopped it."""

    key: str | None = None
    timed_out: bool = False


class Sandbox:
    """Up to `servers` grading servers, started at the first task and reused. Safe to share between threads.

    `run` raises RuntimeError when a server cannot start, for instance without math-verify. A server that dies later is replaced,
    and the tasks it held count as timed out.
    """

    def __init__(self, *, servers: int = 2, limits: Limits | None = None, start_seconds: float = 120.0) -> None:
        self.limits = limits or Limits()
        self._start_seconds = start_seconds
        self._lock = threading.Lock()
        self._slots: list[_Server | None] = [None] * servers
        self._owner = os.getpid()

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """One outcome per task, in order. Blocks; the tasks are spread over the servers."""
        if not tasks:
            return []
        if self._owner != os.getpid():  # a fork inherited us: those pipes and that lock belong to the parent
            self._lock, self._slots = threading.Lock(), [None] * len(self._slots)
            self._owner = os.getpid()
        with self._lock:
            # Starting a server costs seconds, so a second one starts only for work worth splitting
            used = min(len(self._slots), max(1, len(tasks) // 4))
            outcomes: list[Outcome] = [Outcome(timed_out=True)] * len(tasks)
            try:
                self._start(used)
                shares = [(slot, range(slot, len(tasks), used)) for slot in range(used)]
                sent = {slot: self._ask(slot, [tasks[i] for i in share]) for slot, share in shares}
                for slot, share in shares:
                    answers = self._collect(slot, len(share)) if sent[slot] else None
                    for position, index in enumerate(share):
                        if answers is not None and "key" in answers[position]:
                            outcomes[index] = Outcome(key=answers[position]["key"])
            except BaseException:  # Ctrl-C or a caller's alarm: a reply left in a pipe would answer the next question
                self._drop()
                raise
            return outcomes

    def close(self) -> None:
        """Ends the servers. The next task starts new ones."""
        with self._lock:
            self._drop()

    def pids(self) -> list[int]:
        """Process ids of the servers that are running."""
        return [server.process.pid for server in self._slots if server is not None]

    def _drop(self) -> None:
        for server in self._slots:
            if server is not None and self._owner == os.getpid():
                server.kill()
        self._slots = [None] * len(self._slots)

    def _start(self, used: int) -> None:
        """The first `used` servers run afterwards. Those that are missing start side by side."""
        started = []
        for slot in range(used):
            server = self._slots[slot]
            if server is None or server.process.poll() is not None:
                if server is not None:
                    server.kill()
                self._slots[slot] = server = _Server()
                started.append(server)
        for server in started:
            server.await_ready(self._start_seconds)

    def _ask(self, slot: int, tasks: list[Task]) -> bool:
        server = self._slots[slot]
        assert server is not None
        return server.send({"tasks": tasks, "limits": asdict(self.limits)})

    def _collect(self, slot: int, count: int) -> list[dict[str, str | None]] | None:
        server = self._slots[slot]
        assert server is not None
        line = server.read_line(time.monotonic() + count * (self.limits.wall_seconds + 1.0) + 5.0)
        if line is None:
            server.kill()
            self._slots[slot] = None
            return None
        answers: list[dict[str, str | None]] = json.loads(line)
        return answers


class _Server:
    """One subprocess and the bytes read from it so far."""

    def __init__(self) -> None:
        # It works on text of strangers: no token or key of the user's environment is within its reach
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": ""}
        # -P: neither our folder nor the caller's may shadow a module the server imports
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        self._buffer = b""

    def await_ready(self, seconds: float) -> None:
        line = self.read_line(time.monotonic() + seconds)
        if line is None:
            raise RuntimeError(
                "the grading server did not start; `pip install math-verify` and try `python -c 'import math_verify'`"
            )
        ready = json.loads(line)
        if "error" in ready:
            raise RuntimeError(f"the grading server did not start: {ready['error']}")

    def send(self, request: object) -> bool:
        """False when the server is gone."""
        assert self.process.stdin is not None
        try:
            data = memoryview(json.dumps(request).encode() + b"\n")
            while data:
                data = data[self.process.stdin.write(data) :]
        except (BrokenPipeError, ConnectionError):
            return False
        return True

    def read_line(self, deadline: float) -> bytes | None:
        """The next line; None when the server ended or the deadline passed."""
        assert self.process.stdout is not None
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not _readable(self.process.stdout.fileno(), left):
                return None
            block = os.read(self.process.stdout.fileno(), 1 << 16)
            if not block:
                return None
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _readable(fd: int, seconds: float) -> bool:
    """select.select refuses descriptors above 1023, which a training process may well hold."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(max(1, int(seconds * 1000))))


_SHARED: Sandbox | None = None
_SHARED_LOCK = threading.Lock()


def shared_sandbox() -> Sandbox:
    """The sandbox of this process; its servers end at exit."""
    global _SHARED
    with _SHARED_LOCK:
        if _SHARED is None:
            _SHARED = Sandbox(servers=max(1, min(2, os.cpu_count() or 1)))
            atexit.register(_SHARED.close)
        return _SHARED
