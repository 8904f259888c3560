"""Weights within one machine: memory that the sender and the workers share, and a socket for each worker that says what is in it.

The memory has two halves. One is filled while the workers load the other, tensors are copied into it once, and the workers read them
from where they are. A tensor that is larger than a half takes the whole memory, which is as large as the largest tensor at least: so
no worker has to put one together in memory of its own. The memory is kept from sync to sync, because asking the system for shared
pages takes ten times as long as filling them. It has no name, so nothing is left behind whatever ends.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import struct
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from ttrl.cluster import Cluster, Lost
from ttrl.model.buckets import Bucket, Entry, Memory, pack_buckets
from ttrl.protocols import RemoteWeights, WeightSource
from ttrl.rollout.delivery import Arrival, Interrupted, ObjectStore, Receipt

SLOTS = 2
GRACE_SECONDS = 10.0
"""How long workers that left may take to say why."""
_POLL_SECONDS = 0.2
WIDEST = 4
"""Bytes of an element at most; wider ones may be cut."""
_SHAPE, _LENGTH = struct.Struct("<QQ"), struct.Struct("<I")
_DONE = b"\x01"


class SharedMemory:
    """The Delivery from this process to workers on its machine; through the object store where that is not the case."""

    def __init__(self, nodes: Cluster, bucket_bytes: int) -> None:
        self._nodes = nodes
        self._elsewhere = ObjectStore(nodes, bucket_bytes)
        self._slot_bytes = max(1, bucket_bytes // 2)  # small enough to be in a cache when it is read
        self._room: Room | None = None

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
            with Sender(self._connected(listener, list(refs.values())), self._room_for(source), seconds) as sender:
                sender.send(source)
                whole = len(sender) == len(refs)
        loaded = self._nodes.settle(list(refs.values()), seconds=seconds if whole else GRACE_SECONDS, what=what)
        found |= dict(zip(refs, loaded, strict=True))
        ends = {i: workers[i].end_load.remote() for i, value in found.items() if value is True}
        ended = dict(zip(ends, self._nodes.settle(list(ends.values()), seconds=seconds, what=what), strict=True))
        return [_receipt(found[i], ended.get(i)) for i in range(len(workers))]

    def _room_for(self, source: WeightSource) -> Room:
        """That of the sync before, unless a tensor has grown. Calls of `send` follow one another, so nobody else uses it."""
        nbytes = room_bytes(source, self._slot_bytes)
        if self._room is None or len(self._room.memory) < nbytes:
            self._room = Room(self._slot_bytes, nbytes)
        return self._room

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


def room_bytes(source: WeightSource, slot_bytes: int) -> int:
    """Bytes of memory for a source: two slots, or its largest tensor. Only what is written to becomes real memory."""
    return max(SLOTS * slot_bytes, *(WIDEST * math.prod(shape) for shape in source.manifest.values()), 0)


class Room:
    """Memory without a name that other processes can map, given its file."""

    def __init__(self, slot_bytes: int, nbytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.file = os.memfd_create("ttrl-weights")
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, nbytes)
        self.memory: Memory = np.frombuffer(mmap.mmap(self.file, nbytes), np.uint8)


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

    def __init__(self, connections: Sequence[socket.socket], room: Room, seconds: float) -> None:
        self._memory, self._bytes, self._slot = room.memory, room.slot_bytes, 0
        self._whole = False
        """the bucket told last is larger than a slot"""
        self._unanswered = dict.fromkeys(connections, 0)
        """buckets that a worker was told of and has not finished"""
        for connection in connections:
            connection.settimeout(seconds)
            socket.send_fds(connection, [_SHAPE.pack(room.slot_bytes, len(room.memory))], [room.file])

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
        for bucket in pack_buckets(iter(source), self._bytes, room=self._room, uncut_bytes=len(self._memory)):
            if not self._unanswered:
                return
            self._tell(json.dumps([astuple(entry) for entry in bucket.entries]).encode())
            self._slot = (self._slot + 1) % SLOTS
        self._wait(0)
        self._tell(b"")

    def _room(self, nbytes: int) -> Memory:
        """The next slot, or all for what is larger, once nobody reads there any more."""
        whole = nbytes > self._bytes
        self._wait(0 if whole or self._whole else SLOTS - 1)
        self._whole = whole
        return _place(self._memory, self._slot, self._bytes, nbytes)

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


def _place(memory: Memory, slot: int, slot_bytes: int, nbytes: int) -> Memory:
    """Where a bucket of `nbytes` lies whose turn is `slot`; the same for both ends."""
    if nbytes > slot_bytes:
        return memory[:nbytes]
    return memory[slot * slot_bytes : (slot + 1) * slot_bytes]


def receive(path: str, seconds: float) -> Iterator[Bucket]:
    """The worker's end: each bucket is valid until the next one is asked for. Raises OSError when the sender left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        connection.connect(path)
        told, files, *_ = socket.recv_fds(connection, _SHAPE.size, 1)
        if len(told) < _SHAPE.size or not files:
            raise ConnectionError("the sender of weights left")
        slot_bytes, size = _SHAPE.unpack(told)
        try:
            memory = np.frombuffer(mmap.mmap(files[0], size, prot=mmap.PROT_READ), np.uint8)
        finally:
            os.close(files[0])
        slot = 0
        while length := _LENGTH.unpack(_exactly(connection, _LENGTH.size))[0]:
            entries = tuple(
                Entry(name, dtype, tuple(shape), *rest)
                for name, dtype, shape, *rest in json.loads(_exactly(connection, length))
            )
            yield Bucket(entries, _place(memory, slot, slot_bytes, max(e.start + e.nbytes for e in entries)))
            slot = (slot + 1) % SLOTS
            connection.sendall(_DONE)


def _exactly(connection: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        part = connection.recv(length - len(found))
        if not part:
            raise ConnectionError("the sender of weights left")
        found += part
    return found
