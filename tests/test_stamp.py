"""What a run was made of: hashes of prompts and plug-in files, written as comments and compared on resume."""

from __future__ import annotations

from pathlib import Path

from ttrl.config import Recipe, load_recipe, recipe_to_yaml
from ttrl.prompts import PromptRecord
from ttrl.stamp import differences, from_comments, stamp, to_comments
from ttrl.types import Message


def record(text: str) -> PromptRecord:
    return PromptRecord(id="a", messages=(Message(role="user", content=text),))


def recipe(use: str = "majority_vote") -> Recipe:
    return Recipe.model_validate(
        {"name": "x", "steps": 1, "model": {"path": "m"}, "data": {"prompts": "p.jsonl"}, "reward": use}
    )


def test_the_stamp_survives_the_head_of_a_recipe(tmp_path: Path) -> None:
    found = stamp(recipe(), [record("1+1=")])
    assert {"ttrl", "python", "torch", "prompts"} <= found.keys()
    text = to_comments(found) + recipe_to_yaml(recipe())
    assert from_comments(text) == found
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert load_recipe(file).name == "x"


def test_changed_prompts_and_plugins_are_named_and_versions_are_not(tmp_path: Path) -> None:
    plugin = tmp_path / "r.py"
    plugin.write_text("X = 1\n")
    before = stamp(recipe(f"{plugin}:X"), [record("1+1=")])
    assert differences(before, {**before, "torch": "9"}) == []
    plugin.write_text("X = 2\n")
    after = stamp(recipe(f"{plugin}:X"), [record("1+2=")])
    named = "\n".join(differences(before, after))
    assert "prompts: was sha256" in named
    assert "plug-in r.py: was sha256" in named
