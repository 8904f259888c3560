"""Starting vLLM inside this process: quietly, without a network, and without leaving traces in torch's global state."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ttrl.config.schema import ModelSection
from ttrl.errors import ConfigError, EngineError
from ttrl.model.processor import CACHE_BYTES

log = logging.getLogger(__name__)

WORKER = "ttrl.rollout.vllm_worker.Worker"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM can be built for."""
SHOWN_LINES = 15

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives here: weights arrive without a copy through a socket
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the one whose sampler `vllm_worker` extends; the only one there is on a CPU
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_START_ERRORS = (RuntimeError, ValueError, OSError, ImportError, AssertionError, LookupError, AttributeError, TypeError)
"""What vLLM is known to raise while it starts; there is no common base class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a recipe may say about the engine; see `ttrl.rollout.engines.vllm`."""

    tensor_parallel: int
    gpu_memory_utilization: float
    kv_cache_gib: float | None
    max_model_len: int | None
    max_num_seqs: int | None
    enforce_eager: bool | None
    seeds: Literal["per_request", "engine"]
    lora_rank: int | None
    transfer: Literal["nccl", "ipc"] | None
    implementation: Literal["auto", "transformers"] = "auto"


class LastLines(logging.Handler):
    """Keeps the last records of vLLM's loggers, for the message of a failed start."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[str] = deque(maxlen=SHOWN_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def start(folder: Path, model: ModelSection, options: Options, seed: int = 0) -> Any:
    """A vllm LLMEngine. Raises ConfigError for a device vLLM was not built for, EngineError when it does not start."""
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    last = _quiet()
    if model.threads is not None:
        torch.set_num_threads(model.threads)
    with _undisturbed(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from vllm.platforms import current_platform
            from vllm.v1.engine.llm_engine import LLMEngine

            on_cpu = bool(current_platform.is_cpu())
            _check_device(model.device, on_cpu)
            return LLMEngine.from_engine_args(_arguments(folder, model, options, on_cpu, seed))
        except _START_ERRORS as error:
            if isinstance(error, ConfigError):
                raise
            shown = "\n".join(f"  {line}" for line in last.lines)
            raise EngineError(
                f"vLLM did not start: {type(error).__name__}: {error}\nits last log lines:\n{shown}"
            ) from error


def _arguments(folder: Path, model: ModelSection, options: Options, on_cpu: bool, seed: int) -> Any:
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    cache = options.kv_cache_gib if options.kv_cache_gib is not None else 1.0 if on_cpu else None
    eager = options.enforce_eager if options.enforce_eager is not None else on_cpu
    rest: dict[str, Any] = {"max_num_seqs": options.max_num_seqs} if options.max_num_seqs is not None else {}
    if on_cpu:  # a prompt taken in parts makes vLLM rewind the request's own generator, which a CPU's cannot
        rest |= {"enable_chunked_prefill": False}
    if options.lora_rank is not None:
        rest |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": built_rank(options.lora_rank)}
    sees = "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if sees:  # pictures are processed with a tokenizer; they stay in this process, so one copy of the pixels is enough
        rest |= {"mm_processor_cache_gb": CACHE_BYTES / 2**30}
    if options.transfer is not None:
        rest |= {"weight_transfer_config": WeightTransferConfig(backend=options.transfer)}
    return EngineArgs(
        model=str(folder), model_impl=options.implementation, skip_tokenizer_init=not sees, dtype=model.dtype, seed=seed,
        max_model_len=options.max_model_len, tensor_parallel_size=options.tensor_parallel, enforce_eager=eager,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_memory_bytes=None if cache is None else int(cache * 2**30), enable_prefix_caching=True,
        enable_sleep_mode=not on_cpu, load_format="safetensors", generation_config="vllm", trust_remote_code=False,
        logprobs_mode="raw_logprobs", worker_extension_cls=WORKER, disable_log_stats=True, use_tqdm_on_load=False, **rest,
    )  # fmt: skip


def built_rank(rank: int) -> int:
    """The smallest rank vLLM can be built for that holds this one."""
    return next(size for size in RANKS if size >= rank)


def _check_device(device: str, on_cpu: bool) -> None:
    if device.startswith("cuda") and on_cpu:
        raise ConfigError(f"model.device is {device!r}, but the installed vLLM is the CPU build; use auto or cpu")
    if device == "cpu" and not on_cpu:
        raise ConfigError("model.device is 'cpu', but the installed vLLM is built for GPUs; see scripts/setup_vllm_cpu")
    if ":" in device:
        raise ConfigError(
            f"model.device {device!r}: vLLM takes the first visible GPUs; choose with CUDA_VISIBLE_DEVICES"
        )


def _quiet() -> LastLines:
    """vLLM's log goes to a buffer instead of the terminal, unless the user asked for it with VLLM_LOGGING_LEVEL."""
    last = LastLines()
    logger = logging.getLogger("vllm")
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        logger.propagate = False
        logger.setLevel(logging.INFO)
    for handler in [h for h in logger.handlers if isinstance(h, LastLines)]:
        logger.removeHandler(handler)
    logger.addHandler(last)
    return last


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """vLLM seeds every global generator of the process and switches off torch.set_num_threads; both are undone."""
    threads, python, legacy = torch.set_num_threads, random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = threads
            random.setstate(python)
            np.random.set_state(legacy)
