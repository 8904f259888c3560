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
    """What one half of a group elected, and how the other half liked it.

    The share of a winner among its own voters is too high, because it won. Among the others it is not, so that a later visit can be
    compared with it even when a group has only a few votes.
    """

    spellings: tuple[str, ...]
    margin: float
    """lead in its own half, as a share of the rollouts there"""
    share: float
    """of the rollouts of the other half"""
    size: int
    """rollouts of the other half"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A visit to a prompt whose vote had a leader."""

    step: int
    spellings: tuple[str, ...]
    """of the leading answer"""
    votes: int
    second: int
    """votes of the runner-up"""
    drawn: int
    halves: tuple[Half, ...]
    """at most two; a half that ties elects nobody"""

    @property
    def margin(self) -> float:
        """Lead as a share of the rollouts drawn, in (0, 1]: what a change of this answer weighs."""
        return (self.votes - self.second) / self.drawn


def votes_of(scored: Scored) -> Votes:
    """Count a group."""
    return _count(scored, range(len(scored.classes)))


def visit_of(scored: Scored, step: int) -> Visit | None:
    """What to remember of a group; None when nobody leads."""
    votes = votes_of(scored)
    leader = votes.leader
    if leader is None:
        return None
    second = votes.camps[1].votes if len(votes.camps) > 1 else 0
    one, two = (_count(scored, range(start, votes.drawn, 2)) for start in (0, 1))
    return Visit(
        step=step, spellings=leader.spellings[:SPELLINGS], votes=leader.votes, second=second, drawn=votes.drawn,
        halves=tuple(half for half in (_half(one, two), _half(two, one)) if half is not None),
    )  # fmt: skip


def _half(own: Votes, other: Votes) -> Half | None:
    if own.leader is None or not other.drawn:
        return None
    spellings = own.leader.spellings[:SPELLINGS]
    share = other.votes_for(spellings) / other.drawn
    return Half(spellings=spellings, margin=own.lead / own.drawn, share=share, size=other.drawn)


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
