"""Hold the entropy of trained tokens inside a band (SPINE, arXiv 2511.17938).

    loss = coefficient * sum_t w_t * (high_weight * max(0, H_t - hi) + low_weight * max(0, lo - H_t)) / tokens_in_step

H_t is the entropy of the policy now, with gradient; lo and hi are constants. With `shape: [fork_tokens]` only forks have a weight.
Where the edges come from:

    edges: [lo, hi]           nats, fixed by the recipe
    quantiles: [0.1, 0.5]     of the sampler's entropies over a response, a group or a step (`over`)
    hold: n                   with `over: step`: edges stay for n steps; n = prompts / prompts_per_step is an epoch; 0: those of
                              the first step stay for good

Edges that are recomputed from the current policy follow it: one token in ten is pushed up and every second one down whatever the
level is, and the band sinks. `hold: 0` or `edges` stop that; train/band_low and train/band_high show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.trainers.shapers.base import Scope, Shaper, entropies, scopes
from ttrl.types import Sample

LOW, HIGH = "band_low", "band_high"


def band_edges(entropy: npt.NDArray[np.floating], quantiles: tuple[float, float] = (0.1, 0.5)) -> tuple[float, float]:
    """(lo, hi): linearly interpolated quantiles of [n] entropies. Golden: [.8, .9, 1, 1.1, 1.2] -> (.84, 1)."""
    low, high = np.quantile(np.asarray(entropy, np.float64), quantiles)
    return float(low), float(high)


class EntropyBand(Shaper):
    """`regularizers: [{use: entropy_band, with: {coefficient: 0.1}}]`. The paper does not give its coefficients."""

    needs = frozenset({"entropy", "entropy_grad"})

    def __init__(
        self, *, coefficient: float, quantiles: tuple[float, float] = (0.1, 0.5), over: Scope = "response",
        edges: tuple[float, float] | None = None, hold: int = 1, low_weight: float = 1.0, high_weight: float = 1.0,
    ) -> None:  # fmt: skip
        if coefficient <= 0.0 or min(low_weight, high_weight) < 0.0 or max(low_weight, high_weight) == 0.0:
            raise ValueError("coefficient must be positive, low_weight and high_weight not negative and not both 0")
        if not 0.0 <= quantiles[0] <= quantiles[1] <= 1.0:
            raise ValueError(f"quantiles must be [low, high] in [0, 1], got {list(quantiles)}")
        if edges is not None and not 0.0 <= edges[0] <= edges[1]:
            raise ValueError(f"edges must be [low, high] in nats, got {list(edges)}")
        if hold < 0 or (hold != 1 and (over != "step" or edges is not None)):
            raise ValueError(
                "hold keeps the edges of a whole step: it needs over: step and no edges, and is at least 0"
            )
        self._coefficient, self._low, self._high = coefficient, low_weight, high_weight
        self._quantiles, self._over, self._hold = quantiles, over, hold
        self._edges, self._since = edges, -1
        self._fixed = edges is not None

    def on_step(self, samples: list[Sample], step: int, metrics: MetricSet) -> list[Sample]:
        """Edges as two numbers per token; train/band_low and train/band_high: means over tokens."""
        result = list(samples)
        for members in scopes(samples, self._over):
            pooled = np.concatenate([entropies(samples[index])[samples[index].weights > 0] for index in members])
            low, high = self._edges_of(pooled, step)
            metrics.mean("train/band_low", low, len(pooled))
            metrics.mean("train/band_high", high, len(pooled))
            for index in members:
                size = len(samples[index].weights)
                edges = {LOW: np.full(size, low, np.float32), HIGH: np.full(size, high, np.float32)}
                result[index] = replace(samples[index], extras={**samples[index].extras, **edges})
        return result

    def _edges_of(self, pooled: npt.NDArray[np.float64], step: int) -> tuple[float, float]:
        if self._fixed:
            assert self._edges is not None
            return self._edges
        if not pooled.size:
            return (0.0, 0.0)  # nothing of it trains
        held = self._hold != 1 and self._edges is not None and (self._hold == 0 or step < self._since + self._hold)
        if not held:
            self._edges, self._since = band_edges(pooled, self._quantiles), step
        assert self._edges is not None
        return self._edges

    def state(self) -> Mapping[str, Any]:
        """The edges that are held, and the step they are from."""
        if self._fixed or self._hold == 1 or self._edges is None:
            return {}
        return {"edges": list(self._edges), "since": self._since}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._fixed or self._hold == 1:
            return
        self._edges = (float(state["edges"][0]), float(state["edges"][1])) if state else None
        self._since = int(state["since"]) if state else -1

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        """train/band: the mean excess; train/band_below, train/band_above: shares of tokens outside."""
        above = (out.entropy - batch.extras[HIGH]).relu()  # exactly on an edge there is no force
        below = (batch.extras[LOW] - out.entropy).relu()
        excess = self._high * above + self._low * below
        metrics = MetricSet()
        counted = batch.weights > 0
        tokens = float(counted.sum())
        if tokens:
            metrics.mean("train/band", float(excess.detach()[counted].mean()), tokens)
            metrics.mean("train/band_below", float((below[counted] > 0).float().mean()), tokens)
            metrics.mean("train/band_above", float((above[counted] > 0).float().mean()), tokens)
        return LossOut(loss=self._coefficient * (excess * batch.weights).sum() / batch.tokens_in_step, metrics=metrics)
