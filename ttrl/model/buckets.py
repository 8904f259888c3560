"""Tensors packed into flat buckets of bounded size: what crosses a process border during a weight sync.

A tensor that does not fit into a bucket is cut, and put together where it arrives; or has a bucket of its own, where there is room.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ttrl.errors import EngineError
from ttrl.protocols import WeightSource
from ttrl.types import AdapterSpec

Memory = npt.NDArray[np.uint8]
_ALIGNMENT = 64
"""Bytes; tensors start at multiples of it, so that views of any dtype are possible."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor inside a bucket, or a part of it. All numbers are bytes."""

    name: str
    dtype: str
    """Name of the torch dtype, such as "bfloat16"."""
    shape: tuple[int, ...]
    """of the whole tensor"""
    start: int
    """in the bucket"""
    nbytes: int
    """in this bucket"""
    offset: int = 0
    """in the tensor"""

    @property
    def whole(self) -> int:
        """Of the tensor."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some named tensors as bytes."""

    entries: tuple[Entry, ...]
    data: Memory

    def flat(self) -> Tensor:
        """[bytes] uint8 of the whole bucket; borrowed and read-only."""
        return _borrowed(self.data)


class Unpacker:
    """Whole tensors out of the buckets of one source, in order."""

    def __init__(self) -> None:
        self._open: tuple[str, Tensor] | None = None
        """a tensor of which parts are missing, [bytes] uint8"""
        self._filled = 0

    def tensors(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """Those that are whole now: views into the bucket, read-only and valid as long as it is, or memory of their own if they
        came in parts. Raises EngineError when a part is missing."""
        data = bucket.flat()
        for entry in bucket.entries:
            flat = data[entry.start : entry.start + entry.nbytes]
            if entry.nbytes < entry.whole:
                flat, whole = self._join(entry, flat)
                if not whole:
                    continue
            yield entry.name, flat.view(getattr(torch, entry.dtype)).view(entry.shape)

    def _join(self, entry: Entry, part: Tensor) -> tuple[Tensor, bool]:
        """(all of the tensor that came, whether that is everything)"""
        if entry.offset == 0:
            self._open, self._filled = (entry.name, torch.empty(entry.whole, dtype=torch.uint8)), 0
        if self._open is None or (self._open[0], self._filled) != (entry.name, entry.offset):
            raise EngineError(f"weights for {entry.name!r} arrived in parts, of which one is missing")
        flat = self._open[1]
        flat[entry.offset : entry.offset + entry.nbytes] = part
        self._filled += entry.nbytes
        if self._filled < len(flat):
            return flat, False
        self._open = None
        return flat, True


def unpack(buckets: Iterable[Bucket]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a source; see `Unpacker.tensors`."""
    unpacker = Unpacker()
    for bucket in buckets:
        yield from unpacker.tensors(bucket)


def pack_buckets(
    tensors: Iterable[tuple[str, Tensor]],
    bucket_bytes: int,
    *,
    room: Callable[[int], Memory] | None = None,
    uncut_bytes: int = 0,
) -> Iterator[Bucket]:
    """Copy tensors, in order, into buckets of at most `bucket_bytes`.

    room: gives the memory of each, for so many bytes; new one by default.
    uncut_bytes: a larger tensor of at most so many bytes is not cut but is a bucket of its own.
    """
    entries: list[Entry] = []
    empty = np.empty(0, np.uint8)
    data, size = empty, 0
    for name, tensor in tensors:
        source = tensor.detach().to("cpu").contiguous()
        raw, dtype = source.reshape(-1).view(torch.uint8).numpy(), str(source.dtype).removeprefix("torch.")
        for offset, length in _parts(raw.nbytes, bucket_bytes if raw.nbytes > uncut_bytes else max(raw.nbytes, 1)):
            if entries and size + length > bucket_bytes:
                full = [Bucket(tuple(entries), data[:size])]
                data, entries, size = empty, [], 0
                yield full.pop()  # nothing here keeps it alive
            if not len(data):
                wanted = max(bucket_bytes, length)
                data = np.empty(wanted, np.uint8) if room is None else room(wanted)
            start = size if length else 0  # an empty tensor lies nowhere, and so at an even address
            entries.append(Entry(name, dtype, tuple(source.shape), start, length, offset))
            data[size : size + length] = raw[offset : offset + length]
            size = _next(size + length, len(data))
    if entries:
        yield Bucket(tuple(entries), data[:size])


def lent(bucket_bytes: int) -> Callable[[int], Memory]:
    """Room that is the same for all: each bucket is gone when the next one is asked for."""
    memory = np.empty(bucket_bytes, np.uint8)
    return lambda _: memory


def follow_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[None]:
    """Yields whenever `pack_buckets` would, and copies nothing: for ranks that only help to make the tensors whole."""
    count, size = 0, 0
    for _, tensor in tensors:
        for _, length in _parts(tensor.numel() * tensor.element_size(), bucket_bytes):
            if count and size + length > bucket_bytes:
                yield None
                count, size = 0, 0
            count, size = count + 1, _next(size + length, bucket_bytes)
    if count:
        yield None


def _parts(nbytes: int, bucket_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what a tensor is cut into; an empty tensor is one part."""
    for offset in range(0, max(nbytes, 1), bucket_bytes):
        yield offset, min(bucket_bytes, nbytes - offset)


def _next(end: int, bucket_bytes: int) -> int:
    """Where the next tensor may start."""
    return min(bucket_bytes, -(-end // _ALIGNMENT) * _ALIGNMENT)


def _borrowed(data: Memory) -> Tensor:
    """A tensor over memory that may be read-only (an object store's). Receivers copy out of it and never write."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
        return torch.from_numpy(data)


@dataclass(frozen=True, slots=True)
class KeptWeights:
    """A WeightSource that holds a copy in host memory, so that the trainer may go on."""

    version: int
    manifest: Mapping[str, tuple[int, ...]]
    adapter: AdapterSpec | None
    buckets: tuple[Bucket, ...]

    @staticmethod
    def of(source: WeightSource, buckets: tuple[Bucket, ...]) -> KeptWeights:
        return KeptWeights(source.version, source.manifest, source.adapter, buckets)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from unpack(self.buckets)
