#!/usr/bin/env python3
"""MRT's STaR variant: keep what made progress, imitate it with TRL's SFTTrainer, repeat.

    python scripts/mrt_star.py lab/mrt-star --output runs/star [--rounds 1] [--lr 1e-4] [--epochs 1] [key=value ...]

The recipe says everything but the fine-tuning: model, prompts, sampling, how a rollout is stopped (`objective: mrt` with
`form: episodes`) and which answer counts as right (the pseudo-label of its reward; references only with `gold` and allow_labels).
Each round samples every prompt once, selects (`ttrl.trainers.star`) and fine-tunes the model of the round before.
Writes OUTPUT/round-N/model and OUTPUT/star.jsonl, one object per round. Needs trl (and a GPU for models that need one).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ttrl.config import load_recipe
from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.probing import equip
from ttrl.prompts import check_room, tokenize
from ttrl.protocols import RewardContext
from ttrl.registry import build
from ttrl.rewards.probes import judged
from ttrl.rewards.reader import reader_of
from ttrl.seeds import derive
from ttrl.setup import Checked, build_sampler, check_recipe
from ttrl.stopping import StopSwitch
from ttrl.trainers.mrt import MRT
from ttrl.trainers.star import Demonstration, select
from ttrl.types import SamplingSpec


def collect(checked: Checked, number: int, most: int, min_gain: float) -> tuple[list[Demonstration], dict[str, Any]]:
    """One round of sampling: the demonstrations, and what the votes and probes looked like."""
    from ttrl.rollout.pool import LocalPool

    recipe, objective = checked.recipe, build("objective", checked.recipe.objective)
    if not isinstance(objective, MRT) or recipe.objective.options.get("form") != "episodes":
        raise ConfigError("the STaR variant needs objective: {use: mrt, with: {form: episodes, ...}}")
    rollout, reader = recipe.rollout, reader_of(checked.reward, checked.reader)
    with StopSwitch() as switch:
        pool = LocalPool(build("engine", rollout.engine, recipe.model, switch.check))
        prompts = tokenize(checked.records, pool.tokenizer, recipe.data.template, recipe.data.max_prompt_tokens)
        spec = SamplingSpec(
            max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature, top_p=rollout.top_p,
            top_k=rollout.top_k, min_p=rollout.min_p,
        )  # fmt: skip
        extra = equip(objective, pool.tokenizer, spec, recipe.seed)
        check_room(prompts, rollout.max_new_tokens + extra, pool.max_positions)
        sampler = build_sampler(recipe, checked.reward, checked.reader)
        groups = sampler(prompts, pool, spec, derive(recipe.seed, "star", number))
        groups = [replace(g, probes=tuple(pool.generate(objective.probes(g)))) for g in groups]
    kept: list[Demonstration] = []
    labelled = probe_tokens = 0
    means = []
    for group in groups:
        context = RewardContext(step=number, seed=derive(recipe.seed, "reward", number, group.prompt.id))
        scored = judged(checked.reward(group, context), reader)
        probe_tokens += sum(len(probe.token_ids) for probe in group.probes)
        if scored.label is None or not scored.train.any():
            continue
        labelled += 1
        means.append(float(scored.rewards.mean()))
        probed = [p for p in objective.probed(scored) if scored.train[p.index]]
        kept += select(scored, probed, objective.prober.termination, most=most, min_gain=min_gain)
    facts = {
        "round": number, "prompts": len(groups), "labelled": labelled, "reward_mean": float(np.mean(means or [0.0])),
        "rollout_tokens": sum(len(r.token_ids) for g in groups for r in g.rollouts), "probe_tokens": probe_tokens,
        "kept": len(kept), "kept_cut": float(np.mean([d.cut for d in kept] or [0])),
        "kept_tokens": float(np.mean([len(d.completion_ids) for d in kept] or [0])),
        "gain": float(np.mean([d.gain for d in kept] or [0.0])),
    }  # fmt: skip
    return kept, facts


def fine_tune(recipe: Recipe, demonstrations: list[Demonstration], folder: Path, args: argparse.Namespace) -> float:
    """TRL's SFTTrainer on the completions (prompts carry no loss). Saves to `folder`; returns the mean training loss."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from ttrl.model.load import load_model, resolve_path

    rows = {
        "input_ids": [[*d.prompt_ids.tolist(), *d.completion_ids.tolist()] for d in demonstrations],
        "completion_mask": [[0] * len(d.prompt_ids) + [1] * len(d.completion_ids) for d in demonstrations],
    }
    cpu = recipe.model.device == "cpu"
    settings = SFTConfig(
        output_dir=str(folder / "trl"), use_cpu=cpu, bf16=not cpu, gradient_checkpointing=not cpu, report_to=[],
        save_strategy="no", per_device_train_batch_size=args.batch, num_train_epochs=args.epochs, learning_rate=args.lr,
        lr_scheduler_type="constant", logging_steps=10, seed=recipe.seed, disable_tqdm=True, completion_only_loss=True,
        max_length=None,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(recipe.model.path))
    trainer = SFTTrainer(
        model=load_model(recipe.model), args=settings, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
    )
    loss = float(trainer.train().training_loss)
    trainer.model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--most", type=int, default=4, help="demonstrations per prompt and round")
    parser.add_argument("--min-gain", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    args.output.mkdir(parents=True, exist_ok=True)
    for number in range(args.rounds):
        folder = args.output / f"round-{number}"
        kept, facts = collect(check_recipe(recipe), number, args.most, args.min_gain)
        if not kept:
            raise SystemExit(f"round {number}: no rollout made progress, so there is nothing to imitate: {facts}")
        facts["loss"] = fine_tune(recipe, kept, folder, args)
        with (args.output / "star.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        print(json.dumps(facts))
        model = recipe.model.model_copy(update={"path": str(folder / "model")})
        recipe = recipe.model_copy(update={"model": model})


if __name__ == "__main__":
    main()
