"""The single-process trainer: one step against a reference in double precision, and everything around the step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_torch import (
    VOCABULARY,
    gradients,
    largest_difference,
    one_update,
    samples,
    save_tiny_model,
    section,
    seeded,
    tiny_llama,
    tiny_tokenizer,
    token_scores,
    trainer,
    weights_of,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from ttrl.errors import ConfigError, EngineError, StopRequested
from ttrl.model.weights import load_weights
from ttrl.rollout.hf import HFEngine
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.losses.kl import KLAnchor
from ttrl.trainers.packing import pack, split_updates
from ttrl.trainers.parameters import Full, LoRA
from ttrl.trainers.torch_backend import TorchTrainer
from ttrl.types import PackedBatch, Sample

TEMPERATURE = 0.8


def policy_samples(folder: Path, seed: int = 0, noise: float = 0.3, groups: Any = None) -> list[Sample]:
    """Samples whose sampler log-probs are near the start model's, so that some ratios are clipped and most are not."""
    items = samples(seed=seed) if groups is None else samples(groups, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rng = np.random.default_rng(seed)
    moved = []
    for item in items:
        with torch.no_grad():
            logprobs = token_scores(model, pack([item], 1)[0], TEMPERATURE)[0].numpy()
        near = logprobs + rng.normal(0, noise, size=len(logprobs))
        moved.append(replace(item, sampler_logprobs=near.astype(np.float32)))
    return moved


def made(folder: Path, **fields: Any) -> TorchTrainer:
    return trainer(folder, temperature=TEMPERATURE, **fields)


def gradients_of_step(of: TorchTrainer, updates: list[list[PackedBatch]]) -> tuple[dict[str, torch.Tensor], Any]:
    """Gradients at the moment of the (last) optimizer step, before the weights move."""
    caught: dict[str, torch.Tensor] = {}
    original = of._optimizer.step

    def record() -> None:
        caught.update(gradients(of._model))
        original()

    of._optimizer.step = record  # type: ignore[method-assign, assignment]
    return caught, of.step(0, updates)


# --- the whole step, by hand, in double precision -------------------------------------------------------------------------


class ReferenceStep:
    """GRPO loss + k3 + gradient clipping + AdamW, written out for a float64 model with rows scored one at a time."""

    def __init__(
        self, folder: Path, *, lr: float, betas: tuple[float, float], decay: float, clip: float, kl: float
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
        self.start = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
        self.lr, self.betas, self.decay, self.clip, self.kl = lr, betas, decay, clip, kl
        self.first = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self.second = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self.count = 0

    def step(self, items: Sequence[Sample]) -> tuple[float, float]:
        total = sum(float(item.weights.sum()) for item in items)
        loss = torch.zeros((), dtype=torch.float64)
        for item in items:
            batch = pack([item], 1)[0]
            logprobs, _ = token_scores(self.model, batch, TEMPERATURE)
            with torch.no_grad():
                start, _ = token_scores(self.start, batch, TEMPERATURE)
            advantage, weight = torch.as_tensor(item.advantages).double(), torch.as_tensor(item.weights).double()
            ratio = torch.exp(logprobs - torch.as_tensor(item.sampler_logprobs).double())
            policy = -torch.minimum(ratio * advantage, torch.clip(ratio, 0.8, 1.2) * advantage)
            d = start - logprobs
            loss = loss + (weight * (policy + self.kl * (torch.exp(d) - d - 1))).sum() / total
        self.model.zero_grad()
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        norm = float(torch.sqrt(sum((g**2).sum() for g in grads.values())))
        shrink = min(1.0, self.clip / (norm + 1e-6))
        self.count += 1
        b1, b2 = self.betas
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                g = grads[name] * shrink
                self.first[name] = b1 * self.first[name] + (1 - b1) * g
                self.second[name] = b2 * self.second[name] + (1 - b2) * g**2
                m = self.first[name] / (1 - b1**self.count)
                v = self.second[name] / (1 - b2**self.count)
                p.mul_(1 - self.lr * self.decay)
                p.sub_(self.lr * m / (v.sqrt() + 1e-8))
        return float(loss.detach()), norm


@pytest.mark.parametrize("budget", [10_000, 20])
@pytest.mark.parametrize("clip", [100.0, 0.05])
def test_three_steps_equal_the_reference_in_double_precision(tiny_model_dir: Path, budget: int, clip: float) -> None:
    lr, betas, decay, kl = 2e-3, (0.8, 0.95), 0.1, 0.2
    ours = made(
        tiny_model_dir, stabilizers=(KLAnchor(coefficient=kl),),
        settings={"lr": lr, "betas": betas, "weight_decay": decay, "grad_clip": clip},
    )  # fmt: skip
    reference = ReferenceStep(tiny_model_dir, lr=lr, betas=betas, decay=decay, clip=clip, kl=kl)
    start = weights_of(ours)
    for step in range(3):
        items = policy_samples(tiny_model_dir, seed=step)
        stats = ours.step(step, one_update(items, budget))
        loss, norm = reference.step(items)
        assert stats.metrics["train/loss"] == pytest.approx(loss, abs=1e-5)
        assert stats.grad_norm == pytest.approx(norm, rel=1e-4)
        # Adam turns every gradient into a step of about lr, so a hundredth of it is a tight bound for every single weight
        expected = dict(reference.model.named_parameters())
        assert largest_difference(weights_of(ours), expected) < 0.01 * lr
    assert largest_difference(weights_of(ours), start) > 2 * lr


def test_the_learning_rate_follows_the_schedule_over_updates(tiny_model_dir: Path) -> None:
    items = policy_samples(tiny_model_dir)
    ours = made(tiny_model_dir, steps=2, settings={"lr": 0.01, "schedule": "linear", "updates_per_step": 2})
    updates = [pack(part, 1000) for part in split_updates(items, 2)]
    # Updates 0..3 of 4: factors 1, 3/4, 1/2, 1/4; a step reports the last one
    assert ours.step(0, updates).lr == pytest.approx(0.0075)
    assert ours.step(1, updates).lr == pytest.approx(0.0025)


# --- micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"parameters": LoRA(rank=2)}, {"stabilizers": (KLAnchor(coefficient=0.5),)}])
def test_loss_gradients_and_metrics_do_not_depend_on_the_micro_batch_size(
    tiny_model_dir: Path, fields: dict[str, Any]
) -> None:
    items = policy_samples(tiny_model_dir, groups=((5, 3, 1, 4), (2, 6, 6), (8,)))
    assert len(pack(items, 10_000)) == 1 < len(pack(items, 30)) < len(pack(items, 1)) == len(items)
    if "parameters" in fields:
        fields = {"parameters": LoRA(rank=2)}
    whole, stats = gradients_of_step(made(tiny_model_dir, **fields), one_update(items))
    scale = max(float(gradient.abs().max()) for gradient in whole.values())
    for budget in (30, 1):
        if "parameters" in fields:
            fields = {"parameters": LoRA(rank=2)}
        parts, other = gradients_of_step(made(tiny_model_dir, **fields), one_update(items, budget))
        assert largest_difference(parts, whole) < 1e-5 * scale
        assert other.metrics == pytest.approx(stats.metrics, rel=1e-4, abs=1e-6)
        assert other.grad_norm == pytest.approx(stats.grad_norm, rel=1e-5)


def test_tokens_count_prompts_as_often_as_they_are_computed(tiny_model_dir: Path) -> None:
    items = samples(((5, 3), (2,)))  # prompts of 4 and 7 tokens
    assert made(tiny_model_dir).step(0, one_update(items)).tokens == 4 + 8 + 7 + 2
    assert made(tiny_model_dir).step(0, one_update(items, 1)).tokens == 2 * 4 + 8 + 7 + 2


def test_metrics_say_how_far_trainer_and_sampler_are_apart(tiny_model_dir: Path) -> None:
    exact = made(tiny_model_dir).step(0, one_update(policy_samples(tiny_model_dir, noise=0.0)))
    assert exact.metrics["train/sampler_mismatch_max"] < 1e-5
    assert exact.metrics["train/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert exact.metrics["train/clip_fraction"] == 0.0
    items = policy_samples(tiny_model_dir, noise=0.0)
    items[2] = replace(items[2], sampler_logprobs=items[2].sampler_logprobs + np.float32(0.5))
    off = made(tiny_model_dir).step(0, one_update(items))
    assert off.metrics["train/sampler_mismatch_max"] == pytest.approx(0.5, abs=1e-5)
    share = len(items[2].completion_ids) / sum(len(item.completion_ids) for item in items)
    assert off.metrics["train/sampler_mismatch"] == pytest.approx(0.5 * share, abs=1e-5)


# --- what moves, and what must not ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])
def test_an_update_moves_weights_and_raises_what_was_rewarded(tiny_model_dir: Path, parameters: Any) -> None:
    items = policy_samples(tiny_model_dir, noise=0.0)
    items = [
        replace(item, advantages=np.full_like(item.advantages, 1.0 if i == 0 else 0.0)) for i, item in enumerate(items)
    ]
    ours = made(tiny_model_dir, parameters=parameters(), settings={"lr": 1e-4})
    start = weights_of(ours)
    batch = pack([items[0]], 1)[0]
    with torch.no_grad():
        before = ours._loss.scorer(batch).logprobs.sum()
    for step in range(2):
        assert ours.step(step, one_update(items)).grad_norm > 0
    with torch.no_grad():
        after = ours._loss.scorer(batch).logprobs.sum()
    assert ours.version == 2
    assert after > before + 1e-3
    assert largest_difference(weights_of(ours), start) > 1e-5


@pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])
def test_advantages_of_zero_give_exactly_no_gradient_and_no_movement(tiny_model_dir: Path, parameters: Any) -> None:
    items = [replace(s, advantages=np.zeros_like(s.advantages)) for s in policy_samples(tiny_model_dir)]
    ours = made(tiny_model_dir, parameters=parameters())
    start = weights_of(ours)
    grads, stats = gradients_of_step(ours, one_update(items, 25))
    assert stats.grad_norm == 0.0
    assert all((gradient == 0).all() for gradient in grads.values())
    assert largest_difference(weights_of(ours), start) == 0.0


# An infinite sampler log-prob is missing here: the log-ratio is bounded, and train/log_ratio_max shows it
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("advantages", np.nan),
        ("advantages", np.inf),
        ("sampler_logprobs", np.nan),
        ("weights", np.nan),
        ("weights", np.inf),
    ],
)
def test_numbers_that_are_not_finite_stop_the_step_before_the_weights_move(
    tiny_model_dir: Path, field: str, value: float
) -> None:
    items = policy_samples(tiny_model_dir)
    spoiled = getattr(items[3], field).copy()
    spoiled[-1] = value
    ours = made(tiny_model_dir)
    start = weights_of(ours)
    with pytest.raises(FloatingPointError, match="step 0, update 0: not finite"):
        ours.step(0, one_update([*items[:3], replace(items[3], **{field: spoiled}), *items[4:]], 20))
    assert largest_difference(weights_of(ours), start) == 0.0
    assert ours.version == 0
    ours.step(0, one_update(items))  # nothing of the failed step is left over
    clean = made(tiny_model_dir)
    clean.step(0, one_update(items))
    assert largest_difference(weights_of(ours), weights_of(clean)) == 0.0


def test_the_user_can_stop_between_micro_batches_of_the_first_update_only(tiny_model_dir: Path) -> None:
    items = policy_samples(tiny_model_dir)
    updates = [pack(part, 1) for part in split_updates(items, 2)]
    calls = []

    def stop_at(number: int) -> TorchTrainer:
        def check() -> None:
            calls.append(None)
            if len(calls) == number:
                raise StopRequested("enough")

        calls.clear()
        return made(tiny_model_dir, check_stop=check, settings={"updates_per_step": 2})

    stopped = stop_at(2)
    start = weights_of(stopped)
    with pytest.raises(StopRequested):
        stopped.step(0, updates)
    assert largest_difference(weights_of(stopped), start) == 0.0 and stopped.version == 0
    stop_at(len(updates[0]) + 1).step(0, updates)
    assert len(calls) == len(updates[0])


def test_updates_of_one_step_are_updates_one_after_the_other(tiny_model_dir: Path) -> None:
    items = policy_samples(tiny_model_dir)
    first, second = split_updates(items, 2)
    together = made(tiny_model_dir, settings={"updates_per_step": 2})
    stats = together.step(0, [pack(first, 1000), pack(second, 1000)])
    apart = made(tiny_model_dir)
    one, two = apart.step(0, one_update(first)), apart.step(1, one_update(second))
    assert largest_difference(weights_of(together), weights_of(apart)) == 0.0
    assert stats.updates == 2 and together.version == 1
    assert stats.grad_norm == max(one.grad_norm, two.grad_norm)
    assert stats.metrics["train/loss"] == pytest.approx((one.metrics["train/loss"] + two.metrics["train/loss"]) / 2)
    # The second update is off-policy by construction, so only the first one compares trainer and sampler
    assert stats.metrics["train/sampler_mismatch"] == one.metrics["train/sampler_mismatch"]
    swapped = made(tiny_model_dir, settings={"updates_per_step": 2})
    swapped.step(0, [pack(second, 1000), pack(first, 1000)])
    assert largest_difference(weights_of(together), weights_of(swapped)) > 0


# --- gradient checkpointing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model_dir: Path, parameters: Any) -> None:
    items = policy_samples(tiny_model_dir)
    plain, stats = gradients_of_step(made(tiny_model_dir, parameters=parameters()), one_update(items))
    saving = made(tiny_model_dir, parameters=parameters(), settings={"gradient_checkpointing": True})
    layers, runs = saving._model.model.layers, []
    layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    checkpointed, other = gradients_of_step(saving, one_update(items))
    assert len(runs) == 2 * len({item.group for item in items})  # forward, and again in the backward pass
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    assert scale > 1e-3
    assert largest_difference(checkpointed, plain) < 1e-5 * scale
    assert other.metrics == pytest.approx(stats.metrics, rel=1e-4, abs=1e-6)


def opt_with_dropout() -> PreTrainedModel:
    config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY, init_std=0.2,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return seeded(lambda: OPTForCausalLM(config), 0)


def gpt2(**fields: Any) -> PreTrainedModel:
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, initializer_range=0.3, **fields
    )  # fmt: skip
    return seeded(lambda: GPT2LMHeadModel(config), 0)


def gpt2_with_dropout() -> PreTrainedModel:
    return gpt2(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)


@pytest.mark.parametrize(
    "build",
    [lambda: tiny_llama(attention_dropout=0.5), opt_with_dropout, gpt2_with_dropout],
    ids=["llama", "opt", "gpt2"],
)
def test_gradient_checkpointing_does_not_switch_dropout_on(tmp_path: Path, build: Any) -> None:
    folder = save_tiny_model(tmp_path, build())
    items = policy_samples(folder, noise=0.0)
    stats = made(folder, settings={"gradient_checkpointing": True}).step(0, one_update(items))
    assert stats.metrics["train/sampler_mismatch_max"] < 1e-5


# --- the KL anchor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])
def test_the_anchor_stays_at_the_start_model(tiny_model_dir: Path, parameters: Any, checkpointing: bool) -> None:
    items = policy_samples(tiny_model_dir)
    ours = made(
        tiny_model_dir, stabilizers=(KLAnchor(coefficient=0.1),), parameters=parameters(),
        settings={"lr": 0.02, "gradient_checkpointing": checkpointing},
    )  # fmt: skip
    batch = pack(items, 10_000)[0]
    start = ours._loss.reference_logprobs(batch)
    expected = token_scores(AutoModelForCausalLM.from_pretrained(tiny_model_dir), batch, TEMPERATURE)[0].detach()
    torch.testing.assert_close(start, expected, rtol=1e-5, atol=1e-5)
    assert ours.step(0, one_update(items)).metrics["train/kl"] == pytest.approx(0.0, abs=1e-9)
    for step in (1, 2):
        kl = ours.step(step, one_update(items)).metrics["train/kl"]
    assert kl > 1e-3
    assert torch.equal(ours._loss.reference_logprobs(batch), start)
    with torch.no_grad():
        d = start - ours._loss.scorer(batch).logprobs
    weight = torch.as_tensor(batch.weights)
    after = float(((d.exp() - d - 1) * weight).sum() / weight.sum())
    assert ours.step(3, one_update(items)).metrics["train/kl"] == pytest.approx(after, rel=1e-4)


def test_without_an_anchor_there_is_no_reference_model(tiny_model_dir: Path) -> None:
    ours = made(tiny_model_dir)
    assert not ours._loss.needs_reference
    assert ours._loss.reference_logprobs(pack(samples(), 1000)[0]) is None


# --- adapters -------------------------------------------------------------------------------------------------------------


def trained_lora(folder: Path, **options: Any) -> tuple[TorchTrainer, list[Sample]]:
    items = policy_samples(folder)
    ours = made(folder, parameters=LoRA(rank=2, **options), settings={"lr": 0.02})
    for step in range(3):
        ours.step(step, one_update(items))
    return ours, items


def test_adapters_start_as_the_start_model_and_depend_on_the_seed_only(tiny_model_dir: Path) -> None:
    torch.manual_seed(1)
    one = made(tiny_model_dir, parameters=LoRA(rank=2))
    torch.manual_seed(2)
    two = made(tiny_model_dir, parameters=LoRA(rank=2))
    other = made(tiny_model_dir, parameters=LoRA(rank=2), seed=1)
    start = dict(tiny_llama().named_parameters())
    merged = weights_of(one)
    assert set(merged) < set(start)
    assert all(torch.equal(merged[name], start[name]) for name in merged)
    assert largest_difference(one._trained, two._trained) == 0.0
    assert largest_difference(one._trained, other._trained) > 0.0
    assert all("lora" in name for name in one._trained)


def test_building_adapters_leaves_the_global_generator_alone(tiny_model_dir: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made(tiny_model_dir, parameters=LoRA(rank=2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["v_proj", "lm_head"]])
def test_merged_weights_equal_the_forward_pass_of_the_adapters(tiny_model_dir: Path, targets: Any) -> None:
    ours, items = trained_lora(tiny_model_dir, targets=targets)
    batch = pack(items, 10_000)[0]
    plain = tiny_llama()
    merged = weights_of(ours)
    for name in targets if isinstance(targets, list) else ["q_proj", "down_proj"]:
        assert any(name in key for key in merged)
        moved = [key for key in merged if name in key]
        start = dict(plain.named_parameters())
        assert all(not torch.equal(merged[key], start[key]) for key in moved)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged.get(name, parameter))
        expected = token_scores(plain, batch, TEMPERATURE)[0]
        close = ours._loss.scorer(batch).logprobs
    torch.testing.assert_close(close, expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_transposed_layers_arrive_merged_the_right_way_round(tmp_path: Path) -> None:
    # GPT-2 stores its projections as [in, out]
    folder = save_tiny_model(tmp_path, gpt2())
    ours, items = trained_lora(folder, targets=["c_attn", "c_fc"])
    plain, merged = gpt2(), weights_of(ours)
    assert len(merged) == 4
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged.get(name, parameter))
        batch = pack(items, 10_000)[0]
        logprobs = ours._loss.scorer(batch).logprobs
        torch.testing.assert_close(logprobs, token_scores(plain, batch, TEMPERATURE)[0], rtol=1e-4, atol=1e-4)
        assert (logprobs - token_scores(gpt2(), batch, TEMPERATURE)[0]).abs().max() > 0.01


def test_the_start_context_switches_the_adapters_off_and_on_again(tiny_model_dir: Path) -> None:
    ours, items = trained_lora(tiny_model_dir)
    batch = pack(items, 10_000)[0]
    with torch.no_grad():
        adapted = ours._loss.scorer(batch).logprobs
        context = ours._setup.parameters.start()
        assert context is not None
        with context:
            off = ours._loss.scorer(batch).logprobs
        again = ours._loss.scorer(batch).logprobs
        start = token_scores(tiny_llama(), batch, TEMPERATURE)[0]
    torch.testing.assert_close(off, start, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, adapted)
    assert (adapted - off).abs().max() > 0.01


def test_adapter_targets_that_do_not_exist_are_a_configuration_error(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        made(tiny_model_dir, parameters=LoRA(targets=["nowhere"]))
    with pytest.raises(ValueError, match="rank"):
        LoRA(rank=0)


# --- towards the engine, the disk and the user ----------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])
def test_an_engine_with_the_new_weights_agrees_with_the_trainer(tiny_model_dir: Path, parameters: Any) -> None:
    items = policy_samples(tiny_model_dir)
    ours = made(tiny_model_dir, parameters=parameters(), settings={"lr": 0.02})
    engine = HFEngine(section(tiny_model_dir), lambda: None, rows_at_once=8, shared_prefix=True)
    before = engine.ping().weights.fingerprint
    for step in range(2):
        ours.step(step, one_update(items))
    assert ours.weights().version == 2
    assert load_weights(engine, ours.weights()) != before
    batch = pack(items, 10_000)[0]
    with torch.no_grad():
        held = token_scores(engine._model, batch, TEMPERATURE)[0]
        torch.testing.assert_close(held, ours._loss.scorer(batch).logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])
def test_the_exported_model_loads_with_transformers_and_says_the_same(
    tmp_path: Path, parameters: Any, dtype: str, tied: bool
) -> None:
    folder = save_tiny_model(tmp_path / "start", tiny_llama(tie_word_embeddings=tied))
    items = policy_samples(folder)
    ours = made(folder, parameters=parameters(), dtype=dtype, settings={"lr": 0.02})
    for step in range(2):
        ours.step(step, one_update(items))
    ours.export(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode("12+3") == tiny_tokenizer().encode("12+3")
    expected = weights_of(ours)
    held = {name: parameter for name, parameter in loaded.named_parameters() if name in expected}
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name].to(loaded.dtype)) for name in expected)
    if dtype == "float32":
        batch = pack(items, 10_000)[0]
        with torch.no_grad():
            logprobs = token_scores(loaded, batch, TEMPERATURE)[0]
            torch.testing.assert_close(logprobs, ours._loss.scorer(batch).logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])
def test_a_loaded_trainer_continues_bit_for_bit(tmp_path: Path, parameters: Any, tied: bool) -> None:
    folder = save_tiny_model(tmp_path / "start", tiny_llama(tie_word_embeddings=tied))
    steps = [one_update(policy_samples(folder, seed=seed)) for seed in range(4)]
    straight = made(folder, parameters=parameters(), settings={"schedule": "cosine", "weight_decay": 0.1})
    for step in range(2):
        straight.step(step, steps[step])
    (tmp_path / "saved").mkdir()
    straight.save(tmp_path / "saved")
    resumed = made(folder, parameters=parameters(), seed=7, settings={"schedule": "cosine", "weight_decay": 0.1})
    resumed.load(tmp_path / "saved")
    assert resumed.version == 2
    for step in (2, 3):
        one, two = straight.step(step, steps[step]), resumed.step(step, steps[step])
        assert one == two
    assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0
    assert json.loads((tmp_path / "saved" / "trainer.json").read_text())["version"] == 2


def test_loading_replaces_everything_also_the_moments(tiny_model_dir: Path, tmp_path: Path) -> None:
    # Going back to a state saved before the first step: moments of later steps must not survive
    items = policy_samples(tiny_model_dir)
    ours, fresh = made(tiny_model_dir), made(tiny_model_dir)
    ours.save(tmp_path)
    ours.step(0, one_update(policy_samples(tiny_model_dir, seed=3)))
    ours.load(tmp_path)
    assert ours.version == 0
    ours.step(0, one_update(items))
    fresh.step(0, one_update(items))
    assert largest_difference(weights_of(ours), weights_of(fresh)) == 0.0


def test_a_state_of_other_parameters_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    made(tiny_model_dir, parameters=LoRA(rank=2)).save(tmp_path)
    with pytest.raises(ValueError, match="other parameters"):
        made(tiny_model_dir).load(tmp_path)
    with pytest.raises(EngineError, match="shape"):
        made(tiny_model_dir, parameters=LoRA(rank=3)).load(tmp_path)


def test_half_precision_is_autocast_over_float32_weights(tiny_model_dir: Path) -> None:
    items = policy_samples(tiny_model_dir)
    ours = made(tiny_model_dir, dtype="bfloat16", settings={"lr": 1e-6})
    start = weights_of(ours)
    grads, stats = gradients_of_step(ours, one_update(items))
    exact, reference = gradients_of_step(made(tiny_model_dir), one_update(items))
    assert all(tensor.dtype == torch.float32 for tensor in start.values())
    # A step of 1e-6 is far below the resolution of bfloat16 weights around 0.3, and must not be lost
    assert 0.5e-6 < largest_difference(weights_of(ours), start) < 2e-6
    assert stats.metrics["train/loss"] == pytest.approx(reference.metrics["train/loss"], abs=0.05)
    flat = torch.cat([gradient.flatten() for gradient in grads.values()])
    other = torch.cat([exact[name].flatten() for name in grads])
    assert torch.nn.functional.cosine_similarity(flat, other, dim=0) > 0.98
    assert not torch.equal(flat, other)  # it did compute in half precision


def test_dual_clip_of_the_recipe_reaches_the_loss(tiny_model_dir: Path) -> None:
    items = [replace(s, advantages=-np.abs(s.advantages)) for s in policy_samples(tiny_model_dir, noise=1.0)]
    free = made(tiny_model_dir).step(0, one_update(items))
    held = made(tiny_model_dir, objective=GRPO(dual_clip=1.3)).step(0, one_update(items))
    assert held.metrics["train/loss"] < free.metrics["train/loss"] - 1e-3


def test_adapting_a_tied_output_layer_is_refused_before_training(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, tie_word_embeddings=True))  # fmt: skip
    with pytest.raises(ConfigError, match="lm_head"):
        LoRA(rank=2, alpha=2, targets=["q_proj", "lm_head"]).attach(model, 0)
