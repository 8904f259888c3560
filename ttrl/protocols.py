"""What each slot of a recipe must be able to do. Plug-ins satisfy these by shape; nothing has to be inherited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ttrl.metrics import MetricSet
from ttrl.types import (
    AdapterSpec,
    FloatArray,
    Group,
    Health,
    IntArray,
    PackedBatch,
    Prompt,
    Request,
    Rollout,
    Sample,
    SamplingSpec,
    Scored,
    StepStats,
    WeightStamp,
)

if TYPE_CHECKING:
    import torch

    from ttrl.model.load import Tokenizer


class Source(Protocol):
    """Which prompts come next. A pure function of the step, so a restart needs no cursor."""

    def batch(self, step: int) -> Sequence[str]:
        """Ids of the prompts of step 0, 1, 2, ...; no id twice in one step."""
        ...


class Pool(Protocol):
    """Runs requests on one or many engines, and keeps them on the trainer's weights."""

    tokenizer: Tokenizer

    @property
    def has_weights(self) -> bool:
        """False when the engine only plays a script."""
        ...

    @property
    def takes_adapters(self) -> bool:
        """Its engines want LoRA adapters as they are, not merged."""
        ...

    @property
    def max_positions(self) -> int | None: ...

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in the order of the requests. Raises EngineError for missing, foreign or stale rollouts."""
        ...

    def sync(self, source: WeightSource, *, must_move: bool) -> None:
        """New weights to every engine. Raises EngineError when they did not arrive whole, or moved nothing although they had to."""
        ...

    def keep(self, source: WeightSource) -> WeightSource:
        """The weights as they are now, held where the engines can get them, so that the trainer may go on before a later sync."""
        ...

    def score(self, token_ids: IntArray) -> list[FloatArray]:
        """Per engine [T - 1]: log-prob, at temperature 1, of every token but the first given those before it."""
        ...

    def released(self) -> AbstractContextManager[None]:
        """A context in which the engines leave the accelerator to the trainer."""
        ...

    def events(self) -> Mapping[str, float]:
        """What befell the engines since the last call, as metrics of the step; empty for an engine in this process."""
        ...

    def close(self) -> None:
        """Ends what the pool started."""
        ...


Classify = Callable[[Sequence[Rollout]], list[int]]
"""The class of each rollout's answer as the reward will see it, NO_ANSWER for none: what a sampler may know of answers."""


class Sampler(Protocol):
    """How the votes of a step are drawn. A factory of samplers gets `votes_per_prompt`, `train_per_prompt` and a Classify."""

    def __call__(self, prompts: Sequence[Prompt], pool: Pool, spec: SamplingSpec, seed: int) -> list[Group]: ...


class WeightSource(Protocol):
    """Weights on their way to an engine: named full tensors, a few at a time.

    The manifest is known before the first tensor and from elsewhere than the iteration, so that a tensor that is never sent is
    noticed where it is missing.
    """

    @property
    def version(self) -> int: ...

    @property
    def manifest(self) -> Mapping[str, tuple[int, ...]]:
        """name -> full shape, of every tensor that must arrive."""
        ...

    @property
    def adapter(self) -> AdapterSpec | None:
        """Set when the tensors are those of a LoRA adapter, under peft's names."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


@runtime_checkable
class RemoteWeights(Protocol):
    """A WeightSource whose tensors live in other processes: it can hand out buckets as references instead of their content."""

    def bucket_refs(self, bucket_bytes: int) -> Iterator[Any]:
        """References to `ttrl.model.buckets.Bucket` objects in the cluster's object store, in order.

        The next one is made when it is asked for. Whoever asks for number i + 2 says that number i is no longer needed.
        """
        ...


class Engine(Protocol):
    """Generates rollouts."""

    tokenizer: Tokenizer
    has_weights: bool
    """False for engines that only play a script: their log-probs are not those of any model."""
    takes_adapters: bool
    """It wants the tensors of a LoRA adapter, not the merged weights."""
    contexts_at_once: int | None
    """How many prompts one call should bring to keep it busy; None: as many as there are (continuous batching)."""

    @property
    def max_positions(self) -> int | None:
        """Longest prompt plus completion, if there is a limit."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in the order of the requests."""
        ...

    def begin_load(
        self, version: int, manifest: Mapping[str, tuple[int, ...]], adapter: AdapterSpec | None = None
    ) -> None:
        """New weights follow. Until `end_load` nothing can be generated."""
        ...

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, lasting: bool = False) -> None:
        """Some of the tensors. Each is only lent until the next one is asked for, or, if they are `lasting`, until this call ends.
        Raises EngineError on unknown names and wrong shapes."""
        ...

    def end_load(self) -> str:
        """The fingerprint of everything now held. Raises EngineError when a tensor of the manifest did not come."""
        ...

    def score(self, token_ids: IntArray) -> FloatArray:
        """[T] -> [T - 1]: log-prob at temperature 1 of every token but the first given those before it."""
        ...

    def release(self) -> None:
        """Free the accelerator between phases."""
        ...

    def restore(self) -> None:
        """Undo release."""
        ...

    def ping(self) -> Health: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardContext:
    """What a reward may know besides the group."""

    step: int
    seed: int
    """For rewards that draw; derived from run seed, step and prompt id."""


class Reward(Protocol):
    """Pseudo-label and rewards of one whole group. Sees groups and only groups."""

    needs: frozenset[str]
    """What the sampler must record for it, for example {"entropy"}. {"labels"} asks for reference answers: see LabelledReward."""
    min_votes: int

    def __call__(self, group: Group, ctx: RewardContext) -> Scored: ...


@runtime_checkable
class ExplainedReward(Protocol):
    """Optional: a reward that is a sum can show its terms. `ttrl check` then looks at each of them (see `ttrl.lint`)."""

    def terms(self, group: Group, ctx: RewardContext) -> Mapping[str, npt.NDArray[np.floating]]:
        """[V] per term, signed and scaled as they enter the sum. Must not change the state of the reward."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """Optional, for any part of a run: it remembers something across steps. Checkpoints store it, so that a resumed run is exact,
    and a step that does not complete is forgotten again. Tensors belong to the trainer's `save`."""

    def state(self) -> Mapping[str, Any]:
        """JSON-able."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue as the part that returned `state`."""
        ...


@runtime_checkable
class LabelledReward(Protocol):
    """A reward with {"labels"} in its needs. It is built and fed only under a recipe that says `allow_labels: true`."""

    def take_labels(self, labels: Mapping[str, str]) -> None:
        """Prompt id -> reference answer; called once, before the first group."""
        ...


class Gate(Protocol):
    """Which scored groups may train. Returns the reason to drop the group, or None to keep it."""

    def __call__(self, scored: Scored) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOut:
    """What one forward pass gives the losses. All [N], aligned with the flat arrays of the PackedBatch."""

    logprobs: torch.Tensor
    """With gradient."""
    entropy: torch.Tensor
    """In nats; with gradient only when a part needs "entropy_grad"."""
    ref_logprobs: torch.Tensor | None
    """Under the start model, when a part needs "ref_logprobs"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBatch:
    """The flat arrays of a PackedBatch as tensors on the trainer's device."""

    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    tokens_in_step: float
    rows: torch.Tensor
    """[N] int64: the row (completion) a token belongs to, counted from 0 through the batch. Rows are never split."""
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """[N] each, see `Sample.extras`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOut:
    """A scalar that was already divided by `tokens_in_step`, and metrics with named reductions."""

    loss: torch.Tensor
    metrics: MetricSet


class Objective(Protocol):
    """Rewards -> token advantages -> loss."""

    needs: frozenset[str]

    def probes(self, group: Group) -> list[Request]:
        """Extra generations wanted before scoring; none for GRPO."""
        ...

    def samples(self, scored: Scored) -> list[Sample]: ...

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut: ...


class Trainer(Protocol):
    """Owns the trained weights."""

    version: int

    @property
    def shares_prompts(self) -> bool:
        """A prompt runs once per segment; otherwise once per completion, which packing must count."""
        ...

    def step(self, step: int, updates: Sequence[Sequence[PackedBatch]]) -> StepStats:
        """One optimizer update per inner sequence of micro-batches."""
        ...

    def weights(self, *, adapter: bool = False) -> WeightSource:
        """What training may have changed. With `adapter`, a LoRA run gives its adapter instead of merged weights."""
        ...

    def score(self, token_ids: IntArray) -> FloatArray:
        """As an engine's `score`, under the weights being trained: what the canary compares."""
        ...

    def teaching(self) -> AbstractContextManager[None]:
        """A context in which `weights` and `score` are those of the EMA teacher; only with a stabilizer that is one."""
        ...

    def save(self, path: Path) -> None:
        """Everything a later `load` needs to continue exactly."""
        ...

    def load(self, path: Path) -> None: ...

    def restore(self, path: Path, *, version: int) -> None:
        """Back to an earlier `save`; `version`, larger than any before, tells the engines that this is news."""

    def scale_lr(self, factor: float) -> None:
        """Multiply the learning rate of all later updates. `save` stores the product of all factors."""

    def export(self, path: Path) -> None:
        """The adapted model, loadable with transformers."""

    def close(self) -> None: ...


StopCheck = Callable[[], None]
"""Called at points where nothing is half done; raises StopRequested when the user wants to stop."""

Phase = Callable[[str], AbstractContextManager[None]]
"""`with phase("rollout"):` measures a part of the step."""

__all__ = [
    "Classify", "Engine", "ExplainedReward", "ForwardOut", "Gate", "LabelledReward", "LossOut", "Objective", "Phase", "Pool",
    "RemoteWeights", "Reward", "RewardContext", "Sampler", "Source", "Stateful", "StopCheck",
    "TensorBatch", "Trainer", "WeightSource", "WeightStamp",
]  # fmt: skip
