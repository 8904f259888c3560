"""Weights within one machine: memory that the sender and the workers share, and a socket for each worker that says what is in it.

The memory has two halves. One is filled while the workers load the other, tensors are copied into it once, and the workers read them
from where they are. It has no name, so nothing is left behind whatever ends; it goes when the sync is over.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ttrl.cluster import Cluster, Lost
from ttrl.model.buckets import Bucket, Entry, pack_buckets
from ttrl.protocols import RemoteWeights, WeightSource
from ttrl.rollout.delivery import Arrival, Interrupted, ObjectStore, Receipt

SLOTS = 2
GRACE_SECONDS = 10.0
"""How long workers that left may take to say why."""
_POLL_SECONDS = 0.2
_SHAPE, _LENGTH = struct.Struct("<QI"), struct.Struct("<I")
_DONE = b"\x01"


class SharedMemory:
    """The Delivery from this process to workers on its machine; through the object store where that is not the case."""

    def __init__(self, nodes: Cluster, bucket_bytes: int) -> None:
        self._nodes = nodes
        self._elsewhere = ObjectStore(nodes, bucket_bytes)
        self._slot_bytes = max(1, bucket_bytes // 2)  # small enough to be in a cache when it is read

    def send(self, workers: Sequence[Any], source: WeightSource) -> list[Receipt]:
        """A lost worker does not disturb the others."""
        if isinstance(source, RemoteWeights) or not self._all_here(workers):
            return self._elsewhere.send(workers, source)
        what, seconds = f"sync to version {source.version}", float(self._nodes.section.call_seconds)
        begun = [w.begin_load.remote(source.version, dict(source.manifest), source.adapter) for w in workers]
        found = dict(enumerate(self._nodes.settle(begun, seconds=seconds, what=what)))
        with tempfile.TemporaryDirectory(prefix="ttrl-sync-") as folder, _listen(Path(folder)) as listener:
            path = listener.getsockname()
            refs = {
                i: workers[i].load_shared.remote(path, seconds) for i, v in found.items() if not isinstance(v, Lost)
            }
            with Sender(self._connected(listener, list(refs.values())), self._slot_bytes, seconds) as sender:
                sender.send(source)
                whole = len(sender) == len(refs)
        loaded = self._nodes.settle(list(refs.values()), seconds=seconds if whole else GRACE_SECONDS, what=what)
        found |= dict(zip(refs, loaded, strict=True))
        ends = {i: workers[i].end_load.remote() for i, value in found.items() if value is True}
        ended = dict(zip(ends, self._nodes.settle(list(ends.values()), seconds=seconds, what=what), strict=True))
        return [_receipt(found[i], ended.get(i)) for i in range(len(workers))]

    def _all_here(self, workers: Sequence[Any]) -> bool:
        if not hasattr(os, "memfd_create"):  # Linux has it
            return False
        here = self._nodes.node_of(None)
        return all(self._nodes.node_of(worker) == here for worker in workers)

    def _connected(self, listener: socket.socket, refs: list[Any]) -> list[socket.socket]:
        """A connection for each call; fewer when some ended before they had one, or the time is over."""
        found: list[socket.socket] = []
        deadline = time.monotonic() + self._nodes.section.call_seconds
        listener.settimeout(_POLL_SECONDS)
        ended = 0
        while len(found) < len(refs) - ended and time.monotonic() < deadline:
            try:
                found.append(listener.accept()[0])
            except TimeoutError:
                ended = len(self._nodes.wait(refs, seconds=0.0)[0]) if refs else 0
        return found


def _listen(folder: Path) -> socket.socket:
    """In a folder that only this user can enter."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / "s"))
    listener.listen(128)
    return listener


def _receipt(loaded: Any, ended: Any) -> Receipt:
    if isinstance(loaded, Lost):
        return loaded
    if loaded is not True:
        return Interrupted()
    return ended if isinstance(ended, Lost) else Arrival(*ended)


class Sender:
    """Our end. Workers that fail to answer are left out from then on."""

    def __init__(self, connections: Sequence[socket.socket], bucket_bytes: int, seconds: float) -> None:
        self._bytes, self._number = bucket_bytes, 0
        self._unanswered = dict.fromkeys(connections, 0)
        """buckets that a worker was told of and has not finished"""
        size = SLOTS * bucket_bytes
        file = os.memfd_create("ttrl-weights")
        try:
            os.ftruncate(file, size)
            self._memory = np.frombuffer(mmap.mmap(file, size), np.uint8)
            for connection in connections:
                connection.settimeout(seconds)
                socket.send_fds(connection, [_SHAPE.pack(bucket_bytes, SLOTS)], [file])
        finally:
            os.close(file)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._unanswered):
            connection.close()

    def __len__(self) -> int:
        """Workers that take part."""
        return len(self._unanswered)

    def send(self, source: WeightSource) -> None:
        """Everything, until the last bucket was loaded by everyone that is left."""
        for bucket in pack_buckets(iter(source), self._bytes, room=self._room):
            if not self._unanswered:
                return
            self._tell(json.dumps([astuple(entry) for entry in bucket.entries]).encode())
            self._number += 1
        self._wait(0)
        self._tell(b"")

    def _room(self) -> npt.NDArray[np.uint8]:
        """The next slot, once nobody reads it any more."""
        self._wait(SLOTS - 1)
        start = self._number % SLOTS * self._bytes
        return self._memory[start : start + self._bytes]

    def _tell(self, message: bytes) -> None:
        for connection in list(self._unanswered):
            try:
                connection.sendall(_LENGTH.pack(len(message)) + message)
                self._unanswered[connection] += 1
            except OSError:
                self._drop(connection)

    def _wait(self, most: int) -> None:
        """Until nobody has more than `most` buckets before it."""
        for connection in list(self._unanswered):
            while self._unanswered.get(connection, 0) > most:
                try:
                    answer = connection.recv(1)
                except OSError:
                    answer = b""
                if answer != _DONE:
                    self._drop(connection)
                else:
                    self._unanswered[connection] -= 1

    def _drop(self, connection: socket.socket) -> None:
        del self._unanswered[connection]
        connection.close()


def receive(path: str, seconds: float) -> Iterator[Bucket]:
    """The worker's end: each bucket is valid until the next one is asked for. Raises OSError when the sender left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        connection.connect(path)
        told, files, *_ = socket.recv_fds(connection, _SHAPE.size, 1)
        if len(told) < _SHAPE.size or not files:
            raise ConnectionError("the sender of weights left")
        size, slots = _SHAPE.unpack(told)
        try:
            memory = np.frombuffer(mmap.mmap(files[0], size * slots, prot=mmap.PROT_READ), np.uint8)
        finally:
            os.close(files[0])
        number = 0
        while length := _LENGTH.unpack(_exactly(connection, _LENGTH.size))[0]:
            entries = tuple(
                Entry(name, dtype, tuple(shape), *rest)
                for name, dtype, shape, *rest in json.loads(_exactly(connection, length))
            )
            start = number % slots * size
            yield Bucket(entries, memory[start : start + size])
            number += 1
            connection.sendall(_DONE)


def _exactly(connection: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        part = connection.recv(length - len(found))
        if not part:
            raise ConnectionError("the sender of weights left")
        found += part
    return found
