"""GRPO: group-relative advantages on every token of a rollout, and a clipped policy loss.

rewards of the trained rollouts -> advantage per rollout -> the same number on all its tokens -> loss
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ttrl.config.schema import Plug
from ttrl.errors import ConfigError
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.registry import build, resolve
from ttrl.types import Group, Request, Sample, Scored


class GRPO:
    """advantage and loss are plug-ins of their own; `clip` and `dual_clip` are passed to the loss `clip`, `tis` to the loss `tis`."""

    def __init__(
        self,
        *,
        advantage: str = "grpo",
        loss: str = "clip",
        clip: tuple[float, float] = (0.2, 0.2),
        dual_clip: float | None = None,
        tis: dict[str, Any] | None = None,
    ) -> None:
        self._advantage = resolve("advantage", advantage)
        options = {"clip": {"clip": clip, "dual_clip": dual_clip}, "tis": tis or {}}.get(loss, {})
        if loss != "clip" and (clip != (0.2, 0.2) or dual_clip is not None):
            raise ConfigError(f"clip and dual_clip belong to the clip loss, not to {loss!r}")
        if loss != "tis" and tis is not None:
            raise ConfigError(f"tis belongs to the loss tis, not to {loss!r}")
        self._loss = build("loss", Plug.model_validate({"use": loss, "with": options}))
        self.needs: frozenset[str] = self._loss.needs

    def probes(self, group: Group) -> list[Request]:
        """GRPO needs nothing beyond the votes."""
        return []

    def samples(self, scored: Scored) -> list[Sample]:
        """One Sample per trained rollout; advantages are relative to the trained rollouts of the group only."""
        trained = np.flatnonzero(scored.train)
        if trained.size == 0:
            return []
        advantages = self._advantage(scored.rewards[trained])
        samples = []
        for index, advantage in zip(trained, advantages, strict=True):
            rollout = scored.group.rollouts[int(index)]
            tokens = len(rollout.token_ids)
            per_token = np.full(tokens, advantage, dtype=np.float32)
            if scored.token_rewards is not None:
                per_token = per_token + scored.token_rewards[int(index)]
            samples.append(
                Sample(
                    prompt_ids=scored.group.prompt.token_ids,
                    completion_ids=rollout.token_ids,
                    sampler_logprobs=rollout.logprobs,
                    advantages=per_token,
                    weights=np.ones(tokens, np.float32),
                    group=scored.group.prompt.id,
                )
            )
        return samples

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        """The policy term; [N] tensors in, one scalar out."""
        result: LossOut = self._loss(out, batch)
        return result
