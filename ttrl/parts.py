"""From a recipe to the parts of a run, stage two: models are loaded, workers started, and everything the loop works with built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttrl.cluster import Cluster, connect
from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.evaluator import Evaluator
from ttrl.evaluate.luck import LuckMeter
from ttrl.evaluate.regions import RegionEvaluator
from ttrl.guards import Keeper, build_guards
from ttrl.objectives import TokenizedObjective
from ttrl.probing import equip
from ttrl.prompts import check_room, tokenize
from ttrl.protocols import (
    Engine,
    Gate,
    Objective,
    Pool,
    Reward,
    Sampler,
    Source,
    Stateful,
    StopCheck,
    Trainer,
)  # fmt: skip
from ttrl.registry import build
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.region import RegionConsistency
from ttrl.rundir import CHECKPOINTS
from ttrl.setup import Checked, build_sampler
from ttrl.templates import describe
from ttrl.trainers.stabilizers.check import has_teacher
from ttrl.types import Prompt, SamplingSpec

if TYPE_CHECKING:
    from ttrl.sync import WeightLink


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


def assemble(checked: Checked, check_stop: StopCheck) -> Parts:
    """Start what runs elsewhere, load the models and build every part. What was started is ended when something fails."""
    with ExitStack() as ending:
        return _assemble(checked, check_stop, ending)


def _assemble(checked: Checked, check_stop: StopCheck, ending: ExitStack) -> Parts:
    nodes = _nodes(checked.recipe, check_stop, ending)  # before torch is imported: a wrong address shows at once
    from ttrl.model.load import load_tokenizer
    from ttrl.model.processor import pictures_for
    from ttrl.sync import WeightLink, canary_text
    from ttrl.trainers.backends import TrainerSetup

    recipe, data = checked.recipe, checked.recipe.data
    setup = TrainerSetup.of(recipe, check_stop, nodes)
    tokenizer = load_tokenizer(recipe.model.path)  # mistakes in prompts show before a model is loaded
    if isinstance(setup.objective, TokenizedObjective):
        setup.objective.take_tokenizer(tokenizer)
    pictures = pictures_for(recipe.model.path, [*checked.records, *checked.heldout])
    prompts = tokenize(checked.records, tokenizer, data.template, data.max_prompt_tokens, pictures)
    heldout = tokenize(checked.heldout, tokenizer, data.template, data.max_prompt_tokens, pictures)
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


def _luck_meter(checked: Checked, prompts: Sequence[Prompt]) -> LuckMeter | None:
    """For the prompts that evaluation has labels for. None for regions: a box that is right equals no reference box."""
    settings = checked.recipe.eval
    if settings.labels is None or isinstance(checked.reward, RegionConsistency):
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
