"""Weights that arrive, and every way in which they might not: each ends in an error that says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_torch import one_update, prompt, samples, section, trainer

from ttrl.errors import EngineError
from ttrl.model.buckets import KeptWeights, Unpacker, lent, pack_buckets, unpack
from ttrl.model.weights import Intake, NamedTensors, load_weights
from ttrl.protocols import WeightSource
from ttrl.rollout.hf import HFEngine
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.shared import Room, Sender, _listen, receive, room_bytes
from ttrl.sync import CANARY_TOKENS, WeightLink, canary_text
from ttrl.trainers.parameters import LoRA
from ttrl.trainers.torch_backend import TorchTrainer
from ttrl.types import StepStats


class Part:
    """A trainer and a pool on one model, and the link between them."""

    def __init__(self, folder: Path, **fields: object) -> None:
        self.trainer = trainer(folder, settings={"lr": 0.01}, **fields)
        self.engine = HFEngine(section(folder), lambda: None, rows_at_once=8, shared_prefix=True)
        self.pool = LocalPool(self.engine, bucket_bytes=4096)
        self.link = WeightLink(
            self.trainer, self.pool, canary_text([prompt("a", 20), prompt("b", 9)], None), exact=True
        )

    def step(self) -> StepStats:
        return self.trainer.step(self.trainer.version, one_update(samples()))


@pytest.fixture
def part(tiny_model_dir: Path) -> Part:
    return Part(tiny_model_dir)


def tampered(
    part: Part, change: Callable[[Iterator[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]
) -> None:
    """The trainer's source, with another iteration under the same manifest."""
    original: Callable[..., WeightSource] = part.trainer.weights

    def weights(*, adapter: bool = False) -> WeightSource:
        source = original(adapter=adapter)
        return NamedTensors(source.version, source.manifest, lambda: change(iter(source)))

    part.trainer.weights = weights  # type: ignore[method-assign]


@pytest.mark.parametrize("lora", [False, True])
def test_after_a_sync_engine_and_trainer_agree(tiny_model_dir: Path, lora: bool) -> None:
    part = Part(tiny_model_dir, **({"parameters": LoRA(rank=2)} if lora else {}))
    part.link.sync(None)
    for _ in range(2):
        part.link.sync(part.step())
    text = canary_text([prompt("other", 40)], None)
    np.testing.assert_allclose(part.pool.score(text)[0], part.trainer.score(text), atol=1e-5)


def test_a_withheld_tensor_is_named(part: Part) -> None:
    tampered(part, lambda tensors: ((n, t) for n, t in tensors if n != "model.norm.weight"))
    with pytest.raises(EngineError, match=r"sync to version 1: 1 of \d+ tensors did not arrive \(model.norm.weight\)"):
        part.link.sync(part.step())
    with pytest.raises(EngineError, match="half of a new set of weights"):
        part.engine.generate([])


def test_a_tensor_that_comes_twice_or_unannounced_is_an_error(part: Part) -> None:
    source = part.trainer.weights()
    tensors = dict(source)
    part.engine.begin_load(1, source.manifest)
    part.engine.load([("model.norm.weight", tensors["model.norm.weight"])])
    with pytest.raises(EngineError, match=r"'model\.norm\.weight' arrived twice"):
        part.engine.load([("model.norm.weight", tensors["model.norm.weight"])])
    with pytest.raises(EngineError, match="'x' arrived but were not announced"):
        part.engine.load([("x", torch.zeros(1))])


def test_a_source_without_all_trained_tensors_is_seen_by_the_canary(part: Part) -> None:
    """The manifest itself is too short: what arrives is all that was announced, and still not the trainer's model."""
    original = part.trainer.weights

    def weights(*, adapter: bool = False) -> WeightSource:
        source = original(adapter=adapter)
        kept = {n: s for n, s in source.manifest.items() if "down_proj" not in n}
        return NamedTensors(source.version, kept, lambda: ((n, t) for n, t in source if n in kept))

    part.trainer.weights = weights  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"scores the canary text .* off the trainer"):
        part.link.sync(part.step())


def test_frozen_weights_behind_a_fresh_fingerprint_are_seen(part: Part) -> None:
    """The worst case: the engine takes everything, reports a new fingerprint, and computes with what it had."""
    part.link.sync(None)
    part.engine._parameters = lambda: {n: p.detach().clone() for n, p in part.engine._model.named_parameters()}  # type: ignore[method-assign]
    for group in part.trainer._optimizer.param_groups:
        group["lr"] = 0.0
    part.trainer._settings = part.trainer._settings.model_copy(update={"lr": 1e-7})  # too small for the bound to notice
    stats = part.step()
    with pytest.raises(EngineError, match="scores the canary text exactly as before"):
        part.link.sync(stats)


def test_large_frozen_weights_are_off_the_trainer(part: Part) -> None:
    part.engine._parameters = lambda: {n: p.detach().clone() for n, p in part.engine._model.named_parameters()}  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="does not compute with the trainer's weights"):
        part.link.sync(part.step())


def test_a_step_that_moved_nothing_may_sync(part: Part) -> None:
    part.link.sync(None)
    part.link.sync(None)


def test_kept_weights_do_not_change_with_the_trainer(part: Part) -> None:
    published = part.link.keep(part.step())
    held = part.trainer.score(canary_text([prompt("a", 20)], None))
    part.step()
    part.link.install(published)
    text = canary_text([prompt("a", 20)], None)
    np.testing.assert_allclose(part.pool.score(text)[0], held, atol=1e-5)
    assert part.engine.ping().weights.version == 1


def test_log_probs_of_other_weights_are_noticed_before_the_sync(part: Part) -> None:
    stats = part.step()
    worse = StepStats(
        metrics={**stats.metrics, "train/sampler_mismatch": 0.01}, tokens=1, grad_norm=1.0, lr=1.0, updates=1
    )
    with pytest.raises(EngineError, match="do not hold the same weights"):
        part.link.check_on_policy(worse)


def test_the_canary_is_a_fixed_text_of_bounded_length() -> None:
    prompts = [prompt(str(i), 5) for i in range(40)]
    assert len(canary_text(prompts, None)) == CANARY_TOKENS
    assert len(canary_text(prompts, 10)) == 10
    assert (canary_text(prompts, 10) == canary_text(prompts, None)[:10]).all()


@pytest.mark.parametrize("size", [1, 100, 1000, 10**6])
def test_buckets_hold_what_was_put_in(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator).bfloat16(), "c": torch.zeros(0, 4),
        "d": torch.arange(11), "e": torch.randn(5, 3, generator=generator).T, "f": torch.tensor(2.5),
    }  # fmt: skip
    buckets = list(pack_buckets(tensors.items(), size))
    assert all(b.data.nbytes <= size for b in buckets)
    assert [len(buckets) == 1, len(buckets) > 100] == [size >= 1000, size == 1]
    kept = dict(unpack(buckets))
    copied = {name: tensor.clone() for name, tensor in unpack(pack_buckets(tensors.items(), size, room=lent(size)))}
    for found in (kept, copied):
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("workers", [1, 3])
def test_shared_memory_cuts_no_tensor_and_overwrites_none_that_is_read(tmp_path: Path, workers: int) -> None:
    """Slots of 64 bytes, tensors of up to 400: the largest takes all of the memory, and workers of any pace see the same."""
    tensors = {str(k): torch.arange(n, dtype=torch.float32) + k for k, n in enumerate((3, 100, 2, 16, 17, 0, 40, 1, 1))}
    source = NamedTensors(1, {name: tuple(t.shape) for name, t in tensors.items()}, lambda: iter(tensors.items()))
    assert room_bytes(source, 64) == 400
    assert room_bytes(source, 1024) == 2048
    room = Room(64, room_bytes(source, 64))
    with _listen(tmp_path) as listener, ThreadPoolExecutor(workers) as threads:
        for _ in range(2):  # the same memory for the next sync
            loads = [threads.submit(read_slowly, listener.getsockname(), 0.002 * k) for k in range(workers)]
            connections = [listener.accept()[0] for _ in range(workers)]
            with Sender(connections, room, 10.0) as sender:
                sender.send(source)
                assert len(sender) == workers
            for load in loads:
                found, largest = load.result()
                assert list(found) == list(tensors)
                assert all(torch.equal(found[name], tensors[name]) for name in tensors)
                assert largest == 400  # the whole tensor was in one bucket


def read_slowly(path: str, seconds: float) -> tuple[dict[str, torch.Tensor], int]:
    unpacker, found, largest = Unpacker(), {}, 0
    for bucket in receive(path, 10.0):
        largest = max(largest, *(entry.nbytes for entry in bucket.entries))
        views = dict(unpacker.tensors(bucket))
        time.sleep(seconds)  # the sender goes on meanwhile
        found |= {name: view.clone() for name, view in views.items()}
    return found, largest


def test_a_tensor_that_is_cut_is_whole_or_missed() -> None:
    """Only tensors that are larger than a bucket are cut; a part that did not come is noticed at once, or by the manifest."""
    tensors = {"a": torch.arange(3.0), "b": torch.arange(10.0), "c": torch.arange(2.0)}
    buckets = list(pack_buckets(tensors.items(), 16))
    assert [[(e.name, e.offset, e.nbytes) for e in bucket.entries] for bucket in buckets] == [
        [("a", 0, 12)], [("b", 0, 16)], [("b", 16, 16)], [("b", 32, 8)], [("c", 0, 8)],
    ]  # fmt: skip
    for lost in (1, 2):
        with pytest.raises(EngineError, match="'b' arrived in parts, of which one is missing"):
            list(unpack(buckets[:lost] + buckets[lost + 1 :]))
    intake = Intake(1, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert [name for name, _ in intake.take(unpack(buckets[:3] + buckets[4:]))] == ["a", "c"]
    with pytest.raises(EngineError, match=r"1 of 3 tensors did not arrive \(b\)"):
        intake.finish()


def test_memory_is_used_again_only_when_asked_for() -> None:
    for reuse in (False, True):
        buckets = pack_buckets(((n, torch.full((4,), float(n))) for n in "12"), 16, room=lent(16) if reuse else None)
        first, second = next(buckets), next(buckets)
        assert np.shares_memory(first.data, second.data) == reuse


def test_a_bucket_is_not_changed_by_what_the_sender_does_next() -> None:
    tensor = torch.ones(4)
    buckets = pack_buckets(((n, tensor.mul_(2)) for n in "ab"), 16)
    first = next(buckets)
    assert next(buckets).data.view(np.float32).tolist() == [4.0] * 4
    assert first.data.view(np.float32).tolist() == [2.0] * 4


def test_the_manifest_names_exactly_what_comes(tiny_model_dir: Path) -> None:
    for fields in ({}, {"parameters": LoRA(rank=2)}):
        made: TorchTrainer = trainer(tiny_model_dir, **fields)
        for adapter in (False, True):
            source = made.weights(adapter=adapter)
            assert {name: tuple(t.shape) for name, t in source} == dict(source.manifest)
            assert (source.adapter is not None) == (adapter and bool(fields))


def test_adapter_names_are_those_of_peft(tiny_model_dir: Path) -> None:
    from peft import get_peft_model_state_dict

    parameters = LoRA(rank=2, targets=["q_proj", "down_proj"])
    source = trainer(tiny_model_dir, parameters=parameters).weights(adapter=True)
    assert dict(source.manifest) == {n: tuple(t.shape) for n, t in get_peft_model_state_dict(parameters._peft).items()}
    assert source.adapter is not None
    assert source.adapter.rank == 2
    assert "model.layers.0.mlp.down_proj" in source.adapter.targets


def test_kept_weights_are_a_source(part: Part) -> None:
    source = part.trainer.weights()
    kept = KeptWeights.of(source, tuple(pack_buckets(iter(source), 2048)))
    assert load_weights(part.engine, kept) == load_weights(part.engine, source)
