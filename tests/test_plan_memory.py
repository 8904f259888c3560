"""Bytes by hand, bytes that autograd really keeps, and the peak of a real run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ttrl.config import Recipe
from ttrl.plan.activations import Precision, kept, trained
from ttrl.plan.batch import MicroBatch, Work, cut
from ttrl.plan.devices import Fleet, parse_gpus
from ttrl.plan.memory import Layout, footprints
from ttrl.plan.options import layouts, needed, options
from ttrl.plan.shape import KNOWN, ModelShape

SHAPE = ModelShape(
    name="small", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=200, tied=True
)
ONE = Layout(placement="one process", ranks=1, workers=1)
CPU, H100 = parse_gpus("cpu").device, parse_gpus("H100").device
LORA = {"use": "lora", "with": {"rank": 4, "targets": ["q_proj", "v_proj"]}}


def recipe(**changes: Any) -> Recipe:
    """Dotted keys with two underscores."""
    tree: dict[str, Any] = {
        "name": "r", "steps": 4, "model": {"path": "m", "dtype": "float32"}, "data": {"prompts": "p.jsonl", "prompts_per_step": 4},
        "rollout": {"votes_per_prompt": 8, "max_new_tokens": 100}, "trainer": {"tokens_per_microbatch": 1000}, "cluster": {},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return Recipe.model_validate(tree)


def work(**fields: Any) -> Work:
    values = {
        "prompts": 4, "votes": 8, "trained": 8, "prompt": 20, "longest": 100, "mean": 50.0, "budget": 1000, "updates": 1, "steps": 4,
    }  # fmt: skip
    return Work(**{**values, **fields})


def items(of: Recipe, layout: Layout = ONE, shape: ModelShape = SHAPE, **fields: Any) -> dict[str, float]:
    device = CPU if layout.placement in ("one process", "processes") else H100
    found = footprints(of, shape, work(**fields), layout, device)
    return {item.what: item.bytes for footprint in found for item in footprint.items}


def test_weights_and_optimizer_by_hand():
    # Per layer: q 64x64, k and v 64x32, o 64x64, three MLP matrices 64x96, two norms; then a norm and the tied embedding
    count = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 200 * 64
    assert SHAPE.parameters == count == 74_560
    full = items(recipe(stabilizers=[{"use": "kl"}]))
    assert full["trained weights (float32)"] == full["engine weights (float32)"] == 4 * count
    assert full["reference weights (kl)"] == 4 * count and full["AdamW moments"] == 8 * count
    assert full["gradients"] == 4 * count  # several micro-batches: they wait for each other
    half = items(recipe(model__dtype="bfloat16"))
    assert half["engine weights (bfloat16)"] == 2 * count and half["trained weights (float32)"] == 4 * count


def test_adapters_have_the_only_gradients_and_moments():
    adapters = 2 * (4 * (64 + 64) + 4 * (64 + 32))
    found = items(recipe(trainer__parameters=LORA, stabilizers=[{"use": "kl"}]))
    assert found["gradients"] == 4 * adapters and found["AdamW moments"] == 8 * adapters
    assert "reference weights (kl)" not in found  # the adapters are switched off instead


def test_key_value_cache_of_the_hf_engine_by_hand():
    # 8 rows in buffers of 128 tokens (100 rounded up to 64s), the prompt's 20 once; 2 layers x (keys + values) x 2 heads x 16
    assert items(recipe(eval={"samples": 2, "k": [1]}))["KV cache"] == (20 + 8 * 128) * 2 * 2 * 32 * 4
    copied = recipe(eval={"samples": 2, "k": [1]}, rollout__engine={"use": "hf", "with": {"shared_prefix": False}})
    assert items(copied)["KV cache"] == 8 * (20 + 100) * 2 * 2 * 32 * 4


def test_zero_stages_by_hand():
    def rank(stage: int, offload: str = "none") -> dict[str, float]:
        trainer = {"backend": "deepspeed", "zero": stage, "offload": offload}
        return items(
            recipe(trainer=trainer, model__dtype="bfloat16"), Layout(placement="colocated", ranks=4, workers=4)
        )

    count = SHAPE.parameters
    # (weights, gradients, master, moments) in bytes per parameter on 4 ranks: arXiv 1910.02054, figure 1, with K = 12, but
    # gradients in float32 from stage 2 on, as trainers/dsconfig.py asks for
    expected = {0: (2, 2, 4, 8), 1: (2, 2, 1, 2), 2: (2, 1, 1, 2), 3: (0.5, 1, 1, 2)}
    for stage, (weights, gradients, master, moments) in expected.items():
        found = rank(stage)
        assert found[f"weights (bfloat16, ZeRO {stage})"] == weights * count
        assert found["gradients (update)"] - 8 * SHAPE.embedding == gradients * count
        assert found["float32 master weights"] == master * count and found["AdamW moments"] == moments * count
    assert rank(2, "optimizer")["AdamW moments"] == 0 and rank(3, "all")["weights (bfloat16, ZeRO 3)"] == 0


@pytest.mark.parametrize("shared", [True, False])
@example(prompts=4, trained=2, prompt=2, longest=4, budget=20)  # two groups, or rows of them, fit exactly
@example(prompts=4, trained=4, prompt=2, longest=4, budget=24)
@given(
    prompts=st.integers(1, 6), trained=st.integers(2, 9), prompt=st.integers(1, 30), longest=st.integers(1, 40),
    budget=st.integers(1, 400),
)  # fmt: skip
def test_micro_batches_are_those_of_the_packer(shared: bool, prompts, trained, prompt, longest, budget):
    from ttrl.trainers.packing import pack
    from ttrl.types import Sample

    ones = np.ones(longest, np.float32)
    samples = [
        Sample(
            prompt_ids=np.zeros(prompt, np.int32), completion_ids=np.zeros(longest, np.int32), group=str(group),
            sampler_logprobs=ones, advantages=ones, weights=ones,
        )
        for group in range(prompts)
        for _ in range(trained)
    ]  # fmt: skip
    packed = [tuple(len(s.lengths) for s in batch.segments) for batch in pack(samples, budget, shared_prompt=shared)]
    planned = cut(work(prompts=prompts, trained=trained, prompt=prompt, longest=longest, budget=budget), shared=shared)
    assert [batch.segments for batch in planned.kinds] == list(dict.fromkeys(packed))
    assert (planned.count, planned.segments) == (len(packed), sum(len(rows) for rows in packed))


LAYERS = 8  # with adapters the first layer keeps a little less, which the formulas leave out
DEEP = replace(SHAPE, layers=LAYERS)


def saved_by_autograd(batch: MicroBatch, *, half: bool, lora: Any, checkpointing: bool) -> float:
    """Bytes of all tensors, parameters aside, that the scorer of the trainer leaves to the backward pass."""
    import torch
    from helpers_torch import tiny_llama

    from ttrl.trainers.forward import CompletionScorer
    from ttrl.trainers.microbatch import checkpoint_layers
    from ttrl.trainers.packing import pack
    from ttrl.trainers.parameters import Full, LoRA
    from ttrl.types import Sample

    model = tiny_llama(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=200, tie_word_embeddings=True,
        num_hidden_layers=LAYERS,
    )  # fmt: skip
    if checkpointing:
        checkpoint_layers(model)
    (LoRA(**lora["with"]) if lora else Full()).attach(model, 0)
    scorer = CompletionScorer(model, 1.0, shared_prefix=not checkpointing)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, Any] = {}

    def remember(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
        return tensor

    ones = np.ones(batch.longest, np.float32)
    samples = [
        Sample(
            prompt_ids=np.zeros(batch.prompt, np.int32), completion_ids=np.arange(batch.longest, dtype=np.int32), group=str(group),
            sampler_logprobs=ones, advantages=ones, weights=ones,
        )
        for group, rows in enumerate(batch.segments)
        for _ in range(rows)
    ]  # fmt: skip
    (packed,) = pack(samples, 10**9, shared_prompt=not checkpointing)
    with (
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        scorer(packed)
    return float(sum(tensor.untyped_storage().nbytes() for tensor in held.values()))


@pytest.mark.parametrize("segments", [(6,), (5, 3)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lora", [None, LORA, {"use": "lora", "with": {"rank": 4}}])
def test_activations_are_what_autograd_keeps(segments, half, lora):
    batch = MicroBatch(segments=segments, prompt=24, longest=65, shared=True)
    part = trained(recipe(trainer__parameters=lora) if lora else recipe(), DEEP)
    how = Precision(width=2 if half else 4, autocast=half)
    found = kept(DEEP, batch, part, how, checkpointing=False)
    logprobs = 4 * batch.scored * SHAPE.vocabulary  # of the head, only this part is saved
    real = saved_by_autograd(batch, half=half, lora=lora, checkpointing=False)
    assert found.layers + found.casts + logprobs == pytest.approx(real, rel=0.06)


def test_checkpointed_layers_keep_their_inputs_only():
    batch = MicroBatch(segments=(6,), prompt=24, longest=65, shared=False)
    how = Precision(width=4, autocast=False)
    part = trained(recipe(), SHAPE)
    real = saved_by_autograd(batch, half=False, lora=None, checkpointing=True)
    one, two = (kept(replace(SHAPE, layers=n), batch, part, how, checkpointing=True).layers for n in (1, 2))
    inputs = two - one  # everything but the layer that is recomputed grows with the number of layers
    assert inputs == batch.computed * 64 * 4
    ends = batch.computed * 64 * 8 + batch.scored * 64 * 4
    assert LAYERS * inputs + ends + 4 * batch.scored * SHAPE.vocabulary == pytest.approx(real, rel=0.06)


def test_the_chunk_of_logits_is_the_trainers():
    from ttrl.plan import activations
    from ttrl.trainers import forward

    assert activations.LOGITS_AT_ONCE == forward.LOGITS_AT_ONCE


SEVEN = next(known for known in KNOWN if known.name == "Qwen2.5-7B")
ON_GPUS = recipe(
    model__dtype="bfloat16", trainer={"backend": "deepspeed", "zero": 3, "tokens_per_microbatch": 4096}, rollout={"engine": "vllm"}
)  # fmt: skip


@given(count=st.integers(1, 64), stage=st.integers(0, 3), budget=st.integers(200, 20_000))
def test_more_gpus_never_need_more_memory_per_rank(count: int, stage: int, budget: int):
    changed = ON_GPUS.model_copy(update={"trainer": ON_GPUS.trainer.model_copy(update={"zero": stage})})
    some = [
        footprints(changed, SEVEN, work(budget=budget), Layout(placement="split", ranks=n, workers=1), H100)[0]
        for n in (count, count + 1)
    ]
    slack = 2 * min(500_000_000, SEVEN.parameters) if count == 1 else 0  # the first exchange brings its buckets
    assert some[1].peak <= some[0].peak + slack * 1.001


@given(budget=st.integers(1, 20_000), more=st.integers(1, 5_000), lora=st.booleans(), half=st.booleans())
def test_larger_micro_batches_never_need_less(budget: int, more: int, lora: bool, half: bool):
    changed = recipe(trainer__parameters=LORA if lora else "full", model__dtype="bfloat16" if half else "float32")
    sizes = [footprints(changed, SHAPE, work(budget=b), ONE, CPU)[0].at("train") for b in (budget, budget + more)]
    # A single micro-batch has no gradients of earlier ones waiting
    assert sizes[1] >= sizes[0] - 1.25 * 4 * SHAPE.parameters


def test_processes_of_one_machine_add_up():
    several = recipe(cluster={"backend": "ray", "workers": 3, "ranks": 2}, trainer={"backend": "deepspeed"})
    (layout,) = layouts(several, parse_gpus("cpu"), "colocated")
    found = footprints(several, SHAPE, work(), layout, CPU)
    assert [(f.who, f.count) for f in found] == [("driver", 1), ("rollout worker", 3), ("trainer rank", 2)]
    assert needed(layout, found) == found[0].peak + 3 * found[1].peak + 2 * found[2].peak


def test_a_colocated_vllm_sleeps_while_the_trainer_works_unless_it_samples_ahead():
    one = Layout(placement="colocated", ranks=2, workers=2)
    ahead = ON_GPUS.model_copy(update={"rollout": ON_GPUS.rollout.model_copy(update={"ahead": 1})})
    (asleep,), (awake,) = (footprints(r, SEVEN, work(), one, H100) for r in (ON_GPUS, ahead))
    engine = 2 * SEVEN.parameters
    assert awake.at("train") - asleep.at("train") > engine and awake.at("sample") >= asleep.at("sample")


def test_the_own_placement_comes_first():
    fleet = Fleet(H100, 8)
    assert [o.name for o in options(ON_GPUS, SEVEN, work(), fleet, 1.0)] == ["colocated", "split", "split, ahead 1"]
    split = ON_GPUS.model_copy(update={"cluster": ON_GPUS.cluster.model_copy(update={"placement": "split"})})
    assert options(split, SEVEN, work(), fleet, 1.0)[0].name == "split"
    ahead = split.model_copy(update={"rollout": split.rollout.model_copy(update={"ahead": 2})})
    assert options(ahead, SEVEN, work(), fleet, 1.0)[0].name == "split, ahead 2"


SMALL = {
    "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1024,
    "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
KINDS = {
    "full with kl": ["stabilizers=[{use: kl}]", "trainer.tokens_per_microbatch=2048"],
    "lora": ["trainer.parameters={use: lora, with: {rank: 4}}", "trainer.tokens_per_microbatch=4096"],
    "checkpointed": ["trainer.gradient_checkpointing=true", "trainer.tokens_per_microbatch=4096"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_of_a_real_run_is_within_a_quarter(kind: str, tmp_path: Path):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))
    from plan_memory import RECIPE, compare, make_model

    own = tmp_path / "memory.yaml"
    own.write_text(RECIPE.replace("MODEL", str(make_model(tmp_path / "model", **SMALL))))
    many = ["data.prompts_per_step=4", "data.limit=4", "rollout.votes_per_prompt=8"]
    result = compare(tmp_path, "run", str(own), [*many, *KINDS[kind]])
    assert result.ratio == pytest.approx(1.0, abs=0.25), result
    assert result.measured > 800, "the run is no larger than the interpreter, so this shows nothing"
