"""What autograd keeps of one micro-batch, derived from trainers/forward.py, ttrl/model/prefix.py and the Llama layer of transformers.

`tests/test_plan_memory.py` counts the tensors that autograd really saves and holds these formulas against them.
Per token and layer (H hidden, q all query heads, I intermediate; r rows of t suffix tokens after P prompt tokens):

    norms      x twice, and x / rms twice when the norms' own weights are trained         (always float32)
    attention  query, output; keys and values repeated for every query head, r (P + t) of them because the prompt's are copied to
               each row; the mask t (P + t) per segment; log-sum-exp per head
    linears    inputs of the trained projections; under autocast each projection makes its own bfloat16 copy of its input
    MLP        gate, silu(gate), up; their product when down_proj is trained
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ttrl.config.schema import Recipe
from ttrl.plan.batch import MicroBatch
from ttrl.plan.shape import ModelShape

LOGITS_AT_ONCE = 2**24
"""As in trainers/forward.py, which cannot be imported here: it imports torch. A test compares the two."""
FLOAT, HALF = 4, 2
"""Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What gets gradients."""

    full: bool
    targets: frozenset[str]
    """adapted projections"""
    rank: int
    parameters: int

    def has(self, *projections: str) -> int:
        """How many of these are trained."""
        return len(projections) if self.full else sum(name in self.targets for name in projections)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How the trainer computes."""

    width: int
    """bytes of what matrix products take and give"""
    autocast: bool
    """weights are float32 and cast at each use (back-end torch); otherwise they are held in `width`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes."""

    layers: float
    """of all layers when the head starts its backward pass"""
    casts: float
    """bfloat16 copies of weights that autocast made for this micro-batch"""
    head: float
    """the most that scoring the completion tokens holds at once"""

    @property
    def total(self) -> float:
        return self.layers + self.casts + self.head


def trained(recipe: Recipe, shape: ModelShape) -> Trained:
    """Full parameters, or adapters as peft counts them: rank x (inputs + outputs) per adapted projection."""
    plug = recipe.trainer.parameters
    if plug.use != "lora":
        return Trained(full=True, targets=frozenset(), rank=0, parameters=shape.parameters)
    rank, wanted = int(plug.options.get("rank", 16)), plug.options.get("targets", "all-linear")
    adapted = [linear for linear in shape.linears if _adapts(wanted, linear[0])]
    count = shape.layers * sum(rank * (inputs + outputs) for _, inputs, outputs in adapted)
    return Trained(full=False, targets=frozenset(name for name, _, _ in adapted), rank=rank, parameters=count)


def _adapts(wanted: object, name: str) -> bool:
    block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    full = f"model.layers.0.{block}.{name}"
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, full) is not None
    return isinstance(wanted, list) and any(full == w or full.endswith(f".{w}") for w in wanted)


def kept(shape: ModelShape, batch: MicroBatch, part: Trained, how: Precision, *, checkpointing: bool) -> Kept:
    """While the micro-batch is between its forward and its backward pass."""
    layer = _layer(shape, batch, part, how)
    casts = _casts(shape, batch, part) if how.autocast else 0.0
    stream = FLOAT if how.autocast or how.width == FLOAT else HALF
    ends = (
        batch.computed * shape.hidden * FLOAT
    )  # the last norm; what follows is kept for weights that are trained only
    if part.full:
        ends += batch.computed * shape.hidden * stream + batch.scored * shape.hidden * stream
    if checkpointing:
        inputs = shape.layers * batch.computed * shape.hidden * stream
        casts = casts if part.full else casts / shape.layers
        return Kept(layers=inputs + layer + ends, casts=casts, head=_head(shape, batch, part, how))
    return Kept(layers=shape.layers * layer + ends, casts=casts, head=_head(shape, batch, part, how))


def _layer(shape: ModelShape, batch: MicroBatch, part: Trained, how: Precision) -> float:
    tokens, width, hidden = batch.computed, how.width, shape.hidden
    normed = FLOAT if how.autocast or width == FLOAT else HALF
    norms = 2 * FLOAT * hidden + (2 * normed * hidden if part.full else 0)
    if shape.qk_norm:
        norms += (FLOAT + (normed if part.full else 0)) * (shape.query + shape.kv)
    into_attention, into_mlp = part.has("q_proj", "k_proj", "v_proj"), part.has("gate_proj", "up_proj")
    casting = how.autocast and width == HALF
    inputs = into_attention + into_mlp if casting else min(1, into_attention) + min(1, into_mlp)
    per_token = norms + width * (
        inputs * hidden
        + 2 * shape.query
        + (shape.query if casting and not part.full and part.has("o_proj") else 0)
        + 3 * shape.intermediate
        + (shape.intermediate if part.has("down_proj") else 0)
        + part.rank * len(part.targets)
    )
    return tokens * (per_token + FLOAT * shape.heads) + _attention(shape, batch, width)


def _attention(shape: ModelShape, batch: MicroBatch, width: int) -> float:
    """Keys, values and masks."""
    if not batch.shared:
        return width * 2 * shape.kv * batch.computed
    context = batch.prompt + batch.suffix
    own = 2 * shape.kv * batch.prompt * len(batch.segments)
    copied = 2 * shape.query * batch.rows * context
    return width * (own + copied + batch.suffix * context * len(batch.segments))


def _casts(shape: ModelShape, batch: MicroBatch, part: Trained) -> float:
    """autocast casts a trained weight once, and a frozen one at every use: for the prompt and for the rows of every segment."""
    uses = 1 if part.full else len(batch.segments) * (2 if batch.shared else 1)
    return HALF * (uses * shape.layers * shape.layer_matrices + shape.embedding)


def _head(shape: ModelShape, batch: MicroBatch, part: Trained, how: Precision) -> float:
    """Log-probs, their exponential, the clamped log-probs and the product of both, for one chunk; then two gradients of that size.

    A trained head adds a gradient of its own size per chunk, which waits for the embedding's when the two are tied.
    """
    rows = max(1, LOGITS_AT_ONCE // shape.vocabulary)
    chunk = FLOAT * min(batch.scored, rows) * shape.vocabulary
    chunks = -(-batch.scored // rows)
    width = FLOAT if how.autocast or how.width == FLOAT else HALF
    gradient = width * shape.embedding if part.full else 0.0
    waiting = gradient if chunks > 1 else 0.0
    return max(4 * chunk + waiting, 3 * chunk + waiting, 2 * chunk + waiting + gradient)


def reference_head(shape: ModelShape, batch: MicroBatch) -> float:
    """The same without gradient, under the frozen start model; log-probs of a single chunk of ours wait meanwhile."""
    rows = max(1, LOGITS_AT_ONCE // shape.vocabulary)
    chunk = FLOAT * min(batch.scored, rows) * shape.vocabulary
    return 4 * chunk + (chunk if batch.scored <= rows else 0)
