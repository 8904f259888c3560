"""Whether the numbers bear out what a row is to show. Nothing here knows which row it looks at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labkit.numbers import Matrix, Row, interval
from labkit.tasks import START, TOKENS, Claim
from ttrl.evaluate.evaluator import Estimate
from ttrl.sinks import show

SIGNS = {">": 1, "<": -1}
SHOWN, OPPOSITE, OPEN = "shown", "the opposite was measured", "cannot be told"


def direction(estimate: Estimate | None) -> int:
    """1 or -1 when the interval excludes 0, and 0 when it holds 0 or there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return 0
    return 1 if estimate.low > 0 else -1 if estimate.high < 0 else 0


def final_sentence(row: Row) -> str:
    """How pass@1 changed, and beside it the mean reward, which is all that the run itself sees."""
    change = interval(row.change("pass@1"))
    assert change is not None
    word = {1: "rises", -1: "falls", 0: "cannot be told from no change"}[direction(change)]
    first, last = np.asarray([one.rewards for one in row.ended]).mean(axis=0)
    return f"pass@1 {word} ({show(change, sign=True)}); mean reward of the first and last step {first:.3f}, {last:.3f}."


def claim_sentence(claim: Claim | None, row: Row, found: Sequence[Row]) -> str:
    """A claim and its verdict; without a claim, final pass@1 against that of the first row."""
    wanted = claim or Claim(text="", against=found[0].entry.name)
    other = next((r for r in found if r.entry.name == wanted.against), None)
    if wanted.against == START:
        differences = row.change(wanted.metric)
    elif other is None:
        return f"Claim ({wanted.text}): not compared, `{wanted.against}` was not asked for."
    elif wanted.metric == TOKENS:
        return f"Claim ({wanted.text}): {_tokens(wanted, row, other)}"
    else:
        differences = row.minus(other, wanted.metric)
    if not differences.size:
        return f"Claim ({wanted.text}): not compared, no seed is common with `{wanted.against}`."
    if wanted.order == "=":
        return f"Claim ({wanted.text}): {_same(differences, wanted)}"
    estimate = interval(differences)
    assert estimate is not None
    if (wanted.metric, wanted.against) == ("pass@1", START):  # these numbers are those of `final_sentence`
        return f"Claim ({wanted.text}): **{_verdict(direction(estimate), wanted.order, len(differences))}**."
    of_whom = f"final {wanted.metric} minus that of `{wanted.against}`" if other else f"change of {wanted.metric}"
    numbers = f"{of_whom} {show(estimate, sign=True)}"
    if claim is None:
        word = {1: "above it", -1: "below it", 0: OPEN}[direction(estimate)]
        return f"{numbers[0].upper()}{numbers[1:]}: {word}."
    return f"Claim ({claim.text}): **{_verdict(direction(estimate), claim.order, len(differences))}** ({numbers})."


def _verdict(sign: int, order: str, seeds: int) -> str:
    """Nothing is known of other seeds when there is one, and the verdict says so."""
    verdict = OPEN if sign == 0 else SHOWN if sign == SIGNS[order] else OPPOSITE
    return verdict if sign == 0 or seeds > 1 else f"{verdict}, on one seed"


def _same(differences: Matrix, claim: Claim) -> str:
    """Equality is no matter of intervals: every number of every prompt and seed must be the same."""
    other = int(np.count_nonzero(differences))
    numbers = f"final {claim.metric} against `{claim.against}`"
    if not other:
        return f"**{SHOWN}** ({numbers}: the same for all {differences.size} prompts and seeds)."
    return f"**not shown** ({numbers}: other for {other} of {differences.size} prompts and seeds, mean {differences.mean():+.3f})."


def _tokens(claim: Claim, row: Row, other: Row) -> str:
    """Tokens are counted, not estimated: shown when every seed has fewer (or more)."""
    theirs = {run.seed: run.tokens for run in other.ended}
    ratios = [run.tokens / theirs[run.seed] for run in row.ended if run.seed in theirs]
    if not ratios:
        return f"not compared, no seed is common with `{claim.against}`."
    sign = 1 if min(ratios) > 1 else -1 if max(ratios) < 1 else 0
    listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    return f"**{_verdict(sign, claim.order, len(ratios))}** (tokens per token of `{claim.against}`: {listed})."
