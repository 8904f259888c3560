"""Which answers are the same answer: an equivalence relation over answers, by keys.

An answer gets a canonical form by reading (`canonical.py`); answers whose forms differ get a *key* each, and two answers are the
same exactly when their keys are equal. Equality of keys is reflexive, symmetric and transitive whatever the keys are, and the key of
an answer depends on that answer alone, so neither the order of the votes nor the presence of others can change who is equal to
whom. Comparing pairs with math-verify's `verify` would have none of this: it finds `(1,2)` ~ `1,2` ~ `2,1` and `0.5` ~ `50%` ~ `50`.

The key keeps what `verify` forgets: brackets, the order of tuples and lists (not of sets and unions), and `%`. Plain numbers and
words are their own key. Only what is left, single expressions such as `\\ln 8`, is evaluated, once per distinct expression and
behind the cost gate: simple arithmetic here (`arithmetic.py`), the rest as read by math-verify's parser in the sandbox. Work grows
with distinct answers, not with votes. An
expression that the gate refuses, that cannot be read or that hits a limit is its own text: it equals its own spelling only.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttrl.rewards.arithmetic import quick_key
from ttrl.rewards.canonical import MAX_DIGITS, MAX_LENGTH, canonical, encloses, split_members
from ttrl.rewards.gate import Verdict, judge
from ttrl.rewards.sandbox import Outcome, shared_sandbox
from ttrl.types import NO_ANSWER

__all__ = ["MAX_DIGITS", "MAX_LENGTH", "Grades", "canonical", "classes", "forget", "grade", "matching", "same"]

MAX_PARTS = 32
"""Members of one answer; a longer list is compared as text."""
MAX_NESTING = 4
MAX_REMEMBERED = 50_000
"""Expressions whose key is remembered."""

_PLAIN = re.compile(r"-?\d+(?:/\d+)?")
Key = Any  # nested tuples of str, compared and hashed only


@dataclass(frozen=True, slots=True, kw_only=True)
class Grades:
    """The classes of a group of answers and what the cost of finding them left out."""

    classes: list[int]
    """[V] class by content: numbered in the order of `forms`; NO_ANSWER without an answer"""
    forms: tuple[str, ...]
    """canonical text of each class, sorted: the shortest of its members' forms, the smallest of those"""
    timeouts: int
    """votes with an expression that hit a limit of the sandbox; they equal only their own spelling"""
    gated: int
    """votes with an expression that the cost gate refused; likewise"""


def grade(answers: Sequence[str | None], kind: str) -> Grades:
    """Classes [V] and forms of the answers; independent of their order up to that order.

    Raises RuntimeError when there is something to evaluate and the sandbox cannot start.
    """
    forms = [canonical(answer, kind) if answer is not None else "" for answer in answers]
    keys, timed_out, gated = _keys({form for form in forms if form}, kind)
    shortest: dict[Key, str] = {}
    for form in sorted(keys, key=lambda text: (len(text), text)):
        shortest.setdefault(keys[form], form)
    ordered = tuple(sorted(shortest.values()))
    number = {form: index for index, form in enumerate(ordered)}
    return Grades(
        classes=[number[shortest[keys[form]]] if form else NO_ANSWER for form in forms],
        forms=ordered,
        timeouts=sum(form in timed_out for form in forms),
        gated=sum(form in gated for form in forms),
    )


def classes(answers: Sequence[str | None], kind: str) -> list[int]:
    """Class of each answer, numbered from 0 in order of appearance; NO_ANSWER for None and for empty text."""
    numbers: dict[int, int] = {}
    return [
        c if c == NO_ANSWER else numbers.setdefault(c, len(numbers))
        for c in grade(answers, kind).classes
    ]  # fmt: skip


def same(first: str | None, second: str | None, kind: str) -> bool:
    """True when both are answers and belong to one class."""
    return classes([first, second], kind) == [0, 0]


def matching(forms: Iterable[str], label: str, kind: str) -> str | None:
    """The one of these canonical forms that equals the canonical form `label`, by the equality of `grade`; None without one."""
    forms = list(forms)
    if label in forms or not label:
        return label or None
    keys, _, _ = _keys({*forms, label}, kind)
    return next((form for form in forms if keys[form] == keys[label]), None)


def _keys(forms: set[str], kind: str) -> tuple[Mapping[str, Key], set[str], set[str]]:
    """Key of each canonical form, the forms with a time-out and those with a gated expression."""
    if len(forms) < 2 or kind not in ("math", "number") or all(map(_PLAIN.fullmatch, forms)):
        return {form: form for form in forms}, set(), set()
    parts = {form: _expressions(form) for form in forms}
    leaves = {leaf for found in parts.values() for leaf in found if not _PLAIN.fullmatch(leaf)}
    verdicts = {leaf: judge(leaf) for leaf in leaves}
    outcomes = _evaluate(leaf for leaf in sorted(leaves) if verdicts[leaf] is Verdict.ASK)
    values = {leaf: outcome.key for leaf, outcome in outcomes.items() if outcome.key is not None}
    timed_out = {form for form, found in parts.items() if any(f in outcomes and outcomes[f].timed_out for f in found)}
    gated = {form for form, found in parts.items() if any(verdicts.get(leaf) is Verdict.COSTLY for leaf in found)}
    return {form: _key(form, values) for form in forms}, timed_out, gated


def _expressions(form: str) -> list[str]:
    """The single expressions an answer consists of."""
    found: list[str] = []

    class Collector(dict[str, str]):
        def get(self, leaf: str, default: Any = None) -> Any:
            found.append(leaf)
            return default

    _key(form, Collector())
    return found


def _key(form: str, values: Mapping[str, str], depth: int = 0) -> Key:
    """Structure with its expressions replaced by their values. Tuples are tagged, so structures cannot look like text."""
    if depth < MAX_NESTING and len(form) <= MAX_LENGTH:
        if "\\cup" in form and 1 < len(union := _split_union(form)) <= MAX_PARTS:
            return ("union", *sorted({_key(part, values, depth + 1) for part in union}, key=repr))
        opening, closing, body = "", "", form
        if form.startswith("\\{") and form.endswith("\\}") and len(form) > 4:
            opening, closing, body = "\\{", "\\}", form[2:-2]
        elif len(form) > 2 and form[0] in "([" and form[-1] in ")]" and encloses(form):
            opening, closing, body = form[0], form[-1], form[1:-1]
        members = split_members(body)
        if opening + closing == "()" and len(members) == 1:
            return _key(body, values, depth + 1)
        if (len(members) > 1 or opening) and len(members) <= MAX_PARTS and all(members):
            inner = [_key(member, values, depth + 1) for member in members]
            if opening == "\\{":
                inner = sorted(set(inner), key=repr)
            return (opening + closing or "list", *inner)
    value = values.get(form, form)
    # A model that writes what a key looks like ("oo") must not meet it; rational values are meant to meet plain numbers
    return value if value == form or _PLAIN.fullmatch(value) else ("value", value)


def _split_union(form: str) -> list[str]:
    """Split at the \\cup outside all brackets."""
    parts = [""]
    for piece in re.split(r"\\cup(?![A-Za-z])", form):
        closed = sum(parts[-1].count(c) for c in "([") == sum(parts[-1].count(c) for c in ")]")
        if parts == [""]:
            parts = [piece]
        elif closed:
            parts.append(piece)
        else:
            parts[-1] += "\\cup" + piece
    return [part.strip() for part in parts] if all(part.strip() for part in parts) else [form]


_remembered: dict[str, Outcome] = {}
_remembering = threading.Lock()


def _evaluate(leaves: Iterable[str]) -> dict[str, Outcome]:
    """Outcome per expression. Time-outs are remembered too: a bomb is paid for once, and its verdict stays."""
    wanted = list(leaves)
    with _remembering:
        known = {leaf: _remembered[leaf] for leaf in wanted if leaf in _remembered}
    missing = [leaf for leaf in wanted if leaf not in known]
    if missing:
        fresh = {leaf: Outcome(key=key) for leaf in missing if (key := quick_key(leaf)) is not None}
        hard = [leaf for leaf in missing if leaf not in fresh]
        fresh.update(zip(hard, shared_sandbox().run([("math", leaf) for leaf in hard]) if hard else [], strict=True))
        with _remembering:
            if len(_remembered) + len(fresh) > MAX_REMEMBERED:
                _remembered.clear()
            _remembered.update(fresh)
        known.update(fresh)
    return known


def forget() -> None:
    """Drops what is remembered about expressions; for measurements."""
    with _remembering:
        _remembered.clear()
