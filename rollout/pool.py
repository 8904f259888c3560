"""The in-process pool: one engine, here. It notices stale weights before anything is trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ttrl.errors import EngineError
from ttrl.protocols import Engine, WeightSource
from ttrl.types import Request, Rollout


class LocalPool:
    """Runs requests on its engine and checks that every rollout carries the weights that were synced last."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._expected = engine.ping().weights

    @property
    def has_weights(self) -> bool:
        """False for engines that only play a script."""
        return self._engine.has_weights

    @contextmanager
    def released(self) -> Iterator[None]:
        """The engine leaves the accelerator to the trainer."""
        self._engine.release()
        yield
        self._engine.restore()

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order. Raises EngineError for missing, foreign or stale rollouts."""
        rollouts = self._engine.generate(requests)
        if len(rollouts) != len(requests):
            raise EngineError(f"the engine returned {len(rollouts)} rollouts for {len(requests)} requests")
        for request, rollout in zip(requests, rollouts, strict=True):
            if (rollout.prompt_id, rollout.index) != (request.prompt.id, request.index):
                raise EngineError(
                    f"asked for rollout {request.index} of {request.prompt.id}, got {rollout.index} of {rollout.prompt_id}"
                )
            if rollout.weights != self._expected:
                raise EngineError(
                    f"stale weights: rollout {rollout.index} of {rollout.prompt_id} was made by {rollout.weights}, not {self._expected}"
                )
        return rollouts

    def sync(self, version: int, source: WeightSource, *, must_move: bool) -> None:
        """Hand new weights to the engine. Raises EngineError when they did not arrive, or moved nothing although they had to."""
        before = self._expected.fingerprint
        fingerprint = self._engine.load_weights(version, source)
        self._expected = self._engine.ping().weights
        if self._expected.version != version or self._expected.fingerprint != fingerprint:
            raise EngineError(f"after a sync to version {version} the engine reports {self._expected}")
        if must_move and fingerprint == before:
            raise EngineError(
                f"version {version} of the weights is identical to the one before; the sync or the optimizer did nothing"
            )
