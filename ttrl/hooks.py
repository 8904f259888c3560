"""What a stabilizer may do besides adding a term to the loss: look before an update, act on the weights after it, remember.

A stabilizer has `needs` and any of the protocols below; a back-end asks for each of them by shape. Around one update:

    backward -> add_gradient -> clipping -> before_update -> optimizer -> after_update

Stabilizers act in the order of the recipe. On several ranks every rank does the same with its own part of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.types import Scored

if TYPE_CHECKING:
    from torch import Tensor

START = "start_weights"
"""In the `needs` of a stabilizer: keep the weights the run began with; `Part.start` then holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update of the optimizer, in numbers that are the same on every rank."""

    seed: int
    """Of the run."""
    step: int
    number: int
    """Of the update within its step, from 0."""
    loss: float
    entropy: float
    """Nats, mean over the trained tokens of the update."""
    grad_norm: float
    """Before clipping."""


@dataclass(slots=True, kw_only=True)
class Part:
    """A trained parameter, or the slice of it that this rank holds. Tensors are live: writing to them changes the run."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    first: int
    """Index of the slice's first entry in the flattened parameter; 0 for a whole one."""
    weights: Tensor
    """[n] float32."""
    moments: Mapping[str, Tensor]
    """[n] each: what the optimizer remembers per entry, such as exp_avg. Empty before its first update."""
    gradient: Tensor | None = None
    """[n] before clipping; in `add_gradient` only."""
    start: Tensor | None = None
    """[n] the weights the run began with, when a stabilizer needs "start_weights"."""
    restored: int = field(default=0)
    """Entries that were put back since this object was made."""

    def restore(self, entries: Tensor | None = None, *, forget: frozenset[str] | None = None) -> None:
        """Put entries (int64 indices into the slice, each once; None: all) back to the start, and the optimizer's memory of them to 0.

        With `forget`, only the moments of these names are forgotten.
        """
        assert self.start is not None, 'restoring needs "start_weights"'
        gone = [moment for key, moment in self.moments.items() if forget is None or key in forget]
        if entries is None:
            self.weights.copy_(self.start)
            for moment in gone:
                moment.zero_()
            self.restored += self.weights.numel()
            return
        self.weights[entries] = self.start[entries]
        for moment in gone:
            moment[entries] = 0.0
        self.restored += entries.numel()


class Trained(Protocol):
    """What this process holds of the trained weights."""

    def __iter__(self) -> Iterator[Part]: ...

    def reset(self) -> None:
        """Start weights and a new optimizer; every stabilizer then hears `at_start`. Needs "start_weights"."""
        ...


@runtime_checkable
class WeighingGate(Protocol):
    """A gate that also says how much a group that it keeps counts."""

    def weight(self, scored: Scored) -> float:
        """Finite and not negative; the group's advantages are multiplied by it."""
        ...


class Stabilizer(Protocol):
    """What holds the weights back. It has at least one of ABILITIES."""

    needs: frozenset[str]


@runtime_checkable
class LossTerm(Protocol):
    """A term of the loss, computed from log-probs."""

    needs: frozenset[str]

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut: ...


@runtime_checkable
class AtStart(Protocol):
    """Hears when the weights are those of the start: when a trainer is built, and after a full reset."""

    def at_start(self, trained: Trained) -> None: ...


@runtime_checkable
class GradientTerm(Protocol):
    """A term of the loss that is a function of the weights alone."""

    def add_gradient(self, trained: Trained, metrics: MetricSet) -> float:
        """Add its gradient to `Part.gradient`, in place, once per update; returns its value."""
        ...


@runtime_checkable
class BeforeUpdate(Protocol):
    """May leave an update out. The weights, the optimizer and its moments then stay as they are."""

    def before_update(self, update: Update, metrics: MetricSet) -> bool:
        """False vetoes. Called once per update on every rank, whatever other stabilizers said."""
        ...


@runtime_checkable
class AfterUpdate(Protocol):
    """Acts on the weights after an update that was made."""

    def after_update(self, update: Update, trained: Trained, metrics: MetricSet) -> None:
        """Metrics must be means: ranks are merged."""
        ...


@runtime_checkable
class SquaredGradients(Protocol):
    """Wants squared gradients of the log-prob of single rollouts under the start model, before the first update of a run."""

    @property
    def rollouts_wanted(self) -> int:
        """0 when it has them."""
        ...

    def take_squares(self, squares: Mapping[str, Tensor], tokens: int) -> None:
        """Per parameter [n] the sum of squares over rollouts, which have so many tokens together. Both are of all ranks."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Holds another version of the trained weights."""

    votes: bool
    """The votes of a step are drawn under these weights."""

    def teacher_weights(self, name: str) -> Tensor:
        """[n] of the part with this name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a stabilizer remembers. Checkpoints store it, so that a resumed run is exact."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able."""


@runtime_checkable
class Remembers(Protocol):
    """Start weights need not be remembered: a trainer that is built again has them."""

    def memory(self) -> Memory: ...

    def recall(self, memory: Memory) -> None:
        """Continue as the stabilizer that returned `memory`."""
        ...


ABILITIES: tuple[type, ...] = (LossTerm, GradientTerm, BeforeUpdate, AfterUpdate, Teacher)
"""A stabilizer without any of these does nothing."""
