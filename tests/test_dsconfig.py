"""What a recipe may say to DeepSpeed, without DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from ttrl.config import load_recipe
from ttrl.config.schema import TrainerSection
from ttrl.errors import ConfigError
from ttrl.setup import check_recipe
from ttrl.trainers.dsconfig import REFUSED, deepspeed_config, merged, overrides, report_overrides


def settings(**fields: Any) -> TrainerSection:
    return TrainerSection.model_validate({"backend": "deepspeed", **fields})


def nested(dotted: str) -> dict[str, Any]:
    """`a.b` -> {a: {b: 1}}."""
    head, _, rest = dotted.partition(".")
    return {head: nested(rest) if rest else 1}


def test_the_configuration_follows_the_recipe() -> None:
    plain = deepspeed_config(settings(grad_clip=0.5, betas=[0.8, 0.9], weight_decay=0.1), "float32", gpu=False)
    assert plain["zero_optimization"] == {"stage": 2} and plain["gradient_clipping"] == 0.5
    assert plain["optimizer"]["params"] == {"lr": 0.0, "betas": [0.8, 0.9], "weight_decay": 0.1, "torch_adam": True}
    assert not plain["bf16"]["enabled"] and "data_types" not in plain
    half = deepspeed_config(settings(zero=3, offload="all"), "bfloat16", gpu=True)
    host = {"device": "cpu", "pin_memory": True}
    assert half["zero_optimization"] == {
        "stage": 3, "stage3_max_reuse_distance": 0, "offload_optimizer": host, "offload_param": host,
    }  # fmt: skip
    assert half["bf16"]["enabled"] and half["data_types"] == {"grad_accum_dtype": "fp32"}
    assert half["optimizer"]["params"]["torch_adam"] is False  # DeepSpeed's own kernel for states in host memory
    assert deepspeed_config(settings(zero=3), "bfloat16", gpu=True)["optimizer"]["params"]["torch_adam"] is True


def test_a_raw_configuration_is_merged_key_by_key_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    raw = {
        "gradient_clipping": 0.5,
        "zero_optimization": {"overlap_comm": True, "contiguous_gradients": False},
        "bf16": {},
    }
    section = settings(zero=1, grad_clip=1.0, deepspeed=raw)
    config = deepspeed_config(section, "float32", gpu=False)
    assert config["gradient_clipping"] == 0.5 and config["train_micro_batch_size_per_gpu"] == 1
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": True, "contiguous_gradients": False}
    with caplog.at_level(logging.WARNING):
        report_overrides(section, "float32", gpu=False)
    assert [record.message for record in caplog.records] == [
        "trainer.deepspeed sets gradient_clipping: 1.0 -> 0.5",
        "trainer.deepspeed sets zero_optimization.overlap_comm: DeepSpeed's default -> True",
        "trainer.deepspeed sets zero_optimization.contiguous_gradients: DeepSpeed's default -> False",
    ]


def test_merging_leaves_its_arguments_alone() -> None:
    ours = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(ours, {"a": {"b": 5}, "d": {"e": 4}}) == {"a": {"b": 5, "c": 2}, "d": {"e": 4}}
    assert ours == {"a": {"b": 1, "c": 2}, "d": 3}
    assert list(overrides(ours, {"a": {"b": 1}, "d": 3})) == []


DEEPSPEED = "trainer.backend=deepspeed"


def refused(*changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_recipe(load_recipe("quickstart", list(changes)))
    return str(caught.value)


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_would_change_the_meaning_of_a_step_are_refused(key: str) -> None:
    said = refused(DEEPSPEED, f"trainer.deepspeed={json.dumps(nested(key))}")
    assert f"trainer.deepspeed: {key} cannot be set here:" in said


def test_settings_that_do_not_go_together_are_refused() -> None:
    assert "trainer.offload needs trainer.zero of at least 1" in refused(
        DEEPSPEED, "trainer.zero=0", "trainer.offload=optimizer"
    )
    assert "needs zero: 3" in refused(DEEPSPEED, "trainer.offload=all")
    assert "more than one worker or rank needs cluster.backend: ray" in refused(DEEPSPEED, "cluster.ranks=2")
    assert "set trainer.backend: deepspeed" in refused("trainer.zero=3")
    check_recipe(load_recipe("quickstart", [DEEPSPEED, "trainer.zero=3", "trainer.offload=all"]))


def test_the_command_line_exits_with_2_and_names_every_key() -> None:
    raw = "trainer.deepspeed={fp16: {enabled: true}, train_batch_size: 8}"
    run = [sys.executable, "-m", "ttrl.cli", "check", "quickstart", DEEPSPEED, raw]
    result = subprocess.run(run, capture_output=True, text=True)
    said = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == 2, said
    assert (
        "fp16 cannot be set here" in said and "train_batch_size cannot be set here" in said and "Traceback" not in said
    )


def test_a_missing_deepspeed_is_told_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else found(name, *a))
    assert "pip install 'ttrl[cluster]'" in refused(DEEPSPEED)
