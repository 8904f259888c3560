"""Layouts that a number of devices allows, and what each of them costs in memory, time and money."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.plan.batch import Work
from ttrl.plan.devices import Fleet
from ttrl.plan.memory import Footprint, Layout, footprints
from ttrl.plan.pipeline import Timeline, simulate
from ttrl.plan.shape import ModelShape
from ttrl.plan.speed import StepTime, step_time

Placement = Literal["colocated", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run the recipe on the fleet."""

    layout: Layout
    ahead: int
    memory: tuple[Footprint, ...]
    available: float
    """bytes of a GPU, or of the machine"""
    times: StepTime
    timeline: Timeline
    hours: float
    price: float
    """USD for the whole run"""

    @property
    def name(self) -> str:
        ahead = f", ahead {self.ahead}" if self.ahead else ""
        return f"{self.layout.placement}{ahead}"

    @property
    def needed(self) -> float:
        """Bytes of the fullest GPU, or of all processes of a machine."""
        return needed(self.layout, self.memory)

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


def tensor_parallel(recipe: Recipe) -> int:
    """GPUs per engine. Raises ConfigError for an option that is not a count."""
    value = recipe.rollout.engine.options.get("tensor_parallel", 1)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"rollout.engine: tensor_parallel must be a whole number from 1, got {value!r}")
    return value


def layouts(recipe: Recipe, fleet: Fleet, placement: Placement) -> list[Layout]:
    """Every division of the fleet that is worth a look, for one placement; none when there are too few GPUs.

    Raises ConfigError when one engine needs more GPUs than there are.
    """
    if fleet.device.is_cpu:
        cluster = recipe.cluster
        if cluster.backend == "local":
            return [Layout(placement="one process", ranks=1, workers=1)]
        return [Layout(placement="processes", ranks=cluster.ranks, workers=cluster.workers)]
    parallel, several = tensor_parallel(recipe), recipe.trainer.backend.use == "deepspeed"
    if parallel > fleet.count:
        raise ConfigError(f"rollout.engine: tensor_parallel is {parallel}, but --gpus gives {fleet.count} devices")
    if placement == "colocated":
        ranks, workers = fleet.count if several else 1, fleet.count // parallel
        return [Layout(placement=placement, ranks=ranks, workers=workers, tensor_parallel=parallel)]
    most = fleet.count - parallel if several else min(1, fleet.count - parallel)
    shares = {1, *(max(1, round(fleet.count * eighth / 8)) for eighth in range(1, 8))}
    return [
        Layout(placement=placement, ranks=ranks, workers=(fleet.count - ranks) // parallel, tensor_parallel=parallel)
        for ranks in sorted(shares)
        if ranks <= most
    ]


def options(recipe: Recipe, shape: ModelShape, work: Work, fleet: Fleet, price: float) -> list[Option]:
    """The recipe's own placement first. `price` is USD per device and hour.

    Of the divisions of a split, the one with the shortest step among those that fit, or among all if none does.
    """
    own = recipe.cluster.placement
    kinds: list[tuple[Placement, int]] = [("colocated", 0)]
    if not fleet.device.is_cpu:
        kinds += [("split", 0), ("split", recipe.rollout.ahead or 1)]
        kinds.sort(key=lambda kind: (kind[0] != own, own == "split" and kind[1] != recipe.rollout.ahead))
    found = []
    for placement, ahead in kinds:
        tried = [
            _option(recipe, shape, work, fleet, layout, ahead, price) for layout in layouts(recipe, fleet, placement)
        ]
        found += [min(tried, key=lambda o: (not o.fits, o.timeline.step))] if tried else []
    return found


def needed(layout: Layout, memory: tuple[Footprint, ...]) -> float:
    """Bytes of the fullest GPU, or of all processes of a machine."""
    if layout.placement in ("one process", "processes"):
        return sum(footprint.count * footprint.peak for footprint in memory)
    return max(footprint.peak for footprint in memory)


def _option(
    recipe: Recipe, shape: ModelShape, work: Work, fleet: Fleet, layout: Layout, ahead: int, price: float
) -> Option:
    times = step_time(recipe, shape, work, layout, fleet.device)
    timeline = simulate(times, work.steps, ahead)
    hours = timeline.total / 3600
    return Option(
        layout=layout, ahead=ahead, memory=footprints(recipe, shape, work, layout, fleet.device),
        available=fleet.device.memory, times=times, timeline=timeline, hours=hours, price=hours * price * fleet.count,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One row of the scaling table."""

    devices: int
    placement: str
    step: float
    efficiency: float
    """speed per device, relative to the first row"""
    price: float


def scaling(recipe: Recipe, shape: ModelShape, work: Work, fleet: Fleet, price: float) -> list[Scale]:
    """1, 2, 4 ... 1024 devices, each with its fastest option that fits; rows where none fits are left out."""
    rows: list[Scale] = []
    for power in range(11):
        some = Fleet(fleet.device, 2**power)
        if some.count < tensor_parallel(recipe):
            continue
        fitting = [option for option in options(recipe, shape, work, some, price) if option.fits]
        if not fitting:
            continue
        best = min(fitting, key=lambda option: option.timeline.step)
        first = rows[0] if rows else None
        ideal = first.step * first.devices / some.count if first else best.timeline.step
        efficiency = ideal / best.timeline.step
        rows.append(
            Scale(
                devices=some.count,
                placement=best.name,
                step=best.timeline.step,
                efficiency=efficiency,
                price=best.price,
            )
        )
    return rows
