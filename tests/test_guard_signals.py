"""The sentinel's signals: by hand on small cases, and on policies that fail in the ways that are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers_guards import draw, judge, mixed, scored_from, view

from ttrl.guards.base import Level, Reading
from ttrl.guards.frozen import answer_span, choose, falls_of, frozen_view
from ttrl.guards.sentinel import SIGNALS, Sentinel
from ttrl.guards.shape import batch_of
from ttrl.guards.signals import flips, forgotten, shared_answer
from ttrl.guards.votes import Half, visit_of, votes_of

Z = (3.0, 4.0)
WRONG = [f"w{i}" for i in range(6)]


def visits(rows: dict[str, list[str]], step: int = 0):
    return {name: visit_of(scored_from(name, answers), step) for name, answers in rows.items()}


def votes(rows: dict[str, list[str]]):
    return [votes_of(scored_from(name, answers)) for name, answers in rows.items()]


def alarms(judgements, name: str) -> list[int]:
    """Steps at which a signal is past its alarm bound."""
    return [s for s, j in enumerate(judgements) if any(r.name == name and r.level is Level.ALARM for r in j.readings)]


def first_alarm(judgements) -> int | None:
    return next((s for s, j in enumerate(judgements) if j.level is Level.ALARM), None)


def test_votes_are_counted_by_class_and_do_not_depend_on_the_order():
    answers = ["1/2", "0.5", "3", "", "0.5"]
    scored = replace(scored_from("p", answers), classes=np.asarray([0, 0, 1, -1, 0], np.int32))
    found = votes_of(scored)
    assert [(c.spellings, c.votes) for c in found.camps] == [(("0.5", "1/2"), 3), (("3",), 1)]
    assert (found.lead, found.drawn, found.leader.answer) == (2, 5, "0.5")
    assert found.votes_for(("1/2", "x")) == 3
    assert found.votes_for(("x",)) == 0
    assert votes_of(scored_from("p", ["1", "2"])).leader is None
    assert votes_of(scored_from("p", ["", ""])).leader is None
    assert visit_of(scored_from("p", ["1", "1", "2", "2"]), 3) is None
    shuffled = [
        votes_of(scored_from("p", [["a", "b", "b", "c"][i] for i in order])) for order in ([0, 1, 2, 3], [3, 2, 0, 1])
    ]
    assert shuffled[0] == shuffled[1]


def test_a_visit_measures_the_answer_of_one_half_in_the_other():
    # even places: 1 1 3 1, odd places: 1 2 1 2
    visit = visit_of(scored_from("p", ["1", "1", "1", "2", "3", "1", "1", "2"]), 5)
    assert visit.halves == (Half(spellings=("1",), margin=0.5, votes=2, rival=2, size=4),)
    visit = visit_of(scored_from("p", ["1", "2", "1", "2", "1"]), 5)
    assert visit.halves == (
        Half(spellings=("1",), margin=1.0, votes=0, rival=2, size=2),
        Half(spellings=("2",), margin=1.0, votes=0, rival=3, size=3),
    )


def test_flips_by_hand():
    rows = {"a": ["1"] * 8, "b": ["1"] * 6 + ["2"] * 2, "c": ["1", "1", "1", "2", "3", "2", "1", "1"], "d": ["5"] * 8}
    earlier = visits(rows)
    # c: even places 1 1 3 1 (lead 2 of 4; the other half has one 1... and two 2), odd places 1 2 2 1 tie
    assert [len(earlier[name].halves) for name in "abcd"] == [2, 2, 1, 2]
    now = votes({"a": ["9"] * 8, "b": ["1"] * 8, "c": ["1"] * 8, "d": [""] * 8, "e": ["8"] * 8, "f": ["5", "6"]})
    assert flips(now, earlier, Z, "flips_last") is None  # three prompts that came again and answered are too few
    now[3] = votes({"d": ["5"] * 8})[0]
    reading = flips(now, earlier, Z, "flips_last")

    def chance(own: int, rival: int) -> float:
        p, q = (own + 0.5) / 5, (rival + 0.5) / 5
        return 0.5 * math.erfc((p - q) / math.sqrt(2 * (p + q - (p - q) ** 2) * (1 / 4 + 1 / 8)))

    # (margin, chance) per half
    halves = {
        "a": [(1.0, chance(4, 0))] * 2, "b": [(0.5, chance(3, 1))] * 2, "c": [(0.5, chance(2, 2))], "d": [(1.0, chance(4, 0))] * 2,
    }  # fmt: skip
    total = sum(m for pairs in halves.values() for m, _ in pairs)
    expected = sum(m * ((name == "a") - p) for name, pairs in halves.items() for m, p in pairs) / total
    error = math.sqrt(sum(sum(m * math.sqrt(p * (1 - p)) for m, p in pairs) ** 2 for pairs in halves.values())) / total
    assert reading.value == pytest.approx(expected)
    assert (reading.warn, reading.alarm) == (pytest.approx(max(0.15, 3 * error)), pytest.approx(max(0.3, 4 * error)))
    assert reading.prompts == {"a"}


def test_forgotten_answers_by_hand_and_the_score():
    first = visits({name: ["1"] * 8 for name in "abcd"})
    same = {name: ["1"] * 8 for name in "abcd"}
    reading, score = forgotten(votes(same), first, Z)
    assert reading.value == score.value == 0.0
    reading, score = forgotten(votes({**same, "a": [""] * 8, "b": ["1"] * 4 + ["2"] * 4}), first, Z)
    assert reading.value == pytest.approx((1.0 + 0.5 + 0 + 0) / 4)
    assert score.value == -reading.value
    variances = [p * (1 - p) * (1 / 8 + 1 / 4) for p in (5 / 14, 9 / 14, 13 / 14, 13 / 14)]
    assert score.error == pytest.approx(math.sqrt(sum(variances)) / 4)
    assert reading.prompts == {"a"}  # a fall of one half is within three standard errors of so few votes
    # Wide margins weigh more: both halves of b elect "1" by two of four, and saw three of four in the other
    first["b"] = visits({"b": ["1", "1", "1", "1", "1", "1", "2", "2"]})["b"]
    reading, _ = forgotten(votes({**same, "b": ["2"] * 8}), first, Z)
    assert reading.value == pytest.approx(2 * 0.5 * 0.75 / (3 * 2 + 2 * 0.5))


def test_the_score_of_weights_that_did_not_move_is_zero_on_average():
    """With eight votes the share of a winner is far above its probability; the score must not take that for a loss."""
    law = mixed("right", 0.35, WRONG)
    runs = [judge(lambda s, p: law, 4, per_step=16, seed=seed) for seed in range(60)]
    scores = [run[-1].score for run in runs if run[-1].score is not None]
    assert len(scores) > 50
    mean = np.mean([s.value for s in scores])
    assert abs(mean) < 3 * np.std([s.value for s in scores]) / math.sqrt(len(scores))
    assert np.std([s.value for s in scores]) < np.mean([s.error for s in scores])  # errors are not too small


def test_an_answer_shared_by_different_prompts_is_compared_with_the_start():
    start = batch_of([scored_from(f"p{i}", [str(i % 4)] * 4) for i in range(8)])
    assert (start.prompts, start.shared, start.distinct) == (8, 2, 0.5)
    reading = shared_answer(votes({f"p{i}": ["7"] * 4 for i in range(8)}), start, Z)
    assert reading.value == pytest.approx(1 - 2 / 8)
    assert reading.prompts == {f"p{i}" for i in range(8)}
    error = math.sqrt((8.5 / 9) * (0.5 / 9) / 8 + (2.5 / 9) * (6.5 / 9) / 8)
    assert reading.alarm == pytest.approx(max(0.4, 4 * error))
    same = shared_answer(votes({f"p{i}": [str(i % 4)] * 4 for i in range(8)}), start, Z)
    assert same.value == 0.0


def test_where_the_answer_lies_among_the_tokens():
    pieces = ["2", "+2", " is", " 4", "4", ". ", "44", "!", ""]

    def decode(ids):
        return "".join(pieces[i] for i in ids)

    assert answer_span(range(9), "44", decode) == (6, 7)
    assert answer_span(range(6), "44", decode) == (3, 5)  # " 4" holds the first character
    assert answer_span(range(9), "5", decode) == (0, 0)
    assert answer_span(range(9), "", decode) == (0, 0)


def test_the_frozen_view_scores_clear_majorities_of_the_start_again():
    groups = [scored_from(f"p{i}", ["1"] * (4 + i) + ["2"] * (4 - i), tokens=6 + i) for i in range(5)]
    told: list[int] = []

    def score(ids):
        told.append(len(ids))
        return np.linspace(-1, -2, len(ids) - 1).astype(np.float32)

    start = len(groups[0].group.prompt.token_ids)
    probes = choose(groups, 4, start + 9, score, lambda ids: "x" * len(ids))
    assert [p.prompt_id for p in probes] == ["p3", "p2", "p1"]  # p4 is too long, p0 a tie
    assert all(len(p.logprobs) == len(p.token_ids) - p.start for p in probes)
    probes = choose(groups, 2, 1000, score, lambda ids: "x" * len(ids))
    assert [p.prompt_id for p in probes] == ["p4", "p3"]
    probes = choose(groups, 4, 1000, score, lambda ids: "x" * len(ids))
    same, _ = falls_of(probes, score)
    assert same == (0.0,) * 4
    fallen, _ = falls_of(probes, lambda ids: score(ids) - np.float32(0.1))
    assert fallen == pytest.approx((0.1,) * 4, abs=1e-6)
    drop, since = frozen_view(probes, fallen, same)
    assert (drop.name, drop.level, since.name, since.level) == ("update_drop", Level.ALARM, "unlikely", Level.OK)
    assert drop.value == since.value == pytest.approx(0.1, abs=1e-6)
    # What fell step by step, as other words are found, is no update that broke something; one probe alone is no proof either
    drop, since = frozen_view(probes, (0.2,) * 4, (0.19,) * 4)
    assert (drop.level, since.level) == (Level.OK, Level.WARN)
    drop, _ = frozen_view(probes, (0.4, 0.0, 0.0, 0.0), same)
    assert drop.level is Level.OK
    assert drop.alarm == pytest.approx(2 * 0.2 / 2)
    assert frozen_view(probes[:3], fallen[:3], same[:3]) == []


def test_answers_that_move_without_their_reasoning_are_a_shortcut():
    text = "abcdefgh42"
    groups = [scored_from(f"p{i}", ["42"] * 4, tokens=10) for i in range(4)]
    flat = lambda ids: np.full(len(ids) - 1, -1.0, np.float32)  # noqa: E731
    probes = choose(groups, 4, 1000, flat, lambda ids: text[: len(ids)])
    assert [p.answer for p in probes] == [(8, 10)] * 4

    def moved(at):
        def score(ids):
            values = flat(ids)
            values[at] += 0.9
            return values

        return falls_of(probes, score)[1][0]

    assert moved(slice(-2, None)).level is Level.WARN
    assert moved(slice(-10, None)).level is Level.OK
    assert moved(slice(-10, -2)).level is Level.OK


def healthy(step: int, prompt: int) -> dict[str, float]:
    """Sharpening: three in four prompts have a right majority that grows."""
    start = 0.35 + 0.4 * (prompt % 4) / 3
    return mixed(f"right{prompt}", min(0.95, start + 0.02 * step), [f"{w}-{prompt}" for w in WRONG], silent=0.02)


def test_healthy_sharpening_raises_no_alarm():
    runs = [judge(healthy, 12, seed=seed) for seed in range(25)]
    assert [first_alarm(run) for run in runs] == [None] * 25
    assert np.mean([run[-1].score.value for run in runs]) > 0.1


def test_a_constant_answer_is_seen_as_one_shared_by_prompts():
    def policy(step, prompt):
        return {"7": 1.0} if step >= 5 else healthy(step, prompt)

    run = judge(policy, 7)
    assert alarms(run, "shared_answer") == [5, 6]
    assert first_alarm(run) == 5
    assert run[5].prompts == {f"p{p}" for p in range(8, 16)}


def test_a_wrong_mode_that_takes_over_is_seen_before_right_answers_are_gone():
    """Every prompt has a planted wrong answer that grows by a tenth per step; nothing else changes."""

    def policy(step, prompt):
        wrong = min(0.98, 0.2 + 0.1 * step)
        right = 0.9375 * (1 - wrong)
        return {f"right{prompt}": right, f"trap{prompt}": wrong, "x": 1 - wrong - right}

    for seed in range(5):
        run = judge(policy, 9, per_step=16, votes=16, seed=seed)
        first = first_alarm(run)
        assert first is not None
        assert policy(first, 0)["right0"] > 0.05
        assert alarms(run, "forgotten")
        assert alarms(run, "flips_first")
        assert not alarms(run, "shared_answer")


def test_a_length_collapse_is_seen_by_length_against_the_share():
    def shape(step):
        return {"tokens": 40 if step < 4 else 40 // (step - 2)}

    run = judge(healthy, 8, shape=shape)
    assert alarms(run, "shorter")[0] == 4
    assert first_alarm(run) == 4
    # Shorter because the share fell as well: that is not the picture of a collapse, and only warns
    less = judge(lambda s, p: mixed(f"r{p}", 0.6 if s < 4 else 0.3, [f"{w}{p}" for w in WRONG]), 5, shape=shape)
    assert not alarms(less, "shorter")


def test_training_on_shuffled_labels_is_seen_as_flips_not_as_a_shared_answer():
    """Every prompt moves to the answer of another prompt: all shares stay high, all answers stay different."""

    def policy(step, prompt):
        moved = min(0.9, max(0, step - 3) * 0.3)
        law = mixed(f"right{prompt}", (1 - moved) * 0.8, [f"{w}-{prompt}" for w in WRONG[:3]], silent=moved)
        law.pop("", None)
        return {**law, f"right{(prompt + 5) % 16}": moved} if moved else law

    for seed in range(5):
        run = judge(policy, 10, seed=seed)
        assert alarms(run, "flips_first")
        assert alarms(run, "forgotten")
        assert not alarms(run, "shared_answer")
        assert not any(r.name == "fewer_answers" and r.level > Level.OK for j in run for r in j.readings)
        assert first_alarm(run) in (4, 5, 6)


def test_rollouts_that_stop_answering_are_seen():
    run = judge(lambda s, p: mixed(f"r{p}", 0.6 if s < 4 else 0.2, ["a", "b"], silent=0.0 if s < 4 else 0.75), 6)
    assert alarms(run, "silent")[0] == 4


def test_a_confident_reward_jump_warns_but_does_not_alarm_alone():
    def policy(step, prompt):
        return mixed(f"r{prompt}", 0.5 if step < 4 else 0.97, [f"{w}{prompt}" for w in WRONG])

    run = judge(policy, 5)
    jump = {r.name: r for r in run[4].readings}["reward_jump"]
    assert jump.level is Level.WARN
    assert run[4].level is Level.WARN


def test_many_warnings_twice_in_a_row_are_an_alarm():
    def reading(name: str, value: float) -> Reading:
        return Reading(name=name, value=value, warn=0.5, alarm=None)

    sentinel = Sentinel()
    warned = [reading(name, 1.0) for name in ("surer", "longer", "reward_jump")]
    assert sentinel._combined(warned).level is Level.WARN
    assert sentinel._combined(warned).level is Level.ALARM
    assert sentinel._combined(warned[:2]).level is Level.WARN
    assert sentinel._combined(warned).level is Level.WARN


def test_a_resumed_sentinel_judges_as_before_and_a_rollback_forgets():
    def policy(step, prompt):
        return healthy(step, prompt) if step < 6 else {"7": 1.0}

    whole = judge(policy, 8)
    one = Sentinel()
    rng = np.random.default_rng(0)
    steps = [draw(policy, s, [(s * 8 + i) % 16 for i in range(8)], 8, rng) for s in range(8)]
    for s in range(4):
        one.judge(view(s, steps[s]))
    two = Sentinel()
    two.load_state(json.loads(json.dumps(one.state())))
    assert [two.judge(view(s, steps[s])) for s in range(4, 8)] == whole[4:]
    one.went_back(2)
    assert max(v.step for v in one._memory.last.values()) == 2
    assert {step for step, *_ in one._memory.rewards} == {0, 1, 2}


def test_ignored_signals_are_silent_and_options_are_checked():
    run = judge(lambda s, p: {"7": 1.0} if s > 2 else healthy(s, p), 5, sentinel=Sentinel(ignore=SIGNALS))
    assert [j.level for j in run] == [Level.OK] * 5
    for options, message in (
        ({"z": (4.0, 3.0)}, "warn"),
        ({"probes": -1}, "probes"),
        ({"ignore": ("flip",)}, "unknown signals"),
        ({"lr_factor": 0.0}, "lr_factor"),
        ({"limit": -1}, "limit"),
    ):
        with pytest.raises(ValueError, match=message):
            Sentinel(**options)
