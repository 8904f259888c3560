"""Answers that are data: JSON values, screen coordinates, and what a recipe's own pattern finds.

Coordinates have one canonical text: `(x,y)` for a point, `[x1,y1,x2,y2]` for a box, plain decimals without trailing zeros, no blanks,
in the units the model wrote. `parse_box` and `parse_point` turn that text into numbers again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NoReturn

from ttrl.rewards.sandbox import Task, shared_sandbox

MAX_JSON = 1_000
"""Characters of one JSON answer."""
MAX_ATTEMPTS = 2_000
"""Brackets at which a JSON value is looked for, counted from the end."""
MAX_PATTERN = 500

_COORDINATE = r"([-−+]?\d{1,7}(?:\.\d{1,10})?)"
_COMMA = r"\s{0,4},\s{0,4}"
_FOUR = re.compile(rf"[\[(]\s{{0,4}}{_COORDINATE}{(_COMMA + _COORDINATE) * 3}\s{{0,4}}[\])]")
_TWO = re.compile(rf"[\[(]\s{{0,4}}{_COORDINATE}{_COMMA}{_COORDINATE}\s{{0,4}}[\])]")
_CORNERS = re.compile(rf"{_TWO.pattern}(?:{_COMMA}|\s{{0,4}}){_TWO.pattern}")
_NAMED = re.compile(
    rf"\bx[\"']?\s{{0,4}}[:=]\s{{0,4}}{_COORDINATE}{_COMMA}[\"']?y[\"']?\s{{0,4}}[:=]\s{{0,4}}{_COORDINATE}"
)


def json_answer(text: str, key: str | None = None) -> str | None:
    """The last object or array in the text, as canonical JSON; with `key`, the value under it in the last object that has it.

    Raises ValueError for a key that is not a non-empty string.
    """
    if key is not None and (not isinstance(key, str) or not key):
        raise ValueError(f"key must be the name of a member, got {key!r}")
    decoder = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
    starts = [match.start() for match in re.finditer(r"[{\[]", text)][-MAX_ATTEMPTS:]
    found, behind = None, 0
    for start in starts:
        if start < behind:
            continue  # inside a value that was read
        try:
            value, length = decoder.raw_decode(text[start : start + MAX_JSON])
        except (ValueError, RecursionError):
            continue
        behind = start + length
        if key is None:
            found = (value,)
        elif isinstance(value, dict) and key in value:
            found = (value[key],)
    if found is None or found[0] is None:
        return None
    return found[0] if isinstance(found[0], str) else dump_json(found[0])


def dump_json(value: Any) -> str:
    """Canonical JSON: keys sorted, no blanks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> int | float:
    """1.0 and 1 are one number; 1e999 is none."""
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def box_answer(text: str, size: Sequence[float] | None = None) -> str | None:
    """The last `[x1, y1, x2, y2]`, or the last pair of corners `(x1,y1),(x2,y2)`, with x1 < x2 and y1 < y2.

    `size` = [width, height] refuses boxes that leave the screen. Raises ValueError for a wrong size.
    """
    width, height = _size(size)
    last = max((*_FOUR.finditer(text), *_CORNERS.finditer(text)), key=lambda match: match.start(), default=None)
    if last is None:
        return None
    x1, y1, x2, y2 = (_decimal(number) for number in last.groups())
    if not (x1 < x2 and y1 < y2) or (width is not None and not (min(x1, y1) >= 0 and x2 <= width and y2 <= height)):
        return None
    return f"[{_spell(x1)},{_spell(y1)},{_spell(x2)},{_spell(y2)}]"


def point_answer(text: str, size: Sequence[float] | None = None) -> str | None:
    """The last `(x, y)`, `[x, y]` or `x=..., y=...`; a box is not a point. `size` as for boxes."""
    width, height = _size(size)
    last = max((*_TWO.finditer(text), *_NAMED.finditer(text)), key=lambda match: match.start(), default=None)
    if last is None:
        return None
    x, y = (_decimal(number) for number in last.groups())
    if width is not None and not (0 <= x <= width and 0 <= y <= height):
        return None
    return f"({_spell(x)},{_spell(y)})"


def parse_box(answer: str) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) of a canonical box. Raises ValueError for anything else."""
    found = _FOUR.fullmatch(answer)
    if found is None:
        raise ValueError(f"not a canonical box: {answer!r}")
    x1, y1, x2, y2 = map(float, found.groups())
    return x1, y1, x2, y2


def parse_point(answer: str) -> tuple[float, float]:
    """(x, y) of a canonical point. Raises ValueError for anything else."""
    found = _TWO.fullmatch(answer)
    if found is None:
        raise ValueError(f"not a canonical point: {answer!r}")
    x, y = map(float, found.groups())
    return x, y


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace("−", "-"))


def _spell(number: Decimal) -> str:
    text = format(number.normalize(), "f")
    return "0" if text == "-0" else text


def _size(size: Sequence[float] | None) -> tuple[Decimal | None, Decimal]:
    if size is None:
        return None, Decimal(0)
    if len(size) != 2 or not all(isinstance(side, int | float) and side > 0 for side in size):
        raise ValueError(f"size must be [width, height], got {size!r}")
    return Decimal(str(size[0])), Decimal(str(size[1]))


def regex_answers(texts: Sequence[str], pattern: str = "", group: int | str | None = None) -> list[str | None]:
    """Per text, the group of the last match; by default the first group, or the whole match of a pattern without groups.

    Patterns come with recipes and may backtrack for ever, so they run in the sandbox, on the last characters of each text; a
    search that hits a limit finds nothing. Raises ValueError for a wrong pattern or group.
    """
    if not isinstance(pattern, str) or not pattern or len(pattern) > MAX_PATTERN:
        raise ValueError(f"the regex extractor needs a pattern of 1 to {MAX_PATTERN} characters")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from None
    chosen = min(1, compiled.groups) if group is None else group
    if isinstance(chosen, bool) or not (chosen in compiled.groupindex or chosen in range(compiled.groups + 1)):
        raise ValueError(f"pattern {pattern!r} has no group {group!r}")
    number = compiled.groupindex[chosen] if isinstance(chosen, str) else chosen
    asked = {text: ("regex", pattern, str(number), text) for text in texts if text}
    tasks: list[Task] = list(asked.values())
    outcomes = dict(zip(asked, shared_sandbox().run(tasks), strict=True))
    return [outcomes[text].key if text else None for text in texts]
