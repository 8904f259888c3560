"""A bank of past prompts to learn from again, balanced over answer types, after RoTTA's memory (arXiv 2303.13899).

A bank of N entries has room for N / C of each of C types. An entry of age a (arrivals since it came) whose vote had an entropy of u
(a share of the largest possible) is worth the less the larger

    H = 1 / (1 + e^(-a / N)) + u

and learning from it counts E = e^(-a / N) / (1 + e^(-a / N)). What changes from images to prompts: the class is the type of the
elected answer, u is the entropy of the vote of V rollouts divided by ln V, and an entry holds the prompt alone. Its votes are
drawn anew when it is replayed, so they are from the current weights and need no correction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from ttrl.seeds import generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A prompt that was learned from."""

    prompt_id: str
    kind: str
    entropy: float
    """of its vote when it came, divided by the largest possible: in [0, 1]"""
    age: int = 0
    """arrivals since"""


class Bank:
    """`size` entries at most, `size // classes` of one type once that many are there."""

    def __init__(self, size: int, classes: int) -> None:
        assert 1 <= classes <= size
        self._size, self._quota = size, size // classes
        self.entries: list[Entry] = []

    def worth_less(self, entry: Entry) -> float:
        """H. Golden (size 64): u = 0.3 / ln 8 at age 0 -> 0.6443, at age 64 -> 0.8753; u = 1 / ln 8 at age 0 -> 0.9809."""
        return 1 / (1 + math.exp(-entry.age / self._size)) + entry.entropy

    def weight(self, entry: Entry) -> float:
        """E. Golden: age 0 -> 0.5; age = size -> 0.2689."""
        return 1 / (1 + math.exp(entry.age / self._size))

    def arrive(self, newcomer: Entry) -> None:
        """Everybody ages by one; the newcomer takes a free place, or that of the worst entry it competes with, if that is worse.

        It competes inside its type when that is at its quota, else with the types that have the most entries. Of equals the
        older entry goes, then the one whose id comes later.
        """
        self.entries = [replace(entry, age=entry.age + 1) for entry in self.entries]
        counts = Counter(entry.kind for entry in self.entries)
        if counts[newcomer.kind] >= self._quota:
            rivals = {newcomer.kind}
        elif len(self.entries) < self._size:
            self.entries.append(newcomer)
            return
        else:
            most = max(counts.values())
            rivals = {kind for kind, count in counts.items() if count == most}
        worst = max(
            (entry for entry in self.entries if entry.kind in rivals),
            key=lambda entry: (self.worth_less(entry), entry.age, entry.prompt_id),
        )
        if self.worth_less(worst) > self.worth_less(newcomer):
            self.entries.remove(worst)
            self.entries.append(newcomer)

    def draw(self, count: int, *address: int | str) -> list[Entry]:
        """`count` different entries, or all there are, by seed."""
        order = generator(*address).permutation(len(self.entries))
        return [self.entries[i] for i in order[:count]]

    def state(self) -> list[dict[str, Any]]:
        """JSON-able."""
        return list(_ENTRIES.dump_python(self.entries, mode="json"))

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        self.entries = _ENTRIES.validate_python(state)


_ENTRIES = TypeAdapter(list[Entry])


def answer_kind(form: str) -> str:
    """The type of a canonical answer: a number by its digits before the point, one letter or a short word itself, else `text`."""
    number = form.removeprefix("-").partition(".")[0]
    if number.isdecimal():
        return f"number of {len(number)} digits"
    return form.lower() if form.isalpha() and len(form) <= MAX_WORD else "text"


MAX_WORD = 8


def vote_entropy(counts: Sequence[int], votes: int) -> float:
    """Entropy of the shares of the answers, divided by ln of the number of votes; 0 for none. Golden: (2, 2) of 4 -> 0.5."""
    total = sum(counts)
    return -math.fsum(n / total * math.log(n / total) for n in counts if n) / math.log(votes) if total else 0.0
