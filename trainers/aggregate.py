"""How the losses of tokens become one number: as weights of tokens and a denominator, so that every loss and every regularizer is
aggregated alike, and micro-batches and ranks only ever add up.

    token       sum of token losses / tokens that train                    DAPO; every token counts the same
    sequence    mean over rows of the mean over the row's tokens           GRPO as published; tokens of long answers count less
    fixed       sum of token losses / (rows * fixed_length)                Dr. GRPO; no length in the denominator at all

"Tokens that train" are those with a weight. Rows are those that were trained on: what gates dropped is in no denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ttrl.errors import ConfigError
from ttrl.types import Sample

Aggregate = Literal["token", "sequence", "fixed"]


@dataclass(frozen=True, slots=True)
class Aggregation:
    """`aggregate` and, for `fixed` only, `fixed_length` in tokens."""

    how: Aggregate = "token"
    fixed_length: int | None = None

    def __post_init__(self) -> None:
        if self.how == "fixed" and (self.fixed_length is None or self.fixed_length < 1):
            raise ConfigError(
                "aggregate: fixed divides by rows x fixed_length; give fixed_length, usually rollout.max_new_tokens"
            )
        if self.how != "fixed" and self.fixed_length is not None:
            raise ConfigError(f"fixed_length belongs to aggregate: fixed, not to {self.how!r}")

    def weigh(self, sample: Sample) -> Sample:
        """Masks (0 or the token's own weight) -> weights. The sample must have a token with a weight."""
        if self.how != "sequence":
            return sample
        return replace(sample, weights=(sample.weights / np.float64(sample.weights.sum())).astype(np.float32))

    def denominator(self, samples: Sequence[Sample]) -> float:
        """Of an update on these samples."""
        if self.fixed_length is not None:
            return float(len(samples) * self.fixed_length)
        if self.how == "sequence":
            return float(len(samples))
        return float(sum(float(sample.weights.sum()) for sample in samples))
