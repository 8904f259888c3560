"""Length penalty: another reward, with right answers paid less the longer they are. The baseline that MRT is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ttrl.config.schema import Plug
from ttrl.protocols import LabelledReward, Reward, RewardContext, Stateful
from ttrl.registry import build
from ttrl.rewards.reader import AnswerReader, reader_of
from ttrl.together import StepReward
from ttrl.types import Group, Scored

EPS = 1e-7
"""Added to the standard deviation of the lengths."""


def length_factors(lengths: npt.ArrayLike, paid: npt.ArrayLike, coefficient: float) -> npt.NDArray[np.float64]:
    """[V] 1 - coefficient * sigmoid((length - mean) / std), mean and (n - 1) std over the paid rollouts (arXiv 2502.04463).

    Golden: lengths 10, 20, 30 all paid, coefficient 0.4 -> 1 - 0.4 * [.268941, .5, .731059]. One paid rollout, or equal
    lengths: sigmoid(0), so a factor of 1 - coefficient / 2 for all, which says nothing about length. Nobody paid: all 1.
    """
    tokens, mask = np.asarray(lengths, np.float64), np.asarray(paid, np.bool_)
    if not mask.any():
        return np.ones_like(tokens)
    chosen = tokens[mask]
    spread = float(chosen.std(ddof=1)) if chosen.size > 1 else 0.0
    # clipped for unpaid rollouts far outside, whose factor multiplies 0 anyway
    z = np.clip((tokens - chosen.mean()) / (spread + EPS), -50.0, 50.0)
    return np.asarray(1.0 - coefficient / (1.0 + np.exp(-z)))


class LengthPenalty:
    """r_i = r'_i * factor_i, r' the reward `of` with `options`; factors as in `length_factors` over rollouts with r' > 0.

    Everything else - label, votes, state, labels of `gold` - is that of the inner reward. `coefficient` in (0, 1): a right answer
    always earns more than a wrong one.
    """

    def __init__(
        self, *, of: str = "majority_vote", options: dict[str, Any] | None = None, coefficient: float = 0.2
    ) -> None:
        if not 0.0 < coefficient < 1.0:
            raise ValueError(f"coefficient must lie between 0 and 1, got {coefficient}")
        self._inner: Reward = build("reward", Plug.model_validate({"use": of, "with": options or {}}))
        if isinstance(self._inner, StepReward):
            raise ValueError(
                f"length_penalty scores one group at a time, but {of!r} looks at the groups of a step together"
            )
        self._coefficient = coefficient
        self.needs: frozenset[str] = self._inner.needs
        self.min_votes: int = self._inner.min_votes
        self.reader = reader_of(self._inner, AnswerReader("math", {}))

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        scored = self._inner(group, ctx)
        if bool((scored.rewards < 0).any()):
            raise ValueError("length_penalty scales rewards between 0 and 1; the inner reward paid less than 0")
        lengths = [len(rollout.token_ids) for rollout in group.rollouts]
        factors = length_factors(lengths, scored.rewards > 0, self._coefficient)
        paid = scored.rewards > 0
        mean = float(np.mean([n for n, p in zip(lengths, paid, strict=True) if p])) if paid.any() else 0.0
        return replace(
            scored,
            rewards=(scored.rewards * factors).astype(np.float32),
            metrics={**scored.metrics, "paid_length": mean},
        )

    def state(self) -> Mapping[str, Any]:
        """Of the inner reward."""
        return self._inner.state() if isinstance(self._inner, Stateful) else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Back to what `state` returned."""
        if isinstance(self._inner, Stateful):
            self._inner.load_state(state)

    def take_labels(self, labels: Mapping[str, str]) -> None:
        """Passed on to an inner reward that needs them."""
        if isinstance(self._inner, LabelledReward):
            self._inner.take_labels(labels)
