"""From pictures to what a vision-language model takes: image tokens among the prompt's tokens, and pixel tensors beside them.

Both come from the model's own processor in transformers. Which tensors there are depends on the model, so they are handed on by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers
from transformers import AutoProcessor

from ttrl.errors import ConfigError
from ttrl.model.load import resolve_path
from ttrl.pictures import open_image
from ttrl.prompts import PromptRecord
from ttrl.types import ImageFile

CACHE_BYTES = 256 << 20
"""Pixel tensors held per process. A prompt comes back in every epoch, and in one step first to the engine, then to the trainer."""
OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})

Pixels = Mapping[str, npt.NDArray[Any]]
"""What the vision tower takes, by the names of the model: `pixel_values`, and for some models a grid."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A prompt of one made-up picture and nothing else."""

    token_ids: npt.NDArray[np.integer]
    """[P]"""
    pixels: Pixels
    types: tuple[str, ...]
    """Inputs of the model that say per token whether it belongs to a picture."""


class Pictures:
    """The processor of one model, and the pixel tensors it made last. Used by one thread at a time: with `rollout.ahead` the engine
    samples while the trainer works."""

    def __init__(self, processor: Any, path: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._processor, self._path, self._room = processor, path, cache_bytes
        self.image_token = str(processor.image_token)
        self.image_token_id = int(processor.tokenizer.convert_tokens_to_ids(self.image_token))
        self._made: OrderedDict[tuple[str, ...], Pixels] = OrderedDict()
        self._trial: Trial | None = None
        self._lock = RLock()

    def encode(
        self, text: str, images: Sequence[ImageFile], *, add_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        """Token ids of a text that has one image token per picture: with as many as each picture takes, and as it stands.

        Raises ConfigError when the text has another number of image tokens, or a picture cannot be opened or processed.
        """
        found = text.count(self.image_token)
        if found != len(images):
            raise ConfigError(
                f"after its template it has {found} image tokens ({self.image_token}) for {len(images)} pictures: the template does "
                "not place pictures, or the text itself holds the token"
            )
        marked = list(self._processor.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        if not images:
            return marked, marked
        opened = [open_image(image) for image in images]
        with self._lock:
            made = self._process(text, opened, add_special_tokens=add_special_tokens)
            self._keep(tuple(image.digest for image in images), _pixels(made))
        return [int(token) for token in np.asarray(made["input_ids"]).reshape(-1)], marked

    def pixels(self, images: Sequence[ImageFile]) -> Pixels:
        """The tensors of these pictures, in order. Raises ConfigError when a file is no longer what it was."""
        key = tuple(image.digest for image in images)
        with self._lock:
            if key not in self._made:
                opened = [open_image(image) for image in images]
                made = self._process(self.image_token * len(opened), opened, add_special_tokens=False)
                return self._keep(key, _pixels(made))
            self._made.move_to_end(key)
            return self._made[key]

    def trial(self) -> Trial:
        """What the processor makes of a picture of noise. Made once."""
        from PIL import Image

        with self._lock:
            if self._trial is None:
                noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
                made = self._process(self.image_token, [Image.fromarray(noise)], add_special_tokens=False)
                types = tuple(name for name in made if name.endswith("token_type_ids"))
                ids = np.asarray(made["input_ids"]).reshape(-1)
                self._trial = Trial(token_ids=ids, pixels=_pixels(made), types=types)
            return self._trial

    def _process(self, text: str, opened: Sequence[Any], *, add_special_tokens: bool) -> Mapping[str, Any]:
        try:
            made: Mapping[str, Any] = self._processor(
                text=[text], images=list(opened), return_tensors="pt", add_special_tokens=add_special_tokens
            )
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(f"model.path {self._path!r}: its processor does not take this: {error}") from error
        return made

    def _keep(self, key: tuple[str, ...], pixels: Pixels) -> Pixels:
        """The last ones that fit; the newest always stays."""
        self._made[key] = pixels
        while len(self._made) > 1 and sum(a.nbytes for held in self._made.values() for a in held.values()) > self._room:
            self._made.popitem(last=False)
        return pixels


def _pixels(made: Mapping[str, Any]) -> Pixels:
    return {name: value.numpy() for name, value in made.items() if name not in OF_TEXT}


@lru_cache(maxsize=4)
def open_pictures(path: str) -> Pictures:
    """The processor of a model folder, bundle or hub name; one per process, so that engine and trainer share what it made.

    Raises ConfigError when there is none that knows pictures.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(resolve_path(path), trust_remote_code=False)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"model.path {path!r}: cannot load a processor for pictures: {_reason(error)}") from error
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "image_token"):
        raise ConfigError(
            f"model.path {path!r}: prompts have images, but the model comes without a processor for pictures (a folder of a "
            "vision-language model has processor_config.json or preprocessor_config.json); data.images_field: null leaves them out"
        )
    return Pictures(processor, path)


def pictures_for(path: str, records: Iterable[PromptRecord]) -> Pictures | None:
    """The processor of the model, when one of the prompts has images. Raises ConfigError as `open_pictures`."""
    return open_pictures(path) if any(record.images for record in records) else None


def _reason(error: BaseException) -> str:
    """AutoProcessor fails with errors of its own making where a model's video processor needs torchvision."""
    text = str(error).strip().split("\n")[0]
    if find_spec("torchvision") is None:
        return f"{text} (torchvision is not installed, which the processors of models that also take videos need)"
    return text
