"""Peak memory that `ttrl plan` predicts for CPU runs, against what the runs then measure.

    python scripts/bench/plan_memory.py            # all, about ten minutes on two cores
    python scripts/bench/plan_memory.py tiny lora  # some

Every run is `ttrl train` in a process of its own; measured is the peak resident memory of that process as the kernel counted it
(wait4), next to what the run itself wrote into summary.json. The model of the larger runs has the shape of SmolLM2-135M and random
weights, made on the fly; what a model knows does not change its memory. The constants of ttrl/plan/memory.py were measured once,
on `full-kl` and on a run of the bundled model with 2 x 2 votes; every other run here is a prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SMOL = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
RECIPE = """
name: memory
steps: 2
model: {path: MODEL, device: cpu, threads: 1}
data: {prompts: "bundled:tiny-adder/train.prompts.jsonl", template: raw, limit: 4, prompts_per_step: 2}
rollout: {votes_per_prompt: 8, max_new_tokens: 64}
reward: random
trainer: {lr: 1.0e-5, tokens_per_microbatch: 512}
eval: {samples: 2, k: [1], limit: 1, max_new_tokens: 8, extractor: math}
"""
KL = "stabilizers=[{use: kl}]"
LORA = "trainer.parameters={use: lora, with: {rank: 8, targets: [q_proj, k_proj, v_proj, o_proj]}}"
# bfloat16 products are slow on a CPU without instructions for them, so there are fewer tokens
HALF = ("model.dtype=bfloat16", "rollout.votes_per_prompt=2", "rollout.max_new_tokens=16", "eval.max_new_tokens=2")
# name -> recipe (None: the one above), overrides
RUNS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "tiny": ("quickstart", ("steps=2", "eval.limit=4")),
    "full-kl": (None, (KL,)),
    "full-large-batch": (None, ("trainer.tokens_per_microbatch=1200",)),
    "lora": (None, (LORA, KL)),
    "bf16": (None, (*HALF, KL)),
    "lora-bf16": (None, (*HALF, LORA)),
    "checkpointing": (None, ("trainer.gradient_checkpointing=true",)),
    "long": (None, ("rollout.max_new_tokens=256", "rollout.votes_per_prompt=4", "trainer.tokens_per_microbatch=1024")),
}


@dataclass(frozen=True, slots=True)
class Result:
    """MiB."""

    predicted: float
    measured: float
    reported: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def make_model(folder: Path, **shape: int | bool) -> Path:
    """A Llama with random weights and the tokenizer of the bundled model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ttrl.config.load import ASSETS

    torch.manual_seed(0)
    config = LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=2048, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "tiny-adder" / name, folder)
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from ttrl.cli import main; main()", *arguments]


def predict(recipe: str, overrides: list[str]) -> float:
    """What `ttrl plan --json` says. A machine too small for the run (exit 1) is no matter here."""
    done = subprocess.run(command("plan", recipe, *overrides, "--json"), capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    return float(max(item["peak_bytes"] for item in json.loads(done.stdout)["placements"][0]["memory"])) / 2**20


def measure(recipe: str, overrides: list[str], output: Path) -> tuple[float, float]:
    """(peak of the process, what summary.json says), MiB. Raises SystemExit with the end of its output when the run fails."""
    log = output.with_suffix(".log")
    with log.open("w") as stream:
        child = subprocess.Popen(
            command("train", recipe, *overrides, "--output", str(output)), stdout=stream, stderr=stream
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"the run failed:\n{log.read_text()[-2000:]}")
    summary = json.loads((output / "summary.json").read_text())
    per_mib = 1024 if sys.platform != "darwin" else 2**20
    return usage.ru_maxrss / per_mib, float(summary["peak_memory_mb"])


def compare(folder: Path, name: str, recipe: str, overrides: list[str]) -> Result:
    """One run and its prediction."""
    predicted = predict(recipe, overrides)
    return Result(predicted, *measure(recipe, overrides, folder / name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help=f"default: all of {', '.join(RUNS)}")
    chosen = parser.parse_args().runs or list(RUNS)
    if unknown := set(chosen) - RUNS.keys():
        parser.error(f"unknown runs {sorted(unknown)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = folder / "memory.yaml"
        if any(RUNS[name][0] is None for name in chosen):
            own.write_text(RECIPE.replace("MODEL", str(make_model(folder / "model", **SMOL))))
        print(f"{'run':<18} {'predicted':>10} {'measured':>10} {'ratio':>6}   MiB", flush=True)
        for name in chosen:
            recipe, overrides = RUNS[name]
            result = compare(folder, name, recipe or str(own), list(overrides))
            print(f"{name:<18} {result.predicted:>10.0f} {result.measured:>10.0f} {result.ratio:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
