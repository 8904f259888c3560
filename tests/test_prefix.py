"""The shared prefix against its slow twin and against a plain forward pass: values, gradients, rows that leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_torch import SPREAD, WIDE, gradients, largest_difference, seeded, tiny_llama
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ttrl.model.prefix import IMPLEMENTATION, ExpandedPrefix, SharedPrefix, enable_shared_prefix

VOCAB = 41
COMMON: dict[str, Any] = {
    **WIDE,
    **SPREAD,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "num_key_value_heads": 2,
}


def llama() -> PreTrainedModel:
    return tiny_llama(1, vocab_size=VOCAB, max_position_embeddings=256)


def qwen2(**fields: Any) -> PreTrainedModel:
    return seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, **fields)), 2)


def qwen3() -> PreTrainedModel:
    return seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True)), 3)


def mistral(window: int | None = None) -> PreTrainedModel:
    return seeded(lambda: MistralForCausalLM(MistralConfig(**COMMON, head_dim=8, sliding_window=window)), 4)


def gpt2(**fields: Any) -> PreTrainedModel:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, vocab_size=VOCAB, **SPREAD, **fields)
    return seeded(lambda: GPT2LMHeadModel(config), 5)


def gemma2() -> PreTrainedModel:
    return seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=8, sliding_window=8)), 6)


def llama4_chunked() -> PreTrainedModel:
    config = Llama4TextConfig(
        **COMMON, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=16, moe_layers=[], num_local_experts=1,
        num_experts_per_tok=1, pad_token_id=0, layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    return seeded(lambda: Llama4ForCausalLM(config), 7)


FITTING: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gpt2": gpt2,
    "gpt2-inverse-layer": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
}
UNFITTING: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2": gemma2,
    "mistral-window": lambda: mistral(8),
    "qwen2-window": lambda: qwen2(
        use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"]
    ),
    "llama4-chunks": llama4_chunked,
}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def plain_logits(model: PreTrainedModel, prompt: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits after each token of `rows`, from one forward pass over prompt + rows. [R, T, V]"""
    whole = torch.cat([prompt.expand(rows.shape[0], -1), rows], dim=1)
    return model(input_ids=whole, use_cache=False).logits[:, len(prompt) :]


@torch.no_grad()
def decoded_logits(prefix: SharedPrefix | ExpandedPrefix, prompt: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    prefix.prefill(prompt)
    return torch.stack([prefix.step(rows[:, t]) for t in range(rows.shape[1])], dim=1)


@pytest.mark.parametrize("name", FITTING)
def test_usual_architectures_take_the_fast_path(name: str) -> None:
    model = FITTING[name]()
    assert enable_shared_prefix(model)
    assert model.config._attn_implementation == IMPLEMENTATION


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize(("prompt", "suffix"), [(9, 7), (1, 5), (6, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_equal_the_slow_twin_and_a_plain_forward(
    name: str, prompt: int, suffix: int, dtype: torch.dtype
) -> None:
    plain, fast = FITTING[name]().to(dtype), FITTING[name]().to(dtype)
    assert enable_shared_prefix(fast)
    context, rows = tokens(prompt), tokens(3, suffix, seed=1)
    # The softmax of one decoding step is in float32, whatever the model
    bound = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        expected = plain_logits(plain, context, rows)
        shared = SharedPrefix(fast)
        first = shared.prefill(context).logits[:, -1]
        trained = shared.suffix(rows).logits
    assert expected.abs().max() > 0.5  # the logits say something, so the bound does too
    torch.testing.assert_close(first, plain(input_ids=context[None]).logits[:, -1], **bound)
    torch.testing.assert_close(trained, expected, **bound)
    torch.testing.assert_close(decoded_logits(SharedPrefix(fast), context, rows), expected, **bound)
    torch.testing.assert_close(decoded_logits(ExpandedPrefix(plain), context, rows), expected, **bound)
    with torch.no_grad():  # the switched model as a plain one, for example when a row is scored alone
        torch.testing.assert_close(plain_logits(fast, context, rows), expected, **bound)


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize(("prompt", "suffix"), [(9, 7), (1, 1)])
def test_gradients_flow_through_the_prefix_as_through_a_plain_forward(name: str, prompt: int, suffix: int) -> None:
    plain, fast = FITTING[name]().double(), FITTING[name]().double()
    assert enable_shared_prefix(fast)
    context, rows = tokens(prompt, seed=2), tokens(4, suffix, seed=3)
    weight = torch.randn(4, suffix, VOCAB, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (plain_logits(plain, context, rows) * weight).sum().backward()
    shared = SharedPrefix(fast)
    shared.prefill(context)
    (shared.suffix(rows).logits * weight).sum().backward()
    expected = gradients(plain)
    assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 1
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    # RMS norms compute in float32 whatever the model; GPT-2 has none
    assert largest_difference(gradients(fast), expected) < (1e-12 if name.startswith("gpt2") else 1e-6) * scale


def test_right_padding_does_not_reach_the_real_tokens() -> None:
    model = llama()
    assert enable_shared_prefix(model)
    context, rows = tokens(5), tokens(2, 6, seed=1)
    other = rows.clone()
    other[0, 3:] = 7
    with torch.no_grad():
        first, second = SharedPrefix(model), SharedPrefix(model)
        first.prefill(context), second.prefill(context)
        one, two = first.suffix(rows).logits, second.suffix(other).logits
    assert torch.equal(one[0, :3], two[0, :3]) and torch.equal(one[1], two[1])
    assert not torch.allclose(one[0, 3:], two[0, 3:])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("twin", [SharedPrefix, ExpandedPrefix])
def test_rows_that_leave_do_not_disturb_the_others(name: str, twin: type[SharedPrefix] | type[ExpandedPrefix]) -> None:
    model = FITTING[name]()
    if twin is SharedPrefix:
        assert enable_shared_prefix(model)
    context, rows = tokens(7), tokens(5, 9, seed=1)
    with torch.no_grad():
        expected = plain_logits(FITTING[name](), context, rows)
        prefix = twin(model)
        prefix.prefill(context)
        active = torch.arange(5)
        leaving = {
            2: [0, 2, 3, 4],
            4: [1, 2, 3],
            7: [2],
        }  # positions, among the rows still there, that go on after step t
        for t in range(9):
            torch.testing.assert_close(prefix.step(rows[active, t]), expected[active, t], rtol=1e-4, atol=1e-4)
            if t in leaving:
                stay = torch.tensor(leaving[t])
                prefix.keep(stay)
                active = active[stay]
    assert active.tolist() == [4]


def test_the_suffix_grows_past_its_first_buffers() -> None:
    model = llama()
    assert enable_shared_prefix(model)
    context, rows = tokens(3), tokens(2, 150, seed=1)  # buffers hold 64, then 128, then 192 tokens
    with torch.no_grad():
        expected = plain_logits(llama(), context, rows)
    torch.testing.assert_close(decoded_logits(SharedPrefix(model), context, rows), expected, rtol=1e-3, atol=1e-3)


def test_rows_may_leave_exactly_when_a_buffer_is_full() -> None:
    model = llama()
    assert enable_shared_prefix(model)
    context, rows = tokens(3), tokens(3, 70, seed=1)
    with torch.no_grad():
        expected = plain_logits(llama(), context, rows)
        prefix = SharedPrefix(model)
        prefix.prefill(context)
        active = torch.arange(3)
        for t in range(70):
            torch.testing.assert_close(prefix.step(rows[active, t]), expected[active, t], rtol=1e-3, atol=1e-3)
            if t == 63:
                active = active[1:]
                prefix.keep(torch.tensor([1, 2]))


def test_training_does_not_change_the_prompt_of_a_cache() -> None:
    model = llama()
    assert enable_shared_prefix(model)
    context, rows = tokens(5), tokens(2, 4, seed=1)
    with torch.no_grad():
        prefix = SharedPrefix(model)
        prefix.prefill(context)
        once, again = prefix.suffix(rows).logits, prefix.suffix(rows).logits
    assert torch.equal(once, again)


@pytest.mark.parametrize("name", UNFITTING)
def test_models_with_windows_or_soft_caps_fall_back_and_stay_as_they_were(name: str) -> None:
    model = UNFITTING[name]()
    before = model.config._attn_implementation
    context, rows = tokens(12), tokens(3, 10, seed=1)  # longer than the windows
    with torch.no_grad():
        expected = plain_logits(model, context, rows)
        assert not enable_shared_prefix(model)
        assert model.config._attn_implementation == before
        assert torch.equal(plain_logits(model, context, rows), expected)


@pytest.mark.parametrize("name", ["gemma2", "mistral-window", "qwen2-window"])
def test_models_that_fall_back_decode_correctly(name: str) -> None:
    model = UNFITTING[name]()
    context, rows = tokens(12), tokens(3, 10, seed=1)
    with torch.no_grad():
        expected = plain_logits(model, context, rows)
    torch.testing.assert_close(decoded_logits(ExpandedPrefix(model), context, rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [0.01, 0.3])
def test_a_model_with_a_wrong_fast_path_is_refused(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # The logits of a freshly initialised model are small, and the difference has to be seen all the same
    model = tiny_llama(1, vocab_size=VOCAB, initializer_range=spread)
    monkeypatch.setattr(
        "ttrl.model.prefix._decode_attention",
        lambda query, key, value, scaling: torch.zeros(query.shape[0], 1, query.shape[1], query.shape[3]),
    )
    assert not enable_shared_prefix(model)
    assert model.config._attn_implementation == "sdpa"
