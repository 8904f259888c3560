"""Weights to workers, bucket by bucket, through the object store of the cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ttrl.cluster import Cluster, Lost
from ttrl.errors import ConfigError
from ttrl.model.buckets import pack_buckets
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


def delivery(nodes: Cluster) -> Delivery:
    """As `cluster.transport` says."""
    wanted, bucket_bytes = nodes.section.transport, nodes.section.bucket_mb << 20
    if wanted in ("auto", "object_store"):
        return ObjectStore(nodes, bucket_bytes)
    if wanted == "gloo":
        from ttrl.rollout.gloo import Gloo

        return Gloo(nodes, bucket_bytes)
    raise ConfigError(
        f"cluster.transport: {wanted} is not connected to rollout workers; use auto, object_store or gloo"
    )


class ObjectStore:
    """Shared memory within a node, Ray's own transfer between nodes; every worker reads the same copy.

    At most two buckets exist: the next one is packed while the workers load the one before, and stored when they are done.
    """

    def __init__(self, nodes: Cluster, bucket_bytes: int) -> None:
        self._nodes, self._bucket_bytes = nodes, bucket_bytes

    def send(self, workers: Sequence[Any], source: WeightSource) -> list[Receipt]:
        """Nothing but references passes through this process when the source lives in others."""
        lost: dict[int, Lost] = {}

        def settle(calls: dict[int, Any]) -> dict[int, Any]:
            what = f"sync to version {source.version}"
            found = self._nodes.settle(list(calls.values()), seconds=self._nodes.section.call_seconds, what=what)
            done = dict(zip(calls, found, strict=True))
            lost.update({i: value for i, value in done.items() if isinstance(value, Lost)})
            return {i: value for i, value in done.items() if i not in lost}

        calls = {
            i: w.begin_load.remote(source.version, dict(source.manifest), source.adapter) for i, w in enumerate(workers)
        }
        remote = isinstance(source, RemoteWeights)
        stream: Iterator[Any] = (
            source.bucket_refs(self._bucket_bytes)
            if isinstance(source, RemoteWeights)
            else pack_buckets(iter(source), self._bucket_bytes)
        )
        for item in stream:
            going = settle(calls)
            if not going:
                break
            ref = item if remote else self._nodes.put(item)
            calls = {i: workers[i].load.remote(ref) for i in going}
            del item, ref  # the object store may forget it as soon as every worker has
        ended = settle({i: workers[i].end_load.remote() for i in settle(calls)}) if len(lost) < len(workers) else {}
        return [lost[i] if i in lost else Arrival(*ended[i]) for i in range(len(workers))]


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
        size = nodes.section.bucket_mb << 20
        refs = (
            source.bucket_refs(size)
            if isinstance(source, RemoteWeights)
            else (nodes.put(bucket) for bucket in pack_buckets(iter(source), size))
        )
        return KeptRefs(nodes, source.version, dict(source.manifest), source.adapter, tuple(refs))

    def bucket_refs(self, bucket_bytes: int) -> Iterator[Any]:
        """In the size they were stored with."""
        return iter(self.refs)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for ref in self.refs:
            yield from self.nodes.fetch(ref).tensors()
