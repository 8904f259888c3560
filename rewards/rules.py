"""Decisions that compare something other than sums of votes. Same result type, same abstentions, stated tie rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ttrl.rewards.vote import TIE_TOLERANCE, Decision
from ttrl.types import NO_ANSWER


def lower_bound(
    classes: Sequence[int], verdicts: Sequence[Sequence[float]], *, alpha: float = 0.1, min_votes: int = 1, min_share: float = 0.0,
    min_margin: float = 0.0,
) -> Decision:  # fmt: skip
    """Pessimistic choice over verifier scores: the class with the largest lower confidence bound (Heimdall, arXiv 2504.10337).

        bound(a) = mean verdict of a - alpha * ln(N * M) / (N_a * M + 1)       N valid votes, N_a of them for a, M verdicts each

    `verdicts` [V][M] in [0, 1]; the same M for everybody. alpha 0 is best-of-N by class, a large alpha is the plurality.
    `share` is the share of votes of the leader, `margin` its bound minus the next bound (the bound itself without a rival).
    Tie rule: equal bounds abstain. Raises ValueError for verdicts that are missing, not finite or ragged.
    Golden (N 8, M 1; votes 6/1/1, means .70/1.0/.1): alpha .1 -> B at .896 (A .6703); alpha .5 -> A at .5515 (B .4801).
    """
    if len(verdicts) != len(classes):
        raise ValueError(f"verdicts for {len(verdicts)} rollouts, but {len(classes)} votes")
    valid = [i for i, c in enumerate(classes) if c != NO_ANSWER]
    if not valid:
        return Decision(winner=None, share=0.0, margin=0.0, counts=(), reason="nobody answered")
    per_vote = {len(verdicts[i]) for i in valid}
    if len(per_vote) != 1 or 0 in per_vote or not all(math.isfinite(v) for i in valid for v in verdicts[i]):
        raise ValueError("every vote needs the same number of finite verdicts, at least one")
    asked = per_vote.pop()
    counts = np.bincount(np.asarray([classes[i] for i in valid], np.int64))
    bounds = []
    for c, votes in enumerate(counts):
        scores = [float(v) for i in valid if classes[i] == c for v in verdicts[i]]
        mean = math.fsum(scores) / len(scores) if scores else -math.inf
        bounds.append(mean - alpha * math.log(len(valid) * asked) / (int(votes) * asked + 1))
    shares = [int(n) / len(valid) for n in counts]
    return _best(bounds, shares, counts, min_votes, min_share, min_margin, what="bound")


def harmonic_mean(
    first: Sequence[int], second: Sequence[int], *, min_votes: int = 2, min_share: float = 0.0, min_margin: float = 0.0
) -> Decision:
    """Two views of one question, for example as asked and paraphrased (Self-Harmony, arXiv 2511.01191).

        score(a) = 2 p(a) q(a) / (p(a) + q(a))       p, q: shares of valid votes in the two views

    An answer that only one wording produces scores 0. Both views number the same classes (classify them together). `share` and
    `margin` are of the scores divided by their sum; `counts` are the votes of both views. Tie rule: equal scores abstain, and so
    does a pair of views without a common answer. Golden: p (.6, .4), q (.2, .8) -> scores (.3, .5333), the second wins.
    """
    views = [[c for c in view if c != NO_ANSWER] for view in (first, second)]
    if not views[0] or not views[1]:
        return Decision(winner=None, share=0.0, margin=0.0, counts=(), reason="nobody answered in one of the views")
    size = max(max(view) for view in views) + 1
    votes = [np.bincount(np.asarray(view, np.int64), minlength=size) for view in views]
    p, q = (v / v.sum() for v in votes)
    scores = np.divide(2 * p * q, p + q, out=np.zeros(size), where=p + q > 0)
    counts = votes[0] + votes[1]
    if not scores.any():
        return Decision(winner=None, share=0.0, margin=0.0, counts=tuple(int(c) for c in counts),
                        reason="the views have no answer in common", scores=tuple(scores.tolist()))  # fmt: skip
    shares = (scores / scores.sum()).tolist()
    return _best(shares, shares, counts, min_votes, min_share, min_margin, what="score", shown=scores.tolist())


def _best(
    scores: Sequence[float], shares: Sequence[float], counts: np.ndarray, min_votes: int, min_share: float, min_margin: float,
    *, what: str, shown: Sequence[float] | None = None,
) -> Decision:  # fmt: skip
    """The class with the largest score, or an abstention."""
    ordered = sorted((s for s in scores if math.isfinite(s)), reverse=True)
    top = ordered[0]
    leaders = [c for c, s in enumerate(scores) if s >= top - TIE_TOLERANCE * max(1.0, abs(top))]
    winner: int | None = leaders[0]
    share, votes = shares[leaders[0]], int(counts[leaders[0]])
    margin = top - (ordered[1] if len(ordered) > 1 else 0.0)
    reason = f"{what} {top:.3f} with {votes} of {int(counts.sum())} valid votes"
    if len(leaders) > 1:
        winner, reason = None, f"{len(leaders)} answers tie with {what} {top:.3f}"
    elif votes < min_votes:
        winner, reason = None, f"the leading answer has {votes} votes, fewer than {min_votes}"
    elif share < min_share or margin < min_margin:
        winner, reason = None, f"share {share:.2f} or margin {margin:.2f} is below {min_share:.2f} / {min_margin:.2f}"
    return Decision(winner=winner, share=share, margin=margin, counts=tuple(int(c) for c in counts), reason=reason,
                    scores=tuple(float(s) for s in (scores if shown is None else shown)))  # fmt: skip
