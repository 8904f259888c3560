"""What the sentinel does to collapsing and to healthy runs, and what it costs: the tables of docs/guards.md.

    python scripts/bench/sentinel.py collapse --results FILE [--seeds 0 1 2 3 4] [--seconds S]
    python scripts/bench/sentinel.py healthy --results FILE [--seeds 0 1 2 3 4] [--seconds S]
    python scripts/bench/sentinel.py overhead [--steps 6]
    python scripts/bench/sentinel.py table --results FILE

Runs that stand in FILE (JSON lines) are not made again, so the work can be done in pieces of S seconds. Small settings: 24 prompts,
of which 12 x 16 votes per step, 6 steps, 16 samples per prompt and evaluation. Labels are used to report, nowhere else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ttrl.config import load_recipe
from ttrl.run import run

SMALL = (
    "data.limit=24", "data.prompts_per_step=12", "rollout.votes_per_prompt=16", "eval.samples=16", "eval.k=[1]",
    "eval.heldout=null", "checkpoint.every=0", "log.groups_per_step=0",
)  # fmt: skip
GUARD = "guards=[{use: sentinel, with: {action: rollback, snapshot_every: 2}}]"
HEALTHY = ("lab/loo-vote", "lab/soft-vote", "lab/selective", "lab/rpc-vote")
STEPS = 6
PLAIN_STEPS = 10
"""Of the unguarded collapse: as many as the recipe has."""


def once(recipe: str, seed: int, *changes: str) -> dict[str, Any]:
    """One run in a folder of its own, and what is reported of it."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        loaded = load_recipe(recipe, [*SMALL, f"seed={seed}", *changes, f"output={json.dumps(str(output))}"])
        run(loaded, resume=False, console=Console(quiet=True))
        summary = json.loads((output / "summary.json").read_text())
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        evals = [json.loads(line) for line in (output / "eval.jsonl").read_text().splitlines()]
    guards = summary["guards"] or {}
    return {
        "recipe": recipe, "seed": seed, "status": summary["status"], "steps": summary["steps"],
        "pass@1": [[e["step"], *(e["pass@1"][k] for k in ("value", "low", "high"))] for e in evals],
        "alarms": [row["step"] for row in rows if row.get("guard/level") == 2.0],
        "warnings": [row["step"] for row in rows if row.get("guard/level") == 1.0],
        "events": [[row["step"], event] for row in rows for event in row.get("guard/events", ())],
        "model_after_steps": guards.get("model_after_steps"),
        "signals": {k: [round(row[k], 4) for row in rows if k in row] for k in sorted({k for row in rows for k in row})
                    if k.startswith(("guard/", "guard_bound/")) and k != "guard/events"},
    }  # fmt: skip


def wanted(what: str, seeds: list[int]) -> list[tuple[str, str, int, tuple[str, ...]]]:
    """(kind, recipe, seed, changes) of every run of a table."""
    if what == "collapse":
        plain = (f"steps={PLAIN_STEPS}", "eval.every=5")
        runs = [("collapse plain", "lab/collapse", s, plain) for s in seeds]
        return runs + [
            ("collapse guarded", "lab/collapse", s, (f"steps={STEPS}", "eval.every=0", GUARD)) for s in seeds
        ]
    return [("healthy guarded", recipe, s, (f"steps={STEPS}", GUARD)) for recipe in HEALTHY for s in seeds]


def load(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def make(what: str, seeds: list[int], results: Path, seconds: float) -> None:
    """The runs that are missing, until `seconds` are over. A healthy run that handed over an earlier state gets an unguarded twin."""
    done = {(r["kind"], r["recipe"], r["seed"]): r for r in load(results)}
    todo = [job for job in wanted(what, seeds) if job[:3] not in done]
    twins = [r for r in done.values() if r["kind"] == "healthy guarded" and r["model_after_steps"] != STEPS]
    if what == "healthy":
        todo += [
            ("healthy plain", r["recipe"], r["seed"], (f"steps={STEPS}",)) for r in twins
            if ("healthy plain", r["recipe"], r["seed"]) not in done
        ]  # fmt: skip
    started = time.monotonic()
    while todo and time.monotonic() - started < seconds:
        kind, recipe, seed, changes = todo.pop(0)
        found = {"kind": kind, **once(recipe, seed, *changes)}
        with results.open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        shown = f"{found['pass@1'][0][1]:.3f} -> {found['pass@1'][-1][1]:.3f}"
        print(f"{kind} {recipe} seed {seed}: pass@1 {shown}, alarms {found['alarms']}", flush=True)
    print(f"{len(todo)} runs remain")


def table(results: Path) -> None:
    """The tables, from what was run so far."""
    rows = load(results)
    plain = {r["seed"]: r for r in rows if r["kind"] == "collapse plain"}
    print(
        "| seed | unguarded pass@1 after 0, 5, 10 steps | guarded: start | guarded: end | alarms at steps | model after |"
    )
    print("|---|---|---|---|---|---|")
    for r in (r for r in rows if r["kind"] == "collapse guarded"):
        alone = ", ".join(f"{e[1]:.3f}" for e in plain[r["seed"]]["pass@1"]) if r["seed"] in plain else "-"
        start, end = r["pass@1"][0], r["pass@1"][-1]
        print(f"| {r['seed']} | {alone} | {start[1]:.3f} | {end[1]:.3f} | {r['alarms']} | {r['model_after_steps']} |")
    twins = {(r["recipe"], r["seed"]): r for r in rows if r["kind"] == "healthy plain"}
    print(
        "\n| recipe | seed | start | guarded end | unguarded end | alarms | warnings | model after |\n|---|---|---|---|---|---|---|---|"
    )
    healthy = [r for r in rows if r["kind"] == "healthy guarded"]
    for r in healthy:
        twin = twins.get((r["recipe"], r["seed"]))
        alone = twin["pass@1"][-1] if twin is not None else r["pass@1"][-1]
        other = f"{alone[1]:.3f} [{alone[2]:.3f}, {alone[3]:.3f}]" + ("" if twin is not None else " (the same weights)")
        print(
            f"| {r['recipe']} | {r['seed']} | {r['pass@1'][0][1]:.3f} | {r['pass@1'][-1][1]:.3f} | {other} | "
            f"{len(r['alarms'])} | {len(r['warnings'])} | {r['model_after_steps']} |"
        )
    print(f"\n{len(healthy)} healthy runs, {sum(bool(r['alarms']) for r in healthy)} with an alarm")


def overhead(steps: int) -> None:
    """Share of the step that guards take, at the quickstart's own sizes; snapshots of every fifth step included."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        changes = [
            "guards=[sentinel]",
            f"steps={steps}",
            "eval.samples=1",
            "eval.k=[1]",
            "eval.limit=1",
            "eval.heldout=null",
        ]
        loaded = load_recipe("quickstart", [*changes, "checkpoint.every=0", f"output={json.dumps(str(output))}"])
        run(loaded, resume=False, console=Console(quiet=True))
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shares = [row["time/guard"] / row["time/step"] for row in rows]
    total = sum(row["time/guard"] for row in rows) / sum(row["time/step"] for row in rows)
    print(f"guards take {100 * total:.2f} % of {len(rows)} steps; per step, first to last, in %:")
    print(" ".join(f"{100 * share:.2f}" for share in shares), f"(median {100 * statistics.median(shares):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collapse", "healthy", "overhead", "table"))
    parser.add_argument("--results", type=Path, default=Path("sentinel.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seconds", type=float, default=1e9, help="no run is started after so many seconds")
    parser.add_argument("--steps", type=int, default=6)
    call = parser.parse_args()
    if call.what == "overhead":
        overhead(call.steps)
    elif call.what == "table":
        table(call.results)
    else:
        make(call.what, call.seeds, call.results, call.seconds)


if __name__ == "__main__":
    main()
