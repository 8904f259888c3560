"""What is wrong with a reward before a model is loaded: it is tried on synthetic groups and its advantages are looked at.

A finding is a warning. `ttrl check` prints it; the recipe still runs, because a control or an experiment may want just that.

    cancels     a term that is the same for the whole group and disappears when the group mean is subtracted
    no-signal   no synthetic group got an advantage other than 0
    phantom     advantages from rounding, from the epsilon of the standard deviation, or between rollouts with the same answer
                (unless the reward shows the term that differs between them: see `ExplainedReward`)
    order       another order of the same rollouts gives another label or other rewards
    votes       groups abstain at the recipe's number of votes, but not with more
    failed      the reward raised on a synthetic group;   skipped: its answers could not be imitated
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ttrl.config.schema import Recipe
from ttrl.contract import SYNTHETIC_META, check_scored
from ttrl.errors import PluginError
from ttrl.objectives import TokenizedObjective
from ttrl.probing import ProbingObjective
from ttrl.protocols import ExplainedReward, LabelledReward, Objective, Reward, RewardContext
from ttrl.registry import build
from ttrl.seeds import derive, generator
from ttrl.trainers.stabilizers.check import has_teacher
from ttrl.types import NO_ANSWER, Finish, Group, Message, Prompt, Rollout, Scored, WeightStamp

NEGLIGIBLE = 1e-4
"""Rewards that differ by less, relative to their size, do not mean to differ."""
VISIBLE = 1e-3
"""An advantage above this moves weights."""
RANDOM_GROUPS = 16

Advantages = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One warning."""

    code: str
    message: str


def lint_recipe(recipe: Recipe, reward: Reward) -> list[Finding]:
    """The reward of a checked recipe, under the recipe's objective and numbers of votes."""
    rollout = recipe.rollout
    teaching = has_teacher([build("stabilizer", plug) for plug in recipe.stabilizers])
    votes = rollout.votes_per_prompt + (rollout.trained if teaching else 0)
    objective = build("objective", recipe.objective)
    if isinstance(objective, ProbingObjective):
        objective = objective.base
    return lint(reward, objective, votes=votes, trained=rollout.trained, name=recipe.reward.use)


def lint(
    reward: Reward, objective: Objective, *, votes: int, trained: int | None = None, seed: int = 0, name: str = "reward"
) -> list[Finding]:
    """Try a reward on groups of `votes` synthetic rollouts, `trained` of them trainable (default: all). `reward` is not changed."""
    if isinstance(objective, TokenizedObjective):
        objective.take_tokenizer(_NoText())
    trial = _Trial(reward, objective, trained or votes, seed)
    if reward.min_votes > votes:
        return [Finding(code="votes", message=f"{name} needs {reward.min_votes} votes, the recipe draws {votes}")]
    writer = answer_writer(getattr(reward, "reader", None), getattr(reward, "examples", ()))
    if writer is None:
        return [Finding(code="skipped", message=f"{name} was not tried: answers of its kind could not be imitated")]
    try:
        groups = [trial.group(counts, votes, writer, i) for i, counts in enumerate(_profiles(votes, len(writer), seed))]
        results = [trial.score(group, writer) for group in groups]
        if all((r.classes == NO_ANSWER).all() for r in results):
            return [Finding(code="skipped", message=f"{name} was not tried: it read no answer in the synthetic groups")]
        found = [
            *_order(trial, groups, results, writer),
            *_phantoms(trial, results),
            *_cancelling(trial, groups, results),
        ]
        if all(np.abs(trial.advantages(r)).max(initial=0.0) <= VISIBLE for r in results):
            found.append(_no_signal(trial, writer, votes))
    except (ArithmeticError, AttributeError, LookupError, PluginError, RuntimeError, TypeError, ValueError) as error:
        return [Finding(code="failed", message=f"{name} raised on a synthetic group: {type(error).__name__}: {error}")]
    return [Finding(code=f.code, message=f"{name}: {f.message}") for f in found]


class _NoText:
    """The tokenizer of synthetic rollouts, whose token ids mean nothing."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return ""


class _Trial:
    """Scores synthetic groups on copies of the reward, so that state neither leaks in nor out."""

    def __init__(self, reward: Reward, objective: Objective, trained: int, seed: int) -> None:
        self.reward, self.objective, self._trained, self._seed = reward, objective, trained, seed

    def context(self, group: Group) -> RewardContext:
        return RewardContext(step=0, seed=derive(self._seed, "lint", group.prompt.id))

    def fresh(self, group: Group, writer: Mapping[str, str]) -> Reward:
        reward = copy.deepcopy(self.reward)
        if isinstance(reward, LabelledReward):
            reward.take_labels({group.prompt.id: next(iter(writer))})
        return reward

    def score(self, group: Group, writer: Mapping[str, str]) -> Scored:
        scored = self.fresh(group, writer)(group, self.context(group))
        check_scored(scored, group)
        return scored

    def advantages(self, scored: Scored) -> Advantages:
        """Of all trained tokens, one after the other. Empty where the objective needs probes, which only a model can make."""
        if not scored.train.any() or self.objective.probes(scored.group):
            return np.zeros(0)
        return np.concatenate([np.zeros(0), *(s.advantages for s in self.objective.samples(scored))])

    def group(self, counts: Sequence[int], votes: int, writer: Mapping[str, str], number: int) -> Group:
        """A group in which answer k was given `counts[k]` times and the rest is silent, in random order."""
        rng = generator(self._seed, "lint", number, votes)
        texts = [text for text, n in zip(writer.values(), counts, strict=False) for _ in range(n)]
        texts += ["I do not know"] * (votes - len(texts))
        identifier = f"synthetic-{number}"
        rollouts = []
        for index, place in enumerate(rng.permutation(votes)):
            length = int(rng.integers(3, 13))
            rollouts.append(
                Rollout(
                    prompt_id=identifier, index=index, token_ids=rng.integers(5, 99, length).astype(np.int32),
                    logprobs=-rng.exponential(0.5, length).astype(np.float32),
                    entropy=rng.exponential(0.7, length).astype(np.float32), text=texts[place], finish=Finish.STOP,
                    self_certainty=rng.exponential(9.0, length).astype(np.float32),
                    weights=WeightStamp(version=0, fingerprint="synthetic"),
                )
            )  # fmt: skip
        prompt = Prompt(
            id=identifier, messages=(Message(role="user", content="?"),), token_ids=np.zeros(1, np.int32), meta=SYNTHETIC_META
        )  # fmt: skip
        trainable = np.isin(np.arange(votes), rng.permutation(votes)[: min(self._trained, votes)])
        return Group(prompt=prompt, rollouts=tuple(rollouts), trainable=trainable)


def answer_writer(reader: Any, examples: Sequence[str] = ()) -> dict[str, str] | None:
    """Answer -> a text that gives it, for the kind the reader reads. None when the reader cannot tell two of them apart.

    `examples`: answers that the reward itself offers, because not every answer its reader can read means something to it.
    """
    kind, options = getattr(reader, "kind", "math"), getattr(reader, "options", {})
    forms: dict[str, Callable[[str], str]] = {"choice": "The answer is ({}).".format, "label": "{}".format}
    answers = list(examples) or [str(11 + 7 * k) for k in range(12)]
    if not examples and kind == "choice":
        answers = list(options.get("letters", "ABCD"))
    elif not examples and kind == "label":
        answers = [str(label) for label in options.get("labels", ())]
    texts = [forms.get(kind, r"The answer is \boxed{{{}}}.".format)(answer) for answer in answers]
    if reader is None:
        return dict(zip(answers, texts, strict=True))
    rollout = Rollout(
        prompt_id="", index=0, token_ids=np.zeros(1, np.int32), logprobs=np.zeros(1, np.float32), entropy=None, text="",
        finish=Finish.STOP, weights=WeightStamp(version=0, fingerprint=""),
    )  # fmt: skip
    classes, _ = reader.classes(reader.read([replace(rollout, text=text) for text in texts]))
    readable = {c: (a, t) for c, a, t in reversed(list(zip(classes, answers, texts, strict=True))) if c != NO_ANSWER}
    return dict(readable.values()) if len(readable) > 1 else None


def _profiles(votes: int, answers: int, seed: int) -> list[list[int]]:
    """Votes per answer: the edges first (unanimous, one dissenter, a tie, all different, silent), then random groups."""
    half, quarter = votes // 2, votes // 4
    edges = [
        [votes], [votes - 1, 1], [votes - quarter, quarter], [half, votes - half], [half, quarter, votes - half - quarter],
        [1] * min(votes, answers), [0], [max(2, half)], [votes - 2, 1], [1, 1],
    ]  # fmt: skip
    profiles = [[n for n in profile if n > 0] for profile in edges]
    for number in range(RANDOM_GROUPS):
        rng = generator(seed, "profile", number, votes)
        shares = rng.dirichlet(np.full(min(answers, 6) + 1, 0.6))  # the last share is silent
        profiles.append([int(n) for n in rng.multinomial(votes, shares)[:-1]])
    return profiles


def _order(
    trial: _Trial, groups: Sequence[Group], results: Sequence[Scored], writer: Mapping[str, str]
) -> list[Finding]:
    for number, (group, before) in enumerate(zip(groups, results, strict=True)):
        order = generator(number, "order").permutation(len(group.rollouts))
        shuffled = replace(group, rollouts=tuple(group.rollouts[i] for i in order), trainable=group.trainable[order])
        after = trial.score(shuffled, writer)
        if after.label != before.label:
            return [
                Finding(
                    code="order",
                    message=f"the label depends on the order of the rollouts ({before.label!r} or {after.label!r})",
                )
            ]
        equal = np.allclose(after.rewards, before.rewards[order], atol=1e-6)
        if not equal or not np.array_equal(after.train, before.train[order]):
            return [Finding(code="order", message="rewards depend on the order of the rollouts")]
    return []


def _phantoms(trial: _Trial, results: Sequence[Scored]) -> list[Finding]:
    found = {}
    for scored in results:
        rewards = scored.rewards[scored.train].astype(np.float64)
        largest = float(np.abs(trial.advantages(scored)).max(initial=0.0))
        spread = float(np.ptp(rewards)) if rewards.size else 0.0
        if largest <= VISIBLE or spread == 0.0:
            continue
        if spread <= NEGLIGIBLE * max(1.0, float(np.abs(rewards).max())):
            found["rounding"] = (
                f"rewards that differ by {spread:.1e} in a group become advantages of {largest:.2g}; "
                "round them, or abstain where they are meant to be equal"
            )
        elif len(set(scored.classes[scored.train].tolist())) == 1 and not _shown(trial, scored):
            silent = scored.classes[scored.train][0] == NO_ANSWER
            what = "of which none answered" if silent else "with the same answer"
            found[what] = (
                f"trained rollouts {what} get advantages up to {largest:.2g}: something other than the answer is paid there"
            )
    return [Finding(code="phantom", message=message) for message in found.values()]


def _shown(trial: _Trial, scored: Scored) -> bool:
    """The reward shows a term that differs between rollouts with this answer: it says itself that it pays for something else."""
    if not isinstance(trial.reward, ExplainedReward) or scored.classes[scored.train][0] == NO_ANSWER:
        return False
    terms = copy.deepcopy(trial.reward).terms(scored.group, trial.context(scored.group))
    return any(np.ptp(np.asarray(values, np.float64)[scored.train]) > NEGLIGIBLE for values in terms.values())


def _cancelling(trial: _Trial, groups: Sequence[Group], results: Sequence[Scored]) -> list[Finding]:
    if not isinstance(trial.reward, ExplainedReward):
        return []
    pairs = [(g, r) for g, r in zip(groups, results, strict=True) if r.train.any()]
    terms = [copy.deepcopy(trial.reward).terms(group, trial.context(group)) for group, _ in pairs]
    found = []
    for name in terms[0] if terms else ():
        values = [np.asarray(t[name], np.float64) for t in terms]
        constant = all(np.ptp(v[r.train]) <= 1e-9 for v, (_, r) in zip(values, pairs, strict=True))
        if not constant or not any(v.any() for v in values):
            continue
        without = [
            replace(r, rewards=(r.rewards - v).astype(np.float32)) for v, (_, r) in zip(values, pairs, strict=True)
        ]
        changes = [
            np.abs(trial.advantages(r) - trial.advantages(w)).max(initial=0.0)
            for (_, r), w in zip(pairs, without, strict=True)
        ]
        if max(changes) <= VISIBLE:
            found.append(
                Finding(
                    code="cancels",
                    message=f"the term {name!r} is the same for all rollouts of a group, so the group mean removes it: "
                    "advantages with and without it are equal",
                )
            )
    return found


def _no_signal(trial: _Trial, writer: Mapping[str, str], votes: int) -> Finding:
    """Nothing was learned from any group: because of too few votes, or at all?"""
    for factor in (2, 4, 8):
        more = votes * factor
        wide = _Trial(trial.reward, trial.objective, more, 0)
        easy = [
            wide.group(counts, more, writer, i)
            for i, counts in enumerate(([more - 1, 1], [more - math.ceil(more / 4), more // 4]))
        ]
        if any(np.abs(wide.advantages(wide.score(g, writer))).max(initial=0.0) > VISIBLE for g in easy):
            return Finding(
                code="votes",
                message=f"no group of {votes} votes gives it anything to learn from, but groups of {more} do",
            )
    return Finding(code="no-signal", message="no synthetic group got an advantage other than 0")


__all__ = ["Finding", "answer_writer", "lint", "lint_recipe"]
