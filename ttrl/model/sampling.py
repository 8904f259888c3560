"""From logits to tokens with one random number per token, and the exact log-probs of what was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ttrl.types import FloatArray, IntArray, SamplingSpec


@dataclass(frozen=True, slots=True)
class Draw:
    """One token per row."""

    tokens: Tensor
    """[R]"""
    logprobs: Tensor
    """[R] after temperature, over the full vocabulary, float32"""
    entropy: Tensor | None
    """[R] nats"""
    self_certainty: Tensor | None
    """[R] nats"""


def draw(logits: Tensor, uniform: Tensor, spec: SamplingSpec) -> Draw:
    """Inverse-CDF sampling: logits [R, V] and one uniform number per row [R] (float64, in [0, 1)).

    At temperature 0 the most likely token is taken (the first one of equals) and log-probs are those at temperature 1. Top-k,
    top-p and min-p restrict what can be drawn; the log-prob recorded is still that of the full softmax.
    """
    logprobs = torch.log_softmax(scaled(logits, spec.temperature), dim=-1)
    probs = logprobs.exp()
    if spec.temperature == 0.0:
        tokens = logprobs.argmax(dim=-1)
    else:
        # Double precision: with 24-bit uniforms the target stays strictly below the total, so a token of probability 0 is never hit
        mass = (truncated(probs, spec) if spec.is_truncated else probs).double().cumsum(dim=-1)
        tokens = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp_max(logits.shape[1] - 1)  # only NaN logits get there; their log-prob tells
    entropy = -(probs * logprobs.clamp_min(-1e4)).sum(dim=-1) if spec.entropy else None
    certainty = self_certainty(logprobs) if spec.self_certainty else None
    return Draw(tokens, logprobs.gather(1, tokens[:, None])[:, 0], entropy, certainty)


def self_certainty(logprobs: Tensor) -> Tensor:
    """[R] KL(U || p) = -1/V sum_v ln(V p(v)) in nats, of log-probs [R, V] (self-certainty, arXiv 2502.18581); 0 where p is uniform.

    V counts the tokens that can occur. A masked logit (-inf: padding of the vocabulary) says nothing about confidence, and would
    make every value infinite.
    """
    possible = logprobs > -torch.inf
    number = possible.sum(dim=-1).clamp_min(1).float()
    mean = torch.where(possible, logprobs, 0.0).sum(dim=-1) / number
    return (-number.log() - mean).clamp_min(0.0)  # not negative but for rounding


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by the temperature; temperature 0 leaves them as they are."""
    return logits.float() if temperature in (0.0, 1.0) else logits.float() / temperature


def truncated(probs: Tensor, spec: SamplingSpec) -> Tensor:
    """Zero what top-k, top-p and min-p exclude (not renormalised), [R, V]. The most likely token always stays.

    Top-p is a share of the mass that top-k left, as in transformers and vLLM.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    if spec.top_k > 0:
        ordered[:, spec.top_k :] = 0.0
    mass = ordered.cumsum(dim=-1)
    kept = mass - ordered < spec.top_p * mass[:, -1:]
    kept &= ordered >= spec.min_p * ordered[:, :1]
    kept[:, 0] = True
    return torch.zeros_like(probs).scatter(1, order, ordered * kept)


def text_logprobs(model: PreTrainedModel, token_ids: IntArray) -> FloatArray:
    """[T] -> [T - 1] log-probs at temperature 1 of every token but the first given those before it."""
    ids = torch.tensor(token_ids, dtype=torch.long, device=model.device)  # a copy: what Ray hands over is read-only
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    found = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]
    return np.asarray(found.cpu().numpy(), np.float32)
