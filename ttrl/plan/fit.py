"""What to change in a recipe that does not fit: settings are tried, not guessed, and the first that helps is named."""

from __future__ import annotations

import json
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
_ENGINE = "rollout.engine.with."


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
            return Remedy(changes=_texts(changes, recipe), needed=size)
    taken = _several(recipe, shape, work, fleet, knobs)
    size = _try(recipe, shape, work, fleet, taken)
    if size is not None and size <= fleet.device.memory:
        return Remedy(changes=_texts(taken, recipe), needed=size)
    return None if fleet.device.is_cpu else _more(recipe, shape, work, fleet)


def _more(recipe: Recipe, shape: ModelShape, work: Work, fleet: Fleet) -> Remedy | None:
    """The smallest doubling of the fleet on which the recipe fits, as it is or with other settings."""
    count = fleet.count * 2
    while count <= MAX_FLEET:
        larger = Fleet(fleet.device, count)
        knobs = list(_knobs(recipe, work, larger))
        for changes in ([], _several(recipe, shape, work, larger, knobs)):
            size = _try(recipe, shape, work, larger, changes)
            if size is not None and size <= fleet.device.memory:
                return Remedy(changes=(f"--gpus {larger}", *_texts(changes, recipe)), needed=size)
        count *= 2
    return None


def _several(recipe: Recipe, shape: ModelShape, work: Work, fleet: Fleet, knobs: list[list[Change]]) -> list[Change]:
    """Settings added while they lower the peak, again and again because another phase may then be the peak; needless ones go."""
    taken: list[Change] = []
    least = _try(recipe, shape, work, fleet, []) or float("inf")
    before = float("inf")
    while least < before and least > fleet.device.memory:
        before = least
        for changes in knobs:
            merged = _merged(taken, changes)
            size = _try(recipe, shape, work, fleet, merged)
            if size is None or size >= least:
                continue
            taken, least = merged, size
            if least <= fleet.device.memory:
                break
    for change in list(taken):
        fewer = [other for other in taken if other != change]
        size = _try(recipe, shape, work, fleet, fewer)
        if size is not None and size <= fleet.device.memory:
            taken = fewer
    return taken


def _merged(taken: list[Change], changes: list[Change]) -> list[Change]:
    keys = {key for key, _ in changes}
    return [change for change in taken if change[0] not in keys] + changes


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
            yield [("rollout.engine.with.rows_at_once", rows)]
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
            yield [*base, ("trainer.zero", max(trainer.zero or 2, 1)), ("trainer.offload", "optimizer")]
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


def _texts(changes: list[Change], recipe: Recipe) -> tuple[str, ...]:
    """Ready for the command line. The engine is written as a whole: an option of a plug-in cannot be set without its name."""
    texts = [f"{key}={_yaml(value)}" for key, value in changes if not key.startswith(_ENGINE)]
    options = {key.removeprefix(_ENGINE): value for key, value in changes if key.startswith(_ENGINE)}
    if options:
        engine = recipe.rollout.engine
        texts.append(f"rollout.engine={_yaml({'use': engine.use, 'with': {**engine.options, **options}})}")
    return tuple(texts)


def _yaml(value: Any) -> str:
    """JSON is YAML; names stay without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value)
