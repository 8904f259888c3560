"""The collapse sentinel: signals from votes, shape and a frozen view, combined into one judgement of the weights.

An update is judged by the frozen view before anybody samples from it, and by everything else when it has drawn a step. A signal
past its alarm bound alarms, and so do at least CHORUS different signals past their warn bounds in PATIENCE steps in a row. How often
that happens to healthy runs is measured in docs/guards.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from ttrl.guards.base import Action, Judgement, Level, Policy, Reading, Score, View
from ttrl.guards.frozen import Probe, choose, falls_of, frozen_view
from ttrl.guards.shape import WINDOW, batch_of, length_against_share, nothing_to_learn, reward_jump
from ttrl.guards.signals import Batch, fewer_answers, flips, forgotten, shared_answer, silent
from ttrl.guards.votes import Visit, Votes, visit_of, votes_of

CHORUS, PATIENCE = 3, 2
KEPT_FALLS = 256
"""Updates whose falls are kept, so that after a rollback the next update is compared with the weights that are back."""
SIGNALS = (
    "flips_first", "flips_last", "forgotten", "shared_answer", "fewer_answers", "silent", "shorter", "longer", "surer", "noisier",
    "reward_jump", "no_advantage", "gradient_jump", "update_drop", "unlikely", "shortcut",
)  # fmt: skip


@dataclass(slots=True)
class Memory:
    """All that the sentinel remembers. JSON-able; part of every checkpoint."""

    start: Batch | None = None
    """of the first step, which the start model drew"""
    probes: tuple[Probe, ...] = ()
    falls: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    """(steps complete, fall of the log-prob of each probe) of the weights after the last updates"""
    first: dict[str, Visit] = field(default_factory=dict)
    """per prompt, the first visit that had a leader"""
    last: dict[str, Visit] = field(default_factory=dict)
    rewards: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, mean, standard error) of the last steps"""
    gradients: list[tuple[int, float]] = field(default_factory=list)
    """(step, norm) of the last updates"""
    looked: int = 0
    """warnings of the frozen view about the last update"""
    chorus: int = 0
    """steps in a row with many warnings"""


_MEMORY = TypeAdapter(Memory)


class Sentinel:
    """Judges the weights of each step. See docs/guards.md for the signals and their bounds.

    action: what an alarm leads to. lr_factor, limit, snapshot_every: see `Policy`. probes: how many rollouts of the start model
    are scored again in each step, up to probe_tokens tokens each (0 probes: no frozen view). z: standard errors for warn and
    alarm. ignore: signals that are neither computed into the judgement nor shown.
    """

    def __init__(
        self, *, action: Action = "rollback", lr_factor: float = 0.1, limit: int = 3, snapshot_every: int = 5, probes: int = 16,
        probe_tokens: int = 1024, z: tuple[float, float] = (3.0, 4.0), ignore: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.policy = Policy(action=action, lr_factor=lr_factor, limit=limit, snapshot_every=snapshot_every)
        if probes < 0 or probe_tokens < 1:
            raise ValueError(f"probes must be at least 0 and probe_tokens at least 1, got {probes} and {probe_tokens}")
        if not 0 < z[0] <= z[1]:
            raise ValueError(f"z must be (warn, alarm) with 0 < warn <= alarm, got {z}")
        unknown = set(ignore) - set(SIGNALS)
        if unknown:
            raise ValueError(f"ignore names unknown signals {sorted(unknown)}; there are {', '.join(SIGNALS)}")
        self._probes, self._probe_tokens, self._z, self._ignore = probes, probe_tokens, z, frozenset(ignore)
        self._memory = Memory()

    def judge(self, view: View) -> Judgement:
        """The first step is the start model's: it sets what is compared with, and raises nothing."""
        memory, batch = self._memory, batch_of(view.scored)
        votes = [votes_of(item) for item in view.scored]
        score: Score | None = None
        if memory.start is None:
            memory.start = batch
            if self._probes:
                memory.probes = choose(view.scored, self._probes, self._probe_tokens, view.score, view.decode)
            judgement = Judgement(level=Level.OK, score=Score(value=0.0, error=0.0))
        else:
            readings, score = self._readings(view, votes, batch, memory.start)
            judgement = replace(self._combined(readings), score=score)
        if judgement.level is not Level.ALARM:
            self._remember(view, batch, trusted=judgement.level is Level.OK)
        return judgement

    def inspect(self, view: View) -> Judgement:
        """By the frozen view alone."""
        memory = self._memory
        falls, moved = falls_of(memory.probes, view.score)
        before = memory.falls[-1][1] if memory.falls else (0.0,) * len(falls)
        found = [*frozen_view(memory.probes, falls, before), *moved]
        readings = [r for r in found if r.name not in self._ignore]
        memory.falls = [*memory.falls, (view.step + 1, falls)][-KEPT_FALLS:]
        memory.looked = sum(r.level > Level.OK for r in readings)
        return _judged(readings, max((r.level for r in readings), default=Level.OK))

    def went_back(self, step: int) -> None:
        """Forget what was seen after `step`."""
        memory = self._memory
        memory.first = {i: visit for i, visit in memory.first.items() if visit.step <= step}
        memory.last = {i: visit for i, visit in memory.last.items() if visit.step <= step}
        memory.rewards = [entry for entry in memory.rewards if entry[0] <= step]
        memory.gradients = [entry for entry in memory.gradients if entry[0] <= step]
        memory.falls = [entry for entry in memory.falls if entry[0] <= step]
        memory.chorus = memory.looked = 0

    def state(self) -> Mapping[str, Any]:
        return dict(_MEMORY.dump_python(self._memory, mode="json"))

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self._memory = _MEMORY.validate_python(state)

    def _readings(
        self, view: View, votes: Sequence[Votes], batch: Batch, start: Batch
    ) -> tuple[list[Reading], Score | None]:
        memory, z = self._memory, self._z
        lost = forgotten(votes, memory.first, z)
        found: list[Reading | None] = [
            flips(votes, memory.first, z, "flips_first"),
            flips(votes, memory.last, z, "flips_last"),
            lost[0] if lost is not None else None,
            shared_answer(votes, start, z),
            fewer_answers(votes, start),
            silent(batch, start, z),
            *length_against_share(batch, start, z),
            reward_jump(batch, [(mean, error) for _, mean, error in memory.rewards], z),
            *nothing_to_learn(view.scored, view.grad_norm, [norm for _, norm in memory.gradients]),
        ]
        readings = [r for r in found if r is not None and r.name not in self._ignore]
        return readings, lost[1] if lost is not None else None

    def _combined(self, readings: Sequence[Reading]) -> Judgement:
        raised = [r for r in readings if r.level > Level.OK]
        self._memory.chorus = self._memory.chorus + 1 if len(raised) + self._memory.looked >= CHORUS else 0
        level = max((r.level for r in readings), default=Level.OK)
        if self._memory.chorus >= PATIENCE:
            level = Level.ALARM
        return _judged(readings, level)

    def _remember(self, view: View, batch: Batch, *, trusted: bool) -> None:
        """A first visit is compared with for the whole run, so weights that are suspected of something make none."""
        memory = self._memory
        for item in view.scored:
            visit = visit_of(item, view.step)
            if visit is not None:
                memory.last[item.group.prompt.id] = visit
                if trusted:
                    memory.first.setdefault(item.group.prompt.id, visit)
        error = batch.reward_sd / batch.prompts**0.5
        memory.rewards = [*memory.rewards, (view.step, batch.reward, error)][-WINDOW:]
        if view.grad_norm is not None:
            memory.gradients = [*memory.gradients, (view.step, view.grad_norm)][-WINDOW:]


def _judged(readings: Sequence[Reading], level: Level) -> Judgement:
    raised = [r for r in readings if r.level > Level.OK]
    worst = [r for r in raised if r.level is level] or raised
    return Judgement(
        level=level, reason=", ".join(str(r) for r in worst), readings=tuple(readings),
        prompts=frozenset().union(*(r.prompts for r in raised)),
    )  # fmt: skip
