"""One rank of a DeepSpeed trainer: the losses, packing and denominator of the torch back-end, the weights split by ZeRO.

DeepSpeed averages gradients over ranks; our losses are already divided by the tokens of all ranks, so each is multiplied by the
number of ranks first. Every method but `version` and `shares_prompts` is a collective: all ranks call it, with the same arguments
except for the micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ttrl.errors import ConfigError
from ttrl.metrics import MetricSet, require_finite
from ttrl.model.load import DTYPES, load_model
from ttrl.model.sampling import text_logprobs
from ttrl.model.weights import NamedTensors
from ttrl.protocols import WeightSource
from ttrl.seeds import derive
from ttrl.trainers import lockstep
from ttrl.trainers.around import Access, Around, NoParts
from ttrl.trainers.backends import TrainerSetup
from ttrl.trainers.dsconfig import DEFAULT_STAGE, deepspeed_config
from ttrl.trainers.export import export
from ttrl.trainers.fisher_pass import squared_gradients
from ttrl.trainers.microbatch import BatchLoss, checkpoint_layers
from ttrl.trainers.process_group import Place, join, leave, limit_collectives, mean_over_ranks, surroundings, wants_gpu
from ttrl.trainers.rankstep import RankStep, merge
from ttrl.trainers.schedule import lr_scale
from ttrl.types import FloatArray, IntArray, PackedBatch, StepStats

STATE = "trainer.json"


class DeepSpeedTrainer:
    """A rank among `place.ranks`, or the only one."""

    def __init__(self, setup: TrainerSetup, place: Place | None = None, store: Any = None) -> None:
        self.version = 0
        self._lr_factor = 1.0
        self._setup, self._settings = setup, setup.trainer
        self._place = place or Place(seconds=float(setup.cluster.call_seconds))
        gpu = wants_gpu(setup.model.device)
        join(self._place, store, gpu=gpu)
        self._config = deepspeed_config(self._settings, setup.model.dtype, gpu=gpu)
        self._stage = DEFAULT_STAGE if self._settings.zero is None else self._settings.zero
        self._device = torch.device("cuda" if gpu else "cpu")
        self._model = self._load()
        if self._settings.gradient_checkpointing:
            checkpoint_layers(self._model)
        trained = setup.parameters.attach(self._model, derive(setup.seed, "adapters"))
        self._loss = BatchLoss(setup, self._model)
        self._trained = trained
        self._manifest = {name: list(parameter.shape) for name, parameter in trained.items()}
        self._whole = _Whole(self._model)
        self._engine = self._initialize(self._whole, list(trained.values()))
        self._around = Around(setup.stabilizers, setup.seed, self._access(trained) if setup.stabilizers else NoParts())
        if self._loss.needs_frozen_copy:
            self._attach_frozen_copy()
        limit_collectives(self._place.seconds)

    def _load(self) -> PreTrainedModel:
        """In the recipe's dtype. Under ZeRO-3 on the host, and tensor by tensor from there, so that no device holds all of it."""
        section = self._setup.model
        return load_model(section.model_copy(update={"device": "cpu"}) if self._stage == 3 else section)

    def _initialize(self, whole: _Whole, trained: list[Tensor] | None) -> Any:
        """The engine around a model. Without trained parameters it only gathers weights, which takes ZeRO-3."""
        import deepspeed

        from ttrl.trainers.dsstate import forget_first_step

        config = self._config
        if trained is None:
            left = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
            config = {**{k: v for k, v in config.items() if k != "optimizer"}, "zero_optimization": left}
        with surroundings(self._place):
            if self._stage == 3:
                deepspeed.zero.Init(module=whole, config_dict_or_path=config, dtype=DTYPES[self._setup.model.dtype])
                for name, buffer in whole.named_buffers():
                    _replace_buffer(whole, name, buffer.to(self._device))
            engine, *_ = deepspeed.initialize(
                model=whole, model_parameters=trained, config=config, dist_init_required=False
            )
        if trained is not None:
            forget_first_step(engine)
        return engine

    def _attach_frozen_copy(self) -> None:
        """The start model for the KL anchor, split like the trained one under ZeRO-3, whole on every rank otherwise."""
        frozen = self._load()
        whole = _Whole(frozen)
        self._loss.compare_with(frozen, whole)
        if self._stage == 3:
            self._initialize(whole, None)

    def _access(self, trained: dict[str, Tensor]) -> Access:
        from ttrl.trainers.dsparts import access

        return access(self._engine, trained)

    def step(self, step: int, updates: Sequence[Sequence[PackedBatch]]) -> StepStats:
        """One optimizer update per inner sequence of micro-batches, for the only rank.

        Raises FloatingPointError for a loss or gradient that is not finite; the weights are then those of before the update.
        """
        self._setup.check_stop()  # here and no later: what DeepSpeed has accumulated cannot be taken back
        return merge([self.part(step, updates)])

    def part(self, step: int, updates: Sequence[Sequence[PackedBatch]]) -> RankStep:
        """This rank's micro-batches of each update; there may be none. Raises FloatingPointError on all ranks alike."""
        metrics, losses, norm, scale, tokens = MetricSet(), [], 0.0, 0.0, 0
        turns = self._agree(updates)
        self._around.begin_step()
        self._around.give_squares(lambda rollouts: self._squares(updates, rollouts))
        for number, (batches, shapes) in enumerate(zip(updates, turns, strict=True)):
            seen = MetricSet()
            loss = torch.zeros((), dtype=torch.float64, device=self._device)
            for turn, shape in enumerate(shapes):
                batch = batches[turn] if turn < len(batches) else None
                loss += self._accumulate(batch, shape, seen, first=number == 0, last=turn == len(shapes) - 1)
                tokens += self._loss.computed(batch) if batch is not None else 0
            dist.all_reduce(loss)
            loss += self._around.add_gradient(
                seen
            )  # the ranks have met: every one has the whole gradient and adds the same
            where = f"step {step}, update {number}"
            require_finite({"train/loss": float(loss)}, where)
            scale = self._lr_factor * lr_scale(
                step * self._settings.updates_per_step + number,
                self._setup.steps * self._settings.updates_per_step,
                schedule=self._settings.schedule, warmup=self._settings.warmup, min_ratio=self._settings.min_lr_ratio,
            )  # fmt: skip
            entropy = mean_over_ranks(*seen.sums("train/entropy"), self._device) if self._around.active else 0.0
            self._around.open(step, number, float(loss), entropy, seen)
            current = self._update(self._settings.lr * scale)
            require_finite({"train/grad_norm": current}, where)
            self._around.close(current)
            metrics.merge(seen)
            losses.append(float(loss))
            norm = max(norm, current)
        self.version = max(self.version, step) + 1  # after a restore it is ahead of the steps
        return RankStep(
            metrics=metrics, tokens=tokens, losses=tuple(losses), grad_norm=norm, lr=self._settings.lr * scale,
            may_stand=self._around.may_stand,
        )  # fmt: skip

    def _squares(self, updates: Sequence[Sequence[PackedBatch]], rollouts: int) -> tuple[dict[str, Tensor], int]:
        """Every rank measures its share of the rollouts; the sums are of all."""
        own, share = [batch for batches in updates for batch in batches], -(-rollouts // self._place.ranks)
        squares, tokens = squared_gradients(lambda row: self._loss.scorer(row).logprobs, own, self._trained, share)
        count = torch.tensor(tokens, device=self._device)
        for tensor in (*squares.values(), count):
            dist.all_reduce(tensor)
        return squares, int(count)

    def _agree(self, updates: Sequence[Sequence[PackedBatch]]) -> list[list[lockstep.Shape | None]]:
        """Per update and turn, what every rank must run at least. None: whatever its micro-batch asks for."""
        if self._place.ranks == 1:
            return [[None] * len(batches) for batches in updates]
        counts = self._largest(np.asarray([len(batches) for batches in updates], np.int32))
        own = [lockstep.shapes(batches, int(count)) for batches, count in zip(updates, counts, strict=True)]
        largest = np.split(self._largest(np.concatenate(own)), np.cumsum(counts)[:-1])
        if self._stage < 3:  # gradients meet micro-batch by micro-batch, in the order in which modules run
            return [[lockstep.Shape(1, 0, bool(shown)) for *_, shown in part] for part in largest]
        return [list(lockstep.common(part)) for part in largest]

    def _largest(self, numbers: IntArray) -> IntArray:
        """Element-wise maximum over the ranks."""
        tensor = torch.as_tensor(numbers, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return np.asarray(tensor.cpu().numpy(), np.int32)

    def _accumulate(
        self, batch: PackedBatch | None, shape: lockstep.Shape | None, metrics: MetricSet, *, first: bool, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the loss."""
        self._engine.set_gradient_accumulation_boundary(last)

        def work() -> Tensor:
            result = self._loss(batch, first=first, shape=shape)
            metrics.merge(result.metrics)
            return result.loss

        loss: Tensor = self._engine(work)
        self._engine.backward(loss * self._place.ranks, scale_wrt_gas=False)
        return loss.detach().double()

    def _update(self, lr: float) -> float:
        """One step of the optimizer; returns the norm of the gradient before clipping, infinite when the step was refused."""
        engine = self._engine
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = lr
        if (
            engine.optimizer is engine.basic_optimizer
        ):  # stage 0 in float32: DeepSpeed would clip, but not tell the norm
            held = [p for group in engine.optimizer.param_groups for p in group["params"]]
            norm = float(torch.nn.utils.clip_grad_norm_(held, self._config["gradient_clipping"]))
            if not np.isfinite(norm):
                return norm
            if self._around.allows(norm):
                engine.step()
            else:
                engine.optimizer.zero_grad()
            return norm
        engine.step()
        return float("inf") if engine.optimizer.overflow else float(engine.get_global_grad_norm())

    @property
    def shares_prompts(self) -> bool:
        """A prompt runs once per segment; otherwise once per completion."""
        return self._loss.scorer.shared_prefix

    def weights(self, *, adapter: bool = False) -> WeightSource:
        """Full tensors under the model's own names, in the recipe's dtype. Under ZeRO-3 one tensor is whole at a time."""
        parts = self._setup.parameters
        spec = parts.adapter() if adapter else None
        manifest = parts.manifest(self._model, adapter=spec is not None)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            return parts.moved(self._model, self._gather, adapter=spec is not None)

        return NamedTensors(self.version, manifest, tensors, adapter=spec)

    def _gather(self, parameters: Sequence[Any]) -> AbstractContextManager[Any]:
        """Whole parameters inside the context, on every rank; for reading only."""
        if self._stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)  # type: ignore[no-any-return]

    @torch.no_grad()
    def score(self, token_ids: IntArray) -> FloatArray:
        """[T] -> [T - 1] log-probs at temperature 1 under the weights being trained."""
        scores = self._whole(lambda: torch.as_tensor(text_logprobs(self._model, token_ids)))
        return np.asarray(scores.numpy(), np.float32)

    def teaching(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights of the EMA teacher. A collective at both ends."""
        return self._around.teaching()

    def save(self, path: Path) -> None:
        """trainer.json and this rank's rank-NNNN.* in a folder that all ranks see."""
        from ttrl.trainers.dsstate import write

        write(self._engine, path, self._place.rank)
        self._around.save(path, f"rank-{self._place.rank:04d}.")
        if self._place.rank == 0:
            numbers = {"version": self.version, "lr_factor": self._lr_factor}
            (path / STATE).write_text(json.dumps({**numbers, **self._arrangement()}) + "\n", encoding="utf-8")
        dist.barrier()

    def load(self, path: Path) -> None:
        """Continue exactly where `save` was called. Raises ConfigError for another stage, number of ranks or set of parameters."""
        from ttrl.trainers.dsstate import read

        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, value in self._arrangement().items():
            if state.get(name) != value:
                held, wanted = (
                    (str(state.get(name, "unknown")), str(value)) if name != "parameters" else ("others", "these")
                )
                raise ConfigError(
                    f"{path}: was written with {name}: {held}, which cannot be continued with {wanted}; set what it was, or start "
                    "a new run"
                )
        read(self._engine, path, self._place.rank)
        self._around.load(path, f"rank-{self._place.rank:04d}.")
        self.version, self._lr_factor = int(state["version"]), float(state.get("lr_factor", 1.0))

    def restore(self, path: Path, *, version: int) -> None:
        """Weights, moments and learning-rate factor as `save` stored them; only the version goes on."""
        assert version > self.version, f"version {version} would not follow {self.version}"
        self.load(path)
        self.version = version

    def scale_lr(self, factor: float) -> None:
        """Of all later updates, until a `load` or `restore` says otherwise."""
        assert factor > 0, f"a learning rate cannot be multiplied by {factor}"
        self._lr_factor *= factor

    def _arrangement(self) -> dict[str, Any]:
        """What a state depends on."""
        return {
            "zero": self._stage,
            "ranks": self._place.ranks,
            "dtype": self._setup.model.dtype,
            "parameters": self._manifest,
        }

    def export(self, path: Path) -> None:
        """The adapted model as a plain transformers folder. Rank 0 holds one copy on its host and fills it tensor by tensor."""
        moved = iter(self.weights())
        if self._place.rank == 0:
            export(self._setup.model, moved, path)
        else:
            for _ in moved:
                pass
        dist.barrier()

    def close(self) -> None:
        """Releases what DeepSpeed holds. The process stays a rank."""
        self._engine.destroy()
        leave(self._place)


class _Whole(nn.Module):
    """Runs any computation with the model below it, so that DeepSpeed's hooks see where a forward pass begins and ends."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.train(False)

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _replace_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module.get_submodule(owner).register_buffer(attribute, value, persistent=False)
