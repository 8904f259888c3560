"""The lab: a list of recipes x seeds on the bundled tiny model, one protocol per task, and the page with what was measured.

    python scripts/lab.py --seeds 0 1 2 --write docs/results.md
    python scripts/lab.py --only misled sum/spine --seeds 0          # some tasks or rows
    python scripts/lab.py --seeds 0 1 2 --write page.md --no-run     # the page from what has been run so far

Runs that have ended are not made again (OUTPUT/results.jsonl), so the work can be interrupted and continued; a run that failed is
tried again. `labkit/tasks.py` says what is run and what each row is to show. Labels are used to report, nowhere else, except by the
rows named gold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from labkit.page import page
from labkit.runs import jobs, missing, run_all
from labkit.tasks import TASKS

from ttrl.errors import ConfigError
from ttrl.run import FAILED

DEFAULT_OUTPUT = Path("runs/lab")


def command(call: argparse.Namespace) -> str:
    """What produces the same page from nothing; where the runs stand and how many ran at once does not matter for it."""
    only = ["--only", *(f"'{name}'" if " " in name else name for name in call.only)] if call.only else []
    return " ".join(["python scripts/lab.py", *only, "--seeds", *map(str, call.seeds), "--write", str(call.write)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="tasks, or rows as TASK/ROW")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, of one thread each")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the runs")
    parser.add_argument("--write", type=Path, help="the page to write; replaced as a whole")
    parser.add_argument("--no-run", action="store_true", help="run nothing, write the page")
    call = parser.parse_args()
    try:
        wanted = jobs(TASKS, call.seeds, call.only)
        todo = missing(wanted, call.output)
        if not call.no_run:
            print(f"{len(wanted)} runs wanted, {len(todo)} to make", flush=True)
            for number, result in enumerate(run_all(todo, call.output, call.workers), 1):
                said = f"{result.seconds:.0f} s" if result.status != FAILED else result.reason
                print(f"{number}/{len(todo)} {result.run}: {result.status}, {said}", flush=True)
        if call.write is not None:
            call.write.write_text(page(wanted, call.output, command(call), call.write.parent / "lab"), encoding="utf-8")
            print(f"written: {call.write}")
    except ConfigError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
