"""Normalised regret and token efficiency: golden numbers, slow twins, and the evaluation on a pool whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FakeTokenizer, make_prompt, make_rollout

from ttrl.errors import ConfigError
from ttrl.evaluate.command import EvalCall, RegretCall, evaluate_regret
from ttrl.evaluate.regret import Curve, curve, normalised_regret, reach_interval, tokens_to_reach
from ttrl.evaluate.stopped import RegretEvaluator
from ttrl.probing import Stops
from ttrl.rewards.reader import AnswerReader
from ttrl.seeds import generator
from ttrl.types import Request, Rollout, SamplingSpec

TOKENIZER = FakeTokenizer()


def test_regret_of_two_points() -> None:
    points = curve([2000, 1000], [1.0, 0.5])
    assert points == Curve((1000.0, 2000.0), (0.5, 1.0))
    assert normalised_regret(points, 4000) == pytest.approx(0.25)
    assert normalised_regret(points, 1500) == pytest.approx(0.625)
    assert normalised_regret(points, 500) == pytest.approx(1 - 0.125)
    assert normalised_regret(curve([7], [0.0]), 100) == 1.0
    with pytest.raises(ValueError, match="budget must be above 0"):
        normalised_regret(points, 0)


@pytest.mark.parametrize(("x", "y"), [([0, 1], [0, 1]), ([1], [1.5]), ([1, 2], [1]), ([], []), ([np.inf], [1])])
def test_impossible_points_are_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match=r"tokens above 0|token counts"):
        curve(x, y)


def test_points_at_one_place_are_averaged() -> None:
    assert curve([5, 5, 9], [0.0, 1.0, 1.0]) == Curve((5.0, 9.0), (0.5, 1.0))


def random_curve(rng: np.random.Generator) -> Curve:
    size = int(rng.integers(1, 6))
    return curve(rng.uniform(1, 50, size).tolist(), rng.random(size).tolist())


def test_regret_equals_a_fine_sum() -> None:
    for seed in range(10):
        rng = generator(seed, "regret")
        points, budget = random_curve(rng), float(rng.uniform(5, 80))
        middles = (np.arange(200_000) + 0.5) * budget / 200_000
        assert normalised_regret(points, budget) == pytest.approx(1 - points.at(middles).mean(), abs=1e-4)


def test_tokens_to_reach_an_accuracy() -> None:
    pair = [[Curve((10.0,), (1.0,))], [Curve((30.0,), (1.0,))]]
    assert tokens_to_reach(pair, 0.75) == pytest.approx(15.0)  # at 15 the first is at 1 and the second at .5
    assert tokens_to_reach(pair, 1.0) == pytest.approx(30.0)
    assert tokens_to_reach([[Curve((10.0,), (0.4,))]], 0.5) is None
    assert reach_interval([[Curve((10.0,), (1.0,))]], 0.5, 0) is None  # one prompt has no interval
    low, high = reach_interval(pair * 20, 0.75, 0) or (0, 0)
    assert 7.5 <= low <= 15 <= high <= 22.5
    assert (
        reach_interval([*pair[:1] * 10, *[[Curve((10.0,), (0.0,))]] * 10], 0.5, 0) is None
    )  # half of the resamples never do
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        tokens_to_reach(pair, 0.0)


def test_tokens_to_reach_equals_a_scan() -> None:
    for seed in range(10):
        rng = generator(seed, "reach")
        curves = [[random_curve(rng) for _ in range(2)] for _ in range(3)]
        wanted = float(rng.uniform(0.1, 0.6))
        scan = np.linspace(0, 60, 60_001)
        height = np.mean([[c.at(scan) for c in own] for own in curves], axis=(0, 1))
        above = np.flatnonzero(height >= wanted)
        found = tokens_to_reach(curves, wanted)
        if not above.size:
            assert found is None
        else:
            assert found == pytest.approx(scan[above[0]], abs=2e-3)


class KnownPool:
    """A trace thinks a, b, and answers 5. Stopped at once it says 4, after a, 5 every other time, later 5."""

    tokenizer = TOKENIZER
    max_positions: int | None = None

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        rollouts = []
        for request in requests:
            prefix = TOKENIZER.decode(request.prefix)
            own = "a,b,\\boxed{5}" if not prefix else {"[": "4", "a,[": "45"[request.index % 2], "a,b,[": "5"}[prefix]
            text = own if not prefix else f"\\boxed{{{own}}}"
            tokens = np.asarray([*TOKENIZER.encode(own, add_special_tokens=False), 1], np.int32)
            made = make_rollout(text, request.index, prompt_id=request.prompt.id)
            rollouts.append(replace(made, token_ids=tokens))
        return rollouts


def evaluator(tmp_path: Path, answers: list[str], **changes: Any) -> RegretEvaluator:
    prompts = [make_prompt(f"p{i}") for i in range(len(answers))]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"id": f"p{i}", "answer": a}) + "\n" for i, a in enumerate(answers)))
    stops = Stops.of("delimiter", {"delimiter": ","}, termination="[", probes=2, tokens=4)
    options: dict[str, Any] = {"traces": 2, "budgets": (13, 5), "reach": (0.25, 0.9), "template": "raw", "rule": "delimiter:,",
                               "seed": 0, **changes}  # fmt: skip
    return RegretEvaluator(
        prompts, str(labels), AnswerReader("math", {}), SamplingSpec(max_new_tokens=20), stops, **options
    )


def test_the_evaluation_of_known_answers_by_hand(tmp_path: Path) -> None:
    """p0: points (3, 0), (5, .5), (7, 1), then the trace itself, 14 tokens, 1. A forced answer costs the prefix, one token of
    termination, and a digit and its end. p1 has another reference, so everything is wrong."""
    pool: Any = KnownPool()
    found = evaluator(tmp_path, ["5", "6"])(pool)
    right = Curve((3.0, 5.0, 7.0, 14.0), (0.0, 0.5, 1.0, 1.0))
    assert found.curves[0] == (right, right)
    assert found.curves[1][0].y == (0.0, 0.0, 0.0, 0.0)
    values = {name: estimate.value for name, estimate in found.estimates.items()}
    assert values["pass@1"] == 0.5 and values["length"] == 14 and values["episodes"] == 3
    assert values["probe_answered"] == 1.0
    # area up to 5: 0 up to 3, then a triangle of 2 x .5 / 2; up to 13 another 2 x .75 and 6 x 1
    assert values["regret@5"] == pytest.approx((1 - 0.5 / 5 + 1) / 2)
    assert values["regret@13"] == pytest.approx((1 - (0.5 + 1.5 + 6) / 13 + 1) / 2)
    assert values["stopped@5"] == 0.25
    assert found.reach["tokens@0.25"] is not None and found.reach["tokens@0.25"].value == pytest.approx(5.0)
    assert found.reach["tokens@0.9"] is None
    record = found.record()
    assert record["tokens@0.9"] is None and record["protocol"]["splitter"] == "delimiter:,"
    assert json.loads(json.dumps(record))["curves"]["p0"][0] == [[3, 5, 7, 14], [0, 0.5, 1, 1]]


def test_goals_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"budgets": ()}, "budgets"),
        ({"budgets": (0,)}, "budgets"),
        ({"reach": (1.5,)}, "accuracies"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluator(tmp_path, ["5"], **changes)


def call(**changes: Any) -> EvalCall:
    values: dict[str, Any] = {
        "model": "bundled:tiny-adder", "prompts": "bundled:tiny-adder/heldout.prompts.jsonl",
        "labels": "bundled:tiny-adder/heldout.labels.jsonl", "template": "raw", "extractor": "math", "samples": 2,
        "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 40, "k": (1,), "limit": 3, "seed": 0, "device": "cpu", **changes,
    }  # fmt: skip
    return EvalCall(**values)


def goals(**changes: Any) -> RegretCall:
    values: dict[str, Any] = {"budgets": (40,), "reach": (0.3,), "splitter": "delimiter:,", "termination": "\\boxed{",
                              "probes": 2, "probe_tokens": 6, **changes}  # fmt: skip
    return RegretCall(**values)


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"labels": None}, {}, "--labels"),
        ({}, {"splitter": "tokens:x"}, "--splitter.*n must be a whole number above 0, got 'x'"),
        ({}, {"splitter": "lines"}, "unknown splitter 'lines'"),
        ({}, {"probes": 0}, "probes must be at least 1"),
        ({}, {"budgets": (0,)}, "budgets"),
    ],
)
def test_mistakes_of_the_call_show_before_a_model_is_loaded(changes: Any, extra: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_regret(call(**{"model": "no/such/model", **changes}), goals(**extra))
