"""Going back within a run: weights, moments and learning rate are those of the state, byte for byte; versions go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_torch import largest_difference, one_update, samples, trainer, weights_of
from safetensors.torch import load_file

from ttrl.trainers.torch_backend import TorchTrainer

COSINE = {"schedule": "cosine", "weight_decay": 0.1}


def saved(ours: TorchTrainer, folder: Path) -> dict[str, torch.Tensor]:
    """Weights and moments, as files have them."""
    folder.mkdir()
    ours.save(folder)
    return {
        f"{file}/{name}": tensor
        for file in ("trained", "optimizer")
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def test_a_restored_trainer_has_the_bytes_of_the_state_and_a_new_version(tiny_model_dir: Path, tmp_path: Path) -> None:
    ours, straight = (trainer(tiny_model_dir, settings=COSINE) for _ in range(2))
    for step in range(2):
        ours.step(step, one_update(samples(seed=step)))
        straight.step(step, one_update(samples(seed=step)))
    before = saved(ours, tmp_path / "healthy")
    assert any(name.startswith("optimizer/") and bool(tensor.any()) for name, tensor in before.items())
    ours.step(2, one_update(samples(seed=2)))
    moved = saved(ours, tmp_path / "moved")
    assert all(not torch.equal(moved[name], before[name]) for name in before if name.startswith("optimizer/"))
    ours.restore(tmp_path / "healthy", version=4)
    assert ours.version == ours.weights().version == 4
    after = saved(ours, tmp_path / "restored")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The step that was undone leaves no trace in the next one
    assert ours.step(3, one_update(samples(seed=3))) == straight.step(3, one_update(samples(seed=3)))
    assert largest_difference(weights_of(ours), weights_of(straight)) == 0.0


def test_an_older_version_is_a_mistake_of_the_caller(tiny_model_dir: Path, tmp_path: Path) -> None:
    ours = trainer(tiny_model_dir)
    ours.save(tmp_path)
    ours.step(0, one_update(samples()))
    with pytest.raises(AssertionError, match="would not follow"):
        ours.restore(tmp_path, version=1)


def test_a_scaled_learning_rate_acts_is_reported_and_survives_a_resume(tiny_model_dir: Path, tmp_path: Path) -> None:
    ours, plain = (trainer(tiny_model_dir, settings=COSINE) for _ in range(2))
    start = weights_of(plain)
    ours.scale_lr(0.5)
    ours.scale_lr(0.25)
    slow, fast = ours.step(0, one_update(samples())), plain.step(0, one_update(samples()))
    assert slow.lr == 0.125 * fast.lr
    ratio = largest_difference(weights_of(ours), start) / largest_difference(weights_of(plain), start)
    assert ratio == pytest.approx(0.125, rel=1e-2)  # Adam's first step is as long as its learning rate
    ours.save(tmp_path)
    resumed = trainer(tiny_model_dir, settings=COSINE)
    resumed.load(tmp_path)
    assert resumed.step(1, one_update(samples(seed=1))) == ours.step(1, one_update(samples(seed=1)))
    assert largest_difference(weights_of(resumed), weights_of(ours)) == 0.0
