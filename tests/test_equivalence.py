from __future__ import annotations

import itertools
import random

import pytest
from helpers import ends_at_all, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.equivalence import MAX_DIGITS, MAX_LENGTH, canonical, classes, grade, same
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

# Forms differ, so these are evaluated: by expression, inside tuples, intervals, sets and unions, and as equations.
EVALUATED = [
    [r"\sqrt{8}", r"2\sqrt{2}", r"2\sqrt2", r"\frac{4}{\sqrt{2}}", r"2 \sqrt {2}", "2√2"],
    ["1000", "10^3", r"10^{3}", r"2^3\cdot 5^3", r"10 \times 100"],
    ["2", r"\sqrt{4}", r"\frac{6}{3}", r"\log_2 4", r"\binom{2}{1}", r"\sqrt{3+2\sqrt{2}}+1-\sqrt{2}"],
    [r"\frac{5\pi}{2}", r"2.5\pi", r"\frac52\pi", "5π/2"],
    [r"2\pi r", r"2 r\pi", "2πr"],
    ["(x+1)^2", "x^2+2x+1", "x^{2}+1+2x"],
    [r"1-\sin^2 x", r"\cos^2 x"],
    ["2i", "(1+i)^2"],
    ["x+2y=3", "2x+4y=6", "3-x=2y"],
    ["x>3", "-x<-3", "3<x"],
    [r"(1,\sqrt{8})", r"(1.0, 2\sqrt{2})", r"\left(1,2\sqrt2\right)"],
    [r"[0,\sqrt{4})", "[0,2)"],
    [r"\{1,\sqrt{8}\}", r"\{2\sqrt{2},1\}"],
    [r"(-\infty,0)\cup(1,\infty)", r"(1,\infty) \cup (-\infty, 0)"],
    [r"\frac{e^2}{2}", r"0.5e^{2}"],
]

TWO_CLASSES = [
    (r"\sqrt{8}", r"\sqrt{9}"),
    (r"\sqrt{2}", "1.414214"),  # verify says yes, to six decimals
    (r"\sqrt{2}", "1.41421356237309504880"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),  # equal to 30 digits
    (r"10^{-20}", "0"),
    (r"10^{-20}", r"10^{-30}"),
    ("0.5", r"50\%"),
    ("0.5", "50"),
    (r"(1,\sqrt{8})", r"1,\sqrt{8}"),
    (r"(\sqrt{8},1)", r"(1,\sqrt{8})"),
    (r"[\sqrt{4}]", "2"),
    (r"(0,\sqrt{4})", "[0,2)"),
    (r"\{1,2\}", "(1,2)"),
    ("x^2", "y^2"),
    ("x^2-1", "(x-1)^2"),
    ("x>3", "x<3"),
    ("x>3", r"x\ge 3"),
    ("x>3", "-x>-3"),
    ("5cm", "5m"),
    ("5cm", "5"),
    (r"\pm 2", "2"),
    (r"\infty", "oo"),  # how a key looks is not how it is reached
    (r"\sqrt{x^2}", "x"),
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
    ("1e3", "1000"),  # LaTeX means 3 times Euler's number, a model a thousand: nobody knows, so it is text
    ("10^4", "1000"),
    ("1/0", "2/0"),
]


@pytest.mark.parametrize("spellings", ONE_CLASS, ids=lambda spellings: spellings[0])
def test_spellings_of_one_answer_are_one_class(spellings: list[str]) -> None:
    assert {answer: canonical(answer, "math") for answer in spellings} == dict.fromkeys(
        spellings, canonical(spellings[0], "math")
    )


@pytest.mark.parametrize("spellings", EVALUATED, ids=lambda spellings: spellings[0])
def test_expressions_of_equal_value_are_one_class(spellings: list[str]) -> None:
    assert classes(spellings, "math") == [0] * len(spellings)


def test_different_evaluated_answers_stay_apart() -> None:
    members = [spellings[0] for spellings in (*ONE_CLASS, *EVALUATED) if spellings[0] != "1000"]
    assert classes(members, "math") == list(range(len(members)))


def test_a_merged_class_is_named_after_its_shortest_form_in_any_order() -> None:
    votes = [r"\frac{4}{\sqrt{2}}", r"2\sqrt{2}", r"\sqrt{8}", "7"]
    for order in itertools.permutations(votes):
        assert grade(order, "math").forms == ("7", r"\sqrt{8}")


def test_a_label_is_matched_by_the_equality_of_the_votes() -> None:
    reader = AnswerReader("math", {})
    _, forms = reader.classes([r"\sqrt{8}", "3"])
    assert reader.match(forms, r"2\sqrt{2}") == r"\sqrt{8}"
    assert reader.match(forms, "3.0") == "3"
    assert reader.match(forms, "4") is None
    assert reader.match((), "4") is None
    assert reader.match(forms, " ") is None


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
          r"\sqrt{2}", r"\sqrt{8}", r"\pi", "2^3", r"\cup", "i", r"\text{", r"\{", r"\}", r"\left", r"\,", "dog", "^",
          "٣", "½"]  # fmt: skip
answers = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


@settings(derandomize=True, max_examples=500, deadline=None)
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
    st.lists(
        st.one_of(
            st.none(),
            st.sampled_from(
                [
                    "1/2",
                    "0.5",
                    "7",
                    "",
                    "dog",
                    "Dog",
                    "(1,2)",
                    "2,1",
                    r"\sqrt{8}",
                    r"2\sqrt2",
                    r"(1,\sqrt{4})",
                    r"\{2,1\}",
                    r"\{1,2\}",
                    "9^{9^{9}}",
                    r"50\%",
                ]
            ),
        ),
        max_size=12,
    ),
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
    assert same(outside, outside, "math") and not same(outside, f"{outside}.0", "math")
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
