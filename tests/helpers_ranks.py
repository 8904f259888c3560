"""Trainers of the deepspeed back-end, and two processes that are its ranks for a whole test module."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_torch import section

from ttrl.config.schema import TrainerSection
from ttrl.trainers.backends import TrainerSetup
from ttrl.trainers.deepspeed_backend import DeepSpeedTrainer
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.losses.kl import KLAnchor
from ttrl.trainers.parameters import Full, LoRA
from ttrl.trainers.process_group import Place, join, open_store
from ttrl.trainers.rankstep import merge
from ttrl.types import PackedBatch

SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""DeepSpeed keeps small tensors whole, and here all are small."""
SECONDS = 120.0


def deepspeed_setup(folder: Path, *, lora: bool = False, kl: float = 0.0, **fields: Any) -> TrainerSetup:
    """`fields` are those of TrainerSetup, `settings` those of the recipe's trainer section. Picklable arguments only."""
    settings = {"backend": "deepspeed", "lr": 1e-3, "schedule": "constant", "warmup": 0.0, **fields.pop("settings", {})}
    if settings.get("zero") == 3:
        settings.setdefault("deepspeed", SPLIT_ALL)
    dtype = fields.pop("dtype", "float32")
    return TrainerSetup(
        **{
            "model": section(folder, dtype), "trainer": TrainerSection.model_validate(settings), "objective": GRPO(),
            "stabilizers": (KLAnchor(coefficient=kl),) if kl else (), "parameters": LoRA(rank=2) if lora else Full(),
            "temperature": 0.8, "steps": 4, "seed": 0, "check_stop": lambda: None, **fields,
        }
    )  # fmt: skip


def rank_trainer(folder: Path, place: Place | None = None, **fields: Any) -> DeepSpeedTrainer:
    """The only rank, or the rank this process already is."""
    return DeepSpeedTrainer(deepspeed_setup(folder, **fields), place or Place(seconds=SECONDS))


def full_gradients(trainer: DeepSpeedTrainer) -> dict[str, torch.Tensor]:
    """Accumulated over micro-batches and ranks, by the trainer's own names. A collective; before the optimizer's step."""
    from deepspeed.utils import safe_get_full_grad

    plain = trainer._engine.optimizer is trainer._engine.basic_optimizer
    return {
        name: (p.grad if plain else safe_get_full_grad(p)).detach().clone()
        for name, p in trainer._model.named_parameters()
        if p.requires_grad
    }


def watch_gradients(trainer: DeepSpeedTrainer) -> dict[str, torch.Tensor]:
    """Filled at the moment of each update, before clipping."""
    caught: dict[str, torch.Tensor] = {}
    original = trainer._update

    def record(lr: float) -> float:
        caught.update(full_gradients(trainer))
        return original(lr)

    trainer._update = record  # type: ignore[method-assign]
    return caught


class Ranks:
    """Processes that have joined; each runs the same function with its own Place."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        master = self._receive(self._pipes[0])
        for pipe in self._pipes:
            pipe.send(master)
        for pipe in self._pipes:
            self._receive(pipe)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(place, *arguments) on every rank. Raises AssertionError with the traceback of one that failed."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return [self._receive(pipe) for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def _receive(self, pipe: Connection) -> Any:
        assert pipe.poll(2 * SECONDS), "a rank does not answer"
        good, value = pipe.recv()
        assert good, value
        return value


def _serve(pipe: Connection, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    store = open_store("127.0.0.1", ranks, SECONDS) if rank == 0 else None
    if store is not None:
        pipe.send((True, ("127.0.0.1", store.port)))
    place = Place(rank=rank, ranks=ranks, master=pipe.recv(), seconds=SECONDS)
    join(place, store, gpu=False)
    pipe.send((True, None))
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            pipe.send((True, function(place, *arguments)))
        except Exception:  # noqa: BLE001 - handed to the test
            pipe.send((False, traceback.format_exc()))


def numpied(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """For a pipe between processes."""
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}


def train(
    place: Place, folder: Path, fields: dict[str, Any], steps: Sequence[Sequence[Sequence[list[PackedBatch]]]]
) -> dict[str, Any]:
    """Steps of one rank. `steps[step][rank]` are the updates of a rank."""
    trainer = rank_trainer(folder, place, **fields)
    caught = watch_gradients(trainer)
    parts, gradients = [], []
    for step, dealt in enumerate(steps):
        parts.append(trainer.part(step, dealt[place.rank]))
        gradients.append(numpied(caught))
    weights = numpied({name: tensor.clone() for name, tensor in trainer.weights()})
    trainer.close()
    return {"parts": parts, "gradients": gradients, "weights": weights}


def merged(results: Sequence[dict[str, Any]]) -> list[Any]:
    """StepStats per step."""
    return [merge(parts) for parts in zip(*(result["parts"] for result in results), strict=True)]
