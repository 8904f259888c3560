"""Optional, for rewards: labels that depend on more than one group of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ttrl.protocols import RewardContext
from ttrl.types import Group, Scored


@runtime_checkable
class StepReward(Protocol):
    """In addition to `ttrl.protocols.Reward`. The training loop hands it all groups of a step at once and never calls it with one;
    the linter, the contract kit and `ttrl solve` still do. What can only offer one group at a time refuses it: modes, the reward
    `length_penalty`, TRL.
    """

    def score_step(self, groups: Sequence[Group], contexts: Sequence[RewardContext]) -> list[Scored]:
        """One Scored per group, in order; `contexts` as a single call would get them."""
        ...
