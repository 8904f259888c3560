"""Picture files of prompts: found beside the prompts file, checked, and opened again where pixels are needed. No torch.

Prompt files come from strangers, so a path may not leave the folder of the prompts file, only three formats are decoded, and size is
read from the header before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ttrl.errors import ConfigError
from ttrl.types import ImageFile, Message

if TYPE_CHECKING:
    from PIL.Image import Image

MARK = "<image>"
"""Where a picture stands in the text of a turn."""
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 1 << 25
"""33.5 million; a screen of 7680 x 4320 has 33.2."""


def find_images(where: str, value: Any, folder: Path | None) -> tuple[ImageFile, ...]:
    """The pictures of one row: a path, or a list of paths, relative to the folder of the prompts file. Every file is decoded once.

    Raises ConfigError naming `where` for anything else than readable PNG, JPEG or WebP files inside `folder`.
    """
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"{where}: images are a path or a list of paths relative to the prompts file (data.images_field names the column; "
            "null leaves it alone)"
        )
    if not names:
        return ()
    if folder is None:
        raise ConfigError(
            f"{where}: pictures of hub data sets are not read; save them as files beside a prompts file, or set "
            "data.images_field: null"
        )
    return tuple(_image_file(where, name, folder.resolve()) for name in names)


def _image_file(where: str, name: str, folder: Path) -> ImageFile:
    pure = PurePosixPath(name)
    if pure.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in pure.parts or "\0" in name:
        raise ConfigError(
            f"{where}: picture {name!r}: paths are relative to the prompts file and stay inside its folder"
        )
    try:
        path = (folder / pure).resolve()
        inside, there = path.is_relative_to(folder), path.is_file()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise ConfigError(f"{where}: picture {name!r} cannot be read: {error}") from None
    if not inside:
        raise ConfigError(f"{where}: picture {name!r} is a link that leads out of the folder of the prompts file")
    if not there:
        raise ConfigError(f"{where}: picture {name!r}: no such file in {folder}")
    try:
        content = _content(path)
        _decode(content)
    except ValueError as error:
        raise ConfigError(f"{where}: picture {name!r}: {error}") from None
    return ImageFile(path=str(path), digest=hashlib.sha256(content).hexdigest())


def open_image(image: ImageFile) -> Image:
    """The pixels as RGB. Raises ConfigError when the file is no longer the one that was checked."""
    try:
        content = _content(Path(image.path))
        if hashlib.sha256(content).hexdigest() != image.digest:
            raise ValueError("it has changed since the prompts were read, or is another file on this machine")
        return _decode(content)
    except ValueError as error:
        raise ConfigError(f"picture {image.path}: {error}") from None


def _content(path: Path) -> bytes:
    """Raises ValueError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"the file has more than {MAX_BYTES >> 20} MiB")
    return content


def _decode(content: bytes) -> Image:
    """Raises ValueError. An orientation that a camera noted is applied; of an animation only the first frame is seen."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit is for the whole process; ours is below it
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"not a {', '.join(FORMATS)} picture") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more pixels than the limit of {MAX_PIXELS}") from None
    except (
        OSError,
        SyntaxError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
    ) as error:  # Pillow's, for broken files
        raise ValueError(f"cannot be decoded: {error}") from None


def place_images(where: str, messages: Sequence[Message], count: int) -> tuple[Message, ...]:
    """The turns with one MARK per picture: as the text has them, else all of them before the text of the first user turn.

    Raises ConfigError when the text has marks, but not one for each of the `count` pictures.
    """
    marks = sum(message.content.count(MARK) for message in messages)
    if count == 0 or marks == count:
        return tuple(messages)
    if marks:
        raise ConfigError(f"{where}: the text has {marks} {MARK} marks for {count} pictures; one each, or none at all")
    first = next((i for i, message in enumerate(messages) if message.role == "user"), 0)
    placed = list(messages)
    placed[first] = Message(role=messages[first].role, content=MARK * count + messages[first].content)
    return tuple(placed)


def parts_of(content: str) -> list[Mapping[str, str]]:
    """The content of a turn as chat templates of vision models take it. Example: "a<image>b" -> text a, image, text b."""
    parts: list[Mapping[str, str]] = []
    for number, text in enumerate(content.split(MARK)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts
