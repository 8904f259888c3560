"""`ttrl eval`: one evaluation of any model on any prompts file, under the same code as inside a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ttrl.config.schema import ModelSection
from ttrl.errors import ConfigError
from ttrl.evaluate.evaluator import Evaluation, Evaluator
from ttrl.evaluate.labels import read_labels
from ttrl.model_path import check_model_path
from ttrl.prompts import check_room, read_prompts, tokenize
from ttrl.rewards.reader import AnswerReader
from ttrl.rollout.engines import hf
from ttrl.stopping import StopSwitch
from ttrl.templates import check_template, describe
from ttrl.types import SamplingSpec


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


def evaluate_model(call: EvalCall) -> Evaluation:
    """Raises ConfigError for mistakes, before the model is loaded."""
    if not call.k or min(call.k) < 1 or max(call.k) > call.samples:
        raise ConfigError(f"--k must be between 1 and --samples ({call.samples}), got {','.join(map(str, call.k))}")
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
    if call.labels is not None:
        read_labels(call.labels, [record.id for record in records])
    from ttrl.rollout.pool import LocalPool  # imports torch: only after everything above was found to be right

    with StopSwitch() as switch:
        engine = hf(section, switch.check)
        prompts = tokenize(records, engine.tokenizer, call.template, None)
        check_room(prompts, call.max_new_tokens, engine.max_positions)
        spec = SamplingSpec(max_new_tokens=call.max_new_tokens, temperature=call.temperature, top_p=call.top_p)
        evaluator = Evaluator(
            "prompts", prompts, call.labels, reader, spec,
            samples=call.samples, ks=sorted(set(call.k)), template=describe(call.template), seed=call.seed,
        )  # fmt: skip
        return evaluator(0, LocalPool(engine))
