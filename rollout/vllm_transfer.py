"""The sending side of vLLM's own transfer back-ends: NCCL between GPUs, CUDA IPC between processes on one GPU.

Every trainer rank calls `connect`, and `send_weights()` of what it returns for each sync (`direct.py` says when). Rank 0 tells
the rollout workers to join and to receive, through a `Client`; each holds a VLLMEngine built with the same `transfer`. NCCL packs
tensors into two buffers of about `bucket_bytes`, IPC into one.
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

from ttrl.model.load import DTYPES
from ttrl.protocols import WeightSource

Call = Callable[[str, Sequence[dict[str, Any] | None]], None]
"""`call(method, arguments)` runs `engine.transfer(method, arguments[i])` on rollout worker i, all at once, and waits for all."""


class Source(VLLMSource):  # type: ignore[misc]
    """The trainer's weights of the moment as vLLM wants them: on the GPU and in the engines' dtype."""

    def __init__(self, current: Callable[[], WeightSource], dtype: torch.dtype, device: torch.device) -> None:
        self._current, self._dtype, self._device = current, dtype, device

    @staticmethod
    def on_gpu(current: Callable[[], WeightSource], dtype: str) -> Source:
        """For the GPU of this process."""
        return Source(current, DTYPES[dtype], torch.device("cuda", torch.cuda.current_device()))

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, self._dtype, tuple(shape)) for name, shape in self._current().manifest.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._current():
            yield name, tensor.detach().to(self._device, self._dtype)


class Client:
    """What rank 0 says to the rollout workers: vLLM's VLLMWeightSyncClient."""

    def __init__(self, call: Call, workers: int, tensor_parallel: int) -> None:
        self._call, self._workers, self._tensor_parallel = call, workers, tensor_parallel
        self.give_up: Callable[[], None] = lambda: None
        """Ends the connection. A worker that fails takes no part in the broadcast any more, in which rank 0 waits for it."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine numbers its own processes from `rank_offset` on, so each gets another one. What it was part of is left."""
        self._call("shutdown_weight_transfer_engine", [None] * self._workers)
        infos = [dict(init_info) for _ in range(self._workers)]
        if "rank_offset" in init_info:
            for worker, info in enumerate(infos):
                info["rank_offset"] += worker * self._tensor_parallel
        self._call("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self._call("start_weight_update", [None] * self._workers)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self._call("update_weights", [update_info] * self._workers)
        except BaseException:
            self.give_up()
            raise

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
