"""The stabilizers of a recipe around the updates of one trainer: who is asked, in which order, and what they remember on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttrl.errors import ConfigError
from ttrl.hooks import (
    START,
    AfterUpdate,
    AtStart,
    BeforeUpdate,
    GradientTerm,
    Memory,
    Part,
    Remembers,
    SquaredGradients,
    Stabilizer,
    Teacher,
    Update,
)
from ttrl.metrics import MetricSet


class Access(Protocol):
    """How a back-end shows its trained weights."""

    def parts(self, *, gradients: bool = False) -> list[Part]:
        """Fresh views, in the same order every time; with `gradients`, those of the coming update too."""
        ...

    def forget(self) -> None:
        """The optimizer is as new."""
        ...

    def publish(self) -> None:
        """What was written to parts is what the model computes with. A collective where there are ranks."""
        ...


class Around:
    """The one caller of stabilizers. Every method is cheap when no stabilizer asks for it."""

    def __init__(self, stabilizers: Sequence[Stabilizer], seed: int, access: Access) -> None:
        self._stabilizers, self._seed, self._access = stabilizers, seed, access
        self._start: dict[str, Tensor] | None = None
        self.may_stand = False
        """In this step an update was vetoed, or all weights went back to the start: they need not differ from before."""
        self._update: Update | None = None
        self._metrics = MetricSet()
        self._allowed = True
        if any(START in stabilizer.needs for stabilizer in stabilizers):
            self._start = {part.name: part.weights.clone() for part in access.parts()}
        self._tell_start()

    @property
    def active(self) -> bool:
        """Some stabilizer wants to see updates."""
        kinds = (BeforeUpdate, AfterUpdate, GradientTerm)
        return any(isinstance(stabilizer, kinds) for stabilizer in self._stabilizers)

    def begin_step(self) -> None:
        """What was said about the last step is forgotten."""
        self.may_stand = False

    @torch.no_grad()
    def add_gradient(self, metrics: MetricSet) -> float:
        """Terms that depend on weights alone: their value; their gradients are added in place."""
        terms = [s for s in self._stabilizers if isinstance(s, GradientTerm)]
        return float(sum(term.add_gradient(self._view(gradients=True), metrics) for term in terms))

    def open(self, step: int, number: int, loss: float, entropy: float, metrics: MetricSet) -> None:
        """An update is coming, whose norm is not known yet; stabilizers write to `metrics`."""
        self._update = Update(seed=self._seed, step=step, number=number, loss=loss, entropy=entropy, grad_norm=math.nan)
        self._metrics, self._allowed = metrics, True

    def allows(self, grad_norm: float) -> bool:
        """False when a stabilizer vetoes. All are asked, so that each sees every update."""
        assert self._update is not None
        update = replace(self._update, grad_norm=grad_norm)
        asked = [s.before_update(update, self._metrics) for s in self._stabilizers if isinstance(s, BeforeUpdate)]
        self._allowed = all(asked)
        self.may_stand |= not self._allowed
        return self._allowed

    @torch.no_grad()
    def close(self, grad_norm: float) -> None:
        """After an update that was made, stabilizers act, and the model is given what they wrote."""
        assert self._update is not None
        acting = [s for s in self._stabilizers if isinstance(s, AfterUpdate)] if self._allowed else []
        for stabilizer in acting:
            view = self._view()
            stabilizer.after_update(replace(self._update, grad_norm=grad_norm), view, self._metrics)
            self.may_stand |= view.all_restored
            if view.was_reset:
                self._tell_start()
        if acting:
            self._access.publish()

    def _view(self, *, gradients: bool = False) -> View:
        return View(self._access, self._start, gradients=gradients)

    @torch.no_grad()
    def _tell_start(self) -> None:
        for stabilizer in self._stabilizers:
            if isinstance(stabilizer, AtStart):
                stabilizer.at_start(self._view())

    @property
    def squares_wanted(self) -> int:
        """Rollouts on which squared gradients have to be measured before the next update."""
        return max((s.rollouts_wanted for s in self._stabilizers if isinstance(s, SquaredGradients)), default=0)

    def give_squares(self, measure: Callable[[int], tuple[dict[str, Tensor], int]]) -> None:
        """`measure` as `fisher_pass.squared_gradients`, for a number of rollouts."""
        for stabilizer in self._stabilizers:
            if isinstance(stabilizer, SquaredGradients) and stabilizer.rollouts_wanted:
                stabilizer.take_squares(*measure(stabilizer.rollouts_wanted))

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """A context in which the model computes with the teacher's weights."""
        teacher = next((s for s in self._stabilizers if isinstance(s, Teacher)), None)
        assert teacher is not None, "this recipe has no teacher"
        with torch.no_grad():
            own = {part.name: part.weights.clone() for part in self._access.parts()}
            self._write(lambda name: teacher.teacher_weights(name))
        try:
            yield
        finally:
            with torch.no_grad():
                self._write(lambda name: own[name])

    def _write(self, source: Callable[[str], Tensor]) -> None:
        for part in self._access.parts():
            part.weights.copy_(source(part.name))
        self._access.publish()

    def save(self, folder: Path, prefix: str = "") -> None:
        """<prefix>stabilizers.safetensors and .json, when a stabilizer remembers something."""
        memories = {i: s.memory() for i, s in self._remembering().items()}
        if not memories:
            return
        tensors = {f"{i}|{n}": t.detach().cpu().contiguous() for i, m in memories.items() for n, t in m.tensors.items()}
        save_file(tensors, folder / f"{prefix}stabilizers.safetensors")
        numbers = {str(i): dict(memory.numbers) for i, memory in memories.items()}
        (folder / f"{prefix}stabilizers.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")

    @torch.no_grad()
    def load(self, folder: Path, prefix: str = "") -> None:
        """Undo `save`. Raises ConfigError when the folder holds the memory of other stabilizers."""
        remembering = self._remembering()
        file = folder / f"{prefix}stabilizers.json"
        numbers: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if numbers.keys() != {str(i) for i in remembering}:
            raise ConfigError(
                f"{folder}: holds what other stabilizers remembered than this recipe has; start again with another --output"
            )
        if not remembering:
            return
        device = {part.name: part.weights.device for part in self._access.parts()}
        held: dict[int, dict[str, Tensor]] = {i: {} for i in remembering}
        for joined, tensor in load_file(folder / f"{prefix}stabilizers.safetensors").items():
            i, _, name = joined.partition("|")
            held[int(i)][name] = tensor.to(device[name]) if name in device else tensor
        for i, stabilizer in remembering.items():
            stabilizer.recall(Memory(tensors=held[i], numbers=numbers[str(i)]))

    def _remembering(self) -> dict[int, Remembers]:
        """Under their places in the recipe."""
        return {i: s for i, s in enumerate(self._stabilizers) if isinstance(s, Remembers)}


class View:
    """The Trained that one stabilizer is handed; it notices when everything was put back."""

    def __init__(self, access: Access, start: dict[str, Tensor] | None, *, gradients: bool) -> None:
        self._access, self._start, self._gradients = access, start, gradients
        self._seen: list[Part] = []
        self.was_reset = False

    def __iter__(self) -> Iterator[Part]:
        self._seen = self._access.parts(gradients=self._gradients)
        for part in self._seen:
            part.start = None if self._start is None else self._start[part.name]
            yield part

    def reset(self) -> None:
        """Start weights and a new optimizer."""
        for part in self:
            part.restore()
        self._access.forget()
        self.was_reset = True

    @property
    def all_restored(self) -> bool:
        """Nothing of this process differs from the start."""
        return bool(self._seen) and all(part.restored >= part.weights.numel() for part in self._seen)


class WholeParts:
    """Access to parameters that this process holds whole, and a torch optimizer over tensors of their shapes.

    `masters` are what the optimizer moves, in float32; None: the parameters themselves, whose gradients can then be seen.
    """

    def __init__(
        self, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer, masters: dict[str, Tensor] | None = None,
        publish: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._trained, self._optimizer, self._publish = trained, optimizer, publish
        self._masters = trained if masters is None else masters

    def parts(self, *, gradients: bool = False) -> list[Part]:
        return [self._part(name, master, gradients) for name, master in self._masters.items()]

    def _part(self, name: str, master: Tensor, gradients: bool) -> Part:
        moments = {
            key: value.view(-1)
            for key, value in self._optimizer.state.get(master, {}).items()
            if isinstance(value, Tensor) and value.shape == master.shape
        }
        gradient = None
        if gradients:
            assert self._masters is self._trained, "gradients of half precision are not those of the update"
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            gradient = master.grad.view(-1)
        return Part(
            name=name, shape=tuple(self._trained[name].shape), first=0, weights=master.detach().view(-1), moments=moments,
            gradient=gradient,
        )  # fmt: skip

    def forget(self) -> None:
        self._optimizer.state.clear()

    def publish(self) -> None:
        self._publish()


class NoParts:
    """Access for a recipe without stabilizers: nobody will ask."""

    def parts(self, *, gradients: bool = False) -> list[Part]:
        return []

    def forget(self) -> None:
        raise AssertionError("nothing to forget")

    def publish(self) -> None:
        """Nothing was written."""
