"""`ttrl eval --regret`: traces of every prompt, stopped at their cut points, and what the model answered there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ttrl.errors import ConfigError
from ttrl.evaluate.estimators import bootstrap
from ttrl.evaluate.evaluator import GRADER, Estimate
from ttrl.evaluate.labels import read_labels
from ttrl.evaluate.regret import Curve, curve, normalised_regret, reach_interval, tokens_to_reach
from ttrl.probing import Prober, Stops
from ttrl.prompts import check_room
from ttrl.protocols import Pool
from ttrl.rewards.reader import AnswerReader
from ttrl.seeds import derive
from ttrl.types import NO_ANSWER, Prompt, Request, Rollout, SamplingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StopProtocol:
    """Everything that must agree before two regrets may be compared."""

    traces: int
    temperature: float
    top_p: float
    max_new_tokens: int
    template: str
    extractor: str
    prompts: int
    splitter: str
    termination: str
    probes: int
    probe_tokens: int
    grader: str = GRADER


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedEvaluation:
    """Curves per prompt and trace, and what they say."""

    protocol: StopProtocol
    ids: tuple[str, ...]
    curves: tuple[tuple[Curve, ...], ...]
    """[prompts][traces]"""
    estimates: dict[str, Estimate]
    """regret@C, stopped@C (accuracy when stopped after C tokens), pass@1, length, episodes, probe_answered; over prompts"""
    reach: dict[str, Estimate | None]
    """tokens@accuracy; None where the mean curve never gets there"""

    def record(self) -> dict[str, Any]:
        """JSON-able; the curves of all traces included."""
        return {
            "protocol": asdict(self.protocol),
            **{name: asdict(estimate) for name, estimate in self.estimates.items()},
            **{name: None if estimate is None else asdict(estimate) for name, estimate in self.reach.items()},
            "curves": {i: [[c.x, c.y] for c in own] for i, own in zip(self.ids, self.curves, strict=True)},
        }


@dataclass(frozen=True, slots=True)
class _Trace:
    """One trace, judged."""

    curve: Curve
    right: float
    length: int
    episodes: int
    answered: float
    """share of its forced answers that could be read"""


def check_goals(budgets: Sequence[int], reach: Sequence[float]) -> None:
    """Raises ConfigError for budgets and accuracies that mean nothing."""
    if not budgets or min(budgets) < 1:
        raise ConfigError(f"regret budgets are numbers of tokens above 0, got {list(budgets)}")
    if any(not 0 < accuracy <= 1 for accuracy in reach):
        raise ConfigError(f"accuracies to reach lie above 0 and up to 1, got {list(reach)}")


class RegretEvaluator:
    """Evaluates one prompt set. Opens the labels itself. Seeds depend on prompt and trace only, as those of `Evaluator`.

    A point of a curve costs the tokens before the cut, the termination and the mean of the answers forced there; the last point is the
    trace itself. Truncated traces and answers are read as the reader says, by default as wrong.
    """

    def __init__(
        self, prompts: Sequence[Prompt], labels: str, reader: AnswerReader, spec: SamplingSpec, stops: Stops,
        *, traces: int, budgets: Sequence[int], reach: Sequence[float], template: str, rule: str, seed: int,
    ) -> None:  # fmt: skip
        check_goals(budgets, reach)
        self._prompts, self._reader, self._spec, self._stops = tuple(prompts), reader, spec, stops
        self._labels = read_labels(labels, [p.id for p in prompts])
        self._traces, self._budgets, self._reach, self._seed = traces, tuple(budgets), tuple(reach), seed
        self.protocol = StopProtocol(
            traces=traces, temperature=spec.temperature, top_p=spec.top_p, max_new_tokens=spec.max_new_tokens,
            template=template, extractor=reader.kind, prompts=len(prompts), splitter=rule,
            termination=stops.termination, probes=stops.probes, probe_tokens=stops.tokens,
        )  # fmt: skip

    def __call__(self, pool: Pool) -> StoppedEvaluation:
        prober = Prober(self._stops, pool.tokenizer, self._spec, self._seed)
        check_room(self._prompts, self._spec.max_new_tokens + prober.extra_tokens, pool.max_positions)
        traces = pool.generate(
            [
                Request(prompt=p, index=i, seed=derive(self._seed, "eval", "regret", p.id, i), spec=self._spec)
                for p in self._prompts
                for i in range(self._traces)
            ]
        )
        judged = [
            self._stopped(pool, prober, prompt, traces[n * self._traces : (n + 1) * self._traces])
            for n, prompt in enumerate(self._prompts)
        ]
        return self._summed(judged)

    def _stopped(self, pool: Pool, prober: Prober, prompt: Prompt, traces: Sequence[Rollout]) -> list[_Trace]:
        """Probe the traces of one prompt. Weights do not move here, so version 0 addresses the seeds."""
        cuts = [prober.cuts(trace) for trace in traces]
        plan = prober.plan(traces, cuts)
        probes = pool.generate(prober.requests(prompt, plan, version=0))
        right, answered = self._judge(prompt, [*traces, *probes])
        m, count = self._stops.probes, len(traces)
        lengths = np.asarray([len(p.token_ids) for p in probes], np.float64).reshape(-1, m)
        chances, spoke = right[count:].reshape(-1, m).mean(axis=1), answered[count:].reshape(-1, m).mean(axis=1)
        found = []
        for trace, own, places, final in zip(traces, cuts, plan.places, right[:count], strict=True):
            at = list(places)
            tokens = np.asarray(own) + len(prober.termination) + lengths[at].mean(axis=1)
            found.append(
                _Trace(
                    curve([*tokens, len(trace.token_ids)], [*chances[at], float(final)]), float(final),
                    len(trace.token_ids), len(own), float(spoke[at].mean()),
                )
            )  # fmt: skip
        return found

    def _judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> tuple[np.ndarray, np.ndarray]:
        """[rollouts] right, [rollouts] answered; 0 or 1."""
        classes, forms = self._reader.classes(self._reader.read(rollouts))
        wanted = self._reader.match(forms, self._labels[prompt.id])
        right = [float(c != NO_ANSWER and forms[c] == wanted) for c in classes]
        return np.asarray(right), np.asarray([float(c != NO_ANSWER) for c in classes])

    def _summed(self, judged: Sequence[Sequence[_Trace]]) -> StoppedEvaluation:
        curves = tuple(tuple(t.curve for t in own) for own in judged)
        table: dict[str, list[float]] = {}
        for budget in self._budgets:
            table[f"regret@{budget}"] = [float(np.mean([normalised_regret(c, budget) for c in own])) for own in curves]
            table[f"stopped@{budget}"] = [float(np.mean([c.at(budget) for c in own])) for own in curves]
        table["pass@1"] = [float(np.mean([t.right for t in own])) for own in judged]
        table["length"] = [float(np.mean([t.length for t in own])) for own in judged]
        table["episodes"] = [float(np.mean([t.episodes for t in own])) for own in judged]
        table["probe_answered"] = [float(np.mean([t.answered for t in own])) for own in judged]
        seed = derive(self._seed, "bootstrap")
        reach: dict[str, Estimate | None] = {}
        for accuracy in self._reach:
            tokens = tokens_to_reach(curves, accuracy)
            low, high = reach_interval(curves, accuracy, seed) or (None, None)
            reach[f"tokens@{accuracy:g}"] = None if tokens is None else Estimate(value=tokens, low=low, high=high)
        return StoppedEvaluation(
            protocol=self.protocol, ids=tuple(p.id for p in self._prompts), curves=curves, reach=reach,
            estimates={name: _estimate(values, seed) for name, values in table.items()},
        )  # fmt: skip


def _estimate(values: Sequence[float], seed: int) -> Estimate:
    low, high = bootstrap(np.asarray(values), seed) or (None, None)
    return Estimate(value=float(np.mean(values)), low=low, high=high)
