"""From a recipe to the parts of a run, stage one: every mistake of the user is found without torch and without a model, in
plug-ins, options, prompts, labels and paths. `ttrl.parts` is stage two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttrl.cluster import check_cluster
from ttrl.cluster.transport import check_transport
from ttrl.config.schema import Plug, PromptSet, Recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.evaluator import check_labels
from ttrl.evaluate.labels import read_labels
from ttrl.evaluate.regions import check_regions
from ttrl.guards import build_guards
from ttrl.model_path import check_model_path, check_sees
from ttrl.modes import Mode
from ttrl.prompts import PromptRecord, read_prompts
from ttrl.protocols import (
    LabelledReward,
    Reward,
    Sampler,
    Source,
    Stateful,
)  # fmt: skip
from ttrl.registry import build, check, resolve
from ttrl.rewards.reader import AnswerReader, reader_of
from ttrl.rewards.region import RegionConsistency
from ttrl.rewards.views import Views
from ttrl.sinks import check_sinks
from ttrl.sources import RefillSource, partners
from ttrl.templates import check_template
from ttrl.together import StepReward
from ttrl.trainers.dsconfig import check_deepspeed
from ttrl.trainers.stabilizers.check import check_stabilizers, has_teacher
from ttrl.types import Rollout

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A recipe whose every reference was followed. Loading a model is what remains."""

    recipe: Recipe
    records: Sequence[PromptRecord]
    heldout: Sequence[PromptRecord]
    source: Source
    reward: Reward
    reader: AnswerReader
    labels_in_training: bool
    """The reward was given reference answers: an upper bound, not a label-free run."""


def check_recipe(recipe: Recipe) -> Checked:
    """Raises ConfigError listing what is wrong. Imports no torch and takes well under a second for a few thousand prompts."""
    problems: list[str] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except ConfigError as error:
            problems.append(str(error))
            return None

    for slot, plug in _plugs(recipe):
        attempt(lambda slot=slot, plug=plug: check(slot, plug))  # type: ignore[misc]
    reward = attempt(lambda: _reward(recipe))
    built = [("objective", recipe.objective), ("parameters", recipe.trainer.parameters)]
    built += [("gate", plug) for plug in recipe.gates]
    for slot, plug in built:
        attempt(lambda slot=slot, plug=plug: build(slot, plug))  # type: ignore[misc]
    stabilizers = [attempt(lambda plug=plug: build("stabilizer", plug)) for plug in recipe.stabilizers]  # type: ignore[misc]
    if reward is not None and None not in stabilizers:
        attempt(lambda: check_stabilizers(recipe, stabilizers, reward))
    if recipe.trainer.backend.use == "deepspeed":
        attempt(lambda: check_deepspeed(recipe))
    attempt(lambda: build_guards(recipe))
    attempt(lambda: check_sinks(recipe))
    attempt(lambda: check_cluster(recipe.cluster))
    attempt(lambda: check_transport(recipe))
    attempt(lambda: _check_engine(recipe))
    if reward is not None and recipe.rollout.votes_per_prompt < reward.min_votes:
        problems.append(
            f"rollout.votes_per_prompt is {recipe.rollout.votes_per_prompt}, but the reward needs at least {reward.min_votes}"
        )
    attempt(lambda: check_model_path(recipe.model))
    attempt(lambda: check_template(recipe.data.template))
    reader = attempt(lambda: answer_reader(recipe, reward))
    sampler: Any = None
    if reward is not None and reader is not None:
        sampler = attempt(lambda: build_sampler(recipe, reward, reader))
    records = attempt(lambda: _read(recipe, recipe.data.prompts, recipe.data.limit))
    source: Any = None
    if records:
        source = attempt(
            lambda: build(
                "source", recipe.data.source, [r.id for r in records], recipe.data.prompts_per_step, recipe.seed
            )
        )
        if recipe.rollout.ahead and any(isinstance(part, Stateful) for part in (source, sampler)):
            problems.append(
                "rollout.ahead draws steps before others are complete, so a source or sampler must not remember steps "
                "(it has state and load_state); set rollout.ahead: 0"
            )
        if isinstance(source, Mode):
            attempt(lambda: source.check(recipe))
        if isinstance(source, RefillSource):
            attempt(lambda: _check_refill(recipe, reward, stabilizers))
        if isinstance(reward, StepReward) and source is not None:
            attempt(lambda: _check_together(recipe, reward, source))
        if recipe.eval.labels is not None:  # a mode answers every prompt, and every answer is judged
            judged = records if isinstance(source, Mode) else records[: recipe.eval.limit]
            attempt(lambda: check_labels(str(recipe.eval.labels), [r.id for r in judged]))
    if isinstance(reward, RegionConsistency):
        attempt(lambda: check_regions(records or [], recipe.eval.labels, recipe.eval.limit))
    labelled = reward is not None and "labels" in reward.needs
    if labelled:
        attempt(lambda: _hand_labels(recipe, reward, records or []))
    split = recipe.eval.heldout
    heldout = attempt(lambda: _heldout(recipe, split, records or [])) if split is not None else []
    shown = [record for record in [*(records or []), *(heldout or [])] if record.images]
    attempt(lambda: check_images(recipe, shown))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(line for problem in problems for line in problem.split("\n"))))
    return Checked(recipe=recipe, records=records, heldout=heldout, source=source, reward=reward, reader=reader,
                   labels_in_training=labelled)  # fmt: skip


def answer_reader(recipe: Recipe, reward: Reward | None) -> AnswerReader:
    """How evaluation reads answers: as `eval.extractor` says, else as the reward does, else as `math`."""
    settings = recipe.eval
    held = getattr(reward, "reader", None)  # plug-ins need not have one
    if settings.extractor is None and isinstance(held, AnswerReader):
        return held
    try:
        return AnswerReader(
            settings.extractor or "math", settings.extractor_options, truncated_votes=settings.truncated_votes
        )
    except ValueError as error:
        raise ConfigError(f"eval.extractor: {error}") from None


def _reward(recipe: Recipe) -> Reward:
    """Build the reward and check what the slot relies on, so that a plug-in's gap shows now."""
    reward: Reward = build("reward", recipe.reward)
    missing = [name for name in ("needs", "min_votes") if not hasattr(reward, name)]
    if missing or not callable(reward):
        raise ConfigError(
            f"reward {recipe.reward.use!r} must be callable and have {', '.join(missing or ['__call__'])}"
        )
    unknown = set(reward.needs) - {"entropy", "self_certainty", "labels"}
    if unknown:
        raise ConfigError(
            f"reward {recipe.reward.use!r} needs {sorted(unknown)}; rollouts can carry: entropy, self_certainty"
        )
    return reward


def _check_together(recipe: Recipe, reward: StepReward, source: Source) -> None:
    """Raises ConfigError when a reward that wants the groups of a step together would not get them, or not those it needs."""
    if isinstance(source, Mode):
        raise ConfigError(
            f"reward {recipe.reward.use!r} looks at the groups of a step together, which source {recipe.data.source.use!r} does not "
            "offer; use another reward or another source"
        )
    if isinstance(reward, Views):
        try:
            partners(source.batch(0))
        except ConfigError as error:
            raise ConfigError(
                f"reward {recipe.reward.use!r}: {error}; data.source: views keeps views together"
            ) from None


def _check_refill(recipe: Recipe, reward: Reward | None, stabilizers: Sequence[Any]) -> None:
    """Raises ConfigError when a step cannot go on drawing prompts."""
    if isinstance(reward, StepReward):
        raise ConfigError(
            f"reward {recipe.reward.use!r} looks at the groups of a step together, but with data.source refill they come one round "
            "after the other; use source epoch"
        )
    if None not in stabilizers and has_teacher(stabilizers):
        raise ConfigError(
            "data.source refill draws again after the votes, when the engines hold the weights of the EMA teacher and the policy "
            "cannot be sampled; use source epoch, or a teacher without votes"
        )


THRESHOLDS = ("min_votes", "min_share", "min_margin")


def build_sampler(recipe: Recipe, reward: Reward, reader: AnswerReader) -> Sampler:
    """The sampler, given the eyes of the reward: its reader, and its thresholds where the sampler has options for them.

    A sampler that stops early must not stop on another vote than the reward will hold.
    """
    seen_by = reader_of(reward, reader)

    def classify(rollouts: Sequence[Rollout]) -> list[int]:
        return seen_by.classes(seen_by.read(rollouts))[0]

    rollout = recipe.rollout
    known = inspect.signature(resolve("sampler", rollout.sampler.use)).parameters
    inherited = {k: v for k, v in recipe.reward.options.items() if k in THRESHOLDS and k in known}
    plug = rollout.sampler.model_copy(update={"options": {**inherited, **rollout.sampler.options}})
    sampler: Sampler = build("sampler", plug, rollout.votes_per_prompt, rollout.trained, classify)
    return sampler


def _hand_labels(recipe: Recipe, reward: Reward, records: Sequence[PromptRecord]) -> None:
    """The one way for labels into training. Raises ConfigError unless the recipe asks for it in so many words."""
    if not recipe.allow_labels:
        raise ConfigError(
            f"reward {recipe.reward.use!r} trains on reference answers, so the run is not label-free; "
            "if that is what you want, for an upper bound, set allow_labels: true at the top level of the recipe"
        )
    if recipe.eval.labels is None:
        raise ConfigError(f"reward {recipe.reward.use!r} needs labels; name their file in eval.labels")
    if not isinstance(reward, LabelledReward):
        raise ConfigError(f"reward {recipe.reward.use!r} needs labels but has no method take_labels(labels)")
    reward.take_labels(read_labels(recipe.eval.labels, [record.id for record in records]))


def _plugs(recipe: Recipe) -> list[tuple[str, Plug]]:
    return [
        ("source", recipe.data.source), ("engine", recipe.rollout.engine), ("sampler", recipe.rollout.sampler),
        ("backend", recipe.trainer.backend),
    ]  # fmt: skip


def _read(recipe: Recipe, path: str, limit: int | None) -> list[PromptRecord]:
    return read_prompts(
        path, prompt_field=recipe.data.prompt_field, id_field=recipe.data.id_field, images_field=recipe.data.images_field,
        limit=limit, keep=recipe.data.keep,
    )  # fmt: skip


def _check_engine(recipe: Recipe) -> None:
    engine = recipe.rollout.engine
    if (
        engine.use == "vllm"
        and engine.options.get("implementation") == "transformers"
        and recipe.cluster.backend == "local"
    ):
        raise ConfigError(
            "rollout.engine vllm with implementation: transformers changes transformers in its process, where the trainer needs it "
            "unchanged; set cluster.backend: ray, which gives the engine a process of its own"
        )


def check_images(recipe: Recipe, shown: Sequence[PromptRecord]) -> None:
    """Raises ConfigError when prompts have images and something of the recipe cannot take them."""
    check_sees(recipe.model.path, shown)


def _heldout(recipe: Recipe, split: PromptSet, adapted: Sequence[PromptRecord]) -> list[PromptRecord]:
    records = _read(recipe, split.prompts, recipe.eval.limit)
    seen = {record.content for record in adapted}
    both = [record.id for record in records if record.content in seen]
    if both:
        raise ConfigError(
            f"eval.heldout: {len(both)} prompts are trained on ({', '.join(both[:3])}); they are not held out"
        )
    if split.labels is not None:
        check_labels(split.labels, [record.id for record in records])
    return records
