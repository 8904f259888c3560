"""Rollout workers as real Ray actors: the same results as one engine, whoever does the work and whoever dies over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers_ray import recipe, replaced, results, train

from ttrl.cluster import Cluster, connect
from ttrl.config import Recipe
from ttrl.config.schema import ClusterSection
from ttrl.errors import ClusterError, EngineError, StopRequested
from ttrl.model.buckets import KeptWeights, pack_buckets
from ttrl.model.load import load_model
from ttrl.model.weights import NamedTensors
from ttrl.prompts import tokenize
from ttrl.protocols import WeightSource
from ttrl.registry import build
from ttrl.rollout.flat import FlatSampler
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.ray_pool import RayPool
from ttrl.setup import check_recipe
from ttrl.types import Request, SamplingSpec

WORKERS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    section = ClusterSection(backend="ray", address="local", workers=WORKERS)
    running = connect(section, lambda: None, ranks=0, device="cpu")
    yield running
    running.close()


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs share the cluster of the module instead of starting one each."""

    def shared(section: ClusterSection, check_stop: Callable[[], None], **_: Any) -> Cluster:
        cluster.section = section
        return cluster

    monkeypatch.setattr("ttrl.setup.connect", shared)
    monkeypatch.setattr(cluster, "close", lambda: None)


@pytest.fixture
def pool_of(cluster: Cluster) -> Iterator[Callable[[Recipe], RayPool]]:
    pools = []

    def make(of: Recipe) -> RayPool:
        cluster.section = of.cluster
        pools.append(RayPool(of, cluster))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The run in one process that all others must equal."""
    return results(train(recipe(tmp_path_factory.mktemp("whole"))))


def local(of: Recipe) -> LocalPool:
    return LocalPool(build("engine", of.rollout.engine.model_validate("hf"), of.model, lambda: None))


def requests(of: Recipe, pool: Any, votes: int = 4) -> list[Request]:
    found: list[Request] = []

    class Recorder:
        def generate(self, asked: list[Request]) -> list[Any]:
            found.extend(asked)
            raise StopRequested("recorded")

    prompts = tokenize(check_recipe(of).records, pool.tokenizer, of.data.template, None)
    with pytest.raises(StopRequested):
        FlatSampler(votes, votes, lambda _: [])(prompts, Recorder(), SamplingSpec(max_new_tokens=24), 7)  # type: ignore[arg-type]
    return found


def moved(of: Recipe, version: int = 1) -> KeptWeights:
    """Other weights than those of the model file: a bit more of everything."""
    named = {name: p.detach() * 1.01 for name, p in load_model(of.model).named_parameters()}
    manifest = {name: tuple(tensor.shape) for name, tensor in named.items()}
    source = NamedTensors(version, manifest, lambda: iter(named.items()))
    return KeptWeights.of(source, tuple(pack_buckets(iter(source), 1 << 20)))


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        (a.prompt_id, a.index, a.text, a.weights) == (b.prompt_id, b.index, b.text, b.weights)
        and np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        for a, b in zip(first, second, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_in_any_order_trains_the_same_weights(on_cluster, whole, tmp_path, workers):
    folder = train(recipe(tmp_path, workers=workers, engine={"mood": "slow"}))
    assert results(folder) == whole
    assert sum(replaced(folder)) == 0


def test_a_worker_killed_in_the_middle_of_a_step_changes_nothing(on_cluster, whole, tmp_path, caplog):
    # Skipped calls: the evaluation before training has three contexts, so that the kill is in a step, after a sync or before it
    engine = {"mood": "die", "once": str(tmp_path / "died"), "skip": 3}
    folder = train(recipe(tmp_path, workers=2, engine=engine))
    assert (tmp_path / "died").exists()
    assert results(folder) == whole
    assert sum(replaced(folder)) == 1
    assert "rollout worker" in caplog.text and "2 replacements left" in caplog.text
    assert "last words of this worker" in caplog.text


def test_sampling_ahead_is_the_same_as_in_one_process_also_when_a_worker_dies(on_cluster, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    ahead = ("rollout.ahead=1", "steps=3", "objective.with={loss: tis}")
    here = train(recipe(tmp_path / "here", *ahead))
    engine = {"mood": "die", "once": str(tmp_path / "died"), "skip": 4}
    there = train(recipe(tmp_path / "there", *ahead, "cluster.placement=split", workers=2, engine=engine))
    assert (tmp_path / "died").exists()
    assert results(there) == results(here)


def test_a_hung_worker_is_replaced_at_its_deadline(pool_of, tmp_path):
    engine = {"mood": "hang", "once": str(tmp_path / "hung")}
    of = recipe(tmp_path, "cluster.call_seconds=15", workers=2, engine=engine)
    pool, twin = pool_of(of), local(of)
    asked = requests(of, pool)
    assert same(pool.generate(asked), twin.generate(asked))
    assert pool.events() == {"cluster/replaced": 1.0}
    assert pool.events() == {"cluster/replaced": 0.0}


def test_a_used_up_budget_ends_in_an_error_with_the_last_words(pool_of, tmp_path):
    of = recipe(tmp_path, "cluster.replacements=1", workers=1, engine={"mood": "die"})
    pool = pool_of(of)
    with pytest.raises(
        ClusterError, match=r"rollout worker 0 died(.|\n)*last words of this worker\nand all 1 replacements"
    ):
        pool.generate(requests(of, pool))


@pytest.mark.parametrize("when", ["start", "generate"])
def test_what_an_engine_raises_is_raised_here(pool_of, tmp_path, when):
    of = recipe(tmp_path, workers=1, engine={"mood": "raise", "when": when})

    def use() -> None:
        pool = pool_of(of)
        pool.generate(requests(of, pool))

    with pytest.raises(EngineError, match="this engine is broken") as caught:
        use()
    assert str(caught.value) == "this engine is broken"
    assert "in rollout worker 0:" in caught.value.__notes__[0]
    assert "moody.py" in caught.value.__notes__[0]


@pytest.mark.parametrize("transport", ["object_store", "gloo"])
def test_a_worker_that_dies_over_a_sync_is_replaced_and_gets_all_of_it(pool_of, tmp_path, transport):
    engine = {"mood": "die", "when": "load", "once": str(tmp_path / "died"), "skip": 1}
    of = recipe(tmp_path, f"cluster.transport={transport}", "cluster.call_seconds=60", workers=2, engine=engine)
    pool, twin, source = pool_of(of), local(of), moved(of)
    assert len(source.buckets) > 2
    twin.sync(source, must_move=True)
    pool.sync(source, must_move=True)
    assert (tmp_path / "died").exists()
    asked = requests(of, pool, votes=2)
    assert same(pool.generate(asked), twin.generate(asked))
    text = np.arange(3, 20, dtype=np.int32)
    scores = pool.score(text)
    assert len(scores) == 2 and all(np.array_equal(s, twin.score(text)[0]) for s in scores)
    pool.sync(moved(of, version=2), must_move=False)  # the group of the transport is whole again


@pytest.mark.parametrize("when", ["score", "release"])
def test_a_worker_that_dies_over_another_call_is_replaced_with_the_weights_of_the_last_sync(pool_of, tmp_path, when):
    engine = {"mood": "die", "when": when, "once": str(tmp_path / "died")}
    of = recipe(tmp_path, workers=2, engine=engine)
    pool, twin, source = pool_of(of), local(of), moved(of)
    twin.sync(source, must_move=True)
    pool.sync(source, must_move=True)
    with pool.released():
        pass
    text = np.arange(3, 20, dtype=np.int32)
    assert all(np.array_equal(scores, twin.score(text)[0]) for scores in pool.score(text))
    assert (tmp_path / "died").exists()
    assert pool.events() == {"cluster/replaced": 1.0}


def test_a_withheld_tensor_and_frozen_weights_are_noticed(pool_of, tmp_path):
    (tmp_path / "frozen").mkdir()
    of = recipe(tmp_path, workers=1)
    source = moved(of)
    last = source.buckets[-1]
    short = KeptWeights(1, source.manifest, None, (*source.buckets[:-1], type(last)(last.entries[:-1], last.data)))
    pool = pool_of(of)
    with pytest.raises(EngineError, match=f"1 of {len(source.manifest)} tensors did not arrive"):
        pool.sync(short, must_move=True)
    with pytest.raises(EngineError, match="half of a new set of weights"):
        pool.generate(requests(of, pool))
    pool.close()  # its seat is needed
    frozen = pool_of(recipe(tmp_path / "frozen", workers=1, engine={"mood": "frozen"}))
    with pytest.raises(EngineError, match="identical to the one before"):
        frozen.sync(source, must_move=True)


def test_kept_weights_outlive_the_trainer_moving_on(pool_of, tmp_path):
    of = recipe(tmp_path, workers=1)
    pool, twin = pool_of(of), local(of)
    named = {name: p.detach() * 1.01 for name, p in load_model(of.model).named_parameters()}
    live = NamedTensors(1, {n: tuple(t.shape) for n, t in named.items()}, lambda: iter(named.items()))
    kept: WeightSource = pool.keep(live)
    for tensor in named.values():
        tensor.zero_()
    assert all(torch.equal(tensor, expected) for (_, tensor), (_, expected) in zip(kept, moved(of), strict=True))
    pool.sync(kept, must_move=True)
    twin.sync(moved(of), must_move=True)
    asked = requests(of, pool, votes=2)
    assert same(pool.generate(asked), twin.generate(asked))


def test_the_wish_to_stop_is_honoured_while_workers_are_busy(pool_of, cluster, tmp_path, monkeypatch):
    of = recipe(tmp_path, workers=1, engine={"mood": "hang"})
    pool = pool_of(of)

    def stop() -> None:
        raise StopRequested("stopped by SIGINT")

    monkeypatch.setattr(cluster, "_check_stop", stop)
    with pytest.raises(StopRequested):
        pool.generate(requests(of, pool))


def test_a_cluster_of_our_own_is_out_of_reach_for_other_machines(cluster):
    assert cluster.is_private
    family = [psutil.Process(os.getpid()), *psutil.Process(os.getpid()).children(recursive=True)]
    listening = [c.laddr.ip for process in family for c in process.net_connections("inet") if c.status == "LISTEN"]
    assert len(listening) > 3
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
