"""Extractors of data: JSON, boxes, points and patterns of a recipe."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import ends_at_all, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.equivalence import canonical, same
from ttrl.rewards.extract import MAX_ANSWER, extract, extract_all
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.structured import parse_box, parse_point


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('so {"b": 1, "a": [2.0, "x"]}.', '{"a":[2,"x"],"b":1}'),
        ('{"a": 1} and then {"a": 2}', '{"a":2}'),
        ('```json\n{"a": {"b": []}}\n```', '{"a":{"b":[]}}'),
        ('{"text": "a } in a string"}', '{"text":"a } in a string"}'),
        ('{"a": 1} {"a": ', '{"a":1}'),  # the last one never closes
        ("[1, 2]", "[1,2]"),
        ('{"a": NaN}', None),
        ('{"a": 1e999}', None),
        ("{a: 1}", None),
        ("no data", None),
        ("", None),
    ],
)
def test_the_last_json_value_is_the_answer(text: str, answer: str | None) -> None:
    assert extract(text, "json") == answer
    if answer is not None:
        assert canonical(answer, "json") == answer


def test_a_member_of_the_last_object_that_has_it() -> None:
    text = 'first {"answer": 4, "why": "x"}, then {"answer": "Paris"}, finally {"other": 1}'
    assert extract(text, "json", key="answer") == "Paris"
    assert extract('{"answer": null}', "json", key="answer") is None
    assert extract('{"answer": {"b": 1, "a": 2}}', "json", key="answer") == '{"a":2,"b":1}'


def test_json_is_compared_by_value() -> None:
    assert same('{"a": 1, "b": 2}', '{"b":2.0,"a":1}', "json")
    assert not same("[1,2]", "[2,1]", "json")
    assert same("Paris", " Paris ", "json") and not same("Paris", "paris", "json")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[10, 20, 30, 40]", "[10,20,30,40]"),
        ('{"bbox_2d": [10, 20, 30.50, 40.0]}', "[10,20,30.5,40]"),  # the 2 of the key is no coordinate
        ("(1,2),(3,4)", "[1,2,3,4]"),
        ("<|box_start|>(1, 2),(3, 4)<|box_end|>", "[1,2,3,4]"),
        ("[1,2,3,4] or rather [5,6,7,8]", "[5,6,7,8]"),
        ("[-5, −2, 3, 4]", "[-5,-2,3,4]"),
        ("[0.10, 0.2, 0.3, 0.4]", "[0.1,0.2,0.3,0.4]"),
        ("[100, 200, 1000, 2000]", "[100,200,1000,2000]"),
        ("[3, 2, 1, 4]", None),  # no area: left is right of right
        ("[0, 0, 0, 0]", None),  # what other frameworks make of a failure, and then let vote
        ("[1, 2]", None),
        ("[1, 2, 3]", None),
        ("[1,2,3,4,5]", None),
        ("12 34 56 78", None),
        ("", None),
    ],
)
def test_boxes(text: str, answer: str | None) -> None:
    assert extract(text, "box") == answer
    if answer is not None:
        assert extract(answer, "box") == answer
        assert list(parse_box(answer)) == json.loads(answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("click (10, 20)", "(10,20)"),
        ("[10.50, 20.0]", "(10.5,20)"),
        ("(1,2) no, (3,4)", "(3,4)"),
        ("click(x=3, y=4)", "(3,4)"),
        ('{"x": 3, "y": -4}', "(3,-4)"),
        ("(-0.0, 5)", "(0,5)"),
        ("[1,2,3,4]", None),
        ("(1, 2, 3)", None),
        ("around 5", None),
        ("", None),
    ],
)
def test_points(text: str, answer: str | None) -> None:
    assert extract(text, "point") == answer
    if answer is not None:
        assert extract(answer, "point") == answer
        assert f"({parse_point(answer)[0]:g},{parse_point(answer)[1]:g})" == answer


def test_coordinates_off_the_screen_are_no_answer_when_its_size_is_known() -> None:
    assert extract("(1920, 1080)", "point", size=[1920, 1080]) == "(1920,1080)"
    assert extract("(1921, 5)", "point", size=[1920, 1080]) is None
    assert extract("(-1, 5)", "point", size=[1920, 1080]) is None
    assert extract("[0, 0, 1, 1]", "box", size=[1, 1]) == "[0,0,1,1]"
    assert extract("[0, 0, 1.5, 1]", "box", size=[1, 1]) is None


@pytest.mark.parametrize("text", ["", "(1,2)", "[1,2,3]", "dog"])
def test_only_canonical_coordinates_are_parsed(text: str) -> None:
    with pytest.raises(ValueError, match="not a canonical box"):
        parse_box(text)
    with pytest.raises(ValueError, match="not a canonical point"):
        parse_point(text + ";")


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"pattern": r"<a>(.*?)</a>"}, "two"),
        ({"pattern": r"<a>(?:.*?)</a>"}, "<a>two</a>"),
        ({"pattern": r"<(?P<tag>a)>(?P<body>[^<]*)", "group": "body"}, "two"),
        ({"pattern": r"<(a)>([^<]*)", "group": 2}, "two"),
        ({"pattern": r"<(a)>([^<]*)", "group": 0}, "<a>two"),
        ({"pattern": r"<b>(.*?)</b>"}, None),
        ({"pattern": r"</a>(\s*)"}, None),  # blanks are no answer
    ],
)
def test_the_last_match_of_a_pattern(options: dict[str, Any], answer: str | None) -> None:
    assert extract("<a>one</a> <a>two</a>", "regex", **options) == answer


def test_matches_that_are_numbers_are_compared_as_numbers_and_others_as_text() -> None:
    assert same("0.50", "1/2", "regex")
    assert same("a  b", "a b", "regex") and not same("a", "A", "regex")


def test_a_hostile_pattern_ends_and_finds_nothing() -> None:
    with ends_at_all():
        found = extract_all(["a" * 50 + "b", "aaa", "", "a" * 50 + "b"], "regex", pattern="^(a+)+$", group=0)
    assert found == [None, "aaa", None, None]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("regex", {}, "needs a pattern"),
        ("regex", {"pattern": "("}, "pattern"),
        ("regex", {"pattern": "a" * 501}, "needs a pattern"),
        ("regex", {"pattern": "a", "group": 1}, "has no group"),
        ("regex", {"pattern": "a", "group": "name"}, "has no group"),
        ("regex", {"pattern": "a", "group": True}, "has no group"),
        ("json", {"key": ""}, "key must be"),
        ("json", {"key": 1}, "key must be"),
        ("box", {"size": [1]}, "size must be"),
        ("point", {"size": "ab"}, "size must be"),
        ("point", {"size": [0, 5]}, "size must be"),
        ("point", {"pattern": "x"}, "extractor 'point'"),
    ],
)
def test_wrong_options_are_found_without_a_rollout(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnswerReader(kind, options)


def test_a_reader_of_patterns_reads_a_group_at_once() -> None:
    reader = AnswerReader("regex", {"pattern": r"= *(\d+)"})
    rollouts = [make_rollout(text, i) for i, text in enumerate(["x = 5", "none", "y =5", "= 7"])]
    answers = reader.read(rollouts)
    assert answers == ("5", None, "5", "7")
    assert reader.classes(answers) == ([0, -1, 0, 1], ("5", "7"))


N = 1_000_000
HOSTILE = {
    "brackets": "[" * N,
    "braces": '{"a":' * (N // 5),
    "nested": "[" * 900 + "]" * 900,
    "coordinates": "(1," * (N // 3),
    "numbers": "1, " * (N // 3),
    "pairs": "(1,2)" * (N // 5),
    "digits": "(" + "1" * N,
    "names": "x=" * (N // 2),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("kind", ["json", "box", "point"])
def test_hostile_text_ends_soon_and_in_a_bounded_answer(text: str, kind: str) -> None:
    with ends_at_all():
        answer = extract(text, kind)
    assert answer is None or 0 < len(answer) <= MAX_ANSWER


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=200)
@given(st.dictionaries(st.text(max_size=3), values, min_size=1, max_size=3))
def test_json_comes_back_by_value(value: dict[str, Any]) -> None:
    answer = extract(f"the answer: {json.dumps(value, indent=1)} as asked", "json")
    if answer is not None:  # None when it is longer than an answer may be
        assert json.loads(answer) == value


@settings(derandomize=True, max_examples=200)
@given(st.integers(-5000, 5000), st.integers(-5000, 5000))
def test_points_come_back(x: int, y: int) -> None:
    assert parse_point(extract(f"click({x}, {y})", "point") or "") == (x, y)
