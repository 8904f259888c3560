"""Prequential accuracy of a stream with a shift in the middle: learning under guards against only answering.

    python scripts/bench/stream.py --seeds 0 1 2 --output runs/bench-stream

Both arms of a seed answer the same prompts with the same random numbers, so differences are paired by prompt. Runs that are already in
the output folder are not made again: the seeds may be spread over several calls. Prints a table and the guard's work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ttrl.answers import Answered, from_json
from ttrl.config import load_recipe
from ttrl.evaluate.estimators import bootstrap
from ttrl.evaluate.judge import Judge
from ttrl.run import run
from ttrl.rundir import ANSWERS, METRICS, RunDir
from ttrl.setup import check_recipe

ARMS = {"answers only": False, "learns, guarded": True}
MEASURES = ("accuracy", "pass@1")
PARTS = ("all", "first_half", "second_half")


def run_arm(folder: Path, seed: int, learns: bool, changes: Sequence[str]) -> None:
    """One run of recipe lab/stream, unless it is there."""
    if (folder / "summary.json").is_file() and RunDir(folder).summary()["status"] == "completed":
        return
    switch = f"data.source.with.learn={str(learns).lower()}"
    recipe = load_recipe("lab/stream", [f"seed={seed}", switch, f"output={json.dumps(str(folder))}", *changes])
    run(recipe, resume=(folder / "recipe.yaml").is_file(), console=Console(quiet=True))


def per_prompt(folders: Sequence[Path], judge: Judge, part: str, measure: str) -> np.ndarray:
    """[prompts] one number each, averaged over the seeds."""
    rows = []
    for folder in folders:
        answered: list[Answered] = [from_json(row) for row in RunDir(folder).lines(ANSWERS)]
        rows.append(judge.prequential(answered, 0)[part].per_prompt[measure])
    return np.asarray(rows).mean(axis=0)


def shown(values: np.ndarray, *, sign: bool = False) -> str:
    low, high = bootstrap(values, 0) or (float("nan"), float("nan"))
    form = "+.3f" if sign else ".3f"
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def guard_work(folder: Path) -> dict[str, Any]:
    """Updates tried and committed, votes of canaries, and the most canaries seen with another plurality."""
    rows = list(RunDir(folder).lines(METRICS))
    tried = [row for row in rows if "guard/committed" in row]
    return {
        "tried": len(tried), "committed": int(sum(row["guard/committed"] for row in tried)),
        "lost": int(sum(row["guard/canary_lost"] for row in tried)),
        "votes": int(sum(row["guard/canary_votes"] for row in tried)),
        "changed at the last commit": int([r["guard/canary_changed"] for r in tried if r["guard/committed"]][-1]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench-stream"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe, in both arms")
    arguments = parser.parse_args()
    folders = {
        arm: [arguments.output / f"{'learns' if learns else 'answers'}-{seed}" for seed in arguments.seeds]
        for arm, learns in ARMS.items()
    }
    for arm, learns in ARMS.items():
        for seed, folder in zip(arguments.seeds, folders[arm], strict=True):
            run_arm(folder, seed, learns, arguments.set)
    checked = check_recipe(load_recipe("lab/stream", arguments.set))
    judge = Judge.of(checked.recipe, checked.reader)
    print("| prompts | measure | " + " | ".join(ARMS) + " | paired change |\n|---|---|---|---|---|")
    for part in PARTS:
        for measure in MEASURES:
            found = [per_prompt(folders[arm], judge, part, measure) for arm in ARMS]
            cells = [*map(shown, found), shown(found[1] - found[0], sign=True)]
            print(f"| {part} ({len(found[0])}) | {measure} | " + " | ".join(cells) + " |")
    for seed, folder in zip(arguments.seeds, folders["learns, guarded"], strict=True):
        print(f"seed {seed}:", ", ".join(f"{name} {value}" for name, value in guard_work(folder).items()))


if __name__ == "__main__":
    main()
