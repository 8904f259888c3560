"""A trainer rank as a Ray actor. It builds its parts from the recipe itself: names travel, objects do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttrl.config.schema import Recipe
from ttrl.types import AdapterSpec, FloatArray, IntArray, PackedBatch

if TYPE_CHECKING:
    from ttrl.model.buckets import Bucket
    from ttrl.model.outlet import Outlet
    from ttrl.trainers.deepspeed_backend import DeepSpeedTrainer
    from ttrl.trainers.process_group import Place
    from ttrl.trainers.rankstep import RankStep


class RankActor:
    """One rank. Methods of `DeepSpeedTrainer`, called on all ranks at once."""

    def __init__(self) -> None:
        self._trainer: DeepSpeedTrainer | None = None
        self._store: Any = None
        self._place: Place | None = None
        self._buckets: Iterator[Bucket | None] = iter(())
        self._teaching = ExitStack()
        self._outlet: Outlet | None = None

    def address(self) -> str:
        """Of this node, as the cluster knows it."""
        import ray

        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def open_store(self, address: str, ranks: int, seconds: float) -> tuple[str, int]:
        """Where the ranks will meet; rank 0 only."""
        from ttrl.trainers.process_group import open_store

        self._store = open_store(address, ranks, seconds)
        return address, self._store.port

    def start(self, recipe: Recipe, place: Place) -> bool:
        """Meet the others and load the model; returns `shares_prompts`."""
        from ttrl.trainers.backends import TrainerSetup
        from ttrl.trainers.deepspeed_backend import DeepSpeedTrainer

        # What arrives through the object store is read-only, and is only read
        warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
        setup = TrainerSetup.of(recipe, lambda: None)  # the user's wish to stop reaches the driver
        self._place = place
        self._trainer = DeepSpeedTrainer(setup, place, self._store)
        return self._trainer.shares_prompts

    def step(self, step: int, updates: Sequence[Sequence[PackedBatch]]) -> RankStep:
        return self._ours.part(step, updates)

    def describe(self, *, adapter: bool) -> tuple[int, Mapping[str, tuple[int, ...]], AdapterSpec | None]:
        """Version, manifest and adapter of the weights as they are now."""
        source = self._ours.weights(adapter=adapter)
        return source.version, source.manifest, source.adapter

    def begin(self, bucket_bytes: int, *, adapter: bool) -> None:
        """The next `bucket` is the first one."""
        from ttrl.model.buckets import follow_buckets, lent, pack_buckets

        assert self._place is not None
        tensors = iter(self._ours.weights(adapter=adapter))
        if self._place.rank == 0:  # a bucket is in the object store before the next one is asked for
            self._buckets = pack_buckets(tensors, bucket_bytes, room=lent(bucket_bytes))
        else:
            self._buckets = follow_buckets(tensors, bucket_bytes)

    def bucket(self) -> tuple[Bucket | None, bool]:
        """(the next bucket on rank 0, whether there was one): two results, of which the second is small."""
        try:
            return next(self._buckets), True
        except StopIteration:
            return None, False

    def outlet(self, work: Callable[[Outlet], None]) -> None:
        """Run a sender here."""
        from ttrl.model.outlet import Outlet

        if self._outlet is None:
            assert self._place is not None
            self._outlet = Outlet(rank=self._place.rank, weights=self._ours.weights)
        work(self._outlet)

    def score(self, token_ids: IntArray) -> FloatArray:
        return self._ours.score(token_ids)

    def teach(self, on: bool) -> None:
        """The weights of the EMA teacher into the model, and out of it again."""
        if on:
            self._teaching.enter_context(self._ours.teaching())
        else:
            self._teaching.close()

    def save(self, path: Path) -> None:
        self._ours.save(path)

    def load(self, path: Path) -> int:
        """Returns the version."""
        self._ours.load(path)
        return self._ours.version

    def restore(self, path: Path, version: int) -> int:
        """Returns the version."""
        self._ours.restore(path, version=version)
        return self._ours.version

    def scale_lr(self, factor: float) -> None:
        self._ours.scale_lr(factor)

    def export(self, path: Path) -> None:
        self._ours.export(path)

    @property
    def _ours(self) -> DeepSpeedTrainer:
        assert self._trainer is not None
        return self._trainer
