"""The grading sandbox beside the same thing built on pebble.ProcessPool: start, throughput, bombs, and where each can be called from.

    pip install --target /tmp/pebble pebble      # not a dependency
    PYTHONPATH=/tmp/pebble python scripts/bench/sandbox.py            # every variant; a line of JSON each
    PYTHONPATH=/tmp/pebble python scripts/bench/sandbox.py ours fresh-spawn

Variants: `ours`; `fresh-METHOD`: a worker per batch (max_tasks=1), a batch that died is done again task by task; `forks-METHOD`: pebble
supervises long-lived workers that fork per batch as our servers do. METHOD is forkserver (preloaded, primed) or spawn. All have
two workers and the same limits: 0.4 s of CPU per task, 1 GiB, 4 s of wall time per task.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ttrl.rewards import sandbox_worker
from ttrl.rewards.sandbox import Limits, Sandbox, Task

VARIANTS = ("ours", "fresh-forkserver", "fresh-spawn", "forks-forkserver", "forks-spawn")
LIMITS = Limits()
STOPPED = "stopped"
FOLDER = Path(__file__).resolve().parent
PATH = os.pathsep.join([str(FOLDER), *filter(None, sys.path)])
BOMBS = ("(10^7)!", "9^{9^{9}}", "3^{1500000000}", r"\binom{10000000}{5000000}")
Run = Callable[[Sequence[Task]], list[str | None]]


PRIMED = False


def prime() -> None:
    global PRIMED
    logging.disable(logging.CRITICAL)
    if not PRIMED:
        for latex in sandbox_worker.PRIMER:
            sandbox_worker.math_key(latex)
    PRIMED = True


if __name__ == "sandbox" and os.environ.get("TTRL_BENCH_PRIME") and multiprocessing.parent_process() is None:
    prime()  # in the forkserver, which preloads this module: its children find everything loaded


def limit() -> None:
    prime()
    size = LIMITS.memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def batch(tasks: list[Task]) -> list[str | None]:
    """In a worker that ends afterwards; SIGPROF ends it before."""
    results = []
    for task in tasks:
        signal.setitimer(signal.ITIMER_PROF, LIMITS.cpu_seconds)
        try:
            results.append(sandbox_worker.perform(list(task)))
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
    return results


def forked(tasks: list[Task]) -> list[str | None]:
    """In a worker that lives on."""
    results: list[Any] = []
    while len(results) < len(tasks):
        results += sandbox_worker.run_until_limit([list(task) for task in tasks[len(results) :]], asdict(LIMITS))
        if len(results) < len(tasks):
            results.append({"key": STOPPED})
    return [result["key"] for result in results]


def ours() -> Run:
    box = Sandbox(servers=2, limits=LIMITS)
    return lambda tasks: [STOPPED if outcome.timed_out else outcome.key for outcome in box.run(tasks)]


def on_pebble(kind: str, method: str) -> Run:
    import pebble

    context = multiprocessing.get_context(method)
    if method == "forkserver":
        os.environ["TTRL_BENCH_PRIME"] = "1"
        context.set_forkserver_preload(["sandbox"])
    fresh = kind == "fresh"
    pool = pebble.ProcessPool(2, max_tasks=int(fresh), initializer=limit if fresh else prime, context=context)

    def run(tasks: Sequence[Task]) -> list[str | None]:
        used = min(2, max(1, len(tasks) // 4))
        shares = [list(range(first, len(tasks), used)) for first in range(used)]
        futures = [
            pool.schedule(batch if fresh else forked, ([tasks[i] for i in share],), timeout=LIMITS.wall_seconds * len(share))
            for share in shares
        ]  # fmt: skip
        results: list[str | None] = [STOPPED] * len(tasks)
        for share, future in zip(shares, futures, strict=True):
            try:
                done = future.result(timeout=120)
            except (pebble.ProcessExpired, TimeoutError):
                done = [STOPPED] if len(share) == 1 else [run([tasks[i]])[0] for i in share]
            for place, result in zip(share, done, strict=True):
                results[place] = result
        return results

    return run


def make(variant: str) -> Run:
    return ours() if variant == "ours" else on_pebble(*variant.split("-"))


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return round(time.perf_counter() - start, 2)


def figures(variant: str) -> dict[str, object]:
    """Started and asked from the main thread."""
    held: list[Run] = []
    found: dict[str, object] = {
        "first answer s": seconds(lambda: held.append(make(variant)) or held[0]([("math", r"\sqrt{9}")] * 8))
    }
    run = held[0]
    run([("math", r"\sqrt{9}")] * 8)
    groups = [[("math", rf"\sqrt{{{8 * g + k + 2}}}+x^{k}") for k in range(8)] for g in range(20)]
    found["expressions/s, 20 batches of 8"] = round(160 / seconds(lambda: [run(group) for group in groups]), 1)
    found["batch of 200 s"] = seconds(lambda: run([("math", rf"\ln{{{k + 2}}}+x^{{{k % 7}}}") for k in range(200)]))
    found["worst bomb s"] = max(seconds(lambda bomb=bomb: run([("math", bomb)])) for bomb in BOMBS)  # type: ignore[misc]
    mixed: list[Task] = [("math", BOMBS[k] if k in (1, 3) else f"{k}+{k}") for k in range(8)]
    found["2 bombs among 8 s"] = seconds(lambda: run(mixed))
    found["right"] = run(mixed) == ["0", STOPPED, "4", STOPPED, "8", "10", "12", "14"]
    return found


def report(variant: str) -> None:
    print(json.dumps(figures(variant)), flush=True)


def usable(variant: str) -> str:
    """One answer and one bomb, from a thread that is not the main one."""
    said: list[str] = []

    def work() -> None:
        try:
            run = make(variant)
            said.append("works" if [*run([("math", "1+1")]), *run([("math", BOMBS[0])])] == ["2", STOPPED] else "wrong")
        except Exception as error:  # noqa: BLE001 - what goes wrong is what is asked
            said.append(type(error).__name__)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    return said[0] if said else "hangs"


PLAIN = """import sys; sys.path.insert(0, {folder!r})
print('runs', flush=True)
import sandbox
print(sandbox.usable({variant!r}), flush=True)
"""
DAEMON = """import sys; sys.path.insert(0, {folder!r})
import multiprocessing, sandbox
def work(): print(sandbox.usable({variant!r}), flush=True)
if __name__ == '__main__':
    process = multiprocessing.get_context('fork').Process(target=work, daemon=True); process.start(); process.join()
"""
ACTOR = """import ray, sys, tempfile
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20,
         _temp_dir=tempfile.mkdtemp(prefix='r', dir='/tmp'), runtime_env={{'env_vars': {{'PYTHONPATH': {path!r}}}}})
@ray.remote
class Actor:
    def usable(self): return __import__('sandbox').usable({variant!r})
print(ray.get(Actor.remote().usable.remote(), timeout=120)); ray.shutdown()
"""


def contexts(variant: str) -> dict[str, str]:
    """What a script prints that uses the variant; how often the script itself ran, where that is more than once."""
    found = {}
    for name, text in {"no guard": PLAIN, "daemonic": DAEMON, "Ray actor": ACTOR, "stdin": PLAIN}.items():
        with tempfile.TemporaryDirectory() as scratch:
            script = Path(scratch) / "user.py"
            script.write_text(text.format(folder=str(FOLDER), variant=variant, path=PATH))
            command = [sys.executable, "-"] if name == "stdin" else [sys.executable, str(script)]
            done = subprocess.run(
                command, input=script.read_text() if name == "stdin" else "", capture_output=True, text=True, timeout=300,
                env={**os.environ, "PYTHONPATH": PATH},
            )  # fmt: skip
        lines = done.stdout.split()
        runs = lines.count("runs")
        found[name] = (lines[-1] if lines else "nothing") + (f", but the script ran {runs} times" if runs > 1 else "")
    return found


def main() -> None:
    for variant in sys.argv[1:] or VARIANTS:
        # With a main script of its own, so that workers import this module and not a copy of it
        command = [sys.executable, "-c", f"import sandbox; sandbox.report({variant!r})"]
        environment = {**os.environ, "PYTHONPATH": PATH}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, env=environment
        )
        print(json.dumps({"variant": variant, **json.loads(done.stdout), **contexts(variant)}), flush=True)


if __name__ == "__main__":
    main()
