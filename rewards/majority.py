"""Majority-vote reward (TTRL, arXiv 2504.16084): the plurality answer is the label; whoever gave it is paid 1, the rest 0.

Differences from the reference implementation, on purpose: votes are counted over equivalence classes, not strings; no answer,
empty text and truncated text never vote; ties and groups without an answer abstain instead of electing whatever came first.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.vote import decide
from ttrl.types import NO_ANSWER, Group, Scored


class MajorityVote:
    """r_i = 1 if rollout i is in the elected class, else 0. Rollouts without an answer get 0 and are trained on.

    Golden example: answers 5, 5, 5, 7 -> label 5, rewards [1, 1, 1, 0], share 0.75, margin 0.5.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        ties: Literal["abstain", "random"] = "abstain",
        truncated_votes: bool = False,
        min_share: float = 0.0,
        min_margin: float = 0.0,
    ) -> None:
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._ties: Literal["abstain", "random"] = ties
        self._min_share, self._min_margin = min_share, min_margin

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        answers = self.reader.read(group.rollouts)
        grades = self.reader.grade(answers)
        numbered, forms = grades.classes, grades.forms
        decision = decide(
            numbered, ties=self._ties, min_share=self._min_share, min_margin=self._min_margin, tie_seed=ctx.seed
        )
        label = None if decision.winner is None else forms[decision.winner]
        elected = np.asarray([label is not None and c == decision.winner and c != NO_ANSWER for c in numbered])
        return Scored(
            group=group,
            rewards=elected.astype(np.float32),
            train=group.trainable & (label is not None),
            classes=np.asarray(numbered, dtype=np.int32),
            answers=answers,
            label=label,
            share=decision.share,
            margin=decision.margin,
            metrics={"grading_timeouts": grades.timeouts, "grading_gated": grades.gated},
            trace=(decision.reason,),
        )
