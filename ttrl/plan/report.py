"""A plan as tables for people and as JSON for scripts."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ttrl.plan.batch import Work
from ttrl.plan.devices import PRICES_AS_OF, Fleet
from ttrl.plan.fit import Remedy
from ttrl.plan.memory import GIB, PHASES
from ttrl.plan.options import Option, Scale
from ttrl.plan.shape import ModelShape

TIGHT = 0.9
"""Share of the memory above which a plan says so: predictions were up to 16 % low (docs/plan.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that `ttrl plan` found out."""

    recipe: str
    shape: ModelShape
    work: Work
    fleet: Fleet
    options: tuple[Option, ...]
    """the recipe's own placement first"""
    scaling: tuple[Scale, ...]
    remedy: Remedy | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """With the recipe's own placement."""
        return self.options[0].fits

    @property
    def verdict(self) -> str:
        """One or two sentences: does it fit, what is fullest, and what would help."""
        own = self.options[0]
        fullest = max(own.memory, key=lambda footprint: footprint.peak)
        where = "this machine" if self.fleet.device.is_cpu else f"a {self.fleet.device.name}"
        sizes = (
            f"{own.needed / GIB:.1f} GiB of {own.available / GIB:.1f} GiB of {where}, most in phase {fullest.phase!r}"
        )
        if own.fits:
            barely = ", but barely" if own.needed > TIGHT * own.available else ""
            return f"fits{barely} ({own.name}): needs {sizes}"
        largest = max((i for i in fullest.items if fullest.phase in i.phases), key=lambda item: item.bytes)
        reason = f"does not fit ({own.name}): needs {sizes}, where the largest part is {largest.what} ({largest.bytes / GIB:.1f} GiB)"
        if self.remedy is None:
            return f"{reason}; no setting helps: take a larger device or a smaller model"
        return f"{reason}; it fits with {shlex.join(self.remedy.changes)} ({self.remedy.needed / GIB:.1f} GiB)"


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds, hours and USD."""
    work = plan.work
    return {
        "recipe": plan.recipe,
        "gpus": str(plan.fleet),
        "fits": plan.fits,
        "verdict": plan.verdict,
        "remedy": None if plan.remedy is None else list(plan.remedy.changes),
        "model": {**asdict(plan.shape), "parameters": plan.shape.parameters},
        "tokens": {
            "rollout": round(work.rollout_tokens * work.steps),
            "train": round(work.train_tokens * work.steps),
            "steps": work.steps,
        },
        "placements": [_option_json(option) for option in plan.options],
        "scaling": [asdict(row) for row in plan.scaling],
        "assumptions": list(plan.notes),
    }


def _option_json(option: Option) -> dict[str, Any]:
    return {
        "placement": option.layout.placement,
        "ahead": option.ahead,
        "ranks": option.layout.ranks,
        "workers": option.layout.workers,
        "tensor_parallel": option.layout.tensor_parallel,
        "fits": option.fits,
        "needed_bytes": round(option.needed),
        "available_bytes": round(option.available),
        "memory": [
            {
                "who": footprint.who,
                "count": footprint.count,
                "peak_bytes": round(footprint.peak),
                "peak_phase": footprint.phase,
                "phases": {phase: round(footprint.at(phase)) for phase in PHASES},
                "items": [{"what": i.what, "bytes": round(i.bytes), "phases": list(i.phases)} for i in footprint.items],
            }
            for footprint in option.memory
        ],
        "seconds_per_step": {**asdict(option.times), "step": option.timeline.step},
        "hours": option.hours,
        "usd": option.price,
    }


def show(plan: Plan, console: Console) -> None:
    """Tables, assumptions, verdict."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    shape, work = plan.shape, plan.work
    say(f"{plan.recipe} on {plan.fleet}: {shape.name}, {shape.parameters:,} parameters ({shape.source})")
    say(
        f"a step: {work.prompts} prompts x {work.votes} votes, about {work.rollout_tokens:,.0f} tokens sampled and "
        f"{work.train_tokens:,.0f} trained on; {work.steps} steps: {work.rollout_tokens * work.steps:,.0f} and "
        f"{work.train_tokens * work.steps:,.0f}"
    )
    console.print(_memory(plan.options[0]))
    console.print(_options(plan))
    if plan.scaling:
        console.print(_scaling(plan.scaling))
    say("assumptions")
    for note in plan.notes:
        say(f"  - {note}")
    say(plan.verdict)


def _memory(option: Option) -> Table:
    table = Table(title=f"memory in GiB, {option.name}", title_justify="left", show_edge=False)
    table.add_column("part")
    for footprint in option.memory:
        table.add_column(f"{footprint.who} (x{footprint.count}), {footprint.phase}", justify="right")
    names = dict.fromkeys(item.what for footprint in option.memory for item in footprint.items)
    for name in names:
        cells = []
        for footprint in option.memory:
            size = sum(i.bytes for i in footprint.items if i.what == name and footprint.phase in i.phases)
            cells.append(f"{size / GIB:.2f}" if size else "")
        if any(cells):
            table.add_row(name, *cells)
    table.add_row("peak", *(f"{footprint.peak / GIB:.2f}" for footprint in option.memory), style="bold")
    return table


def _options(plan: Plan) -> Table:
    table = Table(title="time and money", title_justify="left", show_edge=False)
    table.add_column("")
    for option in plan.options:
        table.add_column(option.name, justify="right")

    def row(name: str, cell: Callable[[Option], str]) -> None:
        table.add_row(name, *(cell(option) for option in plan.options))

    if not plan.fleet.device.is_cpu:
        row("rollout GPUs", lambda o: str(o.layout.workers * o.layout.tensor_parallel))
        row("trainer ranks", lambda o: str(o.layout.ranks))
    row("GiB needed, fits", lambda o: f"{o.needed / GIB:.1f}, {'yes' if o.fits else 'no'}")
    row("sampling, s", lambda o: f"{o.times.sample:.3g}")
    row("grading, s", lambda o: f"{o.times.grade:.3g}")
    row("training, s", lambda o: f"{o.times.train:.3g}")
    row("sync, s", lambda o: f"{o.times.sync:.3g}")
    row("one step, s", lambda o: f"{o.timeline.step:.3g}")
    row("sampling side busy", lambda o: f"{o.timeline.sampling_busy:.0%}")
    row("training side busy", lambda o: f"{o.timeline.training_busy:.0%}")
    row("hours of the run", lambda o: f"{o.hours:.3g}")
    if plan.options[0].price:
        row("USD of the run", lambda o: f"{o.price:,.0f}")
    if len(plan.options) > 1:
        row("speed, first = 1", lambda o: f"{plan.options[0].timeline.step / o.timeline.step:.2f}")
    return table


def _scaling(rows: tuple[Scale, ...]) -> Table:
    table = Table(title="scaling (fastest placement that fits)", title_justify="left", show_edge=False)
    for column in ("GPUs", "placement", "step s", "efficiency", "USD per run"):
        table.add_column(column, justify="left" if column == "placement" else "right")
    for row in rows:
        table.add_row(str(row.devices), row.placement, f"{row.step:.3g}", f"{row.efficiency:.0%}", f"{row.price:,.0f}")
    return table


def price_note(fleet: Fleet, price: float, given: bool) -> str:
    """Where the price comes from."""
    if fleet.device.is_cpu:
        return "no price for a CPU"
    origin = "given" if given else f"list price, {PRICES_AS_OF}: check yours (--price)"
    return f"{price:g} USD per {fleet.device.name} and hour ({origin})"
