"""The grading servers under attack: limits, recovery, threads and asyncio. Ray actors: test_ray_rewards.py."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gate import BOMBS

from ttrl.rewards import sandbox_worker
from ttrl.rewards.equivalence import classes, forget, grade
from ttrl.rewards.sandbox import Limits, Outcome, Sandbox, _Server, shared_sandbox

ROOT = Path(__file__).resolve().parent.parent
# These pass no gate: they are handed to the server as they are, to see that its limits hold on their own.
TIMED_OUT = Outcome(timed_out=True)
SLOW = ["(10^7)!", "9^{9^{9}}", "3^{1500000000}", r"\binom{10000000}{5000000}"]
GATED_SECONDS, WORST_SECONDS = 0.1, 1.0


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(servers=1)
    assert box.run([("math", "1+1")]) == [Outcome(key="2")]  # started and warm
    yield box
    box.close()


def test_a_server_answers_in_order(sandbox: Sandbox) -> None:
    outcomes = sandbox.run(
        [("math", r"\sqrt{16}"), ("math", r"\nonsense{"), ("regex", r"a(\d)", "1", "a1 a2"), ("math", "1/3")]
    )
    assert outcomes == [Outcome(key="4"), Outcome(), Outcome(key="2"), Outcome(key="1/3")]
    assert sandbox.run([]) == []


@pytest.mark.parametrize("bomb", SLOW)
def test_what_computes_too_long_is_stopped_and_told_apart_from_the_unreadable(sandbox: Sandbox, bomb: str) -> None:
    assert sandbox.run([("math", bomb)]) == [TIMED_OUT]


def test_a_pattern_that_backtracks_for_ever_is_stopped(sandbox: Sandbox) -> None:
    hostile: list[tuple[str, ...]] = [("regex", "(a+)+$", "0", "a" * 40 + "b"), ("regex", "b", "0", "ab")]
    assert sandbox.run(hostile) == [TIMED_OUT, Outcome(key="b")]


def test_memory_is_bounded() -> None:
    """A pattern that remembers where it could go back to: 50 bytes a step, four million steps."""
    hungry: list[tuple[str, ...]] = [("regex", "(?:ab|aa)*(c?)", "1", "a" * 8_000_000), ("math", "2+2")]
    for memory_mb, outcome in ((256, TIMED_OUT), (2048, Outcome(key=""))):
        box = Sandbox(servers=1, limits=Limits(memory_mb=memory_mb, cpu_seconds=20, wall_seconds=20))
        try:
            assert box.run(hungry) == [outcome, Outcome(key="4")]
        finally:
            box.close()


def test_servers_that_are_missing_start_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    running, box, wait = [], Sandbox(servers=2), _Server.await_ready

    def await_ready(self: _Server, seconds: float) -> None:
        running.append(len(box.pids()))
        wait(self, seconds)

    monkeypatch.setattr(_Server, "await_ready", await_ready)
    try:
        assert box.run([("math", "1+1")]) == [Outcome(key="2")]
        assert box.run([("math", "1+1")] * 8) == [Outcome(key="2")] * 8
        assert running == [1, 2]  # a second one only for work worth splitting
        for pid in box.pids():
            os.kill(pid, 9)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert box.run([("math", "1+1")] * 8) == [Outcome(key="2")] * 8
        assert running == [1, 2, 2, 2]
    finally:
        box.close()


def test_one_bomb_costs_the_others_nothing(sandbox: Sandbox) -> None:
    mixed = ["1+1", SLOW[0], "2+2", SLOW[1], "3+3"]
    outcomes = sandbox.run([("math", text) for text in mixed])
    assert outcomes == [Outcome(key="2"), TIMED_OUT, Outcome(key="4"), TIMED_OUT, Outcome(key="6")]


def test_after_poison_the_next_thousand_grades_are_unchanged(sandbox: Sandbox) -> None:
    ordinary = [rf"\sqrt{{{n}}}+{n % 7}" for n in range(2, 102)]
    tasks = [("math", text) for text in ordinary]
    clean = sandbox.run(tasks)
    assert all(outcome.key for outcome in clean)
    poison = [
        "(10^7)!",
        r"\newcommand{\sqrt}{1}",
        "__import__('sympy').__dict__.clear()",
        "}" * 50,
        r"\sqrt=1",
        "9^{9^{9}}",
    ]
    for text in poison:
        sandbox.run([("math", text)])
    for _ in range(10):
        assert sandbox.run(tasks) == clean


def test_a_server_that_is_killed_is_replaced(sandbox: Sandbox) -> None:
    (pid,) = sandbox.pids()
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert sandbox.run([("math", "1+1")]) == [Outcome(key="2")]
    assert sandbox.pids() not in ([], [pid])


CODE = [
    "__import__('os').system('touch {0}')",
    "eval(\"open('{0}','w')\")",
    "exec(\"open('{0}','w')\")",
    "open('{0}','w').write('x')",
]


def test_code_leaves_no_trace(sandbox: Sandbox, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    texts = [code.format(marker) for code in CODE]
    for text in texts:
        assert grade([text, text, "5", r"\sqrt{4}"], "math").classes.count(0) < 3
    sandbox.run([("math", text) for text in texts])  # and without the gate
    sandbox.run([("math", rf"\text{{{text}}}") for text in texts])
    assert not marker.exists() and list(tmp_path.iterdir()) == []


def share_of_a_core() -> float:
    """What the machine gives us now: CPU time over wall time of a busy loop, at most 1."""
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.thread_time() - cpu < 0.2:
        pass
    return min(1.0, (time.thread_time() - cpu) / (time.perf_counter() - wall))


def costs() -> dict[str, float]:
    """Seconds per bomb: CPU time to grade each gated one in a group with an ordinary answer; wall time, on a core of one's own, of
    those that need the limits: the first try within the bound, else the best of eight. On a busy machine most tries are bad luck; a
    limit that is not kept shows in all of them."""
    forget()
    measured = {}
    for name, bomb in BOMBS.items():
        start = time.thread_time()
        grade([bomb, "7"], "math")
        measured[f"gated {name}"] = time.thread_time() - start
    for text in SLOW:
        tries: list[float] = []
        while len(tries) < 8 and min(tries, default=math.inf) > WORST_SECONDS:
            before, start = share_of_a_core(), time.perf_counter()
            shared_sandbox().run([("math", text)])
            tries.append((time.perf_counter() - start) * min(before, share_of_a_core()))
        measured[f"slow {text}"] = min(tries)
    return measured


def check(measured: dict[str, float]) -> None:
    """The one place where bounds in seconds are asserted: they are the promise."""
    assert len(measured) == len(BOMBS) + len(SLOW)
    assert {name: s for name, s in measured.items() if name.startswith("gated") and s > GATED_SECONDS} == {}
    assert {name: s for name, s in measured.items() if s > WORST_SECONDS} == {}


def warm() -> None:
    shared_sandbox().run([("math", "1+1")] * 8)


def test_bombs_from_the_main_thread_are_cheap_and_counted() -> None:
    warm()
    check(costs())
    grades = grade(["9^{9^{9}}", "9^{9^{9}}", "7"], "math")
    assert (grades.gated, grades.timeouts) == (2, 0)


def test_bombs_from_a_worker_thread_are_cheap() -> None:
    warm()
    measured: list[dict[str, float]] = []
    thread = threading.Thread(target=lambda: measured.append(costs()))
    thread.start()
    thread.join(60)
    check(measured[0])


def test_grading_works_under_asyncio_and_from_many_threads() -> None:
    async def many() -> list[list[int]]:
        jobs = [asyncio.to_thread(classes, [rf"\ln{{{n * n}}}", rf"2\ln{{{n}}}", "7"], "math") for n in range(2, 14)]
        return await asyncio.gather(*jobs)

    assert asyncio.run(many()) == [[0, 0, 1]] * 12


def test_time_outs_abstain_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_time_out(self: Sandbox, tasks: list[object]) -> list[Outcome]:
        return [TIMED_OUT for _ in tasks]

    forget()
    monkeypatch.setattr(Sandbox, "run", all_time_out)
    grades = grade([r"\ln{8}", r"\ln{8}", r"3\ln{2}", r"(1,\ln{2})", "7", None], "math")
    assert (grades.timeouts, grades.gated) == (4, 0)
    assert len(grades.forms) == 4  # nothing was merged, and the same spelling is still one class
    forget()


def test_servers_end_with_their_caller_even_if_it_is_killed() -> None:
    code = (
        "import os, sys, time\nfrom ttrl.rewards.sandbox import shared_sandbox as s\ns().run([('math','1+1')])\n"
        "print(*s().pids(), flush=True)\n{end}"
    )
    for end in ("", "os.kill(os.getpid(), 9)", "os._exit(1)"):
        run = subprocess.run(
            [sys.executable, "-c", code.format(end=end)], capture_output=True, text=True, cwd=ROOT, timeout=60
        )
        pid = int(run.stdout)
        for _ in range(200):
            if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"server {pid} outlived its caller ({end!r})")


def test_a_forked_process_starts_its_own_servers() -> None:
    warm()
    pids = shared_sandbox().pids()
    inlet, outlet = os.pipe()
    if os.fork() == 0:
        try:
            ok = shared_sandbox().run([("math", "1+1")]) == [Outcome(key="2")] and not {*shared_sandbox().pids()} & {
                *pids
            }
            shared_sandbox().close()
            os.write(outlet, b"1" if ok else b"0")
        finally:
            os._exit(0)
    os.close(outlet)
    assert os.read(inlet, 1) == b"1"
    os.close(inlet)
    os.wait()
    assert shared_sandbox().run([("math", "1+1")]) == [Outcome(key="2")]


def test_an_interrupted_question_does_not_answer_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Sandbox(servers=1)
    try:
        box.run([("math", "1+1")])

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Sandbox, "_collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            box.run([("math", "2+2")])
        monkeypatch.undo()
        assert box.run([("math", "3+3")]) == [Outcome(key="6")]
    finally:
        box.close()


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr("ttrl.rewards.sandbox._WORKER", broken)
    with pytest.raises(RuntimeError, match="grading server did not start; `pip install math-verify`"):
        Sandbox(servers=1).run([("math", "1+1")])


PIECES = [
    "\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "^", "_", "1", "23", "x", "y", "i", "e", "+", "-", "=", "<", ",", "!", "|",
    "\\pi", "\\cup", "\\{", "\\}", "\\ln", "\\sin", "\\binom", "\\infty", " ", ".", "/", "\\\\", "&", "%", "$", "\\left", "\\right",
]  # fmt: skip
noise = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(noise, min_size=2, max_size=12))
def test_noise_crashes_nothing(votes: list[str]) -> None:
    pids = shared_sandbox().pids()
    grades = grade(votes, "math")
    assert len(grades.classes) == len(votes)
    assert grade(list(reversed(votes)), "math").forms == grades.forms
    assert set(pids) <= set(shared_sandbox().pids())  # no server had to be replaced


def resident_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_a_server_does_not_grow(sandbox: Sandbox) -> None:
    (pid,) = sandbox.pids()
    tasks = [("math", rf"\sqrt{{{n}}}x^{n % 9}") for n in range(40)]
    sandbox.run(tasks)
    before = resident_kb(pid)
    for _ in range(10):
        sandbox.run(tasks)
    assert resident_kb(pid) - before < 4096


def test_the_worker_needs_nothing_of_ours() -> None:
    source = Path(sandbox_worker.__file__).read_text()
    assert "ttrl" not in source.replace("`ttrl.rewards.sandbox`", "").replace("nothing of ttrl", "")
