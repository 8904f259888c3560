"""Which answers are the same answer. Equality of canonical forms, so reflexive, symmetric and transitive by construction.

`1/2`, `0.5`, `\\frac12` and `.50` are one class; `(1,2)` and `2,1` are two, and so are `dog` and `god`. Nothing is evaluated:
numbers are read by a regular expression with a bound on their digits, everything else is compared as normalised text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from ttrl.types import NO_ANSWER

MAX_DIGITS = 200
"""Longer numbers are compared as text; no answer of this field needs more."""
MAX_LENGTH = 10_000
"""Longer texts are compared as they are."""

_DROPPED = re.compile(r"\\(?:left|right|displaystyle|textstyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])|\\[!,;: ]|[$~]")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|mathsf)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degree|°")
_SHORT_NUMERATOR = re.compile(r"\\frac\s*(\d)\s*(?=[\d{])")
_SHORT_DENOMINATOR = re.compile(r"(\\frac\{[^{}]*\})\s*(\d)(?!\d)")
_GROUP_SPACE = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
_OTHER_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?[\d.]+)\}\{([+-]?[\d.]+)\}")
_RATIO = re.compile(r"([+-]?[\d.]+)/([+-]?[\d.]+)")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_NAMED = re.compile(r"[A-Za-z]\s*=\s*(?P<value>[^=<>]+)")


def classes(answers: Sequence[str | None], kind: str) -> list[int]:
    """Class of each answer, numbered from 0 in order of appearance; NO_ANSWER for None and for empty text."""
    numbers: dict[str, int] = {}
    return [
        NO_ANSWER if answer is None or not (form := canonical(answer, kind)) else numbers.setdefault(form, len(numbers))
        for answer in answers
    ]


def same(first: str | None, second: str | None, kind: str) -> bool:
    """True when both are answers and belong to one class."""
    return classes([first, second], kind) == [0, 0]


def canonical(answer: str, kind: str) -> str:
    """The text that all answers of one class share. Empty when there is no answer in it."""
    if kind == "choice":
        return answer.strip().upper()
    if kind == "label":
        return " ".join(answer.casefold().split())
    return _canonical_math(answer)


def _canonical_math(answer: str) -> str:
    text = answer.strip()
    if len(text) > MAX_LENGTH:
        return text
    text = _TEXT.sub(r"\1", _TEXT.sub(r"\1", text))  # twice: \text{\textbf{B}}
    text = text.replace("−", "-").replace("{,}", ",")
    text = _DROPPED.sub("", text).replace("\\%", "%")
    text = _DEGREES.sub("", text).replace("dfrac", "frac").replace("tfrac", "frac")
    text = re.sub(r"\s+", " ", text).strip().rstrip(".:;,").strip()
    named = _NAMED.fullmatch(text)
    if named:
        text = named.group("value").strip()
    if re.fullmatch(r"[A-Za-z][A-Za-z -]*", text):
        return text.casefold()
    text = _SHORT_DENOMINATOR.sub(r"\1{\2}", _SHORT_NUMERATOR.sub(r"\\frac{\1}", text))
    if _THOUSANDS.fullmatch(text):  # before spaces go: "1, 200" is a list
        text = text.replace(",", "")
    # "10 000" is one number, but "1 1/2" must not become 11/2
    text = _OTHER_SPACE.sub("", _GROUP_SPACE.sub("", text))
    number = _number(text)
    if number is not None:
        return str(number)
    return _sequence(text)


def _sequence(text: str) -> str:
    """Tuples, intervals, sets and lists: order and brackets stay, the members become canonical."""
    opening, closing = ("", "")
    body = text
    if len(text) >= 2 and text[0] in "([" and text[-1] in ")]" and _encloses(text):
        opening, closing, body = text[0], text[-1], text[1:-1]
    elif text.startswith("\\{") and text.endswith("\\}"):
        opening, closing, body = "\\{", "\\}", text[2:-2]
    members = _split(body)
    if len(members) == 1:
        inner = _number(body)
        # (5) is 5, but [5] and \{5\} are something else
        return str(inner) if inner is not None and opening + closing in ("", "()") else text
    return opening + ",".join(str(n) if (n := _number(m)) is not None else m for m in members) + closing


def _encloses(text: str) -> bool:
    """True when the first bracket closes at the last one: `(1,2)` but not `(1)+(2)`."""
    depth = 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """Split at the commas outside all brackets."""
    members, depth, start = [], 0, 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            members.append(text[start:position])
            start = position + 1
    return [*members, text[start:]]


def _number(text: str) -> Fraction | None:
    if len(text) > MAX_DIGITS:
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    ratio = _FRACTION.fullmatch(text)
    sign, above, below = ratio.groups() if ratio else ("", "", "")
    if not ratio and (plain := _RATIO.fullmatch(text)):
        above, below = plain.groups()
    if not (above and below and _DECIMAL.fullmatch(above) and _DECIMAL.fullmatch(below)) or Fraction(below) == 0:
        return None
    return Fraction(sign + "1") * Fraction(above) / Fraction(below)
