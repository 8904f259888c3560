"""Loading a causal LM, with or without a vision tower, and its tokenizer: safetensors only, no remote code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from ttrl.config.load import bundled
from ttrl.config.schema import ModelSection
from ttrl.errors import ConfigError

_SEEING = AutoModelForImageTextToText._model_mapping
"""Configurations that transformers has a vision-language model for."""
_PROCESSOR_FILES = (
    PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, "chat_template.json", "chat_template.jinja",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that ttrl uses."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ConfigError for a GPU that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"model.device is {device!r}, but torch {torch.__version__} sees no GPU here; use auto or cpu"
        )
    return torch.device(device)


def load_tokenizer(path: str) -> Tokenizer:
    """Raises ConfigError when there is no usable tokenizer with an end-of-sequence token."""
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_path(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {path!r}: cannot load a tokenizer: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path {path!r}: the tokenizer has no end-of-sequence token, so no rollout could ever be complete"
        )
    return cast(Tokenizer, tokenizer)


def load_model(section: ModelSection) -> PreTrainedModel:
    """The model in eval mode on its device. Raises ConfigError when it cannot be loaded."""
    transformers.utils.logging.disable_progress_bar()
    device = pick_device(section.device)
    if section.threads is not None:
        torch.set_num_threads(section.threads)
    try:
        config = AutoConfig.from_pretrained(resolve_path(section.path), trust_remote_code=False)
        sees = getattr(config, "vision_config", None) is not None and type(config) in _SEEING
        loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = loader.from_pretrained(
            resolve_path(section.path),
            dtype=DTYPES[section.dtype],
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path {section.path!r}: cannot load a causal LM from safetensors: {_first_line(error)}"
        ) from error
    return cast(PreTrainedModel, model.to(device).eval())


def copy_processor(path: str, folder: Path) -> None:
    """The files of a vision-language model that say how it takes pictures, as they are: not every processor can be loaded here."""
    for name in _PROCESSOR_FILES:
        found = cached_file(
            resolve_path(path), name, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)


def resolve_path(path: str) -> str:
    """`bundled:NAME` becomes the folder inside the package; everything else stays."""
    folder: Path | None = bundled(path)
    return str(folder) if folder else path


def eos_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's and those of the generation config (chat models have several)."""
    found = {tokenizer.eos_token_id}
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found.update(configured if isinstance(configured, list) else [configured])
    return tuple(sorted(token for token in found if token is not None))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
