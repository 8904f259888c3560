"""RESTRAIN (arXiv 2510.02172): every answer is a pseudo-label, weighted by its votes; groups without agreement are held back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import Ballot, Values, VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.types import NO_ANSWER, Group, Scored

EPS = 1e-6
"""Added to the standard deviation, as in the advantage `grpo`."""


class Restrain:
    """r_i = u sum_a w_a A_i(a), the weighted sum of the advantages under every answer taken as the label.

        A_i(a) = (1[a_i = a] - f_a) / (s_a + 1e-6)     f_a = n(a) / V, s_a the (n - 1) standard deviation of 1[a_i = a]
        w_a    = g(f_a) / sum_b g(f_b)                 g(f) = exp(-(f - centre)^2 / (2 width^2))

    V counts all rollouts, also those without an answer. These r sum to 0 and are advantages already: use the advantage
    `dr_grpo`, which leaves them as they are (`grpo` would divide by their spread once more). With one update per step the gradient
    is then that of the published weighted sum of losses.
    Groups whose leading answer has fewer than `least` votes: all rewards 0, and `penalty` is taken from the advantage of every token
    (`Scored.token_rewards`, because a group mean would remove it from the rewards). Groups in which nobody answered abstain.
    `prompt_weights`: u = g(f of the leader) at the prompt's first visit of this run, remembered; else 1. Published: from samples of the
    frozen start model. `centre`, `width`, `least` and `penalty` have no published values that we know: the defaults are ours.
    Golden: 5 5 5 7, centre 1, width .5 -> w .731059 .268941, r .231059 .231059 .231059 -.693176.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        centre: float = 1.0,
        width: float = 0.5,
        least: int = 3,
        penalty: float = 1.0,
        prompt_weights: bool = False,
    ) -> None:
        if not 0.0 <= centre <= 1.0 or not 0.0 < width < math.inf:
            raise ValueError(f"restrain needs a centre in [0, 1] and a width above 0, got {centre}, {width}")
        if least < 1 or not 0.0 <= penalty < math.inf:
            raise ValueError(f"restrain needs least >= 1 and a finite penalty >= 0, got {least}, {penalty}")
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule()
        self._centre, self._width, self._least, self._penalty = centre, width, least, penalty
        self._remembers = prompt_weights
        self._weights: dict[str, float] = {}

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = ballot.decide(self._rule, ctx.seed)
        votes = max(decision.counts, default=0)
        trusted = votes >= self._least
        weight = self._prompt_weight(group, votes)
        scored = ballot.scored(
            weight * self._advantages(ballot) if trusted else np.zeros(len(ballot.classes)), votes > 0,
            label=ballot.form(decision.winner) if trusted else None, share=decision.share, margin=decision.margin,
            trace=(decision.reason, f"{votes} votes for the leader: " + ("soft labels" if trusted else "held back")),
            metrics={"held_back": float(not trusted and votes > 0), "vote_confidence": decision.confidence},
        )  # fmt: skip
        if trusted or not votes:
            return scored
        fines = tuple(np.full(len(r.token_ids), -weight * self._penalty, np.float32) for r in group.rollouts)
        return replace(scored, token_rewards=fines)

    def _advantages(self, ballot: Ballot) -> Values:
        """[V], the same for rollouts of the same answer."""
        counts = np.bincount([c for c in ballot.classes if c != NO_ANSWER], minlength=len(ballot.forms))
        size = len(ballot.classes)
        shares = counts / size
        exponents = -((shares - self._centre) ** 2) / (2 * self._width**2)
        weights = np.exp(exponents - exponents.max())  # a narrow g is 0 in floating point for every answer
        weights /= math.fsum(weights)
        scales = weights / (np.sqrt(shares * (1 - shares) * size / max(1, size - 1)) + EPS)
        scales[counts == size] = 0.0  # all agree: no advantage under this label
        below = math.fsum(scales * shares)
        return np.asarray([(0.0 if c == NO_ANSWER else float(scales[c])) - below for c in ballot.classes])

    def _prompt_weight(self, group: Group, votes: int) -> float:
        if not self._remembers:
            return 1.0
        share = votes / len(group.rollouts)
        weight = math.exp(-((share - self._centre) ** 2) / (2 * self._width**2))
        return self._weights.setdefault(group.prompt.id, weight)

    def state(self) -> dict[str, Any]:
        """Prompt id -> weight; empty without `prompt_weights`."""
        return {"weights": dict(self._weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Back to what `state` returned."""
        self._weights = dict(state["weights"])
