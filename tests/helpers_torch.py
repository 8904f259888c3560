"""Builders for tests that use torch: tiny random models, prompts, samples, batches, trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ttrl.config.schema import ModelSection, TrainerSection
from ttrl.protocols import ForwardOut, TensorBatch
from ttrl.trainers.backends import TrainerSetup
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.packing import pack, row_index
from ttrl.trainers.parameters import Full
from ttrl.trainers.torch_backend import TorchTrainer
from ttrl.types import Message, PackedBatch, Prompt, Request, Sample, SamplingSpec, Segment

torch.set_num_threads(1)

CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz+-=?"
SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
PAD, BOS, EOS = 0, 1, 2
POSITIONS = 192

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Far larger than a usual initialisation: with the usual one attention hardly matters and a wrong mask would go unnoticed
SPREAD = {"initializer_range": 0.3}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    )  # fmt: skip


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Random weights by seed; 4 query heads on 2 key-value heads."""
    config = LlamaConfig(
        **{
            **WIDE, **SPREAD, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
            "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **overrides,
        }
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config), seed)


def seeded(build: Callable[[], PreTrainedModel], seed: int) -> Any:
    """The model `build` makes from torch's generator at this seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def save_tiny_model(folder: Path, model: PreTrainedModel | None = None, eos: int | list[int] = EOS) -> Path:
    """Model, tokenizer and generation config as `from_pretrained` wants them."""
    model = tiny_llama() if model is None else model
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=eos)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def section(folder: Path, dtype: str = "float32") -> ModelSection:
    return ModelSection.model_validate({"path": str(folder), "dtype": dtype, "device": "cpu"})


def prompt(identifier: str, length: int = 6, seed: int = 0) -> Prompt:
    """Random prompt tokens that depend on id and seed only."""
    rng = np.random.default_rng([seed, *identifier.encode()])
    ids = rng.integers(len(SPECIAL), VOCABULARY, size=length).astype(np.int32)
    return Prompt(id=identifier, messages=(Message(role="user", content=identifier),), token_ids=ids)


def request(of: Prompt, index: int, spec: SamplingSpec, **fields: Any) -> Request:
    """The seed is a function of prompt and index, as it is with a sampler."""
    seed = sum(of.id.encode()) * 1000 + index
    return Request(**{"prompt": of, "index": index, "seed": seed, "spec": spec, **fields})


def sample(of: Prompt, length: int, seed: int, advantage: float | None = None) -> Sample:
    """Random completion; log-probs like those of a sampler, one advantage for all tokens, uneven weights."""
    rng = np.random.default_rng([seed, length])
    value = rng.normal() if advantage is None else advantage
    return Sample(
        prompt_ids=of.token_ids,
        completion_ids=rng.integers(0, VOCABULARY, size=length).astype(np.int32),
        sampler_logprobs=(-3.5 + rng.normal(size=length)).astype(np.float32),
        advantages=np.full(length, value, np.float32),
        weights=rng.choice([0.5, 1.0, 2.0], size=length).astype(np.float32),
        group=of.id,
    )


def samples(lengths: Sequence[Sequence[int]] = ((5, 3, 1, 4), (2, 6, 6)), seed: int = 0) -> list[Sample]:
    """One group per inner sequence; prompts of different lengths."""
    return [
        sample(prompt(f"p{group}", 4 + 3 * group), length, seed * 1000 + 10 * group + row)
        for group, rows in enumerate(lengths)
        for row, length in enumerate(rows)
    ]


def batch_of(rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], tokens_in_step: float = 1.0) -> PackedBatch:
    """(prompt, completions) per segment, with zero log-probs and advantages."""
    flat = np.concatenate([np.asarray(row) for _, completions in rows for row in completions]).astype(np.int32)
    zeros = np.zeros(len(flat), np.float32)
    return PackedBatch(
        segments=tuple(
            Segment(prompt_ids=np.asarray(ids, np.int32), lengths=np.asarray([len(row) for row in completions], np.int32))
            for ids, completions in rows
        ),
        completion_ids=flat, sampler_logprobs=zeros, advantages=zeros, weights=zeros + 1, tokens_in_step=tokens_in_step,
    )  # fmt: skip


def tensors(batch: PackedBatch, dtype: torch.dtype = torch.float32) -> TensorBatch:
    return TensorBatch(
        sampler_logprobs=torch.as_tensor(batch.sampler_logprobs, dtype=dtype),
        advantages=torch.as_tensor(batch.advantages, dtype=dtype),
        weights=torch.as_tensor(batch.weights, dtype=dtype),
        tokens_in_step=batch.tokens_in_step,
        rows=torch.as_tensor(row_index(batch)),
        extras={name: torch.as_tensor(values, dtype=dtype) for name, values in batch.extras.items()},
    )


def token_scores(model: PreTrainedModel, batch: PackedBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N] the plain way: every row alone through the whole model, nothing shared or padded."""
    logprobs, entropies, start = [], [], 0
    for segment in batch.segments:
        for length in segment.lengths:
            ids = torch.as_tensor(batch.completion_ids[start : start + length], dtype=torch.long)
            start += int(length)
            whole = torch.cat([torch.as_tensor(segment.prompt_ids, dtype=torch.long), ids])[None]
            logits = model(input_ids=whole, use_cache=False).logits[0, len(segment.prompt_ids) - 1 : -1]
            table = torch.log_softmax(logits / temperature, dim=-1)
            logprobs.append(table[torch.arange(len(ids)), ids])
            entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def trainer(folder: Path, *, temperature: float = 1.0, steps: int = 4, **fields: Any) -> TorchTrainer:
    """A torch trainer; `fields` are those of TrainerSetup, `settings` those of the recipe's trainer section."""
    settings = {"lr": 1e-3, "schedule": "constant", "warmup": 0.0, **fields.pop("settings", {})}
    dtype = fields.pop("dtype", "float32")
    return TorchTrainer(
        TrainerSetup(
            **{
                "model": section(folder, dtype), "trainer": TrainerSection.model_validate(settings), "objective": GRPO(),
                "stabilizers": (), "parameters": Full(), "temperature": temperature, "steps": steps, "seed": 0,
                "check_stop": lambda: None, **fields,
            }
        )
    )  # fmt: skip


def one_update(of: Sequence[Sample], budget: int = 10_000) -> list[list[PackedBatch]]:
    """The updates argument of a trainer step: one update of all samples."""
    return [pack(of, budget)]


def weights_of(source: Any) -> dict[str, torch.Tensor]:
    """What a trainer would send to an engine."""
    return {name: tensor.clone() for name, tensor in source.weights()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Zero where a parameter took no part."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].detach().double() - second[name].detach().double()).abs().max()) for name in first)


def forward_out(logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None = None) -> ForwardOut:
    return ForwardOut(logprobs=logprobs, entropy=torch.zeros_like(logprobs), ref_logprobs=ref_logprobs)
