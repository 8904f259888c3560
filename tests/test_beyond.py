"""Rewards beyond the founding papers: golden numbers, and each formula against a slow reference written from its definition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from helpers import boxed, context, make_group
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.config import Plug
from ttrl.errors import PluginError
from ttrl.lint import lint
from ttrl.registry import build
from ttrl.rewards.distribution import DistributionAware
from ttrl.rewards.novelty import Novelty, overlap
from ttrl.rewards.restrain import Restrain
from ttrl.rewards.selective import Selective
from ttrl.rewards.soft import SoftVote
from ttrl.rewards.trl import reward_func
from ttrl.rewards.weights import class_entropies
from ttrl.trainers.advantages import dr_grpo, grpo
from ttrl.trainers.grpo import GRPO
from ttrl.types import Group, Rollout

answer_lists = st.lists(st.sampled_from(["", "5", "7", "8", "9", "dog"]), min_size=2, max_size=12)


def with_tokens(answers: Sequence[object], tokens: Sequence[Sequence[int]]) -> Group:
    group = make_group(boxed(answers))
    rollouts = tuple(
        replace(r, token_ids=np.asarray(ids, np.int32), logprobs=np.zeros(len(ids), np.float32))
        for r, ids in zip(group.rollouts, tokens, strict=True)
    )
    return replace(group, rollouts=rollouts)


def random_entropies(size: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).uniform(0.05, 2.5, size).astype(np.float32).tolist()


# novelty bands


def test_novelty_bands() -> None:
    """Jaccard of the sets by hand; u of the elected side 1/6 1/6 4/9 1/3, of the other one 1 and 1/2."""
    tokens = [[1, 2], [1, 2], [1, 3], [1, 2, 3], [4, 5], [1, 2], [9]]
    scored = Novelty(ngram=1)(with_tokens([5, 5, 5, 5, 7, 8, ""], tokens), context())
    assert scored.rewards.tolist() == pytest.approx([0.5, 0.5, 1.0, 0.8, -0.5, -1.0, -1.0], abs=1e-6)
    assert (scored.label, scored.train.all()) == ("5", True)
    # the only dissenter has nobody on its side; a side of equals stands in the middle of its band
    alone = Novelty(ngram=1)(with_tokens([5, 5, 7], [[1, 2], [1, 2], [1, 2]]), context())
    assert alone.rewards.tolist() == [0.75, 0.75, -0.5]
    tied = Novelty()(with_tokens([5, 5, 7, 7], [[1], [2], [3], [4]]), context())
    assert (tied.label, tied.train.any(), tied.rewards.any()) == (None, False, False)


def test_overlap_counts_distinct_ngrams() -> None:
    group = with_tokens([1] * 4, [[1, 2, 3, 1, 2], [2, 3, 1], [7], []])
    # pairs 12 23 31 of the first, 23 31 of the second; what is shorter than a pair is one gram
    assert overlap(group.rollouts, 2).tolist() == [
        [1, 2 / 3, 0, 0], [2 / 3, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1],
    ]  # fmt: skip
    assert overlap(group.rollouts[3:] * 2, 2).tolist() == [[1, 1], [1, 1]]


def exact_bands(tokens: Sequence[Sequence[int]], sides: Sequence[int], ngram: int) -> list[Fraction]:
    """In fractions, from the definition; sides 1 elected, 0 other answers, -1 silent."""
    grams = [{tuple(t[i : i + min(ngram, len(t))]) for i in range(max(1, len(t) - ngram + 1))} for t in tokens]

    def jaccard(i: int, j: int) -> Fraction:
        return Fraction(len(grams[i] & grams[j]), len(grams[i] | grams[j]))

    novelty = {}
    for i, side in enumerate(sides):
        own = [jaccard(i, j) for j, other in enumerate(sides) if j != i and other == side]
        everybody = [jaccard(i, j) for j, other in enumerate(sides) if j != i and other >= 0]
        novelty[i] = 1 - (sum(own or everybody) / len(own or everybody) + max(everybody)) / 2 if side >= 0 else 0
    rewards = []
    for i, side in enumerate(sides):
        values = [novelty[j] for j, other in enumerate(sides) if other == side]
        spread = max(values) - min(values)
        place = Fraction(1) if len(values) == 1 else (novelty[i] - min(values)) / spread if spread else Fraction(1, 2)
        rewards.append(Fraction(-1) if side < 0 else place / 2 + (Fraction(1, 2) if side else Fraction(-1)))
    return rewards


@settings(max_examples=60)
@given(st.data())
def test_novelty_against_fractions(data: st.DataObject) -> None:
    answers = data.draw(st.lists(st.sampled_from(["", "5", "7", "8"]), min_size=1, max_size=7)) + ["5"] * 8
    tokens = [data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)) for _ in answers]
    ngram = data.draw(st.integers(1, 3))
    scored = Novelty(ngram=ngram)(with_tokens(answers, tokens), context())
    sides = [-1 if a == "" else int(a == "5") for a in answers]
    assert scored.rewards.tolist() == pytest.approx([float(r) for r in exact_bands(tokens, sides, ngram)], abs=1e-6)
    # the bands never meet, so novelty cannot overrule the vote
    assert all(r >= 0.5 if side == 1 else r <= -0.5 for r, side in zip(scored.rewards, sides, strict=True))


def test_a_shown_term_is_no_phantom() -> None:
    """Where all agree novelty still pays: the linter warns of what is hidden, not of what the reward shows."""

    class Hidden(Novelty):
        terms = None  # type: ignore[assignment]

    objective = build("objective", Plug(use="grpo"))
    assert lint(Novelty(ngram=1), objective, votes=16) == []
    assert {finding.code for finding in lint(Hidden(ngram=1), objective, votes=16)} == {"phantom"}


# RESTRAIN


def weighted_advantages(answers: Sequence[str], centre: float, width: float) -> list[float]:
    """The published sum over pseudo-labels, one GRPO per label, in float64."""
    size, labels = len(answers), sorted(set(answers) - {""})
    gauss = {a: np.exp(-((answers.count(a) / size - centre) ** 2) / (2 * width**2)) for a in labels}
    total = np.zeros(size)
    for label in labels:
        total += gauss[label] / sum(gauss.values()) * grpo(np.asarray([float(a == label) for a in answers]))
    return total.tolist()


def test_restrain_golden() -> None:
    scored = Restrain()(make_group(boxed([5, 5, 5, 7])), context())
    assert scored.rewards.tolist() == pytest.approx([0.231059, 0.231059, 0.231059, -0.693176], abs=1e-5)
    assert (scored.label, scored.token_rewards) == ("5", None)
    assert scored.rewards.tolist() == pytest.approx(weighted_advantages(["5", "5", "5", "7"], 1.0, 0.5), abs=1e-5)


@settings(max_examples=100)
@given(answer_lists, st.floats(0.1, 2.0), st.floats(0.0, 1.0))
def test_restrain_is_the_weighted_sum_of_advantages(answers: list[str], width: float, centre: float) -> None:
    scored = Restrain(width=width, centre=centre, least=1)(make_group(boxed(answers)), context())
    assert scored.rewards.tolist() == pytest.approx(weighted_advantages(answers, centre, width), abs=1e-5)
    assert dr_grpo(scored.rewards) == pytest.approx(scored.rewards, abs=1e-5)  # dr_grpo leaves them as they are


def test_a_narrow_gaussian_is_the_majority_vote() -> None:
    answers = ["5"] * 5 + ["7"] * 2 + ["8"]
    vote = grpo(np.asarray([float(a == "5") for a in answers]))
    for width in (0.05, 1e-3, 1e-9):
        assert Restrain(width=width)(make_group(boxed(answers)), context()).rewards == pytest.approx(vote, abs=1e-6)
    wide = Restrain(width=1e6)(make_group(boxed(answers)), context())  # every answer counts alike: the rarest pays best
    assert wide.rewards[-1] > wide.rewards[0]


def test_restrain_pushes_a_group_without_agreement_down() -> None:
    group = make_group(boxed([5, 5, 7, 8, ""]), trainable=[True, True, False, True, True])
    scored = Restrain(least=3, penalty=0.5)(group, context())
    assert scored.label is None and not scored.rewards.any() and scored.train.tolist() == group.trainable.tolist()
    samples = GRPO(advantage="dr_grpo").samples(scored)
    assert len(samples) == 4
    assert all((sample.advantages == -0.5).all() for sample in samples)
    assert scored.metrics["held_back"] == 1.0
    silent = Restrain()(make_group(boxed(["", ""])), context())
    assert not silent.train.any() and silent.token_rewards is None
    with pytest.raises(PluginError, match="single tokens"):
        reward_func(Restrain(), eos_token_id=None)(
            prompts=["q"] * 3, completions=boxed([5, 7, 8]), completion_ids=[[1]] * 3
        )


def test_restrain_weighs_a_prompt_by_its_first_visit() -> None:
    reward = Restrain(prompt_weights=True)
    first = np.exp(-((0.75 - 1) ** 2) / 0.5)
    plain = Restrain()(make_group(boxed([5, 5, 5, 7])), context()).rewards
    assert reward(make_group(boxed([5, 5, 5, 7])), context()).rewards == pytest.approx(first * plain, abs=1e-6)
    other = Restrain(prompt_weights=True)
    other.load_state(reward.state())
    later = other(make_group(boxed([5, 7, 8, 9])), context())
    assert later.token_rewards is not None
    assert later.token_rewards[0] == pytest.approx(-first, abs=1e-6)
    assert reward.state() == other.state() == {"weights": {"p": pytest.approx(first)}}
    assert Restrain().state() == {"weights": {}}


# DARE


def test_distribution_aware_golden() -> None:
    group = make_group(boxed([5, 5, 5, 7, 8, ""]), entropies=[0.25, 0.75, 0.5, 0.25, 2.0, 1.0])
    scored = DistributionAware(explore=0.1, prune=0.1)(group, context())
    assert scored.rewards.tolist() == pytest.approx([0.6125, 0.6125, 0.6125, 0.45625, 0, 0], abs=1e-6)
    whole = DistributionAware(explore=0.0, prune=0.0)(group, context())
    assert whole.rewards.tolist() == pytest.approx([6 / 10.5] * 3 + [4 / 10.5, 0.5 / 10.5, 0], abs=1e-6)
    assert (scored.label, scored.metrics["pruned"]) == ("5", pytest.approx(1 / 6))


@settings(max_examples=100)
@given(answer_lists, st.integers(0, 9), st.floats(0, 1), st.floats(0, 0.3))
def test_distribution_aware_against_its_definition(answers: list[str], seed: int, explore: float, prune: float) -> None:
    unsure = random_entropies(len(answers), seed)
    scored = DistributionAware(explore=explore, prune=prune)(make_group(boxed(answers), entropies=unsure), context())
    n = Counter(a for a in answers if a)
    u = {a: float(np.mean([h for b, h in zip(answers, unsure, strict=True) if a == b])) for a in n}
    q = {a: n[a] / (u[a] + 1e-8) for a in n}
    q = {a: value / sum(q.values()) for a, value in q.items()}
    kept = [a for a in q if q[a] >= prune]
    votes = sum(n[a] for a in kept)
    pay = {a: q[a] / sum(q[b] for b in kept) + explore * (1 - n[a] / votes) * (1 - u[a]) for a in kept}
    expected = np.asarray([pay.get(a, 0.0) if a else np.nan for a in answers])
    expected[np.isnan(expected)] = min([0.0, *expected[~np.isnan(expected)].tolist()])
    assert scored.rewards.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert scored.train.any() == (max(n.values(), default=0) >= 2)


def test_equal_entropies_make_it_a_soft_vote() -> None:
    group = make_group(boxed([5, 5, 7, ""]), entropies=[0.7] * 4)
    scored = DistributionAware(explore=0.0, prune=0.0)(group, context())
    assert scored.rewards == pytest.approx(SoftVote()(group, context()).rewards, abs=1e-6)


# SCRL


def test_selective_shaped_by_share_and_entropy() -> None:
    """H is 10 / 8; .5 + .025 for the elected, .025 for the bystanders, -(.15 - .125) - .1 * 1.75 for the negative one."""
    answers, unsure = [5, 5, 5, 5, 7, 7, 8, 9], [1.0] * 7 + [3.0]
    scored = Selective(shaping="entropy", rare_share=0.15)(make_group(boxed(answers), entropies=unsure), context())
    assert scored.rewards.tolist() == pytest.approx([0.525] * 4 + [0.025] * 3 + [-0.2], abs=1e-6)
    assert scored.label == "5"
    # neither kind of label: entropies alone teach nothing here
    weak = Selective(shaping="entropy", min_share=0.6)(make_group(boxed(answers), entropies=unsure), context())
    assert weak.label is None and not weak.train.any()


def test_the_published_bounds_of_selective_are_strict() -> None:
    votes = [5] * 3 + [7] * 2 + [8, 9, 9]  # share 3/8 is enough, a lead of 1/8 is not
    assert Selective()(make_group(boxed(votes), entropies=[1] * 8), context()).label is None
    assert Selective(min_margin=0.12)(make_group(boxed(votes), entropies=[1] * 8), context()).label == "5"
    rare = make_group(boxed([5] * 7 + [7]), entropies=[1] * 7 + [2])  # 1/8 is not below 1/8
    assert Selective()(rare, context()).rewards.tolist() == [1] * 7 + [0]
    assert Selective(rare_share=0.126)(rare, context()).rewards.tolist() == [1] * 7 + [-1]


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["", "5", "7", "8", "9"]), min_size=4, max_size=20), st.integers(0, 9))
def test_selective_against_its_definition(answers: list[str], seed: int) -> None:
    unsure = random_entropies(len(answers), seed)
    scored = Selective(shaping="entropy")(make_group(boxed(answers), entropies=unsure), context())
    n = Counter(a for a in answers if a)
    valid, ordered = sum(n.values()), [count for _, count in n.most_common()] + [0, 0]
    everyone = np.mean([h for a, h in zip(answers, unsure, strict=True) if a]) if valid else 0.0
    label = None
    if (
        valid
        and ordered[0] > max(1, ordered[1])
        and ordered[0] / valid >= 0.375
        and (ordered[0] - ordered[1]) / valid > 0.125
    ):
        label = n.most_common(1)[0][0]
    pay, negative = {}, 0
    for a, count in n.items():
        h = float(np.mean([x for b, x in zip(answers, unsure, strict=True) if a == b]))
        pay[a] = -0.1 * (h - everyone)
        if a == label:
            pay[a] += count / valid
        elif ordered[0] > 1 and count / valid < 0.125 and h > everyone:
            pay[a] -= 0.125 - count / valid
            negative += count
    assert scored.label == label
    assert scored.train.any() == (label is not None or negative > 0)
    lowest = min([0.0, *pay.values()])
    assert scored.rewards.tolist() == pytest.approx([pay.get(a, lowest) for a in answers], abs=1e-5)


# what they share


def test_class_entropies() -> None:
    rollouts: tuple[Rollout, ...] = make_group(["a"] * 4, entropies=[1.0, 2.0, 6.0, 100.0]).rollouts
    assert class_entropies(rollouts, [1, 1, 0, -1]) == ({0: 6.0, 1: 1.5}, 3.0)
    assert class_entropies(rollouts, [-1] * 4) == ({}, 0.0)
    with pytest.raises(ValueError, match="entropies were not recorded"):
        class_entropies(make_group(["a"]).rollouts, [0])


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("novelty", {"ngram": 0}, "ngram counts tokens"),
        ("restrain", {"width": 0.0}, "a width above 0"),
        ("restrain", {"centre": 1.5}, "a centre in"),
        ("restrain", {"least": 0}, "least >= 1"),
        ("distribution", {"prune": 1.0}, "prune in"),
        ("distribution", {"explore": -0.1}, "explore in"),
        ("selective", {"shaping": "smooth"}, "shaping"),
        ("length_penalty", {"of": "views"}, "one group at a time"),
    ],
)
def test_wrong_options_are_named(use: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("reward", Plug.model_validate({"use": use, "with": options}))


@pytest.mark.parametrize("use", ["novelty", "restrain", "distribution"])
def test_equal_answers_are_paid_alike_where_only_answers_count(use: str) -> None:
    """All but novelty pay by answer: two rollouts of one class never differ."""
    group = with_tokens([5, 5, 5, 7, 7, 8], [[1, 2, 3], [1, 2, 4], [5, 6], [2], [9, 9, 9], [4]])
    rollouts = [replace(r, entropy=np.full(len(r.token_ids), 0.3 * (r.index + 1), np.float32)) for r in group.rollouts]
    scored = build("reward", Plug(use=use))(replace(group, rollouts=tuple(rollouts)), context())
    pairs = [(i, j) for i, j in combinations(range(6), 2) if scored.classes[i] == scored.classes[j]]
    alike = [bool(scored.rewards[i] == scored.rewards[j]) for i, j in pairs]
    assert all(alike) if use != "novelty" else not all(alike)
