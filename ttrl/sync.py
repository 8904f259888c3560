"""From trainer to engines, proven: after each sync a canary text must have the log-probs the trainer gives it.

Three things are checked. That every announced tensor came is the engine's part (`Intake`). That the engines hold other weights
than before is seen from the fingerprint of what arrived and from the canary, which also notices weights that arrived but are not
what the engine computes with. That they are the trainer's weights is the canary's agreement within a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ttrl.errors import EngineError
from ttrl.protocols import Pool, Trainer, WeightSource
from ttrl.types import FloatArray, IntArray, Prompt, StepStats

MAX_MISMATCH, MAX_MISMATCH_HALF = 1e-3, 0.1
"""Mean absolute difference of log-probs, engine against trainer on the same tokens, that rounding may cause."""
CANARY_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Weights on their way, and how the trainer that made them scores the canary."""

    source: WeightSource
    canary: FloatArray | None
    must_move: bool


class WeightLink:
    """The one way of weights from a trainer to a pool."""

    def __init__(self, trainer: Trainer, pool: Pool, canary: IntArray, *, exact: bool) -> None:
        self._trainer, self._pool, self._canary = trainer, pool, canary
        self._exact = exact and pool.has_weights
        """float32 on both sides: rounding is small, and any update changes some bit"""
        self._bound = MAX_MISMATCH if exact else MAX_MISMATCH_HALF
        self._seen: list[FloatArray] = []

    def sync(self, stats: StepStats | None) -> None:
        """Trainer to engines now, one bucket at a time. Raises EngineError when the weights did not arrive as they are."""
        self.install(self._publish(stats))

    def sync_restored(self, *, moved: bool) -> None:
        """The same after the trainer went back to earlier weights; `moved`: they are not those the engines have."""
        self.install(replace(self._publish(None), must_move=moved and self._exact))

    def keep(self, stats: StepStats | None) -> Published:
        """A copy for `install` at a later time."""
        published = self._publish(stats)
        return Published(
            source=self._pool.keep(published.source), canary=published.canary, must_move=published.must_move
        )

    def _publish(self, stats: StepStats | None) -> Published:
        scores = self._trainer.score(self._canary) if self._pool.has_weights else None
        moved = stats is not None and stats.grad_norm > 0 and not stats.may_stand and self._exact
        source = self._trainer.weights(adapter=self._pool.takes_adapters)
        return Published(source=source, canary=scores, must_move=moved)

    def install(self, published: Published) -> None:
        """Into every engine, and proof of it."""
        self._pool.sync(published.source, must_move=published.must_move)
        if published.canary is None:
            return
        before, self._seen = self._seen, self._pool.score(self._canary)
        for engine, scores in enumerate(self._seen):
            off = float(np.abs(scores - published.canary).mean())
            if not off <= self._bound:
                raise EngineError(
                    f"after the sync to version {published.source.version} engine {engine} scores the canary text {off:.2g} off "
                    f"the trainer, more than {self._bound:g}: it does not compute with the trainer's weights"
                )
        if published.must_move and len(before) == len(self._seen):
            frozen = [
                i for i, (old, new) in enumerate(zip(before, self._seen, strict=True)) if np.array_equal(old, new)
            ]
            if frozen:
                raise EngineError(
                    f"after the sync to version {published.source.version} engine {frozen[0]} scores the canary text exactly as "
                    "before: the new weights arrived but are not used"
                )

    def check_on_policy(self, stats: StepStats) -> None:
        """Raises EngineError when the rollouts trained on cannot be from the weights the trainer had."""
        mismatch = stats.metrics["train/sampler_mismatch"]
        if self._pool.has_weights and mismatch > self._bound:
            raise EngineError(
                f"log-probs of the engine and the trainer differ by {mismatch:.2g} on average, more than {self._bound:g}: "
                "they do not hold the same weights"
            )


def canary_text(prompts: Sequence[Prompt], max_positions: int | None) -> IntArray:
    """The first tokens of the prompts, one after the other: a fixed text that needs no tokenizer, and has no pictures.

    So it says nothing of a vision tower. That its weights came is the manifest's part, that the engine sees as the trainer does is in
    the log-probs of the rollouts of every step (`WeightLink.check_on_policy`).
    """
    limit = min(CANARY_TOKENS, max_positions or CANARY_TOKENS)
    return np.concatenate([_words(prompt) for prompt in prompts[:CANARY_TOKENS]])[:limit].astype(np.int32)


def _words(prompt: Prompt) -> IntArray:
    """[W] tokens of a prompt without those that became more because of a picture."""
    if prompt.marked_ids is None:
        return prompt.token_ids
    size = int(max(prompt.token_ids.max(), prompt.marked_ids.max())) + 1
    grown = np.bincount(prompt.token_ids, minlength=size) > np.bincount(prompt.marked_ids, minlength=size)
    return prompt.marked_ids[~grown[prompt.marked_ids]]
