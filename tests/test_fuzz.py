"""LaTeX-like noise through extraction and grading, for every kind: nothing crashes, hangs or grows.

A seeded loop and not hypothesis, which keeps its examples and would hide a leak of ours behind its own.
"""

from __future__ import annotations

import gc
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ends_at_all, make_rollout

from ttrl.rewards import equivalence
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.sandbox import shared_sandbox
from ttrl.types import NO_ANSWER

OPTIONS: dict[str, dict[str, Any]] = {
    "math": {}, "number": {}, "choice": {}, "label": {"labels": ["dog", "x", "frac"]}, "json": {}, "box": {}, "point": {},
    "regex": {"pattern": r"(\d+|\\[a-z]+)+$"},
}  # fmt: skip
WARM, ROUNDS, VOTES = 10, 30, 16
HEAP_BYTES, RESIDENT_KB = 100 * 1024, 4 * 1024
"""What may be left over after ROUNDS more rounds. Of the heap 25 kB are seen; a planted leak of every answer leaves 175 kB."""

ATOMS = [
    *"0123456789xyzein",
    "12.50",
    "1,000",
    ".5",
    "-3",
    r"\pi",
    r"\infty",
    r"\%",
    "dog",
    r"\text{dog}",
    "٣",
    "½",
    "−",
    "\0",
    "∪",
]
GLUE = [
    *"+-*/^_=<>,;:!|&%$#~'\"\\ \n",
    r"\cdot",
    r"\times",
    r"\cup",
    r"\le",
    r"\\",
    r"\left(",
    r"\right)",
    "**",
    "answer is ",
]
WRAP = [
    ("{", "}"), ("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\frac{", "}{2}"), (r"\sqrt{", "}"), (r"\sqrt[3]{", "}"), ("^{", "}"),
    (r"\binom{", "}{3}"), (r"\ln{", "}"), (r"\boxed{", "}"), (r"\text{", "}"), ("|", "|"), (r"\begin{pmatrix}", r"\end{pmatrix}"),
    (r"\sum_{k=1}^{", "}k"), ("$", "$"), ('{"a": ', "}"),
]  # fmt: skip


def tree(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.25:
        return rng.choice(ATOMS)
    if rng.random() < 0.5:
        before, after = rng.choice(WRAP)
        return before + tree(rng, depth - 1) + after
    return rng.choice(GLUE).join(tree(rng, depth - 1) for _ in range(rng.randint(1, 4)))


def noise(rng: random.Random) -> str:
    """A random expression, usually boxed, often broken: cut, doubled, shuffled, or repeated very often."""
    text = tree(rng, rng.randint(1, 5))
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(text) + 1)
        damage = rng.randrange(4)
        if damage == 0:
            text = text[:at] + text[at + rng.randint(1, 4) :]
        elif damage == 1:
            text = text[:at] + text[:at] + text[at:]
        elif damage == 2:
            text = text[:at] + rng.choice([*GLUE, "{", "}", "^"]) + text[at:]
        else:
            text = text[:at] + rng.choice(["{", "(", "9", r"\frac", "^9", "!"]) * rng.choice([3, 50, 2000]) + text[at:]
    return rng.choice([rf"so \boxed{{{text}}}", rf"the answer is {text}", text, rf"\boxed{{{text}"])[:20_000]


def play(rng: random.Random, readers: list[AnswerReader]) -> tuple[int, int]:
    """One group for every kind. Returns answers found and classes made of them."""
    answered = made = 0
    texts = [noise(rng) for _ in range(VOTES)]
    for reader in readers:
        answers = reader.read([make_rollout(text, i, tokens=1) for i, text in enumerate(texts)])
        grades = reader.grade(answers)
        assert len(grades.classes) == VOTES
        for answer, c in zip(answers, grades.classes, strict=True):
            assert (
                c == NO_ANSWER if answer is None or not answer.strip() else c in (NO_ANSWER, *range(len(grades.forms)))
            )
        again = reader.grade(answers[::-1])
        assert again.forms == grades.forms and again.classes == grades.classes[::-1]
        answered, made = answered + sum(a is not None for a in answers), made + len(grades.forms)
    return answered, made


def settle() -> tuple[int, int, dict[int, int]]:
    """Bytes on the Python heap, and kB resident here and in the grading servers, when nothing is remembered on purpose."""
    equivalence.forget()
    gc.collect()
    return (
        tracemalloc.get_traced_memory()[0],
        resident_kb(os.getpid()),
        {p: resident_kb(p) for p in shared_sandbox().pids()},
    )


def resident_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_noise_crashes_hangs_and_grows_nothing(traced: None) -> None:
    rng = random.Random(0)
    readers = [AnswerReader(kind, options) for kind, options in OPTIONS.items()]
    shared_sandbox().run([("math", "1+1")] * 8)
    answered = made = 0
    with ends_at_all(300):
        for _ in range(WARM):
            play(rng, readers)
        heap, resident, servers = settle()
        for _ in range(ROUNDS):
            some, more = play(rng, readers)
            answered, made = answered + some, made + more
        heap_after, resident_after, servers_after = settle()
    assert answered > ROUNDS * VOTES and made > ROUNDS * VOTES // 2  # the noise is not all unreadable
    assert heap_after - heap < HEAP_BYTES
    assert resident_after - resident < RESIDENT_KB
    assert servers_after.keys() == servers.keys(), "a grading server had to be replaced"
    assert all(servers_after[pid] - kb < RESIDENT_KB for pid, kb in servers.items())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    equivalence.forget()
    monkeypatch.setattr(equivalence, "MAX_REMEMBERED", 100)
    for n in range(0, 1000, 10):
        equivalence.grade([rf"\sqrt{{{k * k}}}" for k in range(n + 2, n + 12)], "math")
        assert len(equivalence._remembered) <= 100
    equivalence.forget()
