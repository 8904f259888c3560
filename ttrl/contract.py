"""What plug-ins must hand back, checked at the border, and who is to blame when they raise."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType, TracebackType

import numpy as np

from ttrl.errors import PluginError
from ttrl.types import Group, Sample, Scored

SYNTHETIC_META = MappingProxyType({"image_size": (1000, 1000)})
"""What the prompts of synthetic groups say about themselves, so that rewards over screenshots can be tried too."""


class Blame:
    """`with Blame("reward", name, prompt_id):` adds to any exception where it happened, and lets it pass."""

    def __init__(self, slot: str, plugin: str, prompt_id: str) -> None:
        self._note = f"in {slot} {plugin!r}, prompt {prompt_id!r}"

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self._note)


def check_scored(scored: Scored, group: Group) -> None:
    """Raises PluginError for wrong lengths, values that are not finite, or rollouts trained that must not be."""
    votes = len(group.rollouts)
    if scored.group is not group:
        raise PluginError("the reward must return the group it was given, unchanged")
    for name in ("rewards", "train", "classes", "answers"):
        length = len(getattr(scored, name))
        if length != votes:
            raise PluginError(f"{name} has {length} entries for {votes} rollouts")
    if not np.isfinite(scored.rewards).all():
        index = int(np.flatnonzero(~np.isfinite(scored.rewards))[0])
        raise PluginError(
            f"the reward of rollout {index} is {scored.rewards[index]}; abstain (train False) instead of NaN or infinity"
        )
    if bool((scored.train & ~group.trainable).any()):
        raise PluginError("train marks rollouts that were not drawn for training (group.trainable)")
    if scored.token_rewards is not None:
        if len(scored.token_rewards) != votes:
            raise PluginError(f"token_rewards has {len(scored.token_rewards)} entries for {votes} rollouts")
        for index, (rewards, rollout) in enumerate(zip(scored.token_rewards, group.rollouts, strict=True)):
            if len(rewards) != len(rollout.token_ids) or not np.isfinite(rewards).all():
                raise PluginError(f"token_rewards of rollout {index} do not fit its tokens, or are not finite")


def check_samples(samples: Sequence[Sample]) -> None:
    """Raises PluginError when per-token arrays do not fit the completion, or are not finite."""
    for sample in samples:
        tokens = len(sample.completion_ids)
        if sample.extras.keys() != samples[0].extras.keys():
            raise PluginError(
                f"all samples must carry the same extras, got {sorted(samples[0].extras)} and {sorted(sample.extras)}"
            )
        columns = {name: getattr(sample, name) for name in ("sampler_logprobs", "advantages", "weights")}
        for name, values in {**columns, **sample.extras}.items():
            if len(values) != tokens or not np.isfinite(values).all():
                raise PluginError(f"{name} must be {tokens} finite numbers, one per completion token")
        if tokens == 0:
            raise PluginError("a sample without completion tokens cannot be trained on")
