"""Whether a run may be continued with a recipe, and what changed since it was started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttrl.config import Recipe, load_recipe
from ttrl.errors import ConfigError
from ttrl.rundir import RECIPE, RunDir
from ttrl.stamp import differences, from_comments

WITHOUT_EFFECT = ("checkpoint.keep", "log.", "output", "description", "cluster.")
"""Keys, or the starts of keys, that change no number of a run."""
ROUNDING = ("trainer.tokens_per_microbatch", "trainer.gradient_checkpointing", "model.threads", "model.device")
"""Keys that change the order of sums and nothing else, which a machine with less memory may need."""


def continuation(recipe: Recipe, folder: Path) -> tuple[RunDir, Sequence[str]]:
    """The run to continue, and in words what is different from now on.

    Raises ConfigError when there is no run, or the recipe differs in what cannot change.
    """
    directory = RunDir.existing(folder)
    old = load_recipe(folder / RECIPE)
    # More steps would change the learning-rate schedule of the steps already taken, so it counts as another recipe
    differing = _differences(old.model_dump(by_alias=True), recipe.model_dump(by_alias=True), ())
    # Sampling ahead waits at checkpoints, so there they are part of what is computed
    free = WITHOUT_EFFECT if recipe.rollout.ahead else (*WITHOUT_EFFECT, "checkpoint.")
    refused = [line for key, line in differing if not key.startswith((*free, *ROUNDING))]
    if refused:
        raise ConfigError(
            "cannot resume with another recipe:\n"
            + "\n".join(f"  {line}" for line in refused)
            + "\nundo these changes, or start a new run with another --output"
        )
    changes = [line for key, line in differing if key.startswith(free) and key != "output"]
    changes += [f"{line} (rounds differently from here on)" for key, line in differing if key.startswith(ROUNDING)]
    return directory, changes


def same_inputs(directory: RunDir, stamped: Mapping[str, str]) -> list[str]:
    """What else is not as when the run was started: versions and the commit, in words.

    Raises ConfigError when prompts or plug-in files changed.
    """
    started = from_comments((directory.path / RECIPE).read_text(encoding="utf-8"))
    changed = differences(started, stamped)
    if changed:
        raise ConfigError("cannot resume, the inputs of the run have changed:\n" + "\n".join(changed))
    return [f"{key}: was {started.get(key)}, is {now}" for key, now in stamped.items() if started.get(key) != now]


def note_resume(directory: RunDir, step: int, found: Sequence[str]) -> None:
    """What was different at a resume stands at the head of recipe.yaml, and so in the report."""
    if found:
        text = (directory.path / RECIPE).read_text(encoding="utf-8")
        line = f"# resumed after step {step}: {'; '.join(found)}\n"
        if line not in text:
            directory.write(RECIPE, line + text)


def _differences(old: Any, new: Any, path: Sequence[str]) -> list[tuple[str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [found for key in keys for found in _differences(old.get(key), new.get(key), (*path, str(key)))]
    dotted = ".".join(path)
    return [] if old == new else [(dotted, f"{dotted}: was {old!r}, is {new!r}")]
