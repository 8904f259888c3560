"""What an objective may do beyond `ttrl.protocols.Objective`. Like there, plug-ins satisfy these by shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from ttrl.metrics import MetricSet
from ttrl.types import Sample


@runtime_checkable
class StepObjective(Protocol):
    """It looks at all samples of a step at once, and says what their loss is divided by."""

    def finish(self, samples: list[Sample], step: int) -> tuple[list[Sample], MetricSet]:
        """The samples to pack, in the order given, and metrics of the step. Called once per step that has samples."""
        ...

    def denominator(self, samples: Sequence[Sample]) -> float:
        """`tokens_in_step` of an update on these finished samples, over all micro-batches and ranks."""
        ...


class Decoder(Protocol):
    """The half of a tokenizer that turns tokens into text."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str: ...


@runtime_checkable
class TokenizedObjective(Protocol):
    """It has to find text among tokens."""

    def take_tokenizer(self, tokenizer: Decoder) -> None:
        """Called once, before the first group."""
        ...
