"""Prompts with pictures for vLLM: it is given the files' pixels and one image token each, and makes the rest itself."""

from __future__ import annotations

from typing import Any

from ttrl.errors import EngineError
from ttrl.pictures import open_image
from ttrl.types import Request


def with_pictures(vllm: Any, request: Request, context: list[int]) -> Any:
    """The input of a vLLM LLMEngine for a request whose prompt has pictures.

    Raises EngineError when vLLM does not take them, or counts other image tokens than the processor that made the prompt; ConfigError
    for a file that changed.
    """
    prompt = request.prompt
    assert prompt.marked_ids is not None, "a prompt with pictures comes from tokenize"
    opened = [open_image(image) for image in prompt.images]
    ids = [*prompt.marked_ids.tolist(), *request.prefix.tolist()]
    given = {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": opened},
    }  # vllm.inputs.TokensPrompt, without importing vLLM
    try:
        (made,) = vllm.renderer.render_cmpl([given])
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise EngineError(f"vLLM does not take the pictures of prompt {prompt.id!r}: {error}") from error
    if list(made["prompt_token_ids"]) != context:
        raise EngineError(
            f"vLLM makes {len(made['prompt_token_ids'])} tokens of prompt {prompt.id!r} and its pictures, the processor of the model "
            f"{len(context)}, or others: what it samples would not be what is trained"
        )
    return made
