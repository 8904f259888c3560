"""The grading server: reads tasks as JSON lines, runs them in forked children under limits, answers as JSON lines.

Started by `ttrl.rewards.sandbox` as a script of its own: it imports nothing of ttrl, holds no thread, no GPU and no file of the
caller, and ends when its standard input closes. It loads math-verify once and forks per batch, so every batch meets the state
the server had at its start, whatever an earlier one did; a child that crosses a limit dies alone and the next task gets a new one.

Tasks: `["math", latex]` -> a key that equal expressions share, or None when the text cannot be read as one expression;
`["regex", pattern, group, text]` -> the last match or None. A task that hits a limit answers `LIMIT`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import resource
import select
import signal
import sys
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from typing import Any

LIMIT = {"limit": True}
DIGITS, GUARD_DIGITS = 40, 60
"""Irrational values are compared by 40 significant digits of 60 computed: e^(pi sqrt(163)) is an integer to 30 of them."""
POINTS = 3
"""Expressions with variables are compared by their values at this many fixed points (Schwartz-Zippel), one of them negative."""

# The parser learns its decision tables as it goes; children inherit what the server learned from these.
PRIMER = (
    r"\frac{1+\sqrt{5}}{2}", r"2\sqrt[3]{2}-1", r"x^2+2x+1", r"(x+1)^{2}(x-1)", r"y=2x+1", r"x\le3", r"x>-3", r"\frac{3\pi}{4}",
    r"\sin(x)+\cos x", r"\log_{2}8+\ln 2", r"e^{2x}", r"5!+\binom{5}{2}", r"|x-1|", r"2.5\cdot10^{-3}", r"-\infty", r"3\times4/5",
    r"\sqrt{8}i+2", r"\frac{-b}{2a}", r"x_1+x_{2}", r"\frac{\sqrt{3}}{2}+\frac{1}{2}i", r"-\frac{\sqrt2}2", r"2^n-1", r"\tan^{2}\theta",
    r"-x<-3", r"x=-\frac{1}{2}", r"4x-2y+2=0", r"(1+i)^2", r"\frac{-x-1}{1-x}", r"\frac34\sqrt3", r"\sqrt{3+2\sqrt{2}}-\sqrt{2}",
    r"12/4", r"x/10", r"1-\sin^2x", r"\cos^2(2x)", r"\log_2 x", r"\ln(x+1)", r"-\frac{\pi^2}{6}", r"\arctan 2", r"n(n+1)/2", r"a^2b^3",
    r"\frac{x+1}{x^2-1}", r"\sqrt{x^2+1}", r"10\sqrt{10}", r"\frac{2\sqrt{3}}{3}\pi", r"a_{n+1}", r"{3}x^{-1}", r"2^{100}", r"+3",
)  # fmt: skip


def math_key(latex: str) -> str | None:
    """A text that equal expressions share, or None. Rationals give themselves ("3/2"), so they meet plain numbers."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units stay: without them 5cm and 5m would both be 5.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, equations=False)
    config = LatexExtractionConfig(normalization_config=rules, boxed_match_priority=0, try_extract_without_anchor=False)
    found = parse(
        f"\\boxed{{{latex}}}", extraction_config=[config], parsing_timeout=None, fallback_mode="no_fallback",
        extraction_mode="first_match",
    )  # fmt: skip
    if not found:
        return None
    expression = found[0]
    if isinstance(expression, sympy.core.relational.Relational):
        return _relation_key(expression)
    if not isinstance(expression, sympy.Expr) or isinstance(expression, sympy.MatrixBase):
        return None
    if expression in (sympy.oo, -sympy.oo):
        return str(expression)
    values = [_value(expression, point) for point in range(POINTS if expression.free_symbols else 1)]
    if any(value is None for value in values):
        return None
    keys = [_number_key(value) for value in values]
    return keys[0] if len(set(keys)) == 1 else "f " + " ".join(keys)


def _relation_key(relation: Any) -> str | None:
    """Both sides' difference up to a factor (a positive one for inequalities): 2x+2y=6 is x+y=3, -x<-3 is x>3."""
    import sympy

    names = {sympy.Eq: "=", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: "<", sympy.Ge: "<="}
    name = names.get(type(relation))
    if name is None:
        return None
    swapped = isinstance(relation, sympy.Gt | sympy.Ge)
    difference = relation.rhs - relation.lhs if swapped else relation.lhs - relation.rhs
    values = [_value(difference, point) for point in range(POINTS + 1)]
    if not difference.free_symbols or any(value is None for value in values) or values[0] == 0:
        return None
    unit = values[0] if name in ("=", "!=") else abs(values[0])
    return f"{name} " + " ".join(_number_key((value / unit).evalf(GUARD_DIGITS, maxn=200)) for value in values)


def _value(expression: Any, point: int) -> Any:
    """The number at a fixed point of all variables: exact when rational, else to GUARD_DIGITS. None when not finite."""
    import sympy

    exact = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    where = {}
    for symbol in expression.free_symbols:
        if symbol.name in ("i", "e"):
            where[symbol] = sympy.I if symbol.name == "i" else sympy.E
            continue
        seed = int.from_bytes(hashlib.sha256(f"{symbol.name} {point}".encode()).digest()[:4], "big")
        where[symbol] = sympy.Rational(10_007 + seed % 30_011, 10_009) * (-1 if point == 1 else 1)
    value = expression.xreplace(exact).subs(where).doit()
    if not value.is_Rational:
        value = value.evalf(GUARD_DIGITS, maxn=200)
    real, imaginary = value.as_real_imag()
    finite = all(part.is_Rational or (part.is_Float and part.is_finite) for part in (real, imaginary))
    return value if finite else None


def _number_key(value: Any) -> str:
    real, imaginary = value.as_real_imag()
    first = _real_key(real, imaginary)
    second = _real_key(imaginary, real)
    return first if second == "0" else f"{first}+{second}i"


def _real_key(part: Any, other: Any) -> str:
    """A fraction as p/q; a float that is a small fraction to 45 digits likewise; else 40 digits."""
    import sympy

    if part.is_Rational:
        return str(Fraction(int(part.p), int(part.q)))
    size = max(abs(part), abs(other))
    if abs(part) <= size * sympy.Float("1e-45", GUARD_DIGITS) or size < sympy.Float("1e-200", GUARD_DIGITS):
        return "0"
    number = Fraction(str(part))
    simple = number.limit_denominator(1_000_000)
    if simple and abs(number - simple) * 10**45 <= abs(simple):
        return str(simple)
    context = Context(prec=DIGITS, rounding=ROUND_HALF_EVEN)
    return "~" + str(context.plus(Decimal(str(part))).normalize(context))


def regex_match(pattern: str, group: str, text: str) -> str | None:
    """The group of the last match in the text."""
    last = None
    for match in re.finditer(pattern, text):
        last = match
    return None if last is None else last.group(int(group))


def perform(task: list[Any]) -> str | None:
    """Runs one task; whatever it raises means "cannot be read"."""
    try:
        return math_key(task[1]) if task[0] == "math" else regex_match(*task[1:])
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the border of the grader: third-party code on hostile text raises anything
        return None


def child(tasks: list[list[Any]], limits: dict[str, float], out: int) -> None:
    """Runs tasks until done or killed; one JSON line each. SIGPROF is left to its default, which ends the process."""
    soft = int(limits["memory_mb"]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    for task in tasks:
        signal.setitimer(signal.ITIMER_PROF, limits["cpu_seconds"])
        try:
            answer: Any = {"key": perform(task)}
        except MemoryError:
            os._exit(1)  # its state is not to be trusted any more
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(out, json.dumps(answer).encode() + b"\n")


def run_until_limit(tasks: list[list[Any]], limits: dict[str, float]) -> list[Any]:
    """The results a fresh child gave before it ended; fewer than tasks when one of them hit a limit."""
    inlet, outlet = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(0)
            os.close(inlet)
            child(tasks, limits, outlet)
        finally:
            os._exit(0)
    os.close(outlet)
    received, complete = b"", 0
    # CPU time is the deadline, so that a busy machine does not change verdicts; wall time catches what only sleeps.
    while complete < len(tasks) and select.select([inlet], [], [], limits["wall_seconds"])[0]:
        block = os.read(inlet, 1 << 16)
        if not block:
            break
        received += block
        complete = received.count(b"\n")
    os.close(inlet)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return [json.loads(line) for line in received.split(b"\n")[:complete]]


def main() -> None:
    """Serves until standard input closes."""
    replies = os.dup(1)
    os.dup2(2, 1)  # nothing a library prints may end up among the replies
    import logging

    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the caller, who closes our input
    try:
        for latex in PRIMER:
            math_key(latex)
    except ImportError as error:
        os.write(replies, json.dumps({"error": str(error)}).encode() + b"\n")
        return
    gc.collect()
    gc.freeze()
    os.write(replies, b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        request = json.loads(line)
        tasks: list[list[Any]] = request["tasks"]
        results: list[Any] = []
        while len(results) < len(tasks):
            results += run_until_limit(tasks[len(results) :], request["limits"])
            if len(results) < len(tasks):
                results.append(LIMIT)
        reply = json.dumps(results).encode() + b"\n"
        while reply:
            reply = reply[os.write(replies, reply) :]


if __name__ == "__main__":
    main()
