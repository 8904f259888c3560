"""The single-process trainer: AdamW on one device, gradients accumulated over micro-batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ttrl.contract import Blame
from ttrl.metrics import MetricSet, require_finite
from ttrl.model.load import DTYPES, load_model, load_tokenizer
from ttrl.model.sampling import text_logprobs
from ttrl.model.weights import Fingerprint, NamedTensors, load_into
from ttrl.protocols import ForwardOut, TensorBatch, WeightSource
from ttrl.seeds import derive
from ttrl.trainers.backends import TrainerSetup
from ttrl.trainers.forward import CompletionScorer
from ttrl.trainers.mismatch import mismatch
from ttrl.trainers.packing import row_index
from ttrl.trainers.schedule import lr_scale
from ttrl.types import FloatArray, IntArray, PackedBatch, Segment, StepStats


class TorchTrainer:
    """Owns the trained weights in float32; half precision is autocast, so small steps are not lost to rounding."""

    def __init__(self, setup: TrainerSetup) -> None:
        self.version = 0
        self._setup, self._settings = setup, setup.trainer
        self._master = setup.model.model_copy(update={"dtype": "float32"})
        self._model = load_model(self._master)
        self._dtype = DTYPES[setup.model.dtype]
        shared = not self._settings.gradient_checkpointing
        if self._settings.gradient_checkpointing:
            _checkpoint_layers(self._model)
        self._trained = setup.parameters.attach(self._model, derive(setup.seed, "adapters"))
        self._losses = (setup.objective, *setup.stabilizers)
        self._needs = frozenset().union(*(part.needs for part in self._losses))
        self._scorer = CompletionScorer(
            self._model, setup.temperature, shared_prefix=shared, entropy_grad="entropy_grad" in self._needs
        )
        self._reference = self._reference_scorer()
        self._optimizer = torch.optim.AdamW(
            list(self._trained.values()),
            lr=self._settings.lr,
            betas=self._settings.betas,
            weight_decay=self._settings.weight_decay,
        )

    def step(self, step: int, updates: Sequence[Sequence[PackedBatch]]) -> StepStats:
        """One optimizer update per inner sequence of micro-batches.

        Raises FloatingPointError for a loss or gradient that is not finite, before the weights are touched.
        """
        metrics, tokens, norm, scale = MetricSet(), 0, 0.0, 0.0
        for number, batches in enumerate(updates):
            self._optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for batch in batches:
                if number == 0:  # later the weights have moved, and a step is all or nothing
                    self._setup.check_stop()
                loss += self._accumulate(batch, metrics, first=number == 0)
                tokens += sum(self._computed(segment) for segment in batch.segments)
            current = float(torch.nn.utils.clip_grad_norm_(self._trained.values(), self._settings.grad_clip))
            require_finite({"train/loss": loss, "train/grad_norm": current}, f"step {step}, update {number}")
            scale = lr_scale(
                step * self._settings.updates_per_step + number,
                self._setup.steps * self._settings.updates_per_step,
                schedule=self._settings.schedule, warmup=self._settings.warmup, min_ratio=self._settings.min_lr_ratio,
            )  # fmt: skip
            for group in self._optimizer.param_groups:
                group["lr"] = self._settings.lr * scale
            self._optimizer.step()
            norm = max(norm, current)
            metrics.mean("train/loss", loss)
        self._optimizer.zero_grad(set_to_none=True)
        self.version = step + 1
        return StepStats(
            metrics=metrics.values(), tokens=tokens, grad_norm=norm, lr=self._settings.lr * scale, updates=len(updates)
        )

    @property
    def shares_prompts(self) -> bool:
        """A prompt runs once per segment; otherwise once per completion."""
        return self._scorer.shared_prefix

    def _computed(self, segment: Segment) -> int:
        prompts = 1 if self.shares_prompts else len(segment.lengths)
        return prompts * len(segment.prompt_ids) + int(segment.lengths.sum())

    def _accumulate(self, batch: PackedBatch, metrics: MetricSet, *, first: bool) -> float:
        """Forward and backward of one micro-batch; returns its share of the loss."""
        device = self._model.device
        tensors = TensorBatch(
            sampler_logprobs=torch.as_tensor(batch.sampler_logprobs, device=device),
            advantages=torch.as_tensor(batch.advantages, device=device),
            weights=torch.as_tensor(batch.weights, device=device),
            tokens_in_step=batch.tokens_in_step,
            rows=torch.as_tensor(row_index(batch), device=device),
        )
        with self._autocast():
            scores = self._scorer(batch)
        out = ForwardOut(logprobs=scores.logprobs, entropy=scores.entropy, ref_logprobs=self._reference_logprobs(batch))
        total: Tensor = torch.zeros((), device=device)
        for part in self._losses:
            with Blame("loss", type(part).__name__, "any of the micro-batch"):
                result = part.loss(out, tensors)
            total = total + result.loss
            metrics.merge(result.metrics)
        total.backward()  # type: ignore[no-untyped-call]
        weight = float(tensors.weights.sum())
        metrics.mean(
            "train/entropy", float((out.entropy.detach() * tensors.weights).sum()) / weight if weight else 0.0, weight
        )
        if first:  # later updates of a step have moved on from the sampler on purpose
            metrics.merge(mismatch(out.logprobs.detach(), tensors.sampler_logprobs))
        return float(total.detach())

    def _reference_scorer(self) -> CompletionScorer | None:
        """A scorer under the start model, if a loss asks for one; adapters are switched off instead of copying the model."""
        if "ref_logprobs" not in self._needs:
            return None
        if self._setup.parameters.start() is not None:
            return self._scorer
        frozen = load_model(self._master)
        frozen.requires_grad_(False)
        return CompletionScorer(frozen, self._setup.temperature)

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if self._reference is None:
            return None
        with self._setup.parameters.start() or nullcontext(), self._autocast():
            return self._reference(batch).logprobs

    def _autocast(self) -> AbstractContextManager[None]:
        half = self._dtype != torch.float32
        return torch.autocast(self._model.device.type, dtype=self._dtype, enabled=half)

    def weights(self, *, adapter: bool = False) -> WeightSource:
        """Full tensors under the model's own names, one at a time; adapters arrive merged unless asked for."""
        parts = self._setup.parameters
        spec = parts.adapter() if adapter else None
        manifest = parts.manifest(self._model, adapter=spec is not None)
        return NamedTensors(
            self.version, manifest, lambda: parts.moved(self._model, adapter=spec is not None), adapter=spec
        )

    @torch.no_grad()
    def score(self, token_ids: IntArray) -> FloatArray:
        """[T] -> [T - 1] log-probs at temperature 1 under the weights being trained."""
        with self._autocast():
            return text_logprobs(self._model, token_ids)

    def _moved(self) -> Iterator[tuple[str, Tensor]]:
        return self._setup.parameters.moved(self._model)

    def save(self, path: Path) -> None:
        """trained.safetensors, optimizer.safetensors, trainer.json."""
        save_file({name: p.detach().contiguous() for name, p in self._trained.items()}, path / "trained.safetensors")
        moments = {
            f"{name}|{key}": value.detach().clone().reshape(value.shape or (1,))
            for name, parameter in self._trained.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, path / "optimizer.safetensors")
        (path / "trainer.json").write_text(json.dumps({"version": self.version}) + "\n")

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Continue exactly where `save` was called. Raises ValueError when the file is for other parameters."""
        trained = load_file(path / "trained.safetensors")
        if trained.keys() != self._trained.keys():
            raise ValueError(f"{path}: holds other parameters than this recipe trains")
        load_into(self._trained, iter(trained.items()), Fingerprint())
        self._optimizer.state.clear()
        for joined, value in load_file(path / "optimizer.safetensors").items():
            name, _, key = joined.rpartition("|")
            state = self._optimizer.state[self._trained[name]]
            state[key] = value.reshape(()) if key == "step" else value.to(self._model.device)
        self.version = int(json.loads((path / "trainer.json").read_text())["version"])

    def export(self, path: Path) -> None:
        """The adapted model and its tokenizer as a plain transformers folder, in the recipe's dtype."""
        plain = load_model(self._master.model_copy(update={"device": "cpu"}))
        load_into({name: p.data for name, p in plain.named_parameters()}, self._moved(), Fingerprint())
        # Sampling defaults of many models do not pass the checks of saving; they are not ours to change, so they are copied
        defaults, plain.generation_config = plain.generation_config, GenerationConfig()
        plain.to(self._dtype).save_pretrained(path)
        (path / "generation_config.json").write_text(defaults.to_json_string(use_diff=True), encoding="utf-8")
        load_tokenizer(self._setup.model.path).save_pretrained(path)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Everything lives in this process."""


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute layers in the backward pass. They do so in training mode only; nothing may drop out all the same."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
        rates = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        for name in rates if module.training else ():
            setattr(module, name, 0.0)
