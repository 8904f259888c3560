"""`ttrl solve`: the votes of a run's first step, decided by any reward that elects."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import FakeTokenizer, make_prompt

from ttrl.errors import ConfigError
from ttrl.rewards.majority import MajorityVote
from ttrl.rewards.region import RegionConsistency
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.scripted import Script, ScriptedEngine
from ttrl.solve import SolveCall, answers, solve
from ttrl.types import Message, Prompt, SamplingSpec

SPEC = SamplingSpec(max_new_tokens=50)


def pool(script: dict[str, dict[str, float]]) -> LocalPool:
    return LocalPool(ScriptedEngine(Script(script), FakeTokenizer()))


def test_the_rule_elects_or_abstains():
    script = {"clear": {r"\boxed{7}": 0.9, r"\boxed{8}": 0.1}, "mute": {"I give up": 1.0}}
    prompts = [make_prompt(name, name) for name in script]
    clear, mute = answers(prompts, pool(script), MajorityVote(), SPEC, votes=16, seed=0, name="majority_vote")
    assert (clear.id, clear.answer, clear.votes, clear.centre) == ("clear", "7", 16, None)
    assert clear.share > 0.5
    assert (mute.answer, mute.share) == (None, 0.0)
    assert mute.reason


def test_regions_give_the_click():
    prompt = Prompt(
        id="s", messages=(Message(role="user", content="s"),), token_ids=np.zeros(1, np.int32), meta={"image_size": [100, 100]}
    )  # fmt: skip
    script = {"s": {"[10,10,30,30]": 0.5, "[20,20,40,40]": 0.5}}
    [found] = answers([prompt], pool(script), RegionConsistency(), SPEC, votes=16, seed=1, name="region_consistency")
    assert (found.answer, found.centre) == ("[20,20,30,30]", (25.0, 25.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": "gold"}, "asks for labels"),
        ({"reward": "region_consistency"}, r"data\.keep"),
        ({"reward": "majority_vot"}, "Did you mean"),
        ({"options": {"extracter": "math"}}, "extracter"),
        ({"temperature": 0.0}, "above 0"),
        ({"prompts": "nowhere.jsonl"}, "no such file"),
        ({"keep": ("answer",)}, "answers stay"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(tmp_path, changes, words):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "a", "prompt": "1+1=", "answer": "2"}) + "\n")
    with pytest.raises(ConfigError, match=words):
        solve(SolveCall(**{"model": "bundled:tiny-adder", "prompts": str(file), "template": "raw", **changes}))
