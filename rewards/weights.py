"""Weights of votes, from what every rollout carries: the sampler's log-probs and, when asked for, entropies or self-certainties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ttrl.types import NO_ANSWER, Rollout

Weighting = Literal["none", "logprob", "entropy", "self_certainty", "rpc"]
NEEDS: dict[str, frozenset[str]] = {
    "entropy": frozenset({"entropy"}),
    "self_certainty": frozenset({"self_certainty"}),
}
"""What a weighting needs the sampler to record."""

Weights = npt.NDArray[np.float64]


def vote_weights(kind: str, rollouts: Sequence[Rollout], classes: Sequence[int]) -> Weights | None:
    """[V] weights of one kind, or None for plain votes. Raises ValueError for an unknown kind or what was not recorded."""
    if kind == "none":
        return None
    if kind == "logprob":
        return np.exp(mean_logprobs(rollouts))
    if kind == "entropy":
        return np.exp(-mean_entropies(rollouts))
    if kind == "self_certainty":
        return mean_self_certainties(rollouts)
    if kind == "rpc":
        return perplexity_consistency(mean_logprobs(rollouts), classes, [r.token_ids.tobytes() for r in rollouts])
    raise ValueError(f"weights must be none, logprob, entropy, self_certainty or rpc, got {kind!r}")


def mean_logprobs(rollouts: Sequence[Rollout]) -> Weights:
    """[V] mean log-prob per token; exp of it is the geometric mean probability, in (0, 1]. An empty rollout gets 0."""
    return np.asarray([math.fsum(r.logprobs.tolist()) / max(1, len(r.logprobs)) for r in rollouts])


def mean_entropies(rollouts: Sequence[Rollout]) -> Weights:
    """[V] mean entropy per token in nats. Raises ValueError when the sampler did not record entropies."""
    if any(r.entropy is None for r in rollouts):
        raise ValueError('entropies were not recorded; the reward must ask for them with needs = {"entropy"}')
    return np.asarray(
        [math.fsum(r.entropy.tolist()) / max(1, len(r.entropy)) for r in rollouts if r.entropy is not None]
    )


def class_entropies(rollouts: Sequence[Rollout], classes: Sequence[int]) -> tuple[dict[int, float], float]:
    """Class -> mean over its rollouts of their mean entropy per token, and that mean over all rollouts with an answer (0 for none).

    In nats; exactly rounded sums, so the order of the rollouts decides no comparison. Raises ValueError as `mean_entropies`.
    """
    entropies = mean_entropies(rollouts).tolist()
    members: dict[int, list[float]] = {}
    for value, c in zip(entropies, classes, strict=True):
        if c != NO_ANSWER:
            members.setdefault(c, []).append(value)
    everyone = [value for values in members.values() for value in values]
    means = {c: math.fsum(values) / len(values) for c, values in sorted(members.items())}
    return means, math.fsum(everyone) / max(1, len(everyone))


def mean_self_certainties(rollouts: Sequence[Rollout]) -> Weights:
    """[V] mean over the tokens of KL(U || p_t) in nats, >= 0 (arXiv 2502.18581). An empty rollout gets 0. Raises ValueError when
    the sampler did not record it. As a weight it stands for itself: an exponential of it would give one vote everything."""
    if any(r.self_certainty is None for r in rollouts):
        raise ValueError(
            'self-certainties were not recorded; the reward must ask for them with needs = {"self_certainty"}'
        )
    return np.asarray(
        [
            math.fsum(r.self_certainty.tolist()) / max(1, len(r.self_certainty))
            for r in rollouts
            if r.self_certainty is not None
        ]
    )


def perplexity_consistency(
    log_probabilities: Sequence[float] | Weights, classes: Sequence[int], paths: Sequence[bytes]
) -> Weights:
    """[V] weights whose sum per class is RPC's score: the probability of the distinct paths kept by pruning (arXiv 2502.00511).

    `log_probabilities` [V] of the paths, divided by their length for anything longer than a few tokens; `paths` [V] identify
    equal paths, which count once: m copies weigh 1/m each. Weights are relative to the most probable path, so nothing underflows.
    Votes without an answer take no part in the fit. Golden: paths A .02, A .01, B .025 -> sums A .03, B .025 (times 1/.025).
    """
    logs = np.asarray(log_probabilities, dtype=np.float64)
    valid = [i for i, c in enumerate(classes) if c != NO_ANSWER]
    weights = np.zeros(len(classes))
    if not valid:
        return weights
    copies: dict[bytes, list[int]] = {}
    for i in valid:
        copies.setdefault(paths[i], []).append(i)
    top = max(logs[i] for i in valid)
    # Copies of a path may differ in their last bits when they come from different batches; the largest stands for all
    probability = {path: math.exp(max(logs[i] for i in members) - top) for path, members in copies.items()}
    kept = prune(list(probability.values()))
    for (path, members), keep in zip(copies.items(), kept, strict=True):
        weights[members] = probability[path] / len(members) if keep else 0.0
    return weights


def prune(probabilities: Sequence[float], *, rounds: int = 100) -> list[bool]:
    """[n] which paths stay: drop those below the mean that a mixture of two Weibulls gives to its lower component (RPC's pruning).

    w in [.2, .8], shapes >= .01, fitted by EM. Started from the split at the mean instead of the reference's fixed point, so the
    result does not change when all probabilities are scaled. Fewer than 4 different values are never pruned: nothing to fit.
    Golden: [.62, .60, .58, .55, .53, .51, .12, .10, .08, .05] keeps the first six.
    """
    values = np.sort(np.asarray(probabilities, dtype=np.float64))
    if np.any(~np.isfinite(values)) or np.any(values < 0):
        raise ValueError("path probabilities must be finite and not negative")
    if len(np.unique(values)) < 4:
        return [True] * len(values)
    mean = float(values.mean())
    x = np.maximum(values / mean, 1e-12)
    high = np.where(values >= mean, 0.95, 0.05)
    for _ in range(rounds):
        weight = float(np.clip(high.mean(), 0.2, 0.8))
        upper, lower = _log_weibull(x, high), _log_weibull(x, 1 - high)
        odds = np.clip(lower + math.log(1 - weight) - upper - math.log(weight), -700, 700)
        updated = 1 / (1 + np.exp(odds))
        if np.max(np.abs(updated - high)) < 1e-6:
            break
        high = updated
    # A density with a heavy left tail may claim the smallest values for the upper component: sides are told apart by their mean
    if high @ x / max(high.sum(), 1e-12) < (1 - high) @ x / max((1 - high).sum(), 1e-12):
        high = 1 - high
    keep = {float(v): bool(h >= 0.5 or v >= mean) for v, h in zip(values, high, strict=True)}
    return [keep[float(p)] for p in probabilities]


def _log_weibull(x: Weights, weights: Weights) -> Weights:
    """[n] log-density of the weighted maximum-likelihood Weibull; Newton on its score, which rises with the shape."""
    total, log_x = max(float(weights.sum()), 1e-12), np.log(x)
    mean_log, top = float(weights @ log_x) / total, float(log_x.max())
    shape = 1.0
    for _ in range(40):
        powers = weights * np.exp(shape * (log_x - top))
        powers /= max(float(powers.sum()), 1e-300)
        mean = float(powers @ log_x)
        score = mean - 1 / shape - mean_log
        slope = float(powers @ (log_x - mean) ** 2) + 1 / shape**2
        # At most half or double per step; a component of near-equal values must not become a spike
        new = min(max(shape - score / slope, shape / 2, 0.01), shape * 2, 50.0)
        if abs(new - shape) < 1e-9 * shape:
            break
        shape = new
    log_scale = math.log(max(float(weights @ np.exp(shape * log_x)) / total, 1e-300)) / shape
    return np.asarray(
        math.log(shape) - log_scale + (shape - 1) * (log_x - log_scale) - np.exp(shape * (log_x - log_scale))
    )
