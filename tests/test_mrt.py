"""MRT: progress and its advantage, the plan of the probes, how they are judged, what is kept for STaR. No torch, no model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import FakeTokenizer, boxed, context, make_group, make_prompt, make_rollout

from ttrl.config.schema import Plug
from ttrl.contract import check_samples
from ttrl.errors import ConfigError, PluginError
from ttrl.loop import probe
from ttrl.probing import ProbeTools, equip
from ttrl.registry import build
from ttrl.rewards.controls import Random
from ttrl.rewards.majority import MajorityVote
from ttrl.rewards.probes import judged
from ttrl.seeds import generator
from ttrl.stepmetrics import rollout_metrics
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.mrt import MRT
from ttrl.trainers.progress import beyond_termination, on_tokens, progress
from ttrl.trainers.star import best_stop, select
from ttrl.types import Finish, Group, Request, Rollout, SamplingSpec, Scored

TOKENIZER = FakeTokenizer()
SPEC = SamplingSpec(max_new_tokens=20, entropy=True, temperature=0.7)


def encoded(text: str) -> np.ndarray:
    return np.asarray(TOKENIZER.encode(text, add_special_tokens=False), np.int32)


def rollout(text: str, index: int, end: bool = True) -> Rollout:
    tokens = np.concatenate([encoded(text), np.asarray([1] * end, np.int32)])
    return replace(make_rollout(text, index), token_ids=tokens, logprobs=np.full(len(tokens), -0.5, np.float32))


def columns(texts: list[str], trainable: list[bool] | None = None) -> Group:
    rollouts = tuple(rollout(text, i) for i, text in enumerate(texts))
    mask = np.asarray([True] * len(texts) if trainable is None else trainable)
    return Group(prompt=make_prompt(), rollouts=rollouts, trainable=mask)


def mrt(**options: Any) -> MRT:
    chosen = {"form": "episodes", "splitter": "delimiter", "splitter_options": {"delimiter": ","}, "termination": "=>",
              "probes": 2, "probe_tokens": 3, **options}  # fmt: skip
    made = build("objective", Plug.model_validate({"use": "mrt", "with": chosen}))
    assert isinstance(made, MRT)
    assert equip(made, TOKENIZER, SPEC, 0) == (5 if options.get("alpha", 1) else 0)
    return made


def scored(group: Group, rewards: list[float], probe_rewards: list[float] | None = None, **fields: Any) -> Scored:
    values: dict[str, Any] = {
        "train": group.trainable, "classes": np.zeros(len(rewards), np.int32), "answers": ("x",) * len(rewards), "label": "x",
        "share": 1.0, "margin": 1.0, **fields,
    }  # fmt: skip
    return Scored(
        group=group, rewards=np.asarray(rewards, np.float32),
        probe_rewards=None if probe_rewards is None else np.asarray(probe_rewards, np.float32), **values,
    )  # fmt: skip


# ---- formulas


def test_progress_is_the_difference_of_chances_and_telescopes() -> None:
    found = progress([0.10, 0.25, 0.40, 0.35, 0.75])
    np.testing.assert_allclose(found, [0.15, 0.15, -0.05, 0.40], atol=1e-12)
    assert found.sum() == pytest.approx(0.65)
    for bad in ([0.5], [0.5, np.nan], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="at least two finite chances"):
            progress(bad)


def test_the_terminated_answers_are_the_baseline_of_those_that_went_on() -> None:
    np.testing.assert_allclose(beyond_termination([1, 1, 0, 1], [0, 1, 0, 0]), [0.75, 0.75, -0.25, 0.75])
    with pytest.raises(ValueError, match="at least one terminated answer"):
        beyond_termination([1], [])


def test_a_bonus_stands_on_the_tokens_of_its_episode() -> None:
    assert on_tokens([0.5, -1.0], [1, 3], 4).tolist() == [0, 0.5, 0.5, -1]
    assert on_tokens([2.0], [0], 3).tolist() == [2, 2, 2]
    for cuts in ([3, 1], [1, 5], [1]):
        with pytest.raises(ValueError, match="2 bonuses for the cuts"):
            on_tokens([0.5, 1.0], cuts, 4)


# ---- probes


def test_rollouts_with_one_prefix_share_its_probes_and_untrained_ones_have_none() -> None:
    group = columns(["a,b,X", "a,c,Y", "a,b,Z", "q,r,s"], [True, True, True, False])
    requests = mrt().probes(group)
    texts = [TOKENIZER.decode(r.prefix) for r in requests]
    assert texts == [t for prefix in ("", "a,", "a,b,", "a,c,") for t in [prefix + "=>"] * 2]
    assert [r.index for r in requests] == list(range(8))
    assert len({r.seed for r in requests}) == 8
    assert {r.spec for r in requests} == {SamplingSpec(max_new_tokens=3, temperature=0.7)}


def test_seeds_belong_to_the_prefix_the_version_and_the_prompt_and_to_nothing_else() -> None:
    def seeds(group: Group) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for r in mrt().probes(group):
            found[TOKENIZER.decode(r.prefix)] = (*found.get(TOKENIZER.decode(r.prefix), ()), r.seed)
        return found

    texts = ["a,b,X", "a,c,Y"]
    first, other = seeds(columns(texts)), seeds(columns([texts[1], texts[0], "z,z"]))
    assert first.items() <= other.items()
    newer = columns(texts)
    stamp = replace(newer.rollouts[0].weights, version=1)
    newer = replace(newer, rollouts=tuple(replace(r, weights=stamp) for r in newer.rollouts))
    assert not set(itertools.chain(*first.values())) & set(itertools.chain(*seeds(newer).values()))
    elsewhere = replace(columns(texts), prompt=make_prompt("other"))
    assert not set(itertools.chain(*first.values())) & set(itertools.chain(*seeds(elsewhere).values()))


def test_the_scalar_form_stops_each_rollout_at_one_cut_and_every_cut_is_drawn() -> None:
    group = columns([f"{i},{i},{i},x" for i in range(9)] * 20)
    group = replace(group, rollouts=tuple(replace(r, index=i) for i, r in enumerate(group.rollouts)))
    made = mrt(form="scalar")
    drawn = [cuts[0] for cuts in made._cuts(group.rollouts)]
    assert drawn == [cuts[0] for cuts in made._cuts(group.rollouts)]
    counts = [drawn.count(cut) for cut in (0, 2, 4, 6)]
    assert sum(counts) == 180 and min(counts) > 25  # 45 expected, standard deviation 5.8
    small = group.rollouts[:12]
    prefixes = {r.token_ids[:cut].tobytes() for r, (cut,) in zip(small, made._cuts(small), strict=True)}
    assert 1 < len(prefixes) <= 12
    assert len(made.probes(replace(group, rollouts=small, trainable=np.ones(12, np.bool_)))) == 2 * len(prefixes)


# ---- advantages


def test_episode_advantages_by_hand() -> None:
    """J: "" 0, "a," .5, "a,b," 1, "a,c," 0. Rollouts 0 and 2 end right: progress .5, .5, 0; rollout 1 ends wrong: .5, -.5, 0."""
    group = columns(["a,b,X", "a,c,Y", "a,b,Z"])
    item = scored(group, [1, 0, 1], [0, 0, 1, 0, 1, 1, 0, 0])
    samples = mrt().samples(item)
    check_samples(samples)
    high, low = 1 / 3 / (np.sqrt(1 / 3) + 1e-6), -2 / 3 / (np.sqrt(1 / 3) + 1e-6)
    right = np.asarray([0.5, 0.5, 0.5, 0.5, 0, 0])
    np.testing.assert_allclose(samples[0].advantages, high + right, rtol=1e-6)
    np.testing.assert_allclose(samples[2].advantages, high + right, rtol=1e-6)
    np.testing.assert_allclose(samples[1].advantages, low + np.asarray([0.5, 0.5, -0.5, -0.5, 0, 0]), rtol=1e-6)
    bare = mrt(outcome=0.0, alpha=2.0).samples(item)
    np.testing.assert_allclose(bare[1].advantages, [1, 1, -1, -1, 0, 0])
    clipped = mrt(outcome=0.0, progress_clip=0.25).samples(item)
    np.testing.assert_allclose(clipped[1].advantages, [0.25, 0.25, -0.25, -0.25, 0, 0])


def test_the_scalar_form_pays_r_less_r_termination_after_the_cut_only() -> None:
    """Golden: terminated 0 1 0 0, continuing 1 1 0 1 -> .75 .75 -.25 .75."""
    group = columns(["a", "b", "c", "d"])  # no delimiter: the only cut is the empty prefix, shared by all
    item = scored(group, [1, 1, 0, 1], [0, 1, 0, 0])
    made = mrt(form="scalar", outcome=0.0, probes=4)
    assert [float(s.advantages[0]) for s in made.samples(item)] == [0.75, 0.75, -0.25, 0.75]
    group = columns(["a,b,X"])
    made = mrt(form="scalar", outcome=0.0)
    cut = made._cuts(group.rollouts)[0][0]
    advantages = made.samples(scored(group, [1.0], [1, 0]))[0].advantages
    assert advantages.tolist() == [0.0] * cut + [0.5] * (6 - cut)


def test_advantages_equal_a_slow_twin_on_random_groups() -> None:
    for seed in range(20):
        rng = generator(seed, "mrt")
        texts = [",".join(rng.choice(list("ab"), size=rng.integers(1, 5))) for _ in range(5)]
        trainable = (rng.random(5) < 0.7).tolist()
        group = columns(texts, trainable)
        made = mrt(alpha=0.7, outcome=0.3, probes=3)
        requests = made.probes(group)
        answers = {i: float(rng.random() < 0.5) for i in range(len(requests))}
        rewards = (rng.random(5) < 0.5).astype(float).tolist()
        samples = made.samples(scored(group, rewards, [answers[i] for i in range(len(requests))]))
        chance: dict[str, list[float]] = {}
        for request in requests:
            chance.setdefault(TOKENIZER.decode(request.prefix)[:-2], []).append(answers[request.index])
        base = GRPO().samples(scored(group, rewards))
        assert len(samples) == len(base) == sum(trainable)
        kept = [i for i in range(5) if trainable[i]]
        for i, sample, plain in zip(kept, samples, base, strict=True):
            text, before, expected = texts[i], 0.0, []
            before = float(np.mean(chance[""]))
            for number, piece in enumerate(pieces := text.split(",")):
                last = number == len(pieces) - 1
                so_far = ",".join(pieces[: number + 1]) + ","
                after = rewards[i] if last else float(np.mean(chance[so_far]))
                expected += [0.7 * (after - before)] * (len(piece) + 1)  # the delimiter, or the end
                before = after
            np.testing.assert_allclose(sample.advantages, 0.3 * plain.advantages + expected, atol=1e-6)


def test_alpha_0_is_grpo_bit_for_bit_and_asks_for_nothing() -> None:
    group = columns(["a,b,X", "a,c,Y", "a,b,Z"], [True, True, False])
    made = mrt(alpha=0.0)
    assert made.probes(group) == []
    for ours, theirs in zip(
        made.samples(scored(group, [1, 0, 1])), GRPO().samples(scored(group, [1, 0, 1])), strict=True
    ):
        for name in ("prompt_ids", "completion_ids", "sampler_logprobs", "advantages", "weights"):
            assert getattr(ours, name).tobytes() == getattr(theirs, name).tobytes()
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert made.base._loss.__class__ is GRPO()._loss.__class__


def test_without_a_label_there_is_no_progress_and_without_judged_probes_there_is_no_training() -> None:
    group = columns(["a,b,X", "a,c,Y"])
    made = mrt()
    nobody = scored(group, [1, 0], None, label=None)
    for ours, theirs in zip(made.samples(nobody), GRPO().samples(nobody), strict=True):
        assert ours.advantages.tolist() == theirs.advantages.tolist()
    with pytest.raises(PluginError, match="asked for 8 probes, but 0 were judged"):
        made.samples(scored(group, [1, 0]))
    with pytest.raises(PluginError, match="asked for 8 probes, but 3 were judged"):
        made.samples(scored(group, [1, 0], [1, 0, 1]))
    nothing = scored(group, [1, 0], train=np.zeros(2, np.bool_))
    assert made.samples(nothing) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "weights >= 0, not both 0; got -1.0 and 1.0"),
        ({"alpha": 0.0, "outcome": 0.0}, "not both 0"),
        ({"progress_clip": 0.0}, "progress_clip must be above 0 and at most 1"),
        ({"probes": 0}, "probes must be at least 1, got 0"),
        ({"splitter": "tokens"}, "splitter 'tokens': missing a required argument: 'n'"),
        ({"splitter": "words"}, "splitter.*'words'"),
        ({"clip": [0.2, 0.3], "loss": "tis"}, "belong to the clip loss"),
    ],
)
def test_mistakes_in_the_recipe_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("objective", Plug.model_validate({"use": "mrt", "with": options}))


# ---- how probes reach the reward


def with_probes(group: Group, texts: list[str], finishes: list[Finish] | None = None) -> Group:
    finishes = finishes or [Finish.STOP] * len(texts)
    return replace(
        group, probes=tuple(make_rollout(t, i, finish=f) for i, (t, f) in enumerate(zip(texts, finishes, strict=True)))
    )


def test_probes_are_judged_by_the_equality_of_the_votes_and_never_vote() -> None:
    plain = make_group(boxed([r"\frac{1}{2}", "0.5", 7]))
    group = with_probes(
        plain, [*boxed(["1/2", 7, ""]), r"\boxed{0.5", *boxed(["0.5"])], [Finish.STOP] * 3 + [Finish.LENGTH] * 2
    )
    reward = MajorityVote()
    before = reward(group, context())
    assert (before.label, before.share) == (reward(plain, context()).label, 2 / 3)
    after = judged(before, reward.reader)
    assert after.probe_rewards is not None
    assert after.probe_rewards.tolist() == [1, 0, 0, 0, 0]  # what was cut off is no answer, although it reads like one
    assert (after.metrics["probe_answered"], after.metrics["probe_mean"]) == (0.4, 0.2)
    roots = reward(with_probes(make_group(boxed([r"\sqrt{8}"] * 2)), boxed([r"2\sqrt{2}", 8])), context())
    assert judged(roots, reward.reader).probe_rewards.tolist() == [1, 0]
    lenient = MajorityVote(truncated_votes=True)
    assert judged(lenient(group, context()), lenient.reader).probe_rewards.tolist() == [1, 0, 0, 0, 1]


def test_nothing_is_judged_without_probes_or_without_a_label() -> None:
    reward = MajorityVote()
    plain = reward(make_group(boxed([5, 5, 7])), context())
    assert judged(plain, reward.reader) is plain
    tie = judged(reward(with_probes(make_group(boxed([5, 7])), boxed([5, 5])), context()), reward.reader)
    assert tie.label is None and tie.probe_rewards is None and tie.metrics["probe_answered"] == 1.0
    aimless = Random()
    assert (
        judged(aimless(with_probes(make_group(boxed([5, 5])), boxed([5])), context()), aimless.reader).probe_rewards
        is None
    )


class CountingPool:
    """Answers each request with its own number of calls so far."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def generate(self, requests: list[Request]) -> list[Rollout]:
        self.calls.append(len(requests))
        return [make_rollout(TOKENIZER.decode(r.prefix), r.index, prompt_id=r.prompt.id, tokens=2) for r in requests]


def test_all_probes_of_a_step_are_one_call_and_come_back_to_their_group() -> None:
    pool = CountingPool()
    groups = [columns(["a,b", "a,c"]), columns(["x", "y"], [False, False]), columns(["q"])]
    groups = [replace(g, prompt=make_prompt(f"p{i}")) for i, g in enumerate(groups)]
    parts: Any = SimpleNamespace(objective=mrt(), pool=pool)
    probed = probe(parts, groups)
    assert pool.calls == [6]
    assert [[p.text for p in g.probes] for g in probed] == [["=>", "=>", "a,=>", "a,=>"], [], ["=>", "=>"]]
    assert [g.prompt.id for g in probed] == ["p0", "p1", "p2"]
    values = rollout_metrics(probed).values()
    assert (values["rollout/probes"], values["rollout/probe_tokens"]) == (6, 12)
    assert values["rollout/tokens"] == rollout_metrics(groups).values()["rollout/tokens"]
    parts.objective = GRPO()
    assert probe(parts, groups) is groups and pool.calls == [6]
    assert "rollout/probes" not in rollout_metrics(groups).values()


# ---- STaR


def test_the_kept_trace_ends_where_the_chance_was_first_highest() -> None:
    assert best_stop([0.1, 0.5, 0.75, 0.75]) == 2
    assert best_stop([0.5, 0.5]) == 0


def test_selection_by_hand() -> None:
    """J: "" 0, "a," .5, "a,b," 1, "a,c," 0. Rollout 0 is kept to "a,b," with the second probe there; rollout 1, which ends wrong,
    to "a,"; rollout 2 goes on from "a,b," and ends right, which is no further progress: the demonstration of rollout 0 again."""
    group = columns(["a,b,X", "a,c,Y", "a,b,Z"])
    made = mrt()
    probes = [rollout(f"{i}", i) for i in range(8)]
    item = scored(replace(group, probes=tuple(probes)), [1, 0, 1], [0, 0, 0, 1, 1, 1, 0, 0])
    kept = select(item, made.probed(item), made.prober.termination, most=4)
    assert [TOKENIZER.decode(d.completion_ids) for d in kept] == ["a,b,=>4</s>", "a,=>3</s>"]
    assert [(d.gain, d.cut) for d in kept] == [(1.0, 4), (0.5, 2)]
    assert [d.gain for d in select(item, made.probed(item), made.prober.termination, most=1)] == [1.0]
    assert len(select(item, made.probed(item), made.prober.termination, most=4, min_gain=0.5)) == 1


def test_a_whole_rollout_is_kept_when_only_its_end_was_right_and_none_without_progress() -> None:
    group = columns(["a,b,X", "c,d"])
    item = scored(group, [1, 0], [0, 0] * 4)
    made = mrt()
    kept = select(item, made.probed(item), made.prober.termination, most=4)
    assert [TOKENIZER.decode(d.completion_ids) for d in kept] == ["a,b,X</s>"]
    assert kept[0].prompt_ids is group.prompt.token_ids
    known = scored(group, [1, 1], [1, 1] * 4)
    assert (
        select(known, made.probed(known), made.prober.termination, most=4) == []
    )  # right before any thought: no progress


def test_tools_are_what_the_run_hands_over() -> None:
    made = MRT(splitter="tokens", splitter_options={"n": 2})
    tools = ProbeTools(tokenizer=TOKENIZER, spec=SPEC, seed=3)
    assert made.take_tools(tools) == len(made.prober.termination) + 32
    assert equip(GRPO(), TOKENIZER, SPEC, 3) == 0
