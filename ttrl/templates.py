"""How a prompt becomes token ids: the model's chat template, plain text, or a text file of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ttrl.config.explain import suggest
from ttrl.errors import ConfigError
from ttrl.types import Message

if TYPE_CHECKING:
    from ttrl.model.load import Tokenizer

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
    `raw` and text files encode plain text and take a single user turn only.
    """
    if template in INSTRUCTIONS:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"data.template {template!r} needs a chat template, which this tokenizer does not have; use raw or a .txt file"
            )
        turns = [{"role": m.role, "content": m.content} for m in messages]
        last_user = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns) - 1)
        turns[last_user]["content"] += INSTRUCTIONS[template]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)  # the template wrote the special tokens itself
    if len(messages) != 1:
        raise ConfigError(f"data.template {template!r} takes prompts of one turn; use chat for conversations")
    content = messages[0].content
    text = content if template == "raw" else _read(template).replace(SLOT, content)
    return tokenizer.encode(text, add_special_tokens=True)


def _read(template: str) -> str:
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"data.template: {template} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"data.template: {template} is not UTF-8 text") from None
