from __future__ import annotations

import random

import pytest
from helpers import ends_at_all, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.equivalence import MAX_DIGITS, MAX_LENGTH, canonical, classes, same
from ttrl.rewards.reader import AnswerReader
from ttrl.types import NO_ANSWER, Finish

ONE_CLASS = [
    ["1/2", "0.5", r"\frac12", ".50", r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac 1 2", r"\frac1{2}", r"\frac{1}2",
     "2/4", "+.5"],
    ["-1/2", "-0.5", r"-\frac12", r"\frac{-1}{2}", r"\frac{1}{-2}", "−0.5", "- 1/2"],
    ["1000", "1,000", "1000.0", "1 000", r"1\,000", r"1{,}000", "$1,000$", "x = 1,000", "(1000)", "1,000."],
    ["5", "5.", "+5", "(5)", "x=5", r"\text{5}", r"\mathbf{5}", "$5", r"5^\circ", "5°", "5,", " 5 ", r"\left(5\right)"],
    ["0", "-0", "0.0", "0/7"],
    ["(1,2)", "(1, 2)", r"\left(1,2\right)", "(1.0,4/2)", r"(1,\frac{4}{2})"],
    ["dog", "Dog", r"\text{dog}", "DOG.", r"\text{\textbf{dog}}"],
    ["50%", r"50\%", "50 %"],
    [r"2\pi", r"2 \pi", r"$2\pi$"],
]  # fmt: skip

TWO_CLASSES = [
    ("(1,2)", "2,1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "1,2"),
    ("(0,1)", "[0,1)"),
    ("dog", "god"),
    ("5", "[5]"),
    ("5", r"\{5\}"),
    ("50", "50%"),
    ("1/3", "0.333"),
    ("12", "1 2"),
    ("1 1/2", "11/2"),
    ("1, 200", "1200"),
    ("x+1", "x-1"),
    ("1e3", "1000"),  # never evaluated, so an exponent is just text
    ("10^3", "1000"),
    ("1/0", "2/0"),
]


@pytest.mark.parametrize("spellings", ONE_CLASS, ids=lambda spellings: spellings[0])
def test_spellings_of_one_answer_are_one_class(spellings: list[str]) -> None:
    assert {answer: canonical(answer, "math") for answer in spellings} == dict.fromkeys(
        spellings, canonical(spellings[0], "math")
    )


@pytest.mark.parametrize(("first", "second"), TWO_CLASSES)
def test_different_answers_are_different_classes(first: str, second: str) -> None:
    assert not same(first, second, "math")


def test_the_one_class_table_has_no_class_twice() -> None:
    forms = [canonical(spellings[0], "math") for spellings in ONE_CLASS]
    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize("nothing", [None, "", " ", "$", "...", r"\text{}"])
def test_no_answer_equals_nothing_not_even_itself(nothing: str | None) -> None:
    assert classes([nothing, nothing, "5"], "math") == [NO_ANSWER, NO_ANSWER, 0]
    assert not same(nothing, nothing, "math")


def test_classes_are_numbered_by_appearance() -> None:
    assert classes(["7", None, "1/2", "0.5", "7.0", "8"], "math") == [0, NO_ANSWER, 1, 1, 0, 2]


@pytest.mark.parametrize(
    ("kind", "first", "second", "equal"),
    [
        ("choice", "a", "A", True),
        ("choice", "A", "B", False),
        ("label", "Very  negative", "very negative", True),
        ("label", "1/2", "0.5", False),
        ("number", "1,000", "1000", True),
    ],
)
def test_equality_depends_on_the_kind(kind: str, first: str, second: str, equal: bool) -> None:
    assert same(first, second, kind) is equal


PIECES = ["1", "0", "2", ".", ",", "/", " ", "-", "−", "+", "(", ")", "[", "]", "{", "}", "x", "=", "%", "$", ":",
          r"\frac",
          r"\text{", r"\{", r"\}", r"\left", r"\,", "dog", "^", "٣", "½"]  # fmt: skip
answers = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


@settings(derandomize=True, max_examples=500)
@given(answers, answers, answers)
def test_equality_is_an_equivalence_relation(first: str, second: str, third: str) -> None:
    for kind in ("math", "choice", "label"):
        is_answer = classes([first], kind) == [0]
        assert same(first, first, kind) is is_answer
        assert same(first, second, kind) is same(second, first, kind)
        if same(first, second, kind) and same(second, third, kind):
            assert same(first, third, kind)


@settings(derandomize=True, max_examples=200)
@given(
    st.lists(st.one_of(st.none(), st.sampled_from(["1/2", "0.5", "7", "", "dog", "Dog", "(1,2)", "2,1"])), max_size=12),
    st.randoms(use_true_random=False),
)
def test_classes_do_not_depend_on_the_order(votes: list[str | None], rng: random.Random) -> None:
    order = list(range(len(votes)))
    rng.shuffle(order)
    straight = classes(votes, "math")
    shuffled = classes([votes[i] for i in order], "math")
    for a, i in enumerate(order):
        for b, j in enumerate(order):
            assert (shuffled[a] == shuffled[b]) == (straight[i] == straight[j])
        assert (shuffled[a] == NO_ANSWER) == (straight[i] == NO_ANSWER)


@settings(derandomize=True, max_examples=300)
@given(st.integers(-(10**6), 10**6), st.integers(1, 999), st.integers(1, 50))
def test_equal_fractions_are_equal_and_others_are_not(top: int, bottom: int, factor: int) -> None:
    spelled = rf"\frac{{{top * factor}}}{{{bottom * factor}}}"
    assert same(f"{top}/{bottom}", spelled, "math")
    assert not same(f"{top}/{bottom}", f"{top + 1}/{bottom}", "math")


@settings(derandomize=True, max_examples=200)
@given(st.integers(1000, 10**12))
def test_thousands_separators_do_not_matter(number: int) -> None:
    assert same(f"{number:,}", str(number), "math")


M = 1_000_000
HOSTILE = {
    "digits": "1" * M,
    "exponent": "1e" + "9" * M,
    "small exponent": "1e999999999",
    "power": "9^{9^{9^{9^{9}}}}",
    "fraction of long numbers": rf"\frac{{{'9' * M}}}{{{'7' * M}}}",
    "division": "1/" * (M // 2),
    "nested braces": "{" * 10_000 + "5" + "}" * 10_000,
    "nested brackets": "(" * 10_000 + "5" + ")" * 10_000,
    "nested text": r"\text{" * 10_000 + "5" + "}" * 10_000,
    "nested fractions": r"\frac{1}{" * 10_000 + "2" + "}" * 10_000,
    "commas": "(" + "1," * (M // 2) + "1)",
    "thousands": "1" + ",000" * (M // 4) + "x",
    "blanks": "1" + " " * M + "1",
    "colons": ":" * M + "x",
    "fractions": r"\frac" * (M // 5),
    "words": "a " * (M // 2) + "!",
    "equals": "x=" * (M // 2),
    "at the bound": "(" * (MAX_LENGTH // 2) + "1," * (MAX_LENGTH // 4),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("kind", ["math", "choice", "label"])
def test_hostile_answers_end_soon_and_equal_themselves(text: str, kind: str) -> None:
    with ends_at_all():
        assert 0 < len(canonical(text, kind)) <= 3 * len(text)
        assert same(text, text, kind)
        assert not same(text, text + "7", kind)


def test_blanks_around_an_answer_do_not_make_it_long() -> None:
    assert canonical(" " * M + "0.5" + " " * M, "math") == "1/2"


def test_numbers_beyond_the_bound_are_compared_as_text() -> None:
    inside, outside = "1" * MAX_DIGITS, "1" * (MAX_DIGITS + 1)
    assert same(inside, f"({inside})", "math")
    assert same(outside, outside, "math") and not same(outside, f"({outside})", "math")
    assert same("1" * 5000, "1" * 5000, "math")  # Python itself refuses to read an integer this long


def test_texts_beyond_the_bound_are_compared_as_they_are() -> None:
    inside, outside = "x+" * (MAX_LENGTH // 2 - 2), "x+" * MAX_LENGTH
    assert same(inside + " 1", inside + "1", "math")
    assert not same(outside + " 1", outside + "1", "math")


def test_many_long_numbers_are_read() -> None:
    votes = [f"{'9' * 90}{i}/{'7' * 90}{i + 1}" for i in range(1000)]
    with ends_at_all():
        assert len(set(classes(votes, "math"))) == 1000


def test_the_reader_numbers_classes_by_content() -> None:
    reader = AnswerReader("math", {})
    assert reader.classes(["7", None, "0.5", "7.0"]) == ([1, NO_ANSWER, 0, 1], ("1/2", "7"))
    assert reader.classes(["0.5", "7.0", "7", None]) == ([0, 1, 1, NO_ANSWER], ("1/2", "7"))
    assert reader.classes([None, ""]) == ([NO_ANSWER, NO_ANSWER], ())
    assert reader.form(r"\frac12") == "1/2"


def test_truncated_and_aborted_text_is_no_answer_unless_asked_for() -> None:
    rollouts = [make_rollout(r"\boxed{5}", i, finish=finish) for i, finish in enumerate(Finish)]
    assert [f.value for f in Finish] == ["stop", "length", "abort"]
    assert AnswerReader("math", {}).read(rollouts) == ("5", None, None)
    assert AnswerReader("math", {}, truncated_votes=True).read(rollouts) == ("5", "5", "5")
