"""Log-probs and entropies of completion tokens: shared prompt against whole rows, chunks against one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_torch import SPREAD, VOCABULARY, WIDE, batch_of, gradients, largest_difference, samples, seeded, tiny_llama
from helpers_torch import token_scores as plain_scores
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ttrl.trainers import forward
from ttrl.trainers.forward import CompletionScorer, split_head
from ttrl.trainers.packing import pack

COMMON: dict[str, Any] = {**WIDE, **SPREAD, "vocab_size": VOCABULARY, "num_key_value_heads": 2}
TEMPERATURE = 0.7


def gpt2() -> PreTrainedModel:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, **SPREAD)
    return seeded(lambda: GPT2LMHeadModel(config), 1)


def qwen3() -> PreTrainedModel:
    return seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True)), 2)


def gemma2(**fields: Any) -> PreTrainedModel:
    config = Gemma2Config(**{**COMMON, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0, **fields})
    return seeded(lambda: Gemma2ForCausalLM(config), 3)


def granite() -> PreTrainedModel:
    return seeded(lambda: GraniteForCausalLM(GraniteConfig(**COMMON, logits_scaling=4.0, attention_multiplier=0.2)), 4)


def cohere() -> PreTrainedModel:
    return seeded(lambda: CohereForCausalLM(CohereConfig(**COMMON, logit_scale=0.25, pad_token_id=0)), 5)


PLAIN_HEAD: dict[str, Callable[[], PreTrainedModel]] = {"llama": tiny_llama, "gpt2": gpt2, "qwen3": qwen3}
OTHER_HEAD: dict[str, Callable[[], PreTrainedModel]] = {"gemma2": gemma2, "granite": granite, "cohere": cohere}
ALL = {**PLAIN_HEAD, **OTHER_HEAD}


def three_groups() -> Any:
    """Ragged rows, a row of one token, a group of one row, and a prompt of one token."""
    return batch_of([([5, 6, 7, 8, 9], [[3, 4, 5, 6], [7], [8, 9]]), ([10], [[1, 2, 3], [4, 5, 6]]), ([11, 12], [[9]])])


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_scores_and_gradients_equal_rows_scored_alone(name: str, shared: bool) -> None:
    batch = three_groups()
    plain, model = ALL[name]().double(), ALL[name]().double()
    logprobs, entropy = plain_scores(plain, batch, TEMPERATURE)
    scores = CompletionScorer(model, TEMPERATURE, shared_prefix=shared, entropy_grad=True)(batch)
    close(scores.logprobs.detach(), logprobs.detach())
    close(scores.entropy.detach(), entropy.detach())

    weight = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)
    ((logprobs + 0.3 * entropy) * weight).sum().backward()
    ((scores.logprobs + 0.3 * scores.entropy) * weight).sum().backward()
    expected = gradients(plain)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0.1
    # The model is in double precision, log-probs are float32 by design
    assert largest_difference(gradients(model), expected) < 2e-6 * scale


@pytest.mark.parametrize("name", PLAIN_HEAD)
def test_usual_models_split_into_body_and_head(name: str) -> None:
    model = ALL[name]()
    body, head = split_head(model)
    assert body is not model
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(head(body(input_ids=ids)[0]), model(input_ids=ids).logits)


@pytest.mark.parametrize("name", OTHER_HEAD)
def test_models_that_scale_or_cap_their_logits_are_not_split(name: str) -> None:
    model = ALL[name]()
    body, head = split_head(model)
    assert body is model
    states = torch.ones(1, 2)
    assert head(states) is states


def test_a_soft_cap_is_noticed_while_logits_are_still_small() -> None:
    # A cap of 30 changes logits of 0.1 by 4e-6 relative: invisible now, wrong after some training
    model = gemma2(final_logit_softcapping=30.0, initializer_range=0.02)
    with torch.no_grad():
        assert model(input_ids=torch.arange(2)[None]).logits.abs().max() < 1
    assert split_head(model)[0] is model


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("at_once", [1, 4, 7])
def test_a_head_in_chunks_equals_the_head_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, shared: bool, at_once: int
) -> None:
    batch = pack(samples(), 10_000)[0]
    weight = torch.linspace(-1, 2, len(batch.completion_ids))

    def run() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        model = tiny_llama()
        scores = CompletionScorer(model, TEMPERATURE, shared_prefix=shared, entropy_grad=True)(batch)
        (scores.logprobs * weight + scores.entropy * weight.flip(0)).sum().backward()
        return scores.logprobs.detach(), scores.entropy.detach(), gradients(model)

    whole = run()
    heads = []
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", at_once * VOCABULARY + 1)
    monkeypatch.setattr(
        forward, "checkpoint", lambda *a, **k: heads.append(len(a[2])) or torch.utils.checkpoint.checkpoint(*a, **k)
    )
    chunked = run()
    assert sum(heads) == len(weight) and max(heads) == at_once  # it did run in chunks of the wanted size
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(chunked[1], whole[1], rtol=1e-6, atol=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in whole[2].values())
    assert largest_difference(chunked[2], whole[2]) < 1e-5 * scale


def test_a_vocabulary_larger_than_the_chunk_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = three_groups()
    with torch.no_grad():
        expected = CompletionScorer(tiny_llama(), TEMPERATURE)(batch).logprobs
        monkeypatch.setattr(forward, "LOGITS_AT_ONCE", VOCABULARY // 2)
        torch.testing.assert_close(CompletionScorer(tiny_llama(), TEMPERATURE)(batch).logprobs, expected)


def test_the_temperature_is_that_of_the_sampler() -> None:
    batch, model = three_groups(), tiny_llama()
    for temperature in (0.5, 1.0, 2.0):
        with torch.no_grad():
            ours = CompletionScorer(model, temperature, entropy_grad=True)(batch)
            logprobs, entropy = plain_scores(model, batch, temperature)
        close(ours.logprobs, logprobs)
        close(ours.entropy, entropy)


def test_one_long_row_does_not_change_the_scores_of_short_ones() -> None:
    model = tiny_llama()
    scorer = CompletionScorer(model, 1.0, entropy_grad=True)
    with torch.no_grad():
        alone = scorer(batch_of([([5, 6, 7], [[3, 4]])])).logprobs
        beside = scorer(batch_of([([5, 6, 7], [list(range(3, 30)), [3, 4]])])).logprobs
    torch.testing.assert_close(beside[-2:], alone, rtol=1e-5, atol=1e-5)
