"""What a guard is: it judges weights, when an update made them and when they have drawn a step; acting is the keeper's part.

A guard sees the scored groups of the step before they are trained on, and may score token sequences under the weights that drew
them. It sees no labels: no type here has a field for them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ttrl.types import FloatArray, IntArray, Scored

Action = Literal["warn", "abstain", "lower_lr", "stop", "rollback"]
ACTIONS: tuple[Action, ...] = ("warn", "abstain", "lower_lr", "stop", "rollback")


class Level(enum.IntEnum):
    """How bad it is."""

    OK = 0
    WARN = 1
    ALARM = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One signal of one step. Larger is worse.

    The bounds are those of this step: a bound is the larger of an effect that matters and of what chance makes at the sizes of
    the step, so the value can be compared with them as it is.
    """

    name: str
    value: float
    warn: float
    alarm: float | None
    """None: this signal alone never raises an alarm"""
    prompts: frozenset[str] = frozenset()
    """the prompts that show it, where it is about prompts"""

    def __post_init__(self) -> None:
        assert all(math.isfinite(x) for x in (self.value, self.warn, self.alarm or 0.0)), self

    @property
    def level(self) -> Level:
        if self.alarm is not None and self.value >= self.alarm:
            return Level.ALARM
        return Level.WARN if self.value >= self.warn else Level.OK

    def __str__(self) -> str:
        bound = self.alarm if self.level is Level.ALARM and self.alarm is not None else self.warn
        return f"{self.name} {self.value:.3g} (bound {bound:.3g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How good a state is by a guard's own measure, without labels; 0 is the start model, larger is better."""

    value: float
    error: float
    """standard error"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a guard says of the weights that drew the groups of a step."""

    level: Level
    reason: str = ""
    """why the level is not OK"""
    readings: tuple[Reading, ...] = ()
    prompts: frozenset[str] = frozenset()
    """the prompts that are affected, which action `abstain` freezes"""
    score: Score | None = None


ScoreText = Callable[[IntArray], FloatArray]
"""[T] -> [T - 1] log-probs at temperature 1, in nats, of every token but the first, under the weights that are judged."""
Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a guard is shown of a step."""

    step: int
    scored: Sequence[Scored]
    grad_norm: float | None
    """of the update that made these weights; None when there was none"""
    score: ScoreText
    decode: Decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is done about an alarm."""

    action: Action = "rollback"
    lr_factor: float = 0.1
    """of the learning rate, per action `lower_lr` or `rollback`"""
    limit: int = 3
    """how many times; the alarm after that stops the run"""
    snapshot_every: int = 5
    """steps between snapshots of healthy weights"""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, got {self.action!r}")
        if not 0.0 < self.lr_factor <= 1.0:
            raise ValueError(f"lr_factor must be above 0 and at most 1, got {self.lr_factor}")
        if self.limit < 0 or self.snapshot_every < 1:
            raise ValueError("limit must be at least 0 and snapshot_every at least 1")


class Guard(Protocol):
    """A plug-in of the slot `guards`. A factory gets nothing by position; options are its own."""

    policy: Policy

    def judge(self, view: View) -> Judgement:
        """The weights that drew the groups of the step, before these are trained on. Once per step, in order."""
        ...

    def inspect(self, view: View) -> Judgement:
        """The weights that the update of the step just made (`view.score` is theirs, `view.scored` is what they were trained on),
        before anybody samples from them. Once per update."""
        ...

    def went_back(self, step: int) -> None:
        """The weights are again those that drew the groups of `step`: forget what was seen after it."""

    def state(self) -> Mapping[str, Any]:
        """JSON-able; with it a resumed run judges as the uninterrupted one."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue as the guard that returned `state`."""
