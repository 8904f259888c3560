"""Builders for tests with pictures: tiny random vision-language models with their processors, picture files, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_torch import BOS, EOS, PAD, POSITIONS, SPREAD, WIDE, prompt, seeded, tiny_tokenizer
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from ttrl.model.processor import Pictures
from ttrl.pictures import find_images
from ttrl.types import ImageFile, Message, Prompt

SIDE, PATCH = 16, 4
TOKENS = (SIDE // PATCH) ** 2
"""Image tokens of one picture."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
)


def image_tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    """The tokenizer of characters with image tokens behind them, and a chat template that places pictures."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens or ("<image>",))})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llava(
    seed: int = 0, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> LlavaForConditionalGeneration:
    """CLIP and Llama, random by seed; 16 image tokens per picture. `text` and `vision` change their sizes."""
    tokenizer = image_tokenizer()
    language = LlamaConfig(
        **{
            **WIDE, **SPREAD, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS,
            "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **(text or {}),
        }
    )  # fmt: skip
    tower = CLIPVisionConfig(
        **{
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
            "patch_size": PATCH, "initializer_range": 0.1, "initializer_factor": 3.0, **(vision or {}),
        }
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=language, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return seeded(lambda: LlavaForConditionalGeneration(config), seed)  # type: ignore[no-any-return]


def save_tiny_llava(folder: Path, seed: int = 0, **sizes: dict[str, Any]) -> Path:
    """Model and processor as `from_pretrained` wants them."""
    model = tiny_llava(seed, **sizes)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False), tokenizer=image_tokenizer(),
        patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (20, 14), **options: Any) -> Path:
    """A file of noise; the format is that of its ending."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(file, **options)
    return file


def pictures(folder: Path, count: int) -> tuple[ImageFile, ...]:
    """Checked files of noise."""
    names = [picture(folder / f"{i}.png", seed=i).name for i in range(count)]
    return find_images("test", names, folder)


def image_prompt(made_by: Pictures, identifier: str, images: Sequence[ImageFile], text: str = "what is it?") -> Prompt:
    """Encoded by the model's processor, pictures first."""
    marks = "-".join([made_by.image_token] * len(images))
    ids, marked = made_by.encode(f"<s>{marks}{text}", images, add_special_tokens=False)
    return Prompt(
        id=identifier,
        messages=(Message(role="user", content=text),),
        token_ids=np.asarray(ids, np.int32),
        images=tuple(images),
        marked_ids=np.asarray(marked, np.int32),
    )


def text_prompt(identifier: str, length: int = 6) -> Prompt:
    """Without a picture."""
    return prompt(identifier, length)


def row_scores(
    model: Any, processor: Any, rows: Sequence[tuple[Prompt, Any]], temperature: float
) -> list[torch.Tensor]:
    """[T] log-probs per (prompt, completion) from one plain call of the model on right-padded rows, with their pixel values."""
    ids = [np.concatenate([of.token_ids, completion]) for of, completion in rows]
    longest = max(len(row) for row in ids)
    whole, mask = torch.zeros((len(ids), longest), dtype=torch.long), torch.zeros((len(ids), longest), dtype=torch.long)
    for i, row in enumerate(ids):
        whole[i, : len(row)], mask[i, : len(row)] = torch.as_tensor(row), 1
    opened = [Image.open(image.path).convert("RGB") for of, _ in rows for image in of.images]
    made = dict(processor.image_processor(opened, return_tensors="pt")) if opened else {}
    made = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in made.items()}
    if "image_grid_thw" in made:
        image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        made["mm_token_type_ids"] = (whole == image).int()
    logits = model(input_ids=whole, attention_mask=mask, use_cache=False, **made).logits / (temperature or 1.0)
    found = []
    for i, (of, completion) in enumerate(rows):
        table = torch.log_softmax(logits[i, len(of.token_ids) - 1 : len(ids[i]) - 1], dim=-1)
        found.append(table[torch.arange(len(completion)), torch.as_tensor(np.asarray(completion), dtype=torch.long)])
    return found


class QwenProcessor:
    """What transformers' processor of Qwen2.5-VL does for pictures. That class needs torchvision, for videos alone."""

    image_token = "<|image_pad|>"

    def __init__(self) -> None:
        self.tokenizer = image_tokenizer(*QWEN_TOKENS)
        self.image_processor = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, min_pixels=64, max_pixels=1024)

    def __call__(self, text: list[str], images: list[Any], **_: Any) -> dict[str, torch.Tensor]:
        made = self.image_processor(images, return_tensors="pt")
        for grid in made["image_grid_thw"]:
            text = [text[0].replace(self.image_token, "\0" * (int(grid.prod()) // 4), 1)]
        ids = self.tokenizer(text[0].replace("\0", self.image_token), add_special_tokens=False, return_tensors="pt")
        types = (ids["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)).int()
        return {**ids, **made, "mm_token_type_ids": types}


QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def save_tiny_qwen(folder: Path, seed: int = 0) -> Path:
    """Qwen2.5-VL: positions of three dimensions (M-RoPE), pictures of any size, a windowed vision tower. No processor files."""
    tokenizer = image_tokenizer(*QWEN_TOKENS)
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS))
    config = Qwen2_5_VLConfig(
        text_config={
            **WIDE, **SPREAD, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}, "pad_token_id": PAD,
            "bos_token_id": BOS, "eos_token_id": EOS,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": PATCH, "window_size": 16,
            "out_hidden_size": WIDE["hidden_size"], "fullatt_block_indexes": [1], "initializer_range": 0.1,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    model = seeded(lambda: Qwen2_5_VLForConditionalGeneration(config), seed)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class InternVLProcessor:
    """One tile of four tokens between two others per picture. The class of transformers needs torchvision, for videos alone."""

    image_token = "<IMG_CONTEXT>"

    def __init__(self) -> None:
        self.tokenizer = image_tokenizer(*INTERNVL_TOKENS)

    def image_processor(self, images: list[Any], **_: Any) -> dict[str, torch.Tensor]:
        pixels = [np.array(image.resize((SIDE, SIDE)), np.float32) / 127.5 - 1 for image in images]
        return {"pixel_values": torch.as_tensor(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()}

    def __call__(self, text: list[str], images: list[Any], **_: Any) -> dict[str, torch.Tensor]:
        whole = text[0].replace(self.image_token, "<img>" + "\0" * 4 + "</img>").replace("\0", self.image_token)
        ids = self.tokenizer(whole, add_special_tokens=False, return_tensors="pt")
        return {**ids, **self.image_processor(images)}


INTERNVL_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>")


def save_tiny_internvl(folder: Path, seed: int = 0) -> Path:
    """InternVL: a quarter of the patches becomes tokens; Qwen2 reads them. No processor files."""
    tokenizer = image_tokenizer(*INTERNVL_TOKENS)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "initializer_range": 0.1, "layer_scale_init_value": 1.0,
        },
        text_config={
            **WIDE, **SPREAD, "model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    model = seeded(lambda: InternVLForConditionalGeneration(config), seed)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_qwen_processor(folder: Path) -> Any:
    """The processor of transformers, which needs torchvision; put beside the model of `save_tiny_qwen`."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes = {"patch_size": PATCH, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    images, videos = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    made = Qwen2_5_VLProcessor(image_processor=images, video_processor=videos, tokenizer=image_tokenizer(*QWEN_TOKENS))
    made.save_pretrained(folder)
    return made


def save_internvl_processor(folder: Path) -> Any:
    """The processor of transformers, which needs torchvision. It cuts a picture into tiles: as many as its shape asks for."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    plain, size = image_tokenizer(*INTERNVL_TOKENS), {"height": SIDE, "width": SIDE}
    roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, bos_token=plain.bos_token, eos_token=plain.eos_token, pad_token=plain.pad_token,
        extra_special_tokens={**roles, "video_token": "<img>"},
    )  # fmt: skip
    images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    made = InternVLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
    )
    made.save_pretrained(folder)
    return made
