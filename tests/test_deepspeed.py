"""The DeepSpeed trainer against the torch trainer: one and two ranks, every ZeRO stage, and what surrounds the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_images import image_prompt, pictures, save_tiny_llava, text_prompt
from helpers_ranks import Ranks, merged, rank_trainer, train, watch_gradients
from helpers_torch import (
    gradients,
    largest_difference,
    one_update,
    sample,
    samples,
    save_tiny_model,
    tiny_llama,
    trainer,
    weights_of,
)
from transformers import AutoModelForCausalLM

from ttrl.errors import ConfigError
from ttrl.metrics import MetricSet
from ttrl.model.processor import open_pictures
from ttrl.model.weights import Intake
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.trainers.deepspeed_backend import DeepSpeedTrainer
from ttrl.trainers.losses.kl import KLAnchor
from ttrl.trainers.packing import pack
from ttrl.trainers.parameters import Full, LoRA
from ttrl.trainers.process_group import Place
from ttrl.types import Sample

LR = 1e-2
GROUPS = ((5, 3, 1, 4), (2, 6, 6), (1, 1), (8,))


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def step_samples(step: int) -> list[Sample]:
    return samples(GROUPS, seed=step)


def by_torch(
    folder: Path, fields: dict[str, Any], steps: int = 2, made: Callable[[int], list[Sample]] = step_samples
) -> tuple[list[Any], list[dict[str, Any]], dict[str, Any]]:
    """Stats and clipped gradients of each step, and the weights after the last: all samples in one micro-batch."""
    ours = trainer(
        folder, temperature=0.8, parameters=LoRA(rank=2) if fields.get("lora") else Full(),
        stabilizers=(KLAnchor(coefficient=fields["kl"]),) if "kl" in fields else (),
        settings={"lr": LR, **fields.get("settings", {})},
    )  # fmt: skip
    caught: list[dict[str, Any]] = []
    original = ours._optimizer.step

    def record() -> None:
        held = gradients(ours._model)
        caught.append({name: held[name] for name in ours._trained})
        original()

    ours._optimizer.step = record  # type: ignore[method-assign, assignment]
    stats = [ours.step(step, [pack(made(step), 10_000)]) for step in range(steps)]
    return stats, caught, weights_of(ours)


def agree(stats: Sequence[Any], wanted: Sequence[Any], *, tokens: bool = True) -> None:
    for got, want in zip(stats, wanted, strict=True):
        assert got.metrics == pytest.approx(want.metrics, rel=1e-5, abs=1e-5)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=2e-5)
        assert (got.lr, got.updates) == (want.lr, want.updates)
        assert got.tokens == want.tokens or not tokens


def same_gradients(raw: dict[str, Any], clipped: dict[str, torch.Tensor], norm: float, *, clips: bool = True) -> None:
    """DeepSpeed's are seen before clipping to 1, torch's afterwards."""
    assert raw.keys() == clipped.keys() and (norm > 1.0) is clips
    divisor = norm + 1e-6 if clips else 1.0
    worst = max(float(np.abs(np.asarray(raw[n]) / divisor - clipped[n].numpy()).max()) for n in clipped)
    assert worst < 1e-5


# --- the step, compared with the torch back-end ---------------------------------------------------------------------------

CASES = [
    (0, {}, 25, (3, 1)),
    (1, {"kl": 0.1}, 25, (3, 1)),
    (2, {}, 25, (3, 1)),
    (2, {"lora": True, "kl": 0.1}, 1, (6, 4)),
    (2, {"settings": {"gradient_checkpointing": True}}, 10_000, (0, 1)),
    (3, {"kl": 0.1}, 25, (3, 1)),
    (3, {}, 10_000, (0, 1)),
    (3, {"lora": True, "kl": 0.1}, 25, (1, 3)),
    (3, {"settings": {"gradient_checkpointing": True}}, 25, (3, 1)),
]


@pytest.mark.parametrize(("zero", "fields", "budget", "counts"), CASES)
def test_two_ranks_agree_with_the_torch_backend(
    two_ranks: Ranks, tiny_model_dir: Path, zero: int, fields: dict[str, Any], budget: int, counts: tuple[int, int]
) -> None:
    """Loss, every metric, gradients and weights; one rank has fewer micro-batches, or none, and segments of other numbers."""
    wanted, clipped, weights = by_torch(tiny_model_dir, fields)
    dealt = []
    for step in range(2):
        batches = pack(step_samples(step), budget)
        assert len(batches) == sum(counts)
        dealt.append([[batches[: counts[0]]], [batches[counts[0] :]]])
    settings = {"zero": zero, "lr": LR, **fields.get("settings", {})}
    results = two_ranks(train, tiny_model_dir, {**fields, "settings": settings}, dealt)
    agree(merged(results), wanted, tokens=budget > 1)
    for rank in results:
        for step in range(2):
            same_gradients(rank["gradients"][step], clipped[step], wanted[step].grad_norm)
        assert rank["weights"].keys() == weights.keys()
        # Adam turns every gradient into a step of about lr, so this is tight for every single weight
        assert max(float(np.abs(rank["weights"][n] - weights[n].numpy()).max()) for n in weights) < 0.01 * LR


@pytest.mark.parametrize(
    ("zero", "fields", "cut"),
    [
        (2, {}, 1),
        (3, {"kl": 0.1}, 1),
        pytest.param(3, {"lora": True}, 0, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_agree_where_only_one_of_them_has_pictures(
    two_ranks: Ranks, tmp_path: Path, zero: int, fields: dict[str, Any], cut: int
) -> None:
    """The vision tower is trained by the rank that has a picture, and by all of them alike; the other has text, or nothing."""
    folder, files = save_tiny_llava(tmp_path / "model"), pictures(tmp_path / "pictures", 2)
    prompts = [image_prompt(open_pictures(str(folder)), "shown", files), text_prompt("told")]

    def made(step: int) -> list[Sample]:
        lengths = (4, 2, 5)
        rows = [(p, length, 100 * step + 10 * g + r) for g, p in enumerate(prompts) for r, length in enumerate(lengths)]
        return [replace(sample(p, length, seed), images=p.images) for p, length, seed in rows]

    wanted, clipped, weights = by_torch(folder, fields, made=made)
    dealt = [[[batches[cut:]], [batches[:cut]]] for step in range(2) for batches in [pack(made(step), 60)]]
    assert {len(parts[0]) for step in dealt for parts in step} == ({1} if cut else {0, 2})
    settings = {"zero": zero, "lr": LR}
    results = two_ranks(train, folder, {**fields, "settings": settings}, dealt)
    agree(merged(results), wanted)
    for rank in results:
        for step in range(2):
            norm = wanted[step].grad_norm
            same_gradients(rank["gradients"][step], clipped[step], norm, clips=norm > 1.0)
        assert rank["weights"].keys() == weights.keys()


@pytest.mark.parametrize(
    ("zero", "fields"), [(0, {}), (0, {"lora": True}), (1, {}), (2, {"lora": True}), (3, {}), (3, {"lora": True})]
)
def test_one_rank_agrees_with_the_torch_backend_and_prints_nothing(
    tiny_model_dir: Path, zero: int, fields: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    wanted, clipped, weights = by_torch(tiny_model_dir, fields)
    ours = rank_trainer(tiny_model_dir, **fields, settings={"zero": zero, "lr": LR})
    caught = watch_gradients(ours)
    stats = []
    for step in range(2):
        stats.append(ours.step(step, [pack(step_samples(step), 25)]))
        same_gradients(caught, clipped[step], wanted[step].grad_norm)
    agree(stats, wanted)
    assert largest_difference(weights_of(ours), weights) < 0.02 * LR
    assert ours.version == 2
    text = np.arange(3, 20, dtype=np.int32)
    table = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for name, parameter in table.named_parameters():
            parameter.copy_(weights_of(ours).get(name, parameter))
        logits = table(torch.as_tensor(text)[None].long()).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.as_tensor(text[1:, None]).long())[:, 0]
    torch.testing.assert_close(torch.as_tensor(ours.score(text)), expected, rtol=1e-4, atol=1e-4)
    ours.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert [
        line for line in err.splitlines() if "ld" not in line
    ] == []  # DeepSpeed probes for libraries with the linker


def tied_chunked(place: Place, folder: Path, dealt: Any, size: int) -> dict[str, Any]:
    from ttrl.trainers import forward

    before, forward.LOGITS_AT_ONCE = forward.LOGITS_AT_ONCE, size
    try:
        return train(place, folder, {"settings": {"zero": 3, "lr": LR}}, dealt)
    finally:
        forward.LOGITS_AT_ONCE = before


def test_zero_3_with_tied_embeddings_and_logits_in_chunks_of_unequal_number(two_ranks: Ranks, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, tiny_llama(tie_word_embeddings=True))
    wanted, clipped, _ = by_torch(folder, {}, steps=1)
    batches = pack(step_samples(0), 25)
    results = two_ranks(tied_chunked, folder, [[[batches[:3]], [batches[3:]]]], 45 * 4)  # 4 tokens per chunk
    agree(merged(results), wanted)
    same_gradients(results[1]["gradients"][0], clipped[0], wanted[0].grad_norm)


def test_updates_of_one_step_are_updates_one_after_the_other(two_ranks: Ranks, tiny_model_dir: Path) -> None:
    first, second = pack(step_samples(0), 25), pack(step_samples(1), 10_000)
    ours = trainer(tiny_model_dir, temperature=0.8, settings={"lr": LR, "updates_per_step": 2})
    wanted = ours.step(0, [pack(step_samples(0), 10_000), second])
    fields = {"settings": {"zero": 3, "lr": LR, "updates_per_step": 2}}
    results = two_ranks(train, tiny_model_dir, fields, [[[first[:2], second], [first[2:], []]]])
    agree(merged(results), [wanted])


# --- numbers that are not finite ------------------------------------------------------------------------------------------


class RootOfNothing:
    """A finite loss of zero whose gradient is not a number."""

    needs: frozenset[str] = frozenset()

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        return LossOut(loss=(out.logprobs.sum() * 0.0).abs().sqrt(), metrics=MetricSet())


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_stop_the_step_before_the_weights_move(
    tiny_model_dir: Path, zero: int, dtype: str
) -> None:
    items = step_samples(0)
    spoiled = replace(items[3], advantages=items[3].advantages * np.nan)
    for what, fields, of in (
        ("train/loss", {}, [*items[:3], spoiled, *items[4:]]),
        ("train/grad_norm", {"stabilizers": (RootOfNothing(),)}, items),
    ):
        ours = rank_trainer(tiny_model_dir, dtype=dtype, **fields, settings={"zero": zero})
        start = weights_of(ours)
        with pytest.raises(FloatingPointError, match=f"step 0, update 0: not finite: {what}"):
            ours.step(0, one_update(of, 20))
        assert largest_difference(weights_of(ours), start) == 0.0 and ours.version == 0
        ours.close()


# --- half precision, offload ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bfloat16_trains_with_float32_weights_behind_it(tiny_model_dir: Path, zero: int) -> None:
    reference = trainer(tiny_model_dir, temperature=0.8).step(0, one_update(step_samples(0)))
    ours = rank_trainer(tiny_model_dir, dtype="bfloat16", settings={"zero": zero, "lr": 1e-5})
    start, behind = weights_of(ours), float32_weights(ours)
    stats = ours.step(0, one_update(step_samples(0), 25))
    assert all(tensor.dtype == torch.bfloat16 for tensor in start.values())
    assert stats.metrics["train/loss"] == pytest.approx(reference.metrics["train/loss"], abs=0.05)
    assert stats.grad_norm == pytest.approx(reference.grad_norm, rel=0.1)
    # The first step of Adam is lr, whatever the gradient: far below the resolution of bfloat16 around 0.3, and not lost
    moved = (float32_weights(ours) - behind).abs()
    assert float(moved[moved > 0].median()) == pytest.approx(1e-5, rel=0.02)
    assert largest_difference(weights_of(ours), start) < 1e-4
    ours.close()


def float32_weights(of: DeepSpeedTrainer) -> torch.Tensor:
    from ttrl.trainers.dsstate import masters

    return torch.cat([master.detach().clone().flatten() for master in masters(of._engine)])


@pytest.mark.parametrize(
    ("zero", "offload", "lora", "dtype"),
    [
        (1, "optimizer", False, "float32"),
        (2, "optimizer", False, "bfloat16"),
        (3, "all", True, "float32"),
    ],
)
def test_offload_computes_the_same(tiny_model_dir: Path, zero: int, offload: str, lora: bool, dtype: str) -> None:
    results = []
    for where in ("none", offload):
        ours = rank_trainer(tiny_model_dir, dtype=dtype, lora=lora, settings={"zero": zero, "offload": where, "lr": LR})
        stats = [ours.step(step, one_update(step_samples(step), 25)) for step in range(2)]
        results.append((stats, weights_of(ours)))
        ours.close()
    (plain, weights), (moved, other) = results
    loose = 1e-4 if dtype == "float32" else 0.05
    assert moved[1].metrics == pytest.approx(plain[1].metrics, rel=loose, abs=loose)
    assert moved[1].grad_norm == pytest.approx(plain[1].grad_norm, rel=loose)
    assert largest_difference(other, weights) < (0.02 * LR if dtype == "float32" else 2 * LR)


# --- to engines and to disk -----------------------------------------------------------------------------------------------


def iterate(place: Place, folder: Path, fields: dict[str, Any], adapter: bool) -> dict[str, Any]:
    """Weights as an engine would take them, and how much was whole at any moment."""
    ours = rank_trainer(folder, place, **fields)
    held, largest = 0, 0
    original = ours._gather

    def counted(parameters: Sequence[Any]) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def context() -> Iterator[None]:
            nonlocal held, largest
            with original(parameters):
                sizes = sum(p.numel() * p.element_size() for p in parameters)
                held += sizes
                largest = max(largest, held)
                yield
                held -= sizes

        return context()

    ours._gather = counted  # type: ignore[method-assign]
    source = ours.weights(adapter=adapter)
    intake = Intake(source.version, source.manifest)
    whole = {name: tensor.clone() for name, tensor in intake.take(iter(source))}
    intake.finish()
    split = sum(p.numel() for p in ours._model.parameters())  # a tensor that is not whole has no elements here
    ours.close()
    return {"weights": {n: t.numpy() for n, t in whole.items()}, "largest": largest, "left": split}


@pytest.mark.parametrize("lora", [False, True])
def test_zero_3_gathers_one_tensor_at_a_time(two_ranks: Ranks, tiny_model_dir: Path, lora: bool) -> None:
    results = two_ranks(iterate, tiny_model_dir, {"lora": lora, "settings": {"zero": 3}}, False)
    start = dict(tiny_llama().named_parameters())
    for rank in results:
        assert all(np.array_equal(value, start[name].detach().numpy()) for name, value in rank["weights"].items())
        # the largest module: one tensor, or a projection [48, 32] with its two factors of rank 2
        assert rank["largest"] == (48 * 32 + (2 * (48 + 32) if lora else 0)) * 4
        assert rank["left"] == 0
    assert results[0]["weights"].keys() == (start.keys() if not lora else {n for n in start if "_proj" in n})


def test_adapters_travel_under_the_names_peft_gives_them(two_ranks: Ranks, tiny_model_dir: Path) -> None:
    from peft import get_peft_model_state_dict

    plain = trainer(tiny_model_dir, parameters=LoRA(rank=2))
    expected = get_peft_model_state_dict(plain._setup.parameters._peft)  # type: ignore[attr-defined]
    for rank in two_ranks(iterate, tiny_model_dir, {"lora": True, "settings": {"zero": 3}}, True):
        assert rank["weights"].keys() == expected.keys()
        assert all(np.array_equal(rank["weights"][name], expected[name].numpy()) for name in expected)


def interrupted(
    place: Place, folder: Path, saved: Path, fields: dict[str, Any], dealt: Any
) -> tuple[Any, Any, Any, Any]:
    """Four steps in one go, and two plus two with a save and a load in between."""
    straight = rank_trainer(folder, place, **fields)
    for step in range(2):
        straight.part(step, dealt[step][place.rank])
    straight.save(saved)
    one = [straight.part(step, dealt[step][place.rank]) for step in (2, 3)]
    expected = {n: t.float().numpy() for n, t in weights_of(straight).items()}
    straight.close()
    resumed = rank_trainer(folder, place, **fields, seed=7)
    resumed.part(0, dealt[3][place.rank])  # what was there before must not survive
    resumed.load(saved)
    assert resumed.version == 2
    now = {n: t.float().numpy() for n, t in weights_of(resumed).items()}
    resumed.scale_lr(0.5)
    assert resumed.part(2, dealt[2][place.rank]).lr == 0.5 * one[0].lr
    resumed.restore(saved, version=9)  # moments and learning rate go back too, the version does not
    assert resumed.version == 9
    two = [resumed.part(step, dealt[step][place.rank]) for step in (2, 3)]
    got = {n: t.float().numpy() for n, t in weights_of(resumed).items()}
    resumed.close()
    same = all(np.array_equal(expected[n], got[n]) for n in expected)
    moved = any(not np.array_equal(now[n], got[n]) for n in got)
    values = [[(p.metrics.values(), p.losses, p.grad_norm, p.lr) for p in parts] for parts in (one, two)]
    return same, moved, values[0] == values[1], sorted(f.name for f in saved.iterdir())


STATES = [
    (2, False, "float32", "none"),
    (3, False, "bfloat16", "none"),
    (3, True, "float32", "all"),
    (0, False, "bfloat16", "none"),
]


@pytest.mark.parametrize(("zero", "lora", "dtype", "offload"), STATES)
def test_a_loaded_trainer_continues_bit_for_bit(
    two_ranks: Ranks, tiny_model_dir: Path, tmp_path: Path, zero: int, lora: bool, dtype: str, offload: str
) -> None:
    dealt = []
    for step in range(4):
        batches = pack(step_samples(step), 25)
        dealt.append([[batches[:3]], [batches[3:]]])
    settings = {"zero": zero, "offload": offload, "schedule": "cosine", "weight_decay": 0.1, "lr": LR}
    fields = {"lora": lora, "dtype": dtype, "settings": settings}
    results = two_ranks(interrupted, tiny_model_dir, tmp_path, fields, dealt)
    assert [result[:3] for result in results] == [(True, True, True)] * 2
    kinds = ("optimizer.json", "optimizer.safetensors", "trained.safetensors")
    assert set(results[1][3]) == {"trainer.json", *(f"rank-000{rank}.{kind}" for rank in (0, 1) for kind in kinds)}


@pytest.mark.parametrize("zero", [0, 1])
def test_one_rank_continues_bit_for_bit(tiny_model_dir: Path, tmp_path: Path, zero: int) -> None:
    dealt = [[[pack(step_samples(step), 25)]] for step in range(4)]
    assert interrupted(Place(), tiny_model_dir, tmp_path, {"settings": {"zero": zero, "lr": LR}}, dealt)[:3] == (
        True,
        True,
        True,
    )


def write_state(place: Place, folder: Path, saved: Path, settings: dict[str, Any]) -> None:
    ours = rank_trainer(folder, place, settings=settings)
    ours.save(saved)
    ours.close()


def test_a_state_of_another_arrangement_is_refused(two_ranks: Ranks, tiny_model_dir: Path, tmp_path: Path) -> None:
    two_ranks(write_state, tiny_model_dir, tmp_path, {"zero": 2})
    for fields, message in (
        ({"settings": {"zero": 2}}, "written with ranks: 2, which cannot be continued with 1"),
        ({"settings": {"zero": 1}}, "written with zero: 2, which cannot be continued with 1"),
        ({"settings": {"zero": 2}, "dtype": "bfloat16"}, "written with .*: "),
        ({"settings": {"zero": 2}, "lora": True}, "written with .*: "),
    ):
        ours = rank_trainer(tiny_model_dir, **fields)
        with pytest.raises(ConfigError, match=message):
            ours.load(tmp_path)
        ours.close()


def export_after_a_step(place: Place, folder: Path, to: Path, fields: dict[str, Any], dealt: Any) -> dict[str, Any]:
    ours = rank_trainer(folder, place, **fields)
    ours.part(0, dealt[place.rank])
    ours.export(to)
    weights = {n: t.float().numpy() for n, t in weights_of(ours).items()}
    ours.close()
    return weights


@pytest.mark.parametrize(("lora", "dtype"), [(False, "float32"), (True, "float32"), (False, "bfloat16")])
def test_the_exported_model_loads_with_transformers_and_has_the_weights(
    two_ranks: Ranks, tiny_model_dir: Path, tmp_path: Path, lora: bool, dtype: str
) -> None:
    batches = pack(step_samples(0), 25)
    fields = {"lora": lora, "dtype": dtype, "settings": {"zero": 3, "lr": LR}}
    results = two_ranks(export_after_a_step, tiny_model_dir, tmp_path, fields, [[batches[:3]], [batches[3:]]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(loaded.dtype) == f"torch.{dtype}"
    held = {name: p.detach().float().numpy() for name, p in loaded.named_parameters()}
    start = dict(tiny_llama().named_parameters())
    assert all(np.array_equal(held[name], value) for name, value in results[0].items())
    assert any(not np.array_equal(held[name], start[name].detach().numpy()) for name in results[0])
    assert not lora or np.array_equal(held["lm_head.weight"], start["lm_head.weight"].detach().numpy())
