"""Runs on prompts with pictures, from file to report: a tiny random LLaVA, trained whole and through adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from helpers_images import image_prompt, picture, pictures, row_scores, save_tiny_llava, text_prompt
from helpers_torch import gradients, largest_difference, one_update, request, sample, section, trainer, weights_of
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from ttrl.config import Recipe, load_recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.command import EvalCall, evaluate_model
from ttrl.model.load import load_tokenizer
from ttrl.model.processor import open_pictures
from ttrl.model.weights import load_weights
from ttrl.plan.command import PlanCall, make_plan
from ttrl.prompts import tokenize
from ttrl.rollout.engines import hf
from ttrl.run import run
from ttrl.setup import check_recipe
from ttrl.solve import SolveCall, solve
from ttrl.sync import canary_text
from ttrl.trainers.packing import pack
from ttrl.trainers.parameters import Full, LoRA
from ttrl.types import Prompt, Sample, SamplingSpec

SPEC = SamplingSpec(max_new_tokens=8)
RECIPE = """
name: pictures
steps: 2
model: {{path: {model}, device: cpu}}
data: {{prompts: prompts.jsonl, prompts_per_step: 3}}
rollout: {{votes_per_prompt: 8, max_new_tokens: 1, temperature: 0.4}}
reward:
  use: majority_vote
  with: {{extractor: label, options: {{labels: [{labels}]}}, truncated_votes: true}}
trainer: {{lr: 0.003, warmup: 0.0}}
stabilizers: [{{use: kl, with: {{coefficient: 0.001}}}}]
guards: [{{use: sentinel}}]
eval: {{samples: 4, k: [1, 4]}}
log: {{groups_per_step: 3}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


def prompts(model: Path, folder: Path) -> list[Prompt]:
    """One picture, two pictures, none."""
    files, made_by = pictures(folder, 3), open_pictures(str(model))
    return [image_prompt(made_by, "one", files[:1]), image_prompt(made_by, "two", files[1:]), text_prompt("none")]


def samples(of: list[Prompt]) -> list[Sample]:
    return [
        replace(sample(p, length, 10 * g + r), images=p.images)
        for g, p in enumerate(of)
        for r, length in enumerate((4, 6, 3))
    ]


@pytest.mark.parametrize("parameters", [Full, lambda: LoRA(rank=2), lambda: LoRA(rank=2, vision=True)])
def test_what_a_step_trains_reaches_the_engine_and_the_exported_model(
    model: Path, tmp_path: Path, parameters: Any
) -> None:
    of = prompts(model, tmp_path / "pictures")
    ours = trainer(model, parameters=parameters(), settings={"lr": 0.02})
    before = weights_of(ours)
    for step in range(2):
        ours.step(step, one_update(samples(of)))
    moved = {name for name, tensor in weights_of(ours).items() if not torch.equal(tensor, before[name])}
    of_vision = {name for name in moved if "language_model" not in name and "lm_head" not in name}
    expected = isinstance(ours._setup.parameters, Full) or ours._setup.parameters._vision
    assert bool(of_vision) is expected and moved - of_vision
    engine = hf(section(model), lambda: None)
    load_weights(engine, ours.weights())
    wanted = [request(p, i, SPEC) for p in of for i in range(2)]
    drawn = engine.generate(wanted)

    rows = [(item.prompt, r.token_ids) for item, r in zip(wanted, drawn, strict=True)]
    scored = [replace(samples([p])[0], completion_ids=ids, group=str(i)) for i, (p, ids) in enumerate(rows)]
    scored = [
        replace(
            s, **{k: np.ones(len(s.completion_ids), np.float32) for k in ("advantages", "weights", "sampler_logprobs")}
        )
        for s in scored
    ]
    with torch.no_grad():
        found = torch.cat([ours._loss.scorer(batch).logprobs for batch in pack(scored, 1)])
    np.testing.assert_allclose(np.concatenate([r.logprobs for r in drawn]), found, atol=2e-5)

    ours.export(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    for (p, ids), rollout in zip(rows, drawn, strict=True):
        if processor.image_token_id not in ids:
            with torch.no_grad():
                np.testing.assert_allclose(
                    row_scores(loaded, processor, [(p, ids)], 1.0)[0], rollout.logprobs, atol=2e-5
                )


def test_adapters_stay_out_of_the_vision_tower_whatever_their_targets(model: Path) -> None:
    def layers(**options: Any) -> list[str]:
        loaded = AutoModelForImageTextToText.from_pretrained(model)
        lora = LoRA(rank=2, **options)
        lora.attach(loaded, 0)
        return lora._layers

    assert len(layers()) == 2 * 7 and all("language_model" in name for name in layers())
    assert all("language_model" in name for name in layers(targets=["q_proj", "lm_head"]) if "lm_head" not in name)
    assert {"vision_tower" in name for name in layers(targets=["q_proj"], vision=True)} == {True, False}


def test_recomputed_layers_give_the_same_gradients(model: Path, tmp_path: Path) -> None:
    [batches] = one_update(samples(prompts(model, tmp_path)))
    results = []
    for checkpointing in (False, True):
        ours = trainer(model, settings={"gradient_checkpointing": checkpointing})
        sum(ours._loss(batch, first=True).loss for batch in batches).backward()
        results.append(gradients(ours._model))
    largest = max(float(value.abs().max()) for value in results[0].values())
    assert largest_difference(*results) < 1e-5 * largest


def files(folder: Path, model: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Prompts, their pictures and a recipe."""
    names = [picture(folder / "shown" / f"{i}.png", seed=i).name for i in range(6)]
    rows = rows or [{"id": name, "prompt": "which?", "images": [f"shown/{name}"]} for name in names]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model, labels=", ".join(ascii_lowercase)))
    return folder / "recipe.yaml"


def recipe_of(folder: Path, model: Path, *changes: str) -> Recipe:
    return load_recipe(files(folder, model), [f"output={folder / 'run'}", *changes])


def quiet() -> Console:
    return Console(file=StringIO())


def test_a_run_its_report_and_its_resume(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, model)
    outcome = run(recipe, resume=False, console=quiet())
    assert outcome.status == "completed", outcome.reason
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/sampler_mismatch"] < 1e-4 for row in rows) and len(rows) == 2
    groups = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    assert all(group["images"][0]["path"].endswith(group["prompt_id"]) for group in groups)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") >= len(groups)
    AutoProcessor.from_pretrained(folder / "model")
    again = evaluate_model(
        EvalCall(
            model=str(folder / "model"), prompts=recipe.data.prompts, labels=None, template="chat", extractor="math", samples=2,
            temperature=1.0, top_p=1.0, max_new_tokens=4, k=(1,), limit=2, seed=0, device="cpu",
        )
    )  # fmt: skip
    assert 0 <= again.estimates["answered"].value <= 1
    solved = solve(
        SolveCall(model=str(folder / "model"), prompts=recipe.data.prompts, votes=4, max_new_tokens=4, limit=2)
    )
    assert [one.id for one in solved] == ["0.png", "1.png"]
    picture(tmp_path / "shown" / "3.png", seed=99)
    with pytest.raises(ConfigError, match="inputs of the run have changed:\n  prompts: was sha256"):
        run(recipe, resume=True, console=quiet())


def test_a_text_model_is_told_before_anything_is_loaded(model: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    words = "'0.png' has images, but the model is one of text only"
    with pytest.raises(ConfigError, match=words):
        check_recipe(recipe_of(tmp_path, tiny_model_dir))
    check_recipe(recipe_of(tmp_path, tiny_model_dir, "data.images_field=null"))
    check_recipe(recipe_of(tmp_path, model))
    with pytest.raises(ConfigError, match=words):
        solve(SolveCall(model=str(tiny_model_dir), prompts=str(tmp_path / "prompts.jsonl")))


def test_a_plan_says_what_it_does_not_count(model: Path, tmp_path: Path) -> None:
    made = make_plan(recipe_of(tmp_path, model), PlanCall())
    assert "6 prompts have images, whose tokens are not counted" in "\n".join(made.notes)
    assert "its vision tower is not counted" in made.shape.source


def test_the_canary_has_no_image_tokens_and_pictures_are_not_dropped_silently(model: Path, tmp_path: Path) -> None:
    one, two, none = prompts(model, tmp_path / "pictures")
    canary = canary_text([one, two, none], None)
    image = open_pictures(str(model)).image_token_id
    assert image not in canary and len(canary) == len(none.token_ids) + sum(
        int((p.token_ids != image).sum()) for p in (one, two)
    )
    records = check_recipe(recipe_of(tmp_path, model)).records
    with pytest.raises(ConfigError, match=r"'0\.png' has images, which are not read here"):
        tokenize(records, load_tokenizer(str(model)), "chat", None)
