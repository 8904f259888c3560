"""The trainer back-ends a recipe can name. Factories, so that naming one does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ttrl.cluster import Cluster
from ttrl.config.schema import ClusterSection, ModelSection, Recipe, TrainerSection
from ttrl.hooks import Stabilizer
from ttrl.protocols import Objective, StopCheck, Trainer
from ttrl.registry import build
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
    cluster: ClusterSection = field(default_factory=ClusterSection)
    recipe: Recipe | None = None
    """What ranks in other processes build the same parts from: plug-ins travel by name, not as objects."""
    nodes: Cluster | None = None
    """Where ranks run; None without cluster.backend: ray."""

    @staticmethod
    def of(recipe: Recipe, check_stop: StopCheck, nodes: Cluster | None = None) -> TrainerSetup:
        """Fresh parts, as the recipe says. Raises ConfigError."""
        return TrainerSetup(
            model=recipe.model, trainer=recipe.trainer, objective=build("objective", recipe.objective),
            stabilizers=tuple(build("stabilizer", plug) for plug in recipe.stabilizers),
            parameters=build("parameters", recipe.trainer.parameters), temperature=recipe.rollout.temperature,
            steps=recipe.steps, seed=recipe.seed, check_stop=check_stop, cluster=recipe.cluster, recipe=recipe,
            nodes=nodes,
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
    if setup.nodes is not None:
        from ttrl.trainers.ranks import RankGroup

        return RankGroup(setup, setup.nodes)
    from ttrl.trainers.deepspeed_backend import DeepSpeedTrainer

    return DeepSpeedTrainer(setup)
