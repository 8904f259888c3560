"""When groups are drawn and with which weights: in step with training, or ahead of it.

Both flows give the same interface to the loop. The weights of every group are a function of the recipe, never of timing, so a
run is the same whatever the number of workers and however long a step takes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ttrl.errors import EngineError
from ttrl.protocols import Trainer
from ttrl.sync import Published, WeightLink
from ttrl.types import Group, StepStats

Draw = Callable[[int], list[Group]]
"""The groups of a step, from the weights the engines hold now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The groups of one step."""

    groups: list[Group]
    seconds: float
    """of sampling, whether or not training went on meanwhile"""
    state: int
    """How many steps were complete when the weights that drew them were made."""


class Flow(Protocol):
    """What the loop asks for, in this order: groups(s), publish(s + 1), groups(s + 1), ..."""

    def groups(self, step: int) -> Drawn: ...

    def publish(self, state: int, stats: StepStats | None) -> None:
        """`state` steps are complete; `stats` are those of the last one, None when it trained nothing."""
        ...

    def close(self) -> None: ...


class InStep:
    """Exactly on-policy: sample, train, sync, sample, ..."""

    def __init__(self, draw: Draw, link: WeightLink) -> None:
        self._draw, self._link = draw, link

    def groups(self, step: int) -> Drawn:
        started = time.perf_counter()
        return Drawn(groups=self._draw(step), seconds=time.perf_counter() - started, state=step)

    def publish(self, state: int, stats: StepStats | None) -> None:
        """Raises EngineError when the rollouts of the step, or the sync, were not what they should be."""
        if stats is not None:
            self._link.check_on_policy(stats)
            self._link.sync(stats)

    def close(self) -> None:
        """Nothing runs on."""


class Taught:
    """In step, with the votes of the EMA teacher: the policy's rollouts are drawn first, then the engines get the teacher's weights
    for the votes, and the policy's again after training. The trainer's rollouts stay on-policy, which is checked as ever."""

    def __init__(self, own: Draw, votes: Draw, link: WeightLink, trainer: Trainer) -> None:
        self._own, self._votes, self._link, self._trainer = own, votes, link, trainer

    def groups(self, step: int) -> Drawn:
        """Raises EngineError when the teacher's weights did not arrive."""
        started = time.perf_counter()
        own = self._own(step)
        with self._trainer.teaching():
            self._link.sync(None)
        votes = self._votes(step)
        groups = [joined(group, voting) for group, voting in zip(own, votes, strict=True)]
        return Drawn(groups=groups, seconds=time.perf_counter() - started, state=step)

    def publish(self, state: int, stats: StepStats | None) -> None:
        """Also when nothing was trained: the engines must not keep the teacher's weights."""
        if stats is not None:
            self._link.check_on_policy(stats)
        self._link.sync(stats)

    def close(self) -> None:
        """Nothing runs on."""


def joined(own: Group, votes: Group) -> Group:
    """The policy's rollouts as they are, and behind them the teacher's, which never train."""
    first = len(own.rollouts)
    behind = tuple(
        replace(
            r, index=r.index + first, fork=None if r.fork is None else replace(r.fork, parent=r.fork.parent + first)
        )
        for r in votes.rollouts
    )
    trainable = np.concatenate([own.trainable, np.zeros(len(behind), np.bool_)])
    return replace(own, rollouts=(*own.rollouts, *behind), trainable=trainable)


class RunAhead:
    """Sampling of step j uses the weights of state max(j - ahead, b), b the last boundary at or before j.

    A thread draws group after group and waits for the weights it needs; the trainer leaves copies of them behind and goes on. At
    boundaries (evaluations, checkpoints) sampling waits for training: an evaluation needs the engines, and a run resumed from a
    checkpoint is then the same as one that was never stopped.
    """

    def __init__(
        self, draw: Draw, link: WeightLink, *, ahead: int, first: int, steps: int, is_boundary: Callable[[int], bool]
    ) -> None:
        self._draw, self._link = draw, link
        self._ahead, self._first, self._steps, self._boundary = ahead, first, steps, is_boundary
        self._turn = threading.Condition()
        self._waiting: deque[tuple[int, Published | None]] = deque()
        self._ready: deque[Drawn] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._unsynced: StepStats | None = None
        self._thread = threading.Thread(target=self._sample, name="ttrl-sampling", daemon=True)
        self._thread.start()

    def state_for(self, step: int) -> int:
        """Which weights draw the groups of a step."""
        last = next(s for s in range(step, self._first - 1, -1) if s == self._first or self._boundary(s))
        return max(step - self._ahead, last)

    def groups(self, step: int) -> Drawn:
        """Waits for the sampling thread; raises what it raised."""
        if step == self._first or self._boundary(step):
            self._post(step, None)  # the loop has synced, evaluated and stored what it wanted; sampling may go on
        with self._turn:
            self._turn.wait_for(lambda: self._ready or self._error)
            if not self._ready and self._error is not None:  # what was drawn before it went wrong is good
                raise self._error
            drawn = self._ready.popleft()
        assert drawn.state == self.state_for(step)
        return drawn

    def publish(self, state: int, stats: StepStats | None) -> None:
        """A sync at boundaries, while nothing is sampled; a copy for the thread in between, if it will want one."""
        trained = stats or self._unsynced
        if state >= self._steps or self._boundary(state):
            if trained is not None:
                self._link.sync(trained)
            self._unsynced = None
        elif state + self._ahead < self._steps and self.state_for(state + self._ahead) == state:
            self._post(state, self._link.keep(trained) if trained is not None else None)
            self._unsynced = None
        else:
            self._unsynced = trained  # nobody samples from this state; the next one carries the news

    def close(self) -> None:
        """Sampling ends after the batch it is at."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        self._thread.join(timeout=60.0)

    def _post(self, state: int, published: Published | None) -> None:
        with self._turn:
            self._waiting.append((state, published))
            self._turn.notify_all()

    def _sample(self) -> None:
        held = -1
        try:
            for step in range(self._first, self._steps):
                wanted = self.state_for(step)
                if held != wanted:
                    with self._turn:
                        self._turn.wait_for(lambda: self._waiting or self._closed)
                        if self._closed:
                            return
                        held, published = self._waiting.popleft()
                    if held != wanted:
                        raise EngineError(f"step {step} needs the weights of state {wanted}, got those of {held}")
                    if published is not None:
                        self._link.install(published)
                started = time.perf_counter()
                groups = self._draw(step)
                drawn = Drawn(groups=groups, seconds=time.perf_counter() - started, state=wanted)
                with self._turn:
                    if self._closed:
                        return
                    self._ready.append(drawn)
                    self._turn.notify_all()
        except BaseException as error:  # noqa: BLE001 - handed to the loop, which raises it
            with self._turn:
                self._error = error
                self._turn.notify_all()
