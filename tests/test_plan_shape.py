"""Shapes of models, devices and prompts: read, counted, or refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ttrl.errors import ConfigError
from ttrl.plan.devices import DEVICES, parse_gpus
from ttrl.plan.shape import KNOWN, find_shape, read_shape, shape_of_size

# Published parameter counts of the models (sum of their safetensors)
COUNTS = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
}


def test_known_models_have_their_published_number_of_parameters():
    assert {known.name: known.parameters for known in KNOWN} == COUNTS


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
        ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 24}),
        ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    ],
)
def test_parameters_are_those_of_transformers(kind: str, fields: dict[str, Any], tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=300,
        **fields,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(tmp_path / "config.json", "x")
    assert shape.parameters == model.num_parameters()
    assert shape.source == "config.json"
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, _, _ in shape.linears} == names - {"lm_head"}


def test_keys_and_values_per_token_by_hand():
    shape = next(known for known in KNOWN if known.name == "Llama-3.1-8B")
    assert shape.kv_per_token == 2 * 32 * 8 * 128  # 128 KiB in bfloat16
    assert shape.query == 4096 and shape.kv == 1024


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["cannot be read"]),
        ("[]", ["not a JSON object"]),
        ('{"model_type": "gpt2", "n_embd": 8}', ["hidden_size", "gpt2", "--params"]),
        ('{"model_type": "mixtral", "num_local_experts": 8}', ["mixture of experts", "--params"]),
        ('{"hidden_size": true, "num_hidden_layers": -1}', ["hidden_size, num_hidden_layers"]),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(text: str, parts: list[str], tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as refused:
        find_shape(str(tmp_path))
    assert all(part in str(refused.value) for part in parts), refused.value


def test_layers_with_windows_cannot_share_a_prompt(tmp_path):
    config = {
        "model_type": "mistral", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "vocab_size": 9, "layer_types": ["sliding_attention"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not find_shape(str(tmp_path)).shared_prefix


def test_a_known_model_needs_no_files_and_an_unknown_one_is_refused_with_the_nearest_name():
    assert find_shape("Qwen/Qwen2.5-7B-Instruct").parameters == COUNTS["Qwen2.5-7B"]
    with pytest.raises(ConfigError, match=r"Did you mean 'Qwen2.5-Math-7B'.*--params 7B"):
        find_shape("Qwen/Qwen2.5-Mth-7B")


@pytest.mark.parametrize(("text", "size"), [("7B", 7e9), ("350m", 350e6), ("1.5B", 1.5e9), ("32B", 32e9)])
def test_a_size_gives_a_shape_of_about_that_size(text: str, size: float):
    assert shape_of_size(text).parameters == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("text", ["7", "B", "-7B", "0B", "7G", "1e9B", "99999B"])
def test_a_size_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="--params"):
        shape_of_size(text)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("8xH100", 8, "H100"), ("H100", 1, "H100"), ("2 X a100-80gb", 2, "A100"), ("16*l40s", 16, "L40S"), ("4xA100-40G", 4, "A100-40G")],
)  # fmt: skip
def test_gpus(text: str, count: int, name: str):
    fleet = parse_gpus(text)
    assert (fleet.count, fleet.device.name) == (count, name)


def test_no_gpus_is_the_cpu_of_this_machine():
    assert parse_gpus(None).device.is_cpu and parse_gpus("cpu").device.memory > 2**28
    assert parse_gpus("cpu", memory=5e9).device.memory == 5e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH10", "Did you mean 'H100'"), ("8xTPU", "unknown device"), ("0xH100", "from 1 to"), ("99999xH100", "from 1 to"),
        ("8", "COUNTxDEVICE"), ("-1xH100", "COUNTxDEVICE"), ("", "COUNTxDEVICE"),
    ],
)  # fmt: skip
def test_gpus_that_are_none_are_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_gpus(text)


def test_figures_of_devices_are_sane():
    for device in DEVICES:
        assert 20e9 < device.memory < 200e9 and 50e12 < device.flops < 3e15 and 0.2e12 < device.bandwidth < 10e12
        assert 0.1 < device.price < 20
