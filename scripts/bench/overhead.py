"""What the loop itself costs: the share of a step outside sampling, grading, training and weight sync.

    python scripts/bench/overhead.py [--recipe quickstart] [--steps 8] [key=value ...]

One run; per step, the wall time of the whole step (logging of metrics and groups included) minus its four phases, as a share of
the step. Prints the median and the largest of the steps after the first. Evaluations and checkpoints are switched off: they are
no part of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console

import ttrl.loop
from ttrl.config import load_recipe
from ttrl.run import run

PHASES = ("time/rollout", "time/reward", "time/train", "time/sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("overrides", nargs="*")
    call = parser.parse_args()
    walls: list[float] = []
    original = ttrl.loop.one_step

    def timed(*arguments: object) -> None:
        started = time.perf_counter()
        original(*arguments)  # type: ignore[arg-type]
        walls.append(time.perf_counter() - started)

    ttrl.loop.one_step = timed
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        few = [
            f"steps={call.steps}",
            "eval.samples=1",
            "eval.k=[1]",
            "eval.limit=1",
            "eval.heldout=null",
            "checkpoint.every=0",
        ]
        recipe = load_recipe(call.recipe, [*few, *call.overrides, f"output={json.dumps(str(output))}"])
        run(recipe, resume=False, console=Console(quiet=True))
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # The last step also writes the final checkpoint and evaluates
    steps = list(zip(walls, rows, strict=True))[1:-1]
    own = [(wall - sum(row[phase] for phase in PHASES)) / wall for wall, row in steps]
    print(f"{recipe.name}: {len(own)} steps of {statistics.median(walls[1:-1]):.2f} s (median)")
    for phase in PHASES:
        print(f"  {phase:<13} {100 * statistics.median(row[phase] / wall for wall, row in steps):6.2f} %")
    print(f"  {'the loop':<13} {100 * statistics.median(own):6.2f} % median, {100 * max(own):.2f} % at most")


if __name__ == "__main__":
    main()
