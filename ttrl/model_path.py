"""Is there a model at this path? Answered without loading anything."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ttrl.config.load import bundled
from ttrl.config.schema import ModelSection
from ttrl.errors import ConfigError
from ttrl.prompts import PromptRecord

HUB_TIMEOUT = 2.0
"""Seconds."""


def check_model_path(model: ModelSection) -> None:
    """Raises ConfigError for a model that can be seen to be missing; a hub name is looked up in the local cache and online."""
    folder = bundled(model.path) or Path(model.path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path {model.path!r}: this folder holds no model (no config.json)")
        return
    parts = Path(model.path).parts
    looks_local = model.path.startswith((".", "/", "~")) or len(parts) != 2 or Path(parts[0]).is_dir()
    if folder.exists() or looks_local:
        raise ConfigError(f"model.path {model.path!r}: no such folder (a hub name has the form org/name)")
    _check_hub(model.path)


def check_sees(path: str, records: Iterable[PromptRecord]) -> None:
    """Raises ConfigError when prompts have images and the model can be seen to be one of text only."""
    shown = next((record for record in records if record.images), None)
    file = config_file(path)
    if shown is None or file is None:
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {path!r}: {file.name} cannot be read: {error}") from None
    if not isinstance(config, dict) or not config.get("vision_config"):
        raise ConfigError(
            f"model.path {path!r}: prompt {shown.id!r} has images, but the model is one of text only (no vision_config in its "
            "config.json); data.images_field: null leaves the images out"
        )


def config_file(path: str) -> Path | None:
    """config.json of a folder, of the bundle or in the local hub cache. Never goes online."""
    folder = bundled(path) or Path(path)
    if folder.is_dir():
        return folder / "config.json"
    if len(Path(path).parts) != 2 or path.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json")
    return Path(found) if isinstance(found, str) else None


def _check_hub(name: str) -> None:
    """One request and no retries: whoever mistyped a path should not wait for a network that is not there."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants, get_token, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    missing = f"model.path {name!r}: no such folder (from where ttrl was started), and not in the local hub cache"
    if name.endswith("smollm2-135m-instruct"):
        missing += "; if you mean the recipes for SmolLM2, run python scripts/fetch_smollm2.py first"
    if constants.is_offline_mode():
        raise ConfigError(f"{missing} (hub access is switched off by HF_HUB_OFFLINE)")
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(hf_hub_url(name, "config.json"), headers=headers, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise ConfigError(f"{missing}; the hub has no such public model, or this account may not read it") from None
        raise ConfigError(f"{missing}; the hub answers with status {error.code}") from None
    except OSError as error:
        raise ConfigError(f"{missing}; the hub cannot be reached: {error}") from None
