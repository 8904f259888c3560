"""Cut points between episodes: the published rule, the generic ones, and text places as token counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import FakeTokenizer

from ttrl.episodes import delimiter_cuts, episode_starts, merged, paragraph_cuts, splitter, token_cuts

WORDS = ["p0", "p1", "p2", "Wait, is it?", "p4", "p5", "Alternatively, no", "p7"]


def ids(text: str) -> np.ndarray:
    return np.asarray(FakeTokenizer().encode(text, add_special_tokens=False), np.int32)


def decode(token_ids: np.ndarray) -> str:
    return FakeTokenizer().decode(token_ids, skip_special_tokens=True)


def test_the_published_rule_opens_episodes_at_markers_after_three_paragraphs() -> None:
    assert episode_starts(WORDS) == [3, 6]
    early = ["p0", "p1", "Wait, is it?", "p3", "p4", "p5", "Alternatively, no", "p7"]
    assert episode_starts(early) == [6]  # two paragraphs are not an episode yet
    assert episode_starts(["Wait", *WORDS]) == [4, 7]  # the first paragraph opens the first episode anyway
    assert episode_starts(WORDS, shortest=4) == [6]
    assert episode_starts(WORDS, markers=("p",), shortest=1) == [1, 2, 4, 5, 7]
    assert episode_starts([]) == []


def test_cuts_stand_where_the_paragraph_starts_and_thinking_ends_at_the_tag() -> None:
    text = "\n\n".join(WORDS)
    assert [text[c:].split()[0] for c in paragraph_cuts(text)] == ["Wait,", "Alternatively,"]
    assert paragraph_cuts(text.replace("\n\n", "\n \t\n\n")) != []  # a line of blanks is blank
    answered = "\n\n".join([*WORDS[:4], "</think>", *WORDS[4:]])
    assert [answered[c:].split()[0] for c in paragraph_cuts(answered)] == ["Wait,"]
    assert len(paragraph_cuts(answered, end=None)) == 2
    assert paragraph_cuts("") == [] == paragraph_cuts("\n\n\n")


def test_merging_caps_first_and_then_joins_consecutive_episodes() -> None:
    cuts = list(range(10, 100, 10))
    assert merged(cuts) == cuts
    assert merged(cuts, most=4) == [10, 20, 30, 40]
    assert merged(cuts, every=3) == [30, 60, 90]
    assert merged(cuts, most=7, every=3) == [30, 60]


def test_places_in_text_become_the_fewest_tokens_that_reach_them() -> None:
    pieces = ["ab", "c,", "", "de", ",f"]  # a token may span a delimiter, or decode to nothing

    def join(tokens: np.ndarray) -> str:
        return "".join(pieces[t] for t in tokens)

    tokens = np.arange(5, dtype=np.int32)
    assert delimiter_cuts("abc,de,f", delimiter=",") == [4, 7]
    for place in range(9):
        slow = next(n for n in range(6) if len(join(tokens[:n])) >= place)
        assert token_cuts([place], tokens, join) == [slow]
    assert splitter("delimiter", {"delimiter": ","})(tokens, join) == (
        2,
    )  # the second cut is the end of the text: none


def test_splitters_leave_out_start_end_and_repetitions() -> None:
    assert splitter("tokens", {"n": 3})(ids("abcdefg"), decode) == (3, 6)
    assert splitter("tokens", {"n": 3})(ids("abcdef"), decode) == (3,)
    assert splitter("tokens", {"n": 9})(ids("abc"), decode) == ()
    assert splitter("delimiter", {"delimiter": ","})(ids("a,b,"), decode) == (2,)
    assert splitter("tokens", {"n": 1, "most": 4, "every": 2})(ids("abcdefgh"), decode) == (2, 4)
    assert splitter("paragraphs", {})(ids("\n\n".join(WORDS)), decode) == tuple(paragraph_cuts("\n\n".join(WORDS)))
    assert splitter("paragraphs", {})(ids(""), decode) == ()


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("paragraph", {}, "unknown splitter 'paragraph'; known: paragraphs, delimiter, tokens"),
        ("tokens", {}, "missing a required argument: 'n'"),
        ("tokens", {"n": 0}, "n must be a whole number above 0, got 0"),
        ("tokens", {"n": 2, "every": True}, "every must be a whole number above 0"),
        ("delimiter", {"delimiter": ""}, "the delimiter is empty"),
        ("delimiter", {"delimiter": ",", "n": 3}, "unexpected keyword argument 'n'"),
    ],
)
def test_mistakes_are_named(rule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splitter(rule, options)
