"""What to change in a recipe that does not fit: settings are tried, not guessed, and the first that helps is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.plan.batch import Work, read_work
from ttrl.plan.devices import Fleet
from ttrl.plan.memory import footprints
from ttrl.plan.options import layouts, needed
from ttrl.plan.shape import ModelShape

Change = tuple[str, Any]
"""Dotted key and value, as on the command line."""
MAX_FLEET = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Settings under which the recipe fits."""

    changes: tuple[str, ...]
    """key=value each, ready for the command line; or one --gpus option"""
    needed: float
    """bytes with them"""


def remedy(recipe: Recipe, shape: ModelShape, work: Work, fleet: Fleet) -> Remedy | None:
    """One setting if one is enough, else as many as it takes in the order of `_knobs`, else more devices; None if nothing helps."""
    knobs = list(_knobs(recipe, work, fleet))
    for changes in knobs:
        size = _try(recipe, shape, work, fleet, changes)
        if size is not None and size <= fleet.device.memory:
            return Remedy(changes=_texts(changes), needed=size)
    taken: list[Change] = []
    least = _try(recipe, shape, work, fleet, []) or float("inf")
    for changes in knobs:
        keys = {key for key, _ in changes}
        merged = [change for change in taken if change[0] not in keys] + changes
        size = _try(recipe, shape, work, fleet, merged)
        if size is None or size >= least:
            continue
        taken, least = merged, size
        if size <= fleet.device.memory:
            return Remedy(changes=_texts(taken), needed=size)
    return None if fleet.device.is_cpu else _more(recipe, shape, work, fleet, taken)


def _more(recipe: Recipe, shape: ModelShape, work: Work, fleet: Fleet, taken: list[Change]) -> Remedy | None:
    count = fleet.count * 2
    while count <= MAX_FLEET:
        for changes in ([], taken):
            size = _try(recipe, shape, work, Fleet(fleet.device, count), changes)
            if size is not None and size <= fleet.device.memory:
                return Remedy(changes=(f"--gpus {count}x{fleet.device.name}", *_texts(changes)), needed=size)
        count *= 2
    return None


def _knobs(recipe: Recipe, work: Work, fleet: Fleet) -> Iterator[list[Change]]:
    """Cheap ones first: those that change nothing but speed, then those that need other software, then those that change the run."""
    trainer, engine = recipe.trainer, recipe.rollout.engine
    budget = trainer.tokens_per_microbatch // 2
    while budget >= work.prompt + work.longest:
        yield [("trainer.tokens_per_microbatch", budget)]
        budget //= 2
    if engine.use == "hf":
        rows = min(work.votes, int(engine.options.get("rows_at_once", 128))) // 2
        while rows >= 1:
            yield [("rollout.engine.use", "hf"), ("rollout.engine.with.rows_at_once", rows)]
            rows //= 4
    if not trainer.gradient_checkpointing:
        yield [("trainer.gradient_checkpointing", True)]
    if engine.use == "vllm":
        for cache in (8.0, 2.0, 0.5):
            yield [("rollout.engine.with.kv_cache_gib", cache)]
    if fleet.count > 1 and recipe.cluster.placement == "colocated":
        yield [("cluster.placement", "split")]
    deepspeed = trainer.backend.use == "deepspeed"
    base: list[Change] = [] if deepspeed else [("trainer.backend", "deepspeed")]
    if not fleet.device.is_cpu:
        for stage in (2, 3):
            if fleet.count > 1 and not (deepspeed and (trainer.zero or 2) >= stage):
                yield [*base, ("trainer.zero", stage)]
        if engine.use == "vllm":
            parallel = 2 * int(engine.options.get("tensor_parallel", 1))
            while parallel <= min(fleet.count, 8):
                yield [("rollout.engine.with.tensor_parallel", parallel)]
                parallel *= 2
        if trainer.offload is None:
            yield [*base, ("trainer.offload", "optimizer")]
            yield [*base, ("trainer.zero", 3), ("trainer.offload", "all")]
    if recipe.model.dtype == "float32":
        yield [("model.dtype", "bfloat16")]
    if trainer.parameters.use == "full":
        yield [("trainer.parameters", "lora")]


def _try(recipe: Recipe, shape: ModelShape, work: Work, fleet: Fleet, changes: list[Change]) -> float | None:
    """Bytes that the recipe's own placement needs with these changes; None when they make no recipe that can run."""
    tree = recipe.model_dump(by_alias=True)
    for key, value in changes:
        holder, *rest = key.split(".")
        node = tree
        for part in rest:
            node, holder = node.setdefault(holder, {}), part
        node[holder] = value
    try:
        changed = Recipe.model_validate(tree)
        again = read_work(changed, shape, mean_length=work.mean, prompt_tokens=work.prompt)
        found = layouts(changed, fleet, changed.cluster.placement)
    except (ValidationError, ConfigError):
        return None
    sizes = [needed(layout, footprints(changed, shape, again, layout, fleet.device)) for layout in found]
    return min(sizes, default=None)


def _texts(changes: list[Change]) -> tuple[str, ...]:
    return tuple(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes)
