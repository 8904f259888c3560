"""Who shares what: the bundles of CPUs and GPUs to reserve, and the share of each worker and rank. Plain arithmetic, no ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ttrl.config.schema import ClusterSection
from ttrl.errors import ConfigError

SHARED_GPU = 0.5
"""Of a GPU that a worker and a rank use in turns."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is reserved together, on one node."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one actor sits, and what it may use there."""

    group: int
    bundle: int
    cpus: float
    gpus: float
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Placement:
    """One reservation per group; the bundles of a group lie on one node."""

    groups: tuple[tuple[Bundle, ...], ...]
    workers: tuple[Seat, ...]
    ranks: tuple[Seat, ...]

    @property
    def cpus(self) -> float:
        return sum(bundle.cpus for group in self.groups for bundle in group)

    @property
    def gpus(self) -> float:
        return sum(bundle.gpus for group in self.groups for bundle in group)

    def largest(self) -> Bundle:
        """What one node must have at least."""
        totals = [Bundle(sum(b.cpus for b in group), sum(b.gpus for b in group)) for group in self.groups]
        return Bundle(max(t.cpus for t in totals), max(t.gpus for t in totals))


def place(section: ClusterSection, *, ranks: int, gpus_per_worker: int, on_gpus: bool) -> Placement:
    """`split`: every actor has its own bundle. `colocated`: worker i and the ranks on its GPUs share them in turns.

    A colocated worker of several GPUs holds none itself: its engine starts one process per bundle of the group, which is what
    the two variables in `env` tell vLLM's Ray executor.
    """
    share, width = section.cpus_per_actor, gpus_per_worker if on_gpus else 1
    if section.placement == "split":
        worker = (Bundle(share, width if on_gpus else 0),)
        rank = (Bundle(share, 1 if on_gpus else 0),)
        seats = [
            Seat(i, 0, share, group[0].gpus) for i, group in enumerate([worker] * section.workers + [rank] * ranks)
        ]
        return Placement(
            (worker,) * section.workers + (rank,) * ranks,
            tuple(seats[: section.workers]),
            tuple(seats[section.workers :]),
        )
    groups = tuple(
        tuple(
            Bundle(share * ((i < section.workers and b == 0) + (i * width + b < ranks)), 1 if on_gpus else 0)
            for b in range(width)
        )
        for i in range(max(section.workers, -(-ranks // width)))
    )
    shared = SHARED_GPU if on_gpus else 0
    wide = {
        "VLLM_RAY_PER_WORKER_GPUS": str(SHARED_GPU),
        "VLLM_RAY_BUNDLE_INDICES": ",".join(str(b) for b in range(width)),
    }
    workers = tuple(
        Seat(i, 0, share, 0, wide) if width > 1 else Seat(i, 0, share, shared) for i in range(section.workers)
    )
    return Placement(groups, workers, tuple(Seat(j // width, j % width, share, shared) for j in range(ranks)))


def check_capacity(
    placement: Placement, section: ClusterSection, nodes: list[Bundle], where: str, *, cpus: bool = True
) -> None:
    """Raises ConfigError when the nodes, even idle, cannot hold the placement. `cpus=False`: only GPUs are limited."""
    largest, total = placement.largest(), Bundle(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes))
    asked = f"{section.workers} rollout workers and {len(placement.ranks)} trainer ranks, {section.placement},"
    keys = "cluster.workers, cluster.ranks"
    if placement.gpus > total.gpus:
        raise ConfigError(
            f"cluster: {asked} need {placement.gpus:g} GPUs, {where} has {total.gpus:g}; lower {keys} or the engine's "
            "tensor_parallel, use placement: colocated, add nodes, or set model.device: cpu"
        )
    if cpus and placement.cpus > total.cpus:
        raise ConfigError(
            f"cluster: {asked} need {placement.cpus:g} CPUs, {where} has {total.cpus:g}; lower {keys} or "
            "cluster.cpus_per_actor, or add nodes"
        )
    if not any(n.gpus >= largest.gpus and (not cpus or n.cpus >= largest.cpus) for n in nodes):
        raise ConfigError(
            f"cluster: one actor needs {largest.cpus:g} CPUs and {largest.gpus:g} GPUs on one node, and no node of {where} "
            "is that large; lower cluster.cpus_per_actor or the engine's tensor_parallel"
        )
