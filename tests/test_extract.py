from __future__ import annotations

from typing import Any

import pytest
from helpers import ends_at_all
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.extract import MAX_ANSWER, MAX_TEXT, boxed, extract
from ttrl.rewards.reader import AnswerReader

LABELS: dict[str, Any] = {"labels": ["positive", "negative", "very negative"]}


def in_braces(parts: list[str]) -> str:
    return "{" + "".join(parts) + "}"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"\box{3}", "3"),
        (r"\mbox{3}", None),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} \boxed{2", "1"),  # the last one never closes
        (r"\boxed{1} } \boxed{2}", "2"),
        (r"\boxed{a\}", None),
        (r"\boxed 5", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        ("", None),
        ("I give up", None),
        (r"the answer is 3, that is \boxed{4}", "4"),  # a box wins over a sentence
    ],
)
def test_the_last_balanced_box_is_the_answer(text: str, answer: str | None) -> None:
    assert extract(text, "math") == answer


def test_an_empty_last_box_does_not_fall_back_to_an_earlier_one() -> None:
    assert extract(r"\boxed{5} no, wait: \boxed{}", "math") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 7", "7"),
        ("The answer is -7.", "-7"),
        ("**Answer:** 5", "5"),
        ("The answer is: **42**", "42"),
        ("The final answer is $x^2+1$. I hope it is correct.", "x^2+1"),
        (r"Answer: \(5\)", "5"),
        ("answer is 5\nbecause of that", "5"),
        ("The answer is:\n\n5", "5"),
        ("answer is 3.5. Therefore", "3.5"),
        ("The answer is 1. No, the answer is 2.", "2"),
        # an explanation after the number; the reference implementation makes "12becausex" of it
        ("the answer is 12 apples because x", "12"),
        ("the answer is 12 apples out of 30", "12"),
        ("the answer is 1,000 dollars", "1,000"),
        ("The answer is 1,000.", "1,000"),
        ("the answer is 5, which is odd", "5"),
        # the comma of a pair does not end the sentence, else all pairs that start alike would be one answer
        ("The answer is (1, 2), as shown", "(1, 2)"),
        ("The answer is [0, 1).", "[0, 1)"),
        ("The answer is not known", None),
        ("the answer is", None),
        ("7", None),
    ],
)
def test_without_a_box_the_last_stated_answer_counts(text: str, answer: str | None) -> None:
    assert extract(text, "math") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 1,000", "1,000"),
        ("is 1,234,567 people", "1,234,567"),
        ("costs $1,234.50.", "1,234.50"),
        ("3 and then 4.", "4"),
        ("x=-3.5,", "-3.5"),
        ("x=−3.5", "−3.5"),  # the minus sign of typeset text
        ("between 3-4", "4"),  # a range, not minus four
        ("half: 1/2", "1/2"),
        (".5", ".5"),
        ("10%", "10"),
        ("v1.2.3b and a5 and 5a", None),
        ("none", None),
        (r"7 \boxed{8} 9", "8"),
        (r"7 \boxed{x} 9", None),
    ],
)
def test_the_last_number(text: str, answer: str | None) -> None:
    assert extract(text, "number") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (B)", "B"),
        ("The answer is D.", "D"),
        ("Answer: **B**", "B"),
        ("ANSWER: C", "C"),
        ("The answer is **(C)**", "C"),
        ("the correct answer choice is (A)", "A"),
        ("The answer is\n\nB", "B"),
        ("The answer is A because it is so", "A"),
        ("The answer is C, since", "C"),
        ("The answer is (C). Option B is wrong.", "C"),
        ("(A) or (B)", "B"),
        ("I choose B", "B"),
        ("B.", "B"),
        ("A", "A"),
        ("A\n", "A"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\text{(C) 5 cm}}", "C"),
        (r"\boxed{A. cat}", "A"),
        # the article, which the reference implementation counts as choice A
        ("It is a cat", None),
        ("a", None),
        ("A cat sat", None),
        ("The answer is a cat", None),
        ("The answer is A cat", None),
        (r"\boxed{A cat}", None),
        (r"\boxed{Apple}", None),
        (r"\boxed{5}", None),
        ("The answer is E", None),
        ("Answer A's point", None),
        ("", None),
    ],
)
def test_choices(text: str, answer: str | None) -> None:
    assert extract(text, "choice") == answer


def test_choices_of_other_letters() -> None:
    assert extract("The answer is E", "choice", letters="ABCDE") == "E"
    assert extract("The answer is C", "choice", letters="AB") is None


@pytest.mark.parametrize(
    ("text", "which", "answer"),
    [
        ("Positive!", "first", "positive"),
        ("negative or positive", "first", "negative"),
        ("negative or positive", "last", "positive"),
        ("Very Negative", "first", "very negative"),  # the longest label wins
        ("positively", "first", None),
        ("nonpositive", "last", None),
        ("", "first", None),
    ],
)
def test_labels_are_whole_words_in_the_spelling_of_the_set(text: str, which: str, answer: str | None) -> None:
    assert extract(text, "label", which=which, **LABELS) == answer


def test_labels_are_text_and_not_patterns() -> None:
    assert extract("is it c++ or c", "label", labels=["c++", "."], which="last") == "c++"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nope", {}, "unknown extractor 'nope'; known: box, choice, json, label, math, number, point, regex"),
        ("choice", {"letters": "abc"}, "capital letters"),
        ("choice", {"letters": "A]"}, "capital letters"),
        ("choice", {"letters": 4}, "capital letters"),
        ("label", {}, "needs labels"),
        ("label", {"labels": ["a"], "which": "middle"}, "which: first | last"),
        ("label", {"labels": "positive"}, "needs labels"),  # a word is not a list of letters
        ("label", {"labels": [0, 1]}, "needs labels"),
        ("label", {"labels": ["a", " "]}, "needs labels"),
        ("math", {"labels": ["a"]}, "extractor 'math'"),
    ],
)
def test_wrong_extractors_and_options_are_found_without_a_rollout(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        AnswerReader(kind, options)


def test_an_answer_longer_than_the_bound_is_no_answer() -> None:
    fits, too_long = "1" * MAX_ANSWER, "1" * (MAX_ANSWER + 1)
    assert extract(rf"\boxed{{{fits}}}", "math") == fits
    assert extract(rf"\boxed{{{too_long}}}", "math") is None
    assert extract(rf"\boxed{{5}} \boxed{{{too_long}}}", "math") == "5"


def test_only_the_end_of_the_text_is_read() -> None:
    assert extract(r"\boxed{5}" + " " * (MAX_TEXT - 9), "math") == "5"
    assert extract(r"\boxed{5}" + " " * MAX_TEXT, "math") is None


N = 1_000_000
# Each of these took minutes, or would, under a pattern with neighbouring unbounded repeats.
HOSTILE = {
    "digits": "1" * N,
    "digits that end in a letter": "1" * N + "x",
    "thousands": "111," * (N // 4),
    "thousands that end in a letter": "1" + ",000" * (N // 4) + "x",
    "fractions": "1/" * (N // 2),
    "dots": "1." * (N // 2),
    "signs": "-" * N,
    "open boxes": r"\boxed{" * (N // 7),
    "nested boxes": r"\boxed{" * 10_000 + "5" + "}" * 10_000,
    "nested braces": r"\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}",
    "box and blanks": (r"\boxed" + " " * 10_000 + "x") * 10,
    "answer and blanks": ("answer" + " " * 1000) * 1000,
    "answer is and blanks": ("the answer is" + " " * 10_000 + "x") * 10,
    "answer and stars": ("answer" + "*" * 1000) * 1000,
    "answer and colons": "answer:" * (N // 7),
    "letter and blanks": ("A" + " " * 10_000 + "x") * 10,
    "letters": "(A" * (N // 2),
    "lines": "A\n" * (N // 2),
    "dollars": "answer is " + "$" * N,
    "backslashes": "\\" * N,
    "labels": "very " * (N // 5),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("kind", ["math", "number", "choice", "label"])
def test_hostile_text_ends_soon_and_in_a_bounded_answer(text: str, kind: str) -> None:
    with ends_at_all():
        answer = extract(text, kind, **(LABELS if kind == "label" else {}))
    assert answer is None or 0 < len(answer) <= MAX_ANSWER


@settings(derandomize=True, max_examples=300)
@given(st.text(alphabet="\\boxedfrac{}()[] \n.,:-−/$aA12answeris", max_size=60))
def test_any_text_gives_a_stripped_answer_or_none(text: str) -> None:
    for kind in ("math", "number", "choice"):
        answer = extract(text, kind)
        assert answer is None or (answer and answer == answer.strip())


@settings(derandomize=True, max_examples=200)
@given(
    st.recursive(st.sampled_from(["1", "x", " "]), lambda inner: st.lists(inner, max_size=3).map(in_braces)),
    st.text("ab}"),
)
def test_balanced_content_comes_back_whole(content: str, before: str) -> None:
    assert boxed(rf"{before}\boxed{{{content}}} and so on") == content
