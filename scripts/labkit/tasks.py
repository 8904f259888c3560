"""What the lab runs: tasks, each with one protocol and one row per recipe, and what every row is to show.

A claim is what the method's paper, or the purpose of a control, promises; whether the numbers bear it out is
computed in `labkit.claims`, and nothing here knows an outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

START = "start"
"""As `against`: the same run before training."""
TOKENS = "tokens"
"""As `metric`: tokens sampled by training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`text`, as an order of two numbers: `metric` after training is `order` that of `against` (a row of the task, or START)."""

    text: str
    metric: str = "pass@1"
    order: str = ">"
    """> or <, or = for every single number the same"""
    against: str = START


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row: a recipe with changes of its own, run once per seed."""

    name: str
    recipe: str
    changes: tuple[str, ...] = ()
    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One table. The first entry is the one that the others are compared with."""

    name: str
    title: str
    about: str
    changes: tuple[str, ...]
    """the protocol, applied over every entry"""
    entries: tuple[Entry, ...]


PROTOCOL = (
    "steps=6", "data.limit=24", "data.prompts_per_step=8", "rollout.votes_per_prompt=16", "eval.limit=24", "eval.samples=16",
    "eval.k=[1,8,16]", "eval.heldout=null", "eval.every=0", "checkpoint.every=0", "log.groups_per_step=0",
)  # fmt: skip
GOLD = ("reward={use: gold, with: {extractor: math}}", "allow_labels=true")
TREE = "rollout.sampler={use: tree, with: {trees: 4, forks: 3, branches: 1, min_gap: 8}}"
RISES = Claim(text="the model learns from its own votes")


def above(against: str, text: str, metric: str = "pass@1") -> Claim:
    return Claim(text=text, metric=metric, against=against)


def below(against: str, text: str, metric: str = "pass@1") -> Claim:
    return Claim(text=text, metric=metric, order="<", against=against)


def reward(use: str, options: str = "") -> tuple[str]:
    return (f"reward={{use: {use}, with: {{extractor: math{options}}}}}",)


SUM = Task(
    name="sum",
    title="Sums",
    about="Three-digit additions, which the model has learned from traces with random slips. Every recipe at its own learning rate.",
    changes=PROTOCOL,
    entries=(
        Entry(name="vote", recipe="base/tiny", claims=(RISES,)),
        Entry(name="soft-vote", recipe="lab/soft-vote", claims=(RISES,)),
        Entry(
            name="tree", recipe="lab/ear", changes=(TREE,),
            claims=(below("vote", "shared prefixes save tokens", TOKENS), above("vote", "trees and reshaped advantages gain more")),
        ),
        Entry(name="spine", recipe="lab/spine", claims=(above("vote", "training forks alone gains more"),)),
        Entry(
            name="ttrv-published", recipe="lab/ttrv-published",
            claims=(Claim(text="as published its entropy term cancels: it is soft-vote", order="=", against="soft-vote"),),
        ),
        Entry(
            name="ttrv-loo", recipe="lab/ttrv-loo",
            claims=(above("soft-vote", "the acting entropy term makes answers agree faster", "majority_share"),),
        ),
        Entry(name="mrt", recipe="lab/mrt", claims=(RISES,)),
        Entry(
            name="limiting-confidence", recipe="lab/limiting-confidence",
            claims=(below("vote", "prompts with a clear vote are pushed less", "majority_share"),),
        ),
        Entry(
            name="answer-mask", recipe="lab/answer-mask",
            claims=(Claim(text="the reasoning alone carries the gain; the answer's own tokens get no gradient"),),
        ),
        Entry(name="rpc-vote", recipe="lab/rpc-vote", claims=(above("vote", "votes weighed by their probability teach more"),)),
        Entry(
            name="control: frozen", recipe="lab/control-frozen", claims=(below("vote", "labels of the start model teach less"),),
        ),
        Entry(name="control: random", recipe="lab/control-random", claims=(below("vote", "coins teach less"),)),
        Entry(name="control: incorrect", recipe="lab/control-incorrect", claims=(below("vote", "the runner-up teaches less"),)),
        Entry(name="control: gold", recipe="lab/control-gold", claims=(above("vote", "reference answers teach more"),)),
    ),
)  # fmt: skip

RATE = "trainer.lr=3.0e-4"
TOO_FAST = Task(
    name="too-fast",
    title="Too fast",
    about="The same sums at almost ten times the learning rate, 3e-4.",
    changes=PROTOCOL,
    entries=(
        Entry(name="vote", recipe="lab/collapse", claims=(Claim(text="the model is destroyed", order="<"),)),
        Entry(
            name="sentinel", recipe="lab/sentinel",
            claims=(above("vote", "it ends better than without a guard"), Claim(text="the run still ends above its start")),
        ),
        Entry(
            name="strong KL anchor", recipe="lab/collapse", changes=("stabilizers=[{use: kl, with: {coefficient: 0.1}}]",),
            claims=(above("vote", "a KL penalty a hundred times as strong loses less"),),
        ),
        Entry(
            name="EMA teacher votes", recipe="lab/ema-vote", changes=(RATE,),
            claims=(above("vote", "labels of a slow average lose less"),),
        ),
        Entry(
            name="control: gold", recipe="lab/control-gold", changes=(RATE,),
            claims=(Claim(text="right labels do not save it either: the rate is at fault, not the vote", order="<"),),
        ),
    ),
)  # fmt: skip

MISLED = Task(
    name="misled",
    title="Misled",
    about="Sums whose second number begins with a zero, a form the model was never trained on (`scripts/build_misled.py`); no prompt "
    "was picked by its label.",
    changes=PROTOCOL,
    entries=(
        Entry(
            name="vote", recipe="lab/misled",
            claims=(Claim(text="answers agree more", metric="majority_share"), Claim(text="right answers are lost", order="<")),
        ),
        Entry(
            name="soft-vote", recipe="lab/misled", changes=reward("soft_vote"),
            claims=(Claim(text="popular wrong answers are paid as well", order="<"),),
        ),
        Entry(
            name="selective", recipe="lab/misled", changes=reward("selective", ", min_share: 0.4, min_margin: 0.15, rare_share: 0.15"),
            claims=(above("vote", "labels for clear votes only do less harm"),),
        ),
        Entry(
            name="confident-vote", recipe="lab/misled", changes=reward("majority_vote", ", min_confidence: 0.95"),
            claims=(above("vote", "abstaining below confidence 0.95 does less harm"),),
        ),
        Entry(
            name="control: random", recipe="lab/misled", changes=reward("random", ", p: 0.5"),
            claims=(above("vote", "coins do less harm than wrong votes"),),
        ),
        Entry(
            name="control: incorrect", recipe="lab/misled", changes=reward("incorrect"),
            claims=(above("vote", "the runner-up is more often right than the majority"),),
        ),
        Entry(name="control: gold", recipe="lab/misled", changes=GOLD, claims=(above("vote", "reference answers teach more"),)),
    ),
)  # fmt: skip
TASKS: Sequence[Task] = (SUM, TOO_FAST, MISLED)
