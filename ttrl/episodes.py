"""Where a completion may be cut: text or tokens -> cut points between its episodes. Pure functions, no model.

A cut point is the number of tokens before it, 0 < cut < T. A completion with k - 1 cuts has k episodes.
"""

from __future__ import annotations

import inspect
import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ttrl.types import IntArray

MARKERS = (
    "Wait", "But wait", "Alternatively", "Is there another way to think about this?", "But let me double-check", "But hold on",
)  # fmt: skip
"""First words of a paragraph that turns to something new (those of the analyses of MRT, arXiv 2503.07572)."""

_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")

Decode = Callable[[IntArray], str]
Splitter = Callable[[IntArray, Decode], tuple[int, ...]]


def episode_starts(paragraphs: Sequence[str], *, markers: Sequence[str] = MARKERS, shortest: int = 3) -> list[int]:
    """Indices of the paragraphs that open a new episode; paragraph 0 opens the first one and is not listed.

    A paragraph that starts with a marker opens one, unless the running episode has fewer than `shortest` paragraphs: then it
    goes on. Golden: p0 p1 p2 "Wait, ..." p4 p5 "Alternatively, ..." p7 -> [3, 6]; with "Wait" at index 2 instead of 3 -> [6].
    """
    starts: list[int] = []
    for index, paragraph in enumerate(paragraphs):
        running = index - (starts[-1] if starts else 0)
        if index and running >= shortest and paragraph.lstrip().startswith(tuple(markers)):
            starts.append(index)
    return starts


def paragraph_cuts(
    text: str, *, markers: Sequence[str] = MARKERS, shortest: int = 3, end: str | None = "</think>"
) -> list[int]:
    """Characters at which episodes start, by `episode_starts` over paragraphs (blank lines lie between them).

    Only the text before the first `end` is looked at: what follows the thinking is the answer.
    """
    thought = text.split(end, 1)[0] if end else text
    gaps = list(_BLANK_LINES.finditer(thought.rstrip()))
    begins = [0, *(gap.end() for gap in gaps)]
    paragraphs = [
        thought[a:b] for a, b in zip(begins, [*(gap.start() for gap in gaps), len(thought)], strict=True)
    ]  # fmt: skip
    return [begins[i] for i in episode_starts(paragraphs, markers=markers, shortest=shortest)]


def delimiter_cuts(text: str, *, delimiter: str) -> list[int]:
    """Characters right after each `delimiter`: for texts whose steps end with one, such as the lines of a list."""
    return [match.end() for match in re.finditer(re.escape(delimiter), text)]


def merged(cuts: Sequence[int], *, most: int | None = None, every: int = 1) -> list[int]:
    """At most the first `most` cuts; of these every `every`-th, so that so many episodes become one."""
    return list(cuts[:most])[every - 1 :: every]


def token_cuts(characters: Sequence[int], token_ids: IntArray, decode: Decode) -> list[int]:
    """For each place in the decoded text the smallest number of tokens whose text reaches it, by bisection; [T] tokens."""
    counts = range(len(token_ids) + 1)
    return [bisect_left(counts, place, key=lambda n: len(decode(token_ids[:n]))) for place in characters]


def splitter(rule: str, options: Mapping[str, Any]) -> Splitter:
    """A function (token ids [T], decode) -> cuts, increasing, none at the start or the end.

    Rules: `paragraphs` (options markers, shortest, end), `delimiter` (option delimiter), `tokens` (option n: every n tokens).
    All take `most` and `every`, see `merged`. Raises ValueError for an unknown rule, a missing option or a wrong value.
    """
    if rule not in _RULES:
        raise ValueError(f"unknown splitter {rule!r}; known: {', '.join(_RULES)}")
    merge = {key: options[key] for key in ("most", "every") if key in options}
    options = {key: value for key, value in options.items() if key not in merge}
    for key in ("most", "every", "n", "shortest"):
        value = merge.get(key, options.get(key))
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"splitter {rule!r}: {key} must be a whole number above 0, got {value!r}")
    try:
        inspect.signature(_RULES[rule]).bind((), "", **options)
    except TypeError as error:
        raise ValueError(f"splitter {rule!r}: {error}") from None
    if rule == "delimiter" and not options["delimiter"]:
        raise ValueError("splitter 'delimiter': the delimiter is empty")

    def cuts(token_ids: IntArray, decode: Decode) -> tuple[int, ...]:
        found = _RULES[rule](token_ids, decode, **options)
        inside = [a for a, _ in itertools.groupby(found) if 0 < a < len(token_ids)]
        return tuple(merged(inside, **merge))

    return cuts


def _by_paragraphs(
    token_ids: IntArray, decode: Decode, *, markers: Sequence[str] = MARKERS, shortest: int = 3,
    end: str | None = "</think>",
) -> list[int]:  # fmt: skip
    text = decode(token_ids)
    return token_cuts(paragraph_cuts(text, markers=markers, shortest=shortest, end=end), token_ids, decode)


def _by_delimiter(token_ids: IntArray, decode: Decode, *, delimiter: str) -> list[int]:
    return token_cuts(delimiter_cuts(decode(token_ids), delimiter=delimiter), token_ids, decode)


def _by_tokens(token_ids: IntArray, decode: Decode, *, n: int) -> list[int]:
    return list(range(n, len(token_ids), n))


_RULES: dict[str, Callable[..., list[int]]] = {
    "paragraphs": _by_paragraphs, "delimiter": _by_delimiter, "tokens": _by_tokens,
}  # fmt: skip
