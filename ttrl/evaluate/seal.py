"""While a run lives, its process refuses to open label files for anybody but the evaluation.

A net for mistakes of plug-ins, not a wall against malice: code in this process can get around it (through a subprocess, a C library
or a file opened before), and Ray workers are processes of their own. That labels do not reach the weights is shown by replacing them.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ttrl.config.load import bundled
from ttrl.config.schema import Recipe
from ttrl.errors import PluginError

log = logging.getLogger(__name__)
_sealed: list[frozenset[str]] = []
_allowed = threading.local()
_hooked: list[bool] = []


def label_files(recipe: Recipe) -> frozenset[str]:
    """The label files of a recipe that are files, and not also prompts (which somebody else must read)."""
    held = recipe.eval.heldout
    labels = [recipe.eval.labels, held.labels if held is not None else None]
    prompts = [recipe.data.prompts, held.prompts if held is not None else None]
    return _real(labels) - _real(prompts)


@contextmanager
def sealed(files: frozenset[str]) -> Iterator[None]:
    """Within the block these files can be opened in `reading_labels` only; everybody else gets PluginError."""
    if not _hooked:
        sys.addaudithook(_audit)  # cannot be removed; it does nothing while nothing is sealed
        _hooked.append(True)
    _sealed.append(files)
    try:
        yield
    finally:
        _sealed.remove(files)


@contextmanager
def reading_labels() -> Iterator[None]:
    """For `ttrl.evaluate.labels`: this thread may open label files."""
    before = getattr(_allowed, "now", False)
    _allowed.now = True
    try:
        yield
    finally:
        _allowed.now = before


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _sealed or getattr(_allowed, "now", False):
        return
    if not isinstance(arguments[0], str | bytes | os.PathLike):
        return  # a file that was open before
    path = os.path.realpath(os.fsdecode(arguments[0]))
    if any(path in files for files in _sealed):
        message = f"{path} holds labels, and only the evaluation may open it"
        log.error("%s", message)  # in case the exception is swallowed
        raise PluginError(message)


def _real(paths: Iterable[str | None]) -> frozenset[str]:
    return frozenset(
        os.path.realpath(bundled(p) or Path(p)) for p in paths if p is not None and not p.startswith("hub:")
    )
