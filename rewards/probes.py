"""Judging forced answers with the reader that judged the votes: a probe is right when it gives the label of its group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ttrl.rewards.reader import AnswerReader
from ttrl.types import NO_ANSWER, Scored


def judged(scored: Scored, reader: AnswerReader) -> Scored:
    """`scored` with `probe_rewards` [K]: 1 for the label, 0 for another answer or none.

    Unchanged for a group without probes. Without a label nothing can be right or wrong: probe_rewards stays None. Metrics:
    `probe_answered`, the share of probes with an answer (forced answers that the reader cannot read count as wrong, so
    watch it), and `probe_mean`, their mean reward.
    """
    probes = scored.group.probes
    if not probes:
        return scored
    classes, forms = reader.classes(reader.read(probes))
    metrics = {**scored.metrics, "probe_answered": float(np.mean([c != NO_ANSWER for c in classes]))}
    if scored.label is None:
        return replace(scored, metrics=metrics)
    right = reader.match_form(forms, scored.label)
    rewards = np.asarray([float(c != NO_ANSWER and forms[c] == right) for c in classes], np.float32)
    return replace(
        scored, probe_rewards=rewards, metrics={**metrics, "probe_mean": float(rewards.mean(dtype=np.float64))}
    )
