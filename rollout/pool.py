"""The in-process pool: one engine, here. It notices stale weights before anything is trained on them.

`RayPool` (ray_pool.py) has the same interface and gives the same rollouts from many engines in other processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ttrl.errors import EngineError
from ttrl.model.buckets import KeptWeights, pack_buckets
from ttrl.model.weights import load_weights
from ttrl.protocols import Engine, WeightSource
from ttrl.types import FloatArray, IntArray, Request, Rollout, WeightStamp


class LocalPool:
    """Runs requests on its engine and checks that every rollout carries the weights that were synced last."""

    def __init__(self, engine: Engine, *, bucket_bytes: int = 256 << 20) -> None:
        self.tokenizer = engine.tokenizer
        self._engine, self._bucket_bytes = engine, bucket_bytes
        self._expected = engine.ping().weights

    @property
    def has_weights(self) -> bool:
        """False for engines that only play a script."""
        return self._engine.has_weights

    @property
    def takes_adapters(self) -> bool:
        """The engine wants LoRA adapters as they are."""
        return self._engine.takes_adapters

    @property
    def max_positions(self) -> int | None:
        """Longest prompt plus completion, if there is a limit."""
        return self._engine.max_positions

    @contextmanager
    def released(self) -> Iterator[None]:
        """The engine leaves the accelerator to the trainer."""
        self._engine.release()
        yield
        self._engine.restore()

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order. Raises EngineError for missing, foreign or stale rollouts."""
        rollouts = self._engine.generate(requests)
        check_rollouts(requests, rollouts, self._expected)
        return rollouts

    def sync(self, source: WeightSource, *, must_move: bool) -> None:
        """Hand new weights to the engine. Raises EngineError when they did not arrive, or moved nothing although they had to."""
        before = self._expected
        fingerprint = load_weights(self._engine, source)
        self._expected = self._engine.ping().weights
        check_arrival(source.version, [self._expected], [fingerprint], before if must_move else None)

    def keep(self, source: WeightSource) -> WeightSource:
        """The weights as they are now, for a later sync."""
        return KeptWeights.of(source, tuple(pack_buckets(iter(source), self._bucket_bytes)))

    def score(self, token_ids: IntArray) -> list[FloatArray]:
        """[T] -> one array [T - 1] of log-probs at temperature 1."""
        return [self._engine.score(token_ids)]

    def events(self) -> Mapping[str, float]:
        """Nothing befalls an engine in this process that does not end the run."""
        return {}

    def close(self) -> None:
        """The engine ends with this process."""


def check_rollouts(requests: Sequence[Request], rollouts: Sequence[Rollout], expected: WeightStamp) -> None:
    """Raises EngineError unless rollout i answers request i and was made by the expected weights."""
    if len(rollouts) != len(requests):
        raise EngineError(f"the engine returned {len(rollouts)} rollouts for {len(requests)} requests")
    for request, rollout in zip(requests, rollouts, strict=True):
        if (rollout.prompt_id, rollout.index) != (request.prompt.id, request.index):
            raise EngineError(
                f"asked for rollout {request.index} of {request.prompt.id}, got {rollout.index} of {rollout.prompt_id}"
            )
        if rollout.weights != expected:
            raise EngineError(
                f"stale weights: rollout {rollout.index} of {rollout.prompt_id} was made by {rollout.weights}, not {expected}"
            )


def check_arrival(
    version: int, stamps: Sequence[WeightStamp], fingerprints: Sequence[str], before: WeightStamp | None
) -> None:
    """Raises EngineError unless every engine reports this version and one fingerprint, other than `before`'s if that is given."""
    for stamp, fingerprint in zip(stamps, fingerprints, strict=True):
        if stamp.version != version or stamp.fingerprint != fingerprint:
            raise EngineError(f"after a sync to version {version} the engine reports {stamp}")
    if len(set(fingerprints)) > 1:
        raise EngineError(
            f"after a sync to version {version} the engines hold different weights: {sorted(set(fingerprints))}"
        )
    if before is not None and fingerprints[0] == before.fingerprint:
        raise EngineError(
            f"version {version} of the weights is identical to the one before; the sync or the optimizer did nothing"
        )
