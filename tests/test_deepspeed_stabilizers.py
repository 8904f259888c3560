"""Stabilizers on DeepSpeed ranks: the same entries, weights and teacher as in the torch trainer, at every stage that is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_ranks import Ranks, merged, numpied, rank_trainer
from helpers_torch import samples, tiny_llama, trainer, weights_of

from ttrl.hooks import Part, Update
from ttrl.trainers.packing import pack
from ttrl.trainers.parameters import Full, LoRA
from ttrl.trainers.process_group import Place
from ttrl.trainers.stabilizers.ema import EMATeacher
from ttrl.trainers.stabilizers.fisher import FisherAnchor
from ttrl.trainers.stabilizers.reset import FullReset
from ttrl.trainers.stabilizers.restore import StochasticRestore, drawn
from ttrl.trainers.stabilizers.spikes import GradNormFilter

LR = 1e-2
GROUPS = ((5, 3, 1, 4), (2, 6, 6), (1, 1), (8,))


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def stabilizers(kind: str) -> tuple[Any, ...]:
    """Fresh ones; `plain` needs gradients and therefore stage 0 in float32."""
    acting = (EMATeacher(decay=0.5), StochasticRestore(p=0.3))
    if kind == "plain":
        return (FisherAnchor(coefficient=3.0, rollouts=20), GradNormFilter(quantile=0.5, factor=1.0, warmup=1), *acting)
    return (*acting, FullReset(below=1e9)) if kind == "reset" else acting


def dealt(step: int, rank: int) -> list[list[Any]]:
    batches = pack(samples(GROUPS, seed=step), 25)
    return [batches[:3] if rank == 0 else batches[3:]]


def on_ranks(place: Place, folder: Path, kind: str, fields: dict[str, Any], saved: Path | None) -> dict[str, Any]:
    """Three steps; with `saved`, the third after a save and a load into another trainer."""
    ours = rank_trainer(folder, place, stabilizers=stabilizers(kind), **fields)
    parts = [ours.part(step, dealt(step, place.rank)) for step in range(2)]
    if saved is not None:
        ours.save(saved)
        ours.close()
        ours = rank_trainer(folder, place, stabilizers=stabilizers(kind), **fields)
        ours.part(0, dealt(5, place.rank))  # what was there before must not survive
        ours.load(saved)
    parts.append(ours.part(2, dealt(2, place.rank)))
    with ours.teaching():
        teacher = numpied(weights_of(ours))
    weights = numpied(weights_of(ours))
    ours.close()
    return {"parts": parts, "weights": weights, "teacher": teacher}


def by_torch(folder: Path, kind: str, *, lora: bool = False) -> dict[str, Any]:
    ours = trainer(
        folder, temperature=0.8, stabilizers=stabilizers(kind), parameters=LoRA(rank=2) if lora else Full(), settings={"lr": LR}
    )  # fmt: skip
    stats = [ours.step(step, [pack(samples(GROUPS, seed=step), 10_000)]) for step in range(3)]
    with ours.teaching():
        teacher = numpied(weights_of(ours))
    return {"stats": stats, "weights": numpied(weights_of(ours)), "teacher": teacher}


CASES = [
    (0, "plain", False, "float32"), (0, "acting", False, "bfloat16"), (1, "acting", True, "float32"),
    (2, "reset", False, "float32"), (2, "acting", False, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("zero", "kind", "lora", "dtype"), CASES)
def test_two_ranks_do_what_the_torch_trainer_does(
    two_ranks: Ranks, tiny_model_dir: Path, tmp_path: Path, zero: int, kind: str, lora: bool, dtype: str
) -> None:
    fields = {"lora": lora, "dtype": dtype, "settings": {"zero": zero, "lr": LR}}
    straight = two_ranks(on_ranks, tiny_model_dir, kind, fields, None)
    for one, two in zip(straight, two_ranks(on_ranks, tiny_model_dir, kind, fields, tmp_path), strict=True):
        assert one["parts"][2].losses == two["parts"][2].losses
        for what in ("weights", "teacher"):
            assert all(np.array_equal(one[what][n], two[what][n]) for n in one[what])
    for what in ("weights", "teacher"):
        assert all(np.array_equal(straight[0][what][n], straight[1][what][n]) for n in straight[0][what])
    wanted = by_torch(tiny_model_dir, kind, lora=lora)
    for got, want in zip(merged(straight), wanted["stats"], strict=True):
        assert got.may_stand == want.may_stand
        if dtype == "float32":
            assert got.metrics == pytest.approx(want.metrics, rel=1e-3, abs=1e-4)
    if kind == "plain":
        assert {want.metrics["train/vetoed"] for want in wanted["stats"]} == {0.0, 1.0}
    for what in ("weights", "teacher"):
        assert straight[0][what].keys() == wanted[what].keys()
        off = {n: np.abs(straight[0][what][n] - wanted[what][n]) for n in wanted[what]}
        # Half precision turns the sign of small gradients, and Adam makes a whole step of each: only the mean is bounded there
        assert max(float(o.max() if dtype == "float32" else o.mean()) for o in off.values()) < 0.05 * LR * (
            1 if dtype == "float32" else 10
        )
    if not lora and kind == "acting":
        last = Update(seed=0, step=2, number=0, loss=0.0, entropy=0.0, grad_norm=1.0)
        for name, start in tiny_llama().named_parameters():
            whole = Part(name=name, shape=tuple(start.shape), first=0, weights=start.detach().flatten(), moments={})
            entries = drawn(whole, 0.3, last)
            held = start.detach().to(getattr(torch, dtype)).float().numpy().reshape(-1)
            now = straight[0]["weights"][name].reshape(-1)
            assert len(entries) and np.array_equal(now[entries], held[entries]) and not np.array_equal(now, held)


def test_zero_0_alone_restores_everything_exactly(tiny_model_dir: Path) -> None:
    for zero in (0, 2):
        ours = rank_trainer(tiny_model_dir, stabilizers=(StochasticRestore(p=1.0),), settings={"zero": zero, "lr": LR})
        start = weights_of(ours)
        stats = ours.step(0, [pack(samples(GROUPS), 25)])
        assert stats.may_stand and stats.metrics["train/restored"] == 1.0
        assert all(np.array_equal(tensor, start[name]) for name, tensor in weights_of(ours).items())
        ours.close()
