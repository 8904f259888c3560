"""No gradient on the tokens of the answer itself (OM-GRPO, arXiv 2608.03119).

The reward is read from the answer. A model that only learns to say the popular answer more often is paid for that although its
reasoning is the same as before; without a gradient on those tokens the only way to be paid more often is to reason towards it.
The paper finds that masking in part (a weight of 0.5 to 0.75) is worse than none, so the mask here is all or nothing.

The span is the last place in the text where the answer, as the reward read it, stands. An answer that is written otherwise in the text
than in the group's `answers` (normalised coordinates, for example) is not found; train/answer_masked says how many were.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ttrl.metrics import MetricSet
from ttrl.objectives import Decoder
from ttrl.trainers.shapers.base import Shaper, masked
from ttrl.types import FloatArray, IntArray, Sample, Scored

SPAN = "answer_span"


def answer_tokens(token_ids: IntArray, answer: str, decode: Callable[[IntArray], str]) -> tuple[int, int] | None:
    """(first, stop) of the tokens that hold some of the last occurrence of `answer`; None when it does not occur.

    Decodes O(log T) prefixes, because tokens do not decode to whole characters one by one.
    """
    text = decode(token_ids)
    start = text.rfind(answer)
    if start < 0:
        start = text.lower().rfind(answer.lower())
    if start < 0 or not answer:
        return None

    def length(count: int) -> int:
        return len(decode(token_ids[:count]))

    counts = range(len(token_ids) + 1)
    first = bisect_right(counts, start, key=length) - 1
    return first, bisect_left(counts, start + len(answer), key=length)


class AnswerSpan(Shaper):
    """`shape: [answer_span]`. With `to_end`, what follows the answer (a closing brace, the end of text) is masked too."""

    needs = frozenset({"tokenizer"})

    def __init__(self, *, to_end: bool = False) -> None:
        self._to_end = to_end
        self._tokenizer: Decoder | None = None

    def take_tokenizer(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer

    def on_group(self, samples: list[Sample], scored: Scored, trained: IntArray) -> list[Sample]:
        return [
            replace(sample, extras={**sample.extras, SPAN: self._span(sample.completion_ids, scored.answers[int(i)])})
            for sample, i in zip(samples, trained, strict=True)
        ]

    def _span(self, token_ids: IntArray, answer: str | None) -> FloatArray:
        flags = np.zeros(len(token_ids), np.float32)
        found = answer_tokens(token_ids, answer, self._decode) if answer else None
        if found is not None:
            flags[found[0] : None if self._to_end else found[1]] = 1.0
        return flags

    def _decode(self, token_ids: IntArray) -> str:
        assert self._tokenizer is not None, "take_tokenizer comes first"
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    def on_step(self, samples: list[Sample], step: int, metrics: MetricSet) -> list[Sample]:
        """train/answer_masked: share of samples whose answer was found and masked."""
        result = []
        for sample in samples:
            span = sample.extras[SPAN] > 0
            metrics.mean("train/answer_masked", float(span.any()))
            left = {name: values for name, values in sample.extras.items() if name != SPAN}
            result.append(masked(replace(sample, extras=left), ~span))
        return result
