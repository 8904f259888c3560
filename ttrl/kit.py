"""The contract kit: is this reward safe to train on? Every built-in reward passes it, and `ttrl check ./file.py` runs it.

The groups are synthetic and their answers known, so each check is a statement about all rewards, whatever they reward.
"""

from __future__ import annotations

import os
import pickle
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from ttrl.contract import SYNTHETIC_META, check_scored
from ttrl.protocols import Reward, RewardContext
from ttrl.types import Finish, Group, Message, Prompt, Rollout, Scored, WeightStamp

DEADLINE_SECONDS = 30.0
"""For one check, which scores at most a dozen groups; what takes longer hangs."""
CPU_SECONDS_PER_GROUP = 2.0
"""For a group of 64 votes of 2,000 characters each."""
DATA_FILES = frozenset({".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".yaml", ".yml", ".arrow"})
LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
CONTEXT = RewardContext(step=3, seed=11)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the table. `problem` is None when the check passed."""

    check: str
    problem: str | None


def examine(make: Callable[[], Reward], answers: Sequence[str] | None = None) -> list[Finding]:
    """Run every check on fresh instances from `make`. `answers` are three canonical answers its extractor can read."""
    kit = Kit(make, tuple(answers or default_answers(make)))
    findings = []
    for name, check in kit.checks().items():
        findings.append(Finding(check=name, problem=_in_time(check)))
    return findings


def default_answers(make: Callable[[], Reward]) -> Sequence[str]:
    """Three answers that the reward understands: its own `examples`, what its reader reads, or numbers."""
    try:
        reward = make()
    except Exception:  # noqa: BLE001 - the plug-in is a stranger; the first check reports what it raised
        return ("12", "7", "345")
    examples = getattr(reward, "examples", ())
    if len(examples) >= 3:
        return [str(example) for example in examples[:3]]
    reader = getattr(reward, "reader", None)
    labels = (getattr(reader, "options", None) or {}).get("labels")
    if labels and len(labels) >= 2:
        return [str(label) for label in (*labels, labels[0])[:3]]
    return ("A", "B", "C") if getattr(reader, "kind", "math") == "choice" else ("12", "7", "345")


class Kit:
    """The checks of one reward. Each returns what is wrong, or None."""

    def __init__(self, make: Callable[[], Reward], answers: tuple[str, ...]) -> None:
        self._make, self._answers = make, answers

    def checks(self) -> dict[str, Callable[[], str | None]]:
        return {
            "declares needs and min_votes": self.declares,
            "right lengths, finite numbers": self.contract,
            "deterministic": self.deterministic,
            "independent of the order": self.equivariant,
            "leaves the group alone": self.pure,
            "nobody answered": self.nobody,
            "one answer": self.one,
            "all the same": self.unanimous,
            "picklable": self.picklable,
            "in time": self.timely,
            "never sees labels": self.blind,
        }

    def declares(self) -> str | None:
        reward = self._make()
        needs, least = getattr(reward, "needs", None), getattr(reward, "min_votes", None)
        if not isinstance(needs, set | frozenset) or not all(isinstance(need, str) for need in needs):
            return f"needs must be a frozenset of names such as frozenset() or frozenset({{'entropy'}}), got {needs!r}"
        return (
            None if isinstance(least, int) and least >= 1 else f"min_votes must be a whole number >= 1, got {least!r}"
        )

    def contract(self) -> str | None:
        for group in self.groups():
            self.score(group)
        return None

    def deterministic(self) -> str | None:
        for group in self.groups():
            if (what := difference(self.score(group), self.score(group))) is not None:
                return f"two calls with the same group and seed differ in {what}; draw from ctx.seed only"
        return None

    def equivariant(self) -> str | None:
        order = np.random.default_rng(0)
        for group in self.groups():
            once = self.score(group)
            for _ in range(3):
                p = order.permutation(len(group.rollouts))
                shuffled = replace(group, rollouts=tuple(group.rollouts[i] for i in p), trainable=group.trainable[p])
                if (what := difference(once, self.score(shuffled), p)) is not None:
                    return f"{what} changed when the rollouts were shuffled"
        return None

    def pure(self) -> str | None:
        for group in self.groups():
            before = content(group)
            self.score(group)
            if content(group) != before:
                return "the reward changed the group it was given; copy arrays before writing to them"
        return None

    def nobody(self) -> str | None:
        for texts in (["I give up."] * self.size, [""] * self.size):
            if (label := self.score(self.group(texts)).label) is not None:
                return f"nobody answered, and yet the label is {label!r}; abstain with label None"
        return None

    def one(self) -> str | None:
        answer = self._answers[0]
        label = self.score(self.group([answered(answer)] + ["I give up."] * (self.size - 1))).label
        return None if label in (None, answer) else f"the only answer was {answer!r}, the label is {label!r}"

    def unanimous(self) -> str | None:
        answer = self._answers[0]
        label = self.score(self.group([answered(answer)] * self.size)).label
        return None if label in (None, answer) else f"all answered {answer!r}, the label is {label!r}"

    def picklable(self) -> str | None:
        reward, group = self._make(), self.groups()[0]
        again: Reward = pickle.loads(pickle.dumps(reward))  # noqa: S301 - what was pickled one call before
        what = difference(self.checked(reward, group), self.checked(again, group))
        return None if what is None else f"{what} changed after pickling; workers would score differently"

    def timely(self) -> str | None:
        votes = [f"{'so it goes on, and on. ' * 85}{answered(self._answers[i % 3])}" for i in range(64)]
        reward, group = self._make(), self.group(votes)
        self.checked(reward, group)  # the first call may import
        start = time.process_time()
        self.checked(reward, group)
        seconds = time.process_time() - start
        return None if seconds <= CPU_SECONDS_PER_GROUP else f"64 votes took {seconds:.1f} s of CPU time"

    def blind(self) -> str | None:
        if "labels" in getattr(self._make(), "needs", ()):
            return "it asks for labels; that is an upper bound to compare with, not a label-free reward"
        for group in self.groups():
            for column in ("answer", "label", "solution", "gold"):
                told = replace(group, prompt=replace(group.prompt, meta={**SYNTHETIC_META, column: self._answers[1]}))
                with Watch("while scoring") as seen:
                    scored = self.checked(self._make(), told)
                if seen.problems:
                    return seen.problems[0]
                if difference(self.score(group), scored) is not None:
                    return f"the result depends on prompt.meta[{column!r}]"
        return None

    @property
    def size(self) -> int:
        return max(8, getattr(self._make(), "min_votes", 2))

    def groups(self) -> list[Group]:
        """A clear vote, a tie, a group with silence, all different, and one of which half is trained on."""
        a, b, c = (answered(answer) for answer in self._answers)
        n = self.size
        mixed = ([a, a, a, b, "I give up.", a, c, b] * n)[:n]
        return [
            self.group(([a, a, b, a, c, a, b, a] * n)[:n]),
            self.group(([a, b] * n)[:n]),
            self.group(mixed),
            self.group(mixed, trainable=np.arange(n) % 2 == 0),
            self.group(mixed, finish=Finish.LENGTH),
            self.group(([a, b, c] + ["I give up."] * n)[:n]),
        ]

    def group(self, texts: Sequence[str], trainable: Any = None, finish: Finish = Finish.STOP) -> Group:
        """Every third rollout ends as `finish` says; log-probs and entropies differ between rollouts."""
        rollouts = []
        for i, text in enumerate(texts):
            tokens = 5 + i % 4
            rollouts.append(
                Rollout(
                    prompt_id="kit", index=i, token_ids=np.arange(tokens, dtype=np.int32), text=text,
                    logprobs=np.full(tokens, -0.1 * (1 + i % 3), np.float32), finish=finish if i % 3 == 0 else Finish.STOP,
                    entropy=np.full(tokens, 0.2 * (1 + i % 5), np.float32), weights=WeightStamp(version=0, fingerprint="kit"),
                    self_certainty=np.full(tokens, 9.0 - i % 5, np.float32),
                )
            )  # fmt: skip
        prompt = Prompt(
            id="kit", messages=(Message(role="user", content="?"),), token_ids=np.arange(3, dtype=np.int32),
            meta=SYNTHETIC_META,
        )  # fmt: skip
        mask = np.ones(len(texts), np.bool_) if trainable is None else np.asarray(trainable, np.bool_)
        return Group(prompt=prompt, rollouts=tuple(rollouts), trainable=mask)

    def score(self, group: Group) -> Scored:
        return self.checked(self._make(), group)

    def checked(self, reward: Reward, group: Group) -> Scored:
        scored = reward(group, CONTEXT)
        if not isinstance(scored, Scored):
            raise TypeError(f"a reward returns ttrl.types.Scored, not {type(scored).__name__}")
        check_scored(scored, group)
        return scored


def answered(answer: str) -> str:
    return f"The final answer is \\boxed{{{answer}}}"


def content(group: Group) -> list[object]:
    """Everything a reward could write to, as values."""
    arrays: list[Any] = [group.trainable, group.prompt.token_ids]
    for r in group.rollouts:
        arrays += [a for a in (r.token_ids, r.logprobs, r.entropy, r.self_certainty) if a is not None]
    return [dict(group.prompt.meta), *((a.dtype, a.tobytes()) for a in arrays)]


def difference(one: Scored, two: Scored, order: Any = None) -> str | None:
    """The first field in which two results differ; `order` maps the rollouts of `two` to those of `one`."""
    p = np.arange(len(one.rewards)) if order is None else order
    if not np.allclose(one.rewards[p], two.rewards, atol=1e-6):
        return "rewards"
    if not np.array_equal(one.train[p], two.train):
        return "train"
    left, right = one.classes[p], two.classes
    if not np.array_equal(left[:, None] == left, right[:, None] == right) or not np.array_equal(left < 0, right < 0):
        return "classes"
    if [one.answers[i] for i in p] != list(two.answers):
        return "answers"
    if one.label != two.label:
        return "label"
    return None if np.allclose([one.share, one.margin], [two.share, two.margin]) else "share or margin"


class Watch:
    """Within the block, note every data file opened and every import of the evaluation package.

    Files of Python's own packages are no labels: libraries read their tables when they are imported.
    """

    active: list[Watch] = []  # noqa: RUF012 - the audit hook of the process reports to whoever is here
    hooked = False

    def __init__(self, when: str) -> None:
        self.when = when
        self.problems: list[str] = []

    def __enter__(self) -> Watch:
        if not Watch.hooked:
            sys.addaudithook(_audit)
            Watch.hooked = True
        Watch.active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Watch.active.remove(self)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not Watch.active or event not in ("open", "import"):
        return
    what, watch = arguments[0], Watch.active[-1]
    if event == "import" and str(what).startswith("ttrl.evaluate"):
        watch.problems.append(f"it imported {what}, where labels are read")
    if (
        event == "open"
        and isinstance(what, str | bytes | os.PathLike)
        and PurePath(os.fsdecode(what)).suffix in DATA_FILES
    ):
        path = os.path.abspath(os.fsdecode(what))
        library = path.startswith(LIBRARIES) and f"{os.sep}assets{os.sep}" not in path
        if not library and PurePath(path).parent.suffix not in (".dist-info", ".egg-info"):
            watch.problems.append(
                f"it opened {os.fsdecode(what)} {watch.when}; a reward sees the group and its options, nothing else"
            )


def _in_time(check: Callable[[], str | None]) -> str | None:
    """What the check says; what it raised; or that it did not end. Off the main thread, as workers score."""
    said: list[str | None] = []

    def run() -> None:
        try:
            said.append(check())
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything, and the table must name it
            said.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    return said[0] if said else f"not done after {DEADLINE_SECONDS:.0f} s"
