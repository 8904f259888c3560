from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ttrl.config import Recipe, load, load_recipe, recipe_to_yaml
from ttrl.config.load import ASSETS, bundled, shipped_recipes
from ttrl.config.source import MAX_EXTENDS, MAX_RECIPE_BYTES, parse_override
from ttrl.errors import ConfigError

MINIMAL = """\
name: test
steps: 3
model: {path: some/model}
data:
  prompts: p.jsonl
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def message(file: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_recipe(file, overrides)
    return str(raised.value)


# loading


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.seed, recipe.rollout.votes_per_prompt, recipe.reward.use) == (0, 16, "majority_vote")
    assert recipe.output == "runs/test"
    assert recipe.rollout.trained == 16
    assert load_recipe(write(tmp_path, MINIMAL), ["rollout.train_per_prompt=4"]).rollout.trained == 4


def test_a_plugin_is_a_name_or_a_name_with_options(tmp_path: Path) -> None:
    text = MINIMAL + "gates: [zero_variance, {use: vote_share, with: {low: 0.1}}]\n"
    gates = load_recipe(write(tmp_path, text)).gates
    assert [(g.use, g.options) for g in gates] == [("zero_variance", {}), ("vote_share", {"low": 0.1})]


def test_a_recipe_does_not_change_after_loading(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.steps = 5  # type: ignore[misc]


def test_the_resolved_recipe_loads_to_the_same_recipe(tmp_path: Path) -> None:
    text = MINIMAL + "reward: {use: majority_vote, with: {extractor: label, options: {labels: [yes, 'no', '1e3']}}}\n"
    text += "trainer: {lr: 5.0e-7}\ndescription: 'tabs\\tand: colons # ü'\neval: {k: [1, 4]}\n"
    recipe = load_recipe(write(tmp_path, text))
    again = load_recipe(write(tmp_path, recipe_to_yaml(recipe), "resolved/again.yaml"))
    assert again == recipe
    assert recipe.reward.options["options"]["labels"] == ["yes", "no", "1e3"]  # YAML 1.2: yes is a word


def test_paths_are_relative_to_the_file_that_states_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "data: {prompts: base.jsonl, template: t.txt}\neval: {labels: l.jsonl}\n", "base/b.yaml")
    text = "extends: ../base/b.yaml\nname: x\nsteps: 1\nmodel: {path: folder/model}\nreward: './plug.py:R'\n"
    text += "gates: ['./g.py:G', answered, {use: '/abs/g.py:G'}]\n"
    text += "objective: {use: grpo, with: {loss: ./l.py:L, note: 'x.py:y'}}\n"
    file = write(tmp_path, text + "eval: {heldout: {prompts: h.jsonl, labels: /abs/l.jsonl}}\n", "own/r.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe(file, ["data.prompts=here.jsonl"])
    assert recipe.eval.heldout is not None
    assert recipe.data.prompts == str(tmp_path / "elsewhere" / "here.jsonl")  # the command line: the working folder
    assert recipe.data.template == str(tmp_path / "base" / "t.txt")
    assert recipe.eval.labels == str(tmp_path / "base" / "l.jsonl")
    assert recipe.eval.heldout.prompts == str(tmp_path / "own" / "h.jsonl")
    assert recipe.eval.heldout.labels == "/abs/l.jsonl"
    assert recipe.reward.use == str(tmp_path / "own" / "plug.py:R")
    assert [gate.use for gate in recipe.gates] == [str(tmp_path / "own" / "g.py:G"), "answered", "/abs/g.py:G"]
    assert recipe.objective.options == {"loss": str(tmp_path / "own" / "l.py:L"), "note": "x.py:y"}
    assert recipe.model.path == "folder/model"  # may be a hub name
    assert load_recipe(file).data.prompts == str(tmp_path / "base" / "base.jsonl")


@pytest.mark.parametrize("path", ["hub:org/set#test", "bundled:tiny-adder/train.prompts.jsonl"])
def test_hub_and_bundled_names_stay_as_they_are(tmp_path: Path, path: str) -> None:
    assert load_recipe(write(tmp_path, MINIMAL), [f"data.prompts={path}"]).data.prompts == path


def test_every_shipped_recipe_loads() -> None:
    for name in shipped_recipes():
        assert load_recipe(name).name


def test_an_unknown_recipe_lists_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, MINIMAL, "recipes/cpu/mine.yaml")
    write(tmp_path, MINIMAL, "recipes/base/math.yaml")
    outside = write(tmp_path, MINIMAL, "outside.yaml")
    monkeypatch.setattr(load, "RECIPES", tmp_path / "recipes")
    assert load_recipe("cpu/mine") == load_recipe("recipes/cpu/mine.yaml")
    for name in ("cpu/mien", "../outside", str(outside.with_suffix(""))):
        assert message(name) == f"{name}: no such recipe file. Shipped recipes: cpu/mine"


# extends and overrides


def test_the_nearer_file_wins_key_by_key_and_the_command_line_wins_over_all(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\ntrainer: {lr: 0.1, grad_clip: 2.0}\ngates: [zero_variance, answered]\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\ntrainer: {lr: 0.2}\nseed: 2\n", "b.yaml")
    file = write(tmp_path, "extends: b.yaml\ngates: [zero_variance]\n" + MINIMAL)
    recipe = load_recipe(file, ["seed=3", "seed=4"])
    assert (recipe.seed, recipe.trainer.lr, recipe.trainer.grad_clip) == (4, 0.2, 2.0)
    assert [gate.use for gate in recipe.gates] == ["zero_variance"]  # lists are replaced whole
    assert load_recipe(file).seed == 2


def test_another_plugin_drops_the_options_of_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, "reward: {use: one, with: {a: 1}}\nobjective: {use: same, with: {a: 1, b: 1}}\n", "base.yaml")
    text = "extends: base.yaml\nreward: {use: two, with: {b: 2}}\nobjective: {use: same, with: {b: 2}}\n"
    recipe = load_recipe(write(tmp_path, text + MINIMAL))
    assert recipe.reward.options == {"b": 2}
    assert recipe.objective.options == {"a": 1, "b": 2}


def test_extends_that_run_in_a_circle_or_nowhere_are_errors(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "steps: 1\nextends: a.yaml\n", "b.yaml")
    assert f"{tmp_path / 'b.yaml'}:2:1: extends runs in a circle" in message(tmp_path / "a.yaml")
    file = write(tmp_path, "extends: missing.yaml\n")
    assert message(file) == f"{file}:1:1: extends: no such file: {tmp_path / 'missing.yaml'}"
    file = write(tmp_path, "extends: [a.yaml]\n")
    assert message(file) == f"{file}:1:1: extends names one file"
    for depth in range(MAX_EXTENDS + 1):
        write(tmp_path, f"extends: d{depth + 1}.yaml\n", f"d{depth}.yaml")
    write(tmp_path, MINIMAL, f"d{MAX_EXTENDS + 1}.yaml")
    assert f"deeper than {MAX_EXTENDS}" in message(tmp_path / "d0.yaml")


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("seed=3", {"seed": 3}),
        ("trainer.lr=1e-5", {"trainer": {"lr": 1e-5}}),
        ("eval.k=[1, 2]", {"eval": {"k": [1, 2]}}),
        ("reward={use: x, with: {a: b=c}}", {"reward": {"use": "x", "with": {"a": "b=c"}}}),
        ("log.wandb=null", {"log": {"wandb": None}}),
        ("name=", {"name": None}),
        ("name='007'", {"name": "007"}),
    ],
)
def test_overrides_are_read_as_yaml(text: str, data: dict[str, Any]) -> None:
    assert parse_override(text).data == data


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=1", ".a=1", "a.=1", ""])
def test_a_broken_override_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not of the form key\.path=value"):
        parse_override(text)


@pytest.mark.parametrize("value", ["[1", "{a: b", "'x", "[" * 1000])
def test_an_override_that_is_not_yaml_is_an_error(value: str) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML"):
        parse_override(f"seed={value}")


# errors


def test_every_violation_is_named_at_once_with_its_place(tmp_path: Path) -> None:
    text = """\
name: test
steps: -1
model: {path: m, dtype: float23}
data:
  prompts: p.jsonl
  promts_per_step: 4
rollout: {temperature: hot}
sed: 1
"""
    file = write(tmp_path, text)
    assert message(file, "trainer.lr=-1", "chekpoint.keep=1").split("\n") == [
        f"{file}:2:1: steps: should be greater than or equal to 1, got -1",
        f"{file}:3:18: model.dtype: 'float23' is not one of 'float32' or 'bfloat16'. Did you mean 'float32'?",
        f"{file}:6:3: data.promts_per_step: unknown key. Did you mean 'prompts_per_step'?",
        f"{file}:7:11: rollout.temperature: should be a valid number, got 'hot'",
        f"{file}:8:1: sed: unknown key. Did you mean 'seed'?",
        "command line (trainer.lr=-1): trainer.lr: should be greater than 0, got -1",
        "command line (chekpoint.keep=1): chekpoint: unknown key. Did you mean 'checkpoint'?",
    ]


def test_missing_keys_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, "name: x\ndata: {}\n")
    assert set(message(file).split("\n")) == {
        f"{file}:1:1: steps: is required",
        f"{file}:1:1: model: is required",
        f"{file}:2:1: data.prompts: is required",
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.votes_per_prompt=1", "should be greater than or equal to 2, got 1"),
        ("rollout.train_per_prompt=32", "train_per_prompt (32) is larger than votes_per_prompt (16)"),
        ("rollout.top_p=0.9", "set rollout.allow_truncated_sampling: true"),
        ("rollout.top_k=50", "set rollout.allow_truncated_sampling: true"),
        ("rollout.min_p=0.1", "set rollout.allow_truncated_sampling: true"),
        ("rollout.temperature=0", "should be greater than 0, got 0"),
        ("trainer.lr=.nan", "trainer.lr"),
        ("trainer.lr=.inf", "trainer.lr"),
        ("eval.k=[]", "name at least one k"),
        ("eval.k=[1, 32]", "pass@32 needs at least 32 samples per prompt, eval.samples is 16"),
        ("name=../evil", "name"),
        ("name=", "name"),
        ("model.device=gpu", "model.device"),
        ("rollout=5", "rollout"),
        ("gates=5", "gates"),
        ("gates=[{with: {a: 1}}]", "gates.0.use: is required"),
        ("gates=[{use: x, wiht: {a: 1}}]", "unknown key. Did you mean 'with'?"),
    ],
)
def test_values_that_make_no_sense_are_errors(tmp_path: Path, override: str, expected: str) -> None:
    text = message(write(tmp_path, MINIMAL), override)
    assert expected in text
    assert text.startswith(f"command line ({override}): ")


def test_truncated_sampling_can_be_allowed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["rollout.top_p=0.9", "rollout.allow_truncated_sampling=true"])
    assert recipe.rollout.top_p == 0.9


def test_evaluation_ks_are_sorted_and_unique(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, MINIMAL), ["eval.k=[8, 1, 8]"]).eval.k == (1, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", r":2:"),
        ("a: 1\n\ta: 2\n", r":2:1: "),
        ("a: 1\na: 2\n", ':2:1: found duplicate key "a"'),
        ("- a\n", ":1:1: a recipe is a mapping of keys to values"),
        ("", ":1:1: a recipe is a mapping of keys to values"),
        ("a: *nowhere\n", ":1:4: found undefined alias"),
        ("a: 1\n---\nb: 2\n", ":2:1: but found another document"),
        ("a: " + "[" * 1000, ": nested too deeply"),
        ("x" * (MAX_RECIPE_BYTES + 1), f": larger than {MAX_RECIPE_BYTES} bytes; this is not a recipe"),
    ],
)
def test_broken_yaml_is_an_error_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    assert message(file).startswith(str(file))
    assert expected in message(file)


def test_aliases_that_unfold_to_billions_of_keys_are_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "keys; this is not a recipe" in message(write(tmp_path, "\n".join(rows)))


def test_aliases_that_nest_too_deeply_are_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 x"] + [f"a{i}: &a{i} {'[' * 100}*a{i - 1}{']' * 100}" for i in range(1, 15)]
    assert message(write(tmp_path, "\n".join(rows))).endswith("nested too deeply")


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "description: !!python/object/apply:os.getcwd []\n")
    assert "description" in message(file)


def test_files_that_are_no_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\n")
    assert message(tmp_path / "r.yaml") == f"{tmp_path / 'r.yaml'}: is not UTF-8 text"


# bundled files


def test_bundled_names_lead_into_the_assets_only() -> None:
    assert bundled("bundled:tiny-adder") == ASSETS / "tiny-adder"
    assert bundled("tiny-adder") is None
    for name in ("", "nope", "../config/load.py", "/etc/passwd", "tiny-adder/../../config"):
        with pytest.raises(ConfigError, match=r"nothing of that name is bundled\. Bundled: .*bundled:tiny-adder"):
            bundled(f"bundled:{name}")


def test_the_schema_describes_every_section() -> None:
    schema = Recipe.model_json_schema(by_alias=True)
    assert set(schema["required"]) == {"name", "steps", "model", "data"}
    assert "with" in schema["$defs"]["Plug"]["properties"]
