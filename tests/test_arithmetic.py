"""The fast reader against its slow twin in the sandbox."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import ends_at_all
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.arithmetic import POINTS, quick_key
from ttrl.rewards.gate import Verdict, judge
from ttrl.rewards.sandbox import Limits, Sandbox
from ttrl.rewards.sandbox_worker import POINTS as SLOW_POINTS

QUICK = [
    r"\sqrt{8}", r"2\sqrt{2}", r"\frac{5\pi}{2}", r"2.5\pi", r"5\pi/2", r"-\frac{1}{\sqrt{3}}", "(x+1)(x-2)", "x^2+3x-1", "x^{-1}",
    "2xy",   r"\frac{1+\sqrt{5}}{2}", r"\sqrt{3+2\sqrt{2}}-\sqrt{2}", r"2^{100}", r"10^{-3}", r"3\times4", r"12\div4",
    r"\frac{x+1}{x-1}",
    r"+3",
    r"x-x+2", r"\pi^2", r"\sqrt{\frac{4}{9}}", r"\sqrt{\frac{2}{3}}", r"((2))", r"\frac{2}{3}x", r"(1+\sqrt{2})^3", "0.1x",
    "x/10",   r"2\pi r", r"\frac{22}{7}\sqrt{11}", r"1000000\sqrt{2}", r"\frac{\sqrt{2}}{1000000000}", r"10^{20}\pi", r"10^{-20}\pi",
]  # fmt: skip
UNSURE = [
    "1/2x", "f(x)", "x(x+1)", "|x|", r"\ln 2", "x=2", "x>1", "2i", "e^2", r"1\frac{1}{2}x", "x^10", r"\sqrt{-1}", "1/0", r"\sqrt[3]{2}",
    "2^x",   r"\sqrt{8}-2\sqrt{2}", "9^{9^{9}}", "5!", "x_1", "", "(", "2 3", r"\frac12", r"2\cdot-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(servers=1, limits=Limits(cpu_seconds=5, wall_seconds=30))
    yield box
    box.close()


def test_both_readers_give_the_same_keys(sandbox: Sandbox) -> None:
    quick = {text: quick_key(text) for text in QUICK}
    slow = sandbox.run([("math", text) for text in quick])
    assert quick == {text: outcome.key for text, outcome in zip(quick, slow, strict=True)}
    assert all(quick.values()) and POINTS == SLOW_POINTS


@pytest.mark.parametrize("text", UNSURE)
def test_what_is_not_beyond_doubt_is_left_to_the_sandbox(text: str) -> None:
    assert quick_key(text) is None


atoms = st.sampled_from(["2", "3", "10", "0.5", "7", r"\pi", "x", "y", r"\sqrt{2}", r"\sqrt{12}", r"\frac{1}{3}"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", r"\cdot "]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"({text})^2"),
        st.tuples(inner, inner).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
    ),
    max_leaves=5,
)


@settings(derandomize=True, max_examples=12, deadline=None)
@given(st.lists(expressions, min_size=8, max_size=8))
def test_both_readers_agree_on_random_expressions(sandbox: Sandbox, texts: list[str]) -> None:
    quick = {text: key for text in texts if judge(text) is Verdict.ASK and (key := quick_key(text)) is not None}
    slow = sandbox.run([("math", text) for text in quick])
    assert quick == {text: outcome.key for text, outcome in zip(quick, slow, strict=True)}


@settings(derandomize=True, max_examples=500, deadline=None)
@given(st.text(alphabet="\\sqrtfracpi{}()^+-*/. 0129xye", max_size=60))
def test_any_text_that_passes_the_gate_gets_a_key_or_none(text: str) -> None:
    if judge(text) is Verdict.ASK:
        with ends_at_all():
            key = quick_key(text)
        assert key is None or key
