"""Rollout workers as real Ray actors: the same results as one engine, whoever does the work and whoever dies over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers_ray import obeyed, recipe, replaced, results, train

from ttrl.cluster import Cluster, connect
from ttrl.config import Recipe
from ttrl.config.schema import ClusterSection, Plug
from ttrl.errors import ClusterError, EngineError, StopRequested
from ttrl.model.buckets import Bucket, KeptWeights, pack_buckets
from ttrl.model.load import load_model
from ttrl.model.weights import NamedTensors
from ttrl.prompts import tokenize
from ttrl.registry import build
from ttrl.rollout.delivery import ObjectStore
from ttrl.rollout.direct import WorkerCalls
from ttrl.rollout.flat import FlatSampler
from ttrl.rollout.gloo import Gloo
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.ray_pool import RayPool
from ttrl.rollout.shared import SharedMemory
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

    monkeypatch.setattr("ttrl.parts.connect", shared)
    monkeypatch.setattr(cluster, "close", lambda: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The run in one process that all others must equal."""
    return results(train(recipe(tmp_path_factory.mktemp("whole"))))


def local(of: Recipe) -> LocalPool:
    return LocalPool(build("engine", Plug(use="hf"), of.model, lambda: None))


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


def moved(of: Recipe, version: int) -> KeptWeights:
    """Weights of their own for every version, close to those of the model file."""
    named = {name: p.detach() * (1 + version / 1000) for name, p in load_model(of.model).named_parameters()}
    manifest = {name: tuple(tensor.shape) for name, tensor in named.items()}
    source = NamedTensors(version, manifest, lambda: iter(named.items()))
    return KeptWeights.of(source, tuple(pack_buckets(iter(source), 1 << 20)))


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        (a.prompt_id, a.index, a.text, a.weights) == (b.prompt_id, b.index, b.text, b.weights)
        and np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        for a, b in zip(first, second, strict=True)
    )  # fmt: skip


def slow(*cases: Any) -> list[Any]:
    """Every new worker costs seconds of imports."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_in_any_order_trains_the_same_weights(on_cluster, whole, tmp_path, workers):
    folder = train(recipe(tmp_path, workers=workers, slow=True))
    assert results(folder) == whole
    assert sum(replaced(folder)) == 0


def test_a_worker_killed_in_the_middle_of_a_step_changes_nothing(on_cluster, whole, tmp_path, caplog):
    # The evaluation before training has three contexts and a step has four, so one of two workers is at its fifth after a sync
    folder = train(recipe(tmp_path, workers=2, orders="die generate 4", slow=True))
    assert obeyed(tmp_path)
    assert results(folder) == whole
    assert sum(replaced(folder)) == 1
    assert "rollout worker" in caplog.text and "2 replacements left" in caplog.text
    assert "last words of this worker" in caplog.text


def test_sampling_ahead_is_the_same_as_in_one_process_also_when_a_worker_dies(on_cluster, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    ahead = ("rollout.ahead=1", "steps=3", "objective.with={loss: tis}")
    here = train(recipe(tmp_path / "here", *ahead))
    there = train(
        recipe(tmp_path / "there", *ahead, "cluster.placement=split", workers=2, orders="die generate 4", slow=True)
    )
    assert obeyed(tmp_path / "there")
    assert results(there) == results(here)


def test_an_engine_that_cannot_start_says_why(cluster, tmp_path):
    of = recipe(tmp_path, workers=1, orders="raise start")
    cluster.section = of.cluster
    with pytest.raises(EngineError, match="this engine is broken") as caught:
        RayPool(of, cluster)
    assert str(caught.value) == "this engine is broken"
    assert "in rollout worker 0:" in caught.value.__notes__[0] and "moody.py" in caught.value.__notes__[0]


class Pair:
    """A pool of two workers, and one engine here that is given the same."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder = folder
        self.recipe = recipe(folder, "cluster.call_seconds=20", "cluster.replacements=20", workers=2)
        cluster.section = self.recipe.cluster
        self.pool, self.twin = RayPool(self.recipe, cluster), local(self.recipe)
        self.requests = requests(self.recipe, self.pool)
        self.version = 0

    def order(self, what: str) -> None:
        (self.folder / "orders.done").unlink(missing_ok=True)
        (self.folder / "orders").write_text(what)

    def source(self) -> KeptWeights:
        """Weights that neither had before."""
        self.version += 1
        return moved(self.recipe, self.version)

    def sync(self) -> None:
        source = self.source()
        self.pool.sync(source, must_move=True)
        self.twin.sync(source, must_move=True)

    def agree(self) -> bool:
        """On every token, log-prob and stamp, and on what both workers hold."""
        text = np.arange(3, 20, dtype=np.int32)
        scores = self.pool.score(text)
        return same(self.pool.generate(self.requests), self.twin.generate(self.requests)) and all(
            np.array_equal(found, self.twin.score(text)[0]) for found in scores
        )


@pytest.fixture(scope="module")
def running(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"), cluster)
    yield pair
    pair.pool.close()


@pytest.fixture
def pair(running: Pair, cluster: Cluster) -> Pair:
    """In step, and with nothing to report."""
    cluster.section = running.recipe.cluster
    running.sync()
    running.pool.events()
    return running


@pytest.mark.parametrize("order", ["die generate 1", "hang generate", *slow("die score", "die release")])
def test_a_lost_worker_is_replaced_with_the_weights_of_the_last_sync(pair, order):
    pair.order(order)
    with pair.pool.released():
        pass
    assert pair.agree()
    assert obeyed(pair.folder)
    assert pair.pool.events() == {"cluster/replaced": 1.0}
    assert pair.pool.events() == {"cluster/replaced": 0.0}


@pytest.mark.parametrize("transport", [SharedMemory, *slow(ObjectStore, Gloo)])
def test_a_worker_that_dies_over_a_sync_is_replaced_and_gets_all_of_it(pair, cluster, monkeypatch, transport):
    monkeypatch.setattr(pair.pool, "_delivery", transport(cluster, 1 << 20))
    pair.sync()
    pair.order("die load 1")
    pair.sync()
    assert obeyed(pair.folder)
    assert pair.agree()
    assert pair.pool.events() == {"cluster/replaced": 1.0}
    pair.sync()
    assert pair.agree()


def test_calls_of_a_trainer_rank_say_what_became_of_a_worker(pair):
    """Rank 0 speaks to the workers itself when weights go from GPU to GPU (`direct.py`)."""
    calls = WorkerCalls(tuple(pair.pool._crew.handles), 20.0)
    calls("anything", [None, {}])
    pair.order("raise transfer")
    with pytest.raises(EngineError, match=r"^this engine is broken$"):
        calls("update_weights", [None, None])
    pair.order("nap transfer")
    with pytest.raises(EngineError, match=r"update_weights: rollout worker \d did not answer within 0.5 s"):
        WorkerCalls(calls.workers, 0.5)("update_weights", [None, None])
    pair.order("die transfer")
    with pytest.raises(EngineError, match=r"finish_weight_update: rollout worker \d died"):
        calls("finish_weight_update", [None, None])
    assert obeyed(pair.folder)
    assert pair.agree()  # the next call finds the dead one


def test_a_used_up_budget_ends_in_an_error_with_the_last_words(pair, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pair.pool._crew, "_left", 0)
        pair.order("die generate")
        with pytest.raises(
            ClusterError, match=r"rollout worker \d died(.|\n)*last words of this worker\nand all 20 repl"
        ):
            pair.pool.generate(pair.requests)
    assert pair.agree()  # the next call finds the dead one


def test_what_an_engine_raises_is_raised_here(pair):
    pair.order("raise generate")
    with pytest.raises(EngineError, match="this engine is broken"):
        pair.pool.generate(pair.requests)


def test_the_wish_to_stop_is_honoured_while_workers_are_busy(pair, cluster, monkeypatch):
    def stop() -> None:
        raise StopRequested("stopped by SIGINT")

    pair.order("nap generate")
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "_check_stop", stop)
        with pytest.raises(StopRequested):
            pair.pool.generate(pair.requests)


def test_a_withheld_tensor_is_noticed_and_nothing_is_sampled_from_the_rest(pair):
    source = pair.source()
    last = source.buckets[-1]
    short = replace(source, buckets=(*source.buckets[:-1], Bucket(last.entries[:-1], last.data)))
    with pytest.raises(EngineError, match=f"1 of {len(source.manifest)} tensors did not arrive"):
        pair.pool.sync(short, must_move=True)
    with pytest.raises(EngineError, match="half of a new set of weights"):
        pair.pool.generate(pair.requests)


def test_weights_that_do_not_move_are_noticed(pair):
    pair.order("freeze begin")
    with pytest.raises(EngineError, match="the engines hold different weights"):
        pair.pool.sync(pair.source(), must_move=True)
    pair.sync()
    named = dict(moved(pair.recipe, pair.version))
    same_again = NamedTensors(
        pair.version + 1, {n: tuple(t.shape) for n, t in named.items()}, lambda: iter(named.items())
    )
    with pytest.raises(EngineError, match="identical to the one before"):
        pair.pool.sync(same_again, must_move=True)


def test_kept_weights_outlive_the_trainer_moving_on(pair):
    wanted = pair.source()
    named = {name: tensor.clone() for name, tensor in wanted}
    live = NamedTensors(pair.version, wanted.manifest, lambda: iter(named.items()))
    kept = pair.pool.keep(live)
    for tensor in named.values():
        tensor.zero_()
    assert all(torch.equal(tensor, expected) for (_, tensor), (_, expected) in zip(kept, wanted, strict=True))
    pair.pool.sync(kept, must_move=True)
    pair.twin.sync(wanted, must_move=True)
    assert pair.agree()


def test_a_cluster_of_our_own_is_out_of_reach_for_other_machines(cluster):
    assert cluster.is_private
    family = [psutil.Process(os.getpid()), *psutil.Process(os.getpid()).children(recursive=True)]
    listening = [c.laddr.ip for process in family for c in process.net_connections("inet") if c.status == "LISTEN"]
    assert len(listening) > 3
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
