"""From a recipe to the parts of a run, in two stages.

`check` finds every mistake of the user without torch and without a model: plug-ins, options, prompts, labels, paths.
`assemble` then loads models and builds the parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttrl.cluster import Cluster, check_cluster, connect
from ttrl.cluster.transport import check_transport
from ttrl.config.schema import Plug, PromptSet, Recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.evaluator import Evaluator, check_labels
from ttrl.evaluate.labels import read_labels
from ttrl.evaluate.luck import LuckMeter
from ttrl.evaluate.regions import RegionEvaluator, check_regions
from ttrl.guards import Keeper, build_guards
from ttrl.model_path import check_model_path
from ttrl.modes import Mode
from ttrl.objectives import TokenizedObjective
from ttrl.probing import equip
from ttrl.prompts import PromptRecord, check_room, read_prompts, tokenize
from ttrl.protocols import (
    Engine,
    Gate,
    LabelledReward,
    Objective,
    Pool,
    Reward,
    Sampler,
    Source,
    Stateful,
    StopCheck,
    Trainer,
)  # fmt: skip
from ttrl.registry import build, check, resolve
from ttrl.rewards.reader import AnswerReader, reader_of
from ttrl.rewards.region import RegionConsistency
from ttrl.rundir import CHECKPOINTS
from ttrl.sinks import check_sinks
from ttrl.templates import check_template, describe
from ttrl.trainers.dsconfig import check_deepspeed
from ttrl.trainers.stabilizers.check import check_stabilizers, has_teacher
from ttrl.types import Prompt, Rollout, SamplingSpec

if TYPE_CHECKING:
    from ttrl.sync import WeightLink


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the loop works with."""

    recipe: Recipe
    prompts: dict[str, Prompt]
    source: Source
    sampler: Sampler
    pool: Pool
    spec: SamplingSpec
    reward: Reward
    reader: AnswerReader
    """How answers are read where no reward is asked."""
    gates: tuple[Gate, ...]
    objective: Objective
    trainer: Trainer
    link: WeightLink
    guards: Keeper
    evaluators: tuple[Evaluator, ...]
    """the adapted prompts first, then the held-out ones"""
    teaching: bool
    """Votes are drawn under the EMA teacher."""
    luck: LuckMeter | None
    """looks at decisions and rewards with the labels, for the journal only; None without labels"""
    ending: ExitStack
    """What ends workers, ranks and a cluster of our own, in this order."""

    @property
    def memory(self) -> dict[str, Stateful]:
        """Every part besides the trainer that remembers something across steps, under the name that checkpoints know it by."""
        memory = remembering(self.source, self.sampler, self.reward, self.objective, self.gates)
        return {**memory, "guards": self.guards} if self.recipe.guards else memory

    def close(self) -> None:
        """Ends what assemble started."""
        self.ending.close()


def remembering(
    source: Source, sampler: Sampler, reward: Reward, objective: Objective, gates: Sequence[Gate]
) -> dict[str, Stateful]:
    """Those of the parts that remember something, by name. A rollback of the guards takes them back too."""
    named: dict[str, Any] = {"source": source, "sampler": sampler, "reward": reward, "objective": objective}
    named |= {f"gate {i}": gate for i, gate in enumerate(gates)}
    return {name: part for name, part in named.items() if isinstance(part, Stateful)}


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
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(line for problem in problems for line in problem.split("\n"))))
    return Checked(recipe=recipe, records=records, heldout=heldout, source=source, reward=reward, reader=reader,
                   labels_in_training=labelled)  # fmt: skip


def assemble(checked: Checked, check_stop: StopCheck) -> Parts:
    """Start what runs elsewhere, load the models and build every part. What was started is ended when something fails."""
    with ExitStack() as ending:
        return _assemble(checked, check_stop, ending)


def _assemble(checked: Checked, check_stop: StopCheck, ending: ExitStack) -> Parts:
    nodes = _nodes(checked.recipe, check_stop, ending)  # before torch is imported: a wrong address shows at once
    from ttrl.model.load import load_tokenizer
    from ttrl.sync import WeightLink, canary_text
    from ttrl.trainers.backends import TrainerSetup

    recipe, data = checked.recipe, checked.recipe.data
    setup = TrainerSetup.of(recipe, check_stop, nodes)
    tokenizer = load_tokenizer(recipe.model.path)  # mistakes in prompts show before a model is loaded
    if isinstance(setup.objective, TokenizedObjective):
        setup.objective.take_tokenizer(tokenizer)
    prompts = tokenize(checked.records, tokenizer, data.template, data.max_prompt_tokens)
    heldout = tokenize(checked.heldout, tokenizer, data.template, data.max_prompt_tokens)
    longest = max(recipe.rollout.max_new_tokens, recipe.eval.max_new_tokens or 0)
    pool = _pool(recipe, check_stop, nodes)
    ending.callback(pool.close)
    check_room([*prompts, *heldout], longest, pool.max_positions)
    trainer: Trainer = build("backend", recipe.trainer.backend, setup)
    ending.callback(trainer.close)
    if pool.takes_adapters and trainer.weights(adapter=True).adapter is None:
        raise ConfigError(
            f"rollout.engine is set up for LoRA adapters (lora_rank), but trainer.parameters is {recipe.trainer.parameters.use!r}"
        )
    canary = canary_text(prompts, pool.max_positions)
    rollout = recipe.rollout
    sampler = build_sampler(recipe, checked.reward, checked.reader)
    gates: tuple[Gate, ...] = tuple(build("gate", plug) for plug in recipe.gates)
    spec = SamplingSpec(
        max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k,
        min_p=rollout.min_p, entropy="entropy" in checked.reward.needs | setup.objective.needs,
        self_certainty="self_certainty" in checked.reward.needs,
    )  # fmt: skip
    probe_tokens = equip(setup.objective, tokenizer, spec, recipe.seed)
    check_room(prompts, rollout.max_new_tokens + probe_tokens, pool.max_positions)
    return Parts(
        recipe=recipe,
        prompts={prompt.id: prompt for prompt in prompts},
        source=checked.source,
        sampler=sampler,
        pool=pool,
        spec=spec,
        reward=checked.reward,
        reader=checked.reader,
        gates=gates,
        objective=setup.objective,
        trainer=trainer,
        link=WeightLink(trainer, pool, canary, exact=recipe.model.dtype == "float32"),
        guards=Keeper(
            build_guards(recipe), trainer,
            remembering(checked.source, sampler, checked.reward, setup.objective, gates),
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True), Path(recipe.output) / CHECKPOINTS,
        ),
        evaluators=_evaluators(checked, prompts, heldout),
        teaching=has_teacher(setup.stabilizers),
        luck=_luck_meter(checked, prompts),
        ending=ending.pop_all(),
    )  # fmt: skip


def _nodes(recipe: Recipe, check_stop: StopCheck, ending: ExitStack) -> Cluster | None:
    """The cluster of a run, with room for its workers and ranks; None when everything lives in this process."""
    if recipe.cluster.backend == "local":
        return None
    nodes = connect(
        recipe.cluster, check_stop, device=recipe.model.device,
        ranks=0 if recipe.trainer.backend.use == "torch" else recipe.cluster.ranks,
        gpus_per_worker=int(recipe.rollout.engine.options.get("tensor_parallel", 1)),
    )  # fmt: skip
    ending.callback(nodes.close)
    return nodes


def _pool(recipe: Recipe, check_stop: StopCheck, nodes: Cluster | None) -> Pool:
    """The engines of a run, here or on a cluster."""
    if nodes is not None:
        from ttrl.rollout.ray_pool import RayPool

        return RayPool(recipe, nodes)
    from ttrl.rollout.pool import LocalPool

    engine: Engine = build("engine", recipe.rollout.engine, recipe.model, check_stop)
    return LocalPool(engine, bucket_bytes=recipe.cluster.bucket_mb << 20)


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
        path, prompt_field=recipe.data.prompt_field, id_field=recipe.data.id_field, limit=limit, keep=recipe.data.keep
    )


def _heldout(recipe: Recipe, split: PromptSet, adapted: Sequence[PromptRecord]) -> list[PromptRecord]:
    records = _read(recipe, split.prompts, recipe.eval.limit)
    seen = {record.messages for record in adapted}
    both = [record.id for record in records if record.messages in seen]
    if both:
        raise ConfigError(
            f"eval.heldout: {len(both)} prompts are trained on ({', '.join(both[:3])}); they are not held out"
        )
    if split.labels is not None:
        check_labels(split.labels, [record.id for record in records])
    return records


def _luck_meter(checked: Checked, prompts: Sequence[Prompt]) -> LuckMeter | None:
    """For the prompts that evaluation has labels for."""
    settings = checked.recipe.eval
    if settings.labels is None:
        return None
    return LuckMeter(settings.labels, [prompt.id for prompt in prompts][: settings.limit], checked.reader)


def _evaluators(checked: Checked, prompts: Sequence[Prompt], heldout: Sequence[Prompt]) -> tuple[Evaluator, ...]:
    recipe = checked.recipe
    settings = recipe.eval
    spec = SamplingSpec(
        max_new_tokens=settings.max_new_tokens or recipe.rollout.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    sets = [("adapted", list(prompts)[: settings.limit], settings.labels)]
    if settings.heldout is not None:
        sets.append(("heldout", list(heldout), settings.heldout.labels))
    kind: Callable[..., Evaluator] = Evaluator
    if isinstance(checked.reward, RegionConsistency):
        kind = partial(RegionEvaluator, reward=checked.reward)
    return tuple(
        kind(
            split, members, labels, checked.reader, spec,
            samples=settings.samples, ks=settings.k, template=describe(recipe.data.template), seed=recipe.seed,
            by=settings.by,
        )
        for split, members, labels in sets
    )  # fmt: skip
