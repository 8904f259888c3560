"""Weights to workers, bucket by bucket, through the object store of the cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ttrl.cluster import Cluster, Lost
from ttrl.cluster.transport import Transport
from ttrl.config.schema import Recipe
from ttrl.model.buckets import lent, pack_buckets, unpack
from ttrl.protocols import RemoteWeights, WeightSource
from ttrl.types import AdapterSpec, WeightStamp

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a worker says after a delivery: the hash of what came, and what it then holds."""

    fingerprint: str
    stamp: WeightStamp


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The worker lives but did not get everything, because another one was lost; it must be sent to again."""


Receipt = Arrival | Interrupted | Lost


class Delivery(Protocol):
    """A way of weights into workers."""

    def send(self, workers: Sequence[Any], source: WeightSource) -> list[Receipt]:
        """One receipt per worker. Raises what a worker raises, such as EngineError for a tensor that did not come."""
        ...


def delivery(nodes: Cluster, recipe: Recipe, kind: Transport) -> Delivery:
    """By `kind`, which `ttrl.cluster.transport` decides."""
    if kind == "gloo":
        from ttrl.rollout.gloo import Gloo

        return Gloo(nodes, nodes.section.bucket_mb << 20)
    if kind == "object_store":
        return ObjectStore(nodes, nodes.section.bucket_mb << 20)
    if kind == "shared_memory":
        from ttrl.rollout.shared import SharedMemory

        return SharedMemory(nodes, nodes.section.bucket_mb << 20)
    from ttrl.rollout.direct import Direct

    return Direct(nodes, recipe, kind)


class ObjectStore:
    """Shared memory within a node, Ray's own transfer between nodes; every worker reads the same copy.

    Pieces of half a bucket: one is being loaded, the next one waits, so that no worker ever does, and a third is packed before it
    goes into the store. That is less than two buckets in all.
    """

    def __init__(self, nodes: Cluster, bucket_bytes: int) -> None:
        self._nodes, self._piece_bytes = nodes, max(1, bucket_bytes // 2)

    def send(self, workers: Sequence[Any], source: WeightSource) -> list[Receipt]:
        """Nothing but references passes through this process when the source lives in others."""
        lost: dict[int, Lost] = {}

        def settle(calls: dict[int, Any]) -> dict[int, Any]:
            what = f"sync to version {source.version}"
            found = self._nodes.settle(list(calls.values()), seconds=self._nodes.section.call_seconds, what=what)
            done = dict(zip(calls, found, strict=True))
            lost.update({i: value for i, value in done.items() if isinstance(value, Lost) and i not in lost})
            return {i: value for i, value in done.items() if i not in lost}

        before: dict[int, Any] = {}
        """what was asked before the last piece was sent"""
        calls = {
            i: w.begin_load.remote(source.version, dict(source.manifest), source.adapter) for i, w in enumerate(workers)
        }
        for ref in stored(self._nodes, source, self._piece_bytes):  # made while the workers load the one before
            before, calls = calls, {i: workers[i].load.remote(ref) for i in calls if i not in lost}
            del ref  # the object store may forget it as soon as every worker has
            if not settle(before):
                break
        ended = settle({i: workers[i].end_load.remote() for i in settle(calls)}) if len(lost) < len(workers) else {}
        return [lost[i] if i in lost else Arrival(*ended[i]) for i in range(len(workers))]


def stored(nodes: Cluster, source: WeightSource, bucket_bytes: int) -> Iterator[Any]:
    """References to the buckets of a source, each made when it is asked for."""
    if isinstance(source, RemoteWeights):
        yield from source.bucket_refs(bucket_bytes)
    else:
        for bucket in pack_buckets(iter(source), bucket_bytes, room=lent(bucket_bytes)):
            yield nodes.put(bucket)


@dataclass(frozen=True, slots=True)
class KeptRefs:
    """A WeightSource that is a whole copy in the object store; dropped with the last reference to this object."""

    nodes: Cluster
    version: int
    manifest: Mapping[str, tuple[int, ...]]
    adapter: AdapterSpec | None
    refs: tuple[Any, ...]

    @staticmethod
    def of(source: WeightSource, nodes: Cluster) -> KeptRefs:
        """The source as it is now."""
        if isinstance(source, KeptRefs):
            return source
        refs = tuple(stored(nodes, source, nodes.section.bucket_mb << 20))
        return KeptRefs(nodes, source.version, dict(source.manifest), source.adapter, refs)

    def bucket_refs(self, bucket_bytes: int) -> Iterator[Any]:
        """In the size they were stored with."""
        return iter(self.refs)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from unpack(self.nodes.fetch(ref) for ref in self.refs)
