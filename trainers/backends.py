"""The trainer back-ends a recipe can name. Factories, so that naming one does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from ttrl.config.schema import ModelSection, TrainerSection
from ttrl.protocols import Objective, Stabilizer, StopCheck, Trainer
from ttrl.trainers.parameters import Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSetup:
    """Everything a back-end is built from."""

    model: ModelSection
    trainer: TrainerSection
    objective: Objective
    stabilizers: tuple[Stabilizer, ...]
    parameters: Parameters
    temperature: float
    """Of the rollouts: log-probs of the trainer are taken at the same temperature."""
    steps: int
    seed: int
    check_stop: StopCheck


def torch(setup: TrainerSetup) -> Trainer:
    """One process, one device: CPU or one GPU."""
    from ttrl.trainers.torch_backend import TorchTrainer

    return TorchTrainer(setup)
