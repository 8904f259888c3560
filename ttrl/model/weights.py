"""Weights on their way from a trainer to an engine, and the fingerprint that says which weights something has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from ttrl.errors import EngineError
from ttrl.protocols import Engine, WeightSource
from ttrl.types import AdapterSpec

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> full shape."""


class NamedTensors:
    """A WeightSource over a function that yields (name, full tensor) pairs, so that only one is alive at a time."""

    def __init__(
        self,
        version: int,
        manifest: Shapes,
        tensors: Callable[[], Iterator[tuple[str, Tensor]]],
        adapter: AdapterSpec | None = None,
    ) -> None:
        self.version, self.manifest, self.adapter = version, manifest, adapter
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors()


class Fingerprint:
    """A hash over all named tensors that is updated tensor by tensor.

    It covers names, shapes, dtypes and every byte, so two engines with one fingerprint hold the same weights. XXH3 is no defence
    against a forger, but it reads memory at full speed: a cryptographic hash would take longer than the sync it guards.
    """

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def update(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().to("cpu").contiguous()
        head = f"{name}|{tuple(data.shape)}|{data.dtype}".encode()
        digest = xxhash.xxh3_128(head)
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
        self._digests[name] = digest.digest()

    def value(self) -> str:
        """16 hex digits."""
        total = xxhash.xxh3_64()
        for name in sorted(self._digests):
            total.update(name.encode() + b"\0" + self._digests[name])
        return total.hexdigest()


def fingerprint_of(source: WeightSource) -> str:
    """Of everything a source yields."""
    fingerprint = Fingerprint()
    for name, tensor in source:
        fingerprint.update(name, tensor)
    return fingerprint.value()


class Intake:
    """What an engine keeps while new weights arrive: which ones were announced, and which are still missing."""

    def __init__(self, version: int, manifest: Shapes) -> None:
        self.version = version
        self._manifest = dict(manifest)
        self._missing = set(self._manifest)

    def take(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each held against the manifest. Raises EngineError for one that is not in it or has another shape."""
        for name, tensor in tensors:
            if name not in self._missing:
                twice = name in self._manifest
                raise EngineError(f"weights for {name!r} arrived {'twice' if twice else 'but were not announced'}")
            if tuple(tensor.shape) != tuple(self._manifest[name]):
                raise EngineError(
                    f"weights for {name!r} have shape {tuple(tensor.shape)}, announced was {tuple(self._manifest[name])}"
                )
            self._missing.discard(name)
            yield name, tensor

    def finish(self) -> None:
        """Raises EngineError when something did not come."""
        if self._missing:
            shown = ", ".join(sorted(self._missing)[:3])
            raise EngineError(
                f"sync to version {self.version}: {len(self._missing)} of {len(self._manifest)} tensors did not arrive ({shown})"
            )


def load_weights(engine: Engine, source: WeightSource) -> str:
    """A whole source into an engine; returns the fingerprint of what it then holds."""
    engine.begin_load(source.version, source.manifest, source.adapter)
    engine.load(iter(source))
    return engine.end_load()


@torch.no_grad()
def load_into(parameters: dict[str, Tensor], source: Iterator[tuple[str, Tensor]], fingerprint: Fingerprint) -> None:
    """Copy tensors in place. Raises EngineError for an unknown name or another shape; nothing is skipped silently."""
    for name, tensor in source:
        target = parameters.get(name)
        if target is None:
            raise EngineError(f"weights for {name!r} arrived, but the engine has no such parameter")
        if target.shape != tensor.shape:
            raise EngineError(
                f"weights for {name!r} have shape {tuple(tensor.shape)}, the engine expects {tuple(target.shape)}"
            )
        target.copy_(tensor)
        fingerprint.update(name, target)
