"""What runs in a rollout actor: one engine, driven by `RayPool` from the process of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttrl.config.schema import ModelSection, Plug
from ttrl.model.buckets import Bucket, Entry, Unpacker
from ttrl.protocols import Engine
from ttrl.registry import build
from ttrl.types import AdapterSpec, FloatArray, IntArray, Request, Rollout, WeightStamp

if TYPE_CHECKING:
    from ttrl.rollout.gloo import Receiver


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the pool must know of an engine."""

    has_weights: bool
    takes_adapters: bool
    contexts_at_once: int | None
    max_positions: int | None
    weights: WeightStamp


class Worker:
    """A Ray actor. `start` comes first; methods are called one at a time."""

    _engine: Engine
    _unpacker: Unpacker
    _receiver: Receiver

    def start(self, plug: Plug, model: ModelSection) -> Traits:
        """Build the engine by its name. Raises what the engine raises."""
        self._engine = build("engine", plug, model, _never_stop)
        engine = self._engine
        return Traits(
            has_weights=engine.has_weights, takes_adapters=engine.takes_adapters, contexts_at_once=engine.contexts_at_once,
            max_positions=engine.max_positions, weights=engine.ping().weights,
        )  # fmt: skip

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order."""
        return self._engine.generate(requests)

    def begin_load(self, version: int, manifest: Mapping[str, tuple[int, ...]], adapter: AdapterSpec | None) -> None:
        """New weights follow."""
        self._unpacker = Unpacker()
        self._engine.begin_load(version, manifest, adapter)

    def load(self, bucket: Bucket) -> None:
        """Some of them; the bucket lies in the object store and is only read."""
        self._engine.load(
            self._unpacker.tensors(bucket), lasting=True
        )  # the store frees a bucket when the last view of it is gone

    def load_shared(self, path: str, seconds: float) -> bool:
        """All of them, from a sender on this machine (`shared.py`); False when it left."""
        from ttrl.rollout.shared import receive

        try:
            for bucket in receive(path, seconds):
                self._engine.load(self._unpacker.tensors(bucket), lasting=True)
        except OSError:
            return False
        return True

    def join(self, address: tuple[str, int], rank: int, size: int, seconds: float) -> bool:
        """Become part of a broadcast group (`gloo.py`); False when it did not come about."""
        from ttrl.rollout.gloo import Receiver

        try:
            self._receiver = Receiver(address, rank, size, seconds)
        except RuntimeError:
            return False
        return True

    def receive(self, entries: Sequence[Entry], nbytes: int) -> bool:
        """Load a bucket that is broadcast; False when the group broke."""
        try:
            bucket = self._receiver.receive(entries, nbytes)
        except RuntimeError:
            return False
        self._engine.load(self._unpacker.tensors(bucket), lasting=True)
        return True

    def transfer(self, method: str, argument: dict[str, Any] | None) -> None:
        """A step of vLLM's own weight transfer, called by a trainer rank (`direct.py`); only engine `vllm` has it."""
        engine: Any = self._engine
        engine.transfer(method, argument)

    def ping(self) -> None:
        """Answers when it is this call's turn."""

    def end_load(self) -> tuple[str, WeightStamp]:
        """(fingerprint of what arrived, stamp of what the engine now says it holds)."""
        fingerprint = self._engine.end_load()
        return fingerprint, self._engine.ping().weights

    def score(self, token_ids: IntArray) -> FloatArray:
        """[T] -> [T - 1]."""
        return self._engine.score(token_ids)

    def release(self) -> None:
        self._engine.release()

    def restore(self) -> None:
        self._engine.restore()


def _never_stop() -> None:
    """The wish to stop reaches the process of the run, which then ends its workers."""
