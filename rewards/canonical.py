"""The canonical form of one answer: what can be said to be equal by reading alone.

`1/2`, `0.5`, `\\frac12` and `.50` share a form; `(1,2)` and `2,1` do not, and neither do `dog` and `god`. Nothing is evaluated:
numbers are read by a regular expression with a bound on their digits, everything else becomes normalised text.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction

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
_MIXED = re.compile(r"([+-]?)(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_COMMAND_SPACE = re.compile(r"(\\[A-Za-z]+) (?=[A-Za-z])")
_SYMBOLS = str.maketrans({
    "π": "\\pi ", "×": "\\times ", "·": "\\cdot ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "√": "\\sqrt ",
    "−": "-", "\0": None,
})  # fmt: skip
_NAMED = re.compile(r"[A-Za-z]\s*=\s*(?P<value>[^=<>]+)")


def canonical(answer: str, kind: str) -> str:
    """The text that all answers of one class share. Empty when there is no answer in it."""
    if kind == "choice":
        return answer.strip().upper()
    if kind == "label":
        return " ".join(answer.casefold().split())
    if kind == "json":
        return _canonical_json(answer)
    if kind in ("box", "point"):
        return "".join(answer.split())
    if kind == "regex":
        text = " ".join(answer.split())
        return text if (number := read_number(text)) is None else str(number)
    return _canonical_math(answer)


def _canonical_json(answer: str) -> str:
    """Keys sorted, no blanks, 1.0 as 1. Text that is not JSON (a value taken out by key) stands for itself."""
    try:
        value = json.loads(
            answer, parse_float=lambda text: int(number) if (number := float(text)).is_integer() else number
        )
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (ValueError, OverflowError, RecursionError):
        return answer.strip()


def _canonical_math(answer: str) -> str:
    text = answer.strip()
    if len(text) > MAX_LENGTH:
        return text
    text = _TEXT.sub(r"\1", _TEXT.sub(r"\1", text))  # twice: \text{\textbf{B}}
    text = text.translate(_SYMBOLS).replace("{,}", ",")
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
    text = _COMMAND_SPACE.sub("\\1\0", _GROUP_SPACE.sub("", text))  # "\\pi r" must not become "\\pir"
    text = _OTHER_SPACE.sub("", text).replace("\0", " ")
    number = read_number(text)
    if number is not None:
        return str(number)
    return _sequence(text)


def _sequence(text: str) -> str:
    """Tuples, intervals, sets and lists: order and brackets stay, the members become canonical."""
    opening, closing = ("", "")
    body = text
    if len(text) >= 2 and text[0] in "([" and text[-1] in ")]" and encloses(text):
        opening, closing, body = text[0], text[-1], text[1:-1]
    elif text.startswith("\\{") and text.endswith("\\}"):
        opening, closing, body = "\\{", "\\}", text[2:-2]
    members = split_members(body)
    if len(members) == 1:
        inner = read_number(body)
        # (5) is 5, but [5] and \{5\} are something else
        return str(inner) if inner is not None and opening + closing in ("", "()") else text
    return opening + ",".join(str(n) if (n := read_number(m)) is not None else m for m in members) + closing


def encloses(text: str) -> bool:
    """True when the first bracket closes at the last one: `(1,2)` but not `(1)+(2)`."""
    depth = 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def split_members(text: str) -> list[str]:
    """Split at the commas outside all brackets."""
    members, depth, start = [], 0, 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            members.append(text[start:position])
            start = position + 1
    return [*members, text[start:]]


def read_number(text: str) -> Fraction | None:
    if len(text) > MAX_DIGITS:
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if (mixed := _MIXED.fullmatch(text)) and 0 < int(mixed.group(3)) < int(mixed.group(4)):
        sign, whole, above, below = mixed.groups()
        return int(sign + "1") * (int(whole) + Fraction(int(above), int(below)))
    ratio = _FRACTION.fullmatch(text)
    sign, above, below = ratio.groups() if ratio else ("", "", "")
    if not ratio and (plain := _RATIO.fullmatch(text)):
        above, below = plain.groups()
    if not (above and below and _DECIMAL.fullmatch(above) and _DECIMAL.fullmatch(below)) or Fraction(below) == 0:
        return None
    return Fraction(sign + "1") * Fraction(above) / Fraction(below)
