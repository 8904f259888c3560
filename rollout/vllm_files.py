"""Files between ttrl and vLLM: the model's safetensors, and LoRA adapters written the way peft writes them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from ttrl.errors import ConfigError, EngineError
from ttrl.model.load import resolve_path
from ttrl.types import AdapterSpec

_MEMORY = Path("/dev/shm")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def local_folder(path: str) -> Path:
    """The folder that holds the model, downloaded if `path` names one on the hub. Raises ConfigError."""
    folder = Path(resolve_path(path))
    if folder.is_dir():
        return folder.absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {path!r}: cannot be downloaded: {str(error).strip().splitlines()[0]}") from error


def stop_ids(folder: Path) -> list[int]:
    """The end-of-sequence tokens of the generation config, or of the model's config where there is none."""
    kind = "generation_config.json" if (folder / "generation_config.json").is_file() else "config.json"
    found = GenerationConfig.from_pretrained(folder, config_file_name=kind).eos_token_id
    return [] if found is None else found if isinstance(found, list) else [int(found)]


class Checkpoint:
    """The tensors of a model's files by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        if not self._files:
            raise ConfigError(f"model.path {str(folder)!r}: there are no safetensors files")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._files:
            yield name, self.get(name)


def incomplete(
    announced: Mapping[str, object], fused: Mapping[str, list[str]], files: Checkpoint, sent_before: set[str]
) -> dict[str, list[str]]:
    """Tensors that must be reloaded although they are not sent: announced name -> names of the rest of its fused layer.

    vLLM loads q, k and v as one matrix (and gate and up): of a layer of which only q and v came, k would be left empty. Merged
    LoRA weights are like that. What is not sent has not changed, so it is what the files hold.
    """
    extra: dict[str, list[str]] = {}
    members = {part: parts for parts in fused.values() if len(parts) > 1 for part in parts}
    taken: set[str] = set()
    for name in announced:
        layer, _, leaf = name.rpartition(".")
        layer, _, part = layer.rpartition(".")
        rest = [f"{layer}.{other}.{leaf}" for other in members.get(part, [])]
        rest = [other for other in rest if other not in announced and other not in taken]
        changed = [other for other in rest if other in sent_before or other not in files]
        if changed:
            raise EngineError(f"{name} is part of a fused layer of vLLM, but {changed[0]} was not sent with it")
        taken.update(rest)
        if rest:
            extra[name] = rest
    return extra


def write_adapter(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> tempfile.TemporaryDirectory[str]:
    """A folder as `peft` saves it, in memory where the system offers that. It lives as long as the returned object."""
    folder = tempfile.TemporaryDirectory(prefix="ttrl-lora-", dir=_MEMORY if _MEMORY.is_dir() else None)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": spec.rank, "lora_alpha": spec.alpha,
        "target_modules": list(spec.targets), "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    (Path(folder.name) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(tensors), Path(folder.name) / "adapter_model.safetensors")
    return folder
