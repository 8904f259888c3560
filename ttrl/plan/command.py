"""`ttrl plan`: from a recipe and a fleet to a Plan."""

from __future__ import annotations

from dataclasses import dataclass

from ttrl.config.explain import suggest
from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.plan import devices, memory, pipeline, speed
from ttrl.plan.batch import read_work
from ttrl.plan.devices import Fleet, parse_gpus
from ttrl.plan.fit import remedy
from ttrl.plan.options import Option, options, scaling
from ttrl.plan.report import Plan, price_note
from ttrl.plan.shape import ModelShape, find_shape

BACKENDS, ENGINES = ("torch", "deepspeed"), ("hf", "vllm", "scripted")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCall:
    """The options of the command line."""

    gpus: str | None = None
    params: str | None = None
    mean_length: float | None = None
    prompt_tokens: int | None = None
    memory_gib: float | None = None
    price: float | None = None


def make_plan(recipe: Recipe, call: PlanCall) -> Plan:
    """Raises ConfigError for anything that cannot be planned. Loads no model and imports no torch."""
    fleet = parse_gpus(call.gpus, memory=None if call.memory_gib is None else call.memory_gib * memory.GIB)
    _check(recipe, fleet)
    shape = find_shape(recipe.model.path, call.params)
    work = read_work(recipe, shape, mean_length=call.mean_length, prompt_tokens=call.prompt_tokens)
    price = fleet.device.price if call.price is None else call.price
    found = options(recipe, shape, work, fleet, price)
    notes = [*work.notes, *_notes(recipe, shape, fleet, found), price_note(fleet, price, call.price is not None)]
    return Plan(
        recipe=recipe.name, shape=shape, work=work, fleet=fleet, options=tuple(found),
        scaling=() if fleet.device.is_cpu else tuple(scaling(recipe, shape, work, fleet, price)),
        remedy=None if found[0].fits else remedy(recipe, shape, work, fleet), notes=tuple(notes),
    )  # fmt: skip


def _check(recipe: Recipe, fleet: Fleet) -> None:
    for key, name, known in (
        ("trainer.backend", recipe.trainer.backend.use, BACKENDS),
        ("rollout.engine", recipe.rollout.engine.use, ENGINES),
    ):
        if name not in known:
            raise ConfigError(f"{key} {name!r}: ttrl plan does not know what it needs.{suggest(name, known)}")
    if recipe.model.device == "cpu" and not fleet.device.is_cpu:
        raise ConfigError(
            f"model.device is cpu, so the recipe would leave {fleet} idle; add model.device=auto, or plan without --gpus"
        )


def _notes(recipe: Recipe, shape: ModelShape, fleet: Fleet, found: list[Option]) -> list[str]:
    notes = []
    if recipe.rollout.ahead and found[0].layout.placement != "split":
        notes.append("sampling ahead shares its device with training: no time is gained, and memory is needed for both")
    if fleet.device.is_cpu:
        notes += [
            f"CPU: {devices.CPU_FLOPS / 1e9:g} GFLOP/s and {devices.CPU_BANDWIDTH / 1e9:g} GB/s per core, as reached on one machine; "
            "times may be several times off",
            f"memory: base of {memory.PROCESS / memory.MIB:g} MiB per process and a factor of {memory.HEAP:g} on what training "
            "allocates and frees (docs/plan.md)",
        ]
        return [*notes, "memory of vLLM on a CPU was not measured"] if recipe.rollout.engine.use == "vllm" else notes
    notes += [
        "every completion may run to max_new_tokens (memory); lengths spread as a long tail around the mean (time)",
        f"training reaches {speed.TRAIN_SHARE:.0%} and prefill {speed.PREFILL_SHARE:.0%} of peak FLOP/s, decoding "
        f"{speed.READ_SHARE:.0%} of peak bandwidth; nothing was measured on a GPU",
        f"a token costs {speed.VLLM_TOKEN * 1e3:g} ms beside arithmetic in vLLM, {speed.HF_LAYER * 1e3:g} ms per layer in hf; "
        f"grading {speed.GRADE * 1e3:g} ms per rollout; broadcast of weights {speed.BROADCAST / 1e9:g} GB/s",
        f"sampling of a step takes {pipeline.UNEVEN[0]:g} and {pipeline.UNEVEN[1]:g} of the mean in turn",
        "evaluations, checkpoints and start-up are not counted in hours",
    ]
    if fleet.count > 1:
        own = found[0].layout
        text = f"cluster.workers={own.workers} cluster.ranks={own.ranks} for placement {own.placement}"
        notes.append(f"all GPUs are used: cluster.backend=ray {text}")
        if recipe.trainer.backend.use == "torch":
            notes.append("back-end torch trains on one GPU whatever --gpus says; trainer.backend=deepspeed uses all")
    host = memory.host_bytes(recipe, shape, found[0].layout.ranks)
    return [*notes, f"offloading needs {host / memory.GIB:.0f} GiB of host memory in all"] if host else notes
