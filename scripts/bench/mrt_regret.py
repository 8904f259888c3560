"""Does MRT lower normalised regret against GRPO when both may generate the same number of tokens? The table of docs/methods/mrt.md.

    python scripts/bench/mrt_regret.py --output runs/mrt-regret --seeds 0 1 2 [--model FOLDER]

For each seed: GRPO for `--steps` steps, then every other method for as many steps as fit into the tokens GRPO generated (votes and
probes; a pilot of one step tells what a step costs), then the regret of each on the held-out prompts. Differences are paired: the
same prompts, traces with the same seeds, averaged over seeds; brackets are 95 % bootstrap intervals over prompts. One JSON file per
run in OUTPUT; runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ttrl.config import load_recipe
from ttrl.evaluate.command import EvalCall, RegretCall, evaluate_regret
from ttrl.evaluate.estimators import bootstrap
from ttrl.evaluate.regret import Curve, normalised_regret, tokens_to_reach
from ttrl.run import run

INNER = '{"of": "majority_vote", "options": {"extractor": "math", "ties": "abstain"}, "coefficient": 0.2}'
METHODS: dict[str, tuple[str, ...]] = {
    "grpo": ("objective.with.alpha=0",),
    "length_penalty": ("objective.with.alpha=0", "reward.use=length_penalty", f"reward.with={INNER}"),
    "mrt scalar": ("objective.with.form=scalar",),
    "mrt episodes": ("objective.with.form=episodes",),
}
QUIET = ("eval.samples=1", "eval.k=[1]", "eval.limit=1", "eval.heldout=null", "checkpoint.every=0")
TERMINATION = "\\boxed{"


def train(folder: Path, steps: int, model: str, seed: int, changes: Sequence[str]) -> int:
    """Tokens generated. What an interrupted call left in `folder` is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = (*QUIET, f"steps={steps}", f"seed={seed}", f"model.path={json.dumps(model)}", *changes)
    recipe = load_recipe("lab/mrt", [*settings, f"output={json.dumps(str(folder))}"])
    outcome = run(recipe, resume=False, console=Console(file=io.StringIO()))
    if outcome.status != "completed":
        raise SystemExit(f"{folder}: {outcome.status}, {outcome.reason}")
    return int(json.loads((folder / "summary.json").read_text())["tokens"]["rollout"])


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """The evaluation of one model on the held-out prompts, as JSON."""
    call = EvalCall(
        model=model, prompts="bundled:tiny-adder/heldout.prompts.jsonl", labels="bundled:tiny-adder/heldout.labels.jsonl",
        template="raw", extractor="math", samples=args.traces, temperature=1.0, top_p=1.0, max_new_tokens=40, k=(1,),
        limit=args.prompts, seed=0, device="cpu",
    )  # fmt: skip
    goals = RegretCall(
        budgets=(args.budget,),
        reach=(args.reach,),
        splitter="delimiter:,",
        termination=TERMINATION,
        probes=8,
        probe_tokens=6,
    )
    return evaluate_regret(call, goals).record()


def one(name: str, seed: int, tokens: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one method; `tokens` None is GRPO, which sets the budget."""
    file = args.output / f"{name.replace(' ', '-')}-{seed}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    changes = (*METHODS[name], *args.change)
    steps = args.steps
    if tokens is not None:
        per_step = train(args.output / f"pilot-{file.stem}", 1, args.model, seed, changes)
        steps = max(1, round(tokens / per_step))
    folder = args.output / file.stem
    spent = train(folder, steps, args.model, seed, changes)
    found = {"steps": steps, "tokens": spent, **measure(str(folder / "model"), args)}
    file.write_text(json.dumps(found))
    return found


def curves(found: dict[str, Any]) -> list[list[Curve]]:
    """[prompts][traces]"""
    return [[Curve(tuple(x), tuple(y)) for x, y in own] for own in found["curves"].values()]


def row(name: str, runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """A line of the table; the difference to `base` is per prompt, averaged over the seeds."""

    def regret(found: Sequence[dict[str, Any]]) -> np.ndarray:
        return np.mean(
            [[np.mean([normalised_regret(c, args.budget) for c in own]) for own in curves(f)] for f in found], axis=0
        )

    ours, theirs = regret(runs), regret(base)
    low, high = bootstrap(ours, 0) or (np.nan, np.nan)
    delta = ours - theirs
    lower, upper = bootstrap(delta, 0) or (np.nan, np.nan)
    pooled = [[c for own in same for c in own] for same in zip(*[curves(f) for f in runs], strict=True)]
    reached = tokens_to_reach(pooled, args.reach)
    accuracy, length = (np.mean([f[key]["value"] for f in runs]) for key in ("pass@1", "length"))
    cells = [
        name, "/".join(str(f.get("steps", 0)) for f in runs), f"{np.mean([f.get('tokens', 0) for f in runs]) / 1000:.0f}k",
        f"{accuracy:.3f}", f"{length:.1f}", f"{ours.mean():.4f} [{low:.4f}, {high:.4f}]",
        "-" if runs is base else f"{delta.mean():+.4f} [{lower:+.4f}, {upper:+.4f}]",
        "never" if reached is None else f"{reached:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="bundled:tiny-adder", help="start model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24, help="of GRPO")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--traces", type=int, default=2)
    parser.add_argument("--budget", type=int, default=40, help="tokens of the regret")
    parser.add_argument("--reach", type=float, default=0.5)
    parser.add_argument("--change", nargs="*", default=[], help="further changes to lab/mrt, for all methods")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    start = args.output / "start.json"
    if not start.exists():
        start.write_text(json.dumps(measure(args.model, args)))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("grpo", *args.methods)}
    for seed in args.seeds:
        for name in runs:
            budget = None if name == "grpo" else runs["grpo"][-1]["tokens"]
            runs[name].append(one(name, seed, budget, args))
    heads = ("method", "steps", "tokens", "pass@1", "length", "regret@C", "difference to grpo", "tokens to reach")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    print(row("start model", [json.loads(start.read_text())], runs["grpo"], args))
    for name, found in runs.items():
        print(row(name, found, runs["grpo"], args))


if __name__ == "__main__":
    main()
