"""What the votes of a tree are worth: leaves that share a prefix agree more often than independent rollouts do.

`leaf` counts every leaf (as ETTRL publishes it), `tree` lets the leaves of a tree share one vote, `effective` counts every leaf for
the label and only as many independent votes as they are worth for the confidence. Without forks all three are the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ttrl.types import NO_ANSWER, Rollout, tree_roots

TreeVotes = Literal["leaf", "tree", "effective"]
Weights = npt.NDArray[np.float64]


def tree_worth(
    kind: str, rollouts: Sequence[Rollout], classes: Sequence[int], weights: Weights | None
) -> tuple[Weights | None, Weights | None]:
    """Weights of the votes [V] and how many independent votes each is worth [V], from the weights so far; None: plain votes.

    `tree`: the weights of the answers of a tree add up to 1, and it is worth one vote. `effective`: weights stay, and a vote of a
    tree with m answers is worth 1 / (1 + (m - 1) rho) (design effect of a cluster sample), rho from `agreement`. Raises ValueError
    for an unknown kind.
    """
    if kind not in ("leaf", "tree", "effective"):
        raise ValueError(f"tree_votes must be leaf, tree or effective, got {kind!r}")
    if kind == "leaf" or all(rollout.fork is None for rollout in rollouts):
        return weights, None
    roots, worth = tree_roots(rollouts), np.zeros(len(rollouts))
    own = np.ones(len(rollouts)) if weights is None else weights
    shared = np.zeros(len(rollouts))
    rho = agreement(roots, classes)
    for root in set(roots):
        members = [i for i, r in enumerate(roots) if r == root and classes[i] != NO_ANSWER]
        if kind == "effective":
            worth[members] = 1 / (1 + (len(members) - 1) * rho)
        elif total := math.fsum(own[i] for i in members):
            shared[members] = own[members] / total
            worth[members] = 1 / len(members)
    if kind == "tree":
        return shared, worth
    return weights, worth if weights is None else worth * kish(
        [own[i] for i, c in enumerate(classes) if c != NO_ANSWER]
    )


def agreement(roots: Sequence[int], classes: Sequence[int]) -> float:
    """Intra-tree correlation of answers, in [0, 1]: how far two leaves of a tree agree more often than two of different trees.

        rho = (P_in - P_out) / (1 - P_out)        P: share of pairs of answers that are equal

    1 where it cannot be told: one tree only, or one answer only. 0 where no tree has two answers. Exact in any order of the votes.
    Golden: trees AAA BBB -> 1 (worth 2 votes of 6); AAB ABA -> P_in 1/3, P_out 5/9 -> 0; AAB AAA -> P_in 2/3, P_out 2/3 -> 0.
    """
    valid = [(r, c) for r, c in zip(roots, classes, strict=True) if c != NO_ANSWER]
    cells, trees, answers = Counter(valid), Counter(r for r, _ in valid), Counter(c for _, c in valid)
    pairs_in, equal_in = _pairs(trees), _pairs(cells)
    pairs_out, equal_out = _pairs({0: len(valid)}) - pairs_in, _pairs(answers) - equal_in
    if pairs_in == 0:
        return 0.0
    if pairs_out == 0 or equal_out == pairs_out:
        return 1.0
    outside = equal_out / pairs_out
    return min(1.0, max(0.0, (equal_in / pairs_in - outside) / (1 - outside)))


def kish(weights: Sequence[float]) -> float:
    """Effective number of votes per vote, in (0, 1]: (sum w)^2 / (n sum w^2). Relative weights cannot overflow when squared."""
    largest = max(weights, default=0.0)
    if largest == 0.0:
        return 1.0
    relative = [w / largest for w in weights]
    return math.fsum(relative) ** 2 / math.fsum(w * w for w in relative) / len(relative)


def _pairs(counts: Counter[int] | Counter[tuple[int, int]] | dict[int, int]) -> int:
    return sum(n * (n - 1) // 2 for n in counts.values())
