"""vLLM against the HF engine on the bundled model, and the cost of new weights, all in one run and one process.

    python scripts/bench/vllm_engine.py [--prompts 32] [--votes 16] [--layers 30] [--width 576]

Reports ratios of times taken in turns, so that other load on the machine hits both sides. The reload part uses random weights of
the shape of SmolLM2-135M (30 layers, width 576, vocabulary 49 152, tied head): time does not depend on their values.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ttrl.config.load import bundled
from ttrl.config.schema import ModelSection
from ttrl.model.weights import NamedTensors, load_weights
from ttrl.prompts import read_prompts, tokenize
from ttrl.rollout.engines import hf, vllm
from ttrl.types import Request, SamplingSpec


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def sampling(prompts: int, votes: int, repeats: int) -> None:
    """Tokens per second of both engines on the same requests, alternately."""
    model = ModelSection(path="bundled:tiny-adder", device="cpu", threads=1)
    took, ours = seconds(lambda: vllm(model, lambda: None, kv_cache_gib=0.5))
    print(f"vLLM: started in {took:.1f} s")
    engines = {"vllm": ours, "hf": hf(model, lambda: None)}
    records = read_prompts(
        "bundled:tiny-adder/train.prompts.jsonl", prompt_field="prompt", id_field="id", limit=prompts
    )
    group = tokenize(records, ours.tokenizer, "raw", None)
    for entropy in (False, True):
        spec = SamplingSpec(max_new_tokens=40, entropy=entropy)
        requests = [
            Request(prompt=p, index=i, seed=1000 * k + i, spec=spec) for k, p in enumerate(group) for i in range(votes)
        ]
        speed: dict[str, list[float]] = {name: [] for name in engines}
        for repeat in range(repeats + 1):
            for name, engine in engines.items():
                took, rollouts = seconds(partial(engine.generate, requests))
                if repeat:  # the first is for warming up
                    speed[name].append(sum(len(r.token_ids) for r in rollouts) / took)
        medians = {name: statistics.median(values) for name, values in speed.items()}
        print(
            f"{prompts} prompts x {votes} votes, entropy {entropy}: vllm {medians['vllm']:.0f} tokens/s, "
            f"hf {medians['hf']:.0f}, ratio {medians['vllm'] / medians['hf']:.2f}"
        )


def reloading(layers: int, width: int, repeats: int) -> None:
    """All weights once, against vLLM's own reload of the same tensors without our checks, copies and fingerprint."""
    shape = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3, head_dim=width // 9,
        intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        random = LlamaForCausalLM(shape)
        random.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(bundled("bundled:tiny-adder"))).save_pretrained(folder)
        took, engine = seconds(
            lambda: vllm(
                ModelSection(path=str(Path(folder)), device="cpu"), lambda: None, kv_cache_gib=0.5, max_model_len=512
            )
        )
    named = dict(random.named_parameters())
    size = sum(tensor.numel() * 4 for tensor in named.values())
    source = NamedTensors(
        1, {n: tuple(t.shape) for n, t in named.items()}, lambda: iter((n, t.detach()) for n, t in named.items())
    )
    print(f"{size / 2**20:.0f} MiB of weights in {len(named)} tensors: started in {took:.1f} s")
    ours, theirs = [], []
    for repeat in range(repeats + 1):
        mine, own = seconds(lambda: load_weights(engine, source))[0], seconds(lambda: plain_reload(engine, named))[0]
        if repeat:
            ours.append(mine)
            theirs.append(own)
    mine, own = statistics.median(ours), statistics.median(theirs)
    print(f"sync {mine:.2f} s, vLLM's own reload {own:.2f} s, ratio {mine / own:.2f}")


@torch.no_grad()
def plain_reload(engine: Any, named: dict[str, torch.Tensor]) -> None:
    """What vLLM's own transfer engines do on arrival."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    below = engine._vllm
    model = below.model_executor.driver_worker.worker.get_model()
    with set_current_vllm_config(below.vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights((name, tensor.detach()) for name, tensor in named.items())
        finalize_layerwise_reload(model, below.model_config)
    below.reset_prefix_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--votes", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    sampling(given.prompts, given.votes, given.repeats)
    reloading(given.layers, given.width, given.repeats)


if __name__ == "__main__":
    main()
