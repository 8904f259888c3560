from __future__ import annotations

import pytest
from helpers import ends_at_all
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.gate import MAX_CHARS, Verdict, judge

N = 1_000_000
BOMBS = {
    "power tower": "9^{9^{9^{9}}}",
    "bare tower": "9^9^9",
    "tower of groups": "{9^{99}}^{{99}^{99}}",
    "power of powers": "(9^{99})^{99}",
    "factorial": "(10^7)!",
    "long factorial": "10000000!",
    "factorial of a factorial": "9!!",
    "factorial up there": "2^{20!}",
    "binomial up there": r"2^{\binom{99}{50}}",
    "huge exponent": "3^{1500000000}",
    "small base": "1.1^{99999}",
    "root of a huge exponent": r"\sqrt{2^{99999999}}",
    "sum": r"\sum_{k=1}^{1000000000}k",
    "product": r"\prod_{k=1}^{10000000}k",
    "integral": r"\int_0^{1}\sin(x^x)dx",
    "limit": r"\lim_{x\to0}x^x",
    "binomial": r"\binom{10000000}{5000000}",
    "exponentials": r"\exp(\exp(\exp(9)))",
    "braces": "{" * 10_000 + "5" + "}" * 10_000,
    "brackets": "(" * 10_000 + "5" + ")" * 10_000,
    "a megabyte of digits": "1" * N,
    "literal": "1" * 30 + "x",
    "powers": "+".join(["x^2"] * 20),
    "roots": r"\sqrt{" * 20 + "2" + "}" * 20,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused(bomb: str) -> None:
    with ends_at_all():
        assert judge(bomb) is Verdict.COSTLY


@pytest.mark.parametrize(
    "code",
    ["__import__('os').system('true')", "eval('1')", 'exec("1")', "open('/tmp/x','w')", "os.system", "lambda: 0", "().__class__"],
)  # fmt: skip
def test_code_is_no_mathematics(code: str) -> None:
    assert judge(code) is Verdict.TEXT


@pytest.mark.parametrize(
    "text", ["dog", r"\text{dog}", "50%", "1e3", "1E-3", "5", "[5]", r"\pm 2", r"\input{x}", r"\def\x{1}", "(1", "1)", "", "٣",
     "x;y", "`x`"]
)  # fmt: skip
def test_words_plain_numbers_and_the_unknown_are_text(text: str) -> None:
    assert judge(text) is Verdict.TEXT


@pytest.mark.parametrize(
    "text",
    [r"\sqrt{8}", r"\frac{-b+\sqrt{b^2-4ac}}{2a}", "2^{100}", "10^{-3}", "x^2+2x+1", "5!", r"\binom{10}{3}", r"\log_2 8", "y=2x+1",
     "-x<-3", r"e^{2x}", r"\frac{1}{2}\exp(-1)", r"\sqrt[3]{2}", r"|x-1|", "2^{10}3^{5}", r"\sin^{2}\theta", "x^{n+1}", "1000^{1/3}"],
)  # fmt: skip
def test_ordinary_answers_pass(text: str) -> None:
    assert judge(text) is Verdict.ASK


@settings(derandomize=True, max_examples=500, deadline=None)
@given(st.text(alphabet="\\^_{}()[]!|=<>+-*/., 019xeidsumfracqt", max_size=2 * MAX_CHARS))
def test_any_text_gets_a_verdict(text: str) -> None:
    assert judge(text) in Verdict
