"""The canaries of a stream, and the gate that lets an update through only if they keep their answers.

Canaries are the first prompts of the stream on which the start model's votes agree well. Their answers then are the anchors. Before
the first update fresh votes measure how often even the start model disagrees with its own anchors; that rate plus `tolerance` is
the limit, which never moves again. No label is involved: a canary need not be right, it must not change.

Every update is tried on them. Votes are drawn in looks, equally many of each canary, until the evidence (`ttrl.modes.evidence`) that
the rate of disagreement is below the limit reaches ln(1 / a), which commits the update, or that it is above, which does not. An
update that is still undecided when the votes run out is not committed either. With a = level / steps the union bound gives, for a
whole stream and whatever it holds: with probability at least 1 - level no update is ever committed whose rate is above the limit, and
none is called harmful whose rate is below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ttrl.answers import Vote
from ttrl.modes.evidence import weigh
from ttrl.protocols import Pool
from ttrl.rewards.reader import AnswerReader
from ttrl.rollout.flat import vote_requests
from ttrl.seeds import derive
from ttrl.types import Prompt, SamplingSpec

LOOK = 4
"""Votes of each canary between two looks at the evidence."""
KEPT, LOST, UNDECIDED = "kept", "lost", "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the votes of the canaries said about one set of weights."""

    outcome: str
    """KEPT commits; LOST and UNDECIDED do not."""
    disagreeing: int
    votes: int
    changed: int
    """canaries whose own plurality is not their anchor"""
    tokens: int

    @property
    def rate(self) -> float:
        return self.disagreeing / self.votes


class Canaries:
    """Collects anchors, then judges weights by them."""

    def __init__(self, *, wanted: int, share: float, votes: int, tolerance: float) -> None:
        self._wanted, self._share, self._votes, self._tolerance = wanted, share, votes, tolerance
        self.anchors: dict[str, str] = {}
        """prompt id -> canonical text of the start model's answer"""
        self.limit: float | None = None
        """the rate of disagreement an update must be shown to be below; None before it was measured"""

    @property
    def complete(self) -> bool:
        """Enough anchors to measure the limit."""
        return len(self.anchors) >= self._wanted

    def offer(self, prompt_id: str, vote: Vote) -> None:
        """A prompt as the start model answered it; taken when its vote is clear and there is room."""
        if not self.complete and vote.answer is not None and vote.share >= self._share:
            self.anchors[prompt_id] = vote.answer

    def measure(self, panel: Panel) -> Verdict:
        """Fixes the limit by fresh votes of the start model: those that chose the anchors would flatter it."""
        count = panel.look(self._votes)
        self.limit = min(count.disagreeing / count.votes + self._tolerance, MAX_LIMIT)
        return count

    def judge(self, panel: Panel, level: float) -> Verdict:
        """Votes until decided, at most `votes` of each canary. `level` is the chance of either error."""
        assert self.limit is not None
        needed, count = math.log(1 / level), panel.look(0)
        while count.votes < self._votes * len(self.anchors):
            count = panel.look(min(LOOK, self._votes - panel.drawn))
            evidence = weigh(count.disagreeing, count.votes, self.limit)
            if max(evidence.below, evidence.above) >= needed:
                return replace(count, outcome=KEPT if evidence.below >= needed else LOST)
        return count

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"anchors": dict(self.anchors), "limit": self.limit}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.anchors, self.limit = dict(state["anchors"]), state["limit"]


MAX_LIMIT = 0.95


class Panel:
    """Draws votes of the canaries under the weights the engines hold now, look after look."""

    def __init__(
        self, prompts: Mapping[str, Prompt], anchors: Mapping[str, str], pool: Pool, reader: AnswerReader, spec: SamplingSpec,
        seed: int,
    ) -> None:  # fmt: skip
        self._prompts, self._anchors, self._pool, self._reader = prompts, anchors, pool, reader
        self._spec, self._seed = replace(spec, entropy=False, self_certainty=False), seed
        self._tallies: dict[str, list[str | None]] = {name: [] for name in anchors}
        """per canary the canonical answers so far; the anchor's own text for whatever equals it"""
        self._tokens = 0
        self.drawn = 0
        """votes of each canary so far"""

    def look(self, votes: int) -> Verdict:
        """Draw this many more votes of each canary and count all so far. Undecided until somebody weighs it."""
        requests = [
            request
            for name in self._anchors
            for request in vote_requests(self._prompts[name], self._spec, self._seed, self.drawn, votes)
        ]
        rollouts = self._pool.generate(requests) if requests else []
        for i, (name, anchor) in enumerate(self._anchors.items()):
            numbered, forms = self._reader.classes(self._reader.read(rollouts[i * votes : (i + 1) * votes]))
            same = self._reader.match_form(forms, anchor)
            named = [anchor if form == same else form for form in forms]
            self._tallies[name] += [None if c < 0 else named[c] for c in numbered]
        self._tokens += sum(len(rollout.token_ids) for rollout in rollouts)
        self.drawn += votes
        agreeing = sum(answers.count(self._anchors[name]) for name, answers in self._tallies.items())
        total = self.drawn * len(self._anchors)
        return Verdict(
            outcome=UNDECIDED, disagreeing=total - agreeing, votes=total, tokens=self._tokens,
            changed=sum(self._plurality(name) != anchor for name, anchor in self._anchors.items()),
        )  # fmt: skip

    def _plurality(self, name: str) -> str | None:
        """The leading answer of one canary; a tie with the anchor leaves it its answer."""
        answers = self._tallies[name]
        anchor = self._anchors[name]
        counts = {answer: answers.count(answer) for answer in answers if answer is not None}
        return max(counts, key=lambda a: (counts[a], a == anchor, a)) if counts else None


def panel_seed(run_seed: int, step: int) -> int:
    """Votes of the canaries are independent of those trained on, and of those of every other step."""
    return derive(run_seed, "canary", step)
