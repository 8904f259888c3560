"""Log-probs and entropies of the completion tokens of a PackedBatch, with gradient.

Fast path: the prompt of a segment runs once and its completions attend to it (`SharedPrefix`). Slow twin: every row runs
prompt + completion. Either way only completion tokens reach the vocabulary, in chunks that are recomputed in the backward
pass, so the full [N, V] logits never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ttrl.errors import ConfigError
from ttrl.model.eyes import Seen, open_eyes
from ttrl.model.prefix import SharedPrefix, enable_shared_prefix
from ttrl.model.sampling import scaled
from ttrl.trainers.lockstep import Shape
from ttrl.types import PackedBatch, Segment

LOGITS_AT_ONCE = 2**24
"""Logits computed per chunk (64 MiB in float32); a batch below that is one chunk and nothing is recomputed."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """[N] each, aligned with the flat arrays of the batch."""

    logprobs: Tensor
    entropy: Tensor


class CompletionScorer:
    """Scores batches under one model at one temperature."""

    def __init__(
        self, model: PreTrainedModel, temperature: float, *, shared_prefix: bool = True, entropy_grad: bool = False,
        path: str = "",
    ) -> None:  # fmt: skip
        """`path`: where the model came from, which is where the processor of its pictures is."""
        self._model = model
        self._temperature = temperature
        self._eyes = open_eyes(model, path)
        self.shared_prefix = shared_prefix and enable_shared_prefix(model)
        self._entropy_grad = entropy_grad
        self._body, self._head = split_head(model)
        self._vocabulary = int(model.config.get_text_config().vocab_size)

    def __call__(self, batch: PackedBatch, shape: Shape | None = None) -> TokenScores:
        """With `shape`, modules run as often as for any other batch of as many segments under it."""
        device = self._model.device
        ids = torch.as_tensor(batch.completion_ids, dtype=torch.long, device=device)
        states, start = [], 0
        for segment in batch.segments:
            count = int(segment.lengths.sum())
            states.append(self._segment(segment, ids[start : start + count], shape))
            start += count
        return self._score(torch.cat(states), ids, 0 if shape is None else shape.tokens)

    def _segment(self, segment: Segment, ids: Tensor, shape: Shape | None) -> Tensor:
        """States [n, D] that predict the n completion tokens of one segment."""
        prompt = self._taken_in(segment, ids.device, always=shape is not None and shape.pictures)
        rows, longest = len(segment.lengths), max(int(segment.lengths.max()), 1 if shape is None else 2)
        lengths = torch.as_tensor(segment.lengths, dtype=torch.long, device=ids.device)
        inside = torch.arange(longest, device=ids.device)[None] < lengths[:, None]
        padded = torch.zeros((rows, longest), dtype=torch.long, device=ids.device)
        padded[inside] = ids
        # The state before a token predicts it: the prompt's last state predicts token 0, and the last token predicts nothing here
        if self.shared_prefix:
            shared = SharedPrefix(self._body)
            first = shared.prefill(prompt)[0][:, -1:].expand(rows, -1, -1)
            states = torch.cat([first, shared.suffix(padded[:, :-1])[0]], dim=1) if longest > 1 else first
        elif isinstance(prompt, Seen):
            whole = prompt.followed_by(self._model.get_input_embeddings()(padded[:, :-1]))
            states = self._body(inputs_embeds=whole.embeds, position_ids=whole.positions, use_cache=False)[0]
            states = states[:, len(segment.prompt_ids) - 1 :]
        else:
            ids = torch.cat([prompt.expand(rows, -1), padded[:, :-1]], dim=1)
            states = self._body(input_ids=ids, use_cache=False)[0][:, len(prompt) - 1 :]
        return states[inside]

    def _taken_in(self, segment: Segment, device: torch.device, *, always: bool) -> Tensor | Seen:
        """The prompt as the model gets it, once per segment; `always` through the vision tower, without a picture too.

        Raises ConfigError for pictures that this model does not take.
        """
        if not (segment.images or always):
            return torch.as_tensor(segment.prompt_ids, dtype=torch.long, device=device)
        if self._eyes is None:
            raise ConfigError("a prompt has images, but the model is one of text only")
        return self._eyes.see(segment.prompt_ids, segment.images)

    def _score(self, states: Tensor, ids: Tensor, at_least: int) -> TokenScores:
        size = max(1, LOGITS_AT_ONCE // self._vocabulary)
        count = max(len(ids), at_least)
        if count <= size:
            return TokenScores(*self._chunk(states, ids))
        parts = [  # the last ones may be empty
            checkpoint(self._chunk, states[i : i + size], ids[i : i + size], use_reentrant=False)
            for i in range(0, count, size)
        ]
        return TokenScores(torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts]))

    def _chunk(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(scaled(self._head(states), self._temperature), dim=-1)
        held = logprobs if self._entropy_grad else logprobs.detach()  # its gradient would keep two more [N, V] tensors
        entropy = -(held.exp() * held.clamp_min(-1e4)).sum(dim=-1)
        return logprobs.gather(1, ids[:, None])[:, 0], entropy


def split_head(model: PreTrainedModel) -> tuple[PreTrainedModel, Callable[[Tensor], Tensor]]:
    """(body, head) such that head(body(x)) are the logits; (model, identity) for models that do more than a projection.

    Some models scale or cap their logits. That is tried on two tokens, not looked up by name. The same operations on the same
    numbers agree bit for bit; a tolerance would hide a cap while the logits are still small.
    """
    body, head = model.get_decoder(), model.get_output_embeddings()
    if body is None or body is model or head is None:
        return model, lambda states: states
    ids = torch.arange(2, device=model.device)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        split = head(body(input_ids=ids, use_cache=False)[0])
    if not torch.equal(logits.float(), split.float()):
        return model, lambda states: states
    return body, head
