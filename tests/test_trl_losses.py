"""Losses, aggregations, KL and entropies of TRL's GRPO trainer, values and gradients, on the same model and the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_torch import PAD, forward_out, gradients, largest_difference, samples, tensors, tiny_llama, tiny_tokenizer

from ttrl.config.schema import Plug
from ttrl.registry import build
from ttrl.trainers.forward import CompletionScorer
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.packing import pack
from ttrl.types import Sample

TEMPERATURE = 0.7
BETA = 0.04
LONGEST = 16
"""max_completion_length of the peer."""

CLIP = {"clip": [0.2, 0.3]}
GSPO = {"loss": {"use": "gspo", "with": {"geo_clip": [0.2, 0.3]}}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {**CLIP, "aggregate": "sequence"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {**CLIP, "aggregate": "fixed", "fixed_length": LONGEST}),
    "dapo": ({"loss_type": "dapo"}, CLIP),
    "bnpo": ({"loss_type": "bnpo"}, CLIP),  # the mean over the batch, which here is the whole step
    # TRL's two-sided clip caps the ratio; for negative advantages that is the dual clip, for positive ones the clip is tighter
    "two-sided": ({"loss_type": "dapo", "delta": 1.5}, {**CLIP, "dual_clip": 1.5}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, {"loss": {"use": "cispo", "with": {"is_max": 1.2}}}),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, GSPO),
    "gspo by length": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, {**GSPO, "aggregate": "token"}),
    "k3_ratio": ({"loss_type": "dapo", "use_bias_correction_kl": True}, {**CLIP, "kind": "k3_ratio"}),
}


def trl_trainer(folder: Path, output: Path) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    made = trl.GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(output), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            per_device_train_batch_size=8, gradient_accumulation_steps=1, num_generations=2, max_completion_length=LONGEST,
            beta=BETA, epsilon=0.2, epsilon_high=0.3, temperature=TEMPERATURE,
            use_bias_correction_kl=False,  # by default TRL multiplies the k3 term by the ratio
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1"] * 8}),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    made.current_gradient_accumulation_steps = 1  # set by the training loop, which is not run here
    return made


def trl_inputs(items: Sequence[Sample], ref_logprobs: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """What TRL's own generation step hands to its loss: prompts padded left, completions right."""
    prompts, longest = max(len(s.prompt_ids) for s in items), max(len(s.completion_ids) for s in items)

    def table(values: Sequence[np.ndarray], width: int, fill: float, left: bool, dtype: torch.dtype) -> torch.Tensor:
        rows = torch.full((len(values), width), fill, dtype=dtype)
        for row, value in zip(rows, values, strict=True):
            start = width - len(value) if left else 0
            row[start : start + len(value)] = torch.as_tensor(value)
        return rows

    def right(values: Sequence[np.ndarray]) -> torch.Tensor:
        return table(values, longest, 0.0, False, torch.float32)

    return {
        "prompt_ids": table([s.prompt_ids for s in items], prompts, PAD, True, torch.long),
        "prompt_mask": table([np.ones_like(s.prompt_ids) for s in items], prompts, 0, True, torch.long),
        "completion_ids": table([s.completion_ids for s in items], longest, PAD, False, torch.long),
        "completion_mask": table([np.ones_like(s.completion_ids) for s in items], longest, 0, False, torch.long),
        "advantages": torch.tensor([float(s.advantages[0]) for s in items]),
        "old_per_token_logps": right([s.sampler_logprobs for s in items]),
        "ref_per_token_logps": right(ref_logprobs),
        "num_items_in_batch": torch.tensor(float(sum(len(s.completion_ids) for s in items))),
    }


def near_policy(items: Sequence[Sample], logprobs: np.ndarray, seed: int) -> list[Sample]:
    """The samples with weight 1 and sampler log-probs around the policy's own, so that some ratios are clipped."""
    rng, start, moved = np.random.default_rng(seed), 0, []
    for item in items:
        length = len(item.completion_ids)
        own = logprobs[start : start + length]
        start += length
        moved.append(
            Sample(
                prompt_ids=item.prompt_ids, completion_ids=item.completion_ids, advantages=item.advantages,
                weights=np.ones(length, np.float32), group=item.group,
                sampler_logprobs=(own + rng.normal(0, 0.5, size=length)).astype(np.float32),
            )
        )  # fmt: skip
    return moved


@pytest.fixture(scope="module")
def peer(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl_trainer(tiny_model_dir, tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_those_of_trl(peer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings, options = CASES[name]
    kl = {"use": "kl", "with": {"coefficient": BETA, "kind": options.get("kind", "k3")}}
    ours = {key: value for key, value in options.items() if key != "kind"}
    made: GRPO = build("objective", Plug.model_validate({"use": "grpo", "with": {**ours, "regularizers": [kl]}}))
    for key, value in settings.items():
        monkeypatch.setattr(peer.args if key in ("use_bias_correction_kl", "delta") else peer, key, value)

    # Lengths fall within a group, so that packing does not reorder and both sides see the rows in one order
    items = samples(((7, 5, 3, 1), (6, 6, 2)), seed=3)
    model = tiny_llama()
    scorer = CompletionScorer(model, TEMPERATURE)
    with torch.no_grad():
        items = near_policy(items, scorer(pack(items, 10_000)[0]).logprobs.numpy(), seed=5)
    finished, _ = made.finish(items, 0)
    packed = pack(finished, 10_000, made.denominator(finished))[0]
    ref = packed.sampler_logprobs + np.random.default_rng(6).normal(0, 0.5, len(packed.sampler_logprobs)).astype(
        np.float32
    )
    out = made.loss(forward_out(scorer(packed).logprobs, torch.as_tensor(ref)), tensors(packed))
    out.loss.backward()
    if name != "k3_ratio":
        assert 0.1 < out.metrics.values()["train/clip_fraction"] < 0.9  # both branches are in use

    splits = np.cumsum([len(item.completion_ids) for item in items])[:-1]
    peer.model.zero_grad(set_to_none=True)
    theirs = peer.compute_loss(peer.model, trl_inputs(items, np.split(ref, splits)))
    theirs.backward()
    # LUSPO multiplies by the length and divides by the rows; ours divides by the tokens
    factor = len(items) / packed.tokens_in_step if settings["loss_type"] == "luspo" else 1.0
    expected = {key: factor * value for key, value in gradients(peer.model).items()}
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 1e-3
    assert float(out.loss.detach()) == pytest.approx(factor * float(theirs.detach()), abs=2e-6)
    assert largest_difference(gradients(model), expected) < 1e-5 * scale


def test_trl_entropies_and_logprobs_equal_ours(peer: Any) -> None:
    items = samples(((7, 5, 3, 1), (6, 6, 2)), seed=4)
    inputs = trl_inputs(items, [np.zeros(len(item.completion_ids)) for item in items])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    keep = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        logprobs, entropy, _ = peer._get_per_token_logps_and_entropies(
            peer.model, ids, mask, keep, compute_entropy=True
        )
        ours = CompletionScorer(tiny_llama(), TEMPERATURE)(pack(items, 10_000)[0])
    inside = inputs["completion_mask"].bool()
    torch.testing.assert_close(ours.logprobs, logprobs[inside], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, entropy[inside], rtol=1e-5, atol=1e-5)
