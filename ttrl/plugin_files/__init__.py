"""Plug-in files (`./reward.py:Name`) as modules of this package, under a name that any process can turn back into the path.

An instance of a plug-in class is pickled by the name of its module. A name that only the process knew which loaded the file could
not be imported by a worker, whether of Ray, of multiprocessing or of anything else; this one can, wherever ttrl is installed and
the file stands at the same absolute path. Nothing has to be registered with any of them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from ttrl.errors import ConfigError


def module_name(path: Path) -> str:
    """The name a plug-in file is imported by: its stem for people, and its full path in hexadecimal."""
    resolved = path.resolve()
    return f"{__name__}.{re.sub(r'[^A-Za-z0-9]', '_', resolved.stem)}_{os.fsencode(resolved).hex()}"


class _Finder:
    """Finds `ttrl.plugin_files.<stem>_<path>`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        parent, _, own = name.rpartition(".")
        if parent != __name__ or not re.fullmatch(r"\w*_(?:[0-9a-f]{2})+", own):
            return None
        file = Path(os.fsdecode(bytes.fromhex(own.rpartition("_")[2])))
        if not file.is_file():
            raise ConfigError(f"plug-in file {file}: no such file; workers read it at the same absolute path")
        return importlib.util.spec_from_file_location(name, file)


sys.meta_path.append(_Finder)
