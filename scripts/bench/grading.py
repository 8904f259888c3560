"""Seconds to sort 100 groups of 64 answers into classes, and to grade every vote against its group's label with math-verify.

    python scripts/bench/grading.py            # both, in one run; the second on a sample of groups, scaled up
    python scripts/bench/grading.py --all      # the second on every group

The answers are drawn from a fixed seed: 60 % of a group spell its right answer in one of several ways, the rest spell wrong ones;
numbers, fractions, surds, multiples of pi, polynomials, tuples, intervals, logarithms and lines, as in competitions. Ours is timed
warm: servers started, but no answer of the run seen before. math-verify runs as its users run it, `parse` and `verify` with their
own time-outs in the main thread, after a warm-up; the label is parsed once per group.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable

from math_verify import parse, verify

from ttrl.rewards.equivalence import forget, grade
from ttrl.rewards.sandbox import shared_sandbox

Spellings = list[str]
RIGHT_SHARE, WRONG_ANSWERS = 0.6, 5


def integer(rng: random.Random) -> Spellings:
    n = rng.randint(1, 999)
    return [f"{n}", f"{n}.0", f"x={n}", f"\\text{{{n}}}", f"{n}.", f"${n}$"]


def thousands(rng: random.Random) -> Spellings:
    n = rng.randint(1000, 99_999)
    return [f"{n}", f"{n:,}", f"{n // 1000}{{,}}{n % 1000:03d}", f"{n}.00"]


def fraction(rng: random.Random) -> Spellings:
    a, b = rng.randint(1, 99), rng.choice([2, 4, 5, 8, 10])
    return [f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"{a / b}", f"\\dfrac{{{a}}}{{{b}}}", f"\\frac{{{2 * a}}}{{{2 * b}}}"]


def surd(rng: random.Random) -> Spellings:
    k, n = rng.randint(2, 12), rng.choice([2, 3, 5, 6, 7, 10])
    return [f"{k}\\sqrt{{{n}}}", f"\\sqrt{{{k * k * n}}}", f"{k} \\sqrt{{{n}}}", f"\\frac{{{k * n}}}{{\\sqrt{{{n}}}}}"]


def multiple_of_pi(rng: random.Random) -> Spellings:
    a, b = rng.randint(1, 40), rng.choice([1, 2, 3, 4])
    return [f"\\frac{{{a}\\pi}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}\\pi", f"{a}\\pi/{b}"]


def polynomial(rng: random.Random) -> Spellings:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return [f"(x+{a})(x+{b})", f"x^2+{a + b}x+{a * b}", f"x^{{2}} + {a + b}x + {a * b}"]


def pair(rng: random.Random) -> Spellings:
    a, b = rng.randint(-9, 9), rng.randint(1, 9)
    return [f"({a},{b})", f"({a}, {b})", f"\\left({a}, {b}\\right)"]


def interval(rng: random.Random) -> Spellings:
    a = rng.randint(2, 30)
    return [f"[{a},\\infty)", f"[{a}, \\infty)", f"\\left[{a},\\infty\\right)"]


def logarithm(rng: random.Random) -> Spellings:
    k, n = rng.randint(2, 5), rng.choice([2, 3, 5, 7])
    return [f"{k}\\ln {n}", f"\\ln {n**k}", f"{k}\\ln({n})"]


def line(rng: random.Random) -> Spellings:
    a, b = rng.randint(2, 9), rng.randint(1, 20)
    return [f"y={a}x+{b}", f"y = {a}x + {b}", f"{a}x-y+{b}=0"]


MIX: list[tuple[Callable[[random.Random], Spellings], int]] = [
    (integer, 46), (thousands, 5), (fraction, 15), (surd, 10), (multiple_of_pi, 6), (polynomial, 4), (pair, 6), (interval, 3),
    (logarithm, 3), (line, 2),
]  # fmt: skip


def group(rng: random.Random, votes: int) -> tuple[str, list[str]]:
    """The label and the votes of one prompt."""
    kind = rng.choices([make for make, _ in MIX], [weight for _, weight in MIX])[0]
    right, wrong = kind(rng), [kind(rng) for _ in range(WRONG_ANSWERS)]
    return right[0], [rng.choice(right if rng.random() < RIGHT_SHARE else rng.choice(wrong)) for _ in range(votes)]


def against_label(label: str, votes: list[str]) -> list[bool]:
    """What math-verify's users do."""
    gold = parse(f"\\boxed{{{label}}}")
    return [verify(gold, parse(f"\\boxed{{{vote}}}")) for vote in votes]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--groups", type=int, default=100)
    arguments.add_argument("--votes", type=int, default=64)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--all", action="store_true", help="grade every group with math-verify, not every tenth")
    options = arguments.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rng = random.Random(options.seed)
    groups = [group(rng, options.votes) for _ in range(options.groups)]

    shared_sandbox().run([("math", "1+1")] * 8)  # starts both servers
    against_label(*groups[0])
    forget()
    start = time.perf_counter()
    ours = [grade(votes, "math") for _, votes in groups]
    ours_seconds = time.perf_counter() - start

    sample = list(range(0, len(groups), 1 if options.all else 10))
    start = time.perf_counter()
    theirs = [against_label(*groups[i]) for i in sample]
    theirs_seconds = (time.perf_counter() - start) * len(groups) / len(sample)

    agree = total = 0
    for index, verdicts in zip(sample, theirs, strict=True):
        label, votes = groups[index]
        labels_class = grade([label, *votes], "math").classes
        agree += sum((c == labels_class[0]) == verdict for c, verdict in zip(labels_class[1:], verdicts, strict=True))
        total += len(verdicts)
    print(f"{options.groups} groups x {options.votes} votes, seed {options.seed}")
    print(f"classes            {ours_seconds:8.2f} s   {sum(len(g.forms) for g in ours)} classes, "
          f"{sum(g.timeouts for g in ours)} time-outs, {sum(g.gated for g in ours)} gated")  # fmt: skip
    print(f"verify per vote    {theirs_seconds:8.2f} s   {'' if options.all else f'from {len(sample)} groups'}")
    print(f"ratio              {theirs_seconds / ours_seconds:8.1f}     verdicts that agree: {agree} of {total}")


if __name__ == "__main__":
    main()
