"""The engines a recipe can name. Factories, so that naming one does not import torch."""

from __future__ import annotations

from ttrl.config.schema import ModelSection
from ttrl.protocols import Engine, StopCheck
from ttrl.rollout.scripted import Script


def hf(model: ModelSection, check_stop: StopCheck, *, rows_at_once: int = 128, shared_prefix: bool = True) -> Engine:
    """Any transformers causal LM on a CPU or one GPU.

    rows_at_once: larger groups are sampled in several batches (bounds memory). shared_prefix: false copies the prompt's cache
    for every vote, which is slower and gives the same tokens up to rounding.
    """
    from ttrl.rollout.hf import HFEngine

    if rows_at_once < 1:
        raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
    return HFEngine(model, check_stop, rows_at_once=rows_at_once, shared_prefix=shared_prefix)


def scripted(
    model: ModelSection, check_stop: StopCheck, *, answers: dict[str, dict[str, float]] | None = None
) -> Engine:
    """Draws whole answers from given probabilities instead of running a model: for tests and demonstrations.

    answers: prompt text -> {completion: probability}. The model's tokenizer is used, its weights are not.
    """
    from ttrl.model.load import load_tokenizer
    from ttrl.rollout.scripted import ScriptedEngine

    return ScriptedEngine(Script(answers or {}), load_tokenizer(model.path))
