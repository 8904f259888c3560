"""vLLM, for real and in this process: what it records is what the model says, and new weights are the ones it computes with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_torch import EOS, POSITIONS, prompt, request, save_tiny_model, section, tiny_llama, trainer
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, PreTrainedModel

from ttrl.errors import ConfigError, EngineError, StopRequested
from ttrl.model.buckets import Unpacker, lent, pack_buckets
from ttrl.model.weights import Fingerprint, NamedTensors, load_weights
from ttrl.rollout.engines import hf, vllm
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.tree import TreeSampler
from ttrl.sync import WeightLink
from ttrl.trainers.parameters import LoRA
from ttrl.types import Finish, IntArray, Request, Rollout, SamplingSpec, StepStats

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None and os.environ.get("TTRL_REQUIRE_VLLM") != "1",
    reason="vLLM is not installed (scripts/setup_vllm_cpu)",
)

SPEC = SamplingSpec(max_new_tokens=12, temperature=0.7, entropy=True)
GREEDY = replace(SPEC, temperature=0.0)
ANOTHER_EOS = 20
CLOSE = {"rtol": 0, "atol": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head width 32, the smallest that vLLM's CPU attention takes; two tokens end a text."""
    model = tiny_llama(0, hidden_size=128, head_dim=32)
    return save_tiny_model(tmp_path_factory.mktemp("llama"), model, eos=[EOS, ANOTHER_EOS])


@pytest.fixture(scope="module", autouse=True)
def vllm_leaves_no_process_group() -> Iterator[None]:
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def start(folder: Path, **options: Any) -> Any:
    return vllm(section(folder), options.pop("check_stop", lambda: None), kv_cache_gib=0.1, **options)


@pytest.fixture(scope="module")
def started(folder: Path) -> Any:
    threads, state = torch.set_num_threads, torch.get_rng_state()
    engine = start(folder)
    assert torch.set_num_threads is threads, "vLLM replaced a function of torch"
    assert torch.equal(torch.get_rng_state(), state), "vLLM seeded the global generator"
    return engine


@pytest.fixture
def engine(started: Any, folder: Path) -> Iterator[Any]:
    """The one engine of this module, with the weights of `folder` before and after each test."""
    yield started
    if started.ping().weights.version or started._intake is not None:
        load_weights(started, source(AutoModelForCausalLM.from_pretrained(folder), 0))
        started._sent.clear()  # as if it had never been sent anything


def source(model: PreTrainedModel, version: int, without: str = "") -> NamedTensors:
    """All parameters of a model, each only lent until the next; `without` one that is announced but never sent."""
    named = dict(model.named_parameters())

    def lent() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named.items():
            if name != without:
                mine = tensor.detach().clone()
                yield name, mine
                mine.fill_(9.0)

    return NamedTensors(version, {name: tuple(tensor.shape) for name, tensor in named.items()}, lent)


def requests(votes: int = 6, spec: SamplingSpec = SPEC) -> list[Request]:
    return [request(prompt(name, length), i, spec) for name, length in (("a", 5), ("b", 11)) for i in range(votes)]


def recomputed(model: PreTrainedModel, item: Request, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs and entropies of the completion from one plain forward pass over the final text, in double precision."""
    context = np.concatenate([item.prompt.token_ids, item.prefix])
    whole = torch.as_tensor(np.concatenate([context, rollout.token_ids]), dtype=torch.long)[None]
    with torch.no_grad():
        logits = model.double()(input_ids=whole).logits[0, len(context) - 1 : -1]
    table = torch.log_softmax(logits / (item.spec.temperature or 1.0), dim=-1).numpy()
    return table[np.arange(len(rollout.token_ids)), rollout.token_ids], -(np.exp(table) * table).sum(-1)


@torch.no_grad()
def scored(model: PreTrainedModel, token_ids: IntArray) -> np.ndarray:
    """Log-probs of a text from a plain forward pass."""
    ids = torch.as_tensor(token_ids, dtype=torch.long)
    return torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


def tokens(rollouts: Sequence[Rollout]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(r.prompt_id, r.index): tuple(r.token_ids.tolist()) for r in rollouts}


def text(length: int, seed: int = 0) -> IntArray:
    return prompt(f"text{seed}", length, seed).token_ids


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_records_equal_a_forward_pass_over_the_final_text(engine: Any, folder: Path, temperature: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = requests(4, replace(SPEC, temperature=temperature))
    for item, rollout in zip(wanted, engine.generate(wanted), strict=True):
        assert (rollout.prompt_id, rollout.index) == (item.prompt.id, item.index)
        logprobs, entropy = recomputed(model, item, rollout)
        np.testing.assert_allclose(rollout.logprobs, logprobs, **CLOSE)
        np.testing.assert_allclose(rollout.entropy, entropy, **CLOSE)
        assert rollout.logprobs.dtype == rollout.entropy.dtype == np.float32
        assert rollout.token_ids.dtype == np.int32


def test_truncated_sampling_records_the_full_softmax(engine: Any, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = requests(16, replace(SPEC, temperature=1.0, top_k=3, entropy=False))
    for item, rollout in zip(wanted, engine.generate(wanted), strict=True):
        np.testing.assert_allclose(rollout.logprobs, recomputed(model, item, rollout)[0], **CLOSE)
        assert rollout.entropy is None
        whole = np.concatenate([item.prompt.token_ids, rollout.token_ids])
        with torch.no_grad():
            best = model(torch.as_tensor(whole, dtype=torch.long)[None]).logits[0].topk(3).indices.numpy()
        for place, token in enumerate(rollout.token_ids, start=len(item.prompt.token_ids) - 1):
            assert token in best[place]


def test_a_mixed_call_gives_each_request_what_it_asked_for(engine: Any, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    specs = (
        SPEC, GREEDY, replace(SPEC, entropy=False, temperature=1.0), replace(SPEC, top_p=0.5),
        replace(SPEC, entropy=False, self_certainty=True),
    )  # fmt: skip
    wanted = [request(prompt("a"), i, spec) for i, spec in enumerate(specs)]
    for item, rollout in zip(wanted, engine.generate(wanted), strict=True):
        np.testing.assert_allclose(rollout.logprobs, recomputed(model, item, rollout)[0], **CLOSE)
        assert (rollout.entropy is not None) == item.spec.entropy
        assert (rollout.self_certainty is not None) == item.spec.self_certainty


def test_tokens_are_drawn_with_their_probabilities(engine: Any, folder: Path) -> None:
    votes, of = 3000, prompt("a")
    spec = SamplingSpec(max_new_tokens=1, temperature=1.5)
    drawn = Counter(int(r.token_ids[0]) for r in engine.generate([request(of, i, spec) for i in range(votes)]))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.as_tensor(of.token_ids).long()[None]).logits[0, -1]
    expected = torch.softmax(logits.double() / 1.5, -1).numpy() * votes
    often = np.flatnonzero(expected >= 5)
    seen = [*(drawn[int(i)] for i in often), sum(n for i, n in drawn.items() if i not in often)]
    hoped = [*expected[often], votes - expected[often].sum()]
    assert len(often) >= 5
    assert chisquare(seen, hoped).pvalue > 1e-3


def test_tokens_depend_on_seed_and_context_and_not_on_order(engine: Any) -> None:
    wanted = requests(8)
    first = tokens(engine.generate(wanted))
    assert tokens(engine.generate(wanted[::-1])) == first
    assert tokens(engine.generate(wanted[3:4])) == {("a", 3): first["a", 3]}
    assert len({ids for (name, _), ids in first.items() if name == "a"}) == 8
    large = [replace(wanted[0], index=i, seed=seed) for i, seed in enumerate((7, 2**64 - 9, 2**64 - 10))]
    assert len(set(tokens(engine.generate(large)).values())) == 3


def test_more_prompt_tokens_than_one_batch_takes_keep_the_seeds(engine: Any) -> None:
    """A prompt that vLLM takes in parts makes it rewind the generator of the request, which on a CPU raises."""
    budget = engine._vllm.vllm_config.scheduler_config.max_num_batched_tokens
    many = [request(prompt(f"n{i}", 170 + i % 7), 0, replace(SPEC, max_new_tokens=3)) for i in range(budget // 170 + 9)]
    together = tokens(engine.generate(many))
    assert tokens(engine.generate(many[::-1])) == together


def test_a_prefix_is_continued(engine: Any) -> None:
    whole = engine.generate([request(prompt("a"), 0, GREEDY)])[0]
    head = whole.token_ids[:5]
    rest = engine.generate([request(prompt("a"), 0, replace(GREEDY, max_new_tokens=7), prefix=head)])[0]
    assert [*head, *rest.token_ids] == whole.token_ids.tolist()
    np.testing.assert_allclose(rest.logprobs, whole.logprobs[5:], **CLOSE)
    assert rest.text == whole.text


def test_trees_share_what_vllm_computed_once(engine: Any, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts, spec = [prompt("a", 5), prompt("b", 11)], replace(SPEC, max_new_tokens=24)
    sampler = TreeSampler(10, 10, lambda _: [], trees=2, forks=2, branches=2, min_gap=2)
    forks = 0
    for group in sampler(prompts, LocalPool(engine), spec, 0):
        for rollout in group.rollouts:
            logprobs, entropy = recomputed(model, request(group.prompt, rollout.index, spec), rollout)
            np.testing.assert_allclose(rollout.logprobs, logprobs, **CLOSE)
            np.testing.assert_allclose(rollout.entropy, entropy, **CLOSE)
            assert rollout.text == engine.tokenizer.decode(rollout.token_ids.tolist(), skip_special_tokens=True)
            assert not {EOS, ANOTHER_EOS} & set(rollout.token_ids[:-1].tolist())
            if rollout.fork is not None:
                forks += 1
                shared = group.rollouts[rollout.fork.parent].token_ids[: rollout.fork.at]
                assert rollout.token_ids[: rollout.fork.at].tolist() == shared.tolist()
    assert forks > 8


def test_greedy_is_that_of_the_transformers_engine(engine: Any, folder: Path) -> None:
    wanted = requests(1, replace(GREEDY, max_new_tokens=40, self_certainty=True))
    for mine, theirs in zip(engine.generate(wanted), hf(section(folder), lambda: None).generate(wanted), strict=True):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert (mine.text, mine.finish, mine.weights) == (theirs.text, theirs.finish, theirs.weights)
        np.testing.assert_allclose(mine.entropy, theirs.entropy, **CLOSE)
        np.testing.assert_allclose(mine.self_certainty, theirs.self_certainty, **CLOSE)


def test_every_end_token_ends_a_rollout_and_stays_in_it(engine: Any) -> None:
    spec = SamplingSpec(max_new_tokens=40, temperature=1.5)
    rollouts = engine.generate([request(prompt("a"), i, spec) for i in range(60)])
    last = Counter(int(r.token_ids[-1]) for r in rollouts if r.finish is Finish.STOP)
    assert set(last) == {EOS, ANOTHER_EOS}
    for rollout in rollouts:
        assert not {EOS, ANOTHER_EOS} & set(rollout.token_ids[:-1].tolist())
        assert rollout.finish is (Finish.STOP if rollout.token_ids[-1] in last else Finish.LENGTH)
        assert rollout.finish is Finish.STOP or len(rollout.token_ids) == 40
    assert any(r.finish is Finish.LENGTH for r in rollouts)


def test_what_does_not_fit_is_refused(engine: Any) -> None:
    assert engine.max_positions == POSITIONS
    with pytest.raises(EngineError, match="185 context tokens and 12 new ones do not fit into an engine of 192"):
        engine.generate([request(prompt("a", 185), 0, SPEC)])
    engine.generate([request(prompt("a", 180), 0, SPEC)])


@pytest.mark.parametrize("length", [2, 64, POSITIONS])
def test_scores_are_those_of_the_model(engine: Any, folder: Path, length: int) -> None:
    expected = scored(AutoModelForCausalLM.from_pretrained(folder), text(length))
    scores = engine.score(text(length))
    assert scores.shape == (length - 1,)
    np.testing.assert_allclose(scores, expected, **CLOSE)


def test_a_stop_ends_sampling_between_tokens_and_the_engine_lives_on(engine: Any, monkeypatch) -> None:
    calls = iter(range(100))

    def stop() -> None:
        if next(calls) == 5:
            raise StopRequested

    before = tokens(engine.generate(requests(2)))
    monkeypatch.setattr(engine, "_check_stop", stop)
    with pytest.raises(StopRequested):
        engine.generate(requests(2))
    monkeypatch.setattr(engine, "_check_stop", lambda: None)
    assert tokens(engine.generate(requests(2))) == before


def test_it_samples_in_another_thread(engine: Any) -> None:
    here, there = tokens(engine.generate(requests(2))), {}
    thread = threading.Thread(target=lambda: there.update(tokens(engine.generate(requests(2)))))
    thread.start()
    thread.join()
    assert there == here


def test_new_weights_are_used_and_nothing_of_the_old_ones_is(engine: Any, folder: Path) -> None:
    """The prompt is longer than a block of the prefix cache, so that its keys and values are kept."""
    long = [request(prompt("long", 150), 0, GREEDY)]
    engine.generate(long)
    other = tiny_llama(1, hidden_size=128, head_dim=32)
    twin = hf(section(folder), lambda: None)
    assert load_weights(engine, source(other, 3)) == load_weights(twin, source(other, 3))
    assert engine.ping().weights == twin.ping().weights
    np.testing.assert_allclose(engine.score(text(100)), scored(other, text(100)), **CLOSE)
    rollout = engine.generate(long)[0]
    assert rollout.weights.version == 3
    np.testing.assert_allclose(rollout.logprobs, recomputed(other, long[0], rollout)[0], **CLOSE)


def test_a_withheld_tensor_is_named_and_the_engine_refuses_to_go_on(engine: Any) -> None:
    other, missing = tiny_llama(1, hidden_size=128, head_dim=32), "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(EngineError, match=f"1 of 21 tensors did not arrive \\({missing}"):
        load_weights(engine, source(other, 1, without=missing))
    with pytest.raises(EngineError, match="half of a new set of weights"):
        engine.generate(requests(1))
    load_weights(engine, source(other, 1))
    np.testing.assert_allclose(engine.score(text(60)), scored(other, text(60)), **CLOSE)


@pytest.mark.parametrize("name", ["model.layers.0.nonsense.weight", "nonsense"])
def test_a_name_that_vllm_does_not_know_is_an_error(engine: Any, name: str) -> None:
    with pytest.raises(EngineError, match=name):
        load_weights(engine, NamedTensors(1, {name: (3,)}, lambda: iter([(name, torch.zeros(3))])))


def test_a_tensor_that_vllm_skips_is_an_error(engine: Any) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with pytest.raises(EngineError, match=f"{name}' arrived, but vLLM skipped"):
        load_weights(engine, NamedTensors(1, {name: (16,)}, lambda: iter([(name, torch.zeros(16))])))


def test_frozen_weights_are_caught_by_the_canary(engine: Any, folder: Path, monkeypatch) -> None:
    from ttrl.rollout.vllm_worker import Worker

    ours = trainer(folder)
    link = WeightLink(ours, LocalPool(engine), text(64), exact=True)
    link.sync(None)
    for tensor in ours._trained.values():
        tensor.data.mul_(1.05)
    ours.version = 1
    stats = StepStats(metrics={}, tokens=1, grad_norm=1.0, lr=1e-3, updates=1)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "ttrl_receive", lambda self, tensors: None)
        with pytest.raises(EngineError, match="does not compute with the trainer's weights"):
            link.sync(stats)
    ours.version = 2
    for tensor in ours._trained.values():
        tensor.data.mul_(1.01)
    link.sync(stats)


def lora(folder: Path, targets: list[str]) -> Any:
    return trainer(folder, parameters=LoRA(rank=4, alpha=8.0, targets=targets))


def step(ours: Any, version: int) -> None:
    """Both factors random, so that the adapter does something."""
    generator = torch.Generator().manual_seed(version)
    for tensor in ours._trained.values():
        tensor.data.normal_(0, 0.2, generator=generator)
    ours.version = version


def test_nothing_of_a_bucket_is_kept_when_it_was_loaded(engine: Any) -> None:
    """Its memory is used again for the next one, in the middle of vLLM's fused layers and of tensors that are cut."""
    engine._fingerprint = Fingerprint()  # tests before this one sent names that no model has
    other = tiny_llama(1, hidden_size=128, head_dim=32)
    for bucket_bytes in (1 << 12, 1 << 16):
        weights, unpacker = source(other, 1), Unpacker()
        engine.begin_load(1, weights.manifest)
        for bucket in pack_buckets(iter(weights), bucket_bytes, room=lent(bucket_bytes)):
            engine.load(unpacker.tensors(bucket), lasting=True)
            bucket.data.fill(0x3F)
        assert engine.end_load() == expected_print(other)
        np.testing.assert_allclose(engine.score(text(64)), scored(other, text(64)), **CLOSE)


def test_merged_adapters_on_parts_of_fused_layers(engine: Any, folder: Path) -> None:
    """vLLM holds q, k and v as one matrix; k does not come and must still be there."""
    ours = lora(folder, ["q_proj", "v_proj", "up_proj"])
    for version in (1, 2):
        step(ours, version)
        load_weights(engine, ours.weights())
        np.testing.assert_allclose(engine.score(text(64)), ours.score(text(64)), **CLOSE)


def test_adapters_arrive_as_they_are_and_replace_each_other(folder: Path) -> None:
    ours, engine = lora(folder, ["q_proj", "v_proj", "down_proj"]), start(folder, lora_rank=4)
    twin = hf(section(folder), lambda: None)
    link = WeightLink(ours, LocalPool(engine), text(64), exact=True)
    long = [request(prompt("long", 150), i, replace(SPEC, temperature=t)) for i, t in enumerate((0.0, 0.7, 1.0))]
    before = engine.generate(long)
    np.testing.assert_allclose(engine.score(text(64)), twin.score(text(64)), **CLOSE)
    for version in (1, 2):
        step(ours, version)
        link.sync(StepStats(metrics={}, tokens=1, grad_norm=1.0, lr=1e-3, updates=1))
        load_weights(twin, ours.weights())
        after = engine.generate(long)
        assert tokens(after) != tokens(before)
        for item, rollout in zip(long, after, strict=True):
            assert rollout.weights.version == version
            np.testing.assert_allclose(rollout.logprobs, recomputed(twin._model.float(), item, rollout)[0], **CLOSE)
            twin._model.float()
        assert len(engine._vllm.list_loras()) == 1
        before = after
    with pytest.raises(EngineError, match="whole weights came to a vLLM engine with lora_rank: 4"):
        load_weights(engine, ours.weights())
    with pytest.raises(EngineError, match="adapter of rank 8 came to a vLLM engine with lora_rank: 4"):
        load_weights(engine, trainer(folder, parameters=LoRA(rank=8, targets=["q_proj"])).weights(adapter=True))


def expected_print(model: PreTrainedModel) -> str:
    found = Fingerprint()
    for name, tensor in model.named_parameters():
        found.update(name, tensor)
    return found.value()


def memory_backend(store: dict[str, torch.Tensor]) -> None:
    """A back-end for vLLM's weight transfer whose wire is a dict: what NCCL and CUDA IPC are on a GPU."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer import base, factory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Init(base.WeightTransferInitInfo):
        rank_offset: int

    @dataclass
    class Update(base.WeightTransferUpdateInfo):
        names: list[str]
        dtype_names: list[str]
        shapes: list[list[int]]

    class Receiver(base.WeightTransferEngine):
        init_info_cls, update_info_cls = Init, Update

        def init_transfer_engine(self, init_info: Init) -> None:
            store["rank"] = torch.tensor(init_info.rank_offset)

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def receive_weights(self, update_info: Update) -> None:
            self.model.load_weights([(name, store[name]) for name in update_info.names])

        def shutdown(self) -> None: ...

    factory.WeightTransferEngineFactory.register_engine("memory", Receiver)


def send(client: Any, of: Any, store: dict[str, torch.Tensor]) -> None:
    """What vLLM's senders do, in two chunks."""
    client.start_weight_update()
    told, sent = of.metadata(), [(name, tensor.clone()) for name, tensor in of]
    assert [m.name for m in told] == [name for name, _ in sent]
    for part in (slice(0, 7), slice(7, None)):
        store.update(sent[part])
        client.update_weights(
            {
                "names": [m.name for m in told[part]],
                "dtype_names": [str(m.dtype).removeprefix("torch.") for m in told[part]],
                "shapes": [list(m.shape) for m in told[part]],
            }
        )
    client.finish_weight_update()


def test_weights_through_vllms_own_transfer(folder: Path) -> None:
    from ttrl.rollout.vllm_transfer import Client, Source

    store: dict[str, torch.Tensor] = {}
    memory_backend(store)
    engine, other = start(folder, transfer="memory"), tiny_llama(1, hidden_size=128, head_dim=32)
    weights = source(other, 1)
    client = Client(lambda method, arguments: engine.transfer(method, arguments[0]), workers=1, tensor_parallel=1)
    client.init_weight_transfer_engine({"rank_offset": 1})
    prints = [engine.ping().weights.fingerprint]
    with pytest.raises(EngineError, match="set lora_rank"):
        engine.begin_load(1, {"model.layers.0.self_attn.q_proj.weight": (128, 128)})
    for version in (1, 2):
        engine.begin_load(version, weights.manifest)
        with torch.no_grad():
            other.lm_head.weight[3, 5] += 1
        send(client, Source(lambda: weights, torch.float32, torch.device("cpu")), store)
        prints.append(engine.end_load())
        np.testing.assert_allclose(engine.score(text(64)), scored(other, text(64)), **CLOSE)
    assert len(set(prints)) == 3
    engine.begin_load(3, {**weights.manifest, "withheld": (1,)})
    send(client, Source(lambda: weights, torch.float32, torch.device("cpu")), store)
    with pytest.raises(EngineError, match=r"did not arrive \(withheld"):
        engine.end_load()


def test_each_engine_of_a_transfer_has_ranks_of_its_own() -> None:
    from ttrl.rollout.vllm_transfer import Client

    said: list[Any] = []
    client = Client(lambda *call: said.append(call), workers=3, tensor_parallel=2)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    client.init_weight_transfer_engine({"packed": True})
    client.start_weight_update()
    left = ("shutdown_weight_transfer_engine", [None] * 3)
    assert [info["rank_offset"] for info in said[1][1]] == [1, 3, 5]
    assert said[0] == said[2] == left
    assert said[3:] == [("init_weight_transfer_engine", [{"packed": True}] * 3), ("start_weight_update", [None] * 3)]


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_the_sender_is_vllms_own(monkeypatch, transport: Any) -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from ttrl.rollout.vllm_transfer import connect

    made: list[Any] = []
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda info, client, source: made.append(info))
    of: Any = None
    connect(transport, of, of, rank=1, world=5, address="127.0.0.1", port=1234, bucket_bytes=1 << 20)
    (info,) = made
    assert (info.backend, info.rank, info.packed, info.packed_buffer_size_bytes) == (transport, 1, True, 1 << 20)
    assert transport == "ipc" or (info.master_address, info.master_port, info.world_size) == ("127.0.0.1", 1234, 5)


def test_digests_depend_on_every_bit_and_place() -> None:
    from ttrl.rollout.vllm_worker import _digest

    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        swapped, flipped = values.clone(), values.clone()
        swapped[0, 0], swapped[4, 6] = values[4, 6], values[0, 0]
        flipped[2, 3] = torch.nextafter(values[2, 3], torch.tensor(9.0, dtype=dtype))
        assert len({_digest(t) for t in (values, swapped, flipped)}) == 3
        assert _digest(values) == _digest(values.clone())


def test_a_failed_start_shows_the_last_log_lines(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)vLLM did not start.*last log lines:\n  \w+ ") as caught:
        vllm(section(folder), lambda: None, kv_cache_gib=1e6)
    assert "memory" in str(caught.value)
    with pytest.raises(ConfigError, match="CPU build"):
        vllm(section(folder).model_copy(update={"device": "cuda"}), lambda: None)


def test_a_whole_run(tmp_path: Path) -> None:
    """The embedding of this model is tied to its head; ttrl.sync proves after each step that both arrived."""
    small = (
        "steps=2",
        "eval.limit=8",
        "data.limit=8",
        "data.prompts_per_step=8",
        "eval.heldout=null",
        "eval.samples=8",
        "eval.k=[1]",
    )
    output = tmp_path / "run"
    command = [sys.executable, "-m", "ttrl.cli", "train", "lab/vllm-quickstart", *small, "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    said = (result.stdout + result.stderr).splitlines()
    assert [line for line in said if "INFO" in line or "vllm" in line.replace("vllm-quickstart", "").lower()] == []
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/sampler_mismatch"] < 1e-4 for row in steps] == [True, True]
    summary = json.loads((output / "summary.json").read_text())
    assert all(0 < summary[when]["pass@1"]["value"] < 1 for when in ("initial", "final"))
