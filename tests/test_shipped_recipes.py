"""Every recipe that ships: short, and right in all that can be checked without its model and its data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ttrl import registry
from ttrl.config import Recipe, load_recipe
from ttrl.config.load import RECIPES, shipped_recipes
from ttrl.setup import check_recipe

MAX_LINES = 40
PROMPTS = 64
ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = {"aime24": (240, 8, 8), "amc": (300, 8, 8), "math500": (150, 32, 32), "gpqa": (60, 32, 32)}


def write(folder: Path, recipe: Recipe, kind: str, split: str = "adapted") -> Path:
    """Prompts with the columns that the recipe keeps, or labels that its reward's answers could equal."""
    kept = {name: [40, 30] if name == "image_size" else "x" for name in recipe.data.keep}
    answer = "[1,1,2,2]" if recipe.reward.use == "region_consistency" else "2"
    rows = [{"prompt": f"1+1={split}", **kept} if kind == "prompts" else {"answer": answer} for _ in range(PROMPTS)]
    file = folder / f"{split}.{kind}.jsonl"
    file.write_text("".join(json.dumps({"id": f"{split}-{i}", **row}) + "\n" for i, row in enumerate(rows)))
    return file


def stand_ins(folder: Path, recipe: Recipe) -> list[str]:
    """A model and data for what a recipe leaves to its user."""
    changes = []
    if not Path(recipe.model.path).is_dir() and not recipe.model.path.startswith("bundled:"):
        changes.append("model.path=bundled:tiny-adder")
    if not recipe.data.prompts.startswith("bundled:") and not Path(recipe.data.prompts).is_file():
        changes += [f"data.prompts={write(folder, recipe, 'prompts')}"]
        if recipe.eval.labels is not None:
            changes += [f"eval.labels={write(folder, recipe, 'labels')}"]
        if recipe.eval.heldout is not None:
            changes += [
                f"eval.heldout.{kind}={write(folder, recipe, kind, 'heldout')}" for kind in ("prompts", "labels")
            ]
    return changes


def test_recipes_are_short() -> None:
    long = {f.name: n for f in RECIPES.rglob("*.yaml") if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert long == {}


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_passes_the_check(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PACKAGES", {})  # that vLLM is not installed here says nothing about a recipe
    recipe = load_recipe(name)
    assert recipe.name and recipe.description
    checked = check_recipe(load_recipe(name, stand_ins(tmp_path, recipe)))
    assert checked.recipe.rollout == recipe.rollout


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("model", ["qwen2.5-math-1.5b", "qwen2.5-math-7b", "qwen2.5-7b", "llama-3.1-8b-instruct"])
def test_ttrl_has_its_published_settings(benchmark: str, model: str) -> None:
    recipe = load_recipe(f"ttrl/{benchmark}-{model}")
    steps, prompts, updates = BENCHMARKS[benchmark]
    assert (recipe.steps, recipe.data.prompts_per_step, recipe.trainer.updates_per_step) == (steps, prompts, updates)
    assert (recipe.rollout.votes_per_prompt, recipe.rollout.trained, recipe.rollout.max_new_tokens) == (64, 32, 3072)
    assert recipe.rollout.temperature == (1.0 if "math" in model else 0.6)
    assert model.split("-")[-1] in recipe.model.path.lower() and benchmark in recipe.data.prompts
    trainer = recipe.trainer
    assert (trainer.lr, trainer.schedule, trainer.warmup, trainer.weight_decay) == (5e-7, "cosine", 0.03, 0.01)
    assert trainer.grad_clip == 1.0
    assert recipe.objective.options == {"advantage": "grpo", "loss": "clip", "clip": [0.2, 0.2], "dual_clip": 3.0}
    assert [(plug.use, plug.options) for plug in recipe.stabilizers] == [("kl", {"coefficient": 0.001})]
    assert (recipe.eval.samples, recipe.eval.temperature, recipe.eval.top_p) == (16, 0.6, 0.95)
    assert recipe.reward.options["extractor"] == ("choice" if benchmark == "gpqa" else "math")


@pytest.mark.parametrize("benchmark", ["aime24", "amc", "math500"])
@pytest.mark.parametrize("model", ["qwen2.5-math-1.5b", "qwen2.5-3b", "llama-3.1-8b-instruct"])
def test_ettrl_is_ttrl_with_trees(benchmark: str, model: str) -> None:
    recipe, ttrl = load_recipe(f"ettrl/{benchmark}-{model}"), load_recipe(f"ttrl/{benchmark}-qwen2.5-math-1.5b")
    assert recipe.rollout.sampler.use == "tree" and recipe.rollout.votes_per_prompt == 60
    assert recipe.rollout.sampler.options == {"trees": 12, "forks": 2, "branches": 2, "rounds": 1, "min_gap": 8}
    assert recipe.rollout.temperature == (1.0 if "math" in model else 0.6)
    for same in ("steps", "data", "reward", "objective", "stabilizers", "trainer", "eval"):
        assert getattr(recipe, same) == getattr(ttrl, same), same


@pytest.mark.parametrize(
    "name", ["dtd-internvl3-2b", "dtd-internvl3-8b", "imagenet-internvl3-2b", "imagenet-internvl3-8b"]
)
def test_ttrv_has_its_published_settings(name: str) -> None:
    recipe = load_recipe(f"ttrv/{name}")
    assert recipe.reward.options == {"extractor": "choice", "alpha": 0.75, "normalised": True}
    assert (recipe.rollout.votes_per_prompt, recipe.rollout.trained) == (32, 16)
    assert (recipe.rollout.temperature, recipe.rollout.max_new_tokens, recipe.data.max_prompt_tokens) == (
        1.0,
        1024,
        7524,
    )
    trainer = recipe.trainer
    assert (trainer.lr, trainer.schedule, trainer.warmup, trainer.updates_per_step) == (5e-7, "cosine", 0.03, 8)
    assert [(plug.use, plug.options) for plug in recipe.stabilizers] == [("kl", {"coefficient": 0.001})]
    assert (recipe.steps * recipe.data.prompts_per_step, recipe.eval.samples, recipe.eval.temperature) == (
        2 * 20,
        1,
        0.0,
    )
    assert name.split("-")[-1] in recipe.model.path.lower() and name.split("-")[0] in recipe.data.prompts


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_gui_rcpo_has_its_published_settings(size: str) -> None:
    recipe = load_recipe(f"gui/screenspot-v2-qwen2.5-vl-{size}")
    assert (recipe.steps, recipe.data.prompts_per_step, recipe.rollout.votes_per_prompt) == (40, 64, 16)
    assert recipe.rollout.trained == 16 and recipe.trainer.updates_per_step == 1
    assert (recipe.rollout.temperature, recipe.rollout.max_new_tokens, recipe.trainer.lr) == (0.7, 128, 1e-6)
    assert [(plug.use, plug.options) for plug in recipe.stabilizers] == [("kl", {"coefficient": 0.04, "kind": "k3"})]
    assert recipe.objective.options["clip"] == [0.2, 0.2] and recipe.objective.options["dual_clip"] is None
    assert recipe.reward.options == {"extractor": "box", "coordinates": "resized"} and recipe.trainer.zero == 3
    assert size in recipe.model.path.lower()


# the files of a benchmark


def split(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(ROOT / "scripts" / "split_labels.py"), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, cwd=folder, timeout=60)


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_benchmark_is_split_into_prompts_and_labels(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"problem": "1+1?", "answer": 2, "id": 7}\n{"problem": "½?", "answer": "0.5"}\n')
    result = split(tmp_path, "b.jsonl", "--prompt", "problem", "--answer", "answer", "--output", "out")
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "out.prompts.jsonl") == [
        {"id": "out-000", "prompt": "1+1?"},
        {"id": "out-001", "prompt": "½?"},
    ]
    assert rows(tmp_path / "out.labels.jsonl") == [{"id": "out-000", "answer": "2"}, {"id": "out-001", "answer": "0.5"}]
    result = split(tmp_path, "b.jsonl", "--prompt", "question", "--answer", "answer", "--output", "other")
    assert result.returncode == 1 and "b.jsonl:1: no 'question' (columns: problem, answer, id)" in result.stderr
    assert not list(tmp_path.glob("other*"))


def test_choices_are_shuffled_and_the_label_is_the_letter_of_the_right_one(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"q": f"Q{i}", "r": "right", "w": "wrong", "v": "worse"}) + "\n" for i in range(30))
    (tmp_path / "c.jsonl").write_text(lines)
    assert split(tmp_path, "c.jsonl", "--prompt", "q", "--choices", "r,w,v", "--output", "out").returncode == 0
    letters = []
    for prompt, label in zip(rows(tmp_path / "out.prompts.jsonl"), rows(tmp_path / "out.labels.jsonl"), strict=True):
        assert f"({label['answer']}) right" in prompt["prompt"]
        letters.append(label["answer"])
    assert set(letters) == {"A", "B", "C"}
