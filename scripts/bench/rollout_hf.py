"""Tokens per second of ttrl's HF engine and of `transformers` `generate`, on the same prompts, model and settings in one run.

    python scripts/bench/rollout_hf.py                                   # the bundled tiny model
    python scripts/bench/rollout_hf.py --model models/smollm2-135m-instruct

Both sample groups of `--votes` completions per prompt at temperature 1 from the full softmax, in float32, one group per
batch; both return token ids, and log-probs of the drawn tokens (`generate` through `output_logits` and a log-softmax over
them, because rollouts for training are useless without). `--no-logprobs` lets `generate` skip that. The two are timed in turn
and the ratio is taken pair by pair; the median counts. Completions end at EOS or `--new-tokens`, as the model decides. One
torch thread by default: on two cores both were fastest so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from ttrl.config.schema import ModelSection
from ttrl.model.load import eos_ids, load_model, load_tokenizer
from ttrl.rollout.engines import hf
from ttrl.seeds import derive
from ttrl.types import Message, Prompt, Request, SamplingSpec


def make_prompts(vocabulary: int, length: int, count: int) -> list[Prompt]:
    """Random prompts: what they say does not matter for speed, their length does. Low ids hold the special tokens."""
    rng = np.random.default_rng(0)
    return [
        Prompt(
            id=f"bench-{i}",
            messages=(Message(role="user", content=""),),
            token_ids=rng.integers(min(8, vocabulary // 2), vocabulary, size=length).astype(np.int32),
        )
        for i in range(count)
    ]


def run_ttrl(section: ModelSection, prompts: list[Prompt], votes: int, spec: SamplingSpec) -> Callable[[int], int]:
    """A function that samples everything once and returns the number of tokens."""
    engine = hf(section, lambda: None)

    def sample(repeat: int) -> int:
        requests = [
            Request(prompt=p, index=i, seed=derive(repeat, p.id, i), spec=spec) for p in prompts for i in range(votes)
        ]
        return sum(len(rollout.token_ids) for rollout in engine.generate(requests))

    return sample


def run_generate(
    section: ModelSection, prompts: list[Prompt], votes: int, spec: SamplingSpec, logprobs: bool
) -> Callable[[int], int]:
    """The same through transformers' generate."""
    model, tokenizer = load_model(section), load_tokenizer(section.path)
    eos = list(eos_ids(model, tokenizer))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]

    def sample(repeat: int) -> int:
        torch.manual_seed(repeat)
        tokens = 0
        for prompt in prompts:
            ids = torch.as_tensor(prompt.token_ids, dtype=torch.long)[None]
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=spec.max_new_tokens, num_return_sequences=votes, eos_token_id=eos, pad_token_id=pad,
                    return_dict_in_generate=True, output_logits=logprobs,
                )  # fmt: skip
                new = out.sequences[:, ids.shape[1] :]
                if logprobs:
                    torch.stack([
                        torch.log_softmax(step.float(), -1).gather(1, new[:, t : t + 1])[:, 0]
                        for t, step in enumerate(out.logits)
                    ])  # fmt: skip
            ended = torch.isin(new, torch.tensor(eos)).int()
            before_end = (ended.cumsum(1) - ended) == 0
            tokens += int(before_end.sum())
        return tokens

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:tiny-adder")
    parser.add_argument("--votes", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-logprobs", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    section = ModelSection(path=arguments.model, device="cpu")
    vocabulary = load_model(section).config.vocab_size
    prompts = make_prompts(vocabulary, arguments.prompt_tokens, arguments.prompts)
    spec = SamplingSpec(max_new_tokens=arguments.new_tokens)
    ours = run_ttrl(section, prompts, arguments.votes, spec)
    theirs = run_generate(section, prompts, arguments.votes, spec, not arguments.no_logprobs)
    speeds: dict[str, list[float]] = {"ttrl": [], "generate": []}
    for repeat in range(arguments.repeats + 1):
        for name, sample in (("ttrl", ours), ("generate", theirs)):
            start = time.perf_counter()
            tokens = sample(repeat)
            if repeat:  # the first round warms up
                speeds[name].append(tokens / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(speeds["ttrl"], speeds["generate"], strict=True)]
    print(
        f"{arguments.model}: {arguments.prompts} groups of {arguments.votes}, {arguments.prompt_tokens} prompt tokens,"
    )
    print(f"at most {arguments.new_tokens} new tokens, {arguments.threads} threads, {arguments.repeats} repeats")
    for name, values in speeds.items():
        print(f"  {name:<9} {statistics.median(values):9.0f} tokens/s  (min {min(values):.0f}, max {max(values):.0f})")
    print(f"  ratio     {statistics.median(ratios):9.2f}           (min {min(ratios):.2f}, max {max(ratios):.2f})")


if __name__ == "__main__":
    main()
