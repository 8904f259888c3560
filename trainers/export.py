"""The adapted model as a plain transformers folder. On the host, and no more than one copy of the model there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from ttrl.config.schema import ModelSection
from ttrl.model.load import copy_processor, load_model, load_tokenizer
from ttrl.model.weights import Fingerprint, load_into


def export(section: ModelSection, moved: Iterator[tuple[str, Tensor]], path: Path) -> None:
    """The start model with the tensors of `moved` in their places, in the recipe's dtype, and its tokenizer (and processor)."""
    plain = load_model(section.model_copy(update={"device": "cpu"}))
    load_into({name: p.data for name, p in plain.named_parameters()}, moved, Fingerprint())
    # Sampling defaults of many models do not pass the checks of saving; they are not ours to change, so they are copied
    defaults, plain.generation_config = plain.generation_config, GenerationConfig()
    quiet_accelerator()
    plain.save_pretrained(path)
    (path / "generation_config.json").write_text(defaults.to_json_string(use_diff=True), encoding="utf-8")
    load_tokenizer(section.path).save_pretrained(path)  # type: ignore[attr-defined]
    if getattr(plain.config, "vision_config", None) is not None:
        copy_processor(section.path, path)


def quiet_accelerator() -> None:
    """Tell DeepSpeed what it would find out anyway: where it is installed, saving a model imports it, and it prints its finding."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
