"""The fast twin of the sandbox's `math_key`: numbers, fractions, square roots, pi, letters and whole powers, by recursive descent.

Most expressions people and models box are of this kind, and reading them here costs microseconds instead of milliseconds. It reads
only what the cost gate let through, holds no state, evaluates nothing but bounded integers and decimals, and answers None whenever
the notation is not beyond doubt (`1/2x`, `f(x)`, `|x|`, functions, relations): then the sandbox decides. Where both answer, they
give the same key; a test compares them.
"""

from __future__ import annotations

import hashlib
import re
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction
from math import isqrt

Number = Fraction | Decimal
"""Exact as long as possible, then to PRECISION digits."""

PRECISION, DIGITS = 100, 40
POINTS = 3
MAX_BITS = 2_000
PI = Decimal(
    "3.141592653589793238462643383279502884197169399375105820974944592307816406286208998628034825342117067982148086513282306647"
)
CANCELLED = Decimal("1e-5")
"""A difference this much smaller than its terms has lost digits: the sandbox decides, it can compute more of them."""

_TOKEN = re.compile(r"\\([A-Za-z]+)|([A-Za-z])|(\d+(?:\.\d+)?|\.\d+)|([-+*/^(){}])|(\s+)|(.)", re.DOTALL)
_TIMES = ("\\cdot", "\\times", "*")
_DIVIDED = ("/", "\\div")


class _Unsure(Exception):
    """The notation or the value is not for this reader."""


def quick_key(leaf: str) -> str | None:
    """The key of an expression the gate let through, as `sandbox_worker.math_key` gives it; None when unsure."""
    try:
        tokens = _tokens(leaf)
        letters = any(len(token) == 1 and token.isalpha() for token in tokens)
        with localcontext(Context(prec=PRECISION, rounding=ROUND_HALF_EVEN)):
            keys = [number_key(_Reader(tokens, point).whole()) for point in range(POINTS if letters else 1)]
    except (_Unsure, ArithmeticError):
        return None
    return keys[0] if len(set(keys)) == 1 else "f " + " ".join(keys)


def number_key(value: Number) -> str:
    """A fraction as p/q; a decimal that is a small fraction to 45 digits likewise; else 40 digits."""
    if isinstance(value, Fraction):
        return str(value)
    exact = Fraction(value)
    simple = exact.limit_denominator(1_000_000)
    if simple and abs(exact - simple) * 10**45 <= abs(simple):
        return str(simple)
    return "~" + str(Context(prec=DIGITS, rounding=ROUND_HALF_EVEN).plus(value).normalize(Context(prec=DIGITS)))


def letter_value(name: str, point: int) -> Fraction:
    """What a variable stands for at a point; negative at point 1."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {point}".encode()).digest()[:4], "big")
    return Fraction(10_007 + seed % 30_011, 10_009) * (-1 if point == 1 else 1)


def _tokens(leaf: str) -> list[str]:
    tokens = []
    for command, letter, number, operator, _, other in _TOKEN.findall(leaf):
        if other or letter in ("i", "e"):  # the imaginary unit and Euler's number are the sandbox's business
            raise _Unsure
        if command or letter or number or operator:
            tokens.append(f"\\{command}" if command else letter or number or operator)
    return tokens


class _Reader:
    """expression = term (+|- term)*; term = factor ((times|divided)? factor)*; factor = atom (^ whole number)?"""

    def __init__(self, tokens: list[str], point: int) -> None:
        self._tokens, self._at, self._point = tokens, 0, point

    def whole(self) -> Number:
        value = self._expression()
        if self._at != len(self._tokens):
            raise _Unsure
        return value

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, wanted: str = "") -> str:
        token = self._peek()
        if not token or (wanted and token != wanted):
            raise _Unsure
        self._at += 1
        return token

    def _expression(self) -> Number:
        sign = -1 if self._peek() == "-" else 1
        if self._peek() in ("+", "-"):
            self._take()
        total = _product(Fraction(sign), self._term())
        while self._peek() in ("+", "-"):
            sign = -1 if self._take() == "-" else 1
            total = _sum(total, _product(Fraction(sign), self._term()))
        return total

    def _term(self) -> Number:
        value, divided = self._factor(), False
        while (token := self._peek()) and token not in ("+", "-", ")", "}"):
            explicit = token in _TIMES or token in _DIVIDED
            # 1/2x is one half of x to some and one over 2x to others; 2 3 and x 2 are slips
            if not explicit and (divided or token[0].isdigit() or token[0] == "."):
                raise _Unsure
            if explicit:
                self._take()
            after_number = self._tokens[self._at - 1][0].isdigit()
            if not explicit and token == "\\frac" and after_number:
                raise _Unsure  # a mixed number, or a product
            divided = token in _DIVIDED
            factor = self._factor()
            value = _quotient(value, factor) if divided else _product(value, factor)
        return value

    def _factor(self) -> Number:
        value = self._atom()
        if self._peek() != "^":
            return value
        self._take()
        if self._peek() == "{":
            exponent = self._group("{", "}")
        else:
            token = self._take()
            if not token.isdecimal():
                raise _Unsure
            if len(token) > 1:
                raise _Unsure  # x^10 is x^{1}0 in LaTeX
            exponent = Fraction(token)
        if not isinstance(exponent, Fraction) or exponent.denominator != 1 or self._peek() == "^":
            raise _Unsure
        return _power(value, int(exponent))

    def _atom(self) -> Number:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            return Fraction(token)
        if token == "\\pi":
            return PI
        if token == "\\frac":
            return _quotient(self._group("{", "}"), self._group("{", "}"))
        if token == "\\sqrt":
            if self._peek().isdecimal() and len(self._peek()) == 1:
                return _root(Fraction(self._take()))
            return _root(self._group("{", "}"))
        if token == "(":
            self._at -= 1
            return self._group("(", ")")
        if len(token) == 1 and token.isalpha() and self._peek() != "(":
            return letter_value(token, self._point)
        raise _Unsure

    def _group(self, opening: str, closing: str) -> Number:
        self._take(opening)
        value = self._expression()
        self._take(closing)
        return value


def _decimal(value: Number) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator) if isinstance(value, Fraction) else value


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _Unsure
    return value


def _sum(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a + b)
    first, second = _decimal(a), _decimal(b)
    total = first + second
    if abs(total) <= CANCELLED * max(abs(first), abs(second)):
        raise _Unsure
    return total


def _product(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a * b)
    return Fraction(0) if a == 0 or b == 0 else _decimal(a) * _decimal(b)


def _quotient(a: Number, b: Number) -> Number:
    if b == 0:
        raise _Unsure
    return _product(a, 1 / b)


def _power(base: Number, exponent: int) -> Number:
    if isinstance(base, Decimal):
        return base**exponent
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(exponent) > MAX_BITS or (base == 0 and exponent <= 0):
        raise _Unsure
    return base**exponent


def _root(value: Number) -> Number:
    if value < 0:
        raise _Unsure
    if isinstance(value, Fraction):
        above, below = isqrt(value.numerator), isqrt(value.denominator)
        if above * above == value.numerator and below * below == value.denominator:
            return Fraction(above, below)
    return _decimal(value).sqrt()
