"""The trainer back-ends a recipe can name. Factories, so that naming one does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ttrl.config.schema import ClusterSection, ModelSection, Recipe, TrainerSection
from ttrl.protocols import Objective, Stabilizer, StopCheck, Trainer
from ttrl.registry import build
from ttrl.trainers.parameters import Parameters

if TYPE_CHECKING:
    from ttrl.cluster import Cluster


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
    cluster: ClusterSection = field(default_factory=ClusterSection)
    recipe: Recipe | None = None
    """What ranks in other processes build the same parts from: plug-ins travel by name, not as objects."""
    running: Cluster | None = None
    """Where ranks are started; set when `cluster.backend` is ray."""

    @staticmethod
    def of(recipe: Recipe, check_stop: StopCheck) -> TrainerSetup:
        """Fresh parts, as the recipe says. Raises ConfigError."""
        return TrainerSetup(
            model=recipe.model, trainer=recipe.trainer, objective=build("objective", recipe.objective),
            stabilizers=tuple(build("stabilizer", plug) for plug in recipe.stabilizers),
            parameters=build("parameters", recipe.trainer.parameters), temperature=recipe.rollout.temperature,
            steps=recipe.steps, seed=recipe.seed, check_stop=check_stop, cluster=recipe.cluster, recipe=recipe,
        )  # fmt: skip


def torch(setup: TrainerSetup) -> Trainer:
    """One process, one device: CPU or one GPU."""
    from ttrl.trainers.torch_backend import TorchTrainer

    return TorchTrainer(setup)


def deepspeed(setup: TrainerSetup) -> Trainer:
    """One rank in this process, or `cluster.ranks` of them as actors of a cluster."""
    from torch.cuda import is_available

    from ttrl.trainers.dsconfig import report_overrides

    report_overrides(setup.trainer, setup.model.dtype, gpu=is_available())
    if setup.running is not None:
        from ttrl.trainers.ranks import RankGroup

        return RankGroup(setup, setup.running)
    from ttrl.trainers.deepspeed_backend import DeepSpeedTrainer

    return DeepSpeedTrainer(setup)
