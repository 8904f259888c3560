from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FakeTokenizer, make_prompt

from ttrl.errors import ConfigError
from ttrl.evaluate.estimators import maj_at_k, pass_at_k
from ttrl.evaluate.evaluator import Estimate, Evaluation, Evaluator, change
from ttrl.evaluate.labels import read_labels
from ttrl.rewards.reader import AnswerReader
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.scripted import Script, ScriptedEngine
from ttrl.types import SamplingSpec

HALF, NEVER = r"\boxed{0.5}", "I give up"
SCRIPT = {
    "easy": {r"\boxed{1/2}": 0.5, HALF: 0.5},
    "hard": {r"\boxed{7}": 0.7, r"\boxed{8}": 0.3},
    "mute": {NEVER: 1.0},
}
ANSWERS = {"easy": r"\frac12", "hard": "8", "mute": "3"}


def labels(folder: Path, answers: dict[str, str] = ANSWERS) -> str:
    file = folder / "labels.jsonl"
    file.write_text("".join(json.dumps({"id": i, "answer": a}) + "\n" for i, a in answers.items()), encoding="utf-8")
    return str(file)


def pool(script: dict[str, dict[str, float]] = SCRIPT) -> LocalPool:
    return LocalPool(ScriptedEngine(Script(script), FakeTokenizer()))


def evaluator(labels_file: str | None, names: tuple[str, ...] = ("easy", "hard", "mute"), **options: Any) -> Evaluator:
    spec = SamplingSpec(max_new_tokens=options.pop("max_new_tokens", 50))
    settings = {"samples": 16, "ks": (1, 4, 16), "template": "raw", "seed": 3, **options}
    prompts = [make_prompt(name, name) for name in names]
    return Evaluator("adapted", prompts, labels_file, AnswerReader("math", {}), spec, **settings)


def test_samples_become_counts_per_canonical_answer(tmp_path: Path) -> None:
    easy, hard, mute = evaluator(labels(tmp_path))(0, pool()).results
    # two spellings of one half are one answer, and the label is spelled in a third way
    assert (easy.answers, easy.majority, easy.right, easy.correct) == ({"1/2": 16}, "1/2", "1/2", 16)
    assert easy.majority_correct and easy.share == 1.0
    assert sum(hard.answers.values()) == hard.samples == 16
    assert list(hard.answers) == ["7", "8"] and hard.majority == "7"
    assert (hard.right, hard.correct) == ("8", hard.answers["8"])
    assert not hard.majority_correct
    assert (mute.answers, mute.no_answer, mute.majority, mute.right, mute.correct) == ({}, 16, None, None, 0)
    assert not mute.majority_correct and mute.share == 0.0
    assert mute.length == len(NEVER) + 1  # and its end-of-sequence token


def test_estimates_are_means_over_prompts_of_the_unbiased_estimators(tmp_path: Path) -> None:
    evaluation = evaluator(labels(tmp_path))(4, pool())
    right = evaluation.results[1].correct
    assert right is not None and 0 < right < 8
    expected = {
        "pass@1": (1.0, right / 16, 0.0),
        "pass@4": (1.0, pass_at_k(16, right, 4), 0.0),
        "pass@16": (1.0, 1.0, 0.0),
        "maj@4": (1.0, maj_at_k([16 - right, right], 1, 0, 4), 0.0),
        "maj@16": (1.0, 0.0, 0.0),
        "majority_share": (1.0, 1 - right / 16, 0.0),
        "answered": (1.0, 1.0, 0.0),
    }
    for name, values in expected.items():
        assert evaluation.per_prompt[name] == pytest.approx(values), name
        assert evaluation.estimates[name].value == pytest.approx(np.mean(values)), name
    assert set(evaluation.per_prompt) == {*expected, "length"}  # maj@1 would be pass@1 again
    for estimate in evaluation.estimates.values():
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high


def test_without_labels_there_are_only_label_free_numbers() -> None:
    evaluation = evaluator(None)(0, pool())
    assert set(evaluation.estimates) == {"majority_share", "answered", "length"}
    assert all(result.correct is None and result.right is None for result in evaluation.results)


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    estimate = evaluator(labels(tmp_path), ("hard",))(0, pool()).estimates["pass@1"]
    assert estimate == Estimate(value=estimate.value, low=None, high=None)


def test_a_single_sample_that_answers_is_its_own_majority(tmp_path: Path) -> None:
    evaluation = evaluator(labels(tmp_path), ("easy",), samples=1, ks=(1,))(0, pool())
    assert evaluation.results[0].majority_correct


def test_truncated_samples_do_not_count_as_answers(tmp_path: Path) -> None:
    text = r"\boxed{8} and then much more"
    script = {"hard": {text: 1.0}}
    evaluation = evaluator(labels(tmp_path), ("hard",), max_new_tokens=len(text))(0, pool(script))
    assert (evaluation.results[0].no_answer, evaluation.results[0].correct) == (16, 0)
    assert evaluator(labels(tmp_path), ("hard",))(0, pool(script)).results[0].correct == 16


def test_common_random_numbers_do_not_depend_on_step_order_or_company(tmp_path: Path) -> None:
    file = labels(tmp_path)
    first, later = evaluator(file)(0, pool()), evaluator(file)(100, pool())
    assert (first.step, later.step) == (0, 100)
    assert first.results == later.results and first.estimates == later.estimates
    backward = evaluator(file, ("mute", "hard", "easy"))(0, pool())
    assert backward.results[::-1] == first.results
    assert evaluator(file, ("hard",))(0, pool()).results[0] == first.results[1]
    assert evaluator(file, seed=4)(0, pool()).results != first.results


def test_intervals_depend_on_the_seed_and_not_on_the_step(tmp_path: Path) -> None:
    names = tuple(f"p{i}" for i in range(12))
    script = {name: {r"\boxed{1}": (i + 1) / 13, r"\boxed{2}": (12 - i) / 13} for i, name in enumerate(names)}
    file = labels(tmp_path, dict.fromkeys(names, "1"))
    first, later = evaluator(file, names)(0, pool(script)), evaluator(file, names)(100, pool(script))
    assert first.estimates == later.estimates


@pytest.mark.parametrize(
    "weird", [r"\text{\text{\text{5}}}", "x = y = 5", "1, 200", "1 1/2", r"\{2,1\}", "((5))", "a=b"]
)
def test_a_sample_that_equals_the_label_is_right_however_it_is_written(tmp_path: Path, weird: str) -> None:
    # canonical forms of unusual text need not be canonical themselves, so they must not be put through twice
    file = labels(tmp_path, {"q": weird})
    result = evaluator(file, ("q",))(0, pool({"q": {rf"\boxed{{{weird}}}": 1.0}})).results[0]
    assert (result.correct, result.majority_correct) == (16, True)


@pytest.mark.parametrize(("answer", "label"), [("1, 200", "1200"), (r"\text{\text{\text{5}}}", "5")])
def test_grading_and_voting_use_one_equality(tmp_path: Path, answer: str, label: str) -> None:
    reader = AnswerReader("math", {})
    assert reader.classes([answer, label])[0] in ([0, 1], [1, 0])
    file = labels(tmp_path, {"q": label})
    assert evaluator(file, ("q",))(0, pool({"q": {rf"\boxed{{{answer}}}": 1.0}})).results[0].correct == 0


def test_the_record_names_step_split_protocol_and_metrics(tmp_path: Path) -> None:
    record = json.loads(json.dumps(evaluator(labels(tmp_path))(4, pool()).record(), allow_nan=False))
    assert (record["step"], record["split"]) == (4, "adapted")
    assert record["protocol"] == {
        "samples": 16, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 50, "template": "raw", "extractor": "math",
        "prompts": 3, "grader": "keys-2", "prompt_set": record["protocol"]["prompt_set"], "labels": record["protocol"]["labels"],
    }  # fmt: skip
    assert set(record["pass@1"]) == {"value", "low", "high"}


# change


def changed(tmp_path: Path, **options: Any) -> tuple[Evaluation, Evaluation]:
    better = {**SCRIPT, "hard": {r"\boxed{8}": 1.0}, "mute": {r"\boxed{3}": 1.0}}
    before, after = evaluator(labels(tmp_path)), evaluator(labels(tmp_path), **options)
    return before(0, pool()), after(9, pool(better))


def test_a_change_is_the_paired_difference(tmp_path: Path) -> None:
    before, after = changed(tmp_path)
    difference = change(before, after, "pass@1", seed=0)
    assert difference is not None and difference.low is not None and difference.high is not None
    right = before.results[1].correct
    assert right is not None
    assert difference.value == pytest.approx((0 + (1 - right / 16) + 1) / 3)
    assert difference.low <= difference.value <= difference.high
    same = change(before, before, "pass@1", seed=0)
    assert same == Estimate(value=0.0, low=0.0, high=0.0)
    assert change(before, after, "pass@2", seed=0) is None


@pytest.mark.parametrize("options", [{"samples": 20}, {"template": "chat"}, {"max_new_tokens": 60}])
def test_evaluations_under_different_protocols_cannot_be_compared(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="different protocols cannot be compared"):
        change(*changed(tmp_path, **options), "pass@1", seed=0)


# labels


def test_labels_are_read_for_the_prompts_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "l.csv"
    file.write_text("id,answer,extra\n1,5,x\n2,,x\n3,7,x\n", encoding="utf-8")
    assert read_labels(str(file), ["3", "1"]) == {"3": "7", "1": "5"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"id": "a", "answer": 5}', '{"id": "a", "answer": 6}'], r"l\.jsonl:2: duplicate label for id 'a'"),
        (['{"id": "a"}'], r"l\.jsonl:1: a label needs 'id' and 'answer'"),
        (['{"id": "a", "answer": null}'], r"l\.jsonl:1: a label needs 'id' and 'answer'"),
        (['{"answer": "5"}'], r"l\.jsonl:1: a label needs 'id' and 'answer'"),
        (['{"id": "a", "answer": 5}'], r"l\.jsonl: no label for 4 of 5 prompts \(b, c, d, \.\.\.\); ids must match"),
        ([], r"l\.jsonl: no label for 5 of 5 prompts"),
    ],
)
def test_broken_labels_are_errors(tmp_path: Path, rows: list[str], message: str) -> None:
    (tmp_path / "l.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_labels(str(tmp_path / "l.jsonl"), list("abcde"))
