"""Acting on judgements: freeze prompts, lower the learning rate, go back to healthy weights, stop; and which weights to hand over.

The count of steps and of weight versions goes on after a rollback, so no seed comes twice and no rollout passes for fresh that is
not. What a keeper knows is part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ttrl.contract import Blame
from ttrl.errors import TtrlError
from ttrl.guards.base import Decode, Guard, Judgement, Level, Policy, Score, View
from ttrl.guards.snapshots import Snapshot, SnapshotStore, pick
from ttrl.metrics import MetricSet
from ttrl.protocols import Stateful, Trainer
from ttrl.types import Scored, StepStats


@dataclass(slots=True)
class Held:
    """All that a keeper remembers. JSON-able."""

    best: Snapshot | None = None
    """by score"""
    latest: Snapshot | None = None
    target: int | None = None
    """step of the snapshot gone back to last, until there is a new one"""
    weights: int = 0
    """number of the weights the trainer has"""
    made: int = 0
    """how many weights were ever made"""
    grad_norm: float | None = None
    score: Score | None = None
    """of the last judged weights"""
    level: Level = Level.OK
    """of the weights the trainer has: the worst that was said of them"""
    actions: int = 0
    lr_factor: float = 1.0
    frozen: list[str] = field(default_factory=list)
    kept: Snapshot | None = None
    """what was handed over at the end"""
    stopped: str = ""
    """why the run was ended"""


_HELD = TypeAdapter(Held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """What follows for this step."""

    train: bool = True
    restored: bool = False
    """the trainer has earlier weights now, and the engines must be given them"""
    moved: bool = False
    """they differ from those the engines have"""
    stop: str = ""
    """why the run must end, after this step was written down"""
    events: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset()

    def admitted(self, scored: Sequence[Scored], metrics: MetricSet) -> list[Scored]:
        """Groups that may go on to the gates; the others are counted under dropped/."""
        if not self.train:
            metrics.sum("dropped/guard", len(scored))
            return []
        kept = [item for item in scored if item.group.prompt.id not in self.frozen]
        if len(kept) < len(scored):
            metrics.sum("dropped/frozen", len(scored) - len(kept))
        return kept


class Keeper:
    """The guards of a run, and the hands that do what they ask for. Without guards it does nothing."""

    def __init__(
        self,
        guards: Mapping[str, Guard],
        trainer: Trainer,
        memory: Mapping[str, Stateful],
        decode: Decode,
        checkpoints: Path,
    ) -> None:
        self._guards, self._trainer, self._memory, self._decode = dict(guards), trainer, dict(memory), decode
        self._store = SnapshotStore(checkpoints)
        self._held = Held()
        self._sampled = 0
        """number of the weights that drew the groups of the step: those that the engines have"""
        acting = [guard.policy for guard in self._guards.values() if guard.policy.action != "warn"]
        self._every = min((policy.snapshot_every for policy in acting), default=0)
        """0: guards that only warn leave the run as it would be without them"""

    @property
    def acts(self) -> bool:
        """Some guard does more than warn."""
        return self._every > 0

    @property
    def stopped(self) -> str:
        """Why a guard ended the run, also after a resume; empty when none did."""
        return self._held.stopped

    def rule(self, step: int, scored: Sequence[Scored], metrics: MetricSet) -> Ruling:
        """Judge the weights that drew these groups, and act. Called once per step, before anything is trained on."""
        if not self._guards:
            return Ruling()
        self._sampled = self._held.weights
        view, judged = self._view(step, scored), {}
        for name, guard in self._guards.items():
            with Blame("guards", name, f"all of step {step}"):
                judged[name] = guard.judge(view)
        self._held.level = max(self._held.level, *(judgement.level for judgement in judged.values()))
        self._held.score = next((j.score for j in judged.values() if j.score is not None), None)
        self._thaw(scored)
        if self._held.level is Level.OK and self._is_due(step):
            self._snapshot(step)
        return self._decide(step, judged, metrics)

    def inspect(self, step: int, scored: Sequence[Scored], stats: StepStats | None, metrics: MetricSet) -> Ruling:
        """Judge the weights that the update of this step made, and act, before the engines get them."""
        held = self._held
        held.grad_norm = stats.grad_norm if stats is not None else None
        if not self._guards or stats is None or stats.grad_norm == 0:
            return Ruling()
        held.made += 1
        held.weights, held.level = held.made, Level.OK
        view, judged = self._view(step, scored), {}
        for name, guard in self._guards.items():
            with Blame("guards", name, f"the update of step {step}"):
                judged[name] = guard.inspect(view)
        held.level = max(judgement.level for judgement in judged.values())
        return self._decide(step, judged, metrics)

    def _decide(self, step: int, judged: Mapping[str, Judgement], metrics: MetricSet) -> Ruling:
        """The first alarm is acted on; warnings are only told."""
        warned = [f"{name} warns: {j.reason}" for name, j in judged.items() if j.level is Level.WARN]
        alarmed = next((name for name, j in judged.items() if j.level is Level.ALARM), None)
        ruling = Ruling(frozen=frozenset(self._held.frozen))
        if alarmed is not None:
            ruling = self._act(alarmed, self._guards[alarmed].policy, step, judged[alarmed])
        self._measure(judged, metrics)
        return replace(ruling, events=(*warned, *ruling.events))

    def settle(self, step: int) -> Ruling:
        """At the end: the trainer gets the weights to hand over, the best healthy ones. May be called again."""
        held = self._held
        if not self.acts or held.kept is not None:
            return Ruling()
        candidates = {s.step: s for s in (held.best, held.latest) if s is not None}
        current = Snapshot(step=step, weights=held.weights, lr_factor=held.lr_factor, score=held.score)
        same = next((s for s in candidates.values() if s.weights == held.weights), None)
        if same is not None:
            current = same
        elif held.level is Level.OK:
            candidates[step] = current
        usable = [s for s in candidates.values() if s.weights == held.weights or self._store.open(s) is not None]
        if not usable:
            raise TtrlError(
                "there is no undamaged healthy snapshot to hand over; resume from a checkpoint, or start again"
            )
        kept = pick(usable)
        restored = kept.weights != held.weights
        if restored:
            self._restore(kept, step)
        held.kept = kept
        self._store.collect([kept])
        score = "no prompt came twice, so it has no score" if kept.score is None else f"score {kept.score.value:+.3f}"
        event = f"the model handed over is that of {kept.step} completed steps ({score})"
        return Ruling(restored=restored, moved=restored, events=(event,))

    def stop(self, reason: str) -> None:
        """A resumed run stops again."""
        self._held.stopped = reason

    def summary(self) -> dict[str, Any] | None:
        """For summary.json; None without guards."""
        if not self._guards:
            return None
        held = self._held
        kept = held.kept
        return {
            "model_after_steps": kept.step if kept is not None else None,
            "score": None
            if kept is None or kept.score is None
            else {"value": kept.score.value, "error": kept.score.error},
            "actions": held.actions,
            "lr_factor": held.lr_factor,
            "frozen": len(held.frozen),
        }

    def state(self) -> Mapping[str, Any]:
        """`needs` are the steps of the snapshots that a run resumed from here may ask for."""
        if not self._guards:
            return {}
        snapshots = (self._held.best, self._held.latest, self._held.kept)
        return {
            "held": _HELD.dump_python(self._held, mode="json"),
            "needs": sorted({s.step for s in snapshots if s is not None}),
            "guards": {name: dict(guard.state()) for name, guard in self._guards.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        if not self._guards:
            return
        self._held = _HELD.validate_python(state["held"])
        for name, guard in self._guards.items():
            guard.load_state(state["guards"][name])

    def forget_from(self, step: int) -> None:
        """A run continues after `step` steps: snapshots of later steps are of steps that will be done again."""
        self._store.forget_from(step)

    def _view(self, step: int, scored: Sequence[Scored]) -> View:
        return View(
            step=step, scored=scored, grad_norm=self._held.grad_norm, score=self._trainer.score, decode=self._decode
        )

    def _is_due(self, step: int) -> bool:
        held = self._held
        changed = held.latest is None or held.latest.weights != held.weights
        return self.acts and changed and (held.latest is None or step % self._every == 0)

    def _snapshot(self, step: int) -> None:
        """Best and latest stay; what they replace goes."""
        held = self._held
        self._store.save(step, {name: dict(part.state()) for name, part in self._memory.items()}, self._trainer.save)
        new = Snapshot(step=step, weights=held.weights, lr_factor=held.lr_factor, score=held.score)
        held.latest, held.target = new, None
        rival = held.best.score if held.best is not None else None
        if rival is None or (new.score is not None and new.score.value > rival.value):
            held.best = new
        self._store.collect([s for s in (held.best, held.latest) if s is not None])

    def _act(self, name: str, policy: Policy, step: int, judgement: Judgement) -> Ruling:
        """One alarm, one action."""
        held, alarm = self._held, f"{name} ALARM: {judgement.reason}"
        frozen = frozenset(held.frozen)
        if policy.action == "warn":
            return Ruling(frozen=frozen, events=(alarm,))
        if policy.action == "abstain":
            held.frozen = sorted(frozen | judgement.prompts)
            event = f"{alarm}; {len(held.frozen)} prompts are frozen"
            held.actions += 1
            return Ruling(frozen=frozenset(held.frozen), events=(event,))
        if policy.action == "stop" or held.actions >= policy.limit:
            spent = "" if policy.action == "stop" else f" after {held.actions} x {policy.action}"
            return Ruling(
                train=False, frozen=frozen, events=(f"{alarm}; the run stops{spent}",), stop=f"{alarm}{spent}"
            )
        held.actions += 1
        if policy.action == "lower_lr":
            held.lr_factor *= policy.lr_factor
            self._trainer.scale_lr(policy.lr_factor)
            return Ruling(frozen=frozen, events=(f"{alarm}; the learning rate is now x{held.lr_factor:g}",))
        return self._roll_back(policy, step, alarm)

    def _roll_back(self, policy: Policy, step: int, alarm: str) -> Ruling:
        """To the latest healthy snapshot; to the best one when the latest has just failed."""
        held = self._held
        lr_factor = held.lr_factor * policy.lr_factor
        choices = [s for s in (held.latest, held.best) if s is not None]
        if held.latest is not None and held.target == held.latest.step:
            choices.reverse()
        target = next((s for s in choices if self._store.open(s) is not None), None)
        if target is None:
            raise TtrlError(f"{alarm}; and there is no undamaged healthy snapshot to go back to")
        self._restore(target, step)
        self._trainer.scale_lr(lr_factor / target.lr_factor)
        held.lr_factor, held.target, held.level = lr_factor, target.step, Level.OK
        held.score = target.score
        event = f"{alarm}; back to the weights of {target.step} completed steps, learning rate now x{lr_factor:g}"
        return Ruling(train=False, restored=True, moved=target.weights != self._sampled, events=(event,))

    def _restore(self, snapshot: Snapshot, step: int) -> None:
        """Weights, moments, learning rate, and what the parts of the run and the guards remember."""
        opened = self._store.open(snapshot)
        assert opened is not None
        folder, state = opened
        self._trainer.restore(folder, version=max(self._trainer.version, step) + 1)
        for name, part in self._memory.items():
            part.load_state(state[name])
        for guard in self._guards.values():
            guard.went_back(snapshot.step)
        self._held.weights = snapshot.weights

    def _thaw(self, scored: Sequence[Scored]) -> None:
        """A frozen prompt is free again at the first visit at which nothing is said against the weights."""
        if self._held.level is Level.OK:
            seen = {item.group.prompt.id for item in scored}
            self._held.frozen = [prompt for prompt in self._held.frozen if prompt not in seen]

    def _measure(self, judged: Mapping[str, Judgement], metrics: MetricSet) -> None:
        """guard/<signal> and its bound of this step; level 0 ok, 1 warn, 2 alarm."""
        held = self._held
        metrics.max("guard/level", float(max(j.level for j in judged.values())))  # of judge and inspect
        for judgement in judged.values():
            for reading in judgement.readings:
                metrics.max(f"guard/{reading.name}", reading.value)
                metrics.min(f"guard_bound/{reading.name}", reading.alarm if reading.alarm is not None else reading.warn)
            if judgement.score is not None:
                metrics.max("guard/score", judgement.score.value)
        metrics.max("guard/actions", float(held.actions))
        metrics.max("guard/frozen", float(len(held.frozen)))
        metrics.min("guard/lr_factor", held.lr_factor)
        if held.latest is not None:
            metrics.max("guard/healthy_step", float(held.latest.step))
