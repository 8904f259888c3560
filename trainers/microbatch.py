"""What every back-end computes on one micro-batch: scores, the losses on them, and metrics with named reductions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ttrl.contract import Blame
from ttrl.hooks import LossTerm
from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut, TensorBatch
from ttrl.trainers.backends import TrainerSetup
from ttrl.trainers.forward import CompletionScorer
from ttrl.trainers.lockstep import Shape, padded
from ttrl.trainers.mismatch import mismatch
from ttrl.trainers.packing import row_index
from ttrl.types import PackedBatch, Segment

Autocast = Callable[[], AbstractContextManager[object]]
Run = Callable[[Callable[[], Tensor]], Tensor]
"""Executes a computation with a model: a plain call, or through an engine that gathers its weights."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One micro-batch's share of the step."""

    loss: Tensor
    """Scalar with gradient, already divided by `tokens_in_step`."""
    metrics: MetricSet


class BatchLoss:
    """The objective and the stabilizers of a recipe on micro-batches under one model."""

    def __init__(self, setup: TrainerSetup, model: PreTrainedModel, autocast: Autocast = nullcontext) -> None:
        self._model, self._setup, self._autocast = model, setup, autocast
        self._parts = (setup.objective, *(s for s in setup.stabilizers if isinstance(s, LossTerm)))
        self._needs = frozenset().union(*(part.needs for part in self._parts))
        self.scorer = CompletionScorer(
            model,
            setup.temperature,
            shared_prefix=not setup.trainer.gradient_checkpointing,
            entropy_grad="entropy_grad" in self._needs,
            path=setup.model.path,
        )
        self._frozen: tuple[CompletionScorer, Run] | None = None

    @property
    def needs_reference(self) -> bool:
        """A loss compares with the start model."""
        return "ref_logprobs" in self._needs

    @property
    def needs_frozen_copy(self) -> bool:
        """The start model has to be a model of its own: there are no adapters that could be switched off."""
        return self.needs_reference and self._setup.parameters.start() is None

    def compare_with(self, frozen: PreTrainedModel, run: Run = lambda work: work()) -> CompletionScorer:
        """`frozen` is the start model from now on; `run` executes a computation with it."""
        frozen.requires_grad_(False)
        self._frozen = CompletionScorer(frozen, self._setup.temperature, path=self._setup.model.path), run
        return self._frozen[0]

    @torch.no_grad()
    def reference_logprobs(self, batch: PackedBatch, shape: Shape | None = None) -> Tensor | None:
        """[N] under the start model, or None when no loss asks for it. `shape` as for `CompletionScorer`."""
        if not self.needs_reference:
            return None
        with self._setup.parameters.start() or nullcontext(), self._autocast():
            if self._frozen is None:
                return self.scorer(batch, shape).logprobs
            scorer, run = self._frozen
            return run(lambda: scorer(batch, shape).logprobs)

    def __call__(self, batch: PackedBatch | None, *, first: bool, shape: Shape | None = None) -> BatchResult:
        """Forward pass of one micro-batch; `first` says that the weights are still those the sampler had.

        With `shape`, the model runs on at least so much, as it does on the other ranks. What is added (all there is, when `batch`
        is None) is seen neither by losses nor by metrics and has a gradient of exactly zero.
        """
        whole = batch if shape is None else padded(batch, shape.segments)
        assert whole is not None
        with self._autocast():
            scores = self.scorer(whole, shape)
        reference = self.reference_logprobs(whole, shape)
        count = 0 if batch is None else len(batch.completion_ids)
        out = ForwardOut(
            logprobs=scores.logprobs[:count],
            entropy=scores.entropy[:count],
            ref_logprobs=None if reference is None else reference[:count],
        )
        result = (
            self._losses(out, batch, first=first) if batch is not None else BatchResult(out.logprobs.sum(), MetricSet())
        )
        if len(scores.logprobs) == count:
            return result
        return BatchResult(result.loss + 0.0 * scores.logprobs[count:].sum(), result.metrics)

    def _losses(self, out: ForwardOut, batch: PackedBatch, *, first: bool) -> BatchResult:
        device = out.logprobs.device
        tensors = TensorBatch(
            sampler_logprobs=torch.as_tensor(batch.sampler_logprobs, device=device),
            advantages=torch.as_tensor(batch.advantages, device=device),
            weights=torch.as_tensor(batch.weights, device=device),
            tokens_in_step=batch.tokens_in_step,
            rows=torch.as_tensor(row_index(batch), device=device),
            extras={name: torch.as_tensor(values, device=device) for name, values in batch.extras.items()},
        )
        total: Tensor = torch.zeros((), device=device)
        metrics = MetricSet()
        for part in self._parts:
            with Blame("loss", type(part).__name__, "any of the micro-batch"):
                result = part.loss(out, tensors)
            total = total + result.loss
            metrics.merge(result.metrics)
        weight = float(tensors.weights.sum())
        metrics.mean(
            "train/entropy", float((out.entropy.detach() * tensors.weights).sum()) / weight if weight else 0.0, weight
        )
        if first:  # later updates of a step have moved on from the sampler on purpose
            metrics.merge(mismatch(out.logprobs.detach(), tensors.sampler_logprobs))
        return BatchResult(total, metrics)

    def computed(self, batch: PackedBatch) -> int:
        """Tokens of a micro-batch that go through the model."""
        return sum(self._computed(segment) for segment in batch.segments)

    def _computed(self, segment: Segment) -> int:
        prompts = 1 if self.scorer.shared_prefix else len(segment.lengths)
        return prompts * len(segment.prompt_ids) + int(segment.lengths.sum())


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute layers in the backward pass. They do so in training mode only; nothing may drop out all the same."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
        rates = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        for name in rates if module.training else ():
            setattr(module, name, 0.0)
