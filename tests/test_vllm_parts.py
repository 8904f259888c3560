"""The parts around vLLM that need no vLLM: the recipe check, files, and what only a GPU does, with a fake in vLLM's place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_torch import EOS, prompt, request, save_tiny_model, section, tiny_llama
from peft import PeftModel

from ttrl.config import load_recipe
from ttrl.errors import ConfigError, EngineError
from ttrl.model.weights import NamedTensors, load_weights
from ttrl.registry import check
from ttrl.rollout import vllm_engine
from ttrl.rollout.engines import vllm
from ttrl.rollout.vllm_files import Checkpoint, incomplete, stop_ids, write_adapter
from ttrl.rollout.vllm_start import RANKS, built_rank
from ttrl.setup import check_recipe
from ttrl.types import AdapterSpec, SamplingSpec


def test_a_recipe_that_needs_vllm_says_how_to_get_it(monkeypatch) -> None:
    recipe = load_recipe("lab/vllm-quickstart")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    with pytest.raises(
        ConfigError, match=r"'vllm' needs the package 'vllm'.*pip install 'ttrl.*scripts/setup_vllm_cpu"
    ):
        check_recipe(recipe)
    # Python takes any folder of that name on its path for a package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ConfigError, match="not installed"):
        check("engine", recipe.rollout.engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be above 0 and at most 1, got 1.5"),
        (
            {"kv_cache_gib": 0.0, "max_num_seqs": -1},
            "max_num_seqs must be at least 1, got -1; kv_cache_gib must be above 0",
        ),
        ({"lora_rank": 600}, "lora_rank must be from 1 to 512, got 600"),
    ],
)
def test_options_out_of_range_are_named(tiny_model_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vllm(section(tiny_model_dir), lambda: None, **options)


def test_every_rank_finds_one_that_vllm_can_be_built_for() -> None:
    assert [built_rank(r) for r in (1, 2, 8, 9, 64, 65, 512)] == [1, 8, 8, 16, 64, 128, 512]
    assert all(built_rank(r) == r for r in RANKS)


@pytest.mark.parametrize("eos", [[EOS, 20], EOS])
def test_end_tokens_come_from_the_generation_config_else_from_the_model(tmp_path: Path, eos: Any) -> None:
    folder = save_tiny_model(tmp_path, eos=eos)
    assert stop_ids(folder) == ([EOS, 20] if isinstance(eos, list) else [EOS])
    (folder / "generation_config.json").unlink()
    assert stop_ids(folder) == [EOS]


class Names(set):
    """Names of a checkpoint."""


def test_the_rest_of_a_fused_layer_is_found_once() -> None:
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "o_proj": ["o_proj"]}
    files: Any = Names(f"l.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj"))
    both = {"l.q_proj.weight": (1,), "l.v_proj.weight": (1,)}
    assert incomplete(both, fused, files, set()) == {"l.q_proj.weight": ["l.k_proj.weight"]}
    assert incomplete({"l.v_proj.weight": (1,), "l.o_proj.weight": (1,)}, fused, files, set()) == {
        "l.v_proj.weight": ["l.q_proj.weight", "l.k_proj.weight"]
    }
    assert incomplete(dict.fromkeys(files, (1,)), fused, files, set()) == {}
    with pytest.raises(
        EngineError, match=r"q_proj.weight is part of a fused layer of vLLM, but l.k_proj.weight was not sent"
    ):
        incomplete(both, fused, files, {"l.k_proj.weight"})
    with pytest.raises(EngineError, match=r"l.k_proj.weight was not sent"):
        incomplete(both, fused, Names(both), set())


def test_a_written_adapter_is_what_peft_reads(tiny_model_dir: Path) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"base_model.model.{layer}.lora_A.weight": torch.randn(2, 32),
        f"base_model.model.{layer}.lora_B.weight": torch.randn(32, 2),
    }
    folder = write_adapter(AdapterSpec(rank=2, alpha=6.0, targets=(layer,)), tensors)
    model = tiny_llama()
    before = model.get_submodule(layer).weight.clone()
    read = PeftModel.from_pretrained(model, folder.name).merge_and_unload()
    a, b = tensors.values()
    torch.testing.assert_close(read.get_submodule(layer).weight, before + 6.0 / 2 * b @ a)
    path = Path(folder.name)
    folder.cleanup()
    assert not path.exists()


class FakeVLLM:
    """The few things a VLLMEngine asks of vLLM's LLMEngine, on something that is not a CPU."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.wakes, self.resets, self.asleep = True, True, False
        self.model_config = SimpleNamespace(max_model_len=64)
        self.vllm_config = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"))

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append((method, *([n for n, _ in args[0]] if method == "ttrl_receive" else args)))
        return [{}]

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))
        self.asleep = True

    def wake_up(self) -> None:
        self.calls.append(("wake_up",))
        self.asleep = not self.wakes

    def is_sleeping(self) -> bool:
        return self.asleep

    def reset_prefix_cache(self) -> bool:
        return self.resets

    def reset_encoder_cache(self) -> None:
        self.calls.append(("reset_encoder_cache",))


@pytest.fixture
def fake(monkeypatch, tiny_model_dir: Path) -> tuple[Any, FakeVLLM]:
    below = FakeVLLM()
    monkeypatch.setattr(vllm_engine, "start", lambda folder, model, options: below)
    return vllm(section(tiny_model_dir), lambda: None), below


def whole(folder: Path, version: int) -> NamedTensors:
    files = Checkpoint(folder)
    return NamedTensors(version, {name: tuple(tensor.shape) for name, tensor in files}, lambda: iter(files))


def test_a_sleeping_engine_keeps_its_weights_and_takes_no_work(fake, tiny_model_dir: Path) -> None:
    """New weights for a sleeping engine would be replaced by the old ones when it wakes up."""
    engine, below = fake
    engine.release()
    assert below.calls[-1] == ("sleep", 1), "level 2 would lose the weights of a step that trained nothing"
    with pytest.raises(EngineError, match="left the accelerator"):
        engine.generate([request(prompt("a"), 0, SamplingSpec(max_new_tokens=2))])
    with pytest.raises(EngineError, match="left the accelerator"):
        engine.score(np.arange(5, dtype=np.int32))
    with pytest.raises(EngineError, match="restore it first"):
        load_weights(engine, whole(tiny_model_dir, 1))
    engine.restore()
    assert below.calls[-1] == ("wake_up",)
    load_weights(engine, whole(tiny_model_dir, 1))
    assert engine.ping().weights.version == 1


def test_an_engine_that_does_not_wake_up_is_an_error(fake) -> None:
    engine, below = fake
    engine.release()
    below.wakes = False
    with pytest.raises(EngineError, match="did not wake up"):
        engine.restore()


def test_a_prefix_cache_that_stays_is_an_error(fake, tiny_model_dir: Path) -> None:
    engine, below = fake
    below.resets = False
    with pytest.raises(EngineError, match="did not drop its prefix cache"):
        load_weights(engine, whole(tiny_model_dir, 1))


def test_weights_reach_vllm_between_begin_and_end(fake, tiny_model_dir: Path) -> None:
    engine, below = fake
    names = [name for name, _ in Checkpoint(tiny_model_dir)]
    before, below.calls = engine.ping().weights, []
    assert load_weights(engine, whole(tiny_model_dir, 1)) == before.fingerprint
    end = [
        ("ttrl_end", True),
        ("reset_encoder_cache",),
    ]  # what an old vision tower saw would be taken for what the new one sees
    assert below.calls == [("ttrl_begin",), *(("ttrl_receive", name) for name in names), *end]
    below.calls = []
    load_weights(engine, whole(tiny_model_dir, 2))
    assert below.calls == [("ttrl_begin",), ("ttrl_receive", *names), *end]
    below.calls = []
    engine.begin_load(3, dict(whole(tiny_model_dir, 3).manifest))
    engine.load(iter(whole(tiny_model_dir, 3)), lasting=True)
    engine.end_load()
    assert below.calls == [("ttrl_begin",), ("ttrl_receive", *names), ("ttrl_let_go",), *end]
