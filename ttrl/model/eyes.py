"""Prompts with pictures, as a language model takes them in: one embedding and one position per token.

The vision tower runs once per prompt; what comes after is the language model alone, on embeddings instead of token ids. So everything
that is built on it (shared prefixes, packing, vocabulary in chunks) needs to know nothing of pictures. Image tokens that a completion
happens to contain are ordinary tokens.

That this is what the model does by itself is tried on a made-up picture, not guessed from its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ttrl.errors import ConfigError
from ttrl.model.processor import Pictures, open_pictures
from ttrl.types import ImageFile, IntArray

TRIAL_TOKENS = 4
"""Tokens behind the picture of the trial: their positions depend on what the picture took."""


@dataclass(frozen=True, slots=True)
class Seen:
    """C tokens of context, the prompt's pictures among them."""

    embeds: Tensor
    """[C, D]; with gradient where the model has some"""
    positions: Tensor
    """[1, C], or [3, 1, C] for models that count time, height and width (M-RoPE, arXiv 2409.12191)"""
    next_position: int
    """of the first token behind the context, in all dimensions"""

    def followed_by(self, embeds: Tensor) -> Seen:
        """The same context and T more tokens, [R, T, D], per row: embeds [R, C + T, D], positions [R, C + T] or [3, R, C + T]."""
        rows, more = embeds.shape[:2]
        behind = self.next_position + torch.arange(more, device=embeds.device)
        positions = torch.cat([self.positions, behind.expand(*self.positions.shape[:-1], more)], dim=-1)
        return Seen(
            embeds=torch.cat([self.embeds.expand(rows, -1, -1), embeds], dim=1),
            positions=positions.expand(*positions.shape[:-2], rows, -1),
            next_position=self.next_position + more,
        )


class Eyes:
    """What turns token ids and pictures into embeddings with one model. The refusal of a model is raised when a picture comes."""

    def __init__(self, model: PreTrainedModel, pictures: Pictures | ConfigError, name: str) -> None:
        self._model, self._refusal = model, pictures if isinstance(pictures, ConfigError) else None
        self._pictures = None if isinstance(pictures, ConfigError) else pictures
        if self._pictures is not None:
            self._refusal = _refusal(self, self._pictures, model, name)

    def see(self, token_ids: IntArray, images: Sequence[ImageFile], prompt: int | None = None) -> Seen:
        """[C] token ids, whose first `prompt` ones (default: all) hold the image tokens of `images`.

        Without images the vision tower runs on a made-up picture to no effect, so that every module runs as with one. Raises
        ConfigError for a model whose pictures cannot be handled, or a picture that is no longer the one it was.
        """
        if self._refusal is not None or self._pictures is None:
            raise ConfigError(str(self._refusal))
        pixels = self._pictures.pixels(images) if images else self._pictures.trial().pixels
        held = len(token_ids) if prompt is None else prompt
        return self._see(token_ids, pixels, self._pictures, held if images else 0)

    def _see(self, token_ids: IntArray, pixels: Mapping[str, Any], pictures: Pictures, prompt: int) -> Seen:
        device = self._model.device
        ids = torch.tensor(token_ids, dtype=torch.long, device=device)
        held = self._tensors(pixels)
        places = (ids == pictures.image_token_id) & (torch.arange(len(ids), device=device) < prompt)
        features = self._model.get_image_features(**held, return_dict=True).pooler_output
        if not isinstance(features, Tensor):
            features = torch.cat(list(features), dim=0)
        embeds = self._model.get_input_embeddings()(ids)
        features = features.reshape(-1, embeds.shape[-1]).to(embeds.dtype)
        if prompt == 0:
            embeds = embeds + 0.0 * features.sum()
        elif len(features) == int(places.sum()):
            embeds = embeds.masked_scatter(places[:, None], features)
        else:
            raise ConfigError(f"a prompt has {int(places.sum())} image tokens, but its pictures make {len(features)}")
        positions = self._positions(ids, places, held if prompt else {})
        return Seen(embeds=embeds, positions=positions, next_position=int(positions.max()) + 1)

    def _tensors(self, pixels: Mapping[str, Any]) -> dict[str, Tensor]:
        """On the model's device, in its dtype."""
        held = {name: torch.tensor(value, device=self._model.device) for name, value in pixels.items()}
        return {name: x.to(self._model.dtype) if x.is_floating_point() else x for name, x in held.items()}

    def _positions(self, ids: Tensor, places: Tensor, pixels: Mapping[str, Tensor]) -> Tensor:
        rope_index = getattr(self._model.base_model, "get_rope_index", None)
        if rope_index is None:
            return torch.arange(len(ids), device=ids.device)[None]
        grids = {name: value for name, value in pixels.items() if name.endswith("grid_thw")}
        runs = int((places[1:] & ~places[:-1]).sum() + places[:1].sum())
        if runs != sum(len(grid) for grid in grids.values()):
            raise ConfigError(
                "pictures stand side by side with nothing between their tokens, which this model cannot count; use a chat template, "
                "which sets them apart, or put text between them"
            )
        found, _ = rope_index(ids[None], mm_token_type_ids=places[None].int(), **grids)
        positions: Tensor = found
        return positions


def open_eyes(model: PreTrainedModel, path: str) -> Eyes | None:
    """For a model as it was loaded from `path`, before anything is changed about it. None for a model of text alone.

    A processor that is missing, or a model that does not do what is expected here, is no error until a picture comes.
    """
    if getattr(model.config, "vision_config", None) is None or not hasattr(model, "get_image_features"):
        return None
    try:
        pictures: Pictures | ConfigError = open_pictures(path)
    except ConfigError as error:
        pictures = error
    return Eyes(model, pictures, path)


@torch.no_grad()
def _refusal(eyes: Eyes, pictures: Pictures, model: PreTrainedModel, name: str) -> ConfigError | None:
    """Why pictures are refused: given one its own way, the model computes other logits than on our embeddings and positions."""
    where = f"model.path {name!r}: pictures with a {type(model).__name__} are not supported"
    try:
        trial = pictures.trial()
        behind = np.arange(1, 1 + TRIAL_TOKENS) % model.config.get_text_config().vocab_size
        behind = np.where(behind == pictures.image_token_id, 0, behind)
        whole = np.concatenate([trial.token_ids, behind]).astype(np.int32)
        ids = torch.tensor(whole, dtype=torch.long, device=model.device)[None]
        own = eyes._tensors(trial.pixels)
        own |= {key: (ids == pictures.image_token_id).int() for key in trial.types}
        expected = model(input_ids=ids, use_cache=False, **own).logits.float()
        seen = eyes._see(whole, trial.pixels, pictures, len(trial.token_ids))
        found = model(inputs_embeds=seen.embeds[None], position_ids=seen.positions, use_cache=False).logits.float()
    except (NotImplementedError, AttributeError, TypeError, RuntimeError, ValueError, LookupError) as error:
        reason = str(error).strip().partition("\n")[0]
        return ConfigError(f"{where}: {type(error).__name__}: {reason}")
    finally:
        if hasattr(model.base_model, "rope_deltas"):  # remembered from the trial; later calls state their positions
            model.base_model.rope_deltas = None
    off = float((found - expected).abs().amax() / expected.abs().amax().clamp_min(1.0))
    if not off <= (1e-3 if model.dtype == torch.float32 else 5e-2):
        return ConfigError(
            f"{where}: its own forward pass is {off:.1e} off the one on embeddings that sampling and training use"
        )
    return None
