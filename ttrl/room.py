"""Is there room for a run on this machine at all? Asked before a model is loaded: the kernel ends a process that asks for too much
memory without a word, after minutes of loading."""

from __future__ import annotations

import logging
from pathlib import Path

from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.plan.command import PlanCall, make_plan

log = logging.getLogger(__name__)

SURE = 1.25
"""A run is refused when the plan exceeds the memory by this factor; predictions were within 16 % of measured peaks (docs/plan.md)."""


def check_memory(recipe: Recipe) -> None:
    """Raises ConfigError, with the settings that would help, for a CPU run that cannot fit into the memory of this machine.

    Looks at CPU runs on this machine only: a GPU says itself what it lacks, and other machines are not asked.
    """
    elsewhere = recipe.cluster.backend == "ray" and recipe.cluster.address not in ("auto", "local")
    on_gpu = recipe.model.device != "cpu" and Path("/dev/nvidiactl").exists()
    if elsewhere or on_gpu:
        return
    try:
        plan = make_plan(
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cpu"})}), PlanCall()
        )
    except ConfigError as error:  # parts or models the plan does not know; that is no reason not to run
        log.debug("no plan of the memory: %s", error)
        return
    own = plan.options[0]
    if own.needed > SURE * own.available:
        raise ConfigError(f"this run {plan.verdict}; `ttrl plan` shows every part")
    if not plan.fits:
        log.warning("this run may not fit: it %s", plan.verdict)
