"""Votes used and errors of every stopping rule, by simulation: the table of docs/adaptive-voting.md.

    python scripts/bench/adaptive.py --groups 2000 --votes 64 --wave 1

Classes are drawn from known distributions. "wrong" counts groups stopped before the budget whose leader is not the mode;
"other label" counts groups whose label differs from that of all the votes (a tie is no label).
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from ttrl.rollout.adaptive import AdaptiveSampler

RULES = ("lossless", "certified", "esc", "adaptive_consistency")
SPREAD = 10


def spread(share: float) -> list[float]:
    """One mode, the rest evenly over SPREAD other answers."""
    return [share, *[(1 - share) / SPREAD] * SPREAD]


CASES = {
    **{f"{p:.2f}, rest spread": spread(p) for p in (0.17, 0.3, 0.5, 0.7, 0.9, 1.0)},
    "0.45 vs 0.40": [0.45, 0.40, 0.05, 0.05, 0.05],
    "0.50 vs 0.35": [0.50, 0.35, 0.05, 0.05, 0.05],
    "0.70 vs 0.30": [0.70, 0.30],
}


def label(votes: list[int]) -> int | None:
    top = Counter(votes).most_common(2)
    return None if len(top) > 1 and top[0][1] == top[1][1] else top[0][0]


def simulate(rule: str, law: list[float], groups: int, votes: int, wave: int, seed: int) -> tuple[float, float, float]:
    """Mean votes, share of groups stopped early on a class that is not the mode, share with another label than the full vote."""
    sampler = AdaptiveSampler(votes, 1, lambda _: [], rule=rule, wave=wave)  # type: ignore[arg-type]
    used = wrong = other = 0
    for row in np.random.default_rng(seed).choice(len(law), size=(groups, votes), p=law).tolist():
        n = sampler.more([])
        while more := sampler.more(row[:n]):
            n += more
        used += n
        wrong += n < votes and label(row[:n]) != 0
        other += label(row[:n]) != label(row)
    return used / groups, wrong / groups, other / groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=2000)
    parser.add_argument("--votes", type=int, default=64)
    parser.add_argument("--wave", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| mode share | " + " | ".join(RULES) + " |\n|---|" + "---|" * len(RULES))
    for name, law in CASES.items():
        cells = []
        for rule in RULES:
            used, wrong, other = simulate(rule, law, args.groups, args.votes, args.wave, args.seed)
            cells.append(f"{used:.1f} / {wrong:.2%} / {other:.2%}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
