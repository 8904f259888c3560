"""Seconds of the parts of one step, from peak figures and stated shares of them that are usually reached (a roofline).

Decoding reads all weights, and the keys and values of every rollout in flight, for one token each; training and prefill are
matrix products. None of this was measured on a GPU here; docs/plan.md compares it with published figures.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from ttrl.config.inner import has_reference
from ttrl.config.schema import Recipe
from ttrl.plan.activations import FLOAT, HALF, LOGITS_AT_ONCE, Trained, trained
from ttrl.plan.batch import Work, cut
from ttrl.plan.devices import CPU_BANDWIDTH, CPU_FLOPS, NETWORK, NODE, Device
from ttrl.plan.memory import Layout, moved, vllm_cache
from ttrl.plan.shape import ModelShape

TRAIN_SHARE = 0.3
"""Of peak FLOP/s while training. prime-rl reports 0.11 to 0.35 for 0.6B to 4B models on H100 (February 2026)."""
PREFILL_SHARE = 0.5
READ_SHARE = 0.6
"""Of peak memory bandwidth while decoding."""
VLLM_TOKEN, HF_LAYER = 2e-3, 4e-4
"""Seconds per decoding step beside the arithmetic: vLLM's scheduler and sampler; kernel launches of one layer in transformers.
Assumptions."""
PCIE = 25e9
"""Bytes per second between a GPU and its host."""
BROADCAST = 8e9
"""Bytes per second of a weight sync between GPUs: verl reports 8.25e9 for NCCL over 32 H100."""
GRADE = 1e-3
"""Seconds per rollout. An assumption: extracting and comparing is far below, hostile expressions are above."""
HOST_ADAM = 2e9
"""Parameters per second of a CPU optimizer with offloading. An assumption."""
_REPRESENTATIVES = 256
"""Rollouts of one worker that are simulated; more are stood for by these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step, each part alone."""

    sample: float
    grade: float
    train: float
    sync: float

    @property
    def total(self) -> float:
        return self.sample + self.grade + self.train + self.sync


def step_time(recipe: Recipe, shape: ModelShape, work: Work, layout: Layout, device: Device) -> StepTime:
    """Of one step on this layout."""
    return StepTime(
        sample=sampling(recipe, shape, work, layout, device),
        grade=GRADE * work.rollouts,
        train=training(recipe, shape, work, layout, device),
        sync=syncing(recipe, shape, layout, device),
    )


def lengths(count: int, mean: float, longest: int) -> list[float]:
    """A long tail: the quantiles of longest x u^a, with a such that the mean is right. Uniform when the mean is half the limit.

    Spread over the queue by the golden ratio, so that long ones do not all start first or last.
    """
    power = longest / mean - 1
    order = sorted(range(count), key=lambda i: (i * 0.6180339887498949) % 1.0)
    return [max(1.0, longest * ((i + 0.5) / count) ** power) for i in order]


def decode(tokens: list[float], slots: int, step: Callable[[int], float]) -> float:
    """Seconds until all rollouts are complete: at most `slots` at once, the next starts when one ends.

    step(active) is the time of one token for that many rollouts.
    """
    clock, seconds = 0.0, 0.0
    running: list[float] = []  # when each ends, in tokens
    waiting = iter(tokens)
    for length in waiting:
        heapq.heappush(running, length)
        if len(running) == slots:
            break
    while running:
        end = running[0]
        seconds += (end - clock) * step(len(running))
        clock = heapq.heappop(running)
        following = next(waiting, None)
        if following is not None:
            heapq.heappush(running, clock + following)
    return seconds


def sampling(recipe: Recipe, shape: ModelShape, work: Work, layout: Layout, device: Device) -> float:
    """Seconds until the slowest worker is done."""
    width = HALF if recipe.model.dtype == "bfloat16" else FLOAT
    tp = layout.tensor_parallel
    bandwidth, flops = _reached(recipe, device, READ_SHARE, PREFILL_SHARE)
    weights = shape.layers * shape.layer_matrices + shape.embedding
    vllm = recipe.rollout.engine.use == "vllm"
    beside = 0.0 if device.is_cpu else VLLM_TOKEN if vllm else HF_LAYER * shape.layers
    own = width * shape.kv_per_token * work.mean / 2
    prompt = width * shape.kv_per_token * work.prompt

    def step(active: float, prompts: float) -> float:
        read = width * weights + active * own + prompts * prompt
        return max(read / (bandwidth * tp), 2 * weights * active / (flops * tp)) + beside

    prefill = 2 * shape.layers * shape.layer_matrices * work.prompt / (flops * tp)
    if not vllm:  # one group after the other; groups are dealt to workers
        at_once = min(work.votes, int(recipe.rollout.engine.options.get("rows_at_once", 128)))
        one = decode(lengths(work.votes, work.mean, work.longest), at_once, lambda active: step(active, 1))
        return -(-work.prompts // layout.workers) * (one + prefill)
    count = -(-work.rollouts // layout.workers)
    drawn = min(count, _REPRESENTATIVES)
    each = count / drawn  # rollouts that one of the drawn stands for
    room = (
        vllm_cache(recipe, shape, work, layout, device)
        * tp
        // (width * shape.kv_per_token * (work.prompt / work.votes + work.mean))
    )
    slots = max(1, int(min(room, recipe.rollout.engine.options.get("max_num_seqs", 256), count) / each))
    groups = -(-work.prompts // layout.workers)
    return groups * prefill + decode(
        lengths(drawn, work.mean, work.longest), slots, lambda active: step(active * each, min(groups, active * each))
    )


def training(recipe: Recipe, shape: ModelShape, work: Work, layout: Layout, device: Device) -> float:
    """Forward, backward, exchange of gradients and the optimizer step."""
    part = trained(recipe, shape)
    _, flops = _reached(recipe, device, READ_SHARE, TRAIN_SHARE)
    ranks = min(layout.ranks, work.prompts * work.trained)
    compute = train_flops(recipe, shape, work, part) / (flops * ranks)
    return compute + _exchange(recipe, shape, work, layout, device, part) + _optimizer(recipe, layout, device, part)


def train_flops(recipe: Recipe, shape: ModelShape, work: Work, part: Trained) -> float:
    """Of one step. Per weight and token: 2 forward, 2 for the gradient of the input, 2 for that of the weight if it is trained."""
    checkpointing = recipe.trainer.gradient_checkpointing
    shared = shape.shared_prefix and not checkpointing
    reference = 2 if has_reference(recipe.stabilizers, recipe.objective) else 0
    per_weight = 2 + 2 + (2 if part.full else 0) + (2 if checkpointing else 0) + reference
    batches = cut(work, shared=shared)
    segments = batches.segments * work.updates
    scored = work.prompts * work.trained * work.mean
    prompts = segments if shared else work.prompts * work.trained
    tokens = prompts * work.prompt + scored
    head = per_weight + (2 if batches.kinds[0].scored * shape.vocabulary > LOGITS_AT_ONCE else 0)
    attention = 4 * shape.layers * shape.query * (work.prompt + work.mean / 2)
    return (
        per_weight * tokens * (shape.layers * shape.layer_matrices)
        + head * scored * shape.embedding
        + (per_weight / 2 * scored * attention)
    )


def _exchange(recipe: Recipe, shape: ModelShape, work: Work, layout: Layout, device: Device, part: Trained) -> float:
    """Between ranks: an all-reduce of gradients (2 n - 1 over n of their size); with ZeRO-3 weights, twice per micro-batch."""
    if layout.ranks == 1:
        return 0.0
    link = device.link if layout.ranks <= NODE else min(device.link, NETWORK)
    width = HALF if recipe.model.dtype == "bfloat16" else FLOAT
    volume = 2 * width * part.parameters * (layout.ranks - 1) / layout.ranks * work.updates
    if recipe.trainer.zero == 3:
        shared = shape.shared_prefix and not recipe.trainer.gradient_checkpointing
        batches = cut(work, shared=shared, ranks=layout.ranks).count * work.updates
        volume += 2 * width * shape.parameters * batches
    return volume / link


def _optimizer(recipe: Recipe, layout: Layout, device: Device, part: Trained) -> float:
    """Reads and writes weights, gradients and two moments in float32; or does so on the host."""
    split = layout.ranks if recipe.trainer.backend.use == "deepspeed" and recipe.trainer.zero != 0 else 1
    own = part.parameters / split
    if recipe.trainer.offload not in (None, "none"):
        return own / HOST_ADAM + 2 * HALF * own / PCIE
    bandwidth, _ = _reached(recipe, device, READ_SHARE, TRAIN_SHARE)
    return 7 * FLOAT * own / bandwidth


def syncing(recipe: Recipe, shape: ModelShape, layout: Layout, device: Device) -> float:
    """Weights to the engines; a colocated vLLM also leaves the GPU and comes back."""
    width = HALF if recipe.model.dtype == "bfloat16" else FLOAT
    if device.is_cpu:
        return FLOAT * moved(recipe, shape) / device.link
    if layout.placement == "split":
        return width * moved(recipe, shape) / BROADCAST
    awake = 2 * width * shape.parameters / layout.tensor_parallel / PCIE if recipe.rollout.engine.use == "vllm" else 0.0
    return width * moved(recipe, shape) / device.link + awake


def _reached(recipe: Recipe, device: Device, read: float, compute: float) -> tuple[float, float]:
    """(bytes, FLOP) per second that are reached. The figures of a CPU are per core already what was reached."""
    if not device.is_cpu:
        slower = 1 if recipe.model.dtype == "bfloat16" else 8  # float32 without tensor cores; TF32 would be 2
        return device.bandwidth * read, device.flops * compute / slower
    cores = recipe.model.threads
    if cores is None:
        return device.bandwidth, device.flops
    return min(device.bandwidth, cores * CPU_BANDWIDTH), min(device.flops, cores * CPU_FLOPS)
