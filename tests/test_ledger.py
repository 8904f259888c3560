from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from scipy.stats import fisher_exact

from ttrl.evaluate.evaluator import Evaluation, PromptResult, Protocol
from ttrl.evaluate.ledger import Verdict, ledger, totals

PROTOCOL = Protocol(
    samples=16, temperature=1.0, top_p=1.0, max_new_tokens=8, template="raw", extractor="math", prompts=1
)  # fmt: skip


def result(correct: int | None, *, identifier: str = "p", samples: int = 16) -> PromptResult:
    """`correct` samples say 5, the right answer; the others say 7."""
    right = correct or 0
    return PromptResult(
        id=identifier, samples=samples, answers={"5": right, "7": samples - right}, no_answer=0,
        majority="5" if right > samples - right else "7", share=max(right, samples - right) / samples, length=4.0,
        correct=correct, right="5" if right else None,
    )  # fmt: skip


def evaluation(results: Sequence[PromptResult]) -> Evaluation:
    return Evaluation(step=0, split="adapted", protocol=PROTOCOL, results=tuple(results), per_prompt={}, estimates={})


def verdict(before: int, after: int, samples: int = 16) -> Verdict:
    [entry] = ledger(evaluation([result(before, samples=samples)]), evaluation([result(after, samples=samples)]))
    return entry.verdict


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (2, 14, Verdict.LEARNED),  # the start majority was wrong
        (0, 16, Verdict.LEARNED),
        (9, 16, Verdict.SHARPENED),  # the start majority was right already
        (14, 2, Verdict.CORRUPTED),
        (6, 0, Verdict.CORRUPTED),  # a wrong majority can get worse too
        (8, 8, Verdict.UNCHANGED),
        (8, 10, Verdict.UNCHANGED),
        (0, 0, Verdict.UNCHANGED),
        (16, 16, Verdict.UNCHANGED),
        # the border of the two-sided test: 0 -> 5 of 16 has p = 0.0434, 0 -> 4 has p = 0.1012
        (0, 5, Verdict.LEARNED),
        (0, 4, Verdict.UNCHANGED),
    ],
)
def test_verdicts(before: int, after: int, expected: Verdict) -> None:
    assert verdict(before, after) is expected


def test_few_samples_prove_nothing() -> None:
    assert verdict(0, 3, samples=3) is Verdict.UNCHANGED  # p = 0.1


def test_a_tie_at_the_start_is_no_right_majority() -> None:
    tied = PromptResult(
        id="p",
        samples=16,
        answers={"5": 8, "7": 8},
        no_answer=0,
        majority=None,
        share=0.5,
        length=4.0,
        correct=8,
        right="5",
    )
    assert ledger(evaluation([tied]), evaluation([result(16)]))[0].verdict is Verdict.LEARNED


def test_entries_hold_the_p_value_and_both_sides() -> None:
    [entry] = ledger(evaluation([result(2)]), evaluation([result(14)]))
    assert entry.p_value == pytest.approx(fisher_exact([[2, 14], [14, 2]]).pvalue)
    record = json.loads(json.dumps(entry.record()))
    assert (record["id"], record["verdict"]) == ("p", "learned")
    assert record["before"] == {
        "correct": 2, "samples": 16, "majority": "7", "share": 0.875, "majority_correct": False, "no_answer": 0,
        "answers": {"5": 2, "7": 14},
    }  # fmt: skip
    assert record["after"]["majority_correct"] is True


def test_records_show_the_most_frequent_answers_only() -> None:
    many = PromptResult(
        id="p", samples=16, answers={str(i): 16 - i for i in range(9)}, no_answer=0, majority="0", share=0.2,
        length=4.0, correct=0, right=None,
    )  # fmt: skip
    [entry] = ledger(evaluation([many]), evaluation([many]))
    assert list(entry.record()["before"]["answers"]) == ["0", "1", "2", "3", "4"]


def test_without_labels_there_is_no_ledger() -> None:
    assert ledger(evaluation([result(None)]), evaluation([result(None)])) == []


def test_totals_name_every_verdict() -> None:
    pairs = [(2, 14), (0, 16), (9, 16), (8, 8)]
    before = evaluation([result(b, identifier=str(i)) for i, (b, _) in enumerate(pairs)])
    after = evaluation([result(a, identifier=str(i)) for i, (_, a) in enumerate(pairs)])
    assert totals(ledger(before, after)) == {"learned": 2, "sharpened": 1, "corrupted": 0, "unchanged": 1}
    assert totals([]) == {"learned": 0, "sharpened": 0, "corrupted": 0, "unchanged": 0}
