"""Who gets what: contexts to workers, buckets to workers, actors to bundles of CPUs and GPUs. No Ray here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_prompt

from ttrl.cluster import Lost
from ttrl.cluster.placement import Bundle, check_capacity, place
from ttrl.config.schema import ClusterSection
from ttrl.errors import ConfigError
from ttrl.model.weights import NamedTensors
from ttrl.rollout.dealing import ENOUGH_REQUESTS, Dealer, contexts
from ttrl.rollout.delivery import Arrival, ObjectStore
from ttrl.types import Request, SamplingSpec, WeightStamp

SPEC = SamplingSpec(max_new_tokens=4)


def asked(*names: str) -> list[Request]:
    return [Request(prompt=make_prompt(name[0]), index=i, seed=i, spec=SPEC, prefix=np.arange(len(name) - 1, dtype=np.int32))
            for i, name in enumerate(names)]  # fmt: skip


def test_a_context_is_a_run_of_neighbours_as_in_an_engine():
    assert contexts(asked("a", "a", "b", "a", "a+", "a+")) == [[0, 1], [2], [3], [4, 5]]
    assert contexts([]) == []


def taken(dealer: Dealer) -> list[list[int]]:
    found = []
    while dealer:
        found.append(dealer.take())
    return found


def test_an_engine_that_takes_one_context_gets_one():
    assert taken(Dealer([[0, 1], [2], [3]], workers=2, at_once=1)) == [[0, 1], [2], [3]]
    assert taken(Dealer([[0, 1], [2], [3]], workers=2, at_once=2)) == [[0, 1, 2], [3]]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 64, 1000])
def test_an_engine_with_continuous_batching_gets_large_calls_that_shrink(workers, count):
    runs = [[8 * i + k for k in range(8)] for i in range(count)]
    calls = taken(Dealer(runs, workers=workers, at_once=None))
    assert sorted(i for call in calls for i in call) == list(range(8 * count))
    sizes = [len(call) for call in calls]
    assert sizes == sorted(sizes, reverse=True)
    if workers == 1:
        assert len(calls) == 1
    elif count >= workers:
        assert len(calls) >= workers  # everyone has something to do
        assert max(sizes) <= max(8 * count / workers, ENOUGH_REQUESTS) + 8  # and nobody has it all
        assert min(sizes[:-1]) >= min(ENOUGH_REQUESTS, 8 * count // workers)  # batches stay full


def test_work_that_comes_back_is_dealt_first():
    dealer = Dealer([[0], [1], [2]], workers=2, at_once=1)
    first = dealer.take()
    dealer.give_back(first)
    assert taken(dealer) == [[0], [1], [2]]


class Remote:
    """A method of a handle: `.remote(...)` writes down the call and returns a reference."""

    def __init__(self, nodes: Nodes, worker: int, method: str) -> None:
        self._nodes, self._worker, self._method = nodes, worker, method

    def remote(self, *arguments: Any) -> str:
        ref = f"{self._method} {arguments[0] if self._method == 'load' else ''} on {self._worker}"
        self._nodes.events.append(ref)
        return ref


class Handle:
    def __init__(self, nodes: Nodes, worker: int) -> None:
        for method in ("begin_load", "load", "end_load"):
            setattr(self, method, Remote(nodes, worker, method))


class Nodes:
    """A cluster that writes down what is stored, called and waited for. Calls in `lose` are never answered."""

    section = ClusterSection()

    def __init__(self, *lose: str) -> None:
        self.events: list[str] = []
        self._lose, self._stored = lose, 0

    def put(self, value: Any) -> str:
        self.events.append(f"put {self._stored}")
        self._stored += 1
        return f"bucket {self._stored - 1}"

    def settle(self, refs: list[str], *, seconds: float, what: str) -> list[Any]:
        self.events += [f"ack: {ref}" for ref in refs]
        done = ("hash", WeightStamp(version=1, fingerprint="hash"))
        return [Lost("it", "died") if ref in self._lose else done for ref in refs]


def tensors(count: int) -> NamedTensors:
    """Each fills a piece of half a bucket of 32 bytes."""
    named = {name: torch.full((4,), float(i)) for i, name in enumerate("abcdef"[:count])}
    return NamedTensors(1, dict.fromkeys(named, (4,)), lambda: iter(named.items()))


def sent(nodes: Nodes, count: int) -> list[Any]:
    cluster: Any = nodes
    return ObjectStore(cluster, bucket_bytes=32).send([Handle(nodes, 0), Handle(nodes, 1)], tensors(count))


def test_a_piece_waits_while_one_is_loaded_and_no_more_than_two_are_stored():
    nodes = Nodes()
    assert [type(item) for item in sent(nodes, 4)] == [Arrival, Arrival]
    at = nodes.events.index
    for worker in (0, 1):
        for piece in (2, 3):
            assert at(f"ack: load bucket {piece - 2} on {worker}") < at(f"put {piece}")
        for piece in (1, 2, 3):  # it is there before the one before is done
            assert at(f"load bucket {piece} on {worker}") < at(f"ack: load bucket {piece - 1} on {worker}")
        assert at(f"ack: load bucket 3 on {worker}") < at(f"end_load  on {worker}")


def test_a_worker_lost_over_a_piece_gets_no_more_and_the_others_get_all():
    nodes = Nodes("load bucket 1 on 0", "load bucket 2 on 0")  # the next one was on its way
    assert [type(item) for item in sent(nodes, 4)] == [Lost, Arrival]
    assert "load bucket 3 on 1" in nodes.events and "end_load  on 1" in nodes.events
    assert "load bucket 3 on 0" not in nodes.events and "end_load  on 0" not in nodes.events
    both = Nodes(*(f"load bucket {piece} on {worker}" for piece in range(4) for worker in (0, 1)))
    assert [type(item) for item in sent(both, 4)] == [Lost, Lost]
    assert "put 2" not in both.events
    early = Nodes("begin_load  on 0", "load bucket 0 on 0")
    assert [type(item) for item in sent(early, 1)] == [Lost, Arrival]


def section(**fields: Any) -> ClusterSection:
    return ClusterSection(backend="ray", **fields)


def test_split_gives_everyone_a_bundle():
    placed = place(section(workers=2, ranks=3, placement="split"), ranks=3, gpus_per_worker=2, on_gpus=True)
    assert placed.groups == ((Bundle(1, 2),), (Bundle(1, 2),), (Bundle(1, 1),), (Bundle(1, 1),), (Bundle(1, 1),))
    assert [(s.group, s.bundle, s.gpus) for s in placed.workers] == [(0, 0, 2), (1, 0, 2)]
    assert [(s.group, s.bundle, s.gpus) for s in placed.ranks] == [(2, 0, 1), (3, 0, 1), (4, 0, 1)]
    assert (placed.cpus, placed.gpus, placed.largest()) == (5, 7, Bundle(1, 2))


def test_colocated_workers_and_ranks_share_gpus_in_turns():
    placed = place(section(workers=2, ranks=2), ranks=2, gpus_per_worker=1, on_gpus=True)
    assert placed.groups == ((Bundle(2, 1),), (Bundle(2, 1),))
    assert [(s.group, s.gpus) for s in (*placed.workers, *placed.ranks)] == [(0, 0.5), (1, 0.5), (0, 0.5), (1, 0.5)]


def test_a_colocated_worker_of_two_gpus_shares_them_with_two_ranks_on_one_node():
    placed = place(section(workers=2, ranks=4), ranks=4, gpus_per_worker=2, on_gpus=True)
    assert placed.groups == ((Bundle(2, 1), Bundle(1, 1)),) * 2
    assert [(s.group, s.bundle, s.gpus) for s in placed.ranks] == [(0, 0, 0.5), (0, 1, 0.5), (1, 0, 0.5), (1, 1, 0.5)]
    for worker in placed.workers:  # vLLM's own processes take the other halves
        assert worker.gpus == 0
        assert worker.env == {"VLLM_RAY_PER_WORKER_GPUS": "0.5", "VLLM_RAY_BUNDLE_INDICES": "0,1"}


def test_without_gpus_only_cpus_are_reserved():
    for placement in ("colocated", "split"):
        placed = place(
            section(workers=2, ranks=2, cpus_per_actor=1.5, placement=placement),
            ranks=2,
            gpus_per_worker=2,
            on_gpus=False,
        )
        assert (placed.cpus, placed.gpus) == (6.0, 0)


def test_a_trainer_in_this_process_takes_no_seat():
    placed = place(section(workers=3), ranks=0, gpus_per_worker=1, on_gpus=False)
    assert (len(placed.workers), placed.ranks, placed.cpus) == (3, (), 3)


@pytest.mark.parametrize(
    ("nodes", "fields", "message"),
    [
        ([Bundle(64, 1)], {"workers": 2}, r"need 2 GPUs, here has 1; lower"),
        ([Bundle(1, 4), Bundle(1, 4)], {"workers": 3}, r"need 3 CPUs, here has 2; lower .*cpus_per_actor"),
        (
            [Bundle(8, 1)] * 4,
            {"workers": 1, "placement": "split", "gpus": 2},
            r"2 GPUs on one node, and no node of here",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers_and_a_remedy(nodes, fields, message):
    width = fields.pop("gpus", 1)
    settings = section(**fields)
    with pytest.raises(ConfigError, match=message):
        check_capacity(place(settings, ranks=0, gpus_per_worker=width, on_gpus=True), settings, nodes, "here")
