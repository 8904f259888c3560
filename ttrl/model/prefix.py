"""One prompt, many completions: the prompt goes through the model once and every completion attends to it.

`SharedPrefix` is the fast path. It registers an attention function with transformers and a cache whose layers hold the
prompt's keys and values once, [1, H, P, D], and a suffix per row. `ExpandedPrefix` is its slow twin: transformers' own cache,
repeated per row. `enable_shared_prefix` allows the fast one only for models on which it agrees with a plain forward pass.

Two phases share the code:
  decoding   one token per row and call; prefix scores are one matrix product for all rows (no copy of the prompt's keys)
  training   all tokens of all rows in one call, with gradient through the prefix
Shapes: R rows, H query heads, K key-value heads, D head width, P prompt tokens, T suffix tokens.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ttrl.model.eyes import Seen

log = logging.getLogger(__name__)

IMPLEMENTATION = "ttrl_shared_prefix"
_GROWTH = 64
"""Suffix buffers grow by this many tokens, so that a long limit does not reserve memory for short answers."""


class SplitStates(NamedTuple):
    """Keys (or values) as a shared part and a part per row."""

    prefix: Tensor
    """[1, K, P, D]"""
    suffix: Tensor
    """[R, K, t, D]"""


class PrefixLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: the prompt once, the suffix per row in a growing buffer."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.prefix: tuple[Tensor, Tensor] | None = None
        self.suffix: tuple[Tensor, Tensor] | None = None
        self.length = 0
        self.decoding = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """First call: the prompt. Later calls: one more token per row (decoding) or the whole suffix (training)."""
        if self.prefix is None:
            self.prefix = (key_states, value_states)
            return key_states, value_states
        if not self.decoding:
            rows = key_states.shape[0]
            keys, values = (
                torch.cat([part.expand(rows, -1, -1, -1), new], dim=2)
                for part, new in zip(self.prefix, (key_states, value_states), strict=True)
            )
            return keys, values
        return self._append(key_states, value_states)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[SplitStates, SplitStates]:
        assert self.prefix is not None
        if self.suffix is None or self.length == self.suffix[0].shape[2]:
            self.suffix = tuple(self._grown(i, new) for i, new in enumerate((keys, values)))  # type: ignore[assignment]
        assert self.suffix is not None
        self.suffix[0][:, :, self.length] = keys[:, :, 0]
        self.suffix[1][:, :, self.length] = values[:, :, 0]
        self.length += 1
        return (
            SplitStates(self.prefix[0], self.suffix[0][:, :, : self.length]),
            SplitStates(self.prefix[1], self.suffix[1][:, :, : self.length]),
        )

    def _grown(self, which: int, new: Tensor) -> Tensor:
        rows, heads, _, width = new.shape
        grown = new.new_zeros(rows, heads, self.length + _GROWTH, width)
        if self.suffix is not None:
            grown[:, :, : self.length] = self.suffix[which]
        return grown

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on; the prompt is not touched."""
        if self.suffix is not None:
            self.suffix = (self.suffix[0][rows], self.suffix[1][rows])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return (0 if self.prefix is None else self.prefix[0].shape[2]) + self.length

    def get_max_length(self) -> int:
        return -1


def shared_prefix_attention(
    module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function given to transformers. Returns [R, T, H, D].

    Raises NotImplementedError for models that pass extra terms (soft caps, sinks); `enable_shared_prefix` then reports False.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "sliding_window")):
        raise NotImplementedError("this model's attention has terms that the shared prefix does not know")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, SplitStates):
        return _decode_attention(query, key, value, scaling), None
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if queries != keys:  # training: row t sees the whole prompt and its own tokens up to t
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=0.0, scaling=scaling, is_causal=mask is None and queries > 1
    )
    return output, None


def _decode_attention(query: Tensor, key: SplitStates, value: SplitStates, scaling: float) -> Tensor:
    """One query per row against the shared prompt and the row's own suffix, under one softmax."""
    rows, heads, _, width = query.shape
    kv_heads, prompt = key.prefix.shape[1], key.prefix.shape[2]
    repeat = heads // kv_heads
    grouped = (query * scaling).view(rows, kv_heads, repeat, width)
    flat = grouped.transpose(0, 1).reshape(kv_heads, rows * repeat, width)
    on_prefix = (flat @ key.prefix[0].transpose(1, 2)).view(kv_heads, rows, repeat, prompt).transpose(0, 1)
    on_suffix = grouped @ key.suffix.transpose(2, 3)
    weights = torch.softmax(torch.cat([on_prefix, on_suffix], dim=-1), dim=-1, dtype=torch.float32).to(query.dtype)
    from_prefix = weights[..., :prompt].transpose(0, 1).reshape(kv_heads, rows * repeat, prompt) @ value.prefix[0]
    output = from_prefix.view(kv_heads, rows, repeat, width).transpose(0, 1) + weights[..., prompt:] @ value.suffix
    return output.reshape(rows, 1, heads, width)


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)


class SharedPrefix:
    """Fast path. `prefill` once, then either `step` token by token (no gradient) or `suffix` once (with gradient)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers = [PrefixLayer() for _ in range(model.config.get_text_config().num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._next = 0
        """Position of the first token behind the prompt."""
        self._steps = 0

    def prefill(self, prompt: Tensor | Seen, **kwargs: Any) -> Any:
        """prompt [P], or one with pictures -> the model's output for it (batch of one)."""
        if isinstance(prompt, Seen):
            self._next = prompt.next_position
            return self._run(prompt.positions, inputs_embeds=prompt.embeds[None], **kwargs)
        self._next = int(prompt.shape[0])
        return self._run(torch.arange(self._next, device=prompt.device)[None], input_ids=prompt[None], **kwargs)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [R] -> logits [R, vocabulary] of the next one."""
        position = self._next + self._steps
        self._steps += 1
        positions = torch.full((1, 1), position, dtype=torch.long, device=tokens.device)
        return self._run(positions, input_ids=tokens[:, None]).logits[:, -1]  # type: ignore[no-any-return]

    def suffix(self, tokens: Tensor, **kwargs: Any) -> Any:
        """tokens [R, T], right-padded (causality hides the padding) -> the model's output for them."""
        for layer in self._layers:
            layer.decoding = False
        positions = self._next + torch.arange(tokens.shape[1], device=tokens.device)[None]
        return self._run(positions, input_ids=tokens, **kwargs)

    def keep(self, rows: Tensor) -> None:
        """Finished rows leave the batch."""
        for layer in self._layers:
            layer.keep(rows)

    def _run(self, positions: Tensor, **kwargs: Any) -> Any:
        return self._model(position_ids=positions, past_key_values=self._cache, use_cache=True, **kwargs)


class ExpandedPrefix:
    """Slow twin for decoding, and the only path for models the fast one does not fit: the prompt's cache copied per row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._expanded = False
        self._next: int | None = None
        """Position of the next token; None leaves counting to the model, as not every model of text takes positions."""

    def prefill(self, prompt: Tensor | Seen, **kwargs: Any) -> Any:
        if isinstance(prompt, Seen):
            self._next = prompt.next_position
            kwargs |= {"inputs_embeds": prompt.embeds[None], "position_ids": prompt.positions}
        else:
            kwargs |= {"input_ids": prompt[None]}
        return self._model(past_key_values=self._cache, use_cache=True, **kwargs)

    def step(self, tokens: Tensor) -> Tensor:
        rows = int(tokens.shape[0])
        if not self._expanded:
            self._cache.batch_repeat_interleave(rows)
            self._expanded = True
        placed = {}
        if self._next is not None:
            placed = {"position_ids": torch.full((rows, 1), self._next, dtype=torch.long, device=tokens.device)}
            self._next += 1
        found = self._model(input_ids=tokens[:, None], past_key_values=self._cache, use_cache=True, **placed)
        return found.logits[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> None:
        if self._expanded:
            self._cache.batch_select_indices(rows)


def enable_shared_prefix(model: PreTrainedModel) -> bool:
    """Switch the model to the shared-prefix attention if it then agrees with its plain forward pass.

    Tried on a few tokens, not guessed from the model's name. True: the model now uses it, for plain causal batches too (right
    padding only: no padding mask is built). False: nothing was changed and `ExpandedPrefix` must be used.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}
    if kinds:  # a few tokens fit into every window, so trying would not show the difference
        log.warning("%s: no shared prefix (layers with %s)", type(model).__name__, ", ".join(sorted(kinds)))
        return False
    before = model.config.get_text_config()._attn_implementation
    ids = torch.arange(1, 8, device=model.device) % model.config.get_text_config().vocab_size
    prompt, rows = ids[:4], torch.stack([ids[4:], ids[4:].flip(0)])
    try:
        with torch.no_grad():
            plain = model(input_ids=torch.cat([prompt.expand(2, -1), rows], dim=1)).logits[:, 4:].float()
            _attend(model, IMPLEMENTATION)
            worst = _disagreement(model, prompt, rows, plain)
    except (NotImplementedError, AttributeError, TypeError, RuntimeError, ValueError, KeyError) as error:
        _attend(model, before)
        log.warning("%s: no shared prefix (%s); prompts are copied per row", type(model).__name__, error)
        return False
    # Wide enough for rounding in half precision, far narrower than what a wrong mask or position does to logits
    if not worst <= (1e-3 if model.dtype == torch.float32 else 5e-2):
        _attend(model, before)
        log.warning(
            "%s: shared prefix is %.1e off a plain forward pass; prompts are copied per row",
            type(model).__name__,
            worst,
        )
        return False
    return True


def _attend(model: PreTrainedModel, implementation: str) -> None:
    """For the language model; a vision tower looks in both directions and keeps its own."""
    parts = model.config.sub_configs
    model.set_attn_implementation({"text_config": implementation} if "text_config" in parts else implementation)


def _disagreement(model: PreTrainedModel, prompt: Tensor, rows: Tensor, plain: Tensor) -> float:
    """Largest difference of logits over both phases, relative to the largest logit."""
    shared = SharedPrefix(model)
    shared.prefill(prompt)
    trained = shared.suffix(rows).logits.float()
    shared = SharedPrefix(model)
    shared.prefill(prompt)
    decoded = torch.stack([shared.step(rows[:, t]) for t in range(rows.shape[1])], dim=1).float()
    difference = torch.stack([trained - plain, decoded - plain]).abs().amax()
    return float(difference / plain.abs().amax().clamp_min(1.0))
