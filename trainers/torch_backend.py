"""The single-process trainer: AdamW on one device, gradients accumulated over micro-batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttrl.metrics import MetricSet, require_finite
from ttrl.model.load import DTYPES, load_model
from ttrl.model.sampling import text_logprobs
from ttrl.model.weights import Fingerprint, NamedTensors, load_into
from ttrl.protocols import WeightSource
from ttrl.seeds import derive
from ttrl.trainers.around import Around, WholeParts
from ttrl.trainers.backends import TrainerSetup
from ttrl.trainers.export import export
from ttrl.trainers.fisher_pass import squared_gradients
from ttrl.trainers.microbatch import BatchLoss, checkpoint_layers
from ttrl.trainers.schedule import lr_scale
from ttrl.types import FloatArray, IntArray, PackedBatch, StepStats


class TorchTrainer:
    """Owns the trained weights in float32; half precision is autocast, so small steps are not lost to rounding."""

    def __init__(self, setup: TrainerSetup) -> None:
        self.version = 0
        self._lr_factor = 1.0
        self._setup, self._settings = setup, setup.trainer
        self._master = setup.model.model_copy(update={"dtype": "float32"})
        self._model = load_model(self._master)
        self._dtype = DTYPES[setup.model.dtype]
        if self._settings.gradient_checkpointing:
            checkpoint_layers(self._model)
        self._trained = setup.parameters.attach(self._model, derive(setup.seed, "adapters"))
        self._loss = BatchLoss(setup, self._model, self._autocast)
        if self._loss.needs_frozen_copy:
            self._loss.compare_with(load_model(self._master))
        self._optimizer = torch.optim.AdamW(
            list(self._trained.values()),
            lr=self._settings.lr,
            betas=self._settings.betas,
            weight_decay=self._settings.weight_decay,
        )
        self._around = Around(setup.stabilizers, setup.seed, WholeParts(self._trained, self._optimizer))

    def step(self, step: int, updates: Sequence[Sequence[PackedBatch]]) -> StepStats:
        """One optimizer update per inner sequence of micro-batches.

        Raises FloatingPointError for a loss or gradient that is not finite, before the weights are touched.
        """
        metrics, tokens, norm, scale = MetricSet(), 0, 0.0, 0.0
        self._around.begin_step()
        self._around.give_squares(lambda rollouts: self._squares(updates, rollouts))
        for number, batches in enumerate(updates):
            self._optimizer.zero_grad(set_to_none=True)
            loss, seen = 0.0, MetricSet()
            for batch in batches:
                if number == 0:  # later the weights have moved, and a step is all or nothing
                    self._setup.check_stop()
                result = self._loss(batch, first=number == 0)
                result.loss.backward()  # type: ignore[no-untyped-call]
                loss += float(result.loss.detach())
                seen.merge(result.metrics)
                tokens += self._loss.computed(batch)
            loss += self._around.add_gradient(seen)
            current = float(torch.nn.utils.clip_grad_norm_(self._trained.values(), self._settings.grad_clip))
            require_finite({"train/loss": loss, "train/grad_norm": current}, f"step {step}, update {number}")
            scale = self._lr_factor * lr_scale(
                step * self._settings.updates_per_step + number,
                self._setup.steps * self._settings.updates_per_step,
                schedule=self._settings.schedule, warmup=self._settings.warmup, min_ratio=self._settings.min_lr_ratio,
            )  # fmt: skip
            for group in self._optimizer.param_groups:
                group["lr"] = self._settings.lr * scale
            self._around.open(step, number, loss, _mean(seen, "train/entropy"), seen)
            if self._around.allows(current):
                self._optimizer.step()
            self._around.close(current)
            norm = max(norm, current)
            metrics.merge(seen)
            metrics.mean("train/loss", loss)
        self._optimizer.zero_grad(set_to_none=True)
        self.version = max(self.version, step) + 1  # after a restore it is ahead of the steps
        return StepStats(
            metrics=metrics.values(), tokens=tokens, grad_norm=norm, lr=self._settings.lr * scale, updates=len(updates),
            may_stand=self._around.may_stand,
        )  # fmt: skip

    def _squares(self, updates: Sequence[Sequence[PackedBatch]], rollouts: int) -> tuple[dict[str, Tensor], int]:
        def logprobs(row: PackedBatch) -> Tensor:
            self._setup.check_stop()
            with self._autocast():
                return self._loss.scorer(row).logprobs

        return squared_gradients(logprobs, [batch for batches in updates for batch in batches], self._trained, rollouts)

    @property
    def shares_prompts(self) -> bool:
        """A prompt runs once per segment; otherwise once per completion."""
        return self._loss.scorer.shared_prefix

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

    def teaching(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights of the EMA teacher."""
        return self._around.teaching()

    def save(self, path: Path) -> None:
        """trained.safetensors, optimizer.safetensors, trainer.json, and what stabilizers remember."""
        save_file({name: p.detach().contiguous() for name, p in self._trained.items()}, path / "trained.safetensors")
        moments = {
            f"{name}|{key}": value.detach().clone().reshape(value.shape or (1,))
            for name, parameter in self._trained.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, path / "optimizer.safetensors")
        numbers = {"version": self.version, "lr_factor": self._lr_factor}
        (path / "trainer.json").write_text(json.dumps(numbers) + "\n")
        self._around.save(path)

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
        self._around.load(path)
        numbers = json.loads((path / "trainer.json").read_text())
        self.version, self._lr_factor = int(numbers["version"]), float(numbers.get("lr_factor", 1.0))

    def restore(self, path: Path, *, version: int) -> None:
        """Weights, moments and learning-rate factor as `save` stored them; only the version goes on."""
        assert version > self.version, f"version {version} would not follow {self.version}"
        self.load(path)
        self.version = version

    def scale_lr(self, factor: float) -> None:
        """Of all later updates, until a `load` or `restore` says otherwise."""
        assert factor > 0, f"a learning rate cannot be multiplied by {factor}"
        self._lr_factor *= factor

    def export(self, path: Path) -> None:
        """The adapted model and its tokenizer as a plain transformers folder, in the recipe's dtype."""
        export(self._setup.model, self._setup.parameters.moved(self._model), path)

    def close(self) -> None:
        """Everything lives in this process."""


def _mean(metrics: MetricSet, name: str) -> float:
    total, weight = metrics.sums(name)
    return total / weight if weight else 0.0
