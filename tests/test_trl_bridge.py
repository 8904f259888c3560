"""TRL in both directions, at the calling convention and inside TRL's real GRPOTrainer."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EOS_ID, boxed, context, make_group

from ttrl.config import load_recipe
from ttrl.config.schema import Plug
from ttrl.contract import check_scored
from ttrl.errors import ConfigError, PluginError
from ttrl.kit import examine
from ttrl.registry import build
from ttrl.rewards.majority import MajorityVote
from ttrl.rewards.trl import TRLReward, groups_of, reward_func
from ttrl.setup import check_recipe
from ttrl.types import Finish


def ids(count: int, *, complete: bool = True) -> list[list[int]]:
    return [[5, 6, EOS_ID if complete else 7] for _ in range(count)]


def call(function: Any, prompts: list[Any], completions: list[Any], **extra: Any) -> list[float | None]:
    return function(
        prompts=prompts,
        completions=completions,
        **{"completion_ids": ids(len(prompts)), "trainer_state": None, **extra},
    )


def test_every_group_is_scored_as_a_whole_and_abstentions_are_none() -> None:
    function = reward_func(MajorityVote(), eos_token_id=EOS_ID, num_generations=4)
    paid = call(function, ["p"] * 4 + ["q"] * 4, boxed([5, 5, 5, 7, 1, 1, 2, 2]), solution=["5"] * 8)
    assert paid == [1.0, 1.0, 1.0, 0.0, None, None, None, None]  # the second group ties
    assert all(type(value) in (float, type(None)) for value in paid)


def test_conversational_prompts_and_completions() -> None:
    function = reward_func(MajorityVote(), eos_token_id=None)
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "1+4?"}]}]
    parts = [{"type": "image"}, {"type": "text", "text": "so \\boxed{5}"}]
    completions = [[{"role": "assistant", "content": text}] for text in boxed([5, 5, 7])]
    completions += [[{"role": "assistant", "content": parts}], [{"role": "assistant", "content": None}]]
    assert call(function, [prompt] * 5, completions) == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_completions_that_were_cut_off_do_not_vote() -> None:
    texts, cut = boxed([5, 7, 7, 7, 5]), [ids(1)[0], *ids(3, complete=False), ids(1)[0]]
    assert call(reward_func(MajorityVote(), eos_token_id=EOS_ID), ["p"] * 5, texts, completion_ids=cut) == [
        1,
        0,
        0,
        0,
        1,
    ]
    several = reward_func(MajorityVote(), eos_token_id=[99, 7])
    assert call(several, ["p"] * 5, texts, completion_ids=cut) == [0, 1, 1, 1, 0]
    assert call(reward_func(MajorityVote(), eos_token_id=None), ["p"] * 5, texts, completion_ids=cut) == [0, 1, 1, 1, 0]


def test_groups_follow_the_prompts_or_the_number_of_generations() -> None:
    prompts = ["p", "p", "q", "p", "p", "p"]
    assert list(groups_of(prompts, None)) == [(0, 2), (2, 3), (3, 6)]
    assert list(groups_of(["p"] * 4, 2)) == [(0, 2), (2, 4)]  # one prompt, twice in the data set
    for broken in (["p"] * 3, ["p", "q"]):
        with pytest.raises(ValueError, match="are not whole groups of 2"):
            list(groups_of(broken, 2))


def test_random_ties_follow_step_and_prompt_and_metrics_are_logged() -> None:
    class State:
        global_step = 0

    logged: dict[str, float] = {}
    function = reward_func(MajorityVote(ties="random"), eos_token_id=None)
    seen = set()
    for State.global_step in range(20):
        twice = [
            call(
                function,
                ["p"] * 2 + ["p2"] * 2,
                boxed([5, 5, 7, 7]),
                trainer_state=State,
                log_metric=logged.__setitem__,
            )
            for _ in range(2)
        ]
        assert twice[0] == twice[1]
        tied = call(function, ["p"] * 4, boxed([5, 5, 7, 7]), trainer_state=State)
        seen.add(tuple(tied))
    assert seen == {(1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0)}
    assert logged == {"MajorityVote/share": 1.0, "MajorityVote/labelled": 1.0}


def test_the_callable_is_picklable_and_named_and_refuses_what_trl_cannot_give() -> None:
    function = reward_func(MajorityVote(), eos_token_id=EOS_ID)
    assert function.__name__ == "MajorityVote"
    assert call(pickle.loads(pickle.dumps(function)), ["p"] * 2, boxed([5, 5])) == [1.0, 1.0]

    class Curious(MajorityVote):
        def __init__(self) -> None:
            super().__init__()
            self.needs = frozenset({"entropy"})

    with pytest.raises(ValueError, match="needs entropy, which TRL does not hand"):
        reward_func(Curious(), eos_token_id=None)


def trainer(tmp_path: Path, reward_funcs: Any, prompts: list[Any], **settings: Any) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    from ttrl.model.load import resolve_path

    folder = str(resolve_path("bundled:tiny-adder"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = datasets.Dataset.from_dict({"prompt": prompts, "note": ["n"] * len(prompts)})
    return trl.GRPOTrainer(
        model=folder,
        reward_funcs=reward_funcs(tokenizer),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
            per_device_train_batch_size=8, num_generations=4, max_completion_length=40, max_steps=2, logging_steps=1, seed=0,
            disable_tqdm=True, **settings,
        ),
        train_dataset=data,
        eval_dataset=data if settings else None,
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("conversational", [False, True])
def test_trls_own_trainer_learns_from_our_reward(tmp_path: Path, conversational: bool) -> None:
    seen: list[tuple[list[Any], list[float | None]]] = []

    def spy(tokenizer: Any) -> Any:
        ours = reward_func(MajorityVote(), eos_token_id=tokenizer.eos_token_id)

        def majority(**columns: Any) -> list[float | None]:
            paid = ours(**columns)
            seen.append((columns["completions"], paid))
            return paid

        return majority

    sums = [f"{a}+{b}=" for a, b in ((123, 456), (21, 345), (700, 111), (250, 250))]
    prompts = [[{"role": "user", "content": s}] for s in sums] if conversational else sums
    made = trainer(
        tmp_path, spy, prompts, eval_strategy="no", num_generations_eval=2, per_device_eval_batch_size=4,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    assert len(seen) == 2 and all(len(paid) == 8 for _, paid in seen)
    flat = [value for _, paid in seen for value in paid]
    assert 0.0 in flat and 1.0 in flat  # real votes: some agreed with the label, some did not
    assert isinstance(seen[0][0][0], list) is conversational
    assert any((p != before[name]).any() for name, p in made.model.named_parameters())
    logs = [row for row in made.state.log_history if "rewards/majority/mean" in row]
    for row, (_, paid) in zip(logs, seen, strict=True):
        rewards = [value for value in paid if value is not None]
        if rewards:
            assert row["rewards/majority/mean"] == pytest.approx(float(np.mean(rewards)), abs=1e-6)
        else:
            assert float(row["grad_norm"]) == 0  # all groups abstained: TRL learns nothing from them
        assert row["MajorityVote/labelled"] == pytest.approx(np.mean([paid[0] is not None, paid[4] is not None]))

    seen.clear()
    made.evaluate()  # groups of two, where training had four
    assert sum(len(paid) for _, paid in seen) == 8


def length_reward(completions: list[Any], log_metric: Any, **columns: Any) -> list[float | None]:
    """A TRL reward function in conversational form: 1 / length, no opinion about refusals."""
    texts = [completion[0]["content"] for completion in completions]
    log_metric("longest", max(map(len, texts)))
    return [None if "give up" in text else math.nan if text == "nan" else 1 / (1 + len(text)) for text in texts]


def standard_reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
) -> list[float]:
    assert all(isinstance(prompt, str) for prompt in prompts)
    return [float(len(tokens) + len(text)) for tokens, text in zip(completion_ids, completions, strict=True)]


def wrong_count(completions: list[Any], **_: Any) -> list[float]:
    return [1.0]


async def asynchronous(completions: list[Any], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def trl_reward(name: str, **options: Any) -> TRLReward:
    return build(
        "reward", Plug.model_validate({"use": "trl", "with": {"function": f"test_trl_bridge:{name}", **options}})
    )


def test_a_trl_function_is_a_reward_and_no_opinion_abstains() -> None:
    group = make_group([*boxed([5, 5, 7, ""]), "nan"], trainable=[True, False, True, True, True])
    scored = trl_reward("length_reward")(group, context())
    check_scored(scored, group)
    assert scored.rewards.tolist() == pytest.approx([1 / 13, 1 / 13, 1 / 13, 0, 0])
    assert scored.train.tolist() == [True, False, True, False, False]
    assert (scored.label, scored.classes.tolist(), scored.metrics) == (None, [0, 0, 1, -1, -1], {"longest": 12.0})


def test_standard_form_hands_over_text_and_tokens() -> None:
    group = make_group(["ab", "c"], finishes=[Finish.STOP, Finish.LENGTH])
    assert trl_reward("standard_reward", form="standard")(group, context()).rewards.tolist() == [5.0, 3.0]


def test_mistakes_of_a_trl_function_are_named() -> None:
    with pytest.raises(PluginError, match="returned 1 rewards for 2 rollouts"):
        trl_reward("wrong_count")(make_group(["a", "b"]), context())
    with pytest.raises(ConfigError, match="asynchronous"):
        trl_reward("asynchronous")
    with pytest.raises(ConfigError, match="has no class or function 'lenght_reward'"):
        trl_reward("lenght_reward")
    with pytest.raises(ConfigError, match="option 'function' is required"):
        build("reward", Plug.model_validate({"use": "trl"}))


def test_the_adapter_passes_the_contract_kit() -> None:
    assert [f for f in examine(lambda: trl_reward("length_reward")) if f.problem] == []


def test_a_file_next_to_the_recipe_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def short(completions, **_):\n    return [-float(len(c[0]['content'])) for c in completions]\n"
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text('extends: quickstart\nname: x\nreward: {use: trl, with: {function: "./mine.py:short"}}\n')
    from ttrl.config.load import RECIPES

    recipe.write_text(recipe.read_text().replace("quickstart", str(RECIPES / "quickstart.yaml")))
    scored = check_recipe(load_recipe(recipe)).reward(make_group(["abc", "d"]), context())
    assert scored.rewards.tolist() == [-3.0, -1.0]
