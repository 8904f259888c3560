"""Weights from GPU to GPU with vLLM's own transfer back-ends: NCCL between machines, CUDA IPC between processes on one GPU.

How the two sides meet. Every trainer rank calls `connect` once; every rollout worker holds a VLLMEngine built with the same
`transfer`. Rank 0 listens at `address:port` and tells the workers to join, through a `Client`. A sync is then:

    pool      engine.begin_load(version, manifest)      on every worker
    trainer   sender.send_weights()                     on every rank, for it gathers; rank 0 drives
                start_weight_update, update_weights(names, dtypes, shapes), finish_weight_update -> engine.transfer
    pool      engine.end_load()                         on every worker: everything announced came, new fingerprint

vLLM packs tensors into buffers of `bucket_bytes`, two of which exist at most. Deadlines are those of the remote calls around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.base import WeightSource as VLLMSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from ttrl.protocols import WeightSource

Call = Callable[[str, Sequence[dict[str, Any] | None]], None]
"""`call(method, arguments)` runs `engine.transfer(method, arguments[i])` on rollout worker i, all at once, and waits for all."""


class Source(VLLMSource):  # type: ignore[misc]
    """The trainer's weights of the moment as vLLM wants them: on the GPU and in the engines' dtype."""

    def __init__(self, current: Callable[[], WeightSource], dtype: torch.dtype, device: torch.device) -> None:
        self._current, self._dtype, self._device = current, dtype, device

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, self._dtype, tuple(shape)) for name, shape in self._current().manifest.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._current():
            yield name, tensor.detach().to(self._device, self._dtype)


class Client:
    """What rank 0 says to the rollout workers: vLLM's VLLMWeightSyncClient."""

    def __init__(self, call: Call, workers: int, tensor_parallel: int) -> None:
        self._call, self._workers, self._tensor_parallel = call, workers, tensor_parallel

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine numbers its own processes from `rank_offset` on, so each gets another one."""
        infos = [dict(init_info) for _ in range(self._workers)]
        if "rank_offset" in init_info:
            for worker, info in enumerate(infos):
                info["rank_offset"] += worker * self._tensor_parallel
        self._call("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self._call("start_weight_update", [None] * self._workers)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", [update_info] * self._workers)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", [None] * self._workers)


def connect(
    transport: Literal["nccl", "ipc"], client: Client, source: Source, *, rank: int, world: int, address: str, port: int,
    bucket_bytes: int,
) -> Any:  # fmt: skip
    """vLLM's sender for this trainer rank; `send_weights()` on every rank is a sync, `shutdown()` ends it.

    world: processes of all rollout workers, plus one. address, port: where rank 0 listens (nccl only).
    """
    info: NCCLTrainerInitInfo | IPCTrainerInitInfo
    if transport == "nccl":
        info = NCCLTrainerInitInfo(
            address, port, world, packed=True, packed_buffer_size_bytes=bucket_bytes, packed_num_buffers=2, rank=rank
        )
    else:
        info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=bucket_bytes, rank=rank)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
