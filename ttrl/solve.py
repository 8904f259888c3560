"""`ttrl solve`: answers without training. Votes are sampled and a reward's decision rule elects the answer of each prompt.

Every reward that elects a label is a decision rule: `majority_vote` with its weights and thresholds is self-consistency and its
kin, `region_consistency` is GUI-RC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttrl.config.schema import ModelSection, Plug
from ttrl.contract import Blame, check_scored
from ttrl.errors import ConfigError
from ttrl.evaluate.regions import check_screens
from ttrl.model_path import check_model_path, check_sees
from ttrl.prompts import check_room, read_prompts, tokenize
from ttrl.protocols import Pool, Reward, RewardContext
from ttrl.registry import build
from ttrl.rewards.region import RegionConsistency
from ttrl.rewards.spots import centre
from ttrl.rewards.structured import parse_box
from ttrl.rollout.engines import hf
from ttrl.rollout.flat import FlatSampler
from ttrl.seeds import derive
from ttrl.stopping import StopSwitch
from ttrl.templates import check_template
from ttrl.types import Prompt, SamplingSpec, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveCall:
    """The arguments of one `ttrl solve`."""

    model: str
    prompts: str
    reward: str = "majority_vote"
    options: Mapping[str, Any] = field(default_factory=dict)
    template: str = "chat"
    keep: tuple[str, ...] = ()
    votes: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    limit: int | None = None
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """One prompt and what the votes say."""

    id: str
    answer: str | None
    """None when the rule abstained"""
    share: float
    margin: float
    votes: int
    reason: str
    centre: tuple[float, float] | None
    """of the elected region, for screenshots: the click"""


def solve(call: SolveCall) -> list[Solved]:
    """Answers in the order of the prompts. Raises ConfigError for mistakes, before the model is loaded."""
    if call.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, got {call.device!r}")
    if call.top_p <= 0 or call.temperature <= 0:
        raise ConfigError("--top-p and --temperature must be above 0: votes of a greedy model are all the same")
    section = ModelSection(path=call.model, device=call.device)
    check_model_path(section)
    check_template(call.template)
    reward: Reward = build("reward", Plug.model_validate({"use": call.reward, "with": dict(call.options)}))
    if "labels" in reward.needs:
        raise ConfigError(f"--reward {call.reward} asks for labels; answers are elected by votes only")
    if call.votes < reward.min_votes:
        raise ConfigError(f"--votes {call.votes}: {call.reward} needs at least {reward.min_votes}")
    records = read_prompts(call.prompts, limit=call.limit, keep=call.keep)
    check_sees(call.model, records)
    if isinstance(reward, RegionConsistency):
        check_screens(records)
    from ttrl.model.processor import pictures_for
    from ttrl.rollout.pool import LocalPool  # imports torch: only after everything above was found to be right

    with StopSwitch() as switch:
        engine = hf(section, switch.check)
        prompts = tokenize(records, engine.tokenizer, call.template, None, pictures_for(call.model, records))
        check_room(prompts, call.max_new_tokens, engine.max_positions)
        spec = SamplingSpec(
            max_new_tokens=call.max_new_tokens, temperature=call.temperature, top_p=call.top_p,
            entropy="entropy" in reward.needs, self_certainty="self_certainty" in reward.needs,
        )  # fmt: skip
        return answers(prompts, LocalPool(engine), reward, spec, votes=call.votes, seed=call.seed, name=call.reward)


def answers(
    prompts: Sequence[Prompt], pool: Pool, reward: Reward, spec: SamplingSpec, *, votes: int, seed: int, name: str
) -> list[Solved]:
    """Sample and decide. The votes are those of step 0 of a run with the same seed."""
    sampler = FlatSampler(votes, votes, lambda rollouts: [0] * len(rollouts))
    solved = []
    for group in sampler(prompts, pool, spec, derive(seed, "rollout", 0)):
        context = RewardContext(step=0, seed=derive(seed, "reward", 0, group.prompt.id))
        with Blame("reward", name, group.prompt.id):
            scored = reward(group, context)
            check_scored(scored, group)
        solved.append(_solved(scored, reward))
    return solved


def _solved(scored: Scored, reward: Reward) -> Solved:
    return Solved(
        id=scored.group.prompt.id, answer=scored.label, share=scored.share, margin=scored.margin,
        votes=len(scored.group.rollouts), reason="; ".join(scored.trace),
        centre=centre(parse_box(scored.label)) if scored.label and isinstance(reward, RegionConsistency) else None,
    )  # fmt: skip
