"""Ranks meet: one store on one address of rank 0, and collectives that end at a deadline."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from ttrl.errors import ConfigError, TtrlError
from ttrl.trainers.export import quiet_accelerator


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank among ranks."""

    rank: int = 0
    ranks: int = 1
    address: str = "127.0.0.1"
    """Of this rank's node: the one interface its collectives use."""
    master: tuple[str, int] | None = None
    """Where the store of rank 0 listens; None for a rank that is alone."""
    seconds: float = 3600.0
    """Deadline of one collective."""
    start_seconds: float = 600.0
    """Deadline of one collective while ranks start, one with its model loaded and another not."""


def open_store(address: str, ranks: int, seconds: float) -> Any:
    """Rank 0's store on a free port of this address and of no other."""
    listener = socket.create_server((address, 0), family=_family(address), backlog=ranks)
    port = listener.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, ranks, is_master=True, timeout=timedelta(seconds=seconds), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def join(place: Place, store: Any = None, *, gpu: bool) -> None:
    """Make this process a rank. Rank 0 brings the store it opened; a process that already is this rank stays it.

    Raises TtrlError for a process that is another rank already.
    """
    quiet_accelerator()
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (place.rank, place.ranks):
            raise TtrlError(f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already")
    else:
        if store is None and place.master is not None:
            host, port = place.master
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, place.ranks, is_master=False, timeout=timedelta(seconds=place.start_seconds)
            )
        with surroundings(place):
            dist.init_process_group(
                "nccl" if gpu else "gloo", store=store or HashStore(), rank=place.rank, world_size=place.ranks,
                timeout=timedelta(seconds=place.start_seconds),
            )  # fmt: skip
    os.environ["LOCAL_RANK"] = "0"  # a rank sees one device; ZeRO-3 asks for it in every forward pass
    _attach_deepspeed(gpu=gpu)


def _attach_deepspeed(*, gpu: bool) -> None:
    import deepspeed

    logger = logging.getLogger("DeepSpeed")  # it writes to stdout on its own; its warnings belong with all others
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    # A kernel for inference that would be compiled now and never used
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def limit_collectives(seconds: float) -> None:
    """The deadline from now on, of every group that DeepSpeed has made: by itself it lets them wait for 10 or 30 minutes."""
    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def leave(place: Place) -> None:
    """For a process that does other things too: other libraries would read the variable as a request to start ranks."""
    if place.ranks == 1:
        os.environ.pop("LOCAL_RANK", None)


@contextmanager
def surroundings(place: Place) -> Iterator[None]:
    """Process groups that are made inside use the one interface of the place."""
    name = interface(place.address)
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def interface(address: str) -> str:
    """The network interface with this address. Raises ConfigError when this machine has none."""
    import psutil

    for name, held in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in held):
            return str(name)
    raise ConfigError(f"no network interface of {socket.gethostname()} has the address {address}")


def wants_gpu(device: str) -> bool:
    """Whether `model.device` of a recipe means a GPU in this process."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def mean_over_ranks(total: float, weight: float, device: torch.device) -> float:
    """The mean whose sum and weight every rank knows a part of; 0 without weight."""
    sums = torch.tensor([total, weight], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1]) if float(sums[1]) else 0.0
