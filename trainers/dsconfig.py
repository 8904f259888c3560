"""The DeepSpeed configuration of a recipe, and what a raw `trainer.deepspeed` may change in it. Imports no DeepSpeed."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from ttrl.config.schema import Recipe, TrainerSection
from ttrl.errors import ConfigError

log = logging.getLogger(__name__)

DEFAULT_STAGE = 2

# One denominator holds for all micro-batches of all ranks, and one schedule for all back-ends. These keys would break that unseen.
REFUSED: dict[str, str] = {
    "train_batch_size": "micro-batches are made by trainer.tokens_per_microbatch; remove it",
    "train_micro_batch_size_per_gpu": "micro-batches are made by trainer.tokens_per_microbatch; remove it",
    "gradient_accumulation_steps": "an update takes all micro-batches of its step, however many; remove it",
    "managed_gradient_accumulation": "the trainer itself says where an update ends; remove it",
    "gradient_allreduce_op": "losses are already divided by the tokens of all ranks; remove it",
    "fp16": "float16 would need loss scaling; use model.dtype: bfloat16",
    "amp": "use model.dtype: bfloat16",
    "torch_autocast": "use model.dtype: bfloat16",
    "bf16.enabled": "use model.dtype: bfloat16 or float32",
    "bfloat16": "use model.dtype: bfloat16",
    "scheduler": "use trainer.schedule, trainer.warmup and trainer.min_lr_ratio",
    "optimizer.params.lr": "use trainer.lr",
    "zero_optimization.stage": "use trainer.zero",
    "zero_optimization.offload_optimizer.nvme_path": "checkpoints of swapped states are not supported; use device: cpu",
    "zero_optimization.offload_param.nvme_path": "checkpoints of swapped states are not supported; use device: cpu",
    "tensor_parallel": "ranks are data-parallel; remove it",
    "sequence_parallel_size": "ranks are data-parallel; remove it",
}


def check_deepspeed(recipe: Recipe) -> None:
    """Raises ConfigError naming every setting of the trainer that backend deepspeed cannot work with."""
    problems = []
    if importlib.util.find_spec("deepspeed") is None:
        problems.append("trainer.backend deepspeed: the package is not installed; pip install 'ttrl[cluster]'")
    settings = recipe.trainer
    problems += [
        f"trainer.deepspeed: {key} cannot be set here: {remedy}"
        for key, remedy in REFUSED.items()
        if _holds(settings.deepspeed, key)
    ]
    if settings.offload in ("optimizer", "all") and settings.zero == 0:
        problems.append(
            "trainer.offload needs trainer.zero of at least 1; without ZeRO there is no optimizer state to move"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def deepspeed_config(settings: TrainerSection, dtype: str, *, gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: ours, with the recipe's raw configuration merged over it."""
    return dict(merged(our_config(settings, dtype, gpu=gpu), settings.deepspeed))


def our_config(settings: TrainerSection, dtype: str, *, gpu: bool) -> dict[str, Any]:
    stage = DEFAULT_STAGE if settings.zero is None else settings.zero
    offload = settings.offload or "none"
    host = {"device": "cpu", "pin_memory": gpu}
    zero: dict[str, Any] = {"stage": stage}
    if offload != "none":
        zero["offload_optimizer"] = host
    if offload == "all":
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,  # every update sets its own; some of DeepSpeed's optimizers take a step when they are built
                "betas": list(settings.betas),
                "weight_decay": settings.weight_decay,
                # DeepSpeed's own kernels are compiled on first use; only the one for states in host memory is worth it
                "torch_adam": not (gpu and offload != "none"),
            },
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
    }
    if dtype == "bfloat16" and stage >= 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def merged(ours: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` over `ours`, mapping by mapping."""
    out = dict(ours)
    for key, value in raw.items():
        held = out.get(key)
        out[key] = merged(held, value) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return out


def report_overrides(settings: TrainerSection, dtype: str, *, gpu: bool) -> None:
    """One warning per key in which the recipe's raw configuration differs from ours."""
    for key, old, new in overrides(our_config(settings, dtype, gpu=gpu), settings.deepspeed):
        log.warning("trainer.deepspeed sets %s: %s -> %r", key, old, new)


def overrides(ours: Mapping[str, Any], raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, what it was in words, new value)."""
    for key, value in raw.items():
        held = ours.get(key)
        if isinstance(value, Mapping) and (held is None or isinstance(held, Mapping)):
            yield from overrides(held or {}, value, f"{prefix}{key}.")
        elif key not in ours:
            yield f"{prefix}{key}", "DeepSpeed's default", value
        elif held != value:
            yield f"{prefix}{key}", repr(held), value


def _holds(raw: Mapping[str, Any], dotted: str) -> bool:
    head, _, rest = dotted.partition(".")
    if head not in raw:
        return False
    return not rest or (isinstance(raw[head], Mapping) and _holds(raw[head], rest))
