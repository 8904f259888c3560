"""When has a vote been decided? Stopping rules over the classes drawn so far, in pure Python and exact integer arithmetic.

Every rule sees the classes of one group in the order of their indices (NO_ANSWER for none) and the budget V of votes. What a
rule promises assumes that two rollouts keep being equal or different when more are drawn, which an equivalence guarantees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import comb
from typing import Protocol

from ttrl.types import NO_ANSWER


class Rule(Protocol):
    """Decides whether to stop."""

    def decided(self, classes: Sequence[int], budget: int) -> bool:
        """True when no more votes are wanted."""
        ...

    def least(self, classes: Sequence[int], budget: int) -> int:
        """A lower bound on the votes still needed before `decided` could become true; at least 1."""
        ...


class Lossless:
    """Stop when the outcome of the full vote is known: same label or same abstention, whatever the votes left say.

    Proof. Let the leader have L votes, the runner-up S, n valid votes be drawn and R be left. Stop only if L - S > R. At the
    end the leader has at least L and every rival, seen or not, at most S + R < L: the same unique leader, no tie. With
    thresholds: `min_votes` is met now and so at the end. The final share lies in [L / (n + R), (L + R) / (n + R)] and the final
    margin in [(L - S - R) / (n + R), (L + R - S) / (n + R)]; both intervals contain the present value. Stop only if each
    interval lies on one side of its threshold: then `decide` passes now if and only if it passes at the end.

    Preserved: the label, and whether the group abstains. Not preserved: the values of share and margin.
    """

    def __init__(self, *, min_votes: int = 2, min_share: float = 0.0, min_margin: float = 0.0) -> None:
        self._min_votes, self._min_share, self._min_margin = min_votes, min_share, min_margin

    def decided(self, classes: Sequence[int], budget: int) -> bool:
        left = budget - len(classes)
        first, second, valid = lead(classes)
        if left <= 0:
            return True
        if first - second <= left or first < self._min_votes:
            return False
        end = valid + left
        if (first + left) / end < self._min_share or (first + left - second) / end < self._min_margin:
            return True  # abstains now and at the end
        return first / end >= self._min_share and (first - second - left) / end >= self._min_margin

    def least(self, classes: Sequence[int], budget: int) -> int:
        """If all of the next d votes go to the leader, lead + d > left - d: d = floor((left - lead) / 2) + 1 at least."""
        first, second, _ = lead(classes)
        return max(1, (budget - len(classes) - (first - second)) // 2 + 1)


class Certified:
    """Stop when an anytime-valid test says that the leader is the mode of the population; error at most epsilon.

    For each class m that could be the mode, seen or not, run one test martingale against "m is a mode": before each vote, bet
    on the class that leads among the others, a(t-1), to beat m. With s_t = 1 if vote t is a(t-1), -1 if it is m, else 0,

        E^m_t = integral over lambda in [0, 1] of  prod_t (1 + lambda s_t)  =  sum_{j <= u} C(u + d + 1, j) / ((u + d + 1) C(u + d, u))

    after u bets won and d lost. a(t-1) is chosen before the vote, so if m is a mode, E[s_t | past] = p(a) - p(m) <= 0 and E^m is a
    non-negative supermartingale that starts at 1. By Ville's inequality it ever reaches 1/epsilon with probability at most
    epsilon. The leader is certified when E^m >= 1/epsilon for every m but the leader, unseen classes included. If the leader is
    no mode, this rejects a true mode. Hence, for every number of classes and every schedule of looks,

        P(some class that is not a mode is ever certified) <= epsilon.

    No union over rivals is needed: only the process of the true mode matters, and its bets follow whoever leads. A group that
    reaches its budget uncertified has the label of the full vote, with the error of the full vote. Thresholds on share and
    margin apply to the votes drawn and may pass or fail otherwise than in full.

    The idea of a majority certificate: arXiv 2510.17472 (Martingale Majority Certificate); the mixture is the one-sided
    beta-binomial one; Ville: Ramdas et al., arXiv 2210.01948. Raises ValueError unless 0 < epsilon < 1.
    """

    def __init__(self, *, epsilon: float = 0.05) -> None:
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
        self._epsilon = epsilon

    def decided(self, classes: Sequence[int], budget: int) -> bool:
        return len(classes) >= budget or self.certifies(classes) is not None

    def certifies(self, classes: Sequence[int]) -> int | None:
        """The class certified to be the mode by these votes, or None."""
        leader, bets = replay(classes)
        if leader is None:
            return None
        evidence = min(e_value(won, lost) for candidate, (won, lost) in bets.items() if candidate != leader)
        return leader if evidence >= 1 / self._epsilon else None

    def least(self, classes: Sequence[int], budget: int) -> int:
        return 1


class EarlyStopping:
    """ESC (arXiv 2401.10480): stop when one window of `window` votes is unanimous. A heuristic: no promise about the label."""

    def __init__(self, *, window: int = 8) -> None:
        if window < 2:
            raise ValueError(f"window must be at least 2 votes, got {window}")
        self._window = window

    def decided(self, classes: Sequence[int], budget: int) -> bool:
        size = self._window
        windows = (classes[start : start + size] for start in range(0, len(classes) - size + 1, size))
        return len(classes) >= budget or any(w[0] != NO_ANSWER and len(set(w)) == 1 for w in windows)

    def least(self, classes: Sequence[int], budget: int) -> int:
        return self._window - len(classes) % self._window


class AdaptiveConsistency:
    """Adaptive-Consistency (arXiv 2305.11860), Beta form: stop when 1 - I_{1/2}(c1 + 1, c2 + 1) >= threshold.

    The posterior probability, under a uniform prior, that the leader beats the runner-up. Looking at it repeatedly is not
    accounted for, so the label differs from the full vote more often than 1 - threshold suggests. (4, 0) -> 0.96875.
    """

    def __init__(self, *, threshold: float = 0.95) -> None:
        if not 0.5 < threshold < 1:
            raise ValueError(f"threshold must lie between 0.5 and 1, got {threshold}")
        self._threshold = threshold

    def decided(self, classes: Sequence[int], budget: int) -> bool:
        first, second, _ = lead(classes)
        return len(classes) >= budget or lead_probability(first, second) >= self._threshold

    def least(self, classes: Sequence[int], budget: int) -> int:
        return 1


def lead(classes: Sequence[int]) -> tuple[int, int, int]:
    """Votes of the leader, votes of the runner-up, valid votes."""
    counts = Counter(c for c in classes if c != NO_ANSWER)
    top = [count for _, count in counts.most_common(2)]
    first, second = [*top, 0, 0][:2]
    return first, second, sum(counts.values())


@lru_cache(maxsize=65536)
def lead_probability(first: int, second: int) -> float:
    """1 - I_{1/2}(first + 1, second + 1) = P(Binomial(first + second + 1, 1/2) <= first)."""
    n = first + second + 1
    return sum(comb(n, j) for j in range(first + 1)) / (1 << n)


@lru_cache(maxsize=65536)
def e_value(won: int, lost: int) -> float:
    """Integral over lambda in [0, 1] of (1 + lambda)^won (1 - lambda)^lost; 1 before the first bet."""
    n = won + lost
    return sum(comb(n + 1, j) for j in range(won + 1)) / ((n + 1) * comb(n, won))


UNSEEN = -2
"""Stands for every class nobody has named yet."""


def replay(classes: Sequence[int]) -> tuple[int | None, dict[int, tuple[int, int]]]:
    """The leader, and for every possible mode (seen classes and UNSEEN) the bets won and lost against it.

    One pass: against anyone but the front-runner itself the bet is on the front-runner; against the front-runner it is on the
    second. `wins` counts votes for the front-runner; what differs for a class while it was in front is kept in `shift`.
    """
    counts: dict[int, int] = {}
    shift: Counter[int] = Counter()
    lost: Counter[int] = Counter()
    front = second = None
    wins = 0
    for vote in classes:
        if vote == NO_ANSWER:
            continue
        if front is not None:
            if vote == front:
                wins += 1
                shift[front] -= 1  # against the front-runner its own vote is no win
            elif vote == second:
                shift[front] += 1
            if vote != front or second is not None:
                lost[vote] += 1  # somebody else led, so there was a bet against `vote`
        counts[vote] = counts.get(vote, 0) + 1
        if front is None:
            front = vote
        elif vote != front:
            if counts[vote] > counts[front]:
                front, second = vote, front
            elif second is None or (vote != second and counts[vote] > counts[second]):
                second = vote
    bets = {c: (wins + shift[c], lost[c]) for c in counts}
    return front, {**bets, UNSEEN: (wins, 0)}
