"""GRPO and its relatives: group-relative advantages on every token of a rollout, and a policy loss.

rewards of the trained rollouts -> advantage per rollout -> the same number on all its tokens -> loss

Four kinds of parts make a method of it, each a plug-in: `advantage`, `shape` (what happens to rewards, advantages and token weights on
the way), `loss`, and `regularizers` (terms added to the loss). docs/losses.md lists them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ttrl.config.schema import Plug
from ttrl.errors import ConfigError
from ttrl.metrics import MetricSet
from ttrl.objectives import Decoder
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.registry import build, check
from ttrl.trainers.aggregate import Aggregate, Aggregation
from ttrl.trainers.shapers.base import Shaper
from ttrl.types import Group, IntArray, Request, Sample, Scored

PPO_CLIP = (0.2, 0.2)


class GRPO:
    """Options of the parts stand with them; `clip` and `dual_clip` (loss `clip`) and `tis` (loss `tis`) may stand beside them.

    `aggregate` says how token losses become one number (default: as the loss was published), see `ttrl.trainers.aggregate`.
    """

    def __init__(
        self, *, advantage: Plug | str = "grpo", shape: tuple[Plug | str, ...] = (), loss: Plug | str = "clip",
        regularizers: tuple[Plug | str, ...] = (), aggregate: Aggregate | None = None, fixed_length: int | None = None,
        clip: tuple[float, float] = PPO_CLIP, dual_clip: float | None = None, tis: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._advantage = _build_advantage(_plug(advantage))
        shapers = [_build_shaper(_plug(plug)) for plug in shape]
        self._loss = build("loss", _with_shorthand(_plug(loss), clip, dual_clip, tis))
        self._regularizers = [build("regularizer", _plug(plug)) for plug in regularizers]
        self._shapers = [*shapers, *(part for part in self._regularizers if isinstance(part, Shaper))]
        published: Aggregate = getattr(self._loss, "aggregate", "token")  # a loss of the user need not say
        self._aggregation = Aggregation(aggregate or published, fixed_length)
        if isinstance(self._advantage, Shaper):
            self._shapers.insert(0, self._advantage)
            _refuse_rescaling(_plug(advantage).use, shapers)
        self.needs: frozenset[str] = frozenset().union(
            self._loss.needs, *(part.needs for part in (*self._shapers, *self._regularizers))
        )

    def take_tokenizer(self, tokenizer: Decoder) -> None:
        """For shapers that find text among tokens."""
        for shaper in self._shapers:
            shaper.take_tokenizer(tokenizer)

    def state(self) -> Mapping[str, Any]:
        """What shapers and regularizers remember, by position."""
        found = {str(number): dict(shaper.state()) for number, shaper in enumerate(self._shapers)}
        return {number: state for number, state in found.items() if state}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue as the objective of the same recipe that returned `state`."""
        for number, shaper in enumerate(self._shapers):
            shaper.load_state(state.get(str(number), {}))

    def probes(self, group: Group) -> list[Request]:
        """GRPO needs nothing beyond the votes."""
        return []

    def samples(self, scored: Scored) -> list[Sample]:
        """One Sample per trained rollout; advantages are relative to the trained rollouts of the group only."""
        trained = np.flatnonzero(scored.train).astype(np.int32)
        if trained.size == 0:
            return []
        rewards: Any = scored.rewards[trained]
        for shaper in self._shapers:
            rewards = shaper.on_rewards(rewards, scored, trained)
        samples = self._plain(scored, trained, self._advantage(rewards))
        for shaper in self._shapers:
            samples = shaper.on_group(samples, scored, trained)
        return samples

    def _plain(self, scored: Scored, trained: IntArray, advantages: Any) -> list[Sample]:
        """Every token has the advantage of its rollout, plus its own reward if it has one, and weight 1."""
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
                    images=scored.group.prompt.images,
                    entropy=rollout.entropy if "entropy" in self.needs else None,
                )
            )
        return samples

    def finish(self, samples: list[Sample], step: int) -> tuple[list[Sample], MetricSet]:
        """Hooks that see the whole step, then weights as `aggregate` says. Rows without a token that trains are left out.

        With shapers also train/token_share: tokens that train among all of them, and dropped/masked_rows.
        """
        metrics = MetricSet()
        for shaper in self._shapers:
            samples = shaper.on_step(samples, step, metrics)
        kept = [sample for sample in samples if (sample.weights > 0).any()]
        if self._shapers:
            for sample in samples:
                metrics.mean("train/token_share", float((sample.weights > 0).mean()), len(sample.weights))
            if len(kept) < len(samples):
                metrics.sum("dropped/masked_rows", len(samples) - len(kept))
        return [replace(self._aggregation.weigh(sample), entropy=None) for sample in kept], metrics

    def denominator(self, samples: Sequence[Sample]) -> float:
        """`tokens_in_step` of an update on these finished samples."""
        return self._aggregation.denominator(samples)

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        """The policy term and the regularizers; [N] tensors in, one scalar out."""
        result: LossOut = self._loss(out, batch)
        for part in self._regularizers:
            term: LossOut = part.loss(out, batch)
            result.metrics.merge(term.metrics)
            result = LossOut(loss=result.loss + term.loss, metrics=result.metrics)
        return result


def _plug(value: Plug | str) -> Plug:
    return Plug.model_validate(value)


def _build_advantage(plug: Plug) -> Any:
    """A function of rewards [R] with its options, or an instance that also sees the whole step."""
    factory, options = check("advantage", plug)
    return build("advantage", plug) if inspect.isclass(factory) else partial(factory, **options)


def _build_shaper(plug: Plug) -> Shaper:
    shaper = build("shaper", plug)
    if not isinstance(shaper, Shaper):
        raise ConfigError(f"shaper {plug.use!r} must be a sub-class of ttrl.trainers.shapers.base.Shaper")
    return shaper


def _with_shorthand(loss: Plug, clip: tuple[float, float], dual_clip: float | None, tis: dict[str, Any] | None) -> Plug:
    """The loss with the options that stand beside it. Raises ConfigError for those of another loss, or given twice."""
    if loss.use != "clip" and (tuple(clip) != PPO_CLIP or dual_clip is not None):
        raise ConfigError(f"clip and dual_clip belong to the clip loss, not to {loss.use!r}")
    if loss.use != "tis" and tis is not None:
        raise ConfigError(f"tis belongs to the loss tis, not to {loss.use!r}")
    given = {"clip": {"clip": clip, "dual_clip": dual_clip}, "tis": tis or {}}.get(loss.use, {})
    if not loss.options:
        return loss.model_copy(update={"options": given})
    if tis or tuple(clip) != PPO_CLIP or dual_clip is not None:
        raise ConfigError(
            f"options of the loss {loss.use!r} stand both in its own `with` and beside it; keep one of the two"
        )
    return loss


def _refuse_rescaling(advantage: str, shapers: list[Shaper]) -> None:
    found = next((type(shaper).__name__ for shaper in shapers if shaper.rescales), None)
    if found is not None:
        raise ConfigError(
            f"advantage {advantage!r} is normalised over the step, after {found} has scaled it group by group; use an advantage "
            "of the group (grpo, dr_grpo, rloo), or leave the shaper out"
        )
