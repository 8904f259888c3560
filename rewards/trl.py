"""TRL in both directions: our rewards as `reward_funcs` of its trainers, and its reward functions as rewards of a recipe.

The calling convention is that of TRL 1.16 (GRPOTrainer._calculate_rewards): keyword lists `prompts`, `completions` and
`completion_ids` with one entry per completion, the other columns of the data set, `trainer_state`, `log_extra` and `log_metric`;
the answer is a list of numbers, None for "no opinion". TRL itself is not imported.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from ttrl.contract import check_scored
from ttrl.errors import ConfigError, PluginError
from ttrl.protocols import Reward, RewardContext
from ttrl.registry import resolve
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.vote import decide
from ttrl.seeds import derive
from ttrl.together import StepReward
from ttrl.types import Finish, Group, Message, Prompt, Rollout, Scored, WeightStamp

UNKNOWN_WEIGHTS = WeightStamp(version=0, fingerprint="trl")


class GroupReward:
    """A TRL reward function made of one of our rewards. See `reward_func`."""

    def __init__(self, reward: Reward, num_generations: int | None, eos: frozenset[int] | None, seed: int) -> None:
        if unknown := sorted(reward.needs):
            raise ValueError(f"the reward needs {', '.join(unknown)}, which TRL does not hand to reward functions")
        if isinstance(reward, StepReward):
            raise ValueError(
                "the reward looks at the groups of a step together, but TRL hands over one group at a time"
            )
        self._reward, self._size, self._eos, self._seed = reward, num_generations, eos, seed
        self.__name__ = type(reward).__name__
        """The name under which TRL logs it."""

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        step = int(getattr(trainer_state, "global_step", 0) or 0)
        paid: list[float | None] = []
        for start, stop in groups_of(prompts, self._size):
            group = self._group(prompts[start], completions[start:stop], completion_ids[start:stop])
            scored = self._reward(group, RewardContext(step=step, seed=derive(self._seed, step, group.prompt.id)))
            check_scored(scored, group)
            if scored.token_rewards is not None:
                raise PluginError(
                    "the reward pays single tokens, which TRL's reward functions cannot (restrain: set penalty: 0)"
                )
            paid += [float(r) if t else None for r, t in zip(scored.rewards, scored.train, strict=True)]
            if log_metric is not None:
                log_metric(f"{self.__name__}/share", scored.share)
                log_metric(f"{self.__name__}/labelled", float(scored.label is not None))
        return paid

    def _group(self, prompt: Any, completions: Sequence[Any], ids: Sequence[Sequence[int]]) -> Group:
        """One group as our rewards know it. `prompt` and completions are texts or lists of messages."""
        turns = [Message(role=m["role"], content=text_of([m])) for m in prompt] if isinstance(prompt, list) else None
        identifier = hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()[:16]
        rollouts = tuple(
            Rollout(
                prompt_id=identifier, index=i, token_ids=np.asarray(tokens, np.int32), text=text_of(completion),
                logprobs=np.zeros(len(tokens), np.float32), entropy=None, weights=UNKNOWN_WEIGHTS, finish=self._finish(tokens),
            )
            for i, (completion, tokens) in enumerate(zip(completions, ids, strict=True))
        )  # fmt: skip
        return Group(
            prompt=Prompt(
                id=identifier,
                messages=tuple(turns or [Message(role="user", content=str(prompt))]),
                token_ids=np.zeros(0, np.int32),
            ),
            rollouts=rollouts,
            trainable=np.ones(len(rollouts), np.bool_),
        )

    def _finish(self, tokens: Sequence[int]) -> Finish:
        complete = self._eos is None or (len(tokens) > 0 and int(tokens[-1]) in self._eos)
        return Finish.STOP if complete else Finish.LENGTH


def reward_func(
    reward: Reward, *, eos_token_id: int | Sequence[int] | None, num_generations: int | None = None, seed: int = 0
) -> GroupReward:
    """A callable for `GRPOTrainer(reward_funcs=...)` that scores whole groups.

    `eos_token_id`: a completion that does not end with it was cut off and does not vote (pass `tokenizer.eos_token_id`); None
    counts every completion as complete. `num_generations`: the size of a group; None takes each run of equal prompts as one
    group, which also fits an evaluation with another number, but joins a prompt that stands twice in a row in the data set.
    An abstention becomes None, which TRL keeps out of the group's baseline.

    TRL calls reward functions per process: every group must lie in one process, so `per_device_train_batch_size` times
    `steps_per_generation` must be a multiple of `num_generations`. With `num_generations` given, anything else raises ValueError,
    as does a reward that needs what TRL does not record (entropies). Log-probs are not available and are zero.
    """
    ids = None if eos_token_id is None else np.atleast_1d(np.asarray(eos_token_id)).tolist()
    return GroupReward(reward, num_generations, None if ids is None else frozenset(ids), seed)


def groups_of(prompts: Sequence[Any], size: int | None) -> Iterator[tuple[int, int]]:
    """[start, stop) of each group. Raises ValueError when blocks of `size` do not share one prompt."""
    if size is not None:
        for start in range(0, len(prompts), size):
            block = prompts[start : start + size]
            if len(block) != size or any(prompt != block[0] for prompt in block):
                raise ValueError(
                    f"{len(prompts)} completions are not whole groups of {size}: let each process hold whole groups, and leave "
                    "num_generations out of reward_func if evaluation uses another number"
                )
            yield start, start + size
        return
    start = 0
    for stop in range(1, len(prompts) + 1):
        if stop == len(prompts) or prompts[stop] != prompts[start]:
            yield start, stop
            start = stop


def text_of(message: Any) -> str:
    """The text of a completion: itself, or the contents of its messages (text parts only) one after the other."""
    if isinstance(message, str):
        return message
    texts = []
    for turn in message:
        content = turn.get("content") or ""
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts.append("".join(part.get("text") or "" for part in parts))
    return "\n".join(texts)


class TRLReward:
    """A TRL reward function in a recipe: `reward: {use: trl, with: {function: "package.module:func"}}`.

    `form: conversational` (default) hands over prompts and completions as lists of messages, `standard` as text. Columns of the
    prompts file that the recipe keeps arrive as lists. There are no labels: a function that wants a `solution` cannot run here.
    None and NaN abstain (the rollout is not trained on); `log_metric` fills the metrics of the group. The vote over the answers
    is recorded (share, margin, classes) but elects nobody: label None.
    Raises ConfigError for an unknown or asynchronous function, PluginError for a wrong number of rewards.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        function: str,
        form: Literal["conversational", "standard"] = "conversational",
        extractor: str = "math",
        options: dict[str, Any] | None = None,
    ) -> None:
        self._function = resolve("reward", function)
        if inspect.iscoroutinefunction(self._function):
            raise ConfigError(f"{function} is asynchronous; only synchronous TRL reward functions can be used")
        self._form = form
        self.reader = AnswerReader(extractor, options or {})

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        votes = len(group.rollouts)
        metrics: dict[str, float] = {}

        def log_metric(name: str, value: float) -> None:
            metrics[name] = float(value)

        raw = self._function(
            prompts=[self._prompt(group.prompt)] * votes,
            completions=[self._completion(rollout.text) for rollout in group.rollouts],
            completion_ids=[rollout.token_ids.tolist() for rollout in group.rollouts],
            trainer_state=None,
            log_extra=lambda column, values: None,
            log_metric=log_metric,
            **{column: [value] * votes for column, value in group.prompt.meta.items()},
        )
        if len(raw) != votes:
            raise PluginError(f"the TRL function returned {len(raw)} rewards for {votes} rollouts")
        silent = np.asarray([value is None or math.isnan(value) for value in raw])
        answers = self.reader.read(group.rollouts)
        classes, _ = self.reader.classes(answers)
        vote = decide(classes, tie_seed=ctx.seed)
        return Scored(
            group=group,
            rewards=np.asarray([0.0 if s else v for v, s in zip(raw, silent, strict=True)], np.float32),
            train=group.trainable & ~silent,
            classes=np.asarray(classes, np.int32),
            answers=answers,
            label=None,
            share=vote.share,
            margin=vote.margin,
            metrics=metrics,
            trace=(f"paid by a TRL function; {int(silent.sum())} of {votes} without an opinion",),
        )

    def _prompt(self, prompt: Prompt) -> Any:
        if self._form == "standard":
            return prompt.text
        return [{"role": message.role, "content": message.content} for message in prompt.messages]

    def _completion(self, text: str) -> Any:
        return text if self._form == "standard" else [{"role": "assistant", "content": text}]
