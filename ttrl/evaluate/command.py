"""`ttrl eval`: one evaluation of any model on any prompts file, under the same code as inside a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ttrl.config.schema import ModelSection
from ttrl.errors import ConfigError
from ttrl.evaluate.evaluator import Evaluation, Evaluator
from ttrl.evaluate.labels import read_labels
from ttrl.evaluate.stopped import RegretEvaluator, StoppedEvaluation, check_goals
from ttrl.model_path import check_model_path, check_sees
from ttrl.probing import Stops
from ttrl.prompts import check_room, read_prompts, tokenize
from ttrl.protocols import Pool
from ttrl.rewards.reader import AnswerReader
from ttrl.rollout.engines import hf
from ttrl.stopping import StopSwitch
from ttrl.templates import check_template, describe
from ttrl.types import Prompt, SamplingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalCall:
    """The arguments of one `ttrl eval`."""

    model: str
    prompts: str
    labels: str | None
    template: str
    extractor: str
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    k: tuple[int, ...]
    limit: int | None
    seed: int
    truncated_votes: bool = False
    device: str = "auto"
    extractor_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretCall:
    """What `ttrl eval --regret` adds; `samples` of the call is the number of traces."""

    budgets: tuple[int, ...]
    reach: tuple[float, ...]
    splitter: str
    """paragraphs, delimiter:TEXT or tokens:N"""
    termination: str
    probes: int
    probe_tokens: int


def evaluate_model(call: EvalCall) -> Evaluation:
    """Raises ConfigError for mistakes, before the model is loaded."""
    if not call.k or min(call.k) < 1 or max(call.k) > call.samples:
        raise ConfigError(f"--k must be between 1 and --samples ({call.samples}), got {','.join(map(str, call.k))}")
    with _opened(call) as (prompts, reader, spec, pool):
        evaluator = Evaluator(
            "prompts", prompts, call.labels, reader, spec,
            samples=call.samples, ks=sorted(set(call.k)), template=describe(call.template), seed=call.seed,
        )  # fmt: skip
        return evaluator(0, pool)


def evaluate_regret(call: EvalCall, regret: RegretCall) -> StoppedEvaluation:
    """Normalised regret and token efficiency. Raises ConfigError for mistakes, before the model is loaded."""
    if call.labels is None:
        raise ConfigError("--regret compares forced answers with references; name their file in --labels")
    rule, _, value = regret.splitter.partition(":")
    known: dict[str, dict[str, Any]] = {"delimiter": {"delimiter": value}, "tokens": {"n": _number(value)}}
    options = known.get(rule, {})
    try:
        stops = Stops.of(
            rule, options, termination=regret.termination, probes=regret.probes, tokens=regret.probe_tokens
        )
    except ValueError as error:
        raise ConfigError(f"--splitter, --probes or --probe-tokens: {error}") from None
    check_goals(regret.budgets, regret.reach)
    with _opened(call) as (prompts, reader, spec, pool):
        evaluator = RegretEvaluator(
            prompts, call.labels, reader, spec, stops, traces=call.samples, budgets=regret.budgets,
            reach=regret.reach, template=describe(call.template), rule=regret.splitter, seed=call.seed,
        )  # fmt: skip
        return evaluator(pool)


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


Opened = tuple[list[Prompt], AnswerReader, SamplingSpec, Pool]


@contextmanager
def _opened(call: EvalCall) -> Iterator[Opened]:
    """Prompts, reader, spec and a pool with the model."""
    if call.top_p <= 0:
        raise ConfigError("--top-p must be above 0")
    if call.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, got {call.device!r}")
    section = ModelSection(path=call.model, device=call.device)
    check_model_path(section)
    check_template(call.template)
    try:
        reader = AnswerReader(call.extractor, call.extractor_options, truncated_votes=call.truncated_votes)
    except ValueError as error:
        raise ConfigError(f"--extractor: {error}") from None
    records = read_prompts(call.prompts, limit=call.limit)
    check_sees(call.model, records)
    if call.labels is not None:
        read_labels(call.labels, [record.id for record in records])
    from ttrl.model.processor import pictures_for
    from ttrl.rollout.pool import LocalPool  # imports torch: only after everything above was found to be right

    with StopSwitch() as switch:
        engine = hf(section, switch.check)
        prompts = tokenize(records, engine.tokenizer, call.template, None, pictures_for(call.model, records))
        check_room(prompts, call.max_new_tokens, engine.max_positions)
        spec = SamplingSpec(max_new_tokens=call.max_new_tokens, temperature=call.temperature, top_p=call.top_p)
        yield list(prompts), reader, spec, LocalPool(engine)
