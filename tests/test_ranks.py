"""Trainer ranks as real Ray actors: they train as one trainer, and nothing waits for a rank that is gone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers_ranks import SPLIT_ALL
from helpers_torch import largest_difference, samples, trainer, weights_of

from ttrl.cluster import Cluster, Lost, connect
from ttrl.config.schema import Recipe
from ttrl.errors import ClusterError, StopRequested
from ttrl.model.buckets import pack_buckets, unpack
from ttrl.model.outlet import DirectWeights
from ttrl.model.weights import Intake
from ttrl.protocols import RemoteWeights
from ttrl.trainers.backends import TrainerSetup
from ttrl.trainers.packing import pack
from ttrl.trainers.ranks import RankGroup

GROUPS = ((5, 3, 1, 4), (2, 6, 6), (1, 1), (8,))
LR = 1e-2

TROUBLE = '''
import os, signal, time
from pathlib import Path

class Trouble:
    """A stabilizer that does to rank 1, once a step has begun, what the file says."""

    needs = frozenset()

    def __init__(self, *, file: str):
        self._file = Path(file)

    def loss(self, out, batch):
        import torch.distributed as dist
        from ttrl.metrics import MetricSet
        from ttrl.protocols import LossOut

        what = self._file.read_text() if self._file.exists() else ""
        if dist.get_rank() == 1 and what:
            print("rank 1 is about to", what, flush=True)
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "sleep":
                time.sleep(600)
        return LossOut(loss=out.logprobs.sum() * 0.0, metrics=MetricSet())
'''


def recipe_of(folder: Path, **trainer_settings: Any) -> Recipe:
    cluster = {
        "backend": "ray",
        "address": "local",
        "ranks": 2,
        "start_seconds": 180,
        **trainer_settings.pop("cluster", {}),
    }
    top = trainer_settings.pop("top", {})
    settings = {"backend": "deepspeed", "lr": LR, "schedule": "constant", "warmup": 0.0, **trainer_settings}
    return Recipe.model_validate(
        {
            "name": "ranks", "steps": 4, "model": {"path": str(folder), "device": "cpu", "threads": 1},
            "data": {"prompts": "unused"}, "rollout": {"temperature": 0.8}, "trainer": settings, "cluster": cluster, **top,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tiny_model_dir: Path) -> Iterator[Cluster]:
    recipe = recipe_of(tiny_model_dir)
    running = connect(recipe.cluster, lambda: None, ranks=2, device="cpu")
    yield running
    running.close()


def group_of(recipe: Recipe, cluster: Cluster, check_stop: Any = lambda: None) -> RankGroup:
    cluster.section = recipe.cluster
    return RankGroup(TrainerSetup.of(recipe, check_stop, cluster), cluster)


def batches(step: int) -> list[Any]:
    return pack(samples(GROUPS, seed=step), 10_000)  # one micro-batch: dealing has to split it


def test_ranks_train_send_weights_save_and_export_as_one_trainer(
    cluster: Cluster, tiny_model_dir: Path, tmp_path: Path
) -> None:
    stop: list[bool] = []

    def check_stop() -> None:
        if stop:
            raise StopRequested("enough")

    one = trainer(tiny_model_dir, temperature=0.8, settings={"lr": LR})
    two = group_of(recipe_of(tiny_model_dir, zero=3, deepspeed=SPLIT_ALL), cluster, check_stop)
    assert two.shares_prompts
    for step in range(2):
        got, want = two.step(step, [batches(step)]), one.step(step, [batches(step)])
        assert got.metrics == pytest.approx(want.metrics, rel=1e-5, abs=1e-5)
        assert (got.grad_norm, got.lr, got.updates) == (pytest.approx(want.grad_norm, rel=2e-5), want.lr, want.updates)
    expected = weights_of(one)
    source = two.weights()
    assert isinstance(source, RemoteWeights) and isinstance(source, DirectWeights)
    assert source.version == two.version == 2
    assert dict(source.manifest) == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    intake = Intake(source.version, source.manifest)
    arrived = {name: tensor.clone() for name, tensor in intake.take(iter(source))}
    intake.finish()
    assert largest_difference(arrived, expected) < 0.02 * LR
    # Small buckets, as references: the driver sees as many as packing gives, and the same content
    small = [two.fetch(ref) for ref in source.bucket_refs(8192)]
    twins = list(pack_buckets(iter(arrived.items()), 8192))
    assert len(small) == len(twins) > 4
    for bucket, twin in zip(small, twins, strict=True):
        assert bucket.entries == twin.entries and bucket.data.nbytes <= 8192
    assert all(torch.equal(tensor, arrived[name]) for name, tensor in unpack(small))
    # A sender works in all ranks, and finds there what it left before
    marks = tmp_path / "marks"
    marks.mkdir()

    def work(outlet: Any) -> None:
        found = [name for name, _ in outlet.weights()]
        outlet.kept = (outlet.kept or 0) + len(found)
        (marks / f"{outlet.rank}-{outlet.kept}").touch()

    for _ in range(2):
        source.send(work, "sending")
    count = len(expected)
    assert sorted(mark.name for mark in marks.iterdir()) == sorted(f"{r}-{n * count}" for r in (0, 1) for n in (1, 2))
    text = np.arange(3, 20, dtype=np.int32)
    np.testing.assert_allclose(two.score(text), one.score(text), atol=1e-4)
    two.save(tmp_path)
    after = two.step(2, [batches(2)])
    with pytest.raises(ClusterError, match="weights of version 2 are gone: the trainer is at 3"):
        list(source)
    with pytest.raises(ClusterError, match="weights of version 2 are gone"):
        source.send(work, "sending")
    two.load(tmp_path)
    assert two.version == 2
    assert two.step(2, [batches(2)]) == after
    two.restore(tmp_path, version=9)
    assert two.version == two.weights().version == 9
    two.scale_lr(0.5)
    assert two.step(2, [batches(2)]).lr == 0.5 * after.lr
    two.restore(tmp_path, version=11)
    assert two.step(2, [batches(2)]) == after
    (tmp_path / "model").mkdir()
    two.export(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    now = {name: tensor.clone() for name, tensor in two.weights()}
    assert all(torch.equal(loaded[name].detach(), now[name]) for name in now)
    stop.append(True)
    with pytest.raises(StopRequested):
        two.step(3, [batches(3)])
    assert two.version == 12
    two.close()
    with pytest.raises(ClusterError, match="ended before"):
        two.score(text)


@pytest.mark.parametrize(
    ("what", "zero", "message"),
    [
        ("die", 2, r"(?s)training step 1: trainer rank 1 died.*rank 1 is about to die"),
        (
            "sleep",
            3,
            r"(?s)training step 1: trainer rank 1 did not answer within 8 s.*rank 1 is about to sleep",
        ),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_all_ranks_before_the_deadline(
    cluster: Cluster, tiny_model_dir: Path, tmp_path: Path, what: str, zero: int, message: str
) -> None:
    plugin, file = tmp_path / "trouble.py", tmp_path / "what"
    plugin.write_text(TROUBLE)
    trouble = {"use": f"{plugin}:Trouble", "with": {"file": str(file)}}
    recipe = recipe_of(tiny_model_dir, zero=zero, cluster={"call_seconds": 8}, top={"stabilizers": [trouble]})
    two = group_of(recipe, cluster)
    pids = cluster.get([actor.__ray_call__.remote(lambda _: __import__("os").getpid()) for actor in two._actors],
                       seconds=60, what="pids")  # fmt: skip
    two.step(0, [batches(0)])
    two.save(tmp_path)
    file.write_text(what)
    raised: list[BaseException] = []

    def step() -> None:
        try:
            two.step(1, [batches(1)])
        except BaseException as failure:  # noqa: BLE001 - looked at below
            raised.append(failure)

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    thread.join(120.0)
    assert not thread.is_alive(), "the step waits for ever"
    with pytest.raises(ClusterError, match=message):
        raise raised[0]
    with pytest.raises(ClusterError, match="ended before"):
        two.weights()
    assert wait_until_gone(pids)
    assert sorted(f.name for f in tmp_path.glob("rank-*.trained.safetensors")) == [
        f"rank-000{rank}.trained.safetensors" for rank in range(2)
    ]


def wait_until_gone(pids: list[int]) -> bool:
    import time

    for _ in range(200):
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not alive:
            return True
        time.sleep(0.1)
    return False


# --- which failure is told, with a cluster that answers as it is told ------------------------------------------------------

TIMED_OUT = RuntimeError(
    "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"
)


class Answers:
    """A cluster whose actors answer at once: a value, an exception, Lost, or None for no answer."""

    def __init__(self, section: Any, *answers: Any) -> None:
        self.section, self._answers, self.killed = section, list(answers), 0

    def rank_options(self, index: int) -> dict[str, Any]:
        return {}

    def launch(self, name: str, *_: Any) -> Any:
        rank = int(name.split()[-1])

        class Method:
            def remote(self, *_: Any, **__: Any) -> int:
                return rank

        return type("Actor", (), {"__getattr__": lambda *_: Method()})()

    def get(self, refs: list[int], *, seconds: float, what: str, may_stop: bool = False) -> list[Any]:
        if may_stop:
            return [("127.0.0.1", 1)] * len(refs)
        for ref in sorted(refs, key=lambda r: not isinstance(self._answers[r], Exception)):
            if isinstance(answer := self.outcome(ref, what=what), Lost):
                raise ClusterError(f"{what}: {answer.who} {answer.reason}")
        return [self._answers[ref] for ref in refs]

    def wait(self, refs: list[int], *, seconds: float) -> tuple[list[int], list[int]]:
        return [r for r in refs if self._answers[r] is not None], [r for r in refs if self._answers[r] is None]

    def outcome(self, ref: int, *, what: str) -> Any:
        if isinstance(self._answers[ref], Exception):
            raise self._answers[ref]
        return self._answers[ref]

    def overdue(self, ref: int, seconds: float) -> Lost:
        return Lost(f"trainer rank {ref}", f"did not answer within {seconds:g} s")

    def kill(self, handle: Any) -> None:
        self.killed += 1


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ((TIMED_OUT, None), ClusterError, r"canary text: trainer rank 1 did not answer within 8 s\nanother rank reports: .*Timed out"),
        ((TIMED_OUT, Lost("trainer rank 1", "died: killed")), ClusterError, r"scoring the canary text: trainer rank 1 died: killed"),
        ((TIMED_OUT, ZeroDivisionError("a plug-in")), ZeroDivisionError, "a plug-in"),
        ((RuntimeError("Connection closed by peer [127.0.0.1]:1"), RuntimeError("a plug-in")), RuntimeError, "a plug-in"),
        ((FloatingPointError("step 1"), FloatingPointError("step 1")), FloatingPointError, "step 1"),
        (("fine", Lost("trainer rank 1", "died: killed")), ClusterError, "trainer rank 1 died: killed"),
    ],
)  # fmt: skip
def test_the_rank_that_is_to_blame_is_named_and_all_are_ended(
    tiny_model_dir: Path, answers: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    recipe = recipe_of(tiny_model_dir, zero=3, cluster={"call_seconds": 8})
    fake: Any = Answers(recipe.cluster, *answers)
    group = group_of(recipe, fake)
    with pytest.raises(error, match=message):
        group.score(np.arange(3, dtype=np.int32))
    assert fake.killed == 2
    with pytest.raises(ClusterError, match="ended before"):
        group.save(tiny_model_dir)


def test_a_part_that_did_not_reach_our_file_system_is_noticed(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model_dir)
    (tmp_path / "rank-0000.trained.safetensors").touch()
    with pytest.raises(ClusterError, match=r"part of rank 1 is not in .*all nodes share"):
        group_of(recipe, cast(Any, Answers(recipe.cluster, "", ""))).save(tmp_path)
