"""Tensors packed into flat buckets of bounded size: what crosses a process border during a weight sync.

A sender holds one bucket while the receivers unpack the one before it, so two exist at most. A tensor larger than a bucket is a
bucket of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ttrl.protocols import WeightSource
from ttrl.types import AdapterSpec

_ALIGNMENT = 64
"""Bytes; tensors start at multiples of it, so that views of any dtype are possible."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor inside a bucket."""

    name: str
    dtype: str
    """Name of the torch dtype, such as "bfloat16"."""
    shape: tuple[int, ...]
    start: int
    """Byte offset."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some named tensors as bytes."""

    entries: tuple[Entry, ...]
    data: npt.NDArray[np.uint8]

    def flat(self) -> Tensor:
        """[bytes] uint8 of the whole bucket; borrowed and read-only."""
        return _borrowed(self.data)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views into the bucket, not copies; read-only, and valid as long as the bucket is."""
        whole = self.flat()
        for entry in self.entries:
            dtype = getattr(torch, entry.dtype)
            count = int(np.prod(entry.shape, dtype=np.int64))
            part = whole[entry.start : entry.start + count * dtype.itemsize]
            yield entry.name, part.view(dtype).view(entry.shape)


def pack_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Copy tensors, in order, into buckets of at most `bucket_bytes` (unless a single tensor is larger)."""
    entries: list[Entry] = []
    data, size = np.empty(0, np.uint8), 0
    for name, tensor in tensors:
        source = tensor.detach().to("cpu").contiguous()
        raw = source.reshape(-1).view(torch.uint8).numpy()
        if entries and size + raw.nbytes > bucket_bytes:
            full = [Bucket(tuple(entries), data[:size])]
            data, entries, size = np.empty(0, np.uint8), [], 0
            yield full.pop()  # nothing here keeps it alive
        if not entries:  # a new array: whoever got the last bucket may still read it
            data = np.empty(max(bucket_bytes, raw.nbytes), np.uint8)
        entries.append(Entry(name, str(source.dtype).removeprefix("torch."), tuple(source.shape), size))
        data[size : size + raw.nbytes] = raw
        size = min(len(data), -(-(size + raw.nbytes) // _ALIGNMENT) * _ALIGNMENT)
    if entries:
        yield Bucket(tuple(entries), data[:size])


def follow_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[None]:
    """Yields whenever `pack_buckets` would, and copies nothing: for ranks that only help to make the tensors whole."""
    count, size, room = 0, 0, 0
    for _, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if count and size + nbytes > bucket_bytes:
            yield None
            count, size = 0, 0
        if not count:
            room = max(bucket_bytes, nbytes)
        count, size = count + 1, min(room, -(-(size + nbytes) // _ALIGNMENT) * _ALIGNMENT)
    if count:
        yield None


def _borrowed(data: npt.NDArray[np.uint8]) -> Tensor:
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
        for bucket in self.buckets:
            yield from bucket.tensors()
