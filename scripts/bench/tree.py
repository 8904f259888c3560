"""Tokens and labels of trees against independent rollouts at equal leaves: the table of docs/methods/ettrl.md.

    python scripts/bench/tree.py --trees 12 --forks 2 --branches 2 --min-gap 4 --seeds 0 1 2

The bundled tiny model, its training prompts, no training. Both samplers get the same seeds, so the trunks of the trees are the first
of the independent rollouts. Labels are opened here only, to count how many pseudo-labels are right: "accuracy" counts a prompt
without a label as wrong; its difference is paired by prompt, with the 95 % bootstrap interval over prompts (seeds averaged first).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from ttrl.config.schema import ModelSection
from ttrl.evaluate.estimators import bootstrap
from ttrl.evaluate.labels import read_labels
from ttrl.evaluate.luck import judge
from ttrl.prompts import read_prompts, tokenize
from ttrl.protocols import RewardContext, Sampler
from ttrl.rewards.majority import MajorityVote
from ttrl.rollout.engines import hf
from ttrl.rollout.flat import FlatSampler
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.tree import TreeSampler
from ttrl.seeds import derive
from ttrl.types import Prompt, SamplingSpec

DATA = "bundled:tiny-adder/train"


def measure(
    sampler: Sampler, prompts: Sequence[Prompt], pool: LocalPool, seed: int, temperature: float
) -> tuple[int, np.ndarray, np.ndarray, float, np.ndarray]:
    """Tokens drawn, [prompts] label right, [prompts] vote share, seconds, [forks] relative depth."""
    labels = read_labels(f"{DATA}.labels.jsonl", [p.id for p in prompts])
    reward, spec = MajorityVote(), SamplingSpec(max_new_tokens=40, temperature=temperature)
    start = time.perf_counter()
    groups = sampler(prompts, pool, spec, derive(seed, "rollout", 0))
    seconds = time.perf_counter() - start
    scored = [reward(group, RewardContext(step=0, seed=seed)) for group in groups]
    right = [judge(item, labels[item.group.prompt.id], reward.reader).label_accuracy or 0.0 for item in scored]
    depth = [r.fork.at / len(g.rollouts[r.fork.parent].token_ids) for g in groups for r in g.rollouts if r.fork]
    tokens = sum(rollout.drawn for group in groups for rollout in group.rollouts)
    return tokens, np.asarray(right), np.asarray([item.share for item in scored]), seconds, np.asarray(depth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("trees", 12), ("forks", 2), ("branches", 2), ("rounds", 1), ("min-gap", 4), ("prompts", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    leaves = args.trees * (1 + args.rounds * args.forks * args.branches)
    tree = TreeSampler(
        leaves, leaves, lambda _: [], trees=args.trees, forks=args.forks, branches=args.branches, rounds=args.rounds,
        min_gap=args.min_gap,
    )  # fmt: skip
    flat = FlatSampler(leaves, leaves, lambda _: [])
    engine = hf(ModelSection(path="bundled:tiny-adder", device="cpu"), lambda: None)
    records = read_prompts(f"{DATA}.prompts.jsonl", limit=args.prompts)
    prompts, pool = tokenize(records, engine.tokenizer, "raw", None), LocalPool(engine)
    differences = []
    print(f"{leaves} leaves, {len(prompts)} prompts\n")
    print(
        "| seed | tokens flat | tokens tree | ratio | label accuracy flat | tree | share flat | tree | fork depth | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        cost, right, share, seconds, _ = measure(flat, prompts, pool, seed, args.temperature)
        tree_cost, tree_right, tree_share, tree_seconds, depth = measure(tree, prompts, pool, seed, args.temperature)
        differences.append(tree_right - right)
        print(
            f"| {seed} | {cost:,} | {tree_cost:,} | {tree_cost / cost:.3f} | {right.mean():.3f} | {tree_right.mean():.3f} "
            f"| {share.mean():.3f} | {tree_share.mean():.3f} | {depth.mean():.2f} | {seconds:.0f} / {tree_seconds:.0f} |",
            flush=True,
        )
    paired = np.mean(differences, axis=0)
    low, high = bootstrap(paired, 0) or (float("nan"), float("nan"))
    print(f"\nlabel accuracy, tree minus flat: {paired.mean():+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
