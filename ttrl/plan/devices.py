"""What devices can do. Peak figures are the makers' data sheets (dense bfloat16, one direction of a link), not measurements.

Prices are rounded on-demand prices per GPU and hour. Those of A100, H100 and H200 lie in the range of a survey of specialised clouds
of May 2026; the others are orders of magnitude without a source. They are here so that two plans can be compared: check yours and
pass `--price`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ttrl.config.explain import suggest
from ttrl.errors import ConfigError

PRICES_AS_OF = "2026-05"
MAX_DEVICES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or the CPU of this machine as a whole."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Multiply-adds count twice."""
    bandwidth: float
    """Bytes per second between memory and compute."""
    link: float
    """Bytes per second to another device of the node, one direction."""
    price: float
    """USD per hour."""

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


@dataclass(frozen=True, slots=True)
class Fleet:
    """`count` devices of one kind, in nodes of at most eight."""

    device: Device
    count: int

    def __str__(self) -> str:
        return "cpu" if self.device.is_cpu else f"{self.count}x{self.device.name}"


NODE = 8
"""GPUs per node; beyond it the network counts."""
NETWORK = 50e9
"""Bytes per second and GPU between nodes: one 400 Gbit/s port each, as in DGX H100."""


def _gpu(name: str, mebibytes: float, teraflops: float, bandwidth: float, link: float, price: float) -> Device:
    """MiB as nvidia-smi shows them, terabytes per second of memory, gigabytes per second of link."""
    return Device(
        name=name, memory=mebibytes * 2**20, flops=teraflops * 1e12, bandwidth=bandwidth * 1e12, link=link * 1e9,
        price=price,
    )  # fmt: skip


# PCIe 4.0 x16 carries 32 GB/s each way; NVLink 3, 4 and 5 carry 300, 450 and 900
DEVICES = (
    _gpu("H100", 81559, 989, 3.35, 450, 3.0),
    _gpu("H200", 143771, 989, 4.8, 450, 4.0),
    _gpu("B200", 183359, 2250, 8.0, 900, 5.5),
    _gpu("A100", 81920, 312, 2.04, 300, 1.5),
    _gpu("A100-40G", 40960, 312, 1.56, 300, 1.3),
    _gpu("L40S", 46068, 362, 0.864, 32, 1.0),
    _gpu("A10G", 23028, 70, 0.6, 32, 0.8),
    _gpu("L4", 23034, 121, 0.3, 32, 0.6),
    _gpu("RTX4090", 24564, 165, 1.01, 32, 0.5),
)

CPU_FLOPS, CPU_BANDWIDTH = 35e9, 10e9
"""Per core, float32, as reached and not as promised: SmolLM2-135M sampled 114 tokens/s in groups of 16 on one core
(docs/measurements.md), which is 16 x 2 x 134.5e6 FLOP in 0.14 s. Another CPU may be several times faster."""


def parse_gpus(text: str | None, *, memory: float | None = None) -> Fleet:
    """`8xH100`, `H100`, or `cpu` (also when nothing is given). `memory` (bytes) replaces what is known. Raises ConfigError."""
    if text is None or text.strip().lower() == "cpu":
        return Fleet(this_cpu(memory), 1)
    match = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z][\w-]*)", text.strip())
    if match is None:
        raise ConfigError(f"--gpus {text!r}: write COUNTxDEVICE, for example 8xH100, or cpu")
    count = int(match[1] or 1)
    if not 1 <= count <= MAX_DEVICES:
        raise ConfigError(f"--gpus {text!r}: the count must be from 1 to {MAX_DEVICES}")
    for device in DEVICES:
        if _plain(device.name) in (_plain(match[2]), _plain(match[2]).removesuffix("80gb").removesuffix("80g")):
            return Fleet(_with_memory(device, memory), count)
    names = [device.name for device in DEVICES]
    raise ConfigError(f"--gpus {text!r}: unknown device {match[2]!r}.{suggest(match[2].upper(), [*names, 'cpu'])}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").removesuffix("sxm")


def _with_memory(device: Device, memory: float | None) -> Device:
    return device if memory is None else Device(
        name=device.name, memory=memory, flops=device.flops, bandwidth=device.bandwidth, link=device.link, price=device.price
    )  # fmt: skip


def this_cpu(memory: float | None = None) -> Device:
    """This machine: cores this process may use, memory of the machine or of its container, whichever is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(
        name="cpu",
        memory=memory or _memory(),
        flops=cores * CPU_FLOPS,
        bandwidth=cores * CPU_BANDWIDTH,
        link=CPU_BANDWIDTH,
        price=0.0,
    )


def _memory() -> float:
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(float(Path(file).read_text()))
        except (OSError, ValueError):  # no container, or "max"
            continue
    return min(found)
