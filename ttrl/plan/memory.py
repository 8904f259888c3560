"""Bytes per process or device, phase by phase, and the peak. What is not arithmetic is a named constant with its origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ttrl.config.inner import has_reference
from ttrl.config.schema import Recipe
from ttrl.plan.activations import FLOAT, HALF, Precision, Trained, kept, reference_head, trained
from ttrl.plan.batch import Work, cut
from ttrl.plan.devices import Device
from ttrl.plan.shape import ModelShape

Phase = Literal["sample", "train", "update", "sync", "checkpoint", "export"]
PHASES: tuple[Phase, ...] = ("sample", "train", "update", "sync", "checkpoint", "export")
TRAINING: tuple[Phase, ...] = ("train", "update")

MIB, GIB = 2**20, 2**30
PROCESS = 505 * MIB
"""Python, torch 2.13 (CPU), transformers and peft. Measured: resident memory before the first training step of a run of the bundled
model with 2 prompts x 2 votes, whose weights and activations are below 10 MiB."""
REPORT = 60 * MIB
"""matplotlib and the report at the end of a run. Measured: the same run grew by this much while the report was written."""
HEAP = 1.25
"""Factor on what comes and goes during a training step in a CPU process: glibc keeps freed blocks. Measured: a full-parameter run of
the SmolLM2-135M shape (2 x 8 votes of 64 tokens, micro-batches of 512) took 1,849 MiB over its resting state, and 1,485 MiB with
MALLOC_MMAP_THRESHOLD_=65536, which gives every block back."""
CONTEXT = 0.7 * GIB
"""CUDA context and kernels. An assumption, not measured here."""
FRAGMENTS = 1.1
"""The same factor for torch's CUDA allocator. An assumption, not measured here."""
VLLM_WORKSPACE = 1.5 * GIB
"""Activations of vLLM's profiling pass and CUDA graphs. An assumption, not measured here."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's default reduce and all-gather buckets."""
_GROWTH = 64
"""Tokens by which the key-value buffers of the HF engine grow (ttrl/model/prefix.py)."""
_DRAW = 28
"""Bytes per logit while a token is drawn: logits, log-probs and probs in float32, two copies in float64 (ttrl/model/sampling.py)."""
_DRAW_ENTROPY = 12


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory in some phases."""

    what: str
    bytes: float
    phases: tuple[Phase, ...] = PHASES


@dataclass(frozen=True, slots=True)
class Footprint:
    """One process or device."""

    who: str
    count: int
    """how many of them there are"""
    items: tuple[Item, ...]

    def at(self, phase: Phase) -> float:
        """Bytes in one phase."""
        return sum(item.bytes for item in self.items if phase in item.phases)

    @property
    def phase(self) -> Phase:
        """The one that needs most."""
        return max(PHASES, key=self.at)

    @property
    def peak(self) -> float:
        return self.at(self.phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Who runs where."""

    placement: Literal["one process", "processes", "colocated", "split"]
    ranks: int
    workers: int
    tensor_parallel: int = 1

    @property
    def devices(self) -> int:
        rollout = self.workers * self.tensor_parallel
        return self.ranks + rollout if self.placement == "split" else max(self.ranks, rollout)


def footprints(recipe: Recipe, shape: ModelShape, work: Work, layout: Layout, device: Device) -> tuple[Footprint, ...]:
    """Every kind of process (on a CPU) or device (GPU) of a layout."""
    engine = engine_items(recipe, shape, work, layout, device)
    if recipe.rollout.ahead and layout.placement != "split":  # sampling goes on while the trainer works
        engine = [Item(item.what, item.bytes, PHASES) for item in engine]
    rank = trainer_items(recipe, shape, work, layout, device)
    own = (Item("Python, torch and libraries", PROCESS), Item("report", REPORT, ("export",)))
    waiting = Item("weights kept for sampling ahead", recipe.rollout.ahead * FLOAT * moved(recipe, shape))
    if layout.placement == "one process":
        return (Footprint("the process", 1, (*own, *engine, *rank, waiting)),)
    if layout.placement == "processes":
        crossing = Item("weights in flight (two buckets)", 2 * recipe.cluster.bucket_mb * MIB, ("sync",))
        return (
            Footprint("driver", 1, (*own, crossing, waiting)),
            Footprint("rollout worker", layout.workers, (*own[:1], *engine)),
            Footprint("trainer rank", layout.ranks, (*own[:1], *rank)),
        )
    context = Item("CUDA context", CONTEXT)
    if layout.placement == "colocated":
        return (Footprint("GPU", layout.devices, (context, *rank, *engine)),)
    return (
        Footprint("trainer GPU", layout.ranks, (context, *rank)),
        Footprint("rollout GPU", layout.workers * layout.tensor_parallel, (context, *engine)),
    )


def engine_items(recipe: Recipe, shape: ModelShape, work: Work, layout: Layout, device: Device) -> list[Item]:
    """The engine's copy of the weights and what sampling needs; per GPU when it is split over several."""
    width = HALF if recipe.model.dtype == "bfloat16" else FLOAT
    weights = width * shape.parameters / layout.tensor_parallel
    resident = PHASES
    if recipe.rollout.engine.use == "vllm":
        if layout.placement == "colocated":  # asleep while the trainer works
            resident = ("sample", "sync")
        cache = Item("KV cache of vLLM", vllm_cache(recipe, shape, work, layout, device), ("sample",))
        rest = Item("vLLM workspace", 0 if device.is_cpu else VLLM_WORKSPACE, resident)
        return [Item(f"engine weights ({recipe.model.dtype})", weights, resident), cache, rest]
    return [Item(f"engine weights ({recipe.model.dtype})", weights), *_hf_sampling(recipe, shape, work, width)]


def vllm_cache(recipe: Recipe, shape: ModelShape, work: Work, layout: Layout, device: Device) -> float:
    """Bytes per GPU. What the recipe says; else its share of the GPU less weights and workspace, but at least one rollout."""
    options = recipe.rollout.engine.options
    width = HALF if recipe.model.dtype == "bfloat16" else FLOAT
    one = width * shape.kv_per_token * (work.prompt + work.longest) / layout.tensor_parallel
    given = options.get("kv_cache_gib")
    if given is not None or device.is_cpu:
        return float(given if given is not None else 1.0) * GIB
    share = float(options.get("gpu_memory_utilization", 0.5)) * device.memory
    return max(one, share - width * shape.parameters / layout.tensor_parallel - VLLM_WORKSPACE)


def _hf_sampling(recipe: Recipe, shape: ModelShape, work: Work, width: int) -> list[Item]:
    """One group at a time: the prompt's keys and values once, the rows' in growing buffers."""
    options, settings = recipe.rollout.engine.options, recipe.eval
    at_once = int(options.get("rows_at_once", 128))
    shared = bool(options.get("shared_prefix", True)) and shape.shared_prefix
    kinds = (
        (min(at_once, work.votes), work.longest),
        (min(at_once, settings.samples), settings.max_new_tokens or work.longest),
    )
    caches = [_hf_cache(shape, work.prompt, rows, limit, width, shared=shared) for rows, limit in kinds]
    logits = max(rows for rows, _ in kinds) * shape.vocabulary * (_DRAW + _DRAW_ENTROPY)
    return [Item("KV cache", max(caches), ("sample",)), Item("logits of one token per row", logits, ("sample",))]


def _hf_cache(shape: ModelShape, prompt: int, rows: int, limit: int, width: int, *, shared: bool) -> float:
    suffix = -(-limit // _GROWTH) * _GROWTH
    return width * shape.kv_per_token * (prompt + rows * suffix if shared else rows * (prompt + limit))


def trainer_items(recipe: Recipe, shape: ModelShape, work: Work, layout: Layout, device: Device) -> list[Item]:
    """One trainer rank."""
    part = trained(recipe, shape)
    split = recipe.trainer.backend.use == "deepspeed"
    half = recipe.model.dtype == "bfloat16"
    how = Precision(width=HALF if half else FLOAT, autocast=half and not split)
    held = _zero(recipe, shape, part, layout.ranks) if split else _plain(recipe, shape, part, device)
    slack = HEAP if device.is_cpu else FRAGMENTS
    checkpointing = recipe.trainer.gradient_checkpointing
    shared = shape.shared_prefix and not checkpointing
    batches = cut(work, shared=shared, ranks=layout.ranks)
    needs = [(kept(shape, batch, part, how, checkpointing=checkpointing), batch) for batch in batches.kinds]
    most, batch = max(needs, key=lambda pair: pair[0].total)
    head = most.head
    stabilizers = [plug.use for plug in recipe.stabilizers]
    if has_reference(recipe.stabilizers, recipe.objective):
        head = max(head, reference_head(shape, batch))
        if part.full:
            whole = not (split and recipe.trainer.zero == 3)
            copy = (HALF if split and half else FLOAT) * shape.parameters / (1 if whole else layout.ranks)
            held.append(Item("reference weights (kl)", copy))
    copies = ("ema" in stabilizers) + ("fisher" in stabilizers) + bool({"fisher", "reset", "restore"} & {*stabilizers})
    if copies:  # as master weights are: whole without ZeRO, else one share per rank
        state = layout.ranks if split and recipe.trainer.zero != 0 else 1
        held.append(Item("copies of trained weights (stabilizers)", copies * FLOAT * part.parameters / state))
    gradients = next(item.bytes for item in held if item.what == "gradients")
    most_held = gradients if batches.count > 1 else 0.0
    extra = (slack - 1) * (most_held + most.layers + most.casts + head)
    held = [item for item in held if item.what != "gradients"]
    return [
        *held,
        # A single micro-batch frees its activations while gradients appear: whichever is larger counts
        Item("gradients", most_held, ("train",)),
        Item("gradients (update)", gradients + 2 * FLOAT * (shape.embedding if part.full else 0), ("update",)),
        Item("activations", most.layers, ("train",)),
        Item("bfloat16 casts of weights", most.casts, ("train",)),
        Item("head and logits", head, ("train",)),
        Item("freed but kept by the allocator", extra, ("train",)),
    ]


def _plain(recipe: Recipe, shape: ModelShape, part: Trained, device: Device) -> list[Item]:
    """Back-end torch: float32 weights, AdamW's two moments; a checkpoint copies the moments, an export loads one more model."""
    moments = 2 * FLOAT * part.parameters
    adapters = 0 if part.full else FLOAT * part.parameters
    items = [
        Item("trained weights (float32)", FLOAT * shape.parameters + adapters),
        Item("gradients", FLOAT * part.parameters, TRAINING),
        Item("AdamW moments", moments),
        Item("copy of the moments for the checkpoint", moments, ("checkpoint",)),
    ]
    width = HALF if recipe.model.dtype == "bfloat16" else FLOAT
    return [*items, Item("exported model", width * shape.parameters, ("export",))] if device.is_cpu else items


def _zero(recipe: Recipe, shape: ModelShape, part: Trained, ranks: int) -> list[Item]:
    """Back-end deepspeed (arXiv 1910.02054): stage 1 splits master weights and moments, 2 also gradients, 3 also weights."""
    stage = 2 if recipe.trainer.zero is None else recipe.trainer.zero
    offload = recipe.trainer.offload or "none"
    width = HALF if recipe.model.dtype == "bfloat16" else FLOAT
    adapters = 0 if part.full else part.parameters
    weights = width * (shape.parameters + adapters) / (ranks if stage == 3 else 1)
    # trainers/dsconfig.py accumulates in float32 from stage 2 on
    gradients = FLOAT * part.parameters / ranks if stage >= 2 else width * part.parameters
    state = ranks if stage >= 1 else 1
    master = FLOAT * part.parameters / state if stage >= 1 or width == HALF else 0.0
    moments = 2 * FLOAT * part.parameters / state
    items = [
        Item(f"weights ({recipe.model.dtype}, ZeRO {stage})", 0.0 if offload == "all" else weights),
        Item("gradients", gradients, TRAINING),
        Item("float32 master weights", 0.0 if offload != "none" else master),
        Item("AdamW moments", 0.0 if offload != "none" else moments),
        Item("communication buckets", width * min(BUCKET, part.parameters) if ranks > 1 else 0.0, TRAINING),
    ]
    if stage == 3:
        live = width * (2 * shape.layer_parameters + shape.embedding)
        items.append(Item("gathered layers", live, ("train", "sync")))
    return items


def moved(recipe: Recipe, shape: ModelShape) -> int:
    """Parameters that a sync carries: adapters arrive merged, unless the engine was built to take them as they are."""
    part = trained(recipe, shape)
    if part.full or recipe.rollout.engine.options.get("lora_rank") is not None:
        return part.parameters
    return shape.layers * sum(inputs * outputs for name, inputs, outputs in shape.linears if name in part.targets)


def host_bytes(recipe: Recipe, shape: ModelShape, ranks: int) -> float:
    """Host memory of all ranks that offloading needs: master weights, moments and gradients in float32, and weights with `all`."""
    if recipe.trainer.offload in (None, "none"):
        return 0.0
    part = trained(recipe, shape)
    state = 4 * FLOAT * part.parameters
    copies = 1 if (recipe.trainer.zero is None or recipe.trainer.zero >= 1) else ranks
    return copies * state + (HALF * shape.parameters if recipe.trainer.offload == "all" else 0)
