"""Where a sender works that takes weights from the processes they are in, without a copy in the cluster's object store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ttrl.protocols import WeightSource


@dataclass(slots=True, kw_only=True)
class Outlet:
    """One trainer rank, as a sender sees it."""

    rank: int
    weights: Callable[[], WeightSource]
    """Those of the moment. Iterating them is a collective: every rank does it, or none."""
    kept: Any = None
    """What a sender left here for the next time."""


@runtime_checkable
class DirectWeights(Protocol):
    """A WeightSource that lets a sender work in every process that has a part of it."""

    def send(self, work: Callable[[Outlet], None], what: str) -> None:
        """`work` on all ranks at once; it must be picklable. Raises what it raises, and ClusterError for a rank that is lost or
        over its deadline, which ends all of them."""
        ...
