"""Losses, aggregations and the KL of TRL's GRPO trainer, value and gradient, on the same model and the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_torch import forward_out, gradients, largest_difference, samples, tensors, tiny_llama
from test_losses import BETA, TEMPERATURE, near_policy, trl_inputs, trl_trainer

from ttrl.config.schema import Plug
from ttrl.registry import build
from ttrl.trainers.forward import CompletionScorer
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.packing import pack

LONGEST = 16
"""max_completion_length of the peer."""

CLIP = {"clip": [0.2, 0.3]}
GSPO = {"loss": {"use": "gspo", "with": {"geo_clip": [0.2, 0.3]}}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {**CLIP, "aggregate": "sequence"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {**CLIP, "aggregate": "fixed", "fixed_length": LONGEST}),
    "dapo": ({"loss_type": "dapo"}, CLIP),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, {"loss": {"use": "cispo", "with": {"is_max": 1.2}}}),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, GSPO),
    "gspo by length": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, {**GSPO, "aggregate": "token"}),
    "k3_ratio": ({"loss_type": "dapo", "use_bias_correction_kl": True}, {**CLIP, "kind": "k3_ratio"}),
}


@pytest.fixture(scope="module")
def peer(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl_trainer(tiny_model_dir, tmp_path_factory.mktemp("trl"), "grpo", None)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_those_of_trl(peer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings, options = CASES[name]
    kl = {"use": "kl", "with": {"coefficient": BETA, "kind": options.get("kind", "k3")}}
    ours = {key: value for key, value in options.items() if key != "kind"}
    made: GRPO = build("objective", Plug.model_validate({"use": "grpo", "with": {**ours, "regularizers": [kl]}}))
    for key, value in settings.items():
        monkeypatch.setattr(peer.args if key == "use_bias_correction_kl" else peer, key, value)

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
