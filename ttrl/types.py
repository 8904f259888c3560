"""What passes between the parts of ttrl: frozen, slotted records and nothing else.

    prompts -> sampler -> Group -> reward -> Scored -> objective -> Sample -> packing -> PackedBatch -> trainer -> StepStats

Arrays are numpy here; tensors appear only inside `ttrl.trainers`, `ttrl.rollout` and `ttrl.model`. Shapes stand in
brackets: P prompt tokens, T completion tokens of one rollout, V rollouts (votes) of a group, N tokens of a batch, S segments.

No record has a field for a reference answer. Labels live in files that only `ttrl.evaluate` opens.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

NO_ANSWER = -1
"""Class index of a rollout that did not answer. It is never elected and never counts as a vote."""

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation, in the usual chat vocabulary."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """A picture of a prompt, by name and content. What travels between processes is this; whoever needs pixels opens the file."""

    path: str
    """Absolute. On a cluster, a file system that all nodes share."""
    digest: str
    """SHA-256 of the file, 64 hex digits: a file that changed, or is another one on another node, is an error when it is opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """An unlabelled question. There is no answer field, on purpose.

    Example: Prompt(id="add-17", messages=(Message(role="user", content="38+47="),), token_ids=array([1, 6, 11, ...]))
    """

    id: str
    """The id given in the prompts file, else a hash of the content. Unique in a run."""
    messages: tuple[Message, ...]
    token_ids: IntArray
    """[P] what the engine is given: template applied, special tokens included, and as many image tokens as the pictures take."""
    images: tuple[ImageFile, ...] = ()
    """In the order of their image tokens."""
    marked_ids: IntArray | None = None
    """As `token_ids`, but with one image token per picture: for engines that count image tokens themselves. None without pictures."""
    meta: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    """Other columns of the prompts file that the recipe asked to keep (never labels)."""

    @property
    def text(self) -> str:
        """The content of all turns, for people to read."""
        return "\n".join(message.content for message in self.messages)


class Finish(enum.Enum):
    """Why a rollout ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"

    def is_complete(self) -> bool:
        """True when the model itself ended the text; only complete rollouts vote by default."""
        return self is Finish.STOP


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStamp:
    """Which weights made something. `version` grows with every change: it is the number of training steps done, and one more per
    return to earlier weights. `fingerprint` hashes the tensors."""

    version: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Where a tree rollout left its parent: the parent's index in the group and the number of tokens they share."""

    parent: int
    """`Rollout.index` of the rollout it left"""
    at: int
    """Completion tokens before the fork, which are the parent's; token `at` is the first one drawn anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled answer.

    Example: 4 tokens, the last one EOS:
        token_ids [9, 3, 7, 2]   logprobs [-0.1, -0.7, -0.0, -0.2]   text "85"   finish STOP
    """

    prompt_id: str
    index: int
    """Position in the group; with the run seed, step and prompt id it determines the rollout's random stream."""
    token_ids: IntArray
    """[T] completion tokens, the end-of-sequence token included when there is one."""
    logprobs: FloatArray
    """[T] log-probs under the sampler's weights, after temperature, over the full vocabulary."""
    entropy: FloatArray | None
    """[T] entropy in nats of the next-token distribution, when something needs it."""
    self_certainty: FloatArray | None = None
    """[T] KL(uniform || next-token distribution) in nats, after temperature, when something needs it."""
    text: str
    finish: Finish
    weights: WeightStamp
    fork: Fork | None = None

    @property
    def drawn(self) -> int:
        """Tokens that were sampled for this rollout itself: all of them, or those after its fork."""
        return len(self.token_ids) - (0 if self.fork is None else self.fork.at)


def tree_roots(rollouts: Sequence[Rollout]) -> list[int]:
    """[V] index of the rollout at the root of each rollout's tree; its own index for one that left no other.

    Example: indices 0, 1, 2 with forks none, none, (parent 0) -> [0, 1, 0]
    """
    parents = {r.index: r.index if r.fork is None else r.fork.parent for r in rollouts}
    roots = []
    for rollout in rollouts:
        root = rollout.index
        while parents[root] != root:
            root = parents[root]
        roots.append(root)
    return roots


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All rollouts of one prompt: the unit of work everywhere."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    """[V]"""
    trainable: BoolArray
    """[V] which rollouts were drawn, by seed, to be trained on (`train_per_prompt` of `votes_per_prompt`)."""
    probes: tuple[Rollout, ...] = ()
    """[K] extra generations an objective asked for; they never vote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A group after its reward.

    Example: texts "5", "5", "7", "" ->
        classes [0, 0, 1, -1]   label "5"   share 2/3   margin 1/3   rewards [1, 1, 0, 0]   train [1, 1, 1, 1]
    A group that abstains has train all False; one without a label has label None.
    """

    group: Group
    rewards: FloatArray
    """[V]"""
    train: BoolArray
    """[V] may this rollout be trained on? Subset of `group.trainable`."""
    classes: IntArray
    """[V] equivalence class of the answer, numbered from 0; NO_ANSWER for none."""
    answers: tuple[str | None, ...]
    """[V] the extracted answers."""
    label: str | None
    share: float
    """Votes for the label divided by valid votes, in [0, 1]; 0 when nobody answered."""
    margin: float
    """Share of the label minus share of the runner-up."""
    token_rewards: tuple[FloatArray, ...] | None = None
    """[V][T] optional rewards per token, added to the token's advantage by objectives that use them."""
    probe_rewards: FloatArray | None = None
    """[K] one per probe of the group, 1 where it gives the label; None without a label, or without probes."""
    metrics: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    trace: tuple[str, ...] = ()
    """Why, in words, for the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One rollout as the trainer sees it: numbers per token, no text, no answers."""

    prompt_ids: IntArray
    """[P]"""
    completion_ids: IntArray
    """[T]"""
    sampler_logprobs: FloatArray
    """[T]"""
    advantages: FloatArray
    """[T]"""
    weights: FloatArray
    """[T] weight of each token in the loss; 0 leaves a token out of the policy term and of the denominator."""
    group: str
    """Prompt id. Samples of one group share their prompt tokens, which the trainer may compute once."""
    entropy: FloatArray | None = None
    """[T] the sampler's entropies in nats, when a part of the objective needs them. They are not packed."""
    extras: Mapping[str, FloatArray] = field(default_factory=lambda: _EMPTY)
    """[T] each: named numbers per token that the loss will see again. All samples of a step carry the same names."""
    images: tuple[ImageFile, ...] = ()
    """Of the prompt; equal for all samples of a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The samples of one group inside a PackedBatch: one prompt, several completions."""

    prompt_ids: IntArray
    """[P]"""
    lengths: IntArray
    """[R] completion lengths; the tokens of row r lie one after the other in the flat arrays."""
    images: tuple[ImageFile, ...] = ()
    """Of the prompt. Pixels are made where the forward pass runs, once per segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch. Flat arrays hold completion tokens only, segment after segment, row after row."""

    segments: tuple[Segment, ...]
    """[S] prompts stand once per segment: the shared-prefix layout."""
    completion_ids: IntArray
    """[N]"""
    sampler_logprobs: FloatArray
    """[N]"""
    advantages: FloatArray
    """[N]"""
    weights: FloatArray
    """[N]"""
    tokens_in_step: float
    """Sum of the weights over every micro-batch of every rank of this update, unless the objective says otherwise: the one
    denominator."""
    extras: Mapping[str, FloatArray] = field(default_factory=lambda: _EMPTY)
    """[N] each, see `Sample.extras`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one trainer step reports; each metric was reduced by the rule named when it was recorded."""

    metrics: Mapping[str, float]
    tokens: int
    """Tokens that went through the model, prompts counted as often as they were computed."""
    grad_norm: float
    """Before clipping; the maximum over the updates of the step."""
    lr: float
    updates: int
    may_stand: bool = False
    """The weights may be those of before on purpose: a stabilizer vetoed an update, or put everything back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """How to draw tokens. `temperature` 0 is greedy; top_p, top_k, min_p other than the defaults bias log-ratios."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    entropy: bool = False
    """Record entropies too (costs one more pass over the vocabulary)."""
    self_certainty: bool = False
    """Record self-certainties too (likewise)."""

    @property
    def is_truncated(self) -> bool:
        """True when sampling is not from the full softmax."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One rollout to make. Requests with the same context are sampled together and share its KV cache."""

    prompt: Prompt
    index: int
    seed: int
    """64-bit, from `ttrl.seeds.derive`; two requests with one seed and one context give the same tokens."""
    spec: SamplingSpec
    prefix: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Completion tokens that are already fixed; the engine continues after them.

    Its rollout holds the new tokens only, at most `spec.max_new_tokens` of them, and their log-probs and entropies; its text is
    that of prefix and new tokens together.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A LoRA adapter without its tensors."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of the adapted modules, such as "model.layers.0.self_attn.q_proj"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Answer to a ping."""

    ok: bool
    weights: WeightStamp
    detail: str = ""
