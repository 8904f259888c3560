"""Weights to workers by broadcast over TCP: for clusters whose object stores are too small for two buckets on every node."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import ProcessGroupGloo

from ttrl.cluster import Cluster, Lost
from ttrl.errors import ClusterError
from ttrl.model.buckets import Bucket, pack_buckets
from ttrl.protocols import RemoteWeights, WeightSource
from ttrl.rollout.delivery import Arrival, Interrupted, Receipt

GRACE_SECONDS = 10.0
"""How long workers may take to say that a broadcast broke; whoever says nothing is the one that broke it."""
SENDER = 0


class Broadcast:
    """One member of a group of its own, apart from any process group of a trainer. Raises RuntimeError when a member is lost."""

    def __init__(self, store: Store, rank: int, size: int, host: str, seconds: float) -> None:
        kind: Any = ProcessGroupGloo
        options = kind._Options()
        options._devices = [kind.create_device(hostname=host)]
        options._timeout = timedelta(seconds=seconds)
        self._store, self._group = store, kind(store, rank, size, options)

    @staticmethod
    def join(address: tuple[str, int], rank: int, size: int, host: str, seconds: float) -> Broadcast:
        """As a receiver. Returns when all members are there."""
        return Broadcast(TCPStore(*address, size, False, timedelta(seconds=seconds)), rank, size, host, seconds)

    def share(self, flat: Tensor) -> None:
        """[bytes] uint8 from the sender to everyone; receivers are written to."""
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        self._group.broadcast([flat], options).wait()


class Gloo:
    """The Delivery. The sender is the process of the run; buckets of trainer ranks are fetched into it one at a time."""

    def __init__(self, nodes: Cluster, bucket_bytes: int) -> None:
        self._nodes, self._bucket_bytes = nodes, bucket_bytes
        self._seconds = float(nodes.section.call_seconds)
        self._group: Broadcast | None = None
        self._members: list[Any] = []

    def send(self, workers: Sequence[Any], source: WeightSource) -> list[Receipt]:
        """A lost worker breaks the broadcast for all: the others are then Interrupted, and the next send forms a new group."""
        what = f"sync to version {source.version}"
        begun = [w.begin_load.remote(source.version, dict(source.manifest), source.adapter) for w in workers]
        found = self._nodes.settle(begun, seconds=self._seconds, what=what)
        if any(isinstance(item, Lost) for item in found):
            return [item if isinstance(item, Lost) else Interrupted() for item in found]
        if self._group is None or self._members != list(workers):
            found = self._form(workers)
        buckets = (
            (self._nodes.fetch(ref) for ref in source.bucket_refs(self._bucket_bytes))
            if isinstance(source, RemoteWeights)
            else pack_buckets(iter(source), self._bucket_bytes)
        )
        for bucket in buckets:
            if self._group is None:
                break
            found = self._share(workers, bucket, what)
        if self._group is None:
            return self._interrupted(found, what)
        ended = self._nodes.settle([w.end_load.remote() for w in workers], seconds=self._seconds, what=what)
        return [item if isinstance(item, Lost) else Arrival(*item) for item in ended]

    def _form(self, workers: Sequence[Any]) -> list[Any]:
        """A new group; None instead of it when a worker did not come."""
        import ray

        host, size = str(ray.util.get_node_ip_address()), len(workers) + 1  # type: ignore[no-untyped-call]
        seconds = min(self._seconds, float(self._nodes.section.start_seconds))
        listener = socket.create_server((host, 0))  # this interface only, where TCPStore alone would take all of them
        port = listener.getsockname()[1]
        store = TCPStore(
            host,
            port,
            size,
            True,
            timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        refs = [w.join.remote((host, port), rank, size, seconds) for rank, w in enumerate(workers, start=1)]
        try:
            self._group, self._members = Broadcast(store, SENDER, size, host, self._seconds), list(workers)
        except RuntimeError:
            self._group = None
        return self._settle(refs, "forming a group for weights")

    def _share(self, workers: Sequence[Any], bucket: Bucket, what: str) -> list[Any]:
        assert self._group is not None
        refs = [w.receive.remote(bucket.entries, bucket.data.nbytes) for w in workers]
        try:
            self._group.share(bucket.flat())
        except RuntimeError:
            self._group = None
        return self._settle(refs, what)

    def _settle(self, refs: Sequence[Any], what: str) -> list[Any]:
        """True, False (the group broke) or Lost of each worker; the group is dropped unless all are True."""
        found = self._nodes.settle(refs, seconds=GRACE_SECONDS if self._group is None else self._seconds, what=what)
        if any(item is not True for item in found):
            self._group = None
        return found

    @staticmethod
    def _interrupted(found: Sequence[Any], what: str) -> list[Receipt]:
        if not any(isinstance(item, Lost) for item in found):
            raise ClusterError(
                f"{what}: the broadcast of weights (cluster.transport: gloo) broke although every worker lives"
            )
        return [item if isinstance(item, Lost) else Interrupted() for item in found]


class Receiver:
    """The worker's side: what `Gloo` calls through Ray before a broadcast, so that the worker takes part."""

    def __init__(self, address: tuple[str, int], rank: int, size: int, seconds: float) -> None:
        import ray

        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._group = Broadcast.join(address, rank, size, host, seconds)

    def receive(self, entries: Sequence[Any], nbytes: int) -> Bucket:
        """The next bucket. Raises RuntimeError when the group broke."""
        flat = torch.empty(nbytes, dtype=torch.uint8)
        self._group.share(flat)
        return Bucket(tuple(entries), flat.numpy())
