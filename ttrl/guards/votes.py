"""The votes of a group as guards see them, and what earlier visits to a prompt are remembered by.

Votes are counted from the classes of the reward, not from its label: rewards that elect nobody can be guarded too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ttrl.types import NO_ANSWER, Scored

SPELLINGS = 8
"""How many spellings of an answer are remembered: a class may hold 1/2, 0.5 and many more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Camp:
    """The rollouts that gave one answer."""

    spellings: tuple[str, ...]
    """as written, the most common first; equally common ones in the order of the alphabet"""
    votes: int

    @property
    def answer(self) -> str:
        return self.spellings[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes:
    """One group. `camps` from most to fewest votes, equal ones in the order of the alphabet: the order of rollouts does not matter."""

    prompt_id: str
    camps: tuple[Camp, ...]
    drawn: int
    """rollouts, those without an answer included"""

    @property
    def lead(self) -> int:
        """Votes of the leader minus those of the runner-up; 0 is a tie, or nobody answered."""
        counts = [camp.votes for camp in self.camps] + [0, 0]
        return counts[0] - counts[1]

    @property
    def leader(self) -> Camp | None:
        """None for a tie."""
        return self.camps[0] if self.lead else None

    def votes_for(self, spellings: Sequence[str]) -> int:
        """Votes for an answer of another visit: those of every camp that shares a spelling with it."""
        return sum(camp.votes for camp in self.camps if not set(spellings).isdisjoint(camp.spellings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """What one half of a group elected, and how it fared in the other half.

    The share and the lead of a winner among its own voters are too high, because it won. Among the others they are not, so that a
    later visit can be compared with them even when a group has only a few votes.
    """

    spellings: tuple[str, ...]
    margin: float
    """lead in its own half, as a share of the rollouts there, in (0, 1]: what a change of this answer weighs"""
    votes: int
    """in the other half"""
    rival: int
    """votes of the strongest other answer there"""
    size: int
    """rollouts of the other half, at least 1"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A visit to a prompt, of which a half elected something."""

    step: int
    halves: tuple[Half, ...]
    """one or two"""


def votes_of(scored: Scored) -> Votes:
    """Count a group."""
    return _count(scored, range(len(scored.classes)))


def visit_of(scored: Scored, step: int) -> Visit | None:
    """What to remember of a group; None when neither the rollouts in even nor those in odd places have a leader."""
    one, two = (_count(scored, range(start, len(scored.classes), 2)) for start in (0, 1))
    halves = tuple(half for half in (_half(one, two), _half(two, one)) if half is not None)
    return Visit(step=step, halves=halves) if halves else None


def _half(own: Votes, other: Votes) -> Half | None:
    if own.leader is None or not other.drawn:
        return None
    spellings = own.leader.spellings[:SPELLINGS]
    rivals = [camp.votes for camp in other.camps if set(spellings).isdisjoint(camp.spellings)]
    return Half(
        spellings=spellings, margin=own.lead / own.drawn, votes=other.votes_for(spellings), rival=max(rivals, default=0),
        size=other.drawn,
    )  # fmt: skip


def _count(scored: Scored, members: Sequence[int]) -> Votes:
    spelled: dict[int, Counter[str]] = {}
    for i in members:
        number = int(scored.classes[i])
        if number != NO_ANSWER:
            spelled.setdefault(number, Counter())[scored.answers[i] or ""] += 1
    camps = [
        Camp(spellings=tuple(sorted(counts, key=lambda s: (-counts[s], s))), votes=counts.total())
        for counts in spelled.values()
    ]
    camps.sort(key=lambda camp: (-camp.votes, camp.answer))
    return Votes(prompt_id=scored.group.prompt.id, camps=tuple(camps), drawn=len(members))
