"""The shape of a decoder-only language model, read from its config.json, from a table, or made up for a size."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ttrl.config.explain import suggest
from ttrl.errors import ConfigError
from ttrl.model_path import config_file

Linear = tuple[str, int, int]
"""Name of a projection, its inputs and its outputs."""

GATED = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Model types whose parameters are counted exactly; tests hold llama, qwen2 and qwen3 against transformers."""
_MIXTURE = ("num_experts", "num_local_experts", "n_routed_experts")
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes in elements. One layer: attention with grouped keys and values, a gated MLP, two norms without bias."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """the head is the embedding"""
    qkv_bias: bool = False
    qk_norm: bool = False
    shared_prefix: bool = True
    """every layer attends to everything, so the prompt of a group can be computed once (ttrl/model/prefix.py)"""
    positions: int | None = None
    source: str = "table"

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all keys of one token; its values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The projections of one layer."""
        return (
            ("q_proj", self.hidden, self.query), ("k_proj", self.hidden, self.kv), ("v_proj", self.hidden, self.kv),
            ("o_proj", self.query, self.hidden), ("gate_proj", self.hidden, self.intermediate),
            ("up_proj", self.hidden, self.intermediate), ("down_proj", self.intermediate, self.hidden),
        )  # fmt: skip

    @property
    def layer_matrices(self) -> int:
        """Weights of the projections of one layer."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    @property
    def layer_parameters(self) -> int:
        bias = self.query + 2 * self.kv if self.qkv_bias else 0
        return self.layer_matrices + bias + 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; an untied head has as many again."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def kv_per_token(self) -> int:
        """Elements of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv


def _known(name: str, sizes: tuple[int, ...], *, tied: bool, qkv_bias: bool, positions: int) -> ModelShape:
    layers, hidden, heads, kv_heads, intermediate, vocabulary = sizes
    return ModelShape(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=hidden // heads,
        intermediate=intermediate, vocabulary=vocabulary, tied=tied, qkv_bias=qkv_bias, positions=positions,
    )  # fmt: skip


# From the models' own config.json; the parameter counts they give are those of the model cards (tests/test_plan_shape.py)
KNOWN = (
    _known("SmolLM2-135M", (30, 576, 9, 3, 1536, 49152), tied=True, qkv_bias=False, positions=8192),
    _known("Qwen2.5-0.5B", (24, 896, 14, 2, 4864, 151936), tied=True, qkv_bias=True, positions=32768),
    _known("Qwen2.5-Math-1.5B", (28, 1536, 12, 2, 8960, 151936), tied=True, qkv_bias=True, positions=4096),
    _known("Qwen2.5-7B", (28, 3584, 28, 4, 18944, 152064), tied=False, qkv_bias=True, positions=32768),
    _known("Qwen2.5-Math-7B", (28, 3584, 28, 4, 18944, 152064), tied=False, qkv_bias=True, positions=4096),
    _known("Llama-3.1-8B", (32, 4096, 32, 8, 14336, 128256), tied=False, qkv_bias=False, positions=131072),
    _known("Qwen2.5-32B", (64, 5120, 40, 8, 27648, 152064), tied=False, qkv_bias=True, positions=32768),
    _known("Llama-3.1-70B", (80, 8192, 64, 8, 28672, 128256), tied=False, qkv_bias=False, positions=131072),
)


def find_shape(path: str, size: str | None = None) -> ModelShape:
    """The shape behind `model.path`: a folder, the bundle, the hub cache, the table of known models; or `--params`, if given.

    Raises ConfigError when none of them helps, or for a model this cannot count.
    """
    if size is not None:
        return shape_of_size(size)
    file = config_file(path)
    if file is not None:
        return read_shape(file, path)
    name = path.rstrip("/").split("/")[-1]
    plain = re.sub(r"-(instruct|base|it|chat)$", "", name.lower())
    for known in KNOWN:
        if known.name.lower() == plain:
            return replace(known, source=f"table ({known.name}); {path} is not on this machine")
    names = [known.name for known in KNOWN]
    raise ConfigError(
        f"model.path {path!r}: no config.json there or in the hub cache, and not one of the known models "
        f"({', '.join(names)}).{suggest(name, names)} Plan for a size instead: --params 7B"
    )


def read_shape(file: Path, path: str) -> ModelShape:
    """From a config.json. Raises ConfigError for a file that is missing, broken or of another kind of model."""
    where = f"model.path {path!r}"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: this folder holds no model (no config.json)") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {file.name} cannot be read: {error}") from None
    remedy = "give the size instead: --params 7B"
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: {file.name} is not a JSON object; {remedy}")
    seeing = "; its vision tower is not counted" if config.get("vision_config") else ""
    config = config.get("text_config") or config
    kind = str(config.get("model_type", "unknown"))
    if any(config.get(key) for key in _MIXTURE):
        raise ConfigError(f"{where}: {kind} is a mixture of experts, which ttrl plan cannot count; {remedy}")
    missing = [key for key in _NEEDED if not _is_size(config.get(key))]
    if missing:
        raise ConfigError(f"{where}: {file.name} has no usable {', '.join(missing)} (model type {kind!r}); {remedy}")
    heads = config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim")
    if not _is_size(kv_heads) or not (head_dim is None or _is_size(head_dim)):
        raise ConfigError(f"{where}: {file.name} has no usable num_key_value_heads or head_dim; {remedy}")
    return ModelShape(
        name=path, layers=config["num_hidden_layers"], hidden=config["hidden_size"], heads=heads,
        kv_heads=kv_heads, head_dim=head_dim or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"], vocabulary=config["vocab_size"],
        # What transformers takes when the file does not say: Llama, Qwen and Mistral configs are untied
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")), qk_norm=kind == "qwen3",
        shared_prefix=not set(config.get("layer_types") or ()) - {"full_attention"},
        positions=config.get("max_position_embeddings"),
        source=("config.json" if kind in GATED else f"config.json (type {kind}, counted as if it were llama)") + seeing,
    )  # fmt: skip


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def shape_of_size(text: str) -> ModelShape:
    """`7B` or `350M`: the known model nearest in size, with as many layers as give that size. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MB])", text.strip(), re.IGNORECASE)
    wanted = float(match[1]) * {"M": 1e6, "B": 1e9}[match[2].upper()] if match else 0.0
    if not 1e6 <= wanted <= 1e12:
        raise ConfigError(
            f"--params {text!r}: give a number of parameters between 1M and 1000B, for example 350M or 7B"
        )
    near = min(KNOWN, key=lambda known: max(known.parameters / wanted, wanted / known.parameters))
    rest = near.parameters - near.layers * near.layer_parameters
    layers = max(1, round((wanted - rest) / near.layer_parameters))
    return replace(
        near,
        name=text,
        layers=layers,
        positions=None,
        source=f"--params {text} (the shape of {near.name}, {layers} layers)",
    )
