"""Does a run on the tiny model show what the README promises? Exit status 1 with the reason if not.

python scripts/check_quickstart.py RUN [MIN_GAIN]      MIN_GAIN: final pass@1 divided by the initial one, 1.4 for the quickstart
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MIN_GAIN = 1.4


def problems(summary: dict, min_gain: float = MIN_GAIN) -> list[str]:
    """Everything that does not hold."""
    if summary["status"] != "completed":
        return [f"status is {summary['status']}: {summary['reason']}"]
    before, after = summary["initial"], summary["final"]
    found = []
    gain = after["pass@1"]["value"] / before["pass@1"]["value"]
    if gain < min_gain:
        found.append(f"pass@1 rose by a factor of {gain:.2f}, less than {min_gain}")
    if after["pass@1"]["low"] <= before["pass@1"]["high"]:
        found.append(f"the intervals of pass@1 touch: {before['pass@1']} and {after['pass@1']}")
    for name in before:
        if name.startswith("maj@") and after[name]["value"] < before[name]["low"]:
            found.append(f"{name} fell below its interval: {before[name]} -> {after[name]}")
    return found


def main() -> None:
    summary = json.loads((Path(sys.argv[1]) / "summary.json").read_text())
    found = problems(summary, float(sys.argv[2]) if len(sys.argv) > 2 else MIN_GAIN)
    name = summary["name"]
    for problem in found:
        print(f"{name}: {problem}")
    if not found:
        values = [summary[when]["pass@1"]["value"] for when in ("initial", "final")]
        print(
            f"{name}: pass@1 {values[0]:.3f} -> {values[1]:.3f}, {summary['seconds']} s, {summary['peak_memory_mb']} MB"
        )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
