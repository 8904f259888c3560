"""Selection for MRT's STaR variant (arXiv 2503.07572): which traces, cut where, are worth imitating. Pure numpy.

A trace is kept up to the cut at which the chance of a right answer was highest, the earliest of several: what came after made no
progress. It is kept only if progress was made at all and an answer forced there was right; that answer completes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttrl.probing import Probed
from ttrl.types import IntArray, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One completion to imitate."""

    prompt_id: str
    prompt_ids: IntArray
    completion_ids: IntArray
    """[T] prefix, termination and a right answer; or the whole rollout."""
    gain: float
    """Progress up to the cut: J_j - J_0."""
    cut: int
    """Tokens of the rollout that were kept."""


def best_stop(chances: Sequence[float] | npt.NDArray[np.float64]) -> int:
    """First index of the largest J [k + 1]. Golden: [.1, .5, .75, .75] -> 2."""
    return int(np.argmax(np.asarray(chances, np.float64)))


def select(
    scored: Scored, probed: Sequence[Probed], termination: IntArray, *, most: int, min_gain: float = 0.0
) -> list[Demonstration]:
    """At most `most` different demonstrations of one group, largest gain first, then the shortest.

    `probed` must hold every cut of its rollouts (`form: episodes`). J_k is the rollout's own reward. A gain of `min_gain` or less
    is no progress. Cut at 0, there is nothing to imitate.
    """
    if scored.probe_rewards is None:
        return []
    per_prefix = len(scored.probe_rewards) // (1 + max(place for p in probed for place in p.places))
    found: dict[bytes, Demonstration] = {}
    for item in probed:
        chances = [*item.chances, float(scored.rewards[item.index])]
        stop = best_stop(chances)
        gain = chances[stop] - chances[0]
        if gain <= min_gain:
            continue
        whole = stop == len(item.cuts)
        cut = len(item.rollout.token_ids) if whole else item.cuts[stop]
        if whole:
            completion = item.rollout.token_ids
        else:
            first = item.places[stop] * per_prefix
            right = int(np.flatnonzero(scored.probe_rewards[first : first + per_prefix] > 0)[0])  # one is: J > J_0 >= 0
            answer = scored.group.probes[first + right].token_ids
            completion = np.concatenate([item.rollout.token_ids[:cut], termination, answer])
        found.setdefault(
            completion.tobytes(),
            Demonstration(
                prompt_id=scored.group.prompt.id, prompt_ids=scored.group.prompt.token_ids, completion_ids=completion,
                gain=gain, cut=cut,
            ),
        )  # fmt: skip
    return sorted(found.values(), key=lambda d: (-d.gain, len(d.completion_ids), d.completion_ids.tobytes()))[:most]
