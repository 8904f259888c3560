"""How a prompt becomes token ids: the model's chat template, plain text, or a text file of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ttrl.config.explain import suggest
from ttrl.errors import ConfigError
from ttrl.pictures import MARK, parts_of
from ttrl.types import ImageFile, Message

if TYPE_CHECKING:
    from ttrl.model.load import Tokenizer
    from ttrl.model.processor import Pictures

SLOT = "{prompt}"
INSTRUCTIONS = {
    "chat": "",
    "boxed": "\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "choice": "\n\nThink step by step, then finish with: The answer is (X), where X is the letter of the right choice.",
}
NAMES = ("raw", *INSTRUCTIONS)


def check_template(template: str) -> None:
    """Raises ConfigError for an unknown name, a missing file, or a file without exactly one {prompt}."""
    if template in NAMES:
        return
    if not template.endswith(".txt"):
        raise ConfigError(
            f"data.template: unknown template {template!r}.{suggest(template, NAMES)} A file of your own ends in .txt."
        )
    count = _read(template).count(SLOT)
    if count != 1:
        raise ConfigError(f"data.template: {template} must contain {SLOT} exactly once, it does {count} times")


def describe(template: str) -> str:
    """The name; for a file also a hash of its content, since two files may have one name."""
    if template in NAMES:
        return template
    return f"{Path(template).name} {hashlib.sha256(_read(template).encode()).hexdigest()[:16]}"


def render(messages: Sequence[Message], tokenizer: Tokenizer, template: str) -> list[int]:
    """Token ids of the prompt, special tokens included.

    `chat`, `boxed`, `choice` use the tokenizer's chat template (the latter two append an instruction to the last user turn);
    `raw` and text files encode plain text and take a single user turn only. Raises ConfigError.
    """
    chat = template in INSTRUCTIONS  # the template wrote the special tokens itself
    return tokenizer.encode(_text(messages, tokenizer, template, None), add_special_tokens=not chat)


def render_images(
    messages: Sequence[Message], tokenizer: Tokenizer, template: str, pictures: Pictures, images: Sequence[ImageFile]
) -> tuple[list[int], list[int]]:
    """As `render`, for a vision-language model: with as many image tokens as the pictures take, and with one for each.

    Every turn is given to the chat template as parts, and the marks of `images` become the model's own image tokens.
    """
    text = _text(messages, tokenizer, template, pictures)
    return pictures.encode(text, images, add_special_tokens=template not in INSTRUCTIONS)


def _text(messages: Sequence[Message], tokenizer: Tokenizer, template: str, pictures: Pictures | None) -> str:
    """The prompt as text; with `pictures`, with one image token of the model per mark."""
    if template in INSTRUCTIONS:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"data.template {template!r} needs a chat template, which this tokenizer does not have; use raw or a .txt file"
            )
        contents = [m.content for m in messages]
        last_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=len(messages) - 1)
        contents[last_user] += INSTRUCTIONS[template]
        turns = [
            {"role": m.role, "content": content if pictures is None else parts_of(content)}
            for m, content in zip(messages, contents, strict=True)
        ]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    if len(messages) != 1:
        raise ConfigError(f"data.template {template!r} takes prompts of one turn; use chat for conversations")
    content = messages[0].content
    text = content if template == "raw" else _read(template).replace(SLOT, content)
    return text if pictures is None else text.replace(MARK, pictures.image_token)


def _read(template: str) -> str:
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"data.template: {template} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"data.template: {template} is not UTF-8 text") from None
