"""Which way weights take from trainer to rollout workers, decided by the recipe and by whether there are GPUs. Plain rules, no ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError

Transport = Literal["shared_memory", "object_store", "gloo", "nccl", "ipc"]
DIRECT = ("nccl", "ipc")
"""From the GPU of a rank to those of the workers, with vLLM's own transfer engines."""

_DEVICES = ("nvidia[0-9]*", "dxg", "kfd")
"""Device files of NVIDIA (also under WSL) and AMD GPUs."""


def check_transport(recipe: Recipe) -> None:
    """Raises ConfigError for what can be known without a cluster. Imports neither ray nor torch."""
    kind = recipe.cluster.transport
    if "transfer" in recipe.rollout.engine.options and recipe.rollout.engine.use == "vllm":
        raise ConfigError("rollout.engine.with.transfer follows from cluster.transport; remove it and set that")
    if kind not in DIRECT:
        return
    if recipe.cluster.backend == "local":
        raise ConfigError(f"cluster.transport: {kind} joins processes of a cluster; set cluster.backend: ray")
    reasons = obstacles(recipe, kind)
    if recipe.model.device == "cpu" or (_own_cluster(recipe.cluster.address) and not _gpu_here()):
        reasons.insert(0, NO_GPU)
    _refuse(kind, reasons)


def transport(recipe: Recipe, *, on_gpus: bool) -> Transport:
    """`cluster.transport` with `auto` decided. Raises ConfigError when GPUs are needed and there are none."""
    wanted = recipe.cluster.transport
    if wanted == "auto":
        direct: Transport = "ipc" if recipe.cluster.placement == "colocated" else "nccl"
        return direct if on_gpus and not obstacles(recipe, direct) else "shared_memory"
    if wanted in DIRECT:
        _refuse(wanted, [] if on_gpus else [NO_GPU])
    return wanted


NO_GPU = "needs GPUs, and there are none here or model.device is cpu"


def obstacles(recipe: Recipe, kind: str) -> list[str]:
    """Why a direct transport cannot serve this recipe; empty when it can."""
    cluster, engine, reasons = recipe.cluster, recipe.rollout.engine, []
    if engine.use != "vllm":
        reasons.append(f"is vLLM's, and rollout.engine is {engine.use}")
    if recipe.trainer.backend.use != "deepspeed":
        reasons.append(f"sends from trainer ranks, which trainer.backend: {recipe.trainer.backend.use} does not have")
    if recipe.rollout.ahead:
        reasons.append("sends the weights of the moment, and rollout.ahead keeps older ones in the object store")
    if engine.options.get("lora_rank") is not None:
        reasons.append("sends whole weights, and lora_rank of the engine asks for adapters")
    elif recipe.trainer.parameters.use == "lora":
        reasons.append("cannot send parts of fused layers, which merged LoRA weights are")
    if kind == "nccl" and cluster.placement == "colocated":
        reasons.append("cannot join two processes on one GPU, which placement: colocated means; ipc can")
    if kind == "ipc" and cluster.placement == "split":
        reasons.append("shares the memory of one GPU, which placement: split gives to one process only; nccl can")
    seats = cluster.workers * int(engine.options.get("tensor_parallel", 1))
    if kind == "ipc" and cluster.placement == "colocated" and cluster.ranks != seats:
        reasons.append(f"needs a rank on every GPU of the workers: cluster.ranks is {cluster.ranks}, they have {seats}")
    return reasons


def _refuse(kind: str, reasons: list[str]) -> None:
    if reasons:
        raise ConfigError(
            f"cluster.transport: {kind} {'; it '.join(reasons)}. Change that, or use auto, shared_memory, object_store or gloo"
        )


def _gpu_here() -> bool:
    return any(any(Path("/dev").glob(pattern)) for pattern in _DEVICES)


def _own_cluster(address: str) -> bool:
    """The run will start a cluster on this machine, unless one shows up in the meantime."""
    if address != "auto":
        return address == "local"
    named = os.environ.get("RAY_ADDRESS", "auto")
    left_by_ray_start = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return named == "local" or (named in ("", "auto") and not left_by_ray_start.exists())
