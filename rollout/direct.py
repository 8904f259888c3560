"""Weights from the GPUs of trainer ranks to those of rollout workers, with vLLM's own transfer engines (`vllm_transfer.py`).

    pool      engine.begin_load(version, manifest)      on every worker
    ranks     sender.send_weights()                     on every rank, for it gathers; rank 0 drives the workers:
                start_weight_update, update_weights(names, dtypes, shapes), finish_weight_update -> engine.transfer
    pool      engine.end_load()                         on every worker: everything announced came, new fingerprint

The process of the run says when, and sees the proofs that every sync gives; no tensor comes near it. Every call has a deadline. What
is lost while weights are on their way ends the run: a collective cannot be repaired from outside.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ttrl.cluster import Cluster, Lost
from ttrl.config.schema import Recipe
from ttrl.errors import ClusterError, ConfigError, EngineError
from ttrl.model.outlet import DirectWeights, Outlet
from ttrl.protocols import WeightSource
from ttrl.rollout.delivery import Arrival, Interrupted, Receipt

GRACE_SECONDS = 10.0
"""How long workers may take to say that they live."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Direct:
    """The Delivery over NCCL or CUDA IPC. The senders in the ranks are made again whenever other workers are to receive."""

    def __init__(self, nodes: Cluster, recipe: Recipe, kind: Literal["nccl", "ipc"]) -> None:
        self._nodes, self._recipe, self._kind = nodes, recipe, kind
        self._seconds = float(nodes.section.call_seconds)
        self._members: list[Any] = []

    def send(self, workers: Sequence[Any], source: WeightSource) -> list[Receipt]:
        """Raises ClusterError or EngineError for whatever is lost after the first call; before, the worker is Lost and replaced."""
        assert isinstance(source, DirectWeights), "check_transport lets no other trainer through"
        self._check_room(source.manifest)
        what = f"sync to version {source.version}"
        begun = [w.begin_load.remote(source.version, dict(source.manifest), source.adapter) for w in workers]
        found = self._nodes.settle(begun, seconds=self._seconds, what=what)
        if any(isinstance(item, Lost) for item in found):
            return [item if isinstance(item, Lost) else Interrupted() for item in found]
        members, self._members = self._members, []
        try:
            if members != list(workers):
                source.send(self._join(workers), f"joining ranks and rollout workers ({self._kind})")
            source.send(transmit, what)
        except ClusterError as error:
            raise self._blame(workers, error) from error
        self._members = list(workers)
        ended = self._nodes.settle([w.end_load.remote() for w in workers], seconds=self._seconds, what=what)
        return [item if isinstance(item, Lost) else Arrival(*item) for item in ended]

    def _join(self, workers: Sequence[Any]) -> Join:
        return Join(
            self._kind, tuple(workers), self._recipe.model.dtype,
            tensor_parallel=int(self._recipe.rollout.engine.options.get("tensor_parallel", 1)),
            bucket_bytes=self._nodes.section.bucket_mb << 20, seconds=self._seconds,
        )  # fmt: skip

    def _check_room(self, manifest: Mapping[str, tuple[int, ...]]) -> None:
        """vLLM's IPC sender has one buffer, and a tensor must fit into it."""
        name = max(manifest, key=lambda key: math.prod(manifest[key]))
        size, given = math.prod(manifest[name]) * _BYTES[self._recipe.model.dtype], self._nodes.section.bucket_mb
        if self._kind == "ipc" and size > given << 20:
            raise ConfigError(
                f"cluster.bucket_mb: {given} is too small for {name}, which cluster.transport: ipc sends whole; set at least "
                f"{math.ceil(size / (1 << 20))}"
            )

    def _blame(self, workers: Sequence[Any], error: ClusterError) -> ClusterError:
        """The error of the ranks, with the workers that died or hang."""
        found = self._nodes.settle(
            [w.ping.remote() for w in workers], seconds=GRACE_SECONDS, what="looking for workers"
        )
        lost = [f"{item.who} {item.reason}" for item in found if isinstance(item, Lost)]
        return ClusterError("\n".join([str(error), *lost]))


@dataclass(frozen=True, slots=True)
class Join:
    """Runs in every rank: makes its sender, and brings in the workers from rank 0."""

    kind: Literal["nccl", "ipc"]
    workers: tuple[Any, ...]
    dtype: str
    tensor_parallel: int
    bucket_bytes: int
    seconds: float

    def __call__(self, outlet: Outlet) -> None:
        from ttrl.rollout.vllm_transfer import Client, Source, connect

        if outlet.kept is not None:
            outlet.kept.shutdown()
            outlet.kept = None
        client = Client(WorkerCalls(self.workers, self.seconds), len(self.workers), self.tensor_parallel)
        host, port = _free_port() if outlet.rank == 0 and self.kind == "nccl" else ("", 0)
        outlet.kept = connect(
            self.kind, client, Source.on_gpu(outlet.weights, self.dtype), rank=outlet.rank,
            world=1 + len(self.workers) * self.tensor_parallel, address=host, port=port, bucket_bytes=self.bucket_bytes,
        )  # fmt: skip
        client.give_up = outlet.kept.shutdown


def transmit(outlet: Outlet) -> None:
    """Runs in every rank: one sync."""
    outlet.kept.send_weights()


@dataclass(frozen=True, slots=True)
class WorkerCalls:
    """`Worker.transfer` of all workers at once, from rank 0. Raises what a worker raises, and EngineError for one that is lost."""

    workers: tuple[Any, ...]
    seconds: float

    def __call__(self, method: str, arguments: Sequence[dict[str, Any] | None]) -> None:
        import ray
        from ray import exceptions

        places = {w.transfer.remote(method, a): i for i, (w, a) in enumerate(zip(self.workers, arguments, strict=True))}
        waiting, deadline = list(places), time.monotonic() + self.seconds
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                late = ", ".join(str(places[ref]) for ref in waiting)
                raise EngineError(f"{method}: rollout worker {late} did not answer within {self.seconds:g} s")
            try:
                ray.get(ready[0])
            except exceptions.RayTaskError as error:
                if isinstance(error.cause, Exception) and not isinstance(error.cause, exceptions.RayError):
                    raise error.cause from None
                raise EngineError(f"{method}: rollout worker {places[ready[0]]}: {error}") from None
            except exceptions.RayError as error:
                raise EngineError(f"{method}: rollout worker {places[ready[0]]} died: {error}") from None


def _free_port() -> tuple[str, int]:
    """An address of this node that the workers reach."""
    import ray

    host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    with socket.create_server((host, 0)) as server:
        return host, int(server.getsockname()[1])
