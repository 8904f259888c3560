"""Writing files so that a reader, a crash or a planted link finds the old content or the new one, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Replace a file; it is on the disk when this returns. After a failure the old one is there and its room is free again."""
    part = path.with_name(path.name + ".part")
    part.unlink(
        missing_ok=True
    )  # left by a kill; if somebody put a link there, the link goes and not what it points to
    try:
        with open(part, "x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def no_links(path: str, flags: int) -> int:
    """An `opener` for open(): raises OSError where somebody put a symbolic link in place of the file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
