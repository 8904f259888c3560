"""Is there a model at this path? Answered without loading anything."""

from __future__ import annotations

from pathlib import Path

from ttrl.config.load import bundled
from ttrl.config.schema import ModelSection
from ttrl.errors import ConfigError


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


def _check_hub(name: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        hf_hub_download(name, "config.json", etag_timeout=2)
    except RepositoryNotFoundError:
        raise ConfigError(f"model.path {name!r}: neither a folder here nor a public model on the hub") from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"model.path {name!r}: no such folder, not in the local hub cache, and the hub cannot be reached"
        ) from None
    except EntryNotFoundError:
        raise ConfigError(f"model.path {name!r}: this hub repository holds no model (no config.json)") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"model.path {name!r}: {str(error).strip().splitlines()[0]}") from None
