"""How much one step samples and trains on, and how that is cut into micro-batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ttrl.config.load import bundled
from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.plan.shape import ModelShape
from ttrl.prompts import PromptRecord, read_prompts
from ttrl.templates import INSTRUCTIONS

MEAN_SHARE = 0.5
"""Mean completion length as a share of max_new_tokens, unless given. An assumption: short answers are far below, hard
competition problems of a base model near 0.9."""
PROMPT_GUESS = 256
"""Tokens of the longest prompt when the prompts are not at hand."""
CHAT_TOKENS = 32
"""What a chat template adds around one turn: system line and role markers of the Qwen and Llama templates, rounded up."""
CHARACTERS_PER_TOKEN = 3.0
"""English text and LaTeX, low enough to err on the side of too many tokens; used without a tokenizer.json only."""
_ROWS_READ, _COUNTED = 2000, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step of a recipe in tokens."""

    prompts: int
    """groups per step"""
    votes: int
    trained: int
    """rollouts per group that are trained on"""
    prompt: int
    """tokens of the longest prompt"""
    longest: int
    """max_new_tokens"""
    mean: float
    """expected tokens of a completion"""
    budget: int
    """tokens_per_microbatch"""
    updates: int
    steps: int
    notes: tuple[str, ...] = ()

    @property
    def rollouts(self) -> int:
        return self.prompts * self.votes

    @property
    def rollout_tokens(self) -> float:
        """Of one step."""
        return self.rollouts * self.mean

    @property
    def train_tokens(self) -> float:
        """Computed by the trainer in one step, each prompt once per group."""
        return self.prompts * (self.prompt + self.trained * self.mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Segments of equal rows: what the trainer holds at once."""

    segments: tuple[int, ...]
    """rows of each"""
    prompt: int
    longest: int
    shared: bool
    """each prompt runs once per segment"""

    @property
    def rows(self) -> int:
        return sum(self.segments)

    @property
    def suffix(self) -> int:
        """Tokens per row beyond the prompt that go through the model: the last one predicts nothing."""
        return self.longest - 1

    @property
    def computed(self) -> int:
        """Tokens that go through the layers."""
        prompts = len(self.segments) if self.shared else self.rows
        return prompts * self.prompt + self.rows * self.suffix

    @property
    def scored(self) -> int:
        """Completion tokens, the ones that reach the vocabulary."""
        return self.rows * self.longest


def read_work(recipe: Recipe, shape: ModelShape, *, mean_length: float | None, prompt_tokens: int | None) -> Work:
    """Raises ConfigError for lengths that do not fit the recipe or the model, and for prompts that are there but broken."""
    rollout, notes = recipe.rollout, []
    if mean_length is None:
        mean_length = MEAN_SHARE * rollout.max_new_tokens
        notes.append(
            f"mean completion {mean_length:g} tokens: {MEAN_SHARE:g} of max_new_tokens, an assumption (--mean-length)"
        )
    elif not 1 <= mean_length <= rollout.max_new_tokens:
        raise ConfigError(
            f"--mean-length {mean_length:g}: must lie between 1 and rollout.max_new_tokens ({rollout.max_new_tokens})"
        )
    if prompt_tokens is None:
        prompt_tokens, note = _longest_prompt(recipe)
        notes.append(note)
    if shape.positions is not None and prompt_tokens + rollout.max_new_tokens > shape.positions:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and rollout.max_new_tokens {rollout.max_new_tokens} do not fit into the "
            f"{shape.positions} positions of {shape.name}; lower rollout.max_new_tokens or set data.max_prompt_tokens"
        )
    taught = any(plug.use == "ema" and plug.options.get("votes", True) for plug in recipe.stabilizers)
    votes = rollout.votes_per_prompt + (
        rollout.trained if taught else 0
    )  # the policy's rollouts come on top of the teacher's
    if rollout.sampler.use == "tree":
        notes.append(
            "sampler tree: tokens that branches share are counted as if each had sampled them, which is too many"
        )
    if recipe.data.source.use == "refill":
        notes.append(
            "source refill: the groups it draws again are not counted, because nobody knows before how many; rollout/refilled of a "
            "short run says how many there are"
        )
    return Work(
        prompts=recipe.data.prompts_per_step, votes=votes, trained=rollout.trained, prompt=prompt_tokens,
        longest=rollout.max_new_tokens, mean=mean_length, budget=recipe.trainer.tokens_per_microbatch,
        updates=recipe.trainer.updates_per_step, steps=recipe.steps, notes=tuple(notes),
    )  # fmt: skip


def _longest_prompt(recipe: Recipe) -> tuple[int, str]:
    data = recipe.data
    limit = min(data.limit or _ROWS_READ, _ROWS_READ)
    file = bundled(data.prompts) or Path(data.prompts)
    if data.prompts.startswith("hub:") or not file.is_file():
        guess = data.max_prompt_tokens or PROMPT_GUESS
        return guess, f"longest prompt {guess} tokens: assumed, {data.prompts} was not read (--prompt-tokens)"
    records = read_prompts(
        data.prompts,
        prompt_field=data.prompt_field,
        id_field=data.id_field,
        images_field=data.images_field,
        limit=limit,
    )
    texts = sorted((_text(record, data.template) for record in records), key=len)[-_COUNTED:]
    longest, how = _count(texts, recipe.model.path)
    longest += CHAT_TOKENS if data.template in INSTRUCTIONS else 0
    shown = sum(bool(record.images) for record in records)
    if shown:
        how += f"; {shown} prompts have images, whose tokens are not counted (--prompt-tokens counts them)"
    return longest, f"longest prompt {longest} tokens: {how}"


def _text(record: PromptRecord, template: str) -> str:
    text = "\n".join(message.content for message in record.messages)
    if template.endswith(".txt"):
        try:
            return Path(template).read_text(encoding="utf-8") + text
        except OSError as error:
            raise ConfigError(f"data.template: {template} cannot be read: {error.strerror}") from None
    return text + INSTRUCTIONS.get(template, "")


def _count(texts: Sequence[str], path: str) -> tuple[int, str]:
    file = (bundled(path) or Path(path)) / "tokenizer.json"
    if not file.is_file():
        return round(
            len(texts[-1]) / CHARACTERS_PER_TOKEN
        ), f"{CHARACTERS_PER_TOKEN:g} characters each (no tokenizer.json)"
    from tokenizers import Tokenizer

    text = file.read_text(encoding="utf-8")
    try:
        json.loads(text)
    except ValueError as error:
        raise ConfigError(f"model.path {path!r}: tokenizer.json cannot be read: {error}") from None
    core = Tokenizer.from_str(text)
    return max(len(core.encode(prompt).ids) for prompt in texts), "counted with tokenizer.json"


@dataclass(frozen=True, slots=True)
class Cut:
    """One update of one rank in micro-batches."""

    kinds: tuple[MicroBatch, ...]
    """different ones only, in order of appearance: a large step has many of the same"""
    count: int
    segments: int


@lru_cache(maxsize=256)
def cut(work: Work, *, shared: bool, ranks: int = 1) -> Cut:
    """When every completion runs to its limit: as ttrl/trainers/packing.py does. A test holds it against `pack`."""
    groups = max(1, -(-work.prompts // (work.updates * ranks)))
    prompt, longest = work.prompt, work.longest
    at_once = (work.budget - prompt) // longest if shared else work.budget // (prompt + longest)
    at_once = min(work.trained, max(1, at_once))
    whole, rest = divmod(work.trained, at_once)
    parts = ([at_once] * whole + ([rest] if rest else [])) * groups
    batches: list[list[int]] = []
    room = 0
    for rows in parts:
        cost = prompt + rows * longest if shared else rows * (prompt + longest)
        if not batches or cost > room:
            batches.append([])
            room = work.budget
        batches[-1].append(rows)
        room -= cost
    kinds = dict.fromkeys(tuple(rows) for rows in batches)
    return Cut(
        kinds=tuple(MicroBatch(segments=rows, prompt=prompt, longest=longest, shared=shared) for rows in kinds),
        count=len(batches), segments=len(parts),
    )  # fmt: skip
