"""The cost gate: what may be handed to a computer algebra system at all. Decides on the text alone, in linear time.

It is a list of what is allowed, not of what is forbidden: known LaTeX commands, single letters, bounded numbers and operators.
So code (`__import__('os')`) is never a candidate, and the bombs known from other graders (power towers, factorials, sums with a
large bound, long literals, deep nesting) are refused before anything is evaluated.
"""

from __future__ import annotations

import enum
import re

MAX_CHARS = 200
MAX_DEPTH = 8
MAX_LITERAL = 20
"""Digits of one number inside an expression; also keeps decimals exact on their way through a float."""
MAX_POWERS = 8
MAX_EXPONENT = 1000
"""Bound on the product of all numbers that stand in exponents: (9^{99})^{99} counts as 9801."""
MAX_FACTORIAL = 200
MAX_BINOMIAL_DIGITS = 4
MAX_GROWTH = 2
"""Functions that grow like a power: \\exp, \\sinh, \\cosh, \\tanh."""

_FUNCTIONS = "ln log exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh"
_COMMANDS = frozenset(
    f"""frac sqrt pi cdot times div infty le leq ge geq lt gt neq binom lvert rvert circ {_FUNCTIONS}
    alpha beta gamma delta epsilon theta lambda mu nu phi rho sigma tau omega""".split()
)
_UNBOUNDED = frozenset(
    ["sum", "prod", "int", "iint", "iiint", "oint", "lim", "to", "limsup", "liminf", "bigcup", "bigcap", "operatorname"]
)
_GROWTH = frozenset(["exp", "sinh", "cosh", "tanh"])
_TOKEN = re.compile(r"\\([A-Za-z]+)|([A-Za-z]+)|(\d+(?:\.\d*)?|\.\d+)|([-+*/^_=<>(){}\[\]|! ])|(.)", re.DOTALL)
_SCIENTIFIC = re.compile(r"\d[eE][+-]?\d")
_SQUARE = re.compile(r"(?<!\\sqrt)\[")
_NUMBER = re.compile(r"[\d.]+")


class Verdict(enum.Enum):
    """What to do with an expression."""

    TEXT = "text"
    """Not mathematics the parser knows: compared as text."""
    ASK = "ask"
    """Worth a question to the sandbox."""
    COSTLY = "costly"
    """Might cost too much: compared as text, and counted."""


def judge(leaf: str) -> Verdict:
    """Verdict on one expression without commas and outer brackets."""
    if len(leaf) > MAX_CHARS:
        return Verdict.COSTLY
    if _SCIENTIFIC.search(leaf) or _SQUARE.search(leaf):
        return Verdict.TEXT  # LaTeX reads 1e3 as 3 times Euler's number, and [5] as 5
    commands: list[str] = []
    depth = deepest = 0
    mathematical = False
    for command, letters, number, operator, other in _TOKEN.findall(leaf):
        if other or len(letters) > 2:
            return Verdict.TEXT
        if command:
            if command not in _COMMANDS and command not in _UNBOUNDED:
                return Verdict.TEXT
            commands.append(command)
        if len(number) > MAX_LITERAL:
            return Verdict.COSTLY
        depth += (operator in ("(", "{", "[")) - (operator in (")", "}", "]"))
        deepest = max(deepest, depth)
        mathematical = mathematical or bool(command or letters or operator)
    if depth != 0 or not mathematical:
        return Verdict.TEXT
    if deepest > MAX_DEPTH or not _UNBOUNDED.isdisjoint(commands) or sum(c in _GROWTH for c in commands) > MAX_GROWTH:
        return Verdict.COSTLY
    return Verdict.ASK if _powers_are_small(leaf) and _counts_are_small(leaf, commands) else Verdict.COSTLY


def _powers_are_small(leaf: str) -> bool:
    """Few powers, no tower, no factorial or binomial up there, and a small product of all exponents."""
    product, ends = 1.0, -1
    positions = [i for i, char in enumerate(leaf) if char == "^"]
    if len(positions) > MAX_POWERS:
        return False
    for position in positions:
        if position < ends or leaf[position + 1 : position + 2] == "^":
            return False  # a power inside an exponent
        exponent = _argument(leaf, position + 1)
        ends = position + 1 + len(exponent)
        if leaf[ends : ends + 1] in ("^", "!") or "!" in exponent or "\\binom" in exponent or "\\exp" in exponent:
            return False
        for number in _NUMBER.findall(exponent):
            product *= max(1.0, float(number) if number.count(".") <= 1 and number != "." else MAX_EXPONENT + 1.0)
    return product <= MAX_EXPONENT


def _argument(leaf: str, start: int) -> str:
    """The group or token at this position, with a sign and blanks before it."""
    begin = start
    while leaf[begin : begin + 1] in (" ", "-", "+") and begin < len(leaf):
        begin += 1
    if leaf[begin : begin + 1] not in ("{", "("):
        token = _TOKEN.match(leaf, begin)
        return leaf[start : token.end() if token else begin]
    depth = 0
    for position in range(begin, len(leaf)):
        depth += (leaf[position] in "({") - (leaf[position] in ")}")
        if depth == 0:
            return leaf[start : position + 1]
    return leaf[start:]


def _counts_are_small(leaf: str, commands: list[str]) -> bool:
    """Factorials only of short plain numbers, never of a factorial; binomials only of short numbers."""
    for position, char in enumerate(leaf):
        if char == "!":
            digits = re.search(r"(?<![\d.])(\d{1,3})$", leaf[max(0, position - 4) : position])
            if not digits or int(digits.group(1)) > MAX_FACTORIAL:
                return False
    if "binom" in commands:
        return all(len(number) <= MAX_BINOMIAL_DIGITS for number in _NUMBER.findall(leaf))
    return True
