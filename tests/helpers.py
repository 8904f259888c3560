"""Builders for tests that need no torch: prompts, rollouts, groups, and a tokenizer of characters."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.types import NO_ANSWER, Finish, Group, Message, Prompt, Rollout, Scored, WeightStamp

STAMP = WeightStamp(version=0, fingerprint="scripted")
EOS_ID = 1


class FakeTokenizer:
    """One token per character: its code point + 2. 0 is the beginning of a sequence, 1 its end."""

    eos_token_id: int | None = EOS_ID
    pad_token_id: int | None = EOS_ID

    def __init__(self, *, chat: bool = True) -> None:
        self.chat_template: str | None = "fake" if chat else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(char) + 2 for char in text]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        special = {0: "<s>", 1: "</s>"}
        return "".join(
            chr(int(t) - 2) if t > 1 else "" if skip_special_tokens else special[int(t)] for t in list(token_ids)
        )

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> str:
        assert not tokenize
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)
        return turns + "<assistant>" * add_generation_prompt


def make_prompt(identifier: str = "p", text: str = "question") -> Prompt:
    ids = FakeTokenizer().encode(text)
    return Prompt(id=identifier, messages=(Message(role="user", content=text),), token_ids=np.asarray(ids, np.int32))


def make_rollout(
    text: str, index: int = 0, *, prompt_id: str = "p", finish: Finish = Finish.STOP, tokens: int | None = None
) -> Rollout:
    count = len(text) + 1 if tokens is None else tokens
    return Rollout(
        prompt_id=prompt_id, index=index, token_ids=np.full(count, 5, np.int32),
        logprobs=np.full(count, -0.5, np.float32), entropy=None, text=text, finish=finish, weights=STAMP,
    )  # fmt: skip


def make_group(
    texts: Sequence[str], *, finishes: Sequence[Finish] | None = None, trainable: Sequence[bool] | None = None,
    entropies: Sequence[float] | None = None, identifier: str = "p",
) -> Group:  # fmt: skip
    finishes = finishes or [Finish.STOP] * len(texts)
    rollouts = [make_rollout(t, i, finish=f) for i, (t, f) in enumerate(zip(texts, finishes, strict=True))]
    if entropies is not None:
        rollouts = [
            replace(r, entropy=np.full(len(r.token_ids), e, np.float32))
            for r, e in zip(rollouts, entropies, strict=True)
        ]
    return Group(
        prompt=make_prompt(identifier),
        rollouts=tuple(rollouts),
        trainable=np.asarray([True] * len(texts) if trainable is None else trainable, dtype=np.bool_),
    )


def boxed(answers: Sequence[object]) -> list[str]:
    """Texts that end in these boxed answers; an empty answer gives a text without one."""
    return [f"so \\boxed{{{answer}}}" if answer != "" else "I give up" for answer in answers]


def make_scored(classes: Sequence[int], rewards: Sequence[float] | None = None, **fields: Any) -> Scored:
    """A scored group with these classes; share and margin follow from them."""
    group = fields.pop("group", None) or make_group([""] * len(classes))
    counts = sorted((list(classes).count(c) for c in set(classes) - {NO_ANSWER}), reverse=True)
    votes = sum(counts)
    defaults: dict[str, Any] = {
        "rewards": np.asarray(rewards if rewards is not None else np.zeros(len(classes)), np.float32),
        "train": group.trainable.copy(),
        "classes": np.asarray(classes, np.int32),
        "answers": tuple(None if c == NO_ANSWER else str(c) for c in classes),
        "label": "0",
        "share": counts[0] / votes if votes else 0.0,
        "margin": (counts[0] - sum(counts[1:2])) / votes if votes else 0.0,
    }
    return Scored(group=group, **{**defaults, **fields})


def context(seed: int = 0) -> RewardContext:
    return RewardContext(step=0, seed=seed)


@contextmanager
def ends_at_all(seconds: int = 60) -> Iterator[None]:
    """Fails instead of hanging. The bound is hundreds of times what the code needs; it tells linear from quadratic."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
