"""Which stabilizers a recipe can have, seen from its back-end, its reward and its sampling. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.hooks import ABILITIES, AfterUpdate, BeforeUpdate, GradientTerm, SquaredGradients, Stabilizer, Teacher
from ttrl.protocols import Reward
from ttrl.trainers.dsconfig import DEFAULT_STAGE


def check_stabilizers(recipe: Recipe, stabilizers: Sequence[Stabilizer], reward: Reward) -> None:
    """`stabilizers` are those of the recipe, in order. Raises ConfigError for what would do nothing, or cannot be done soundly."""
    problems = []
    for plug, stabilizer in zip(recipe.stabilizers, stabilizers, strict=True):
        if not hasattr(stabilizer, "needs") or not isinstance(stabilizer, ABILITIES):
            problems.append(
                f"stabilizer {plug.use!r} must have needs and a method of ttrl.hooks, such as loss or after_update"
            )
        elif recipe.trainer.backend.use == "deepspeed":
            problems += _deepspeed(recipe, plug.use, stabilizer)
    teachers = [plug.use for plug, s in zip(recipe.stabilizers, stabilizers, strict=True) if isinstance(s, Teacher)]
    if len(teachers) > 1:
        problems.append(f"stabilizers: {', '.join(teachers)}: a run has one teacher")
    problems += _votes(recipe, reward, teaching=has_teacher(stabilizers))
    if problems:
        raise ConfigError("\n".join(problems))


def has_teacher(stabilizers: Sequence[Stabilizer]) -> bool:
    """Votes are drawn under other weights than the rollouts that are trained on."""
    return any(isinstance(stabilizer, Teacher) and stabilizer.votes for stabilizer in stabilizers)


def _deepspeed(recipe: Recipe, use: str, stabilizer: Stabilizer) -> list[str]:
    stage = DEFAULT_STAGE if recipe.trainer.zero is None else recipe.trainer.zero
    plain = stage == 0 and recipe.model.dtype == "float32"
    if isinstance(stabilizer, (BeforeUpdate, GradientTerm, SquaredGradients)) and not plain:
        return [
            f"stabilizer {use!r} must see the gradients before an update, which DeepSpeed shows only with trainer.zero: 0 and "
            f"model.dtype: float32 (here zero {stage}, {recipe.model.dtype}); set these, or trainer.backend: torch"
        ]
    if isinstance(stabilizer, (AfterUpdate, Teacher)) and stage == 3:
        return [
            f"stabilizer {use!r} writes to single weights, which trainer.zero: 3 splits over the ranks; set trainer.zero: 2, or "
            "trainer.backend: torch"
        ]
    return []


def _votes(recipe: Recipe, reward: Reward, *, teaching: bool) -> list[str]:
    """The electorate, and who makes it up."""
    elects = getattr(reward, "electorate", None) == "untrained"
    rollout = recipe.rollout
    if teaching and not elects:
        return [
            "stabilizer 'ema' with votes: true draws the votes under the teacher; only they may elect the label: "
            "reward: {use: majority_vote, with: {electorate: untrained}} (or votes: false)"
        ]
    if teaching and rollout.ahead:
        return ["stabilizer 'ema' with votes: true changes the engines' weights twice per step; set rollout.ahead: 0"]
    left = rollout.votes_per_prompt - rollout.trained
    if elects and not teaching and left < reward.min_votes:
        return [
            f"reward electorate 'untrained': of {rollout.votes_per_prompt} votes {rollout.trained} are trained on, which leaves {left} "
            f"to elect and {reward.min_votes} are needed; lower rollout.train_per_prompt, or add the stabilizer ema"
        ]
    return []
