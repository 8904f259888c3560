"""The transformers engine: what it records is what the model says, and tokens depend on seeds and contexts only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import context
from helpers_torch import EOS, POSITIONS, VOCABULARY, prompt, request, save_tiny_model, section, tiny_llama
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from ttrl.config import load_recipe
from ttrl.errors import EngineError, StopRequested
from ttrl.model.weights import Fingerprint, NamedTensors, load_weights
from ttrl.parts import assemble
from ttrl.rollout.engines import hf
from ttrl.rollout.hf import HFEngine
from ttrl.rollout.pool import LocalPool
from ttrl.setup import check_recipe
from ttrl.types import Finish, Request, Rollout, SamplingSpec, WeightStamp

SPEC = SamplingSpec(max_new_tokens=12, temperature=0.8, entropy=True, self_certainty=True)


def engine(folder: Path, *, rows_at_once: int = 128, shared_prefix: bool = True, **fields: object) -> HFEngine:
    stop: Callable[[], None] = fields.pop("check_stop", lambda: None)  # type: ignore[assignment]
    made = hf(section(folder), stop, rows_at_once=rows_at_once, shared_prefix=shared_prefix)
    assert isinstance(made, HFEngine)
    return made


@pytest.fixture(scope="module")
def shared(tiny_model_dir: Path) -> HFEngine:
    """An engine whose weights no test changes."""
    return engine(tiny_model_dir)


def requests(votes: int = 6, spec: SamplingSpec = SPEC) -> list[Request]:
    return [request(prompt(name, length), i, spec) for name, length in (("a", 5), ("b", 11)) for i in range(votes)]


def by_key(rollouts: Sequence[Rollout]) -> dict[tuple[str, int], list[int]]:
    return {(r.prompt_id, r.index): r.token_ids.tolist() for r in rollouts}


def recomputed(folder: Path, item: Request, rollout: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs, entropies and self-certainties of the completion from one forward pass over the final text, in double precision."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    context = np.concatenate([item.prompt.token_ids, item.prefix])
    whole = torch.as_tensor(np.concatenate([context, rollout.token_ids]), dtype=torch.long)[None]
    with torch.no_grad():
        logits = model(input_ids=whole).logits[0, len(context) - 1 : -1]
    table = torch.log_softmax(logits / (item.spec.temperature or 1.0), dim=-1).numpy()
    certainty = -np.log(table.shape[1]) - table.mean(-1)
    return table[np.arange(len(rollout.token_ids)), rollout.token_ids], -(np.exp(table) * table).sum(-1), certainty


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_records_equal_a_forward_pass_over_the_final_text(
    tiny_model_dir: Path, shared_prefix: bool, temperature: float
) -> None:
    wanted = requests(4, replace(SPEC, temperature=temperature))
    rollouts = engine(tiny_model_dir, shared_prefix=shared_prefix).generate(wanted)
    for item, rollout in zip(wanted, rollouts, strict=True):
        logprobs, entropy, certainty = recomputed(tiny_model_dir, item, rollout)
        np.testing.assert_allclose(rollout.logprobs, logprobs, atol=1e-5)
        assert rollout.entropy is not None and rollout.self_certainty is not None
        np.testing.assert_allclose(rollout.entropy, entropy, atol=1e-5)
        np.testing.assert_allclose(rollout.self_certainty, certainty, atol=1e-5)
        assert rollout.logprobs.dtype == rollout.entropy.dtype == rollout.self_certainty.dtype == np.float32
        assert rollout.token_ids.dtype == np.int32


def test_truncated_sampling_records_the_full_softmax(shared: HFEngine, tiny_model_dir: Path) -> None:
    wanted = requests(2, replace(SPEC, top_k=3, top_p=0.9))
    for item, rollout in zip(wanted, shared.generate(wanted), strict=True):
        np.testing.assert_allclose(rollout.logprobs, recomputed(tiny_model_dir, item, rollout)[0], atol=1e-5)


def test_entropy_and_self_certainty_are_recorded_only_on_request(shared: HFEngine) -> None:
    for rollout in shared.generate(requests(2, replace(SPEC, entropy=False))):
        assert rollout.entropy is None and rollout.self_certainty is not None
    for rollout in shared.generate(requests(2, replace(SPEC, self_certainty=False))):
        assert rollout.entropy is not None and rollout.self_certainty is None


def test_what_the_reward_needs_is_what_the_engine_is_asked_for() -> None:
    changes = ["data.limit=2", "data.prompts_per_step=2", "eval.labels=null", "eval.heldout=null", "eval.limit=null"]
    for weights in ("none", "entropy", "self_certainty"):
        recipe = load_recipe("quickstart", [*changes, f"reward.with.weights={weights}"])
        parts = assemble(check_recipe(recipe), lambda: None)
        assert (parts.spec.entropy, parts.spec.self_certainty) == (weights == "entropy", weights == "self_certainty")
        items = [parts.prompts[identifier] for identifier in parts.source.batch(0)]
        for group in parts.sampler(items, parts.pool, parts.spec, 0):
            assert parts.reward(group, context()).label is not None


def test_tokens_do_not_depend_on_how_requests_are_spread(tiny_model_dir: Path, shared: HFEngine) -> None:
    wanted = requests(6)
    expected = by_key(shared.generate(wanted))
    assert len({tuple(tokens) for tokens in expected.values()}) > 8  # they are random, not one text twelve times
    one_by_one = [rollout for item in wanted for rollout in shared.generate([item])]
    interleaved = shared.generate([item for pair in zip(wanted[:6], wanted[6:], strict=True) for item in pair])
    assert by_key(one_by_one) == expected
    assert by_key(shared.generate(wanted[::-1])) == expected
    assert by_key(interleaved) == expected
    for rows in (1, 4):
        assert by_key(engine(tiny_model_dir, rows_at_once=rows).generate(wanted)) == expected
    assert by_key(engine(tiny_model_dir, shared_prefix=False).generate(wanted)) == expected


def test_rollouts_come_in_the_order_of_the_requests(shared: HFEngine) -> None:
    wanted = requests(3)
    shuffled = [wanted[i] for i in (4, 0, 3, 5, 1, 2)]
    assert [(r.prompt_id, r.index) for r in shared.generate(shuffled)] == [(q.prompt.id, q.index) for q in shuffled]
    assert shared.generate([]) == []


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same(shared: HFEngine) -> None:
    item = requests(1)[0]
    first, again = shared.generate([item])[0], shared.generate([item])[0]
    assert first.token_ids.tolist() == again.token_ids.tolist()
    others = shared.generate([replace(item, seed=item.seed + i) for i in range(1, 6)])
    assert all(other.token_ids.tolist() != first.token_ids.tolist() for other in others)


def test_the_limits_of_a_request_do_not_change_its_first_tokens(shared: HFEngine) -> None:
    long = shared.generate(requests(4, replace(SPEC, max_new_tokens=20)))
    short = shared.generate(requests(4, replace(SPEC, max_new_tokens=5)))
    for one, other in zip(long, short, strict=True):
        assert one.token_ids[:5].tolist() == other.token_ids.tolist()


@pytest.mark.parametrize("kept", [1, 4, 9])
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_prefix_is_continued_as_the_rollout_it_came_from(
    tiny_model_dir: Path, kept: int, shared_prefix: bool
) -> None:
    made = engine(tiny_model_dir, shared_prefix=shared_prefix)
    wanted = [item for item in requests(6) if item.prompt.id == "a"]
    whole = made.generate(wanted)
    usable = [i for i, rollout in enumerate(whole) if len(rollout.token_ids) > kept]
    assert usable
    for i in usable:
        prefix = whole[i].token_ids[:kept]
        spec = replace(SPEC, max_new_tokens=SPEC.max_new_tokens - kept)
        rest = made.generate([replace(wanted[i], prefix=prefix, spec=spec)])[0]
        assert rest.token_ids.tolist() == whole[i].token_ids[kept:].tolist()
        np.testing.assert_allclose(rest.logprobs, whole[i].logprobs[kept:], atol=1e-5)
        assert rest.text == whole[i].text
        assert rest.finish is whole[i].finish


def test_requests_with_different_prefixes_or_limits_do_not_share_a_batch(shared: HFEngine) -> None:
    of = prompt("a", 5)
    wanted = [
        request(of, 0, SPEC),
        request(of, 1, SPEC, prefix=np.array([5, 6], np.int32)),
        request(of, 2, SPEC, prefix=np.array([7, 8], np.int32)),
        request(of, 3, replace(SPEC, max_new_tokens=2), prefix=np.array([7, 8], np.int32)),
        request(of, 4, replace(SPEC, temperature=0.0, max_new_tokens=2), prefix=np.array([7, 8], np.int32)),
    ]
    together = shared.generate(wanted)
    for item, rollout in zip(wanted, together, strict=True):
        alone = shared.generate([item])[0]
        assert rollout.token_ids.tolist() == alone.token_ids.tolist()
        assert rollout.text == alone.text
        np.testing.assert_allclose(rollout.logprobs, alone.logprobs, atol=1e-5)


def test_finish_and_text_follow_the_end_of_sequence_token(shared: HFEngine) -> None:
    rollouts = shared.generate(requests(24, replace(SPEC, max_new_tokens=24, temperature=1.0)))
    assert {r.finish for r in rollouts} == {Finish.STOP, Finish.LENGTH}
    for rollout in rollouts:
        ids = rollout.token_ids.tolist()
        assert (rollout.finish is Finish.STOP) == (ids[-1] == EOS)
        assert EOS not in ids[:-1]
        assert rollout.finish is Finish.STOP or len(ids) == 24
        assert len(ids) == len(rollout.logprobs) == len(rollout.entropy)  # type: ignore[arg-type]
        assert rollout.text == shared.tokenizer.decode(ids, skip_special_tokens=True)
        assert "</s>" not in rollout.text


def test_stopping_exactly_at_the_limit_is_a_stop(shared: HFEngine) -> None:
    wanted = requests(24, replace(SPEC, max_new_tokens=24, temperature=1.0))
    stopped = [(q, r) for q, r in zip(wanted, shared.generate(wanted), strict=True) if r.finish is Finish.STOP]
    item, rollout = stopped[0]
    limit = len(rollout.token_ids)
    again = shared.generate([replace(item, spec=replace(item.spec, max_new_tokens=limit))])[0]
    assert again.finish is Finish.STOP and len(again.token_ids) == limit


def test_every_end_token_of_the_generation_config_ends_a_rollout(tmp_path: Path, shared: HFEngine) -> None:
    extra = 7
    made = engine(save_tiny_model(tmp_path, eos=[EOS, extra]))
    wanted = requests(24, replace(SPEC, max_new_tokens=24, temperature=1.0))
    ends = set()
    for rollout, single in zip(made.generate(wanted), shared.generate(wanted), strict=True):
        ids = rollout.token_ids.tolist()
        assert ids == single.token_ids.tolist()[: len(ids)]
        assert not {EOS, extra} & set(ids[:-1])
        assert (rollout.finish is Finish.STOP) == (ids[-1] in (EOS, extra))
        ends.add(ids[-1])
    assert {EOS, extra} <= ends


def test_a_group_may_end_at_its_first_token(tmp_path: Path) -> None:
    # Embeddings and head are tied to one direction: the end token always wins
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight[EOS] = 10
    rollouts = engine(save_tiny_model(tmp_path, model)).generate(requests(3))
    assert [r.token_ids.tolist() for r in rollouts] == [[EOS]] * 6
    assert all(r.finish is Finish.STOP and r.text == "" for r in rollouts)


def test_prompt_and_completion_may_fill_the_positions_exactly(shared: HFEngine) -> None:
    spec = replace(SPEC, max_new_tokens=3, temperature=1.0)
    rollouts = shared.generate([request(prompt("long", POSITIONS - 3), i, spec) for i in range(8)])
    assert max(len(r.token_ids) for r in rollouts) == 3


def test_what_does_not_fit_is_an_error_that_names_the_sizes(shared: HFEngine) -> None:
    spec = replace(SPEC, max_new_tokens=3)
    with pytest.raises(EngineError, match=rf"{POSITIONS - 2} context tokens and 3 new .* {POSITIONS} positions"):
        shared.generate([request(prompt("long", POSITIONS - 2), 0, spec)])
    short = request(prompt("long", POSITIONS - 4), 0, spec, prefix=np.array([5, 6], np.int32))
    with pytest.raises(EngineError, match="do not fit"):
        shared.generate([short])


def test_a_prompt_of_one_token_is_enough(shared: HFEngine, tiny_model_dir: Path) -> None:
    item = request(prompt("one", 1), 0, SPEC)
    rollout = shared.generate([item])[0]
    np.testing.assert_allclose(rollout.logprobs, recomputed(tiny_model_dir, item, rollout)[0], atol=1e-5)


def test_the_user_can_stop_between_batches(tiny_model_dir: Path) -> None:
    calls = []

    def stop() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise StopRequested("enough")

    with pytest.raises(StopRequested):
        engine(tiny_model_dir, check_stop=stop).generate(requests(1))
    assert len(calls) == 2


def test_models_without_a_fast_path_are_sampled_correctly(tmp_path: Path) -> None:
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=VOCABULARY, sliding_window=6, initializer_range=0.3, max_position_embeddings=POSITIONS,
        eos_token_id=EOS, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(3)
    folder = save_tiny_model(tmp_path, Gemma2ForCausalLM(config))
    wanted = requests(3)
    rollouts = engine(folder).generate(wanted)
    for item, rollout in zip(wanted, rollouts, strict=True):
        logprobs, entropy, _ = recomputed(folder, item, rollout)
        np.testing.assert_allclose(rollout.logprobs, logprobs, atol=2e-5)
        np.testing.assert_allclose(rollout.entropy, entropy, atol=2e-5)


def test_rows_at_once_must_be_positive(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="rows_at_once"):
        engine(tiny_model_dir, rows_at_once=0)


def source(version: int, tensors: dict[str, torch.Tensor]) -> NamedTensors:
    return NamedTensors(version, {n: tuple(t.shape) for n, t in tensors.items()}, lambda: iter(tensors.items()))


def parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in tiny_llama(seed).named_parameters()}


def test_new_weights_are_used_and_stamped(tiny_model_dir: Path, tmp_path: Path) -> None:
    made, other = engine(tiny_model_dir), engine(save_tiny_model(tmp_path, tiny_llama(9)))
    before = by_key(made.generate(requests(3)))
    fingerprint = load_weights(made, source(4, parameters(9)))
    assert made.ping().weights == WeightStamp(version=4, fingerprint=fingerprint)
    rollouts = made.generate(requests(3))
    assert by_key(rollouts) == by_key(other.generate(requests(3))) != before
    assert {r.weights for r in rollouts} == {made.ping().weights}
    assert fingerprint == other.ping().weights.fingerprint  # the same bytes, however they came in


def test_the_fingerprint_changes_exactly_when_a_byte_does(tiny_model_dir: Path) -> None:
    made = engine(tiny_model_dir)
    start = made.ping().weights.fingerprint
    tensors = parameters()
    assert load_weights(made, source(1, tensors)) == start
    name = "model.layers.1.mlp.up_proj.weight"
    single = tensors[name].clone()
    single[3, 5] = torch.nextafter(single[3, 5], torch.tensor(torch.inf))  # the last bit of one number
    changed = load_weights(made, source(2, {name: single}))
    assert changed != start
    assert load_weights(made, source(3, {name: tensors[name]})) == start


def test_a_fingerprint_covers_name_shape_dtype_and_sign() -> None:
    def of(name: str, tensor: torch.Tensor) -> str:
        fingerprint = Fingerprint()
        fingerprint.update(name, tensor)
        return fingerprint.value()

    zeros = torch.zeros(2, 3)
    values = [
        of("a", zeros), of("b", zeros), of("a", zeros.T), of("a", zeros.reshape(6)), of("a", zeros.int()), of("a", -zeros),
    ]  # fmt: skip
    assert len(set(values)) == 6
    assert of("a", zeros.clone()) == values[0]
    assert of("a", torch.zeros(3, 2).T) == values[0]  # memory layout is not content


def test_a_fingerprint_does_not_depend_on_the_order_of_arrival() -> None:
    one, two = Fingerprint(), Fingerprint()
    tensors = {"x": torch.ones(3), "y": torch.arange(4.0)}
    for name in ("x", "y"):
        one.update(name, tensors[name])
    for name in ("y", "x", "y"):
        two.update(name, tensors[name])
    assert one.value() == two.value()


def test_unknown_names_and_other_shapes_are_refused(tiny_model_dir: Path) -> None:
    made = engine(tiny_model_dir)
    with pytest.raises(EngineError, match=r"'model\.nothing' arrived"):
        load_weights(made, source(1, {"model.nothing": torch.zeros(1)}))
    with pytest.raises(EngineError, match=r"shape \(3,\), the engine expects \(32,\)"):
        load_weights(made, source(1, {"model.norm.weight": torch.zeros(3)}))
    assert made.ping().weights.version == 0


class Stub:
    """An engine that gives back what it is told to, under any stamp."""

    def __init__(self, stamp: WeightStamp) -> None:
        self.stamp = self.reported = stamp
        self.fingerprint: str | None = None
        self.change: Callable[[list[Rollout]], list[Rollout]] = lambda rollouts: rollouts

    def generate(self, wanted: Sequence[Request]) -> list[Rollout]:
        return self.change(
            [
                Rollout(
                    prompt_id=item.prompt.id, index=item.index, token_ids=np.zeros(1, np.int32),
                    logprobs=np.zeros(1, np.float32), entropy=None, text="", finish=Finish.STOP, weights=self.stamp,
                )
                for item in wanted
            ]
        )  # fmt: skip

    tokenizer = None

    def begin_load(self, version: int, manifest: object, adapter: object = None) -> None:
        pass

    def load(self, tensors: Iterator[tuple[str, torch.Tensor]], *, lasting: bool = False) -> None:
        pass

    def end_load(self) -> str:
        return self.fingerprint or self.stamp.fingerprint

    def ping(self) -> object:
        return type("Health", (), {"weights": self.reported})()


def pool_of(stub: Stub) -> LocalPool:
    return LocalPool(stub)  # type: ignore[arg-type]


@pytest.mark.parametrize("stamp", [WeightStamp(version=1, fingerprint="a"), WeightStamp(version=0, fingerprint="b")])
def test_the_pool_refuses_rollouts_of_other_weights(stamp: WeightStamp) -> None:
    stub = Stub(WeightStamp(version=0, fingerprint="a"))
    pool = pool_of(stub)
    assert len(pool.generate(requests(2))) == 4
    stub.stamp = stamp
    with pytest.raises(EngineError, match="stale weights: rollout 0 of a"):
        pool.generate(requests(2))


def test_the_pool_refuses_missing_and_foreign_rollouts() -> None:
    stub = Stub(WeightStamp(version=0, fingerprint="a"))
    pool = pool_of(stub)
    stub.change = lambda rollouts: rollouts[:-1]
    with pytest.raises(EngineError, match="3 rollouts for 4 requests"):
        pool.generate(requests(2))
    stub.change = lambda rollouts: rollouts[::-1]
    with pytest.raises(EngineError, match="asked for rollout 0 of a, got 1 of b"):
        pool.generate(requests(2))


def test_a_sync_is_proven(tiny_model_dir: Path) -> None:
    made = engine(tiny_model_dir)
    pool = LocalPool(made)
    pool.sync(source(1, parameters(9)), must_move=True)
    assert pool.generate(requests(1))[0].weights.version == 1
    with pytest.raises(EngineError, match="version 2 of the weights is identical"):
        pool.sync(source(2, parameters(9)), must_move=True)
    pool.sync(source(3, parameters(9)), must_move=False)
    assert pool.generate(requests(1))[0].weights.version == 3


@pytest.mark.parametrize("reported", [WeightStamp(version=0, fingerprint="b"), WeightStamp(version=1, fingerprint="a")])
def test_a_sync_that_did_not_arrive_is_an_error(reported: WeightStamp) -> None:
    stub = Stub(WeightStamp(version=0, fingerprint="a"))
    pool = pool_of(stub)
    stub.fingerprint, stub.reported = "b", reported
    with pytest.raises(EngineError, match="after a sync to version 1 the engine reports"):
        pool.sync(source(1, {}), must_move=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_an_error_not_a_rollout(tiny_model_dir: Path, temperature: float) -> None:
    broken = engine(tiny_model_dir)
    name, weight = next(iter(broken._parameters().items()))
    load_weights(broken, source(1, {name: torch.full_like(weight, float("nan"))}))
    with pytest.raises(EngineError, match="not finite"):
        broken.generate(requests(spec=SamplingSpec(max_new_tokens=4, temperature=temperature)))
